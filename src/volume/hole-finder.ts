/**
 * Holes of an image that READs come upon, as far as they are cheap to find: about 1 µs a question, against 3 to 10 µs for every 64 KiB that
 * need not be read and sent. Where nothing is to be gained, or a question takes long, questions become rare:
 *
 * - After a READ that found data, one is not asked about, after two in a row two, after three four, up to SKIPPED_MAX: a dense image hardly
 *   pays for them.
 * - Linux looks for data through all extents that are reserved and not written, 0.25 µs for each 128 MiB: 2 ms in a reserved TiB. Two
 *   questions in a row that took longer than SLOW_MS (one alone may have been interrupted) are followed by PAUSE times as long without any.
 */
import type { Image } from './image.js';

const SKIPPED_MAX = 16;
const SLOW_MS = 0.05;
const PAUSE = 1000;

export class HoleFinder {
  /** READs that are not asked about. */
  #skip = 0;
  #nextSkip = 1;
  #pausedUntilMs = 0;
  #wasSlow = false;

  constructor(
    private readonly image: Pick<Image, 'holeFrom'>,
    private readonly nowMs: () => number = () => performance.now(),
  ) {}

  /** As `Image.holeFrom`, or 0 without a look. */
  holeFrom(offset: number, end: number): number {
    if (this.#skip > 0) {
      this.#skip--;
      return 0;
    }
    const beganMs = this.nowMs();
    if (beganMs < this.#pausedUntilMs) return 0;
    const found = this.image.holeFrom(offset, end);
    const tookMs = this.nowMs() - beganMs;
    const slow = tookMs > SLOW_MS;
    if (slow && this.#wasSlow) this.#pausedUntilMs = beganMs + tookMs * PAUSE;
    this.#wasSlow = slow;
    if (found > 0) this.#nextSkip = 1;
    else {
      this.#skip = this.#nextSkip;
      this.#nextSkip = Math.min(this.#nextSkip * 2, SKIPPED_MAX);
    }
    return found;
  }
}
