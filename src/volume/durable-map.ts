/**
 * presence.map: the durable presence map, written only behind the data.
 *
 * The map is cut into pages of PAGE_BITS bits. Each page has two slots of 4 KiB in the file, written in turn: a slot holds
 * its page's bits, a sequence number and a checksum, so a torn write leaves the other slot, the previous good copy. Four
 * header slots come first, also written in turn: at most two of them are not yet on stable storage at any time.
 *
 *     0        4096     8192     12288    16384                           16384 + (2 p + s) * 4096
 *     header 0 | header 1 | header 2 | header 3 | page 0 slot 0 | page 0 slot 1 | page 1 slot 0 | ...
 *
 * A commit (the design's section 4) is, in this order:
 *   1. copy the pages whose bits changed since the last commit              (the caller's map, one synchronous step)
 *   2. write the header: "commit N is about to write pages p, q, r"
 *   3. fdatasync the image, and at the same time this file
 *   4. write the pages, each into the slot that does not hold its newest copy
 *   5. fdatasync this file; only then is the commit's caller answered
 *   6. write a header that announces nothing; it need not be durable
 * Invariants
 * - A bit in this file is never set before its data is on stable storage: its page is written (4) after the image's sync (3),
 *   and the copy (1) was taken before that sync began, from bits that were set after their data was written.
 * - A crash at any line loses no bit of an earlier commit: its slot is not touched until the next commit has its turn, which
 *   writes the other slot.
 * - A torn slot is told from a damaged one: only pages that the newest header announces can be torn, and only one slot of
 *   each. A slot that fails its checksum anywhere else means that the file was damaged, maybe in the newest copy of a page, and
 *   losing a bit there would lose a guest's write: the map is refused ('state-damaged') and nothing is guessed.
 * - Opening the map repairs torn slots from the other copy and syncs the file. Otherwise a later header, which announces other
 *   pages, would make an old tear look like damage, or announce nothing of what an earlier process wrote and never synced.
 */
