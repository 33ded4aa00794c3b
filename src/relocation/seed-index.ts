/**
 * Where in a seed image a block of a certain content is: an index on disk, so that it is made once, takes no memory, and is shared by all who use
 * it by way of the page cache.
 *
 *     page 0         SHA-256 of the rest of the page, then JSON: which file it is of (device, inode, size, time of change), and for each
 *                    segment how many pages its table has
 *     tables         one a segment, one behind the other. A segment is SEGMENT_BYTES of the image
 *     page of one    341 entries of 12 bytes: the first 8 bytes of the block's hash, and its number in the image; at the end how many there are.
 *                    Bytes 8 to 11 of the hash say which page it begins to look at; a full page goes on with the next one.
 *
 * Blocks of zeros, and holes, are not in it. A page is filled to 70 % on average: 17 bytes a block, 4.3 MiB for each GiB of data.
 *
 * Invariants
 * - An index is a hint. Whoever is given a place reads it and hashes what he read: an index that is damaged, or older than its image, finds less,
 *   and never another content.
 * - A segment's table is durable before the first page names it, so that a build that was stopped goes on where it was.
 * - One process builds (a lock on the file); others use what is there, and look again.
 */
import { createHash } from 'node:crypto';
import {
  closeSync,
  constants,
  type BigIntStats as FileFacts,
  fdatasyncSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import * as native from '../native/index.js';
import { HASH_BYTES, hashBlocks, ZERO_HASH } from '../volume/block-hash.js';
import { BLOCK_BYTES, blocksOf } from '../volume/blocks.js';

export const SEED_BYTES_MAX = 2 ** 40;
/** Of the image, indexed as one: in memory until that is done, up to 60 MiB. */
export const SEGMENT_BYTES = 4 * 2 ** 30;
/** Read, and hashed, in one step. */
const STEP_BYTES = 1 << 20;

const PAGE_BYTES = 4096;
const PAGE_WORDS = PAGE_BYTES / 4;
const ENTRY_WORDS = 3;
const ENTRIES_MAX = 341;
const ENTRIES_USUAL = 240;
/** Full pages that are looked at, one behind the other. */
const PAGES_MAX = 8;

const headSchema = z.strictObject({
  format: z.literal(1),
  file: z.string(),
  segments: z
    .array(
      z
        .number()
        .int()
        .min(0)
        .max(2 ** 20),
    )
    .max(SEED_BYTES_MAX / SEGMENT_BYTES),
});

interface Segment {
  /** First page of its table. */
  readonly at: number;
  readonly pages: number;
}

/** What is collected of a segment. */
class Collection {
  /** Four words a block: the first three of its hash, and its number. */
  #words = new Uint32Array(1 << 16);
  #length = 0;

  add(hashes: Uint8Array, at: number, block: number): void {
    if (this.#length + 4 > this.#words.length) {
      const more = new Uint32Array(this.#words.length * 2);
      more.set(this.#words);
      this.#words = more;
    }
    for (let word = 0; word < 3; word++) this.#words[this.#length + word] = wordAt(hashes, at + word * 4);
    this.#words[this.#length + 3] = block;
    this.#length += 4;
  }

  /** Of equal blocks it has the first. */
  table(): Uint32Array<ArrayBuffer> {
    const blocks = this.#length / 4;
    const pages = Math.ceil(blocks / ENTRIES_USUAL);
    const table = new Uint32Array(pages * PAGE_WORDS);
    for (let at = 0; at < this.#length; at += 4) {
      const [a, b, place, block] = this.#words.subarray(at, at + 4) as unknown as [
        number,
        number,
        number,
        number,
      ];
      let page = pageOf(place, pages);
      while (table[page * PAGE_WORDS + PAGE_WORDS - 1] === ENTRIES_MAX) page = (page + 1) % pages;
      const words = table.subarray(page * PAGE_WORDS, (page + 1) * PAGE_WORDS);
      if (entryOf(words, a, b) >= 0) continue;
      const count = words[PAGE_WORDS - 1]!;
      words.set([a, b, block], count * ENTRY_WORDS);
      words[PAGE_WORDS - 1] = count + 1;
    }
    return table;
  }
}

export class SeedIndex {
  readonly #segments: Segment[] = [];
  /** Null: others build, if anybody does. */
  #collection: Collection | null = null;
  /** Of the image: how far it was looked at. */
  #at = 0;
  readonly #page = new Uint32Array(PAGE_WORDS);
  readonly #step = Buffer.allocUnsafeSlow(STEP_BYTES);

  private constructor(
    private fd: number,
    /** Of the image. */
    private readonly imageFd: number,
    private readonly size: number,
    private readonly file: string,
  ) {}

  /** Opens the index of an image in the folder; it is empty if there is none. Throws 'bounds', 'image-io'. */
  static open(folder: string, path: string, imageFd: number): SeedIndex {
    const facts = fstatSync(imageFd, { bigint: true });
    const size = native.seekEnd(imageFd);
    if (size > SEED_BYTES_MAX)
      throw new BlockferryError(
        'bounds',
        `seed ${path} has ${size} bytes, more than the ${SEED_BYTES_MAX} that are possible`,
      );
    const name = `${createHash('sha256').update(path).digest('hex').slice(0, 32)}.index`;
    let fd: number;
    try {
      fd = openSync(join(folder, name), constants.O_RDWR | constants.O_CREAT, 0o600);
    } catch (cause) {
      throw new BlockferryError('image-io', `no index of seed ${path} can be kept: ${messageOf(cause)}`, {
        cause,
      });
    }
    const index = new SeedIndex(fd, imageFd, size, fileWord(facts, size));
    index.refresh();
    return index;
  }

  /** All of the image is in it. */
  get complete(): boolean {
    return this.#segments.length * SEGMENT_BYTES >= this.size;
  }

  /** A part of the image is. */
  get usable(): boolean {
    return this.#segments.length > 0;
  }

  /** Takes the building on, unless there is none to do, or another has it. What others have built meanwhile is known then. */
  claim(): boolean {
    if (!native.lockFile(this.fd, true)) {
      this.refresh();
      return false;
    }
    if (!this.refresh()) {
      this.#segments.length = 0;
      ftruncateSync(this.fd, 0); // of another file, or damaged
    }
    if (this.complete) {
      this.#unlock();
      return false;
    }
    this.#collection = new Collection();
    this.#at = this.#segments.length * SEGMENT_BYTES;
    return true;
  }

  /** The lock is its description's: a new one has none. So nobody is kept from building it anew when the image has changed. */
  #unlock(): void {
    const locked = this.fd;
    this.fd = openSync(`/proc/self/fd/${locked}`, constants.O_RDWR);
    closeSync(locked);
  }

  /** Reads the first page anew; false: it is none of ours. */
  refresh(): boolean {
    const page = Buffer.alloc(PAGE_BYTES);
    if (readSync(this.fd, page, 0, PAGE_BYTES, 0) < PAGE_BYTES) return false;
    const head = headOf(page);
    if (head?.file !== this.file) return false;
    this.#segments.length = 0;
    let at = 1;
    for (const pages of head.segments) {
      this.#segments.push({ at, pages });
      at += pages;
    }
    return true;
  }

  /** Whoever has claimed it does the next bit of the building. Throws what the files do. */
  build(): void {
    const { size } = this;
    const past = Math.min(size, (this.#segments.length + 1) * SEGMENT_BYTES);
    const data = Math.min(past, this.#dataFrom(this.#at));
    // Whole blocks: a hole may begin within one.
    this.#at = data === past ? past : data - (data % BLOCK_BYTES);
    if (this.#at < past) {
      const length = Math.min(STEP_BYTES, past - this.#at);
      const step = this.#step.subarray(0, length);
      if (readSync(this.imageFd, step, 0, length, this.#at) < length)
        throw new BlockferryError('image-io', 'it became shorter while it was read');
      const hashes = hashBlocks(step);
      for (let block = 0; block < blocksOf(length); block++) this.#collect(hashes, block);
      this.#at += length;
    }
    if (this.#at >= past) this.#endSegment();
  }

  #collect(hashes: Uint8Array, block: number): void {
    const at = block * HASH_BYTES;
    if (equalHashes(hashes, at, ZERO_HASH, 0)) return;
    this.#collection?.add(hashes, at, this.#at / BLOCK_BYTES + block);
  }

  #dataFrom(offset: number): number {
    const data = native.seekData(this.imageFd, offset);
    if (data === -native.ERRNO.ENXIO) return this.size; // nothing but a hole
    return data < 0 ? offset : data;
  }

  #endSegment(): void {
    const table = this.#collection?.table() ?? new Uint32Array();
    const last = this.#segments.at(-1);
    const at = last === undefined ? 1 : last.at + last.pages;
    writeWhole(this.fd, new Uint8Array(table.buffer), at * PAGE_BYTES);
    fdatasyncSync(this.fd);
    this.#segments.push({ at, pages: table.length / PAGE_WORDS });
    const segments = this.#segments.map(({ pages }) => pages);
    const page = Buffer.alloc(PAGE_BYTES);
    page.write(JSON.stringify({ format: 1, file: this.file, segments }), HASH_BYTES);
    createHash('sha256').update(page.subarray(HASH_BYTES)).digest().copy(page);
    writeWhole(this.fd, page, 0);
    this.#collection = this.complete ? null : new Collection();
    if (this.complete) this.#unlock();
  }

  /** Blocks of the image that may have this hash, at hashes[at...]: one a segment at most. */
  *candidates(hashes: Uint8Array, at: number): Generator<number, void> {
    const [a, b, place] = [wordAt(hashes, at), wordAt(hashes, at + 4), wordAt(hashes, at + 8)];
    for (const segment of this.#segments) {
      const block = this.#lookUp(segment, a, b, place);
      if (block !== undefined) yield block;
    }
  }

  #lookUp({ at, pages }: Segment, a: number, b: number, place: number): number | undefined {
    if (pages === 0) return undefined;
    let page = pageOf(place, pages);
    for (let looked = 0; looked < PAGES_MAX; looked++) {
      if (readSync(this.fd, this.#page, 0, PAGE_BYTES, (at + page) * PAGE_BYTES) < PAGE_BYTES)
        return undefined;
      const entry = entryOf(this.#page, a, b);
      if (entry >= 0) return this.#page[entry * ENTRY_WORDS + 2];
      if (this.#page[PAGE_WORDS - 1] !== ENTRIES_MAX) return undefined;
      page = (page + 1) % pages;
    }
    return undefined;
  }

  close(): void {
    closeSync(this.fd);
  }
}

/** What a first page says; undefined for what is none. */
function headOf(page: Buffer): z.infer<typeof headSchema> | undefined {
  const text = page.subarray(HASH_BYTES);
  if (!page.subarray(0, HASH_BYTES).equals(createHash('sha256').update(text).digest())) return undefined;
  try {
    return headSchema.parse(JSON.parse(text.toString('utf8').replace(/\0+$/, '')));
  } catch {
    return undefined; // another version's
  }
}

/** Tells a file from another, and from what it was. */
function fileWord({ dev, ino, mtimeNs }: FileFacts, size: number): string {
  return [dev, ino, size, mtimeNs].join(' ');
}

function pageOf(place: number, pages: number): number {
  return Math.floor((place / 2 ** 32) * pages);
}

/** The entry of a page with these words of a hash; -1: none. */
function entryOf(page: Uint32Array, a: number, b: number): number {
  const count = Math.min(page[PAGE_WORDS - 1]!, ENTRIES_MAX);
  for (let entry = 0, word = 0; entry < count; entry++, word += ENTRY_WORDS)
    if (page[word] === a && page[word + 1] === b) return entry;
  return -1;
}

function wordAt(bytes: Uint8Array, at: number): number {
  return (bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24)) >>> 0;
}

export function equalHashes(a: Uint8Array, aAt: number, b: Uint8Array, bAt: number): boolean {
  for (let byte = 0; byte < HASH_BYTES; byte++) if (a[aAt + byte] !== b[bAt + byte]) return false;
  return true;
}

function writeWhole(fd: number, bytes: Uint8Array, offset: number): void {
  for (let done = 0; done < bytes.length; )
    done += writeSync(fd, bytes, done, bytes.length - done, offset + done);
}
