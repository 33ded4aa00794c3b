/** What the source said of one stretch: which runs of whole blocks in it read as zeros. */
import type { Extent } from '../nbd/client/client.js';
import { Allocation } from '../nbd/constants.js';
import { blockAt, blocksOf } from '../volume/blocks.js';

export interface Run {
  first: number;
  /** Exclusive. */
  end: number;
}

export class ZeroMap {
  private constructor(
    /** The blocks [from, to) are known. */
    readonly from: number,
    readonly to: number,
    /** In ascending order. */
    private readonly zeroes: readonly Run[],
  ) {}

  static readonly NOTHING = new ZeroMap(0, 0, []);

  /** From extents of `base:allocation` that follow one another from `offset` on, a multiple of the block, in a volume of `size`. */
  static of(offset: number, extents: readonly Extent[], size: number): ZeroMap {
    const zeroes: Run[] = [];
    let at = offset;
    for (const { length, flags } of extents) {
      const past = Math.min(at + length, size);
      const first = blocksOf(at);
      const end = past === size ? blocksOf(size) : blockAt(past);
      if ((flags & Allocation.ZERO) !== 0 && first < end) zeroes.push({ first, end });
      at = past;
    }
    return new ZeroMap(blockAt(offset), at === size ? blocksOf(size) : blockAt(at), zeroes);
  }

  /** How many runs it has. */
  get runs(): number {
    return this.zeroes.length;
  }

  knows(block: number): boolean {
    return this.from <= block && block < this.to;
  }

  /** The first run of zeros that ends behind `block`; it may begin before it. */
  next(block: number): Run | undefined {
    let low = 0;
    let high = this.zeroes.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.zeroes[middle]!.end <= block) low = middle + 1;
      else high = middle;
    }
    return this.zeroes[low];
  }
}
