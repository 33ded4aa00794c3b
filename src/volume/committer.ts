/**
 * Makes a volume's data and presence durable, one commit at a time.
 *
 * Invariants
 * - An answered commit means: all writes answered before it was asked for are on stable storage, and so is their presence, behind
 *   them. Who asks while a commit runs gets the next one: the running one may have begun before his writes.
 * - After a failed sync no commit succeeds again: the kernel reports a lost page only once.
 */
import { BlockferryError } from '../errors.js';
import { Errno } from '../nbd/constants.js';
import type { Image } from './image.js';
import type { Presence } from './presence.js';

export class Committer {
  #serial: Promise<unknown> = Promise.resolve();
  #next: Promise<number> | undefined;
  #failure: BlockferryError | null = null;

  constructor(
    private readonly image: Image,
    private readonly presence: () => Presence | null,
  ) {}

  /** Why nothing can be made durable any more, if so. */
  get failure(): BlockferryError | null {
    return this.#failure;
  }

  /** Resolves with an errno. */
  commit(): Promise<number> {
    this.#next ??= this.serially(() => {
      this.#next = undefined;
      return this.#commitNow();
    });
    return this.#next;
  }

  /** Runs a step that must not meet a commit half way; one at a time, in order. */
  serially<T>(step: () => Promise<T>): Promise<T> {
    const result = this.#serial.then(step);
    this.#serial = result.catch(() => undefined);
    return result;
  }

  async #commitNow(): Promise<number> {
    if (this.#failure !== null) return Errno.EIO;
    try {
      const presence = this.presence();
      if (presence === null) await this.#syncImage();
      else await presence.commit(() => this.#syncImage());
      return Errno.OK;
    } catch (cause) {
      this.#failure = new BlockferryError(
        'image-io',
        `writes to ${this.image.path} could not be made durable; check its disk, then restart this daemon`,
        { cause },
      );
      return Errno.EIO;
    }
  }

  async #syncImage(): Promise<void> {
    if (this.image.readOnly) return;
    const done = await this.image.sync();
    if (done === 0) return;
    throw new BlockferryError('image-io', `fdatasync of ${this.image.path} failed: errno ${-done}`);
  }
}
