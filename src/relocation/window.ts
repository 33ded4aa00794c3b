/**
 * How many bytes may be in flight on a link, so that what nobody waits for yet (background copy, read-ahead) fills it, and makes no queue in
 * front of the guest's own reads. That is the link's rate times its round trip; both are measured from the answers, as BBR does (Cardwell et al.,
 * "BBR: Congestion-Based Congestion Control", 2016), one level above the transport, whose own control goes on below.
 *
 * - The link is measured in bytes on the wire, which compression makes fewer than those of the content by a *ratio* that changes from place to
 *   place on a disk. What may be in flight is said in content, by the ratio of late.
 * - The rate is the greatest of the last rounds: bytes that came between a request and its answer, by the time between.
 * - The round trip is the least time that a request of the last seconds took, its own bytes' time on the link included. It can only be seen
 *   on an idle link: when no answer was as quick for a while (a queue of our own and a longer route cannot be told apart), one request
 *   goes alone.
 * - The window is moved around their product until a queue of a few milliseconds shows that the link is full, as LEDBAT has it (RFC 6817):
 *   slower, and a shorter one, while the guest waits for reads of its own.
 * - Where there is compression, a request that came to next to nothing shows a round trip that others, whose bytes take their time, do not have:
 *   that time is no queue. And while the guest is idle some tens of milliseconds are kept in flight beyond what fills the link, since the
 *   next requests may come to less than the last ones.
 */

import { BLOCK_BYTES } from '../volume/blocks.js';

export const WINDOW_BYTES_MAX = 32 << 20;
const WINDOW_BYTES_START = 1 << 20;
/** Of a link so fast that the processors decide. */
const WINDOW_BYTES_FAST = 2 << 20;
const FAST_BYTES_PER_MS = 100_000;
/** One request: short on a slow link, where a read of the guest's waits behind what is under way. */
const PLAIN_PIECE_BYTES_MAX = 256 << 10;
export const PIECE_BYTES_MIN = 16 << 10;
const PIECE_MS = 6;
/** The longer the piece, the less it comes to on a compressed link: so while the guest is idle. */
export const PIECE_BYTES_MAX = 512 << 10;
const LONG_PIECE_MS = 20;
/** A link with a ratio below this is compressed, or what it carries is zeros for a good part. */
const COMPRESSED_BELOW = 0.9;
/** At the start the rate is that of connections and threads that begin, and so much is in flight all the same. */
const START_PIECE_BYTES_MIN = 64 << 10;
/** Rounds without so much growth end the start, in which the window doubles each round. */
const START_GROWTH = 1.25;
const START_ROUNDS = 3;
const START_GAIN = 2;
/** The queue that is aimed at, which is what shows that the link is full; and pieces by which the window grows each round for want of it. */
const QUEUE_MS = { busy: 3, idle: 5 };
const GROWTH_PIECES = { busy: 0.5, idle: 1 };
/** A queue so many times as long takes a part of the window at once. */
const QUEUE_LONG = 4;
const QUEUE_SHRINK = 0.8;
/** Over the link's rate times its round trip, at most. */
const GAIN_MAX = 1.25;
/** On a compressed link, while the guest is idle: likewise, and the queue besides `QUEUE_MS`. */
const COMPRESSED_GAIN_MAX = 2;
const COMPRESSED_QUEUE_MS = 30;
/** The rate is the greatest of two such stretches. */
const RATE_MS_MIN = 1_000;
const RATE_ROUNDS = 10;
/** The round trip is measured anew when nothing was as short for so long. */
const ROUND_TRIP_MS = 10_000;
/** Reads whose own bytes take next to no time on the link. */
const SHORT_BYTES_MAX = 16 << 10;
const ROUND_TRIP_MS_MIN = 0.05;
/** Zeros come to next to nothing: what follows them must not be taken for such, or a queue of seconds would be asked for. */
const RATIO_MIN = 1 / 8;
const RATIO_GAIN = 0.25;

