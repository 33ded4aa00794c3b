/**
 * How many bytes may be in flight on a link, so that what nobody waits for yet (background copy, read-ahead) fills it, and makes no queue in
 * front of the guest's own reads. That is the link's rate times its round trip; both are measured from the answers, as BBR does (Cardwell et al.,
 * "BBR: Congestion-Based Congestion Control", 2016), one level above the transport, whose own control goes on below.
 *
 * - The rate is the greatest of the last rounds: bytes answered between a request and its answer, by the time between.
 * - The round trip is the least time that a request of the last seconds took, its own bytes' time on the link included. It can only be seen on an idle link: when
 *   no answer came near it for a while (a queue of our own and a longer route cannot be told apart), one request goes alone.
 * - While the guest waits for reads of its own, the window is the product and hardly more. Otherwise it has some to spare, which is how a
 *   link that became faster is found out.
 */

import { BLOCK_BYTES } from '../volume/blocks.js';

export const WINDOW_BYTES_MAX = 32 << 20;
const WINDOW_BYTES_START = 1 << 20;
/** Of a link so fast that the processors decide. */
const WINDOW_BYTES_FAST = 2 << 20;
const FAST_BYTES_PER_MS = 100_000;
/** One request: short on a slow link, where a read of the guest's waits behind what is under way. */
export const PIECE_BYTES_MAX = 256 << 10;
export const PIECE_BYTES_MIN = 16 << 10;
const PIECE_MS = 6;
/** Rounds without so much growth end the start, in which the window doubles each round. */
const START_GROWTH = 1.25;
const START_ROUNDS = 3;
const START_GAIN = 2;
/** To spare, while the guest does not wait: whether the link became faster is found out at once. */
const IDLE_GAIN = 1.25;
/** While it does, in one of so many rounds. */
const PROBE_GAIN = 1.125;
const PROBE_ROUNDS = 8;
/** The rate is the greatest of two such stretches. */
const RATE_MS_MIN = 1_000;
const RATE_ROUNDS = 10;
/** The round trip is measured anew when nothing came near it for so long. */
const ROUND_TRIP_MS = 10_000;
const NEAR = 1.1;
const NEAR_MS = 1;
const ROUND_TRIP_MS_MIN = 0.05;

export class LinkWindow {
  /** Bytes answered in all. */
  #answered = 0;
  /** Bytes a millisecond: the greatest of this stretch, and of the one before. */
  #rateNow = 0;
  #rateBefore = 0;
  #stretchAtMs = 0;
  #roundTripMs = Number.POSITIVE_INFINITY;
  #nearAtMs = 0;
  /** Measuring the round trip since. */
  #probedAtMs: number | null = null;
  /** The round ends with the answer to what is sent when so much was answered. */
  #roundEnd = 0;
  #starting = true;
  #startRate = 0;
  #startRounds = 0;
  #round = 0;

  get #rate(): number {
    return Math.max(this.#rateNow, this.#rateBefore);
  }

  /** Bytes of one request: a power of two. */
  get pieceBytes(): number {
    const rate = this.#rate;
    if (rate === 0 || rate * PIECE_MS >= PIECE_BYTES_MAX) return PIECE_BYTES_MAX;
    const blocks = Math.max(1, (rate * PIECE_MS) / BLOCK_BYTES);
    return Math.max(PIECE_BYTES_MIN, BLOCK_BYTES * 2 ** Math.floor(Math.log2(blocks)));
  }

  /** Bytes that may be in flight; `busy`: the guest waits for reads of its own these days. At least one piece. */
  bytes(busy: boolean): number {
    const piece = this.pieceBytes;
    if (this.#probedAtMs !== null) return piece;
    const rate = this.#rate;
    if (rate === 0) return busy ? WINDOW_BYTES_START / 4 : WINDOW_BYTES_START;
    const product = rate * this.#roundTripMs;
    // What is in flight falls short of the window by up to a piece, and each takes its own time on the link besides the round trip.
    let window = this.#gain(busy) * product + 2 * piece;
    if (this.#starting) window = Math.max(WINDOW_BYTES_START, window);
    if (rate >= FAST_BYTES_PER_MS) window = Math.max(window, WINDOW_BYTES_FAST);
    return Math.min(WINDOW_BYTES_MAX, Math.max(piece, window));
  }

  #gain(busy: boolean): number {
    if (this.#starting) return START_GAIN;
    if (!busy) return IDLE_GAIN;
    return this.#round % PROBE_ROUNDS === 0 ? PROBE_GAIN : 1;
  }

  /** A request is sent: what `answered` wants to know of it later. */
  sent(): number {
    return this.#answered;
  }

  /**
   * A request of `bytes` took `latencyMs`, up to now, whoever asked; `mark`: what `sent` said; `full`: the window was used up while it was under
   * way, so that the answers tell the link's rate and not ours.
   */
  answered(bytes: number, latencyMs: number, mark: number, full: boolean, nowMs: number): void {
    this.#answered += bytes;
    const tookMs = Math.max(latencyMs, ROUND_TRIP_MS_MIN);
    this.#measureRate((this.#answered - mark) / tookMs, full, nowMs);
    this.#measureRoundTrip(tookMs, nowMs);
    if (mark >= this.#roundEnd) this.#endRound(full);
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
    if (full || rate > this.#rate) this.#rateNow = Math.max(this.#rateNow, rate);
  }

  #measureRoundTrip(tookMs: number, nowMs: number): void {
    if (this.#probedAtMs !== null) {
      // Sent since, and so alone: the window lets only one go at a time, and that one when all before it are answered.
      if (nowMs - tookMs <= this.#probedAtMs) return;
      this.#probedAtMs = null;
      this.#roundTripMs = tookMs;
      this.#nearAtMs = nowMs;
    } else if (tookMs <= NEAR * this.#roundTripMs + NEAR_MS) {
      this.#roundTripMs = Math.min(this.#roundTripMs, tookMs);
      this.#nearAtMs = nowMs;
    } else if (nowMs - this.#nearAtMs > ROUND_TRIP_MS) this.#probedAtMs = nowMs;
  }

  #endRound(full: boolean): void {
    this.#roundEnd = this.#answered;
    this.#round++;
    if (!this.#starting || !full) return;
    if (this.#rate >= this.#startRate * START_GROWTH) {
      this.#startRate = this.#rate;
      this.#startRounds = 0;
    } else if (++this.#startRounds >= START_ROUNDS) this.#starting = false;
  }
}
