/**
 * How one side of a connection compresses: raw, or at which level. Deterministic: it knows no clock and no socket, only what it is told.
 *
 * Two things can hold a frame up: the socket (*blocked*: frames are ready and it takes none), or the compression (*waiting*: the socket
 * would take one and the next is not ready). After every WINDOW_FRAMES frames they are compared. Blocked for BLOCKED_SHARE_MIN of the time, and more
 * than twice as long as was waited: the link is the narrow place, one step up. Waited for WAITING_SHARE_MIN of the time: the processor is, one step
 * down; the lowest step is raw. It takes more to go down than up: where the kernel's buffers hold all that is in flight a slow link does not block the
 * socket, and a frame that is waited for is no loss. For the same reason raw is left now and then to see. A step up that had to be taken back is not tried again at once, but after twice as many windows as the
 * last time. What does not shrink is sent raw at any step, and tried again after some frames, twice as many each time it fails.
 */
import type { CompressionLevel } from '../codec/frames.js';

/** Steps of 'auto'; null: raw. */
export const STEPS: readonly (number | null)[] = [null, -5, 1, 3, 6, 9];
const FIRST_STEP = 2;
export const WINDOW_FRAMES = 16;
const BLOCKED_SHARE_MIN = 0.25;
const WAITING_SHARE_MIN = 0.6;
const PATIENCE_WINDOWS_MIN = 4;
const PATIENCE_WINDOWS_MAX = 256;
/** A frame that keeps more than this of its size was not worth the work, it counts as one that does not shrink. */
export const SHRINKS_BELOW = 0.95;
const SKIP_FRAMES_MIN = 4;
const SKIP_FRAMES_MAX = 256;

export class CompressionPolicy {
  readonly #fixed: number | null;
  #step = FIRST_STEP;
  #frames = 0;
  #blockedMs = 0;
  #waitingMs = 0;
  #elapsedMs = 0;
  /** Windows until a step up may be tried, and how many it will be after the next failure. */
  #restWindows = 0;
  #patienceWindows = PATIENCE_WINDOWS_MIN;
  #wentUp = false;
  /** Frames that are still to be sent raw, because those before did not shrink. */
  #skip = 0;
  #skipNext = SKIP_FRAMES_MIN;

  constructor(level: CompressionLevel) {
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

  /** A frame was compressed; `wireBytes` is `contentBytes` where it did not shrink. */
  compressed(contentBytes: number, wireBytes: number): void {
    if (wireBytes <= contentBytes * SHRINKS_BELOW) {
      this.#skipNext = SKIP_FRAMES_MIN;
      return;
    }
    if (this.#skip > 0) return; // of those that were under way together one counts
    this.#skip = this.#skipNext;
    this.#skipNext = Math.min(this.#skipNext * 2, SKIP_FRAMES_MAX);
  }

  /** A long frame left, `elapsedMs` after the one before; in that time the socket was blocked, and was waiting, for so long. */
  left(elapsedMs: number, blockedMs: number, waitingMs: number): void {
    if (this.#fixed !== null) return;
    this.#elapsedMs += elapsedMs;
    this.#blockedMs += blockedMs;
    this.#waitingMs += waitingMs;
    this.#frames++;
    if (this.#frames < WINDOW_FRAMES) return;
    this.#judge();
    this.#frames = 0;
    this.#elapsedMs = 0;
    this.#blockedMs = 0;
    this.#waitingMs = 0;
  }

  #judge(): void {
    if (this.#restWindows > 0) this.#restWindows--;
    const blocked = this.#blockedMs > this.#elapsedMs * BLOCKED_SHARE_MIN;
    if (this.#waitingMs > this.#elapsedMs * WAITING_SHARE_MIN) this.#down();
    else if (this.#step === 0 || (blocked && this.#blockedMs > 2 * this.#waitingMs)) this.#up();
    else this.#wentUp = false;
  }

  #down(): void {
    if (this.#step === 0) return;
    this.#step--;
    if (this.#wentUp) {
      this.#restWindows = this.#patienceWindows;
      this.#patienceWindows = Math.min(this.#patienceWindows * 2, PATIENCE_WINDOWS_MAX);
    }
    this.#wentUp = false;
  }

  #up(): void {
    if (this.#restWindows > 0 || this.#step === STEPS.length - 1) return;
    if (this.#wentUp) this.#patienceWindows = PATIENCE_WINDOWS_MIN; // the last one was right
    this.#step++;
    this.#wentUp = true;
  }
}
