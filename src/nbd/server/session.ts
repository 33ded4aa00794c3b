/**
 * The transmission phase of one connection.
 *
 * Every chunk of received bytes is parsed in place, each request in it carried out in the same turn if the device can, and
 * all answers leave in one gathered write at its end. What the device answers later is gathered likewise.
 *
 * Limits: a request is begun only while fewer than IN_FLIGHT_REQUESTS_MAX requests are with the device and its payload
 * fits into IN_FLIGHT_BYTES_MAX together with the memory of those and of answers the client has not taken. Otherwise the
 * session is *stalled*: it keeps its place in the chunk, stops receiving, and goes on when half of both is free (it looks now
 * and then whether the client is still there, which it cannot hear of while it does not read). So
 * memory is bounded whatever the client does, and a client that does not read stops itself. All sessions of a thread share
 * IN_FLIGHT_BYTES_TOTAL_MAX; beyond it a session has one request at a time.
 *
 * Life:  open -> finishing (DISC, drain: waits for the device) -> flushing (waits for the client to take the answers)
 *        -> lingering (end sent, waits for the client's) -> closed. The client's end, or bytes that are no request, lead
 *        from open to flushing: the requests in flight are abandoned. A lost socket leads from anywhere to closed.
 */

import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { Logger } from 'pino';
import type { BlockDevice } from '../device.js';
import { Recorder } from '../log/recorder.js';
import type { Session as ConnectionSession, SessionParameters } from './connection.js';
import { Ending, Exchange } from './exchange.js';
import { Executor } from './executor.js';
import { Output } from './output.js';
import { RequestParser } from './parser.js';
import { Reception, type Sink } from './reception.js';
import { Replies } from './replies.js';
import { SlabPool } from './slab.js';
import { Rules } from './validate.js';

/** How long the client may take to read its last answers. */
export const FLUSH_TIMEOUT_MS = 30_000;
/** A stalled session, which reads nothing, looks so often whether its client is still there. */
export const STALLED_LOOK_MS = 1_000;
/** For so long a session receives around its stream, whatever comes, before the loop has its turn. */
const RECEIVING_MS_MAX = 1;
/** How long the client may take to close behind our end. */
export const LINGER_TIMEOUT_MS = 1_000;

export type { SessionParameters } from './connection.js';

/**
 * `closed` resolves when the socket is closed, the device released and every request completed; it never rejects. After
 * `drain` requests get ESHUTDOWN, those in flight finish, their answers are sent, then the session closes.
 */
export interface Session extends ConnectionSession {
  /** Requests the device has. */
  readonly inFlight: number;
  /** Memory bound in them, and in answers the client has not taken, bytes. */
  readonly inFlightBytes: number;
}

/**
 * Starts the transmission phase. The socket must have no reader any more; it is the session's from now on (and, if it is a
 * plain net.Socket, is replaced by another object: use `closed`, not the socket's events). Releases the device.
 */
export function startSession(socket: net.Socket | Duplex, parameters: SessionParameters): Session {
  return new TransmissionSession(socket, parameters);
}

/** One pool a thread. */
const slabs = new SlabPool();

class TransmissionSession implements Session, Sink {
  readonly closed: Promise<void>;
  #resolveClosed: () => void = () => {};

  readonly #device: BlockDevice;
  readonly #log: Logger;
  readonly #complain: (kind: string, detail: string) => void;
  readonly #output: Output;
  readonly #record: Recorder | null;
  readonly #executor: Executor;
  readonly #parser: RequestParser;
  readonly #reception: Reception;
  /** Null: the device has nothing to be reached directly. */
  readonly #exchange: Exchange | null;

  #phase: 'open' | 'finishing' | 'flushing' | 'lingering' | 'closed' = 'open';
  #clientEnded = false;
  #released = false;
  #timer: NodeJS.Timeout | null = null;

