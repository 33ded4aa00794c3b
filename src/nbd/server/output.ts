/**
 * Everything a session sends.
 *
 * Replies gather in a batch: small ones one after the other in the current slab (`reserve`, `advance`), those that
 * already lie in a slab of their own as they are (`push`). `flush` sends the batch as one gathered write. At most one
 * batch is with the socket; what comes meanwhile waits for it in the next one, so that however slowly the client reads,
 * the number of pieces queued stays small. Order between replies is free in NBD, and each piece is whole; where it matters, between chunks
 * of one reply, there is `fence`.
 *
 * Usually the kernel takes a batch at once. The stream tells (`writableLength` is 0 after the write), and its slabs are
 * reused in the same turn, still warm; otherwise when the write's callback comes.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import { send } from '../../native/index.js';
import type { Slab, SlabPool } from './slab.js';

/** Size of the slab replies gather in; a batch is sent when it is full. The longest READ that `exchange` answers just fits. */
export const OUTPUT_SLAB_BYTES = 1 << 20;

/**
 * On TCP, a piece this long or longer is sent as its first bytes, which wait for the rest, and the rest: the same megabyte on loopback then takes
 * a fifth less of the kernel's time. Unix sockets are better off without.
 */
const SPLIT_BYTES_MIN = 256 << 10;
const SPLIT_HEAD_BYTES = 64;

/** Says when answers may leave. */
export interface Gate {
  /** False: not yet; whoever opens it sees to another `flush`. */
  readonly open: boolean;
}

export class Output {
  /** Null: always open. */
  gate: Gate | null = null;
  /** Memory bound in replies the kernel has not taken yet, bytes. */
  bytes = 0;
  /** The current slab's memory. Changes with `reserve`. */
  buffer: Buffer;

  readonly #pool: SlabPool;
  readonly #onSpace: () => void;
  #stream: Duplex | null = null;
  #descriptor: number | null = null;
  #splits = false;
  #broken = false;

  #slab: Slab;
  /** The current slab is filled up to #at, and sent or batched up to #runStart. */
  #runStart = 0;
  #at = 0;
  #view: Buffer;

  /** The batch: pieces and the slabs they lie in. */
  #pieces: Buffer[] = [];
  #slabs: Slab[] = [];
  #batchBytes = 0;
  /** What is with the socket. */
  #sending: Slab[] = [];
  #sendingBytes = 0;
  /** Gathered writes begun, known to be done, and called back for. Callbacks come in order. */
  #issued = 0;
  #settled = 0;
  #calledBack = 0;

  /** `onSpace` is called when the socket took a batch that had to wait; never from within a call of this class's users. */
  constructor(pool: SlabPool, onSpace: () => void) {
    this.#pool = pool;
    this.#onSpace = onSpace;
    this.#slab = pool.take(OUTPUT_SLAB_BYTES);
    this.buffer = this.#slab.buffer;
    this.#view = this.buffer;
  }

  /** `descriptor`: what lies below a plain socket. */
  attach(stream: Duplex, descriptor: number | null = null): void {
    this.#stream = stream;
    this.#descriptor = descriptor;
    this.#splits = stream instanceof net.Socket && stream.remoteFamily !== undefined;
  }

