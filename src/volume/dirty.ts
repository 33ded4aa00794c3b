/**
 * STATE/<volume>/dirty.live: which blocks the guest changed, kept where somebody else has a copy of the others. Two may ask:
 *
 * - *home*: the host the volume came from. Its image is what it was when it was sealed there, as generation `since`. Returning, only blocks that
 *   changed since need to cross.
 * - a *move* that copies blocks while the guest works (pre-copy). It asks for them in rounds: a `cut` begins a new one, and its cookie names it.
 *
 * Three maps of one bit a block: `changed` in this round, `told` by the last cut, and `before` (home's share of what earlier cuts took out).
 *
 * Invariants
 * - A bit of `changed` is set before the change it tells of, in one synchronous step or, where a thread makes the change, under the range lock that it
 *   holds, and again when it is over. A cut keeps the bits of ranges that are locked. So whoever reads a block after it was told of it, and is told
 *   nothing more of it, has its content; killed at any line, too much is told and never too little.
 * - What a cut takes out of `told` it was told one round ago: a cut names the round it ends, and only who has taken that round's list to heart may
 *   ask for it (relocation/pre-copy.ts). Asked again it changes nothing. A round's list, and the next one's, are whole for who knows that round; whoever
 *   finds any other cookie must take every block for changed. A claim begins with a cookie drawn by lot, so that no other's rounds are taken for its own.
 * - `changed`, `told` and `before` together have every block that changed since generation `since`, if that is not 0.
 * - The file is memory of this boot. After a crash of the machine it counts for nothing: every block may have changed. Closed in order it is durable,
 *   with a checksum, and tells what the image was then; if somebody changed that meanwhile it counts for nothing either. After a kill nobody can tell
 *   whether somebody did: home is not offered any more, and a move that is under way goes on.
 */
