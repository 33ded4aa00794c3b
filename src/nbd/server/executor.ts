/**
 * Carries out the requests of one session that passed the rules, and answers them: at once if the device can (`readNow`,
 * `writeNow`, no allocation), otherwise when the device completes them. The device is trusted with memory but not with
 * manners: what it throws is answered with EIO and logged once.
 */

import type { Logger } from 'pino';
import {
  Command,
  CommandFlag,
  Errno,
  IN_FLIGHT_BYTES_MAX,
  IN_FLIGHT_BYTES_TOTAL_MAX,
  IN_FLIGHT_REQUESTS_MAX,
  type ReplyForm,
  UNSENT_BYTES_MAX,
} from '../constants.js';
import { type BlockDevice, LATER } from '../device.js';
import type { Recorder } from '../log/recorder.js';
import type { SelectedContext } from './contexts.js';
import type { RequestHead } from './head.js';
import { OUTPUT_SLAB_BYTES, type Output } from './output.js';
import type { Replies } from './replies.js';
import { EXTENTS_MAX, Request, type RequestOwner } from './request.js';
import { HEAD_ROOM, type Slab, type SlabPool } from './slab.js';
import { failureOf } from './validate.js';

/** Longer READs get a slab of their own from the start, so that they do not leave the ends of output slabs unused. */
const SHARED_READ_BYTES_MAX = 128 << 10;
/** Zeros of so many bytes are worth a question to the device, and a chunk of their own. */
export const HOLE_READ_BYTES_MIN = 64 << 10;
/** Bytes read for one session in one turn, before the other sessions have theirs; a BLOCK_STATUS counts as STATUS_BYTES. */
const TURN_BYTES_MAX = 4 << 20;
const STATUS_BYTES = 64 << 10;
/** Request objects kept for reuse. */
const SPARE_REQUESTS_MAX = 256;

/** Memory bound by all sessions of this thread, as of the last `count` of each, bytes. */
let boundBytes = 0;

export class Executor implements RequestOwner {
  /** Requests the device has, and how many it was given in all. */
  active = 0;
  given = 0;
  /** Memory bound in them, and in a WRITE that is being received, bytes. */
  bytes = 0;
  /** Nobody waits for answers any more; `silent`: nothing can be sent either. */
  abandoned = false;
  silent = false;
  /** The next READ is known to wait for the disk. */
  cold = false;

  readonly extended: boolean;
  /** Zeros at the beginning of a long READ are left out. */
  readonly #finds: boolean;

  /** A READ's data is being put where the next answer would go: requests completed meanwhile are answered behind it. */
  #reading = false;
  readonly #deferred: Request[] = [];
  readonly #spare: Request[] = [];
  #faultLogged = false;
  /** This session's part of `boundBytes`. */
  #countedBytes = 0;
  #turnBytes = 0;
  #unsentBytesMax = UNSENT_BYTES_MAX;

  constructor(
    readonly pool: SlabPool,
    private readonly device: BlockDevice,
    form: ReplyForm,
    private readonly output: Output,
    private readonly replies: Replies,
    private readonly log: Logger,
    /** A request was completed. */
    private readonly onCompleted: () => void,
    /** What a transaction log is told; null: there is none. */
    readonly record: Recorder | null,
  ) {
    this.extended = form === 'extended';
    // A log records a READ as it was sent, and as one.
    this.#finds = form !== 'simple' && device.zeroesNow !== undefined && record === null;
  }

  /** READs that are as long as this, or shorter, are answered by data alone, in the current slab of the output. */
  get directReadBytesMax(): number {
    return this.#finds ? HOLE_READ_BYTES_MIN - 1 : OUTPUT_SLAB_BYTES;
  }

  /** Memory bound in requests, and in answers the client has not taken, bytes. */
  get usedBytes(): number {
    return this.bytes + this.output.bytes;
  }

  /** Tells the other sessions of this thread how much memory this one binds. */
  count(): void {
    const used = this.usedBytes;
    boundBytes += used - this.#countedBytes;
    this.#countedBytes = used;
  }

  /** The client may be waiting for us to read what it sent: until it has taken all answers, only IN_FLIGHT_BYTES_MAX bounds them. */
  indulge(): void {
    this.#unsentBytesMax = IN_FLIGHT_BYTES_MAX;
  }

  /** It has more room than UNSENT_BYTES_MAX leaves it. */
  get heldBack(): boolean {
    return this.output.bytes > this.#unsentBytesMax && this.#unsentBytesMax < IN_FLIGHT_BYTES_MAX;
  }

  beginTurn(): void {
    this.#turnBytes = 0;
    if (this.output.bytes === 0) this.#unsentBytesMax = UNSENT_BYTES_MAX;
  }

  /** It is the other sessions' turn. */
  get turnOver(): boolean {
    return this.#turnBytes > TURN_BYTES_MAX;
  }

