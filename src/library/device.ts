/**
 * A BlockDevice made of plain functions, sync or async, for those who embed the server.
 *
 * The session has checked bounds, alignment and the right to write before a function is called. Each request is answered exactly
 * once, when its function returns or its promise settles; what it throws becomes an NBD errno, never a crash.
 */

import { BlockferryError, errnoOf } from '../errors.js';
import { type Extent, NbdReplyError } from '../nbd/client/requests.js';
import {
  BASE_ALLOCATION,
  CommandFlag,
  Errno,
  PAYLOAD_BYTES_MAX,
  STRING_BYTES_MAX,
} from '../nbd/constants.js';
import { type BlockDevice, type IoRequest, LATER, type StatusRequest } from '../nbd/device.js';

/** Zeroes written at once for a device without `zero`, bytes. */
const ZEROES_BYTES_MAX = 1 << 20;
const PREFERRED_BLOCK_MIN = 512;
const PREFERRED_BLOCK_DEFAULT = 4096;
const U32_MAX = 0xffffffff;

/** Whether a verb is done when its function returns, or when the promise it gave settles. */
export type Done = void | Promise<void>;

/**
 * What `createDevice` makes a device of. Only `size` and `read` are a must.
 *
 * `offset` and `length` are bytes, offset + length <= size, length >= 1. Up to 1024 requests of each connection may be under way at
 * once, in any order; requests that overlap in time and range may be carried out in either order. `buffer` belongs to the function
 * until it is done, and must not be touched afterwards: its memory is used again.
 *
 * A function fails by throwing or rejecting. The client is told EIO, unless the error is an NbdReplyError (its errno), a
 * BlockferryError of code 'no-space', 'read-only', 'bounds' or 'closed', the failure of an NbdClient's request (what its server said),
 * or an error of Node's with code ENOSPC, EPERM, EACCES, EROFS or EINVAL.
 */
export interface DeviceFunctions {
  /** Bytes, 0..2^53-1. Need not be a multiple of anything. */
  readonly size: number;
  /** Fills the whole buffer with what the device holds from `offset` on. */
  read(offset: number, buffer: Buffer): Done;
  /** Keeps the buffer's content from `offset` on. Without it the device is read-only. */
  write?(offset: number, buffer: Buffer): Done;
  /**
   * Done when every change that was done before the call is on stable storage. Called for FLUSH, and after a change that the client
   * wants durable (FUA). Without it every change counts as durable when it is done.
   */
  flush?(): Done;
  /** The content of the range is of no use any more: may do anything to it, or nothing. Default: nothing. */
  trim?(offset: number, length: number): Done;
  /** The range reads as zeroes when it is done. `noHole`: its space must stay reserved. Default: writes zeroes, 1 MiB at a time. */
  zero?(offset: number, length: number, options: { readonly noHole: boolean }): Done;
  /** The range will soon be read. Default: nothing. */
  cache?(offset: number, length: number): Done;
  /**
   * Status of the range in one of `contexts`: extents that follow one another from `offset` on, at least one. They may end before the
   * range does (the client asks again); what reaches beyond it is cut off. Without it clients are told nothing about holes.
   */
  status?(offset: number, length: number, context: string): readonly Extent[] | Promise<readonly Extent[]>;
  /** Metadata contexts that `status` can report. Default: `base:allocation` with `status`, else none. */
  readonly contexts?: readonly string[];
  /** True: read-only though there is `write`. Default: false with `write`. */
  readonly readOnly?: boolean;
  /** False: a flush covers the connection's own writes only, and clients then use one connection. Default: true. */
  readonly multiConn?: boolean;
  /** Request size that suits the device best, bytes: a power of two, 512..64 MiB. Default: 4096. */
  readonly preferredBlock?: number;
  /** Told of every failure and of the verb that failed; clients see only its errno. Must not throw. */
  onError?(error: unknown, verb: string): void;
}

/** Throws 'usage' when the numbers, or the functions beside each other, make no sense. */
export function createDevice(functions: DeviceFunctions): BlockDevice {
  return new FunctionDevice(functions);
}

class FunctionDevice implements BlockDevice {
  readonly size: number;
  readonly readOnly: boolean;
  readonly multiConn: boolean;
  readonly preferredBlock: number;
  readonly contexts: readonly string[];
  readonly #do: DeviceFunctions;