import { randomInt } from 'node:crypto';
import { closeSync, constants, existsSync, fstatSync, fsyncSync, openSync, readSync, rmSync } from 'node:fs';
import { open, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { BlockferryError } from '../errors.js';
import * as native from '../native/index.js';
import { bootId } from './boot.js';

const FILE = 'dirty.live';
const MAGIC = 'BFDIRTY1';
const HEAD_BYTES = 4096;
const PAGE_BYTES = 4096;
// Head: 0 magic, 8 state, 12 crc32 of the maps when closed, 16 blocks (u64), 24 volume id (36), 64 boot id (36), 104 since (u64), 112 cookie,
// 120 whether the move came home, 124 length of the move's id, 128 the move's id, 256 the image's stamp
const STATE_AT = 8;
const CRC_AT = 12;
const BOOT_AT = 64;
const SINCE_AT = 104;
const COOKIE_AT = 112;
const HOME_AT = 120;
const MOVE_BYTES_AT = 124;
const MOVE_AT = 128;
const STAMP_AT = 256;
const STAMP_BYTES = 128;
const MOVE_BYTES_MAX = STAMP_AT - MOVE_AT;
const State = { INVALID: 0, OPEN: 1, CLOSED: 2 } as const;
/** Cookies are 29 bits: extents carry them beside three flags. */
export const COOKIE_MAX = 2 ** 29 - 1;
const NO_COOKIE = 0;

/** A range of blocks, `end` excluded. */
export interface Blocks {
  readonly first: number;
  readonly end: number;
}

/** The cookie of the round behind this one. */
export function nextRound(cookie: number): number {
  return (cookie % COOKIE_MAX) + 1;
}

export interface DirtyOwner {
  readonly id: string;
  readonly blocks: number;
}

/** What a move is told when it begins to copy. */
export interface Tracking {
  /** Names the round. */
  readonly cookie: number;
  /** All that changed since the generation that was asked for will be told; otherwise what changes from now on. */
  readonly home: boolean;
}

export class DirtyMap {
  readonly #head: Buffer;
  readonly #changed: Uint8Array;
  readonly #told: Uint8Array;
  readonly #before: Uint8Array;

  private constructor(
    private readonly path: string,
    private readonly mapping: Uint8Array,
    private readonly blocks: number,
  ) {
    const bytes = mapBytes(blocks);
    const map = (index: number): Uint8Array =>
      new Uint8Array(mapping.buffer, mapping.byteOffset + HEAD_BYTES + index * bytes, bytes);
    this.#head = Buffer.from(mapping.buffer, mapping.byteOffset, HEAD_BYTES);
    this.#changed = map(0);
    this.#told = map(1);
    this.#before = map(2);
  }

  /** A map in which nothing has changed since the image's `since` (0: no generation that anybody has). An old file is replaced. */
  static async create(folder: string, owner: DirtyOwner, since: number): Promise<DirtyMap> {
    await DirtyMap.remove(folder);
    const path = join(folder, FILE);
    const fd = openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC, 0o600);
    try {
      const length = fileBytes(owner.blocks);
      let done = await native.allocate(fd, 0, length);
      if (done === -native.ERRNO.EOPNOTSUPP) done = await native.zeroRange(fd, 0, length, false);
      if (done < 0)
        throw new BlockferryError('no-space', `no room for the dirty map ${path} (${length} bytes)`);
      const map = new DirtyMap(path, native.mapShared(fd, length), owner.blocks);
      headFor(owner).copy(map.#head);
      map.#since = since;
      map.#setState(State.OPEN);
      return map;
    } catch (error) {
      rmSync(path, { force: true });
      throw error;
    } finally {
      closeSync(fd);
    }
  }

  /** What an earlier process left, as far as it can be trusted; null, and no file, if it cannot. `stamp`: of the image, as it is now. */
  static open(folder: string, owner: DirtyOwner, stamp: string | null): DirtyMap | null {
    const path = join(folder, FILE);
    const map = DirtyMap.#map(path, owner);
    if (map !== null) {
      if (map.#isTrusted(stamp)) return map;
      map.unmap();
    }
    rmSync(path, { force: true }); // a crash may bring it back, and it will be trusted as little then
    return null;
  }

  static #map(path: string, owner: DirtyOwner): DirtyMap | null {
    let fd: number;
    try {
      fd = openSync(path, constants.O_RDWR);
    } catch {
      return null;
    }
    try {
      const length = fileBytes(owner.blocks);
      const head = Buffer.alloc(HEAD_BYTES);
      if (fstatSync(fd).size !== length || readSync(fd, head, 0, HEAD_BYTES, 0) !== HEAD_BYTES) return null;
      const want = headFor(owner);
      for (const [from, to] of [
        [0, STATE_AT],
        [16, 60],
      ] as const)
        if (!head.subarray(from, to).equals(want.subarray(from, to))) return null;
      return new DirtyMap(path, native.mapShared(fd, length), owner.blocks);
    } finally {
      closeSync(fd);
    }
  }

  /** Decides by the head what is left to trust, and marks the file as open. */
  #isTrusted(stamp: string | null): boolean {
    const state = this.#head.readUInt32BE(STATE_AT);
    const bootNow = bootId();
    if (state === State.CLOSED) {
      const kept = this.#head.toString('latin1', STAMP_AT, STAMP_AT + STAMP_BYTES).replace(/\0+$/, '');
      if (kept !== stamp || this.#head.readUInt32BE(CRC_AT) !== this.#checksum()) return false;
    } else if (state === State.OPEN) {
      if (this.#head.toString('latin1', BOOT_AT, BOOT_AT + 36) !== bootNow) return false;
      this.#since = 0;
      if (this.cookie === NO_COOKIE) return false;
    } else return false;
    this.#head.write(bootNow, BOOT_AT, 36, 'latin1');
    this.#setState(State.OPEN);
    this.#sync(); // before anything changes: a closed one must not be found again
    return true;
  }

  /** Of `changed`, for whoever changes blocks and has marked them there: bit i & 7 of byte i >> 3. */
  get bits(): Uint8Array {
    return this.#changed;
  }

  /** The generation whose image somebody may still have; 0: nobody. */
  get since(): number {
    return Number(this.#head.readBigUInt64BE(SINCE_AT));
  }

  set #since(generation: number) {
    this.#head.writeBigUInt64BE(BigInt(generation), SINCE_AT);
  }

  /** Names the round of the move that copies; 0: none does. */
  get cookie(): number {
    return this.#head.readUInt32BE(COOKIE_AT);
  }

  /** The move that copies; null: none does. */
  get move(): string | null {
    if (this.cookie === NO_COOKIE) return null;
    const bytes = Math.min(this.#head.readUInt32BE(MOVE_BYTES_AT), MOVE_BYTES_MAX);
    return this.#head.toString('utf8', MOVE_AT, MOVE_AT + bytes);
  }

  /** Blocks of [first, end) are about to be changed. */
  mark(first: number, end: number): void {
    if (end - first === 1) this.#changed[first >>> 3]! |= 1 << (first & 7);
    else native.setRange(this.#changed, first, end);
  }

  /**
   * A move begins to copy: what changes from now on is told to it, and, if it has the image of generation `since` and that is known here, what
   * changed since. Asked again by the same move nothing changes. Another move's rounds are over.
   */
  claim(move: string, since: number | null, locked: Iterable<Blocks>): Tracking {
    if (this.move === move) {
      const home = this.#head.readUInt32BE(HOME_AT) === 1;
      if (home) native.orInto(this.#changed, this.#before); // rounds that nobody may have heard of
      return { cookie: this.cookie, home };
    }
    if (Buffer.byteLength(move) > MOVE_BYTES_MAX)
      throw new BlockferryError('usage', `a move's name has at most ${MOVE_BYTES_MAX} bytes`);
    this.release();
    const home = since !== null && since > 0 && since === this.since;
    if (home) native.orInto(this.#changed, this.#before);
    else {
      native.orInto(this.#before, this.#changed);
      clear(this.#changed);
      for (const { first, end } of locked) this.mark(first, end);
    }
    const bytes = this.#head.write(move, MOVE_AT, MOVE_BYTES_MAX, 'utf8');
    this.#head.writeUInt32BE(bytes, MOVE_BYTES_AT);
    this.#head.writeUInt32BE(Number(home), HOME_AT);
    this.#head.writeUInt32BE(randomInt(1, COOKIE_MAX + 1), COOKIE_AT);
    return { cookie: this.cookie, home };
  }

  /**
   * Ends round `cookie`, whose list was taken to heart: what it told is told no more, what changed in it is from now on. Answers the next round's
   * cookie. `locked`: ranges that threads are changing. Throws 'generation' if the round is another.
   */
  cut(move: string, cookie: number, locked: Iterable<Blocks>): number {
    const next = nextRound(cookie);
    if (this.move === move && this.cookie === next) return next;
    if (this.move !== move || this.cookie !== cookie) {
      throw new BlockferryError(
        'generation',
        `the changes of round ${cookie} of ${move} are not what is recorded here: every block counts as changed`,
      );
    }
    // Killed in here: the bits are in both, or in `told` alone under the next round's cookie.
    native.orInto(this.#before, this.#changed);
    clear(this.#told);
    native.orInto(this.#told, this.#changed);
    this.#head.writeUInt32BE(next, COOKIE_AT);
    clear(this.#changed);
    for (const { first, end } of locked) this.mark(first, end);
    return next;
  }

  /** No move copies any more. What home has to know stays. */
  release(): void {
    this.#head.writeUInt32BE(NO_COOKIE, COOKIE_AT);
    clear(this.#told); // `before` has it
  }

  /**
   * For ascending blocks before `end`, in one step: whether a block changed in this round, and whether in an earlier one that is told of still, and up to
   * where the answer is the same. Each map is scanned once, however its runs lie. `asked`: of the last round, of any
   * time since tracking began, or nobody wants to know.
   */
  stretches(
    end: number,
    asked: Earlier = 'told',
  ): (block: number) => { changed: boolean; earlier: boolean; end: number } {
    const scan = (map: Uint8Array): Scan => ({ map, set: false, end: 0 });
    const [changed, told, before] = [scan(this.#changed), scan(this.#told), scan(this.#before)];
    const at = (of: Scan, block: number): boolean => {
      if (block >= of.end) {
        of.set = (of.map[block >>> 3]! & (1 << (block & 7))) !== 0;
        of.end = (of.set ? native.nextZero : native.nextOne)(of.map, block, end);
      }
      return of.set;
    };
    return (block) => {
      const now = at(changed, block);
      if (asked === 'none') return { changed: now, earlier: false, end: changed.end };
      const earlier = at(told, block);
      if (asked === 'told') return { changed: now, earlier, end: Math.min(changed.end, told.end) };
      const any = at(before, block) || earlier;
      return { changed: now, earlier: any, end: Math.min(changed.end, told.end, before.end) };
    };
  }

  /** Blocks that changed in this round so far. */
  get changedBlocks(): number {
    return native.countOnes(this.#changed, 0, this.blocks);
  }

  /** Closed in order, durably: the next process may trust it if the image's stamp is still this one. Null: the image has none, nobody may. */
  close(stamp: string | null): void {
    this.#setState(State.INVALID);
    try {
      if (stamp !== null) this.#closeDurably(stamp);
    } catch {
      this.#setState(State.INVALID);
    } finally {
      this.unmap();
    }
  }

  #closeDurably(stamp: string): void {
    this.#head.fill(0, STAMP_AT, STAMP_AT + STAMP_BYTES);
    this.#head.write(stamp, STAMP_AT, STAMP_BYTES, 'latin1');
    this.#head.writeUInt32BE(this.#checksum(), CRC_AT);
    this.#sync();
    this.#setState(State.CLOSED);
    this.#sync();
  }

  /** Lets go of it as a process does that is killed. */
  unmap(): void {
    native.unmap(this.mapping);
  }

  #setState(state: number): void {
    this.#head.writeUInt32BE(state, STATE_AT);
  }

  #checksum(): number {
    return crc32(this.mapping.subarray(HEAD_BYTES), this.since);
  }

  #sync(): void {
    const fd = openSync(this.path, 'r');
    try {
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
  }

  /** Removes the file, so that no crash brings it back as one that can be trusted. */
  static async remove(folder: string): Promise<void> {
    const path = join(folder, FILE);
    if (!existsSync(path)) return;
    const file = await open(path, 'r+');
    try {
      await file.write(Buffer.alloc(4), 0, 4, STATE_AT);
      await file.datasync();
    } finally {
      await file.close();
    }
    await rm(path, { force: true });
  }
}

/** Pages that have nothing to lose are not written. */
function clear(map: Uint8Array): void {
  const bits = map.length * 8;
  for (let bit = native.nextOne(map, 0, bits); bit < bits; ) {
    const page = Math.floor(bit / 8 / PAGE_BYTES) * PAGE_BYTES;
    map.fill(0, page, page + PAGE_BYTES);
    bit = native.nextOne(map, Math.min(bits, (page + PAGE_BYTES) * 8), bits);
  }
}

export type Earlier = 'none' | 'told' | 'ever';

interface Scan {
  readonly map: Uint8Array;
  /** Of the blocks up to `end`. */
  set: boolean;
  end: number;
}

function headFor({ id, blocks }: DirtyOwner): Buffer {
  const head = Buffer.alloc(HEAD_BYTES);
  head.write(MAGIC, 0, 'latin1');
  head.writeBigUInt64BE(BigInt(blocks), 16);
  head.write(id, 24, 36, 'latin1');
  head.write(bootId(), BOOT_AT, 36, 'latin1');
  return head;
}

function mapBytes(blocks: number): number {
  return Math.max(PAGE_BYTES, Math.ceil(Math.ceil(blocks / 8) / PAGE_BYTES) * PAGE_BYTES);
}

function fileBytes(blocks: number): number {
  return HEAD_BYTES + 3 * mapBytes(blocks);
}
