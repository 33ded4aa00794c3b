/**
 * Carries out the requests of one session that passed the rules, and answers them: at once if the device can (`readNow`,
 * `writeNow`, no allocation), otherwise when the device completes them. The device is trusted with memory but not with
 * manners: what it throws is answered with EIO and logged once.
 */

import type { Logger } from 'pino';
import { Command, CommandFlag, Errno, IN_FLIGHT_BYTES_MAX, IN_FLIGHT_REQUESTS_MAX } from '../constants.js';
import { type BlockDevice, LATER } from '../device.js';
import type { Recorder } from '../log/recorder.js';
import type { SelectedContext } from './contexts.js';
import type { RequestHead } from './head.js';
import type { Output } from './output.js';
import type { Replies } from './replies.js';
import { EXTENTS_MAX, Request, type RequestOwner } from './request.js';
import { HEAD_ROOM, type Slab, type SlabPool } from './slab.js';
import { failureOf } from './validate.js';

/** Longer READs get a slab of their own from the start, so that they do not leave the ends of output slabs unused. */
const SHARED_READ_BYTES_MAX = 128 << 10;
/** Request objects kept for reuse. */
const SPARE_REQUESTS_MAX = 256;

export class Executor implements RequestOwner {
  /** Requests the device has. */
  active = 0;
  /** Memory bound in them, and in a WRITE that is being received, bytes. */
  bytes = 0;
  /** Nobody waits for answers any more; `silent`: nothing can be sent either. */
  abandoned = false;
  silent = false;

  /** A READ's data is being put where the next answer would go: requests completed meanwhile are answered behind it. */
  #reading = false;
  readonly #deferred: Request[] = [];
  readonly #spare: Request[] = [];
  #faultLogged = false;

  constructor(
    readonly pool: SlabPool,
    private readonly device: BlockDevice,
    private readonly contexts: readonly SelectedContext[],
    private readonly output: Output,
    private readonly replies: Replies,
    private readonly log: Logger,
    /** A request was completed. */
    private readonly onCompleted: () => void,
    /** What a transaction log is told; null: there is none. */
    readonly record: Recorder | null,
  ) {}

  /** Whether a request that needs `bytes` of memory may begin. */
  admits(bytes: number): boolean {
    if (this.active >= IN_FLIGHT_REQUESTS_MAX) return false;
    if (this.record?.full) return false;
    const used = this.bytes + this.output.bytes;
    return used === 0 || used + bytes <= IN_FLIGHT_BYTES_MAX;
  }

  /** Half of what the limits allow is free. */
  get roomy(): boolean {
    return (
      this.active <= IN_FLIGHT_REQUESTS_MAX / 2 &&
      this.bytes + this.output.bytes <= IN_FLIGHT_BYTES_MAX / 2 &&
      !this.record?.full
    );
  }

  /** Memory for a WRITE whose payload is still coming. */
  takeSlab(length: number): Slab {
    const slab = this.pool.take(length);
    this.bytes += slab.buffer.length;
    return slab;
  }

  giveSlab(slab: Slab): void {
    this.bytes -= slab.buffer.length;
    this.pool.give(slab);
  }

  read(head: RequestHead): void {
    const { offset, length } = head;
    if (length === 0) {
      this.record?.answered(head, Errno.OK);
      this.replies.emptyRead(head.cookieHi, head.cookieLo);
    } else if (length > SHARED_READ_BYTES_MAX) this.#readLong(head);
    else {
      const output = this.output;
      const headerBytes = this.replies.dataHeaderBytes;
      const at = output.reserve(headerBytes + length);
      const errno = this.#readNow(offset, length, output.buffer, at + headerBytes);
      if (this.record !== null && errno !== LATER) this.record.answered(head, errno);
      if (errno === Errno.OK) {
        this.replies.dataHeader(output.buffer, at, head.cookieHi, head.cookieLo, offset, length);
        output.advance(headerBytes + length);
      } else if (errno === LATER) this.#hand(head, this.takeSlab(length));
      else this.replies.error(head.cookieHi, head.cookieLo, failureOf(errno));
    }
    if (this.#deferred.length > 0) this.#completeDeferred();
  }

  #readLong(head: RequestHead): void {
    const { cookieHi, cookieLo, offset, length } = head;
    const slab = this.pool.take(length);
    const errno = this.#readNow(offset, length, slab.buffer, HEAD_ROOM);
    if (this.record !== null && errno !== LATER) this.record.answered(head, errno);
    if (errno === Errno.OK) this.replies.data(cookieHi, cookieLo, offset, length, slab);
    else if (errno === LATER) {
      this.bytes += slab.buffer.length;
      this.#hand(head, slab);
    } else {
      this.pool.give(slab);
      this.replies.error(cookieHi, cookieLo, failureOf(errno));
    }
  }

  /** A WRITE whose whole payload lies at `at` in memory that is the session's only during this call. */
  write(head: RequestHead, payload: Buffer, at: number): void {
    const { length } = head;
    const errno = this.#writeNow(head, payload, at);
    if (errno !== LATER) {
      this.#answer(head, errno);
      return;
    }
    const slab = this.takeSlab(length);
    payload.copy(slab.buffer, HEAD_ROOM, at, at + length);
    this.#hand(head, slab);
  }

  /** A WRITE whose payload lies in a slab of `takeSlab`. */
  writeSlab(head: RequestHead, slab: Slab): void {
    const errno = this.#writeNow(head, slab.buffer, HEAD_ROOM);
    if (errno === LATER) {
      this.#hand(head, slab);
      return;
    }
    this.giveSlab(slab);
    this.#answer(head, errno);
  }

