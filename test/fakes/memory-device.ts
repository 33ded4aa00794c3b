import { Errno } from '../../src/nbd/constants.js';
import { type BlockDevice, type IoRequest, LATER, type StatusRequest } from '../../src/nbd/device.js';

export type Kind = 'read' | 'write' | 'flush' | 'trim' | 'zero' | 'cache' | 'status';

/** What happens to a request: in the same call, in a call of its own, on a later turn, or when the test says so. */
export type Manner = 'now' | 'sync' | 'turn' | 'held';

export interface Call {
  kind: Kind;
  offset: number;
  length: number;
  flags: number;
}

/** A device in memory whose manners a test chooses. WRITE_ZEROES zeroes, TRIM and CACHE do nothing, status is all 0. */
export class MemoryDevice implements BlockDevice {
  readonly data: Buffer;
  readonly readOnly: boolean;
  readonly multiConn: boolean;
  readonly preferredBlock = 4096;
  fastZero = false;
  /** Tells of zeros before long READs. */
  findsZeroes = false;
  contexts: readonly string[] = ['base:allocation', 'test:other'];

  /** Every request that reached the device, once: by `...Now` unless that said LATER. */
  readonly calls: Call[] = [];
  readonly held: IoRequest[] = [];
  released = 0;

  manner: (call: Call) => Manner = () => 'now';
  /** 0, or the errno the request fails with; an Error is thrown from the device. */
  failure: (call: Call) => number | Error = () => 0;
  /** Extents of one context, in order. */
  extents: (context: string, request: StatusRequest) => [length: number, status: number][] = (
    _context,
    request,
  ) => [[request.length, 0]];

  constructor(size: number, options: { readOnly?: boolean; multiConn?: boolean } = {}) {
    this.data = Buffer.alloc(size);
    this.readOnly = options.readOnly ?? false;
    this.multiConn = options.multiConn ?? true;
  }

  get size(): number {
    return this.data.length;
  }

  readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    const call: Call = { kind: 'read', offset, length, flags: 0 };
    if (this.manner(call) !== 'now') return LATER;
    this.calls.push(call);
    const errno = this.#fail(call);
    if (errno === 0) this.data.copy(buffer, at, offset, offset + length);
    return errno;
  }

  zeroesNow(offset: number, length: number): number {
    if (!this.findsZeroes) return 0;
    const found = this.data.subarray(offset, offset + length).findIndex((byte) => byte !== 0);
    return found < 0 ? length : found;
  }

  writeNow(offset: number, length: number, buffer: Buffer, at: number): number {
    const call: Call = { kind: 'write', offset, length, flags: 0 };
    if (this.manner(call) !== 'now') return LATER;
    this.calls.push(call);
    const errno = this.#fail(call);
    if (errno === 0) buffer.copy(this.data, offset, at, at + length);
    return errno;
  }

  read(request: IoRequest): void {
    this.#take('read', request);
  }
  write(request: IoRequest): void {
    this.#take('write', request);
  }
  flush(request: IoRequest): void {
    this.#take('flush', request);
  }
  trim(request: IoRequest): void {
    this.#take('trim', request);
  }
  zero(request: IoRequest): void {
    this.#take('zero', request);
  }
  cache(request: IoRequest): void {
    this.#take('cache', request);
  }
  status(request: StatusRequest): void {
    this.#take('status', request);
  }
  release(): void {
    this.released++;
  }

  /** Completes the held requests, oldest first unless another order is given. */
  completeHeld(order: (held: IoRequest[]) => IoRequest[] = (held) => held): void {
    for (const request of order(this.held.splice(0))) this.#kinds.get(request)!();
  }

  readonly #kinds = new Map<IoRequest, () => void>();

  #take(kind: Kind, request: IoRequest): void {
    const call: Call = { kind, offset: request.offset, length: request.length, flags: request.flags };
    const manner = this.manner(call);
    this.calls.push(call);
    const finish = () => request.complete(this.#perform(call, request));
    if (manner === 'turn') setImmediate(finish);
    else if (manner === 'held') {
      this.held.push(request);
      this.#kinds.set(request, finish);
    } else finish();
  }

  #perform(call: Call, request: IoRequest): number {
    const { kind, offset, length } = call;
    const errno = this.#fail(call);
    if (errno !== 0) return errno;
    if (kind === 'read') this.data.copy(request.buffer, request.at, offset, offset + length);
    else if (kind === 'write') request.buffer.copy(this.data, offset, request.at, request.at + length);
    else if (kind === 'zero') this.data.fill(0, offset, offset + length);
    else if (kind === 'status') {
      const status = request as StatusRequest;
      for (const [bytes, value] of this.extents(status.context, status)) status.extent(bytes, value);
    }
    return Errno.OK;
  }

  #fail(call: Call): number {
    const failure = this.failure(call);
    if (typeof failure !== 'number') throw failure;
    return failure;
  }
}
