/**
 * The requests a client has in flight.
 *
 * Every request occupies a slot. Its cookie is the slot's index (low half) and how often the slot was used (high half), so
 * a late or invented answer never meets another request: the slot is empty, or the count differs. Slots are reused, nothing
 * is allocated per request but its promise.
 *
 * Invariants: a slot is `active` from `take` until `settle`, and its promise is settled exactly once, in `settle`. The
 * caller's buffer is touched only while the slot is active.
 */

import { BlockferryError } from '../../errors.js';
import { Command, Errno } from '../constants.js';
import { Coverage } from './coverage.js';

/** Requests one client may have in flight. */
export const CLIENT_REQUESTS_MAX = 4096;

/** A run of bytes with the same status, in one metadata context. */
export interface Extent {
  /** Bytes, >= 1. */
  readonly length: number;
  /** Status as the context defines it, 32 bits; of `base:allocation`: Allocation bits. */
  readonly flags: number;
}

/**
 * What a server's error reply said; the `cause` of the 'source-io' error a request fails with. Thrown by a device's function
 * (`createDevice`), it is what the client is told.
 */
export class NbdReplyError extends Error {
  override readonly name = 'NbdReplyError';
  constructor(
    /** NBD errno (Errno), never 0. */
    readonly errno: number,
    message = '',
  ) {
    super(message);
  }
}

type Resolve = (extents: Extent[] | undefined) => void;
type Reject = (error: BlockferryError) => void;

/** One slot. */
export class PendingRequest {
  active = false;
  /** How often the slot was used, modulo 2^32: the cookie's high half. */
  generation = 0;
  command: number = Command.READ;
  flags = 0;
  offset = 0;
  length = 0;
  /** performance.now(). */
  startedAtMs = 0;

  /** READ: where the data goes. */
  buffer: Buffer | null = null;
  at = 0;
  readonly coverage = new Coverage();

  /** BLOCK_STATUS: the context that was asked for, and what it says; ids of all contexts that answered. */
  contextId = 0;
  /** No other context was asked for. */
  filtered = false;
  extents: Extent[] | null = null;
  contextsAnswered: Set<number> | null = null;

  /** A chunk of the answer has arrived. */
  begun = false;
  /** READ: a chunk with a part of the content has arrived. */
  hasContent = false;
  /** The first error of the answer, 0 for none. */
  errno: number = Errno.OK;
  errorMessage = '';

  resolve!: Resolve;
  reject!: Reject;

  constructor(readonly index: number) {}

  reset(): void {
    this.buffer = null;
    this.extents = null;
    this.contextsAnswered = null;
    this.filtered = false;
    this.begun = false;
    this.hasContent = false;
    this.errno = Errno.OK;
    this.errorMessage = '';
    this.coverage.clear();
  }

  describe(): string {
    const name = Object.keys(Command).find((key) => Command[key as keyof typeof Command] === this.command);
    return this.command === Command.FLUSH ? 'FLUSH' : `${name} of ${this.length} bytes at ${this.offset}`;
  }
}

// The executor of every promise below: one function for all, instead of a closure for each.
let capturedResolve: Resolve;
let capturedReject: Reject;
function capture(resolve: Resolve, reject: Reject): void {
  capturedResolve = resolve;
  capturedReject = reject;
}

export class RequestTable {
  readonly #slots: PendingRequest[] = [];
  /** Stack of the indexes of empty slots. */
  readonly #free: number[] = [];
  #active = 0;
  /** Requests settled, ever. */
  settled = 0;
  /** Fragments all reads hold together (Coverage.fragments). */
  fragments = 0;
  /** Called when the last request is settled. */
  onIdle: (() => void) | null = null;
  /** Called when the server answers that it is shutting down. */
  onShutdown: (() => void) | null = null;

  get active(): number {
    return this.#active;
  }

  /** An empty slot, active from now on; null when CLIENT_REQUESTS_MAX are in flight. `promiseOf` goes with it. */
  take(): PendingRequest | null {
    let index = this.#free.pop();
    if (index === undefined) {
      index = this.#slots.length;
      if (index === CLIENT_REQUESTS_MAX) return null;
      this.#slots.push(new PendingRequest(index));
    }
    const request = this.#slots[index] as PendingRequest;
    request.active = true;
    request.generation = (request.generation + 1) >>> 0;
    this.#active++;
    return request;
  }

  promiseOf(request: PendingRequest): Promise<Extent[] | undefined> {
    const promise = new Promise<Extent[] | undefined>(capture);
    request.resolve = capturedResolve;
    request.reject = capturedReject;
    return promise;
  }

  /** The active request with this cookie, or null. */
  find(cookieHigh: number, cookieLow: number): PendingRequest | null {
    if (cookieLow >= this.#slots.length) return null;
    const request = this.#slots[cookieLow] as PendingRequest;
    return request.active && request.generation === cookieHigh ? request : null;
  }

  /** Empties the slot and settles its promise: with the error, else as `request` recorded it. */
  settle(request: PendingRequest, error: BlockferryError | null): void {
    const extents = request.extents ?? undefined;
    this.fragments -= request.coverage.fragments;
    const shutdown = request.errno === Errno.ESHUTDOWN;
    const failure = error ?? (request.errno === Errno.OK ? null : refusedBySource(request));
    request.active = false;
    request.reset();
    this.#free.push(request.index);
    this.#active--;
    this.settled++;
    if (failure === null) request.resolve(extents);
    else request.reject(failure);
    if (shutdown) this.onShutdown?.();
    if (this.#active === 0) this.onIdle?.();
  }

  /** Settles every request with `error`. */
  failAll(error: BlockferryError): void {
    for (const request of this.#slots) if (request.active) this.settle(request, error);
  }

  /** The request that has waited longest since before `sinceMs`, or null. */
  overdue(sinceMs: number): PendingRequest | null {
    let oldest: PendingRequest | null = null;
    for (const request of this.#slots) {
      if (request.active && request.startedAtMs < (oldest?.startedAtMs ?? sinceMs)) oldest = request;
    }
    return oldest;
  }
}

function refusedBySource(request: PendingRequest): BlockferryError {
  const code = Object.keys(Errno).find((key) => Errno[key as keyof typeof Errno] === request.errno);
  const name = code === undefined ? `error ${request.errno}` : `${code} (${request.errno})`;
  const said = request.errorMessage === '' ? '' : `: '${request.errorMessage}'`;
  return new BlockferryError('source-io', `the source failed ${request.describe()} with ${name}${said}`, {
    cause: new NbdReplyError(request.errno, request.errorMessage),
  });
}
