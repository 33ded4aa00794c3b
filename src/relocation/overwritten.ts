/**
 * Blocks that the guest keeps overwriting while they are copied ahead of a takeover: what is fetched of them is stale before it is of use, so they are
 * left alone until then. Learned from the rounds' lists: changed in so many rounds in turn. Block by block: a guest that writes here and there changes
 * every region in every round, and few blocks twice.
 */
/** Rounds in turn that make a unit one of them. */
const ROUNDS_MIN = 2;
/** Units of a list that are remembered, at most; the others are copied as they come. */
const REGIONS_MAX = 1 << 18;

export class Overwritten {
  /** `unit`: blocks that are told from others. */
  constructor(private readonly unit = 1) {}

  /** Unit -> how many rounds in turn it changed in, up to the last one. */
  #rounds = new Map<number, number>();
  #skipped = 0;

  /** A round told of these runs of blocks: first, end, first, end, ... ascending. */
  note(runs: readonly number[]): void {
    const rounds = new Map<number, number>();
    this.#skipped = 0;
    for (let at = 0; at < runs.length && rounds.size < REGIONS_MAX; at += 2) {
      const last = Math.floor((runs[at + 1]! - 1) / this.unit);
      for (let region = Math.floor(runs[at]! / this.unit); region <= last; region++) {
        if (rounds.size >= REGIONS_MAX) break;
        if (rounds.has(region)) continue;
        const inTurn = (this.#rounds.get(region) ?? 0) + 1;
        rounds.set(region, inTurn);
        if (inTurn >= ROUNDS_MIN) this.#skipped++;
      }
    }
    this.#rounds = rounds;
  }

  /** First block from `block` on that is in none of them. */
  past(block: number): number {
    if (this.#skipped === 0) return block;
    let at = block;
    for (let region = Math.floor(at / this.unit); this.#has(region); region++) at = (region + 1) * this.unit;
    return at;
  }

  /** The end of the blocks from `block` on, which is in none, that are in none either; at most `end`. */
  until(block: number, end: number): number {
    if (this.#skipped === 0) return end;
    for (let region = Math.floor(block / this.unit) + 1; region * this.unit < end; region++)
      if (this.#has(region)) return region * this.unit;
    return end;
  }

  #has(region: number): boolean {
    return (this.#rounds.get(region) ?? 0) >= ROUNDS_MIN;
  }

  clear(): void {
    this.#rounds = new Map();
    this.#skipped = 0;
  }
}
