/**
 * Received bytes -> requests, in place: a header is copied only if it came in parts, a WRITE's payload only if it did not
 * come whole. Chunks may be cut anywhere. Requests that break the rules are answered here; the payload of such a request is
 * thrown away as it comes, without memory.
 */

import { Command, EXTENDED_REQUEST_HEADER_BYTES, PAYLOAD_BYTES_MAX } from '../constants.js';
import { FILTER_BYTES_MIN, filterBytesMax, filterContexts, type SelectedContext } from './contexts.js';
import type { Executor } from './executor.js';
import { RequestHead } from './head.js';
import type { Replies } from './replies.js';
import { HEAD_ROOM, type Slab } from './slab.js';
import { type Refusal, type Rules, SHUTTING_DOWN, WRONG_FILTER } from './validate.js';

const CHANGES: ReadonlySet<number> = new Set([Command.WRITE, Command.TRIM, Command.WRITE_ZEROES]);

/** What comes next. */
const HEADER = 0;
/** A header was taken; its request waits to be begun. */
const BEGIN = 1;
/** The rest of a WRITE's payload, into a slab. */
const FILL = 2;
/** The rest of a refused request's payload. */
const SKIP = 3;
/** The rest of the payload of a BLOCK_STATUS: which contexts it asks for. */
const FILTER = 4;

export class RequestParser {
  /** The next request does not fit into the limits yet: `parse` stopped before it, and begins with it next time. */
  stalled = false;
  /**
   * The client is done (DISC), what it sends is no NBD, or (extended headers) announces a payload that is too long: nothing more is
   * to be parsed.
   */
  over: 'disconnected' | 'garbage' | 'excess' | null = null;

  readonly #head: RequestHead;
  readonly #header = Buffer.alloc(EXTENDED_REQUEST_HEADER_BYTES);
  #headerBytes = 0;
  #state = HEADER;
  #missing = 0;
  #slab: Slab | null = null;
  #filter: Buffer | null = null;
  #refusal: Refusal | null = null;
  #draining = false;
  #changing = true;

  constructor(
    private readonly rules: Rules,
    private readonly executor: Executor,
    private readonly replies: Replies,
    private readonly contexts: readonly SelectedContext[],
    private readonly extended: boolean,
  ) {
    this.#head = new RequestHead(extended);
  }

  /** The next byte begins a request. */
  get between(): boolean {
    return this.#state === HEADER && this.#headerBytes === 0;
  }

