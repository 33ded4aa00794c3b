/**
 * The record that the copy replays (volume/first-access.ts): what the source tells of the machine's last move; where it tells none, what a file
 * has, of an earlier move of this volume or of another one made of the same template. What was found is also what the volume tells of the move
 * before, until its own record is worth more. A hint: whatever fails, the copy goes on without.
 */
import type { Logger } from 'pino';
import { messageOf } from '../errors.js';
import type { FirstAccess } from '../volume/first-access.js';
import { readRecord } from '../volume/first-access-file.js';
import { REGION_BYTES } from '../volume/heat.js';
import type { Link } from './link.js';
import { Recorded } from './order.js';

/** Answers that are waited for, at most: those about a record that is full are fewer. */
const ANSWERS_MAX = 128;

export class Replay {
  readonly order = new Recorded();

  constructor(
    private readonly link: Link,
    /** Of the volume. */
    private readonly record: FirstAccess,
    private readonly volumeBytes: number,
    /** Path of a record's file; null: none. */
    private readonly orderFrom: string | null,
    private readonly log: Logger,
  ) {}

  /** Learns what is known; resolves when that is all, or `goesOn` says no, with whether there is anything to replay. */
  async learn(goesOn: () => boolean): Promise<boolean> {
    this.order.clear();
    await this.#fromSource(goesOn);
    if (goesOn() && this.order.size === 0 && this.orderFrom !== null)
      await this.#fromFile(this.orderFrom, goesOn);
    if (!goesOn() || this.order.size === 0) return false;
    this.record.inherit(this.order.regions());
    return true;
  }

  async #fromSource(goesOn: () => boolean): Promise<void> {
    const { volumeBytes } = this;
    try {
      for (let offset = 0, answers = 0; offset < volumeBytes && answers < ANSWERS_MAX; answers++) {
        const extents = await this.link.firstAccess(offset, volumeBytes - offset);
        if (extents === null || extents.length === 0 || !goesOn()) return;
        this.order.learn(offset, extents);
        for (const { length } of extents) offset += length;
      }
    } catch (error) {
      this.log.debug({ why: messageOf(error) }, 'the source does not tell what its machine read first');
    }
  }

  async #fromFile(path: string, goesOn: () => boolean): Promise<void> {
    try {
      const regions = await readRecord(path);
      if (!goesOn()) return;
      const end = Math.ceil(this.volumeBytes / REGION_BYTES);
      for (const [index, region] of regions.entries()) if (region < end) this.order.put(region, index + 1);
    } catch (error) {
      this.log.warn({ file: path, why: messageOf(error) }, 'no recorded order to replay');
    }
  }
}
