/**
 * How many bytes of background copy may be in flight: as many as the link carries without a queue building up in front of the
 * guest's own reads. The sign of a queue is that requests take longer than they do on an idle link (as in TCP Vegas and LEDBAT).
 *
 * What an idle link takes can only be seen on one: when no request came near the least latency for a while (a queue of our own, or a
 * longer route, cannot be told apart), the window shrinks to a single request until one was answered, as BBR does.
 */
/** One bulk request. */
export const WINDOW_BYTES_MIN = 256 << 10;
const WINDOW_BYTES_START = 1 << 20;
export const WINDOW_BYTES_MAX = 16 << 20;
/** Delay over the link's own that is taken for a queue. */
const QUEUE_MS = 15;
const SHRINK = 0.75;
/** The least latency is measured anew when none came near it for so long. */
const FLOOR_MS = 10_000;
const NEAR = 1.1;

export class DelayWindow {
  #bytes = WINDOW_BYTES_START;
  #floorMs = Number.POSITIVE_INFINITY;
  #nearFloorAtMs = 0;
  #lastShrinkMs = Number.NEGATIVE_INFINITY;
  #slowStart = true;
  /** Measuring the floor since. */
  #probedAtMs: number | null = null;

  get bytes(): number {
    return this.#probedAtMs === null ? this.#bytes : WINDOW_BYTES_MIN;
  }

  /** A request of `bytes` took `latencyMs`; `full`: the window was used up while it was under way. */
  answered(bytes: number, latencyMs: number, full: boolean, nowMs: number): void {
    if (this.#probedAtMs !== null) {
      // Sent since, and so alone: the window lets only one go at a time, and that one when all before it are answered.
      if (nowMs - latencyMs <= this.#probedAtMs) return;
      this.#probedAtMs = null;
      this.#floorMs = latencyMs;
      this.#nearFloorAtMs = nowMs;
      return;
    }
    if (latencyMs <= NEAR * this.#floorMs) {
      this.#floorMs = Math.min(this.#floorMs, latencyMs);
      this.#nearFloorAtMs = nowMs;
    } else if (nowMs - this.#nearFloorAtMs > FLOOR_MS) {
      this.#probedAtMs = nowMs;
      return;
    }
    if (latencyMs > 1.5 * this.#floorMs + QUEUE_MS) {
      this.#slowStart = false;
      if (nowMs - this.#lastShrinkMs < latencyMs) return; // once a round trip
      this.#lastShrinkMs = nowMs;
      this.#bytes = Math.max(WINDOW_BYTES_MIN, this.#bytes * SHRINK);
    } else if (full) {
      const grown = this.#slowStart ? bytes : (bytes * bytes) / this.#bytes;
      this.#bytes = Math.min(WINDOW_BYTES_MAX, this.#bytes + grown);
    }
  }
}
