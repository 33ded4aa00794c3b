/**
 * A compressed connection: a Duplex whose bytes cross the transport below it in frames (codec/frames.ts).
 *
 * Sending. What is written is copied at once, so that the writer's memory is free when `write` returns, into blocks of CONTENT_BYTES. A block
 * becomes a frame when it is full or when the turn in which it was begun is over: nothing waits for more to come. Short ones are sent raw, without
 * a detour; those the policy chooses go through the pool, several at a time, and all leave in the order in which they were written.
 * Unsent content beyond UNSENT_CONTENT_BYTES_MAX makes the writer wait, as a socket would. The transport is given the next frame when it
 * took the last one.
 *
 * Receiving. Frames are unpacked by the pool, several at a time, and read in the order in which they came. Beyond UNREAD_BYTES_MAX of content that
 * is not read yet, or UNREAD_FRAMES_MAX frames, the transport is not read any further.
 *
 * End: each side's end is one of its own, behind the last frame. An end in the middle of a frame, and a frame that is none, destroy the stream
 * ('protocol'), as does whatever breaks the transport; the transport goes with the stream.
 */
import net from 'node:net';
import { Duplex } from 'node:stream';
import { BlockferryError } from '../../errors.js';
import {
  type CompressionLevel,
  FRAME_HEADER_BYTES,
  type Frame,
  FrameKind,
  FrameReader,
  frameError,
  writeFrameHeader,
} from '../codec/frames.js';
import { CompressionPolicy, SHRINKS_BELOW } from './policy.js';
import { type Answer, type CompressionPool, compressionPool, type Done, POOL_THREADS_MAX } from './pool.js';

/**
 * Content of a frame of ours, bytes: enough for zstd to find what repeats, little enough for several threads to have work. An answer of 512 KiB
 * fits in with its header.
 */
export const CONTENT_BYTES = (512 << 10) + 64;
/** Connections of one link that are busy at a time share the threads. */
const CONNECTIONS_BUSY = 2;
/** Shorter content is not worth a thread's time. */
export const COMPRESSED_BYTES_MIN = 8 << 10;
/** A block for little: most turns bring requests, or one small reply. */
const SMALL_BLOCK_BYTES = 4 << 10;
export const UNSENT_CONTENT_BYTES_MAX = 4 << 20;
export const UNREAD_BYTES_MAX = 8 << 20;
export const UNREAD_FRAMES_MAX = 1024;

/** A frame on its way out: null until it is ready. */
interface Outgoing {
  bytes: Uint8Array | null;
  readonly contentBytes: number;
}
interface Incoming {
  content: Buffer | null;
  readonly contentBytes: number;
}

export class CompressedStream extends Duplex {
  /** Bytes of frames, in either direction. */
  wireBytesSent = 0;
  wireBytesReceived = 0;
  readonly #transport: net.Socket | Duplex;
  readonly #pool: CompressionPool;
  readonly policy: CompressionPolicy;
  readonly #reader = new FrameReader();

  /** Content not framed yet: block[FRAME_HEADER_BYTES, at). */
  #block: Buffer | null = null;
  #at = FRAME_HEADER_BYTES;
  #scheduled = false;
  readonly #outgoing: Outgoing[] = [];
  #unsentBytes = 0;
  #written: (() => void) | null = null;
  #ended: (() => void) | null = null;
  /** The transport takes no more. */
  #blocked = false;
  /** When the last long frame left. */
  #leftMs = performance.now();

  readonly #incoming: Incoming[] = [];
  #unreadBytes = 0;
  #wanted = true;
  #paused = false;
  #peerEnded = false;