  constructor(functions: DeviceFunctions) {
    const { size, preferredBlock = PREFERRED_BLOCK_DEFAULT } = functions;
    const contexts = functions.contexts ?? (functions.status === undefined ? [] : [BASE_ALLOCATION]);
    if (!Number.isSafeInteger(size) || size < 0) throw wrong(`its size is ${size}, not 0..2^53-1 bytes`);
    if (typeof functions.read !== 'function') throw wrong('it has no read function');
    if (functions.readOnly === false && functions.write === undefined)
      throw wrong('it is not to be read-only, but has no write function');
    const powerOfTwo = Number.isInteger(preferredBlock) && Number.isInteger(Math.log2(preferredBlock));
    if (!powerOfTwo || preferredBlock < PREFERRED_BLOCK_MIN || preferredBlock > PAYLOAD_BYTES_MAX)
      throw wrong(`its preferredBlock is ${preferredBlock}, not a power of two of 512 bytes to 64 MiB`);
    if (contexts.length > 0 && functions.status === undefined)
      throw wrong('it has contexts, but no status function');
    for (const name of contexts)
      if (!/^[^:\0]+:[^\0]+$/.test(name) || Buffer.byteLength(name) > STRING_BYTES_MAX)
        throw wrong(`${JSON.stringify(name)} is not a context's name, NAMESPACE:LEAF`);
    this.size = size;
    this.readOnly = functions.readOnly ?? functions.write === undefined;
    this.multiConn = functions.multiConn ?? true;
    this.preferredBlock = preferredBlock;
    this.contexts = [...contexts];
    this.#do = functions;
  }

  readNow(): number {
    return LATER;
  }

  writeNow(): number {
    return LATER;
  }

  read(request: IoRequest): void {
    void this.#answer(request, 'read', this.#read(request));
  }

  write(request: IoRequest): void {
    void this.#answer(request, 'write', this.#write(request));
  }

  flush(request: IoRequest): void {
    void this.#answer(request, 'flush', this.#flush());
  }

  trim(request: IoRequest): void {
    void this.#answer(request, 'trim', this.#trim(request));
  }

  zero(request: IoRequest): void {
    void this.#answer(request, 'zero', this.#zero(request));
  }

  cache(request: IoRequest): void {
    void this.#answer(request, 'cache', this.#cache(request));
  }

  status(request: StatusRequest): void {
    void this.#answer(request, 'status', this.#status(request));
  }

  release(): void {}

  /** The only place that completes requests. */
  async #answer(request: IoRequest, verb: string, work: Promise<void>): Promise<void> {
    let errno: number = Errno.OK;
    try {
      await work;
    } catch (error) {
      errno = errnoFor(error);
      this.#tell(error, verb);
    }
    request.complete(errno);
  }

  #tell(error: unknown, verb: string): void {
    try {
      this.#do.onError?.(error, verb);
    } catch {
      // It was asked not to throw; the client's answer matters more.
    }
  }

  async #read({ offset, buffer, at, length }: IoRequest): Promise<void> {
    await this.#do.read(offset, buffer.subarray(at, at + length));
  }

  async #write({ offset, buffer, at, length, flags }: IoRequest): Promise<void> {
    await this.#writer()(offset, buffer.subarray(at, at + length));
    await this.#durable(flags);
  }

  async #flush(): Promise<void> {
    await this.#do.flush?.();
  }

  async #trim({ offset, length, flags }: IoRequest): Promise<void> {
    await this.#do.trim?.(offset, length);
    await this.#durable(flags);
  }

  async #zero(request: IoRequest): Promise<void> {
    const { offset, length, flags } = request;
    if (this.#do.zero === undefined) await this.#writeZeroes(request);
    else await this.#do.zero(offset, length, { noHole: (flags & CommandFlag.NO_HOLE) !== 0 });
    await this.#durable(flags);
  }

  async #cache({ offset, length }: IoRequest): Promise<void> {
    await this.#do.cache?.(offset, length);
  }

  async #status(request: StatusRequest): Promise<void> {
    const { offset, length, context } = request;
    const extents = (await this.#do.status?.(offset, length, context)) ?? [];
    if (extents.length === 0) throw new Error('the status function gave no extent');
    for (const extent of extents) {
      if (!Number.isSafeInteger(extent.length) || extent.length < 1 || !isU32(extent.flags))
        throw new Error(`the status function gave ${extent.length} bytes with flags ${extent.flags}`);
    }
    for (const extent of extents) request.extent(extent.length, extent.flags);
  }

  async #writeZeroes(request: IoRequest): Promise<void> {
    const { offset, length } = request;
    const write = this.#writer();
    for (let at = 0; at < length; at += ZEROES_BYTES_MAX) {
      if (request.abandoned) throw new BlockferryError('closed', 'the client is gone');
      await write(offset + at, Buffer.alloc(Math.min(ZEROES_BYTES_MAX, length - at)));
    }
  }

  /** The flags were taken from the request before its change: it may be gone by now. */
  async #durable(flags: number): Promise<void> {
    if ((flags & CommandFlag.FUA) !== 0) await this.#do.flush?.();
  }

  #writer(): (offset: number, buffer: Buffer) => Done {
    if (this.#do.write === undefined) throw new BlockferryError('read-only', 'the device is read-only');
    return this.#do.write.bind(this.#do);
  }
}

/** NBD errno, never 0, for what a device's function threw. */
function errnoFor(error: unknown): number {
  const said = error instanceof BlockferryError ? error.cause : error;
  if (said instanceof NbdReplyError) return said.errno === Errno.OK ? Errno.EIO : said.errno;
  return errnoOf(error);
}

function isU32(value: number): boolean {
  return Number.isInteger(value) && value >= 0 && value <= U32_MAX;
}

function wrong(what: string): BlockferryError {
  return new BlockferryError('usage', `not a device: ${what}`);
}