export class LinkWindow {
  /** Content answered in all, bytes. */
  #answered = 0;
  /** Bytes on the wire for one of content, smoothed over rounds; and what was counted when the round began. */
  #ratio = 1;
  #ratioKnown = false;
  #roundWire = 0;
  #roundAnswered = 0;
  /** Bytes on the wire a millisecond: the greatest of this stretch, and of the one before. */
  #rateNow = 0;
  #rateBefore = 0;
  #stretchAtMs = 0;
  #roundTripMs = Number.POSITIVE_INFINITY;
  #roundTripAtMs = 0;
  /** The least times of the guest's short reads: of this stretch, and of the one before. */
  #shortNowMs = Number.POSITIVE_INFINITY;
  #shortBeforeMs = Number.POSITIVE_INFINITY;
  #shortAtMs = 0;
  /** Measuring the round trip since. */
  #probedAtMs: number | null = null;
  /** The round ends with the answer to what is sent when so much was answered. */
  #roundEnd = 0;
  #starting = true;
  #startRate = 0;
  #startRounds = 0;
  /** The window, once the start is over: bytes on the wire. */
  #wire = 0;
  #busy = false;
  /** The least delay over an idle link's in this round. */
  #queueMs = Number.POSITIVE_INFINITY;

  /** `received`: bytes that came over the wire so far, whatever they were. */
  constructor(private readonly received: () => number) {}

  /** Bytes on the wire a millisecond. */
  get #wireRate(): number {
    return Math.max(this.#rateNow, this.#rateBefore);
  }

  /** Of the link, as far as it is known: 0 before the first answer. */
  get bytesPerMs(): number {
    return this.#rate;
  }

