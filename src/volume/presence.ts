/**
 * The presence of a volume's blocks: one bit a block, "its current content is here", kept in two files (design, section 4).
 *
 * Invariants
 * - A bit is set only after the block's data was written to the image (`set` is called behind the write). It is cleared by `drop`, which drops
 *   all of them under a new epoch, and before the takeover by `clear`: the source changed the block. A cleared bit is in presence.map again until
 *   the next commit, so what a standby kept is not opened from presence.map (open.ts), and a takeover puts what is left under a new epoch (`renew`).
 * - While the machine lives, presence.live is the truth; after the machine died, presence.map is, which is behind the data.
 * - presence.live gone or damaged although a process of this very boot had it open and did not close it: which writes since the
 *   last flush are here is then unknown. The volume is refused; it is never opened on a guess.
 */
import { existsSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { BlockferryError } from '../errors.js';
import * as native from '../native/index.js';
import { bootId } from './boot.js';
import { copyPages, DurableMap, PAGE_BITS } from './durable-map.js';
import { syncFolder } from './files.js';
import { LiveMap, type LiveTag } from './live-map.js';

const LIVE_FILE = 'presence.live';
const DURABLE_FILE = 'presence.map';
/** Pages of the durable map that are written together: 4 MiB of them. */
const PAGES_AT_ONCE = 1000;

export interface PresenceIdentity {
  id: string;
  mapEpoch: number;
  openBootId: string | null;
}

export class Presence {
  readonly #bits: Uint8Array;
  readonly #changed: Uint8Array;
  #anyChanged = false;
  #present: number;

  private constructor(
    private readonly folder: string,
    readonly blocks: number,
    private readonly live: LiveMap,
    private durable: DurableMap,
    private tag: LiveTag,
  ) {
    this.#bits = live.bits;
    this.#changed = new Uint8Array(Math.ceil(blocks / PAGE_BITS));
    this.#present = native.countOnes(this.#bits, 0, blocks);
  }

  /** Empty maps for a new volume; files of an earlier one are replaced. */
  static async create(folder: string, identity: PresenceIdentity, blocks: number): Promise<Presence> {
    const tag = { volumeId: identity.id, bootId: bootId(), blocks, epoch: identity.mapEpoch };
    const live = await LiveMap.create(join(folder, LIVE_FILE), blocks);
    const durable = await DurableMap.create(
      join(folder, DURABLE_FILE),
      identity.id,
      blocks,
      identity.mapEpoch,
    );
    live.validate(tag);
    await syncFolder(folder);
    return new Presence(folder, blocks, live, durable, tag);
  }

  /** Whether presence.live is this boot's, and has this epoch's bits. */
  static isLive(folder: string, identity: PresenceIdentity, blocks: number): boolean {
    const tag = { volumeId: identity.id, bootId: bootId(), blocks, epoch: identity.mapEpoch };
    const found = LiveMap.open(join(folder, LIVE_FILE), tag);
    if (!(found instanceof LiveMap)) return false;
    found.close();
    return true;
  }

  /** The maps of a volume that was open before. Throws 'state-damaged' where they cannot be trusted. */
  static async recover(folder: string, identity: PresenceIdentity, blocks: number): Promise<Presence> {
    const tag = { volumeId: identity.id, bootId: bootId(), blocks, epoch: identity.mapEpoch };
    const livePath = join(folder, LIVE_FILE);
    const found = LiveMap.open(livePath, tag);
    if (found === 'missing' && identity.openBootId === tag.bootId) {
      throw new BlockferryError(
        'state-damaged',
        `${livePath} is missing or damaged, and the volume was not closed since the machine booted: which of the last writes ` +
          'are local is unknown, so the volume is not opened; restore the file from a copy',
      );
    }
    const durablePath = join(folder, DURABLE_FILE);
    if (found instanceof LiveMap) return Presence.#fromLive(folder, blocks, found, durablePath, tag);
    const bits = new Uint8Array(Math.ceil(blocks / 8));
    const durable = await DurableMap.open(durablePath, identity.id, blocks, identity.mapEpoch, bits);
    // Under another name until it counts: killed meanwhile, the next process finds what this one found.
    const next = `${livePath}.next`;
    let live: LiveMap;
    try {
      live = await LiveMap.create(next, blocks);
    } catch (error) {
      durable.close();
      throw error;
    }
    live.bits.set(bits);
    live.validate(tag);
    renameSync(next, livePath);
    return new Presence(folder, blocks, live, durable, tag);
  }

  /** The live map is the truth; what presence.map lacks is due for the next commit. */
  static async #fromLive(
    folder: string,
    blocks: number,
    live: LiveMap,
    path: string,
    tag: LiveTag,
  ): Promise<Presence> {
    const bits = new Uint8Array(live.bits.length);
    let durable: DurableMap;
    try {
      durable = await DurableMap.open(path, tag.volumeId, blocks, tag.epoch, bits);
    } catch (error) {
      if (!(error instanceof BlockferryError)) throw error;
      // Nothing is lost, the live map has it all: a new file is filled by the next commit, the damaged one stays until then.
      rmSync(`${path}.next`, { force: true });
      durable = await DurableMap.create(`${path}.next`, tag.volumeId, blocks, tag.epoch);
      bits.fill(0);
    }
    const presence = new Presence(folder, blocks, live, durable, tag);
    const pageBytes = PAGE_BITS / 8;
    for (let page = 0; page < presence.#changed.length; page++) {
      const from = page * pageBytes;
      const before = Buffer.from(bits.buffer, from, Math.min(pageBytes, bits.length - from));
      if (!before.equals(live.bits.subarray(from, from + before.length))) presence.#change(page);
    }
    return presence;
  }

  /** Bit i & 7 of byte i >> 3 says whether block i is here. For reading only, and not to be kept. */
  get bits(): Uint8Array {
    return this.#bits;
  }

  /** Blocks that are here. */
  get present(): number {
    return this.#present;
  }

  get complete(): boolean {
    return this.#present === this.blocks;
  }

  has(block: number): boolean {
    return (this.#bits[block >>> 3]! & (1 << (block & 7))) !== 0;
  }

  /** Whether all blocks of [first, end) are here. */
  hasAll(first: number, end: number): boolean {
    if (end - first <= 16) {
      for (let block = first; block < end; block++) if (!this.has(block)) return false;
      return true;
    }
    return native.nextZero(this.#bits, first, end) === end;
  }

  /** First block of [from, end) that is missing, `end` if none is. */
  nextMissing(from: number, end: number): number {
    return from < end ? native.nextZero(this.#bits, from, end) : end;
  }

  /** First block of [from, end) that is here, `end` if none is. */
  nextPresent(from: number, end: number): number {
    return from < end ? native.nextOne(this.#bits, from, end) : end;
  }

  /** The data of [first, end) is in the image. */
  set(first: number, end: number): void {
    let added = 0;
    if (end - first === 1) {
      const byte = first >>> 3;
      const bit = 1 << (first & 7);
      if ((this.#bits[byte]! & bit) !== 0) return;
      this.#bits[byte]! |= bit;
      added = 1;
    } else {
      added = native.setRange(this.#bits, first, end);
      if (added === 0) return;
    }
    this.#present += added;
    const last = Math.floor((end - 1) / PAGE_BITS);
    for (let page = Math.floor(first / PAGE_BITS); page <= last; page++) this.#change(page);
  }

  /** What is in the image of [first, end) counts for nothing any more. */
  clear(first: number, end: number): void {
    let removed = 1;
    if (end - first === 1) {
      // A list of scattered changes has many of them, and the machine stands still.
      if (!this.has(first)) return;
      this.#bits[first >>> 3]! &= ~(1 << (first & 7));
    } else {
      removed = native.clearRange(this.#bits, first, end);
      if (removed === 0) return;
    }
    this.#present -= removed;
    const last = Math.floor((end - 1) / PAGE_BITS);
    for (let page = Math.floor(first / PAGE_BITS); page <= last; page++) this.#change(page);
  }

  #change(page: number): void {
    this.#changed[page] = 1;
    this.#anyChanged = true;
  }

  /** Whether the durable map lacks something: bits, or its place (the file there was damaged). */
  get changed(): boolean {
    return this.#anyChanged || this.durable.path !== this.#durablePath;
  }

  get #durablePath(): string {
    return join(this.folder, DURABLE_FILE);
  }

  /**
   * Makes the bits that are set now durable, behind their data. One at a time. After a failure the durable map must not be
   * committed to again.
   */
  async commit(syncImage: () => Promise<void>): Promise<void> {
    if (!this.changed) return syncImage();
    const pages: number[] = [];
    for (let page = this.#changed.indexOf(1); page !== -1; page = this.#changed.indexOf(1, page + 1))
      pages.push(page);
    this.#anyChanged = false;
    // In rounds, so that a commit of a huge map takes little memory and the thread is not held for long.
    for (let at = 0; at === 0 || at < pages.length; at += PAGES_AT_ONCE) {
      const round = pages.slice(at, at + PAGES_AT_ONCE);
      for (const page of round) this.#changed[page] = 0;
      await this.durable.commit(copyPages(this.#bits, round), syncImage);
    }
    if (this.durable.path !== this.#durablePath) {
      renameSync(this.durable.path, this.#durablePath);
      await syncFolder(this.folder);
      this.durable.path = this.#durablePath;
    }
  }

  /** Drops every bit. The new epoch is in the volume's durable identity already, so that a crash in here changes nothing. */
  drop(epoch: number): void {
    this.live.invalidate();
    this.#bits.fill(0);
    this.#present = 0;
    this.#changed.fill(0);
    this.#anyChanged = false;
    this.tag = { ...this.tag, epoch };
    this.durable.epoch = epoch;
    this.live.validate(this.tag);
  }

  /**
   * Puts the bits under a new epoch, which is in the volume's durable identity already: presence.map, which may still have bits that were cleared, counts
   * for nothing until the next commit writes all that are set. A process that is killed right before leaves a live map of the old epoch, and with it no
   * bits; one whose commit is under way writes them under the old one.
   */
  renew(epoch: number): void {
    this.tag = { ...this.tag, epoch };
    this.durable.epoch = epoch;
    for (let block = this.nextPresent(0, this.blocks); block < this.blocks; ) {
      const page = Math.floor(block / PAGE_BITS);
      this.#change(page);
      block = this.nextPresent(Math.min((page + 1) * PAGE_BITS, this.blocks), this.blocks);
    }
    this.live.validate(this.tag);
  }

  close(): void {
    this.live.close();
    this.durable.close();
  }

  /** Closes the maps and deletes their files: the volume's phase says durably that it needs none. */
  remove(): void {
    this.close();
    Presence.removeFiles(this.folder);
  }

  /**
   * Closes the maps of a volume that was marked as closed, and deletes their files in two durable steps: what a crash leaves is
   * presence.map alone, which such a volume opens with, or nothing.
   */
  async discard(): Promise<void> {
    this.close();
    for (const file of [LIVE_FILE, DURABLE_FILE]) {
      for (const name of [`${file}.next`, file]) rmSync(join(this.folder, name), { force: true });
      await syncFolder(this.folder);
    }
  }

  static hasFiles(folder: string): boolean {
    return [LIVE_FILE, DURABLE_FILE].some((file) => existsSync(join(folder, file)));
  }

  static removeFiles(folder: string): void {
    for (const file of [LIVE_FILE, DURABLE_FILE])
      for (const name of [file, `${file}.next`]) rmSync(join(folder, name), { force: true });
  }
}