  /** The transport's reader is this stream from now on, which must be fed (`feed`) if the transport has no 'data'. */
  constructor(
    transport: net.Socket | Duplex,
    level: CompressionLevel,
    { feeds = true, pool = compressionPool() }: { feeds?: boolean; pool?: CompressionPool } = {},
  ) {
    super({ allowHalfOpen: true, decodeStrings: true });
    this.#transport = transport;
    this.#pool = pool;
    this.policy = new CompressionPolicy(level, POOL_THREADS_MAX / CONNECTIONS_BUSY);
    pool.enter();
    transport.on('drain', this.#onDrain);
    transport.on('error', this.#onError);
    transport.once('end', this.#onEnd);
    transport.once('close', this.#onClose);
    if (feeds) transport.on('data', this.feed);
  }

  /** Where the connection's descriptor is found, as TLS sockets have it: it tells whether the client is still there. */
  get _handle(): unknown {
    return (this.#transport as { _handle?: unknown })._handle;
  }

  get remoteAddress(): string | undefined {
    return this.#transport instanceof net.Socket ? this.#transport.remoteAddress : undefined;
  }

  get remotePort(): number | undefined {
    return this.#transport instanceof net.Socket ? this.#transport.remotePort : undefined;
  }

  /** As net.Socket's. */
  destroySoon(): void {
    if (this.writable) this.end();
    if (this.writableFinished) this.destroy();
    else this.once('finish', () => this.destroy());
  }

  // Sending

  override _write(chunk: Buffer, _encoding: string, callback: () => void): void {
    this.#gather(chunk);
    this.#accepted(callback);
  }

  override _writev(chunks: { chunk: Buffer }[], callback: () => void): void {
    for (const { chunk } of chunks) this.#gather(chunk);
    this.#accepted(callback);
  }

  override _final(callback: () => void): void {
    this.#endBlock();
    this.#ended = callback;
    this.#send();
  }

  #accepted(callback: () => void): void {
    if (this.#unsentBytes <= UNSENT_CONTENT_BYTES_MAX) callback();
    else this.#written = callback;
    if (this.#scheduled || this.#block === null) return;
    this.#scheduled = true;
    process.nextTick(this.#turnEnded);
  }

  readonly #turnEnded = (): void => {
    this.#scheduled = false;
    if (!this.destroyed) this.#endBlock();
  };

  #gather(chunk: Buffer): void {
    this.#unsentBytes += chunk.length;
    for (let from = 0; from < chunk.length; ) {
      const left = chunk.length - from;
      this.#makeRoom(left);
      const block = this.#block!;
      const copied = chunk.copy(block, this.#at, from);
      this.#at += copied;
      from += copied;
      if (this.#at === FRAME_HEADER_BYTES + CONTENT_BYTES) this.#endBlock();
    }
  }

  /** Room for some of `bytes`, for all of them if they are few. */
  #makeRoom(bytes: number): void {
    const block = this.#block;
    if (block !== null && (block.length > SMALL_BLOCK_BYTES || this.#at + bytes <= block.length)) return;
    const small = block === null && FRAME_HEADER_BYTES + bytes <= SMALL_BLOCK_BYTES;
    this.#block = small
      ? Buffer.allocUnsafe(SMALL_BLOCK_BYTES)
      : Buffer.allocUnsafeSlow(FRAME_HEADER_BYTES + CONTENT_BYTES);
    block?.copy(this.#block, FRAME_HEADER_BYTES, FRAME_HEADER_BYTES, this.#at);
  }

  /** What was gathered becomes a frame. */
  #endBlock(): void {
    const block = this.#block;
    if (block === null) return;
    const end = this.#at;
    const contentBytes = end - FRAME_HEADER_BYTES;
    this.#block = null;
    this.#at = FRAME_HEADER_BYTES;
    const level = contentBytes < COMPRESSED_BYTES_MIN ? null : this.policy.next();
    if (level === null) {
      this.#outgoing.push({ bytes: rawFrame(block, end), contentBytes });
      this.#send();
      return;
    }
    const frame: Outgoing = { bytes: null, contentBytes };
    this.#outgoing.push(frame);
    const bytesMax = Math.floor(contentBytes * SHRINKS_BELOW);
    this.#pool.run(
      { kind: 'compress', input: block, from: FRAME_HEADER_BYTES, end, level, bytesMax },
      (done) => this.#compressed(frame, level, done),
    );
  }

  #compressed(frame: Outgoing, level: number, done: Done | null): void {
    if (this.destroyed) return;
    if (done === null) {
      this.destroy(poolLost());
      return;
    }
    const { input, output, workMs } = done;
    const { contentBytes } = frame;
    if (output === null) {
      frame.bytes = rawFrame(input, FRAME_HEADER_BYTES + contentBytes);
      this.policy.compressed(level, contentBytes, contentBytes, workMs);
    } else {
      const payloadBytes = output.length - FRAME_HEADER_BYTES;
      writeFrameHeader(output, 0, FrameKind.ZSTD, payloadBytes, contentBytes);
      frame.bytes = output;
      this.policy.compressed(level, contentBytes, payloadBytes, workMs);
    }
    this.#send();
  }

  /** Gives the transport what it takes. */
  #send(): void {
    const transport = this.#transport;
    while (!this.#blocked && this.#outgoing.length > 0) {
      const { bytes, contentBytes } = this.#outgoing[0]!;
      if (bytes === null) return; // it is told when it is ready
      this.#outgoing.shift();
      this.#unsentBytes -= contentBytes;
      this.wireBytesSent += bytes.length;
      this.#left(contentBytes);
      if (!transport.write(bytes)) this.#blocked = true;
    }
    this.#takeMore();
    if (this.#outgoing.length > 0 || this.#blocked || this.#ended === null || this.#block !== null) return;
    const ended = this.#ended;
    this.#ended = null;
    transport.end();
    ended();
  }

  #left(contentBytes: number): void {
    if (contentBytes < COMPRESSED_BYTES_MIN) return;
    const now = performance.now();
    this.policy.left(contentBytes, now - this.#leftMs);
    this.#leftMs = now;
  }

  #takeMore(): void {
    const written = this.#written;
    if (written === null || this.#unsentBytes > UNSENT_CONTENT_BYTES_MAX) return;
    this.#written = null;
    written();
  }

  readonly #onDrain = (): void => {
    this.#blocked = false;
    this.#send();
  };

  // Receiving

  /** Bytes of the transport came, which are not kept. */
  readonly feed = (bytes: Buffer, length = bytes.length): void => {
    if (this.destroyed) return;
    this.wireBytesReceived += length;
    try {
      this.#reader.push(bytes, 0, length, this.#take);
    } catch (error) {
      this.destroy(error as Error);
    }
  };

  readonly #take = ({ kind, payload, contentBytes }: Frame): void => {
    const frame: Incoming = { content: kind === 'raw' ? payload : null, contentBytes };
    this.#incoming.push(frame);
    this.#unreadBytes += contentBytes;
    if (frame.content === null) {
      const answer: Answer = (done) => this.#unpacked(frame, done);
      const end = payload.length;
      this.#pool.run({ kind: 'decompress', input: payload, from: 0, end, bytesMax: contentBytes }, answer);
    }
    this.#deliver();
  };

  #unpacked(frame: Incoming, done: Done | null): void {
    if (this.destroyed) return;
    if (done === null) this.destroy(poolLost());
    else if (done.output === null) this.destroy(frameError('a frame holds something else than it announced'));
    else {
      frame.content = Buffer.from(done.output.buffer, done.output.byteOffset, done.output.length);
      this.#deliver();
    }
  }

  override _read(): void {
    this.#wanted = true;
    this.#deliver();
  }

  #deliver(): void {
    while (this.#wanted && this.#incoming.length > 0) {
      const { content, contentBytes } = this.#incoming[0]!;
      if (content === null) break;
      this.#incoming.shift();
      this.#unreadBytes -= contentBytes;
      this.#wanted = this.push(content);
      if (this.destroyed) return;
    }
    const full = this.#unreadBytes > UNREAD_BYTES_MAX || this.#incoming.length > UNREAD_FRAMES_MAX;
    if (full !== this.#paused) {
      this.#paused = full;
      if (full) this.#transport.pause();
      else this.#transport.resume();
    }
    if (!this.#peerEnded || this.#incoming.length > 0) return;
    if (this.#reader.incomplete) this.destroy(frameError('it ended in the middle of a frame'));
    else if (!this.readableEnded) this.push(null);
  }

  readonly #onEnd = (): void => {
    this.#peerEnded = true;
    this.#deliver();
  };

  readonly #onError = (error: Error): void => {
    this.destroy(error);
  };

  /** Without an error: the transport was given up, or both sides ended. What has come is still read. */
  readonly #onClose = (): void => {
    if (!this.#peerEnded || !this.writableFinished) this.destroy();
  };

  override _destroy(error: Error | null, callback: (error: Error | null) => void): void {
    this.#pool.leave();
    this.#transport.off('data', this.feed);
    this.#transport.destroy();
    this.#outgoing.length = 0;
    this.#incoming.length = 0;
    this.#block = null;
    callback(error);
  }
}

/** The frame of content that lies in block[FRAME_HEADER_BYTES, end) as it is. */
function rawFrame(block: Uint8Array, end: number): Uint8Array {
  const contentBytes = end - FRAME_HEADER_BYTES;
  writeFrameHeader(block, 0, FrameKind.RAW, contentBytes, contentBytes);
  return block.subarray(0, end);
}

function poolLost(): BlockferryError {
  return new BlockferryError('closed', 'a thread that compresses died');
}