import { closeSync, constants, fstatSync, ftruncateSync, openSync, readSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import { BlockferryError, messageOf } from '../errors.js';
import * as native from '../native/index.js';

const SLOT_BYTES = 4096;
const SLOT_HEAD_BYTES = 64;
/** Bits of a page: what fits a slot behind its head. */
export const PAGE_BITS = (SLOT_BYTES - SLOT_HEAD_BYTES) * 8;
const PAGE_BYTES = PAGE_BITS / 8;
const HEADERS = 4;
const PAGES_AT = HEADERS * SLOT_BYTES;
const PAGE_MAGIC = 0x42465031; // "BFP1"
const HEADER_MAGIC = 0x42464831; // "BFH1"
/** Page numbers a header has room for; a commit of more announces every page. */
const ANNOUNCED_MAX = (SLOT_BYTES - SLOT_HEAD_BYTES) / 4;
const ANY_PAGE = 0xffffffff;
const NEVER_WRITTEN = Buffer.alloc(SLOT_BYTES);

// Head of a slot: 0 magic, 4 crc32 of bytes 8..4096, 8 sequence (u64), 16 map epoch, 20 page number, or how many are announced,
// 24 pages of the whole map, 28 volume id (16 bytes)
interface Slot {
  state: 'empty' | 'bad' | 'good';
  sequence: number;
  epoch: number;
  number: number;
}

export class DurableMap {
  readonly #fd: number;
  readonly #pages: number;
  readonly #volume: Buffer;
  /** Per page the slot (0 or 1) that holds the newest copy. */
  readonly #newest: Uint8Array;
  #headerSlot = 0;
  #sequence = 0;
  readonly #scratch = Buffer.alloc(SLOT_BYTES);

  private constructor(
    public path: string,
    fd: number,
    volumeId: string,
    bits: number,
    /** Bits are stored under this epoch; those of another count for nothing. */
    public epoch: number,
  ) {
    this.#fd = fd;
    this.#pages = Math.ceil(bits / PAGE_BITS);
    this.#volume = Buffer.from(volumeId.replaceAll('-', ''), 'hex');
    this.#newest = new Uint8Array(this.#pages);
  }

  /** A new, empty map, whose size and space are durable: no commit finds the disk full. An old file is replaced. */
  static async create(path: string, volumeId: string, bits: number, epoch: number): Promise<DurableMap> {
    const fd = openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC, 0o600);
    try {
      const map = new DurableMap(path, fd, volumeId, bits, epoch);
      const bytes = PAGES_AT + 2 * map.#pages * SLOT_BYTES;
      const done = await native.allocate(fd, 0, bytes);
      if (done === -native.ERRNO.EOPNOTSUPP) ftruncateSync(fd, bytes);
      else if (done < 0) {
        throw new BlockferryError(
          'no-space',
          `no room for the presence map ${path} (${bytes} bytes): free some space`,
        );
      }
      await map.#sync();
      return map;
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  /** Opens the map and reads its bits into `into` (all zero before). Throws 'state-damaged' where it cannot be trusted. */
  static async open(
    path: string,
    volumeId: string,
    bits: number,
    epoch: number,
    into: Uint8Array,
  ): Promise<DurableMap> {
    let fd: number;
    try {
      fd = openSync(path, constants.O_RDWR);
    } catch (cause) {
      throw new BlockferryError(
        'state-damaged',
        `cannot open the presence map ${path} (${messageOf(cause)}), so the volume is not opened: restore it from a copy`,
        { cause },
      );
    }
    try {
      const map = new DurableMap(path, fd, volumeId, bits, epoch);
      map.#load(into);
      await map.#sync();
      return map;
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  #damaged(what: string): BlockferryError {
    return new BlockferryError(
      'state-damaged',
      `${this.path} is damaged (${what}): which blocks are local is not certain, so the volume is not opened; restore the file from a copy`,
    );
  }

  #load(into: Uint8Array): void {
    const want = PAGES_AT + 2 * this.#pages * SLOT_BYTES;
    const size = fstatSync(this.#fd).size;
    if (size !== want) throw this.#damaged(`it has ${size} bytes, not ${want}`);
    const written = this.#written();
    const torn = this.#loadHeader();
    for (const [first, end] of written)
      for (let page = first; page < end; page++) this.#loadPage(page, torn, into);
  }

  /**
   * Pages that may have been written, as ranges [first, end): a map of a large, young volume is mostly reserved space. To be asked before
   * anything is read: read-ahead fills reserved space with zeros in memory, and the filesystem takes those for data.
   */
  #written(): (readonly [first: number, end: number])[] {
    const ranges: [number, number][] = [];
    for (let page = 0; page < this.#pages; ) {
      const data = native.seekData(this.#fd, slotAt(page, 0));
      if (data === -native.ERRNO.ENXIO) break;
      const hole = data < 0 ? data : native.seekHole(this.#fd, data);
      const first = data < 0 ? page : Math.max(page, Math.floor((data - PAGES_AT) / (2 * SLOT_BYTES)));
      const end =
        hole < 0 ? this.#pages : Math.min(this.#pages, Math.ceil((hole - PAGES_AT) / (2 * SLOT_BYTES)));
      ranges.push([first, end]);
      page = Math.max(end, first + 1);
    }
    return ranges;
  }

  /** Which pages the last commit may have left torn; undefined if there was none. */
  #loadHeader(): ((page: number) => boolean) | undefined {
    let newest = -1;
    let announced: ((page: number) => boolean) | undefined;
    for (let slot = 0; slot < HEADERS; slot++) {
      const head = this.#readSlot(slot * SLOT_BYTES, HEADER_MAGIC);
      if (head.state !== 'good' || head.sequence <= newest) continue;
      newest = head.sequence;
      this.#headerSlot = slot;
      announced = announcedIn(this.#scratch, head.number);
    }
    this.#sequence = Math.max(newest, 0);
    // A torn header means that its commit wrote no page yet, and the pages of the commit before are whole.
    return announced;
  }

  #loadPage(page: number, torn: ((page: number) => boolean) | undefined, into: Uint8Array): void {
    let best = -1;
    let sequence = -1;
    let bad = -1;
    for (let slot = 0; slot < 2; slot++) {
      const head = this.#readSlot(slotAt(page, slot), PAGE_MAGIC);
      if (head.state === 'empty') continue;
      if (torn === undefined) throw this.#damaged('no header passes its checksum');
      if (head.state === 'bad') {
        if (!torn(page) || bad !== -1) throw this.#damaged(`page ${page} fails its checksum`);
        bad = slot;
        continue;
      }
      if (head.number !== page) throw this.#damaged(`page ${page} holds another page's copy`);
      if (head.sequence <= sequence) continue;
      best = slot;
      sequence = head.sequence;
      this.#sequence = Math.max(this.#sequence, sequence);
      const at = page * PAGE_BYTES;
      const length = Math.min(PAGE_BYTES, into.length - at);
      if (head.epoch === this.epoch)
        into.set(this.#scratch.subarray(SLOT_HEAD_BYTES, SLOT_HEAD_BYTES + length), at);
      else into.fill(0, at, at + length);
    }
    this.#newest[page] = Math.max(best, 0);
    if (bad !== -1) this.#repair(page, bad);
  }

  /** Puts the page's other slot, be it a copy or empty, in the place of a torn one. */
  #repair(page: number, bad: number): void {
    this.#readSlot(slotAt(page, bad ^ 1), PAGE_MAGIC);
    this.#write(this.#scratch, slotAt(page, bad));
  }

  /** Reads a slot into the scratch buffer and says what it is. */
  #readSlot(at: number, magic: number): Slot {
    const slot = this.#scratch;
    const got = readSync(this.#fd, slot, 0, SLOT_BYTES, at);
    if (got !== SLOT_BYTES) return { state: 'bad', sequence: 0, epoch: 0, number: 0 };
    const sequence = Number(slot.readBigUInt64BE(8));
    const found = { sequence, epoch: slot.readUInt32BE(16), number: slot.readUInt32BE(20) };
    if (slot.equals(NEVER_WRITTEN)) return { state: 'empty', ...found };
    const whole =
      slot.readUInt32BE(0) === magic &&
      slot.readUInt32BE(4) === crc32(slot.subarray(8)) &&
      slot.readUInt32BE(24) === this.#pages &&
      slot.subarray(28, 44).equals(this.#volume);
    return { state: whole ? 'good' : 'bad', ...found };
  }

  #finishSlot(slot: Buffer, magic: number, number: number, epoch: number): void {
    slot.writeBigUInt64BE(BigInt(this.#sequence), 8);
    slot.writeUInt32BE(epoch, 16);
    slot.writeUInt32BE(number, 20);
    slot.writeUInt32BE(this.#pages, 24);
    this.#volume.copy(slot, 28);
    slot.writeUInt32BE(magic, 0);
    slot.writeUInt32BE(crc32(slot.subarray(8)), 4);
  }

  #write(slot: Buffer, at: number): void {
    const done = native.pwrite(this.#fd, slot, 0, SLOT_BYTES, at);
    if (done < 0) throw new BlockferryError('image-io', `cannot write ${this.path}: errno ${-done}`);
  }

  async #sync(): Promise<void> {
    const done = await native.fdatasync(this.#fd);
    if (done < 0) throw new BlockferryError('image-io', `cannot make ${this.path} durable: errno ${-done}`);
  }

  /**
   * Steps 2 to 5 of a commit. `copies` are slots that `copyPages` filled in step 1; `syncImage` makes the image's
   * data durable. After a failure the map is not to be used again: what is on disk is one of the two good states, but which
   * is not known here.
   */
  async commit(copies: readonly PageCopy[], syncImage: () => Promise<void>): Promise<void> {
    const epoch = this.epoch; // the copies' own: the bits may be dropped while they are on their way
    this.#sequence++;
    this.#writeHeader(copies);
    await Promise.all([syncImage(), this.#sync()]);
    for (const { page, slot } of copies) {
      this.#finishSlot(slot, PAGE_MAGIC, page, epoch);
      const turn = this.#newest[page]! ^ 1;
      this.#write(slot, slotAt(page, turn));
      this.#newest[page] = turn;
    }
    await this.#sync();
    this.#sequence++;
    this.#writeHeader([]);
  }

  #writeHeader(announced: readonly PageCopy[]): void {
    const header = this.#scratch.fill(0);
    const listed = announced.length <= ANNOUNCED_MAX;
    for (let i = 0; listed && i < announced.length; i++) {
      header.writeUInt32BE(announced[i]!.page, SLOT_HEAD_BYTES + 4 * i);
    }
    this.#finishSlot(header, HEADER_MAGIC, listed ? announced.length : ANY_PAGE, this.epoch);
    this.#headerSlot = (this.#headerSlot + 1) % HEADERS;
    this.#write(header, this.#headerSlot * SLOT_BYTES);
  }

  close(): void {
    closeSync(this.#fd);
  }
}

export interface PageCopy {
  page: number;
  /** SLOT_BYTES long, the bits behind the head. */
  slot: Buffer;
}

/** Step 1 of a commit: copies of the pages, as they are now. */
export function copyPages(map: Uint8Array, pages: Iterable<number>): PageCopy[] {
  const copies: PageCopy[] = [];
  for (const page of pages) {
    const slot = Buffer.alloc(SLOT_BYTES);
    slot.set(map.subarray(page * PAGE_BYTES, (page + 1) * PAGE_BYTES), SLOT_HEAD_BYTES);
    copies.push({ page, slot });
  }
  return copies;
}

function slotAt(page: number, slot: number): number {
  return PAGES_AT + (2 * page + slot) * SLOT_BYTES;
}

function announcedIn(header: Buffer, count: number): (page: number) => boolean {
  if (count === ANY_PAGE) return () => true;
  const pages = new Set<number>();
  for (let i = 0; i < Math.min(count, ANNOUNCED_MAX); i++)
    pages.add(header.readUInt32BE(SLOT_HEAD_BYTES + 4 * i));
  return (page) => pages.has(page);
}
