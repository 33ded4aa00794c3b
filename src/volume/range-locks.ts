/**
 * Block ranges that a thread is changing: a zero or a hole punch under way, whose effect may land at any moment until it is
 * done.
 *
 * Invariants
 * - Two holders never overlap: whoever changes the image (write, zero, trim) first checks `overlaps`, and waits.
 * - A fill skips locked blocks: the guest's change to them came before the fill's data and wins.
 * - Check and lock, or check and write, are one synchronous step of the volume's thread.
 */
export interface RangeLock {
  readonly first: number;
  /** Exclusive. */
  readonly end: number;
}

export class RangeLocks {
  readonly #held = new Set<RangeLock>();

  /** In no order. */
  get held(): Iterable<RangeLock> {
    return this.#held;
  }

  get size(): number {
    return this.#held.size;
  }

  /** Blocks [first, end), which must overlap no other lock. */
  lock(first: number, end: number): RangeLock {
    const lock = { first, end };
    this.#held.add(lock);
    return lock;
  }

  unlock(lock: RangeLock): void {
    this.#held.delete(lock);
  }

  overlaps(first: number, end: number): boolean {
    for (const lock of this.#held) if (lock.first < end && first < lock.end) return true;
    return false;
  }

  /** End of the run of blocks from `first` on that are all locked (or all free), at most `end`. */
  run(first: number, end: number): { locked: boolean; end: number } {
    let free = end;
    for (const lock of this.#held) {
      if (lock.first <= first && first < lock.end) return { locked: true, end: Math.min(lock.end, end) };
      if (lock.first > first && lock.first < free) free = lock.first;
    }
    return { locked: false, end: free };
  }
}