  /** Makes room for `length` <= OUTPUT_SLAB_BYTES bytes in `buffer`; returns where it begins. */
  reserve(length: number): number {
    if (this.#at + length > this.buffer.length) this.#nextSlab();
    return this.#at;
  }

  /** The first `length` reserved bytes are a reply now. */
  advance(length: number): void {
    this.#at += length;
    this.#batchBytes += length;
    this.bytes += length;
  }

  /** What there is so far leaves before whatever comes next. */
  fence(): void {
    this.#endRun();
  }

  /** Adds a reply that fills [start, end) of a slab; the slab is the output's from now on. */
  push(slab: Slab, start: number, end: number): void {
    slab.references++;
    this.#slabs.push(slab);
    this.#pieces.push(slab.buffer.subarray(start, end));
    this.#batchBytes += slab.buffer.length;
    this.bytes += slab.buffer.length;
  }

  /** Nothing waits to be sent, so that what is put into `buffer` from its start on, by `exchange`, may leave around the batch. */
  get idle(): boolean {
    return this.bytes === 0 && this.#at === 0 && this.#stream !== null && !this.#broken;
  }

  /** Grows as batches are taken by the socket. */
  get settled(): number {
    return this.#settled;
  }

  /** The descriptor to send to straight away; -1 if everything has to go through the stream. */
  get directDescriptor(): number {
    const stream = this.#stream;
    const descriptor = this.#descriptor;
    if (stream === null || descriptor === null) return -1;
    // Once it is destroyed the descriptor may be somebody else's.
    return stream.destroyed || !stream.writable || stream.writableLength > 0 ? -1 : descriptor;
  }

  /** Pieces this long or longer are sent in two; 0: none are. */
  get splitBytesMin(): number {
    return this.#splits ? SPLIT_BYTES_MIN : 0;
  }

  /**
   * [start, end) of `buffer` are replies that were put there while it was idle; what comes before has been sent, perhaps the beginning of the
   * first: nothing may leave before it.
   */
  keep(start: number, end: number): void {
    if (start === end) return;
    this.#runStart = start;
    this.#at = start;
    this.advance(end - start);
    this.fence();
  }

  /** Sends the batch, unless an earlier one is still on its way. */
  flush(): void {
    const stream = this.#stream;
    if (stream === null || this.#settled !== this.#issued || this.#broken) return;
    if (this.gate !== null && !this.gate.open) return;
    this.#endRun();
    const pieces = this.#pieces;
    if (pieces.length === 0) return;
    const free = this.#sending;
    this.#sending = this.#slabs;
    this.#slabs = free;
    this.#sendingBytes = this.#batchBytes;
    this.#batchBytes = 0;
    const first = this.#sendNow(pieces);
    const last = pieces.length - 1;
    if (first > last) {
      pieces.length = 0;
      this.#settle();
      return;
    }
    this.#issued++;
    if (last > first) stream.cork();
    for (let i = first; i < last; i++) stream.write(pieces[i]);
    stream.write(pieces[last], this.#flushed);
    if (last > first) stream.uncork();
    pieces.length = 0;
    // Not `destroyed`: a client that hung up fails the write at once, but the stream is destroyed only later.
    if (stream.writableLength === 0 && stream.writable) this.#settle();
  }

  /**
   * Sends what the kernel takes at once, around the stream, which has nothing queued: its queue and callbacks cost more than the system
   * call. Returns the index of the piece to go on with, cut down to what is left of it. What goes wrong the stream will find out.
   */
  #sendNow(pieces: Buffer[]): number {
    const descriptor = this.directDescriptor;
    if (descriptor === -1) return 0;
    for (let i = 0; i < pieces.length; i++) {
      const piece = pieces[i]!;
      const sent = this.#sendPiece(descriptor, piece, i < pieces.length - 1);
      if (sent === piece.length) continue;
      if (sent > 0) pieces[i] = piece.subarray(sent);
      return i;
    }
    return pieces.length;
  }

  /** As `send` answers. */
  #sendPiece(descriptor: number, piece: Buffer, more: boolean): number {
    if (!this.#splits || piece.length < SPLIT_BYTES_MIN)
      return send(descriptor, piece, 0, piece.length, more);
    const head = send(descriptor, piece, 0, SPLIT_HEAD_BYTES, true);
    if (head !== SPLIT_HEAD_BYTES) return head;
    const rest = send(descriptor, piece, head, piece.length - head, more);
    return rest < 0 ? head : head + rest;
  }

  /** The socket is gone: nothing is sent any more. Memory that may still be with the kernel is not reused. */
  destroy(): void {
    if (this.#broken) return;
    this.#broken = true;
    this.#pieces = [];
    this.#slabs = [];
    this.#sending = [];
    this.bytes = 0;
  }

  /** The current slab goes back to the pool if nobody uses it. The output must not be used afterwards. */
  release(): void {
    const clean = this.#slab.references === 0 && this.#settled === this.#issued;
    if (clean) this.#pool.give(this.#slab);
    this.destroy();
  }

  readonly #flushed = (error?: Error | null): void => {
    this.#calledBack++;
    if (error !== undefined && error !== null) return; // 'error' and 'close' follow
    if (this.#broken || this.#calledBack <= this.#settled) return;
    this.#settle();
    this.#onSpace();
  };

  /** What is written in the current slab becomes a piece of the batch. */
  #endRun(): void {
    if (this.#at === this.#runStart) return;
    this.#slab.references++;
    this.#slabs.push(this.#slab);
    this.#pieces.push(
      this.#runStart === 0 ? this.#fromStart() : this.buffer.subarray(this.#runStart, this.#at),
    );
    this.#runStart = this.#at;
  }

  /** At low depth batch after batch is alike: the same view of the same slab serves them all. */
  #fromStart(): Buffer {
    if (this.#view.buffer !== this.buffer.buffer || this.#view.length !== this.#at) {
      this.#view = this.buffer.subarray(0, this.#at);
    }
    return this.#view;
  }

  #nextSlab(): void {
    this.#endRun();
    this.flush();
    if (this.#at === 0) return; // taken by the kernel: the same slab, empty again
    if (this.#slab.references === 0) this.#pool.give(this.#slab);
    this.#slab = this.#pool.take(OUTPUT_SLAB_BYTES);
    this.buffer = this.#slab.buffer;
    this.#at = 0;
    this.#runStart = 0;
  }

  #settle(): void {
    this.#settled = this.#issued;
    this.bytes -= this.#sendingBytes;
    this.#sendingBytes = 0;
    const slabs = this.#sending;
    for (let i = 0; i < slabs.length; i++) {
      const slab = slabs[i]!;
      if (--slab.references > 0) continue;
      if (slab !== this.#slab) this.#pool.give(slab);
      else if (this.#at === this.#runStart) this.#at = this.#runStart = 0;
    }
    slabs.length = 0;
  }
}
