/**
 * Whether writes into the page cache are quick. Usually they are a copy in memory, and made at once on the volume's thread; but when the kernel
 * holds writers up (too much waits for the disk already), that thread must not be one of them: all its sessions would wait, those that only
 * read as well. From the first slow write on they are made on libuv's pool, until a number of them in turn was quick there.
 */

/** A write that took so long was held up. */
const SLOW_MS = 4;
/** A write on the pool that took no longer was not; another thread had to be woken for it. */
const QUICK_MS = 1;
/** So many quick ones in turn end it. */
const QUICK_WRITES = 32;

export class WritePace {
  #quickLeft = 0;

  /** Writes belong on the pool. */
  get slow(): boolean {
    return this.#quickLeft > 0;
  }

  /** A write on the volume's thread, or several together, took `ms` milliseconds. */
  tookHere(ms: number): void {
    if (ms > SLOW_MS) this.#quickLeft = QUICK_WRITES;
  }

  /** A write on the pool did. */
  tookThere(ms: number): void {
    if (ms > QUICK_MS) this.#quickLeft = QUICK_WRITES;
    else if (this.#quickLeft > 0) this.#quickLeft--;
  }
}
