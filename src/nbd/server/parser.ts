/**
 * Received bytes -> requests, in place: a header is copied only if it came in parts, a WRITE's payload only if it did not
 * come whole. Chunks may be cut anywhere. Requests that break the rules are answered here; the payload of such a WRITE is
 * thrown away as it comes, without memory.
 */

import { Command, PAYLOAD_BYTES_MAX, REQUEST_HEADER_BYTES } from '../constants.js';
import type { Executor } from './executor.js';
import { RequestHead } from './head.js';
import type { Replies } from './replies.js';
import { HEAD_ROOM, type Slab } from './slab.js';
import { type Refusal, type Rules, refusalOf, SHUTTING_DOWN } from './validate.js';

/** What comes next. */
const HEADER = 0;
/** A header was taken; its request waits to be begun. */
const BEGIN = 1;
/** The rest of a WRITE's payload, into a slab. */
const FILL = 2;
/** The rest of a refused WRITE's payload. */
const SKIP = 3;

export class RequestParser {
  /** The next request does not fit into the limits yet: `parse` stopped before it, and begins with it next time. */
  stalled = false;
  /** The client is done (DISC), or what it sends is no NBD: nothing more is to be parsed. */
  over: 'disconnected' | 'garbage' | null = null;

  readonly #head = new RequestHead();
  readonly #header = Buffer.alloc(REQUEST_HEADER_BYTES);
  #headerBytes = 0;
  #state = HEADER;
  #missing = 0;
  #slab: Slab | null = null;
  #refusal: Refusal | null = null;
  #draining = false;

  constructor(
    private readonly rules: Rules,
    private readonly executor: Executor,
    private readonly replies: Replies,
  ) {}

  /** Takes the bytes [at, end) of `chunk`; returns how far it came: `end`, unless it is `stalled` or `over`. */
  parse(chunk: Buffer, at: number, end: number): number {
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
        if (this.over !== null) return from;
      } else {
        const count = Math.min(this.#missing, end - from);
        if (this.#state === FILL) this.#fill(chunk, from, count);
        this.#missing -= count;
        from += count;
        if (this.#missing > 0) return from;
        this.#endPayload();
      }
    }
  }

  /** From now on requests get ESHUTDOWN; so does a WRITE whose payload is not complete: it may never come. */
  drain(): void {
    this.#draining = true;
    if (this.#state !== FILL) return;
    this.drop();
    this.#refusal = SHUTTING_DOWN;
    this.#state = SKIP;
  }

  /** Gives back the memory of an incomplete WRITE. */
  drop(): void {
    if (this.#slab === null) return;
    this.executor.giveSlab(this.#slab);
    this.#slab = null;
  }

  #takeHeader(chunk: Buffer, at: number, end: number): number {
    const head = this.#head;
    let next = at + REQUEST_HEADER_BYTES;
    let valid: boolean;
    if (this.#headerBytes === 0 && next <= end) valid = head.parse(chunk, at);
    else {
      next = Math.min(at + REQUEST_HEADER_BYTES - this.#headerBytes, end);
      chunk.copy(this.#header, this.#headerBytes, at, next);
      this.#headerBytes += next - at;
      if (this.#headerBytes < REQUEST_HEADER_BYTES) return next;
      this.#headerBytes = 0;
      valid = head.parse(this.#header, 0);
    }
    if (valid) this.#state = BEGIN;
    else this.over = 'garbage';
    return next;
  }

  /** Memory that the request will need at most. */
  #payloadBytes(): number {
    const { command, length } = this.#head;
    const carries = command === Command.READ || command === Command.WRITE;
    return carries && length <= PAYLOAD_BYTES_MAX ? length : 0;
  }

  /** Begins the request of the header, with what follows it in the chunk from `at` on. */
  #begin(chunk: Buffer, at: number, end: number): number {
    const { executor, replies } = this;
    const head = this.#head;
    const { command } = head;
    if (command === Command.DISC) {
      this.over = 'disconnected';
      executor.record?.disconnected(head);
      return at;
    }
    const refusal = this.#draining
      ? SHUTTING_DOWN
      : refusalOf(this.rules, command, head.flags, head.offset, head.length);
    if (command === Command.WRITE && head.length > 0) return this.#beginWrite(chunk, at, end, refusal);
    if (refusal !== null) {
      executor.record?.answered(head, refusal.errno);
      replies.error(head.cookieHi, head.cookieLo, refusal);
    } else if (command === Command.READ) executor.read(head);
    else if (command === Command.BLOCK_STATUS) executor.status(head);
    else executor.command(head);
    return at;
  }

  #beginWrite(chunk: Buffer, at: number, end: number, refusal: Refusal | null): number {
    const head = this.#head;
    const { length } = head;
    if (refusal !== null) {
      this.#refusal = refusal;
      this.#missing = length;
      this.#state = SKIP;
      return at;
    }
    if (end - at >= length) {
      this.executor.write(head, chunk, at);
      return at + length;
    }
    this.#slab = this.executor.takeSlab(length);
    this.#missing = length;
    this.#state = FILL;
    return at;
  }

  #fill(chunk: Buffer, at: number, count: number): void {
    chunk.copy(this.#slab!.buffer, HEAD_ROOM + this.#head.length - this.#missing, at, at + count);
  }

  #endPayload(): void {
    const head = this.#head;
    const filled = this.#state === FILL;
    this.#state = HEADER;
    if (!filled) {
      this.executor.record?.answered(head, this.#refusal!.errno);
      this.replies.error(head.cookieHi, head.cookieLo, this.#refusal!);
      return;
    }
    const slab = this.#slab!;
    this.#slab = null;
    this.executor.writeSlab(head, slab);
  }
}