  /** Whether a request that needs `bytes` of memory may begin. */
  admits(bytes: number): boolean {
    if (this.active >= IN_FLIGHT_REQUESTS_MAX || this.turnOver || this.record?.full) return false;
    if (this.output.bytes > this.#unsentBytesMax) return false;
    const used = this.usedBytes;
    if (used === 0) return true;
    const ofOthers = boundBytes - this.#countedBytes;
    return used + bytes <= IN_FLIGHT_BYTES_MAX && ofOthers + used + bytes <= IN_FLIGHT_BYTES_TOTAL_MAX;
  }

  /** Half of what the limits allow is free; then any request is admitted. */
  get roomy(): boolean {
    if (this.active > IN_FLIGHT_REQUESTS_MAX / 2 || this.record?.full) return false;
    if (this.output.bytes > this.#unsentBytesMax / 2) return false;
    const used = this.usedBytes;
    if (used === 0) return true;
    const ofOthers = boundBytes - this.#countedBytes;
    return used <= IN_FLIGHT_BYTES_MAX / 2 && ofOthers + used <= IN_FLIGHT_BYTES_TOTAL_MAX / 2;
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
    if (head.length === 0) {
      this.record?.answered(head, Errno.OK);
      this.replies.emptyRead(head);
    } else if (head.length < HOLE_READ_BYTES_MIN || !this.#finds || !this.#hole(head)) this.#readData(head);
    if (this.#deferred.length > 0) this.#completeDeferred();
  }

  /**
   * Answers the zeros that a READ begins with, if that is worth it, and leaves the rest of it in `head`: true if there is none. What the
   * device says here is true until it is asked for data, or changed: both in steps of this thread, after this one.
   */
  #hole(head: RequestHead): boolean {
    if ((head.flags & CommandFlag.DF) !== 0) return false;
    const zeroes = Math.min(this.#zeroesNow(head.offset, head.length), head.length);
    if (zeroes < HOLE_READ_BYTES_MIN) return false;
    const whole = zeroes === head.length;
    this.replies.hole(head, head.offset, zeroes, whole);
    head.offset += zeroes;
    head.length -= zeroes;
    return whole;
  }

  #zeroesNow(offset: number, length: number): number {
    try {
      return this.device.zeroesNow!(offset, length);
    } catch (error) {
      this.fault(error);
      return 0;
    }
  }

  #readData(head: RequestHead): void {
    const { offset, length } = head;
    this.#turnBytes += length;
    if (length > SHARED_READ_BYTES_MAX) this.#readLong(head);
    else {
      const output = this.output;
      const headerBytes = this.replies.dataHeaderBytes;
      const at = output.reserve(headerBytes + length);
      const errno = this.#readNow(offset, length, output.buffer, at + headerBytes);
      if (this.record !== null && errno !== LATER) this.record.answered(head, errno);
      if (errno === Errno.OK) {
        this.replies.dataHeader(output.buffer, at, head, offset, length);
        output.advance(headerBytes + length);
      } else if (errno === LATER) this.#hand(head, this.takeSlab(length));
      else this.#answer(head, errno);
    }
  }

  #readLong(head: RequestHead): void {
    const { offset, length } = head;
    const slab = this.pool.take(length);
    const errno = this.#readNow(offset, length, slab.buffer, HEAD_ROOM);
    if (this.record !== null && errno !== LATER) this.record.answered(head, errno);
    if (errno === Errno.OK) {
      this.replies.data(head, offset, length, slab);
      this.output.flush(); // while it is warm, and so that the next one may have the same slab
    } else if (errno === LATER) {
      this.bytes += slab.buffer.length;
      this.#hand(head, slab);
    } else {
      this.pool.give(slab);
      this.#answer(head, errno);
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

  /** BLOCK_STATUS in these contexts, at least one. */
  status(head: RequestHead, contexts: readonly SelectedContext[]): void {
    const reply = { waiting: contexts.length, errno: Errno.OK as number };
    const number = this.record === null ? 0 : this.record.begin(head);
    this.#turnBytes += STATUS_BYTES;
    const extentsMax = (head.flags & CommandFlag.REQ_ONE) !== 0 ? 1 : EXTENTS_MAX;
    for (const { id, name } of contexts) {
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
      this.replies.data(request, request.offset, request.length, request.slab!);
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
    this.fault(new Error('the device completed a request twice'));
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

  #answer(to: RequestHead | Request, errno: number): void {
    if (errno === Errno.OK) this.replies.success(to);
    else this.replies.error(to, failureOf(errno, to.command, to.flags));
  }

  #readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    if (this.cold) return LATER;
    this.#reading = true;
    try {
      return this.device.readNow(offset, length, buffer, at);
    } catch (error) {
      this.fault(error);
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
      this.fault(error);
      return Errno.EIO;
    }
  }

  #recordedWriteNow(record: Recorder, head: RequestHead, payload: Buffer, at: number): number {
    record.tryWrite(head, payload, at);
    let errno: number = Errno.EIO;
    try {
      errno = this.device.writeNow(head.offset, head.length, payload, at);
    } catch (error) {
      this.fault(error);
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
    this.given++;
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
      this.fault(error);
      if (!request.withDevice) return;
      request.poisoned = true;
      request.slab = null;
      request.complete(Errno.EIO);
    }
  }

  /** The device threw. */
  fault(error: unknown): void {
    if (this.#faultLogged) return;
    this.#faultLogged = true;
    this.log.error({ err: error }, 'a device misbehaved; its requests fail with EIO. This is a bug of ours');
  }
}
