/**
 * What a volume's blocks hash to, as a device: 32 bytes a block, at byte 32 * i those of block i (block-hash.ts). Another host reads it beside the
 * volume itself, to find blocks that it has already.
 *
 * Invariants
 * - Nothing is kept: what is answered is the hash of what a read of the block would have given while the request was under way.
 * - A volume that has not all its blocks has no hashes: reads fail, and never tell of what its image holds where a block is missing.
 * - The image is read as for any client; hashing is another thread's work. Whatever is asked for, PIECES_MAX pieces are in hand at a
 *   time, and those who ask take turns piece by piece.
 */
import { Errno } from '../nbd/constants.js';
import { type BlockDevice, type IoRequest, LATER } from '../nbd/device.js';
import { type Numbered, WorkerPool } from '../worker-pool.js';
import { HASH_BYTES } from './block-hash.js';
import { BLOCK_BYTES, bytesOfBlocks } from './blocks.js';
import { ReadOnlyFace } from './read-only-face.js';
import type { BlockStore } from './store.js';
import type { Volume } from './volume.js';

/** Hashed by one job: 256 KiB. */
const PIECE_BLOCKS = 64;
/** Of one volume, in hand at a time. */
const PIECES_MAX = 8;

export interface HashOrder {
  /** Blocks that follow one another, of its whole ArrayBuffer. */
  input: Uint8Array;
}
export type HashJob = Numbered<HashOrder>;
export type HashDone = Numbered<{ hashes: Uint8Array<ArrayBuffer> }>;

let shared: WorkerPool<HashOrder, { hashes: Uint8Array<ArrayBuffer> }> | null = null;

/** The hashing pool of this thread. */
export function hashPool(): WorkerPool<HashOrder, { hashes: Uint8Array<ArrayBuffer> }> {
  shared ??= new WorkerPool(new URL('./hash-worker.js', import.meta.url), 'hashes');
  return shared;
}

export class HashDevice extends ReadOnlyFace implements BlockDevice {
  readonly size: number;
  readonly multiConn = true;
  readonly preferredBlock = BLOCK_BYTES;
  readonly contexts = [];
  readonly #store: BlockStore;
  #inHand = 0;
  readonly #waiting: (() => void)[] = [];

  constructor(private readonly volume: Volume) {
    super();
    this.#store = volume.store;
    this.size = volume.store.blocks * HASH_BYTES;
  }

  readNow(): number {
    return LATER;
  }

  read(request: IoRequest): void {
    void this.#read(request).then((errno) => request.complete(errno));
  }

  /** Resolves with an errno. */
  async #read(request: IoRequest): Promise<number> {
    const { offset, length, buffer, at } = request;
    const past = offset + length;
    for (let from = offset; from < past; ) {
      const first = Math.floor(from / HASH_BYTES);
      const end = Math.min(Math.ceil(past / HASH_BYTES), first + PIECE_BLOCKS);
      await this.#turn();
      const hashes = request.abandoned ? Errno.EIO : await this.#hash(first, end);
      this.#over();
      if (typeof hashes === 'number') return hashes;
      const to = Math.min(past, end * HASH_BYTES);
      buffer.set(hashes.subarray(from - first * HASH_BYTES, to - first * HASH_BYTES), at + from - offset);
      from = to;
    }
    return Errno.OK;
  }

  async #turn(): Promise<void> {
    if (this.#inHand === PIECES_MAX) return new Promise((turn) => this.#waiting.push(turn));
    this.#inHand++;
    hashPool().enter();
  }

  /** Whoever waits for longest goes on in its place. */
  #over(): void {
    const next = this.#waiting.shift();
    if (next !== undefined) {
      next();
      return;
    }
    this.#inHand--;
    hashPool().leave();
  }

  /** The hashes, or an errno. */
  async #hash(first: number, end: number): Promise<Uint8Array | number> {
    const { presence, image } = this.#store;
    if (this.volume.closed) return Errno.ESHUTDOWN;
    if (presence !== null && !presence.complete) return Errno.EPERM;
    const bytes = bytesOfBlocks(first, end, image.size);
    const content = Buffer.allocUnsafeSlow(bytes);
    const errno = await this.#store.readLocal(content, 0, bytes, first * BLOCK_BYTES);
    if (errno !== Errno.OK) return errno;
    return new Promise((resolve) =>
      hashPool().run({ input: content }, (done) => resolve(done === null ? Errno.EIO : done.hashes)),
    );
  }

  cache(request: IoRequest): void {
    request.complete(Errno.OK);
  }

  status(request: IoRequest): void {
    request.complete(Errno.EINVAL); // it has no contexts
  }

  release(): void {}
}