  /**
   * A WRITE's payload is missing: its rest is taken from `receive`, which fills a part of a buffer, from its start on, and answers how many
   * bytes it was. Whether that was all.
   */
  fill(receive: (buffer: Buffer, at: number, length: number) => number): boolean {
    if (this.#state !== FILL) return false;
    const done = this.#head.payload - this.#missing;
    this.#missing -= receive(this.#slab!.buffer, HEAD_ROOM + done, this.#missing);
    if (this.#missing > 0) return false;
    this.#endPayload();
    return true;
  }

  /**
   * Takes the bytes [at, end) of `chunk`; returns how far it came: `end`, unless it is `stalled` or `over`, or wanted for `one` request, or what
   * is left of it, alone.
   */
  parse(chunk: Buffer, at: number, end: number, one: boolean): number {
    this.stalled = false;
    let from = at;
    for (;;) {
      if (this.#state === HEADER) {
        from = this.#takeHeader(chunk, from, end);
        if (this.#state === HEADER || this.over !== null) return from;
      }
      if (this.#state === BEGIN) {
        if (!this.executor.admits(this.#payloadBytes())) {
          this.stalled = true;
          return from;
        }
        this.#state = HEADER;
        from = this.#begin(chunk, from, end);
        if (this.over !== null || (one && this.#state === HEADER)) return from;
      } else {
        const count = Math.min(this.#missing, end - from);
        if (this.#state !== SKIP) this.#keep(chunk, from, count);
        this.#missing -= count;
        from += count;
        if (this.#missing > 0) return from;
        this.#endPayload();
        if (one) return from;
      }
    }
  }

  /** From now on requests get ESHUTDOWN; so does a WRITE whose payload is not complete: it may never come. */
  drain(): void {
    this.#draining = true;
    if (this.#state !== FILL && this.#state !== FILTER) return;
    this.drop();
    this.#refusal = SHUTTING_DOWN;
    this.#state = SKIP;
  }

  /** From now on requests that change the device get ESHUTDOWN. */
  refuseChanges(): void {
    this.#changing = false;
  }

  /** Gives back the memory of an incomplete WRITE. */
  drop(): void {
    if (this.#slab === null) return;
    this.executor.giveSlab(this.#slab);
    this.#slab = null;
  }

  #takeHeader(chunk: Buffer, at: number, end: number): number {
    const head = this.#head;
    let next = at + head.bytes;
    let valid: boolean;
    if (this.#headerBytes === 0 && next <= end) valid = head.parse(chunk, at);
    else {
      next = Math.min(at + head.bytes - this.#headerBytes, end);
      chunk.copy(this.#header, this.#headerBytes, at, next);
      this.#headerBytes += next - at;
      if (this.#headerBytes < head.bytes) return next;
      this.#headerBytes = 0;
      valid = head.parse(this.#header, 0);
    }
    if (valid) this.#state = BEGIN;
    else this.over = 'garbage';
    return next;
  }

  /** Memory that the request will need at most. */
  #payloadBytes(): number {
    const { command, length, payload } = this.#head;
    const carries = command === Command.WRITE || (command === Command.READ && payload === 0);
    return carries && length <= PAYLOAD_BYTES_MAX ? length : 0;
  }

  /** Begins the request of the header, with what follows it in the chunk from `at` on. */
  #begin(chunk: Buffer, at: number, end: number): number {
    const { executor } = this;
    const head = this.#head;
    const { command } = head;
    if (command === Command.DISC) {
      this.over = 'disconnected';
      executor.record?.disconnected(head);
      return at;
    }
    if (head.payload > 0) return this.#beginPayload(chunk, at, end);
    const refusal = this.#refusalOf(head.length);
    if (refusal !== null) this.#refuse(refusal);
    else if (command === Command.READ) executor.read(head);
    else if (command === Command.BLOCK_STATUS) executor.status(head, this.contexts);
    else executor.command(head);
    return at;
  }

  /** As `#begin`, of a request with a payload. */
  #beginPayload(chunk: Buffer, at: number, end: number): number {
    const head = this.#head;
    const { payload, command } = head;
    if (this.extended && payload > PAYLOAD_BYTES_MAX) {
      this.over = 'excess'; // as doc/proto.md wants it; the payload of a compact WRITE has 4 GiB at most, and is read past
      return at;
    }
    const filters = this.extended && command === Command.BLOCK_STATUS;
    let refusal = this.#refusalOf(filters ? 1 : head.length);
    if (filters && refusal === null && !this.#holdsFilter(payload)) refusal = WRONG_FILTER;
    this.#missing = payload;
    if (refusal !== null) {
      this.#refusal = refusal;
      this.#state = SKIP;
    } else if (filters) {
      this.#filter ??= Buffer.alloc(filterBytesMax(this.contexts));
      this.#state = FILTER;
    } else if (end - at >= payload) {
      this.executor.write(head, chunk, at);
      return at + payload;
    } else {
      this.#slab = this.executor.takeSlab(payload);
      this.#state = FILL;
    }
    return at;
  }

  #refusalOf(length: number): Refusal | null {
    const head = this.#head;
    if (this.#draining || (!this.#changing && CHANGES.has(head.command))) return SHUTTING_DOWN;
    return this.rules.refusalOf(head.command, head.flags, head.offset, length);
  }

  #holdsFilter(bytes: number): boolean {
    return bytes >= FILTER_BYTES_MIN && bytes <= filterBytesMax(this.contexts) && bytes % 4 === 0;
  }

  #keep(chunk: Buffer, at: number, count: number): void {
    const done = this.#head.payload - this.#missing;
    if (this.#state === FILL) chunk.copy(this.#slab!.buffer, HEAD_ROOM + done, at, at + count);
    else chunk.copy(this.#filter!, done, at, at + count);
  }

  #endPayload(): void {
    const head = this.#head;
    const state = this.#state;
    this.#state = HEADER;
    if (state === SKIP) this.#refuse(this.#refusal!);
    else if (state === FILTER) this.#filteredStatus();
    else {
      const slab = this.#slab!;
      this.#slab = null;
      this.executor.writeSlab(head, slab);
    }
  }

  #refuse(refusal: Refusal): void {
    this.executor.record?.answered(this.#head, refusal.errno);
    this.replies.error(this.#head, refusal);
  }

  #filteredStatus(): void {
    const head = this.#head;
    const wanted = filterContexts(this.contexts, this.#filter!.subarray(0, head.payload));
    const refusal = wanted === null ? WRONG_FILTER : this.#refusalOf(wanted.length);
    if (refusal !== null) {
      this.#refuse(refusal);
      return;
    }
    head.length = wanted!.length;
    this.executor.status(head, wanted!.contexts);
  }
}
