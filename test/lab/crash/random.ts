/** Random numbers that a seed repeats. */

/** The run's seed: BLOCKFERRY_SEED, or a new one. It is printed with every failure. */
export const SEED = Number(process.env.BLOCKFERRY_SEED ?? Math.floor(Math.random() * 2 ** 31));

export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** A whole number in [0, below). */
  below(below: number): number {
    return Math.floor(this.fraction() * below);
  }

  /** A whole number in [low, high]. */
  between(low: number, high: number): number {
    return low + this.below(high - low + 1);
  }

  chance(probability: number): boolean {
    return this.fraction() < probability;
  }

  pick<T>(choices: readonly T[]): T {
    return choices[this.below(choices.length)]!;
  }

  /** In [0, 1). A Weyl sequence through a 32-bit mixer: enough for choices, and quick. */
  fraction(): number {
    this.#state = (this.#state + 0x9e3779b9) >>> 0;
    return mix(this.#state) / 2 ** 32;
  }

  /** Another sequence that follows from this one. */
  fork(): Random {
    return new Random(this.below(2 ** 32));
  }
}

/** A bijection of 32-bit numbers that leaves no pattern. */
export function mix(value: number): number {
  let h = value >>> 0;
  h = Math.imul(h ^ (h >>> 16), 0x21f0aaad);
  h = Math.imul(h ^ (h >>> 15), 0x735a2d97);
  return (h ^ (h >>> 15)) >>> 0;
}