  /** The chunk a stalled session stopped in, from #heldAt to #heldEnd. */
  #held: Buffer | null = null;
  #heldAt = 0;
  #heldEnd = 0;
  /** It waits for nothing but the other sessions' turn; or for the client to take answers, though there would be room for more. */
  #heldForTurn = false;
  #heldBack = false;
  /** The client ended its side meanwhile. */
  #lastWords = false;
  /** How far the client had come when it was looked at last. */
  #settledAtLook = -1;
  /** Runs while there is one, and a little longer. */
  #stalledLook: NodeJS.Timeout | null = null;

  /** Within #consume, whose end sends all that was answered meanwhile. */
  #consuming = false;
  #scheduled = false;
  /** `#exchangeAgain` is. */
  #exchangeDue = false;

  constructor(socket: net.Socket | Duplex, parameters: SessionParameters) {
    const { device, contexts, rest, log } = parameters;
    const form = parameters.extended === true ? 'extended' : parameters.structured ? 'structured' : 'simple';
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    this.#device = device;
    this.#log = log;
    this.#complain = (kind, detail) => parameters.complain?.(kind, detail);
    const { size } = device;
    const readOnly = device.readOnly || parameters.readOnly === true;
    const fastZero = device.fastZero ?? false;
    const rules = new Rules({ size, readOnly, fastZero, form, hasContexts: contexts.length > 0 });
    const output = new Output(slabs, this.#turn);
    const replies = new Replies(output, slabs, form);
    this.#output = output;
    const { transactionLog = null } = device;
    this.#record = transactionLog === null ? null : new Recorder(transactionLog, this.#turn);
    output.gate = this.#record;
    this.#executor = new Executor(slabs, device, form, output, replies, log, this.#schedule, this.#record);
    this.#exchange =
      device.direct === undefined || this.#record !== null
        ? null
        : new Exchange(device, output, form, readOnly, this.#executor);
    this.#parser = new RequestParser(rules, this.#executor, replies, contexts, form === 'extended');
    this.#reception = new Reception(socket, rest, this);
    this.#reception.start();
  }

  get inFlight(): number {
    return this.#executor.active;
  }

  get inFlightBytes(): number {
    return this.#executor.usedBytes;
  }

  drain(): Promise<void> {
    if (this.#phase === 'open') this.#phase = 'finishing';
    this.#parser.drain();
    this.#schedule();
    return this.closed;
  }

  destroy(): void {
    this.#executor.abandoned = true;
    this.#executor.silent = true;
    this.#reception.stream.destroy();
  }

  onOpen(stream: Duplex, descriptor: number | null): void {
    this.#output.attach(stream, descriptor);
  }

  onBytes(chunk: Buffer, length: number): boolean {
    // Once more than its share was received around the stream, what the stream still brings in this turn of the loop is enough.
    return this.#consume(chunk, 0, length, chunk === this.#reception.buffer && !this.#exchangeDue);
  }

  onEnd(): void {
    this.#clientEnded = true;
    // What came before the end has not had its turn yet.
    if (this.#held !== null && this.#heldBack) this.#hearLastWords();
    else if (this.#held === null || !this.#heldForTurn) this.#ended();
  }

  #ended(): void {
    if (this.#phase === 'lingering') {
      if (this.#reception.stream.writableFinished) this.#reception.stream.destroy();
    } else if (this.#parser.over !== 'disconnected') this.#abandon();
    else if (this.#phase === 'finishing') this.#setTimer(FLUSH_TIMEOUT_MS); // it may still read, but not for ever
  }

  onError(error: NodeJS.ErrnoException): void {
    // The client is gone (ECONNRESET, EPIPE), which is normal; onClose follows.
    this.#log.debug({ code: error.code }, 'the connection was lost');
  }

  onClose(): void {
    this.#phase = 'closed';
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#stopLooking();
    if (this.#parser.over !== 'disconnected') this.#executor.abandoned = true;
    this.#executor.silent = true;
    this.#held = null;
    this.#parser.drop();
    this.#output.release();
    this.#record?.close();
    this.#release();
    this.#advance();
  }

  /**
   * Parses and carries out [at, end) of the chunk, and sends the answers; `receives`: likewise with what has come since, if that can be had
   * around the stream. False: stalled, the rest of the chunk is held.
   */
  #consume(chunk: Buffer, at: number, last: number, receives: boolean): boolean {
    const parser = this.#parser;
    if ((this.#phase !== 'open' && this.#phase !== 'finishing') || parser.over !== null) return true;
    const executor = this.#executor;
    this.#consuming = true;
    executor.beginTurn();
    const { given } = executor;
    const deadline = receives ? performance.now() + RECEIVING_MS_MAX : 0;
    let from = at;
    let end = last;
    let goesOn = receives;
    let turn = false;
    let filled: boolean;
    do {
      const ending = this.#exchanged(chunk, from, end, goesOn);
      if (ending !== null) {
        from = this.#exchange!.at;
        end = this.#exchange!.end;
      }
      executor.cold = ending === Ending.COLD;
      from = parser.parse(chunk, from, end, ending === Ending.OTHER || ending === Ending.COLD);
      executor.cold = false;
      this.#output.flush();
      turn ||= ending === Ending.TURN || (goesOn && performance.now() >= deadline);
      // What the device was given may have work due at the end of this turn: it must not wait for more to come.
      goesOn &&= !turn && executor.given === given;
      filled = goesOn && from === end && parser.fill(this.#receive);
      if (filled) {
        from = end = 0;
        this.#output.flush();
      }
    } while (parser.over === null && (parser.stalled ? this.#mayGoOn() : filled || from < end));
    if (turn) this.#exchangeSoon();
    this.#consuming = false;
    this.#heldForTurn = executor.turnOver && executor.roomy;
    if (parser.stalled && executor.turnOver) this.#schedule();
    if (parser.over === 'garbage' || parser.over === 'excess') {
      if (parser.over === 'garbage')
        this.#complain('request-magic', 'it sent no NBD request where one was due');
      else this.#complain('payload-too-long', 'it announced a payload beyond the maximum');
      this.#abandon();
      return true;
    }
    if (parser.over === 'disconnected' && this.#phase === 'open') this.#phase = 'finishing';
    this.#heldBack = parser.stalled && executor.heldBack;
    this.#held = parser.stalled ? chunk : null;
    this.#heldAt = from;
    this.#heldEnd = end;
    if (this.#held !== null) this.#stalledLook ??= setInterval(this.#look, STALLED_LOOK_MS);
    this.#advance();
    return this.#held === null;
  }

  /** A request that was not admitted may be now. */
  #mayGoOn(): boolean {
    const executor = this.#executor;
    if (executor.turnOver) return false;
    if (executor.roomy) return true;
    // The client sends no more, and may wait for the end of our answers: what it has sent is begun, as far as memory allows.
    if (!executor.heldBack || !this.#reception.peerGone) return false;
    executor.indulge();
    return true;
  }

  /** What `Exchange.run` answers, if it may run. */
  #exchanged(chunk: Buffer, at: number, end: number, receives: boolean): number | null {
    if (this.#exchange === null || this.#phase !== 'open' || this.#lastWords || !this.#parser.between)
      return null;
    return this.#exchange.run(chunk, at, end, receives);
  }

  readonly #receive = (buffer: Buffer, at: number, length: number): number =>
    this.#exchange === null || this.#phase !== 'open' ? 0 : this.#exchange.receive(buffer, at, length);

  /** The loop has its turn, and then it goes on. */
  #exchangeSoon(): void {
    if (this.#exchangeDue) return;
    this.#exchangeDue = true;
    setImmediate(this.#exchangeAgain);
  }

  readonly #exchangeAgain = (): void => {
    this.#exchangeDue = false;
    const { buffer } = this.#reception;
    if (this.#held !== null || this.#clientEnded || buffer === null || !this.#parser.between) return;
    if (!this.#consume(buffer, 0, 0, true)) this.#reception.pause();
  };

  readonly #look = (): void => {
    if (this.#held === null) this.#stopLooking();
    else if (this.#heldForTurn) return;
    else if (this.#reception.peerGone) this.#clientGone();
    else if (this.#output.settled !== this.#settledAtLook) this.#settledAtLook = this.#output.settled;
    else {
      this.#executor.indulge();
      this.#turn();
    }
  };

  #stopLooking(): void {
    if (this.#stalledLook !== null) clearInterval(this.#stalledLook);
    this.#stalledLook = null;
  }

  /**
   * Answers that come between chunks leave once the loop has polled: completions of libuv's pool come one by one, each with
   * its own tick queue, so that process.nextTick would send each alone (half the throughput at depth 64).
   */
  readonly #schedule = (): void => {
    if (this.#consuming || this.#scheduled) return;
    this.#scheduled = true;
    setImmediate(this.#turn);
  };

  /** The device completed requests, or the client took answers. */
  readonly #turn = (): void => {
    this.#scheduled = false;
    this.#output.flush(); // before the question for room: what the kernel takes at once nobody tells of again
    if (this.#held !== null && this.#executor.roomy) {
      if (!this.#heldForTurn && !this.#lastWords && this.#reception.peerGone) this.#clientGone();
      else if (this.#consume(this.#held, this.#heldAt, this.#heldEnd, false)) {
        this.#reception.resume();
        if (this.#clientEnded) this.#ended();
      }
      return;
    }
    this.#advance();
  };

  /**
   * A client that hung up while its requests were held may be back on another connection, and have sent them again there, and others after
   * them: none of what was not begun may be carried out on top.
   */
  #clientGone(): void {
    if (this.#heldBack) this.#hearLastWords();
    else this.#abandon();
  }

  /** It may still read, and would have had its answers, were they not more than is read ahead: it gets them, but changes nothing any more. */
  #hearLastWords(): void {
    this.#lastWords = true;
    this.#parser.refuseChanges();
    this.#executor.indulge();
    this.#turn();
  }

  /** Nobody waits for what is in flight. Answers that are there already are still sent. */
  #abandon(): void {
    if (this.#phase === 'flushing' || this.#phase === 'lingering' || this.#phase === 'closed') return;
    this.#executor.abandoned = true;
    this.#executor.silent = true;
    this.#beginFlush();
    this.#advance();
  }

  #beginFlush(): void {
    this.#phase = 'flushing';
    this.#parser.drop();
    if (this.#held !== null) {
      this.#held = null;
      this.#reception.resume(); // what still comes is thrown away, so that the client's end is noticed
    }
    this.#release();
    this.#setTimer(FLUSH_TIMEOUT_MS);
  }

  /** Takes the life's next step, if it is time. */
  #advance(): void {
    this.#executor.count();
    if (this.#phase === 'finishing' && this.#executor.active === 0) this.#beginFlush();
    if (this.#phase === 'flushing' && this.#output.bytes === 0) {
      this.#phase = 'lingering';
      this.#reception.stream.end(this.#finished);
    }
    if (this.#phase === 'closed' && this.#executor.active === 0) this.#resolveClosed();
  }

  readonly #finished = (): void => {
    if (this.#phase === 'closed') return;
    if (this.#clientEnded) this.#reception.stream.destroy();
    else this.#setTimer(LINGER_TIMEOUT_MS);
  };

  #setTimer(timeoutMs: number): void {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#reception.stream.destroy(), timeoutMs);
  }

  #release(): void {
    if (this.#released) return;
    this.#released = true;
    try {
      this.#device.release();
    } catch (error) {
      this.#log.error({ err: error }, 'a device could not be released');
    }
  }
}
