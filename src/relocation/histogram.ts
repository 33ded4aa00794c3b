/** Latencies in buckets that grow by a quarter of an octave: quantiles within 19 %, no allocation. */
const BUCKETS_PER_OCTAVE = 4;
const BUCKETS = 32 * BUCKETS_PER_OCTAVE;

export class Histogram {
  readonly #counts = new Uint32Array(BUCKETS);
  #total = 0;

  get total(): number {
    return this.#total;
  }

  /** Milliseconds, >= 0. */
  add(ms: number): void {
    const micros = Math.max(1, ms * 1000);
    const bucket = Math.min(BUCKETS - 1, Math.floor(Math.log2(micros) * BUCKETS_PER_OCTAVE));
    this.#counts[bucket]!++;
    this.#total++;
  }

  /** Milliseconds that a share `q` (0..1) of all did not exceed; 0 if there were none. */
  quantile(q: number): number {
    let left = q * this.#total;
    if (this.#total === 0) return 0;
    for (let bucket = 0; bucket < BUCKETS; bucket++) {
      left -= this.#counts[bucket]!;
      if (left <= 0) return 2 ** ((bucket + 1) / BUCKETS_PER_OCTAVE) / 1000;
    }
    return 2 ** (BUCKETS / BUCKETS_PER_OCTAVE) / 1000;
  }
}
