/**
 * How many bytes of background copy may be in flight: as many as the link carries without a queue building up in front of the
 * guest's own reads. The sign of a queue is that requests take longer than they do on an idle link (as in TCP Vegas and LEDBAT).
 */
const WINDOW_BYTES_MIN = 256 << 10;
const WINDOW_BYTES_START = 1 << 20;
export const WINDOW_BYTES_MAX = 16 << 20;
/** Delay over the link's own that is taken for a queue. */
const QUEUE_MS = 15;
const SHRINK = 0.75;
/** The idle link's latency is forgotten slowly, so that a route that became longer does not choke the copy for ever. */
const FORGET = 1.002;

export class DelayWindow {
  #bytes = WINDOW_BYTES_START;
  #floorMs = Number.POSITIVE_INFINITY;
  #lastShrinkMs = Number.NEGATIVE_INFINITY;
  #slowStart = true;

  get bytes(): number {
    return this.#bytes;
  }

  /** A request of `bytes` took `latencyMs`; `full`: the window was used up while it was under way. */
  answered(bytes: number, latencyMs: number, full: boolean, nowMs: number): void {
    this.#floorMs = Math.min(this.#floorMs * FORGET, latencyMs);
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
