/** Which blocks are in flight: a set of block numbers below 2^32, kept as 32-bit masks of the words that have any. */
export class InFlight {
  readonly #words = new Map<number, number>();

  /** Adds [first, end). */
  mark(first: number, end: number): void {
    const last = (end - 1) >>> 5;
    for (let word = first >>> 5; word <= last; word++)
      this.#words.set(word, (this.#words.get(word) ?? 0) | maskOf(word, first, end));
  }

  /** Takes [first, end) out. */
  unmark(first: number, end: number): void {
    const last = (end - 1) >>> 5;
    for (let word = first >>> 5; word <= last; word++) {
      const left = (this.#words.get(word) ?? 0) & ~maskOf(word, first, end);
      if (left === 0) this.#words.delete(word);
      else this.#words.set(word, left);
    }
  }

  /** First block from `from` on that is not in flight. */
  nextIdle(from: number): number {
    for (let block = from; ; ) {
      const busy = this.#words.get(block >>> 5);
      if (busy === undefined) return block;
      const idle = ~busy & (-1 << (block & 31));
      if (idle !== 0) return wordStart(block) + lowestBit(idle);
      block = wordStart(block) + 32;
    }
  }

  /** First block of [from, end) that is in flight, `end` if none is. */
  nextBusy(from: number, end: number): number {
    if (this.#words.size === 0) return end;
    for (let block = from; block < end; block = wordStart(block) + 32) {
      const busy = (this.#words.get(block >>> 5) ?? 0) & (-1 << (block & 31));
      if (busy !== 0) return Math.min(end, wordStart(block) + lowestBit(busy));
    }
    return end;
  }
}

function wordStart(block: number): number {
  return block - (block & 31);
}

function lowestBit(mask: number): number {
  return 31 - Math.clz32(mask & -mask);
}

/** The bits of a word that belong to [first, end), which touches it. */
function maskOf(word: number, first: number, end: number): number {
  const start = word * 32;
  const from = first > start ? -1 << (first & 31) : -1;
  return end - start >= 32 ? from : from & ((1 << (end & 31)) - 1);
}