  /** FLUSH, TRIM, CACHE, WRITE_ZEROES. */
  command(head: RequestHead): void {
    if (head.length === 0 && head.command !== Command.FLUSH) {
      this.record?.answered(head, Errno.OK);
      this.#answer(head, Errno.OK);
    } else this.#hand(head, null);
  }

  status(head: RequestHead): void {
    const reply = { waiting: this.contexts.length, errno: Errno.OK as number };
    const number = this.record === null ? 0 : this.record.begin(head);
    const extentsMax = (head.flags & CommandFlag.REQ_ONE) !== 0 ? 1 : EXTENTS_MAX;
    for (const { id, name } of this.contexts) {
      const request = this.#begin(head, this.takeSlab(0));
      request.number = number;
      request.beginStatus(name, id, extentsMax, reply);
      this.#give(request);
    }
  }

  changed(request: Request, offset: number, length: number): void {
    if (this.record !== null && !request.recorded) this.record.changed(request, offset, length);
  }

  completed(request: Request, errno: number): void {
    if (this.#reading) {
      request.errno = errno;
      this.#deferred.push(request);
      return;
    }
    this.active--;
    this.bytes -= request.charged;
    if (this.record !== null && request.reply === null) this.record.completed(request, errno, !this.silent);
    if (request.reply !== null) this.#statusDone(request, errno);
    else if (request.command === Command.READ && errno === Errno.OK && !this.silent) {
      this.replies.data(request.cookieHi, request.cookieLo, request.offset, request.length, request.slab!);
    } else {
      if (request.slab !== null) this.pool.give(request.slab);
      if (!this.silent) this.#answer(request, errno);
    }
    request.clear();
    if (!request.poisoned && this.#spare.length < SPARE_REQUESTS_MAX) this.#spare.push(request);
    this.onCompleted();
  }

  #completeDeferred(): void {
    for (const request of this.#deferred) this.completed(request, request.errno);
    this.#deferred.length = 0;
  }

  completedTwice(): void {
    this.#fault(new Error('the device completed a request twice'));
  }

  #statusDone(request: Request, errno: number): void {
    const reply = request.reply!;
    const failure = errno !== Errno.OK || request.extents > 0 ? errno : Errno.EIO;
    if (reply.errno === Errno.OK) reply.errno = failure;
    const last = --reply.waiting === 0;
    if (this.record !== null && last && !this.silent) this.record.reply(request, reply.errno);
    if (reply.errno === Errno.OK && !this.silent) {
      this.replies.status(request, last);
      return;
    }
    if (request.slab !== null) this.pool.give(request.slab);
    if (last && !this.silent) this.#answer(request, reply.errno);
  }

  #answer(to: { readonly cookieHi: number; readonly cookieLo: number }, errno: number): void {
    if (errno === Errno.OK) this.replies.success(to.cookieHi, to.cookieLo);
    else this.replies.error(to.cookieHi, to.cookieLo, failureOf(errno));
  }

  #readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    this.#reading = true;
    try {
      return this.device.readNow(offset, length, buffer, at);
    } catch (error) {
      this.#fault(error);
      return Errno.EIO;
    } finally {
      this.#reading = false;
    }
  }

  #writeNow(head: RequestHead, payload: Buffer, at: number): number {
    if ((head.flags & CommandFlag.FUA) !== 0) return LATER;
    if (this.record !== null) return this.#recordedWriteNow(this.record, head, payload, at);
    try {
      return this.device.writeNow(head.offset, head.length, payload, at);
    } catch (error) {
      this.#fault(error);
      return Errno.EIO;
    }
  }

  #recordedWriteNow(record: Recorder, head: RequestHead, payload: Buffer, at: number): number {
    record.tryWrite(head, payload, at);
    let errno: number = Errno.EIO;
    try {
      errno = this.device.writeNow(head.offset, head.length, payload, at);
    } catch (error) {
      this.#fault(error);
    }
    if (errno === Errno.OK) record.wrote();
    else record.takeBackWrite();
    if (errno !== Errno.OK && errno !== LATER) record.answered(head, errno);
    return errno;
  }

  /** Gives a request to the device; the slab was counted by `takeSlab`. */
  #hand(head: RequestHead, slab: Slab | null): void {
    const request = this.#begin(head, slab);
    if (this.record !== null) request.number = this.record.begin(head);
    this.#give(request);
  }

  #begin(head: RequestHead, slab: Slab | null): Request {
    const request = this.#spare.pop() ?? new Request(this);
    request.begin(head, slab);
    this.active++;
    return request;
  }

  #give(request: Request): void {
    const device = this.device;
    try {
      if (request.reply !== null) device.status(request);
      else if (request.command === Command.READ) device.read(request);
      else if (request.command === Command.WRITE) device.write(request);
      else if (request.command === Command.FLUSH) device.flush(request);
      else if (request.command === Command.TRIM) device.trim(request);
      else if (request.command === Command.WRITE_ZEROES) device.zero(request);
      else device.cache(request);
    } catch (error) {
      this.#fault(error);
      if (!request.withDevice) return;
      request.poisoned = true;
      request.slab = null;
      request.complete(Errno.EIO);
    }
  }

  #fault(error: unknown): void {
    if (this.#faultLogged) return;
    this.#faultLogged = true;
    this.log.error({ err: error }, 'a device misbehaved; its requests fail with EIO. This is a bug of ours');
  }
}
