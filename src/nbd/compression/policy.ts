/**
 * How one side of a connection compresses: raw, or at which level. Deterministic: it knows no clock and no socket, only what it is told.
 *
 * What a link is too slow for cannot be seen at its socket: the kernel's buffers, and a peer that asks for no more than the line carries, hide it.
 * What can be seen is the work. As long as the threads have time to spare, something else is the narrow place, and to compress harder costs
 * nothing that anybody waits for. So after every WINDOW_FRAMES frames the *share* of its threads that a connection keeps busy is judged. Above
 * SHARE_MAX: one step down; the lowest step is raw. If the next step, by what it cost when it was last used, would keep it below
 * SHARE_NEXT_MAX: one step up. What a step costs is forgotten slowly, so that one that was too dear once is tried again.
 *
 * Between the lowest level and raw the rate decides as well: who sends more than he did when all was raw goes on, however busy the threads are, and
 * looks again after RAW_KNOWN_WINDOWS. What does not shrink is sent raw at any step, and tried again after some frames, twice as
 * many each time it fails.
 */
import type { CompressionLevel } from '../codec/frames.js';

/** Steps of 'auto'; null: raw. */
export const STEPS: readonly (number | null)[] = [null, -5, 1, 3, 6, 9];
const FIRST_STEP = 3;
export const WINDOW_FRAMES = 8;
const SHARE_MAX = 0.8;
const SHARE_NEXT_MAX = 0.4;
/** A step that was never used is taken to cost so many times as much as the one below. */
const COST_GROWTH = 2.5;
const COST_FORGOTTEN = 0.99;
const COST_GAIN = 0.25;
/** To compress is worth busy threads if so many times as much is sent as without. */
const WORTH_GROWTH = 1.2;
const RAW_KNOWN_WINDOWS = 256;
/** Longer than this between two frames, and the connection had nothing to send. */
const FRAME_MS_MAX = 200;
/** A frame that keeps more than this of its size was not worth the work, it counts as one that does not shrink. */
export const SHRINKS_BELOW = 0.95;
const SKIP_FRAMES_MIN = 1;
const SKIP_FRAMES_MAX = 128;

export class CompressionPolicy {
  readonly #fixed: number | null;
  #step = FIRST_STEP;
  /** Of this window. */
  #frames = 0;
  #elapsedMs = 0;
  #workMs = 0;
  #contentBytes = 0;
  /** Milliseconds of a thread for a byte, by step; 0: not known. */
  readonly #costs: number[] = STEPS.map(() => 0);
  /** Bytes a millisecond when all was raw, and for how many windows that is worth something. */
  #rawRate = 0;
  #rawWindows = 0;
  /** Frames that are still to be sent raw, because those before did not shrink. */
  #skip = 0;
  #skipNext = SKIP_FRAMES_MIN;

  /** `threads`: how many the connection may keep busy. */
  constructor(
    level: CompressionLevel,
    private readonly threads: number,
  ) {
    this.#fixed = level === 'auto' ? null : level;
  }

  /** The level of this moment; null: raw. */
  get level(): number | null {
    return this.#fixed ?? STEPS[this.#step]!;
  }

  /** What the next frame that is long enough is compressed with; null: it is sent raw. */
  next(): number | null {
    if (this.#skip > 0) {
      this.#skip--;
      return null;
    }
    return this.level;
  }

  /** A frame was compressed at `level`, by `workMs` of a thread; `wireBytes` is `contentBytes` where it did not shrink. */
  compressed(level: number, contentBytes: number, wireBytes: number, workMs: number): void {
    this.#workMs += workMs;
    const step = STEPS.indexOf(level);
    if (step !== -1) {
      const cost = workMs / contentBytes;
      const before = this.#costs[step]!;
      this.#costs[step] = before === 0 ? cost : before + COST_GAIN * (cost - before);
    }
    if (wireBytes <= contentBytes * SHRINKS_BELOW) {
      this.#skipNext = SKIP_FRAMES_MIN;
      return;
    }
    if (this.#skip > 0) return; // of those that were under way together one counts
    this.#skip = this.#skipNext;
    this.#skipNext = Math.min(this.#skipNext * 2, SKIP_FRAMES_MAX);
  }

  /** A long frame left, `elapsedMs` after the one before. */
  left(contentBytes: number, elapsedMs: number): void {
    if (this.#fixed !== null) return;
    this.#elapsedMs += Math.min(elapsedMs, FRAME_MS_MAX);
    this.#contentBytes += contentBytes;
    this.#frames++;
    if (this.#frames < WINDOW_FRAMES) return;
    // Frames that are sent raw for not shrinking tell nothing of what others would cost.
    if (this.#skip === 0 && this.#elapsedMs > 0) this.#judge();
    this.#frames = 0;
    this.#elapsedMs = 0;
    this.#workMs = 0;
    this.#contentBytes = 0;
  }

  #judge(): void {
    const step = this.#step;
    const rate = this.#contentBytes / this.#elapsedMs;
    for (let other = 1; other < STEPS.length; other++)
      if (other !== step) this.#costs[other]! *= COST_FORGOTTEN;
    if (this.#rawWindows > 0) this.#rawWindows--;
    if (step === 0) {
      this.#rawRate = rate;
      this.#rawWindows = RAW_KNOWN_WINDOWS;
    } else if (this.#workMs > SHARE_MAX * this.threads * this.#elapsedMs) {
      const isWorth = step === 1 && this.#rawWindows > 0 && rate > WORTH_GROWTH * this.#rawRate;
      if (!isWorth) this.#step--;
      return;
    }
    if (step === STEPS.length - 1) return;
    const next = this.#costs[step + 1]! || this.#costs[step]! * COST_GROWTH;
    if (rate * next < SHARE_NEXT_MAX * this.threads) this.#step++;
  }
}