  /** Content a millisecond. */
  get #rate(): number {
    return this.#wireRate / this.#ratio;
  }

  get #compressed(): boolean {
    return this.#ratio < COMPRESSED_BELOW;
  }

  /** So much comes that the processors decide. */
  get fast(): boolean {
    return this.#rate >= FAST_BYTES_PER_MS;
  }

  /** Bytes of one request: a power of two. */
  get pieceBytes(): number {
    const rate = this.#rate;
    const long = this.#compressed && !this.#busy;
    const most = long ? PIECE_BYTES_MAX : PLAIN_PIECE_BYTES_MAX;
    const bytes = rate * (long ? LONG_PIECE_MS : PIECE_MS);
    if (rate === 0 || bytes >= most) return most;
    const blocks = Math.max(1, bytes / BLOCK_BYTES);
    const least = this.#starting ? START_PIECE_BYTES_MIN : PIECE_BYTES_MIN;
    return Math.max(least, BLOCK_BYTES * 2 ** Math.floor(Math.log2(blocks)));
  }

  /** Bytes that may be in flight; `busy`: the guest waits for reads of its own these days. At least one piece. */
  bytes(busy: boolean): number {
    this.#busy = busy;
    const piece = this.pieceBytes;
    if (this.#probedAtMs !== null) return piece;
    const rate = this.#rate;
    if (rate === 0) return busy ? WINDOW_BYTES_START / 4 : WINDOW_BYTES_START;
    // What is in flight falls short of the window by up to a piece, and each takes its own time on the link besides the round trip.
    const full = rate * this.#usualMs + 2 * piece;
    let window: number;
    if (this.#starting) window = Math.max(WINDOW_BYTES_START / this.#ratio, START_GAIN * full);
    else {
      const fullWire = full * this.#ratio;
      if (this.#wire === 0) this.#wire = fullWire;
      const gain = this.#compressed && !busy ? COMPRESSED_GAIN_MAX : GAIN_MAX;
      this.#wire = Math.min(gain * fullWire, Math.max(2 * piece * this.#ratio, this.#wire));
      window = this.#wire / this.#ratio;
    }
    if (this.fast) window = Math.max(window, WINDOW_BYTES_FAST);
    return Math.min(WINDOW_BYTES_MAX, Math.max(piece, window));
  }

  /** A request is sent: what `answered` wants to know of it later. */
  sent(): number {
    return this.received();
  }

  /**
   * A request of `bytes` took `latencyMs`, up to now; `mark`: what `sent` said; `full`: the window was used up while it was under way, so that
   * the answers tell the link's rate and not ours.
   */
  answered(bytes: number, latencyMs: number, mark: number, full: boolean, nowMs: number): void {
    this.#answered += bytes;
    const tookMs = Math.max(latencyMs, ROUND_TRIP_MS_MIN);
    this.#measureRate((this.received() - mark) / tookMs, full, nowMs);
    this.#measureRoundTrip(tookMs, nowMs);
    this.#queueMs = Math.min(this.#queueMs, tookMs - this.#usualMs);
    if (mark >= this.#roundEnd) this.#endRound(full, nowMs);
  }

  /** Likewise a read of the guest's. A short one that meets no queue shows the round trip better than ours do. */
  demandAnswered(bytes: number, latencyMs: number, mark: number, nowMs: number): void {
    this.#answered += bytes;
    const tookMs = Math.max(latencyMs, ROUND_TRIP_MS_MIN);
    this.#measureRate((this.received() - mark) / tookMs, false, nowMs);
    if (bytes > SHORT_BYTES_MAX) return;
    if (nowMs - this.#shortAtMs > ROUND_TRIP_MS) {
      this.#shortBeforeMs = this.#shortNowMs;
      this.#shortNowMs = Number.POSITIVE_INFINITY;
      this.#shortAtMs = nowMs;
    }
    this.#shortNowMs = Math.min(this.#shortNowMs, tookMs);
  }

  /** What a request of ours takes on an idle link. */
  get #usualMs(): number {
    const shortMs = Math.min(this.#shortNowMs, this.#shortBeforeMs);
    const rate = this.#rate;
    return rate === 0 ? this.#roundTripMs : Math.min(this.#roundTripMs, shortMs + this.pieceBytes / rate);
  }

  #measureRate(rate: number, full: boolean, nowMs: number): void {
    const stretchMs = Math.max(
      RATE_MS_MIN,
      Number.isFinite(this.#roundTripMs) ? RATE_ROUNDS * this.#roundTripMs : 0,
    );
    if (nowMs - this.#stretchAtMs > stretchMs && full) {
      this.#rateBefore = this.#rateNow;
      this.#rateNow = 0;
      this.#stretchAtMs = nowMs;
    }
    // What we did not fill cannot show that the link is slow, only that it is faster than was known.
    if (full || rate > this.#wireRate) this.#rateNow = Math.max(this.#rateNow, rate);
  }

  #measureRoundTrip(tookMs: number, nowMs: number): void {
    if (this.#probedAtMs !== null) {
      // Sent since, and so alone: the window lets only one go at a time, and that one when all before it are answered.
      if (nowMs - tookMs <= this.#probedAtMs) return;
      this.#probedAtMs = null;
      this.#roundTripMs = tookMs;
      this.#roundTripAtMs = nowMs;
    } else if (tookMs <= this.#roundTripMs) {
      this.#roundTripMs = tookMs;
      this.#roundTripAtMs = nowMs;
    } else if (nowMs - this.#roundTripAtMs > ROUND_TRIP_MS) this.#probedAtMs = nowMs;
  }

  #endRound(full: boolean, nowMs: number): void {
    this.#roundEnd = this.received();
    this.#measureRatio();
    const queueMs = this.#queueMs;
    this.#queueMs = Number.POSITIVE_INFINITY;
    if (!this.#starting) {
      const kind = this.#busy ? 'busy' : 'idle';
      const piece = this.pieceBytes * this.#ratio;
      let aim: number = QUEUE_MS[kind];
      if (this.#compressed) aim += piece / this.#wireRate + (this.#busy ? 0 : COMPRESSED_QUEUE_MS);
      if (this.#wire === 0) return; // nobody asked for it since the start
      if (queueMs > QUEUE_LONG * aim) this.#wire *= QUEUE_SHRINK;
      else this.#wire += (1 - queueMs / aim) * GROWTH_PIECES[kind] * piece;
      return;
    }
    if (!full) return;
    if (this.#wireRate >= this.#startRate * START_GROWTH) {
      this.#startRate = this.#wireRate;
      this.#startRounds = 0;
    } else if (++this.#startRounds >= START_ROUNDS) {
      this.#starting = false;
      this.#probedAtMs = nowMs; // what went before had queues of its own, and the transport's start, in its way
    }
  }

  #measureRatio(): void {
    const content = this.#answered - this.#roundAnswered;
    if (content <= 0) return;
    const now = Math.min(1, Math.max(RATIO_MIN, (this.#roundEnd - this.#roundWire) / content));
    if (!this.#ratioKnown) this.#ratio = now;
    this.#ratioKnown = true;
    this.#ratio += RATIO_GAIN * (now - this.#ratio);
    this.#roundWire = this.#roundEnd;
    this.#roundAnswered = this.#answered;
  }
}
