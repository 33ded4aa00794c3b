/**
 * Whether writes into the page cache are quick. Usually they are a copy in memory, and made at once on the volume's thread; but when the kernel
 * holds writers up (too much waits for the disk already), that thread must not be one of them: all its sessions would wait, those that only
 * read as well. From the first write that was held up they are made on libuv's pool, until a number of them in turn was quick there.
 */

/** Over the time of the copy: such a write was held up. */
const HELD_UP_MS = 4;
/** On the pool, over the time of the copies before it: such a one was not. Another thread had to be woken for it, and for its end. */
const QUICK_MS = 1;
/** So many quick ones in turn end it. */
const QUICK_WRITES = 32;
/** A slow copy, bytes a millisecond. */
const COPY_BYTES_PER_MS = 512 << 10;

export class WritePace {
  #quickLeft = 0;
  /** Of the writes that are on the pool, bytes. */
  #underWay = 0;

  /** Writes belong on the pool. */
  get slow(): boolean {
    return this.#quickLeft > 0;
  }

  heldUp(): void {
    this.#quickLeft = QUICK_WRITES;
  }

  /** A write of `length` bytes on the volume's thread took `ms` milliseconds. */
  tookHere(length: number, ms: number): void {
    if (ms > HELD_UP_MS + length / COPY_BYTES_PER_MS) this.heldUp();
  }

  /** A write on the pool begins. */
  begun(length: number): void {
    this.#underWay += length;
  }

  /** It has ended. */
  tookThere(length: number, ms: number): void {
    const quick = ms <= QUICK_MS + this.#underWay / COPY_BYTES_PER_MS;
    this.#underWay -= length;
    if (!quick) this.heldUp();
    else if (this.#quickLeft > 0) this.#quickLeft--;
  }
}
