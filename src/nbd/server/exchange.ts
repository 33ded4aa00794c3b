/**
 * The way of a session around JavaScript: requests that need nothing but bytes of the device that are here (`BlockDevice.direct`) are
 * received, carried out and answered by one native call (native/src/exchange.h), which comes back with the first request that needs more, or
 * when there is nothing to do.
 *
 * Invariants
 * - It runs only while no answer waits to be sent and no request is half received, and never with a transaction log.
 * - What the device allows is asked before each call, and holds for it: nothing else happens on this thread meanwhile.
 * - It receives only in place of the socket's own stream, into the stream's own buffer, while that would read as well. The stream
 *   learns of the end and of errors by itself: they stay.
 *
 * Before it sleeps it polls, for as long as that has paid of late: the next request is likely to come within POLL_US_MAX if the last one that
 * was slept for did. To sleep costs a small request more than to be carried out.
 */

import { exchange, receivePayload } from '../../native/index.js';
import { EXTENDED_REQUEST_HEADER_BYTES, REQUEST_HEADER_BYTES, type ReplyForm } from '../constants.js';
import type { BlockDevice, DirectAccess } from '../device.js';
import type { Executor } from './executor.js';
import type { Output } from './output.js';

/** Why the native call ended, as native/src/exchange.h has it. */
export const Ending = { IDLE: 0, TURN: 1, OTHER: 2, COLD: 3, UNSENT: 4, HELD_UP: 5, CLOSED: 6 } as const;

/** Places of the job, as native/src/exchange.h has them. */
const SOCKET = 0;
const IMAGE = 1;
const IMAGE_BYTES = 2;
const ACCESS = 3;
const FORM = 4;
const READ_BYTES_MAX = 5;
const WRITE_BYTES_MAX = 6;
const REPLIES_MAX = 7;
const RECEIVE_BYTES_MAX = 8;
const POLL_US = 9;
const SLEEPS = 10;
const TURN_US = 11;
const SPLIT_BYTES_MIN = 12;
const AT = 13;
const END = 14;
const OUT_FROM = 15;
const OUT_TO = 16;
const RECEIVED_BYTES = 17;
const OTHERS = 18;
const JOB_PLACES = 19;

const FORMS: Record<ReplyForm, number> = { simple: 0, structured: 1, extended: 2 };
const READS = 1;
const WRITES = 2;
const NOWAIT = 4;

/** Answers leave when there are so many: the client works on them while the next ones are made. */
const SENT_REPLIES_MAX = 8;
/** Longer WRITEs are received into a slab of their own, and behind one nothing but the next header: the next payload is likely as long. */
const DIRECT_WRITE_BYTES_MAX = 128 << 10;
/** How long a payload that keeps coming may take, before the event loop has its turn. */
const PAYLOAD_US_MAX = 500;
/** The event loop has its turn after so long, if it has other work: other sessions wait for it. */
const TURN_US_MAX = 100;
/** Polling stops being worth it: longer than to sleep and be woken takes on a slow machine. */
export const POLL_US_MAX = 50;
/** When others are at work the loop is asked for all together, and seldom waits. */
const CROWDED_RUNS = 32;
const POLL_US_MIN = 8;

export class Exchange {
  /** Of the input, after a call: [at, end) was received and not carried out. */
  at = 0;
  end = 0;
  #pollUs = 0;
  /** As long it had polled when it gave up. */
  #polledUs = 0;
  #afterLong = false;
  /** Others on this thread were at work as well: for so many runs nothing is received around the stream. */
  #crowded = 0;
  /** The device threw: it is asked no more. */
  #broken = false;
  /** When it last gave up polling, or did not begin; 0: it has been called since. Milliseconds. */
  #idleSince = 0;
  readonly #headBytes: number;
  readonly #job = new Float64Array(JOB_PLACES);

  constructor(
    private readonly device: BlockDevice,
    private readonly output: Output,
    form: ReplyForm,
    readOnly: boolean,
    private readonly executor: Executor,
  ) {
    this.#headBytes = form === 'extended' ? EXTENDED_REQUEST_HEADER_BYTES : REQUEST_HEADER_BYTES;
    const job = this.#job;
    job[IMAGE_BYTES] = device.size;
    job[TURN_US] = TURN_US_MAX;
    job[FORM] = FORMS[form];
    job[READ_BYTES_MAX] = executor.directReadBytesMax;
    job[WRITE_BYTES_MAX] = readOnly ? 0 : DIRECT_WRITE_BYTES_MAX;
    job[REPLIES_MAX] = SENT_REPLIES_MAX;
  }

