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
 *   ask for it (relocation/pre-copy.ts). Asked again it changes nothing. Whoever missed a round finds another cookie than he expects, and must take
 *   every block for changed.
 * - `changed`, `told` and `before` together have every block that changed since generation `since`, if that is not 0.
 * - The file is memory of this boot. After a crash of the machine it counts for nothing: every block may have changed. Closed in order it is durable,
 *   with a checksum, and tells what the image was then; if somebody changed that meanwhile it counts for nothing either. After a kill nobody can tell
 *   whether somebody did: home is not offered any more, and a move that is under way goes on.
 */
import { randomInt } from 'node:crypto';
import { closeSync, constants, existsSync, fstatSync, fsyncSync, openSync, readSync, rmSync } from 'node:fs';
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
// 116 cookie of the round before, 120 whether the move came home, 124 length of the move's id, 128 the move's id, 256 the image's stamp
const STATE_AT = 8;
const CRC_AT = 12;
const BOOT_AT = 64;
const SINCE_AT = 104;
const COOKIE_AT = 112;
const BEFORE_AT = 116;
const HOME_AT = 120;
const MOVE_BYTES_AT = 124;
const MOVE_AT = 128;
const STAMP_AT = 256;
const STAMP_BYTES = 128;
const MOVE_BYTES_MAX = STAMP_AT - MOVE_AT;
const State = { INVALID: 0, OPEN: 1, CLOSED: 2 } as const;
/** Cookies are 30 bits: extents carry them beside two flags. */
export const COOKIE_MAX = 2 ** 30 - 1;
const NO_COOKIE = 0;

/** A range of blocks, `end` excluded. */
export interface Blocks {
  readonly first: number;
  readonly end: number;
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
    DirtyMap.remove(folder);
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
    DirtyMap.remove(folder);
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
    if (this.move === move) return { cookie: this.cookie, home: this.#head.readUInt32BE(HOME_AT) === 1 };
    if (Buffer.byteLength(move) > MOVE_BYTES_MAX)
      throw new BlockferryError('usage', `a move's name has at most ${MOVE_BYTES_MAX} bytes`);
    this.release();
    const home = since !== null && since > 0 && since === this.since;
    if (home) native.orInto(this.#changed, this.#before);
    else {
      native.orInto(this.#before, this.#changed);
      this.#changed.fill(0);
      for (const { first, end } of locked) this.mark(first, end);
    }
    const bytes = this.#head.write(move, MOVE_AT, MOVE_BYTES_MAX, 'utf8');
    this.#head.writeUInt32BE(bytes, MOVE_BYTES_AT);
    this.#head.writeUInt32BE(Number(home), HOME_AT);
    this.#head.writeUInt32BE(NO_COOKIE, BEFORE_AT);
    this.#head.writeUInt32BE(randomInt(1, COOKIE_MAX + 1), COOKIE_AT);
    return { cookie: this.cookie, home };
  }

  /**
   * Ends round `cookie`, whose list was taken to heart: what it told is told no more, what changed in it is from now on. Answers the next round's
   * cookie. `locked`: ranges that threads are changing. Throws 'generation' if the round is another.
   */
  cut(move: string, cookie: number, locked: Iterable<Blocks>): number {
    if (this.move === move && cookie !== NO_COOKIE && this.#head.readUInt32BE(BEFORE_AT) === cookie)
      return this.cookie;
    if (this.move !== move || this.cookie !== cookie) {
      throw new BlockferryError(
        'generation',
        `the changes of round ${cookie} of ${move} are not what is recorded here: every block counts as changed`,
      );
    }
    // Killed in here: the bits are in both, or in `told` alone under the next round's cookie.
    native.orInto(this.#before, this.#changed);
    this.#told.set(this.#changed);
    const next = 1 + ((cookie + randomInt(1, COOKIE_MAX - 1)) % COOKIE_MAX);
    this.#head.writeUInt32BE(cookie, BEFORE_AT);
    this.#head.writeUInt32BE(next, COOKIE_AT);
    this.#changed.fill(0);
    for (const { first, end } of locked) this.mark(first, end);
    return next;
  }

  /** No move copies any more. What home has to know stays. */
  release(): void {
    this.#head.writeUInt32BE(NO_COOKIE, COOKIE_AT);
    this.#told.fill(0); // `before` has it
  }

  /** Whether a block of [first, end) is told as changed, and up to where the answer is the same for all. */
  stretch(block: number, end: number): { dirty: boolean; end: number } {
    const dirty = isSet(this.#changed, block) || isSet(this.#told, block);
    if (!dirty) {
      const next = native.nextOne(this.#changed, block, end);
      return { dirty, end: native.nextOne(this.#told, block, next) };
    }
    let at = block;
    for (let next = at; ; at = next) {
      next = native.nextZero(this.#changed, at, end);
      next = next < end ? native.nextZero(this.#told, next, end) : next;
      if (next === at || next === end) return { dirty, end: next };
    }
  }

  /** Blocks that changed in this round so far. */
  get changedBlocks(): number {
    return native.countOnes(this.#changed, 0, this.blocks);
  }

  /** Closed in order, durably: the next process may trust it if the image's stamp is still this one. Null: the image has none. */
  close(stamp: string | null): void {
    try {
      if (stamp !== null) this.#closeDurably(stamp);
    } catch {
      // It stays marked as open, and counts for less the next time.
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
  static remove(folder: string): void {
    const path = join(folder, FILE);
    if (!existsSync(path)) return;
    const fd = openSync(path, 'r+');
    try {
      const head = Buffer.alloc(4);
      native.pwrite(fd, head, 0, head.length, STATE_AT);
      fsyncSync(fd);
    } finally {
      closeSync(fd);
    }
    rmSync(path, { force: true });
  }
}

function isSet(map: Uint8Array, block: number): boolean {
  return (map[block >>> 3]! & (1 << (block & 7))) !== 0;
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