  /**
   * Begins with [at, end) of `input`; `receives`: what comes next too, to which `input` belongs as a whole then. Answers an `Ending`, or
   * null if it cannot run now.
   */
  run(input: Buffer, at: number, end: number, receives: boolean): number | null {
    this.at = at;
    this.end = end;
    if (this.#broken || !this.output.idle) return null;
    const alone = this.#crowded === 0;
    if (!alone) this.#crowded--;
    try {
      const direct = this.device.direct!();
      return direct === null ? null : this.#runOn(direct, input, receives && alone);
    } catch (error) {
      this.#broken = true;
      this.executor.fault(error);
      return null;
    }
  }

  #runOn(direct: DirectAccess, input: Buffer, receives: boolean): number {
    const { at, end, output } = this;
    const job = this.#job;
    job[SOCKET] = output.directDescriptor;
    job[IMAGE] = direct.fd;
    job[ACCESS] = (direct.reads ? READS : 0) | (direct.writes ? WRITES : 0) | (direct.nowait ? NOWAIT : 0);
    job[SPLIT_BYTES_MIN] = output.splitBytesMin;
    job[AT] = at;
    job[END] = end;
    job[OUT_FROM] = 0;
    job[OUT_TO] = 0;
    job[RECEIVED_BYTES] = 0;
    job[OTHERS] = 0;
    if (this.#idleSince !== 0) this.#adapt();
    // To be woken costs little beside a long payload.
    job[SLEEPS] = Number(this.#afterLong);
    job[POLL_US] = receives ? this.#pollUs : -1;
    job[RECEIVE_BYTES_MAX] = this.#afterLong ? this.#headBytes : input.length;
    const ending = exchange(job, input, output.buffer, direct.present, direct.heat, direct.dirty);
    this.at = job[AT]!;
    this.end = job[END]!;
    output.keep(job[OUT_FROM]!, job[OUT_TO]!);
    if (job[OTHERS] === 1) this.#crowded = CROWDED_RUNS;
    if (ending !== Ending.OTHER) this.#afterLong = false;
    if (ending === Ending.HELD_UP) this.#tellHeldUp();
    if (!receives || (ending !== Ending.IDLE && ending !== Ending.TURN)) return ending;
    // The others are at work, and our client is not: it is heard of as theirs are.
    const yielded = ending === Ending.TURN && at === end && job[RECEIVED_BYTES] === 0;
    if (ending === Ending.TURN && !yielded) return ending;
    this.#idleSince = performance.now();
    this.#polledUs = yielded ? 0 : this.#pollUs;
    return Ending.IDLE;
  }

  /** What it throws must not undo the call: its requests are answered. */
  #tellHeldUp(): void {
    try {
      this.device.directWriteHeldUp?.();
    } catch (error) {
      this.#broken = true;
      this.executor.fault(error);
    }
  }

  /** Receives what has come, and what comes in time, of a payload that is missing `length` bytes -> how many bytes came. */
  receive(buffer: Buffer, at: number, length: number): number {
    const socket = this.output.directDescriptor;
    if (socket === -1) return 0;
    this.#afterLong = length > DIRECT_WRITE_BYTES_MAX;
    return receivePayload(socket, buffer, at, length, PAYLOAD_US_MAX);
  }

  /** As KVM's halt polling: it grows while what it would have waited for comes in time, and shrinks when it does not. */
  #adapt(): void {
    const waitedUs = (performance.now() - this.#idleSince) * 1000 + this.#polledUs;
    this.#idleSince = 0;
    if (waitedUs > POLL_US_MAX) this.#pollUs = this.#pollUs > POLL_US_MIN ? this.#pollUs >> 1 : 0;
    else this.#pollUs = Math.min(Math.max(this.#pollUs * 2, POLL_US_MIN * 2), POLL_US_MAX);
  }
}
