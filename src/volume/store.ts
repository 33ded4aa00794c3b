/**
 * The blocks of a volume: image, presence, and the order of everything that changes them. All of it runs on one thread.
 *
 * Invariants
 * - Checking presence, touching the image and setting presence are one synchronous step, for reads, writes and fills alike.
 *   What a thread does meanwhile (zero, punch) holds a range lock that writes wait for and fills skip.
 * - A fill writes only blocks that are still missing and not locked when its data is here: a guest's write always wins.
 * - A fill of an older epoch is dropped: its data was fetched before blocks were dropped, and may be stale.
 * - Before the takeover the guest works elsewhere, and what was filled may be stale: no read is answered from it, and it counts only once the
 *   blocks that the source has changed since were dropped (`drop`).
 * - What the guest changes is marked in `dirty` before it is changed; where a thread does it, under its lock, and when it is over once more.
 * - A write that a thread has under way holds a range lock as well, over blocks that are here or that it covers whole.
 * - A write that covers whole blocks needs no source. One that covers a missing block in part waits for that block first.
 * - A block that is set present was written whole, or was whole before.
 * - Requests that wait for the same block or lock go on in their order of arrival: a client that lost its connection and sent a
 *   write again, then another, never finds the first one on top.
 */
import { BlockferryError, errnoOf } from '../errors.js';
import * as native from '../native/index.js';
import { CommandFlag, Errno } from '../nbd/constants.js';
import { type DirectAccess, type IoRequest, LATER, type StatusRequest } from '../nbd/device.js';
import { BLOCK_BYTES, blockAt, blocksOf, bytesOfBlocks } from './blocks.js';
import type { ColdReader } from './cold-reads.js';
import { Committer } from './committer.js';
import type { DirtyMap, Tracking } from './dirty.js';
import { reportExtents } from './extents.js';
import { HoleFinder } from './hole-finder.js';
import { errnoOfSystem, type Image, WOULD_WAIT } from './image.js';
import { Parking } from './parking.js';
import { inPieces } from './pieces.js';
import type { Presence } from './presence.js';
import { type RangeLock, RangeLocks } from './range-locks.js';
import { WritePace } from './write-pace.js';

/** Where missing blocks come from; the relocation engine is one. */
export interface Supplier {
  /** Missing blocks of [first, end) are wanted now; each arrives by `fill`, or `giveUp` says that it will not. */
  demand(first: number, end: number): void;
  /** Completes a READ that touches missing blocks without keeping what it fetches. */
  readThrough(request: IoRequest): void;
  /** Blocks of [first, end) are likely to be wanted. */
  prefetch(first: number, end: number): void;
  /** A session is over: what waits for the source, and is wanted by nobody else, need not come. */
  dropAbandoned(): void;
}

/** Whether the guest may write: yes; no, with this errno; or after `ask`, when the request is tried again. */
export type Gate =
  | { readonly kind: 'open' }
  | { readonly kind: 'refused'; readonly errno: number }
  | { readonly kind: 'ask'; readonly ask: () => Promise<void> };

export const OPEN: Gate = { kind: 'open' };

/** Blocks that one fill of zeros marks in one synchronous step, at most. */
const ZERO_FILL_BLOCKS_MAX = (1 << 30) / BLOCK_BYTES;

const NO_BLOCK = -1;

type Retry = (request: IoRequest) => void;

export class BlockStore {
  readonly blocks: number;
  readonly #parking = new Parking();
  readonly #locks = new RangeLocks();
  #lockWaiters: { request: IoRequest; retry: Retry }[] = [];
  #gate: Gate = OPEN;
  #askWaiters: { request: IoRequest; retry: Retry }[] | undefined;
  /** Reads that a thread has under way. */
  #reading = 0;
  #idle: (() => void)[] = [];
  #unchanging: (() => void)[] = [];
  readonly #committer: Committer;
  readonly #holes: HoleFinder;
  readonly #pace = new WritePace();
  readonly #direct: { -readonly [Key in keyof DirectAccess]: DirectAccess[Key] };

  supplier: Supplier | null = null;
  /** Told of every read whose blocks are here; null: nobody wants to know. */
  watch: ((first: number, end: number) => void) | null = null;
  /** Fetched blocks are kept; otherwise reads of missing blocks pass through. */
  keeps = false;
  /** Fetched blocks are taken in though reads pass through. */
  prefills = false;
  /** Where the guest's changes are marked; null: nobody wants to know. */
  dirty: DirtyMap | null = null;
  /** Raised whenever bits are dropped. */
  epoch: number;
  /** Told in the very step in which blocks were dropped, as `drop` has them: what was learned of the source before may be untrue now. */
  onDrop: ((runs: readonly number[] | null) => void) | null = null;
  /** Called once the last missing block arrived. */
  onComplete: (() => void) | null = null;

  readonly #coldReader: ColdReader<IoRequest> = {
    coldReadEnded: (request, result) => {
      this.#reading--;
      request.complete(result === 0 ? Errno.OK : errnoOfSystem(result));
      this.#tellIdle();
    },
  };
  readonly #retryRead: Retry = (request) => this.read(request);
  readonly #retryWrite: Retry = (request) => this.write(request);
  readonly #retryZero: Retry = (request) => this.zero(request);
  readonly #retryTrim: Retry = (request) => this.trim(request);

  constructor(
    readonly image: Image,
    public presence: Presence | null,
    epoch: number,
  ) {
    this.blocks = blocksOf(image.size);
    this.#committer = new Committer(image, () => this.presence);
    this.#holes = new HoleFinder(image);
    this.#direct = {
      fd: image.fd,
      reads: false,
      writes: false,
      nowait: false,
      present: null,
      heat: null,
      dirty: null,
    };
    this.epoch = epoch;
  }

  /** Why nothing can be made durable any more, if so. */
  get failure(): BlockferryError | null {
    return this.#committer.failure;
  }

  get presentBytes(): number {
    const { presence } = this;
    if (presence === null || presence.complete) return this.image.size;
    return Math.min(presence.present * BLOCK_BYTES, this.image.size);
  }

  // Reads

  /** See BlockDevice. What `readNow` and `writeNow` would do, for blocks that are here; `heat`: where it is counted. */
  direct(heat: Uint8Array | null = null): DirectAccess {
    const { presence } = this;
    const { inline } = this.image;
    const direct = this.#direct;
    direct.reads = inline !== 'never' && this.watch === null && (presence === null || this.keeps);
    direct.nowait = inline === 'nowait';
    direct.writes = this.#gate.kind === 'open' && this.#locks.size === 0 && !this.#pace.slow;
    direct.present = presence === null || presence.complete ? null : presence.bits;
    direct.heat = heat;
    direct.dirty = this.dirty === null ? null : this.dirty.bits;
    return direct;
  }

  readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    const { presence } = this;
    if (presence !== null) {
      const [first, end] = [blockAt(offset), blocksOf(offset + length)];
      if (!this.#hasAll(presence, first, end)) return LATER;
      if (this.watch !== null) this.watch(first, end);
    }
    const done = this.image.readNow(buffer, at, length, offset);
    if (done === 0) return Errno.OK;
    return done === WOULD_WAIT ? LATER : errnoOfSystem(done);
  }

  /** See BlockDevice. Nothing while a thread changes the image: the question would wait for it. */
  zeroesNow(offset: number, length: number): number {
    if (this.#locks.size > 0) return 0;
    const { presence } = this;
    if (presence !== null && !this.#hasAll(presence, blockAt(offset), blocksOf(offset + length))) return 0;
    return this.#holes.holeFrom(offset, offset + length);
  }

  /** Whether all blocks of [first, end) are here, and current. */
  #hasAll(presence: Presence, first: number, end: number): boolean {
    return this.keeps && presence.hasAll(first, end);
  }

  read(request: IoRequest): void {
    const now = this.readNow(request.offset, request.length, request.buffer, request.at);
    if (now === LATER) this.readLater(request);
    else request.complete(now);
  }

  /** As `read`, when `readNow` has said LATER in the same step. */
  readLater(request: IoRequest): void {
    const { offset, length } = request;
    const first = blockAt(offset);
    const end = blocksOf(offset + length);
    const { presence } = this;
    const missing = presence === null ? end : this.keeps ? presence.nextMissing(first, end) : first;
    if (missing === end) {
      this.#reading++;
      this.image.readLater(this.#coldReader, request, request.buffer, request.at, length, offset);
    } else if (request.abandoned) {
      request.complete(Errno.EIO);
    } else if (this.supplier === null) {
      request.complete(Errno.EIO);
    } else if (!this.keeps) {
      this.supplier.readThrough(request);
    } else {
      this.#parking.park(request, missing, this.#retryRead);
      this.supplier.demand(missing, end);
    }
  }

  // Writes

  /** `request`: whose write it is, if it has one. */
  writeNow(
    offset: number,
    length: number,
    buffer: Buffer,
    at: number,
    request: IoRequest | null = null,
  ): number {
    if (this.#gate.kind !== 'open') return this.#gate.kind === 'refused' ? this.#gate.errno : LATER;
    if (this.#pace.slow) return LATER;
    const first = blockAt(offset);
    const end = blocksOf(offset + length);
    if (this.#locks.size > 0 && this.#locks.overlaps(first, end)) return LATER;
    if (this.presence !== null && this.#missingEdge(offset, length) !== NO_BLOCK) return LATER;
    const since = performance.now();
    if (this.dirty !== null) this.dirty.mark(first, end);
    const done = this.image.write(buffer, at, length, offset);
    this.#pace.tookHere(length, performance.now() - since);
    if (done !== 0) return errnoOfSystem(done);
    if (request !== null) request.changed(offset, length); // first: those who waited for these blocks change them at once
    if (this.presence !== null) this.#arrived(first, end);
    return Errno.OK;
  }

  write(request: IoRequest): void {
    if (!this.#mayChange(request, request.offset, request.length, this.#retryWrite)) return;
    if (this.#pace.slow) {
      void this.#writeOnThread(request);
      return;
    }
    const done = this.writeNow(request.offset, request.length, request.buffer, request.at, request);
    this.#answerChange(request, done);
  }

  async #writeOnThread(request: IoRequest): Promise<void> {
    const { offset, length, buffer, at } = request;
    const lock = this.#lockForChange(blockAt(offset), blocksOf(offset + length));
    this.#pace.begun(length);
    const since = performance.now();
    const done = await this.image.writeLater(buffer, at, length, offset);
    this.#pace.tookThere(length, performance.now() - since);
    if (done === 0) request.changed(offset, length);
    this.#changed(lock, done === 0);
    this.#answerChange(request, done === 0 ? Errno.OK : errnoOfSystem(done));
  }

  /** See BlockDevice. */
  directWriteHeldUp(): void {
    this.#pace.heldUp();
  }

  zero(request: IoRequest): void {
    if (
      (request.flags & CommandFlag.FAST_ZERO) !== 0 &&
      this.#gate.kind !== 'refused' &&
      this.#isSlowZero(request)
    ) {
      request.complete(Errno.ENOTSUP);
      return;
    }
    if (!this.#mayChange(request, request.offset, request.length, this.#retryZero)) return;
    void this.#zeroOnThread(request);
  }

  async #zeroOnThread(request: IoRequest): Promise<void> {
    const { offset, length, flags } = request;
    const first = blockAt(offset);
    const end = blocksOf(offset + length);
    const lock = this.#lockForChange(first, end);
    const keepHole = (flags & CommandFlag.NO_HOLE) === 0;
    let fast = (flags & CommandFlag.FAST_ZERO) !== 0;
    let slow = false;
    const done = await this.#inPieces(request, offset, length, async (at, bytes) => {
      if (!fast) return this.image.zero(at, bytes, keepHole);
      const result = await this.image.zeroFast(at, bytes, keepHole);
      fast = false; // the image can: what is left is its own choice
      slow = result === false;
      return result === false ? -native.ERRNO.EOPNOTSUPP : result;
    });
    this.#changed(lock, done === 0);
    if (slow) request.complete(Errno.ENOTSUP);
    else this.#answerChange(request, done === 0 ? Errno.OK : errnoOfSystem(done));
  }

  /** Whether to zero the range is known to take as long as to write it, or to need the source. */
  #isSlowZero({ offset, length, flags }: IoRequest): boolean {
    if (!this.image.mayZeroFast((flags & CommandFlag.NO_HOLE) === 0)) return true;
    return this.presence !== null && this.#missingEdge(offset, length) !== NO_BLOCK;
  }

  /** A change of the image by a thread, which holds a lock. It stops early when nobody wants it, or nobody may change anything any more. */
  async #inPieces(
    request: IoRequest,
    offset: number,
    length: number,
    step: (offset: number, length: number) => Promise<number>,
  ): Promise<number> {
    const goesOn = () => !request.abandoned && this.#gate.kind !== 'refused';
    let changed = 0;
    const counted = async (at: number, bytes: number) => {
      const done = await step(at, bytes);
      if (done === 0) changed += bytes;
      return done;
    };
    const done = await inPieces(offset, length, counted, goesOn, -native.ERRNO.EPERM);
    if (changed > 0) request.changed(offset, changed);
    return done;
  }

  trim(request: IoRequest): void {
    // A hint, and only whole blocks can follow it.
    const first = blocksOf(request.offset);
    const past = request.offset + request.length;
    const end = past === this.image.size ? this.blocks : blockAt(past);
    if (first >= end) {
      if (this.#gate.kind !== 'refused') request.changed(request.offset, 0);
      request.complete(this.#gate.kind === 'refused' ? this.#gate.errno : Errno.OK);
    } else if (
      this.#mayChange(
        request,
        first * BLOCK_BYTES,
        bytesOfBlocks(first, end, this.image.size),
        this.#retryTrim,
      )
    ) {
      void this.#trimOnThread(request, first, end);
    }
  }

  async #trimOnThread(request: IoRequest, first: number, end: number): Promise<void> {
    const lock = this.#lockForChange(first, end);
    const offset = first * BLOCK_BYTES;
    const bytes = bytesOfBlocks(first, end, this.image.size);
    const done = await this.#inPieces(request, offset, bytes, async (at, piece) => {
      const result = await this.image.punch(at, piece);
      return result === false ? -native.ERRNO.EOPNOTSUPP : result;
    });
    const unable = done === -native.ERRNO.EOPNOTSUPP;
    if (unable) request.changed(offset, 0);
    this.#changed(lock, done === 0);
    this.#answerChange(request, done === 0 || unable ? Errno.OK : errnoOfSystem(done));
  }

  /** Whether a change may go ahead at this moment; if not, it was answered, or waits and is tried again. */
  #mayChange(request: IoRequest, offset: number, length: number, retry: Retry): boolean {
    if (request.abandoned) {
      request.complete(Errno.EIO);
      return false;
    }
    if (this.#gate.kind === 'refused') {
      request.complete(this.#gate.errno);
      return false;
    }
    if (this.#gate.kind === 'ask') {
      this.#ask(this.#gate.ask, request, retry);
      return false;
    }
    const first = blockAt(offset);
    const end = blocksOf(offset + length);
    if (this.#locks.overlaps(first, end)) {
      this.#lockWaiters.push({ request, retry });
      return false;
    }
    const edge = this.presence === null ? NO_BLOCK : this.#missingEdge(offset, length);
    if (edge === NO_BLOCK) return true;
    if (this.supplier === null) {
      request.complete(Errno.EIO);
      return false;
    }
    this.#parking.park(request, edge, retry);
    this.supplier.demand(edge, edge + 1);
    if (edge !== end - 1 && !this.#coversEnd(offset + length)) this.supplier.demand(end - 1, end);
    return false;
  }

  /** For a thread that is to make a change of the guest's; `#changed` ends it. */
  #lockForChange(first: number, end: number): RangeLock {
    this.dirty?.mark(first, end);
    return this.#locks.lock(first, end);
  }

  #changed(lock: RangeLock, arrived: boolean): void {
    this.dirty?.mark(lock.first, lock.end); // who read it meanwhile may have what it was
    this.#unlock(lock, arrived);
  }

  #answerChange(request: IoRequest, errno: number): void {
    if (errno !== Errno.OK || (request.flags & CommandFlag.FUA) === 0) request.complete(errno);
    else void this.commit().then((result) => request.complete(result));
  }

  /** Whether a change that ends at byte `past` covers its last block to the end. */
  #coversEnd(past: number): boolean {
    return past % BLOCK_BYTES === 0 || past === this.image.size;
  }

  /** A missing block that the range covers only in part, or NO_BLOCK. */
  #missingEdge(offset: number, length: number): number {
    const presence = this.presence!;
    const first = blockAt(offset);
    if (offset % BLOCK_BYTES !== 0 && !presence.has(first)) return first;
    const past = offset + length;
    const last = blocksOf(past) - 1;
    return this.#coversEnd(past) || presence.has(last) ? NO_BLOCK : last;
  }

  // The gate

  get gate(): Gate {
    return this.#gate;
  }

  /** From now on, in this very step, guest changes meet `gate`; so do those that wait. */
  setGate(gate: Gate): void {
    this.#gate = gate;
  }

  #ask(ask: () => Promise<void>, request: IoRequest, retry: Retry): void {
    if (this.#askWaiters !== undefined) {
      this.#askWaiters.push({ request, retry });
      return;
    }
    const waiters = [{ request, retry }];
    this.#askWaiters = waiters;
    ask().then(
      () => {
        this.#askWaiters = undefined;
        for (const waiter of waiters) waiter.retry(waiter.request);
      },
      (error) => {
        this.#askWaiters = undefined;
        for (const waiter of waiters) waiter.request.complete(errnoOf(error));
      },
    );
  }

  // Arrivals

  /** The data of [first, end) is in the image. */
  #arrived(first: number, end: number): void {
    const { presence } = this;
    if (presence === null) return;
    presence.set(first, end);
    this.#wake(first, end);
    if (presence.complete && this.onComplete !== null) {
      const { onComplete } = this;
      this.onComplete = null;
      onComplete();
    }
  }

  #wake(first: number, end: number): void {
    if (this.#parking.size === 0) return;
    for (const { request, retry } of this.#parking.take(first, end)) retry(request);
  }

  #unlock(lock: RangeLock, arrived: boolean): void {
    this.#locks.unlock(lock);
    if (arrived) this.#arrived(lock.first, lock.end);
    else this.#wake(lock.first, lock.end); // a fill may have skipped them: they ask again
    const waiters = this.#lockWaiters;
    this.#lockWaiters = [];
    for (const { request, retry } of waiters) retry(request);
    this.#tellIdle();
  }

  #tellIdle(): void {
    if (this.#locks.size > 0) return;
    if (this.#unchanging.length > 0) for (const unchanging of this.#unchanging.splice(0)) unchanging();
    if (this.#idle.length === 0 || this.#reading > 0) return;
    for (const idle of this.#idle.splice(0)) idle();
  }

  /** Whether what was fetched in that epoch may be kept. */
  #takes(epoch: number): boolean {
    return epoch === this.epoch && (this.keeps || this.prefills);
  }

  /**
   * Keeps fetched data: buffer[at...] holds the blocks [first, end), the last one cut at the volume's end. Blocks that came
   * otherwise meanwhile are left alone. Returns an errno.
   */
  fill(epoch: number, first: number, end: number, buffer: Buffer, at: number): number {
    const { presence } = this;
    if (!this.#takes(epoch) || presence === null) return Errno.OK;
    for (
      let block = presence.nextMissing(first, end);
      block < end;
      block = presence.nextMissing(block, end)
    ) {
      const run = this.#locks.run(block, presence.nextPresent(block, end));
      if (!run.locked) {
        const bytes = bytesOfBlocks(block, run.end, this.image.size);
        const done = this.image.write(buffer, at + (block - first) * BLOCK_BYTES, bytes, block * BLOCK_BYTES);
        if (done !== 0) return errnoOfSystem(done);
        this.#arrived(block, run.end);
        if (this.presence === null) break;
      }
      block = run.end;
    }
    return Errno.OK;
  }

  /**
   * As `fill`, by a thread, when so much comes that this one would do little else. Resolves with an errno; `buffer` must stay as it is until then.
   */
  async fillLater(epoch: number, first: number, end: number, buffer: Buffer, at: number): Promise<number> {
    for (let block = first; block < end; ) {
      const { presence } = this;
      if (!this.#takes(epoch) || presence === null) return Errno.OK;
      block = presence.nextMissing(block, end);
      if (block >= end) break;
      const run = this.#locks.run(block, presence.nextPresent(block, end));
      if (!run.locked) {
        const lock = this.#locks.lock(block, run.end);
        const bytes = bytesOfBlocks(block, run.end, this.image.size);
        const from = at + (block - first) * BLOCK_BYTES;
        const done = await this.image.writeLater(buffer, from, bytes, block * BLOCK_BYTES);
        this.#unlock(lock, done === 0 && epoch === this.epoch);
        if (done !== 0) return errnoOfSystem(done);
      }
      block = run.end;
    }
    return Errno.OK;
  }

  /** Keeps that the missing blocks of [first, end) are zeros at the source. Resolves with an errno. */
  async fillZeroes(epoch: number, first: number, end: number): Promise<number> {
    for (let block = first; block < end; ) {
      const { presence } = this;
      if (!this.#takes(epoch) || presence === null) return Errno.OK;
      block = presence.nextMissing(block, end);
      if (block === end) break;
      const stop = Math.min(presence.nextPresent(block, end), block + ZERO_FILL_BLOCKS_MAX);
      const run = this.#locks.run(block, stop);
      if (!run.locked) {
        const errno = await this.#fillZeroRun(epoch, block, run.end);
        if (errno !== Errno.OK) return errno;
      }
      block = run.end;
    }
    return Errno.OK;
  }

  async #fillZeroRun(epoch: number, first: number, end: number): Promise<number> {
    const offset = first * BLOCK_BYTES;
    const bytes = bytesOfBlocks(first, end, this.image.size);
    if (this.image.isHole(offset, offset + bytes)) {
      this.#arrived(first, end);
      return Errno.OK;
    }
    const lock = this.#locks.lock(first, end);
    const done = await this.image.zero(offset, bytes, true);
    this.#unlock(lock, done === 0 && epoch === this.epoch);
    return done === 0 ? Errno.OK : errnoOfSystem(done);
  }

  /**
   * The source changed these blocks, given as first, end, first, end, ...: what is here of them counts for nothing, nor does what is on its way.
   * Null: all blocks.
   */
  drop(runs: readonly number[] | null): void {
    this.epoch++;
    const { presence } = this;
    if (presence === null) return;
    if (runs === null) presence.clear(0, this.blocks);
    else for (let at = 0; at < runs.length; at += 2) presence.clear(runs[at]!, runs[at + 1]!);
    this.onDrop?.(runs);
  }

  /** As DirtyMap's, with what threads are changing. */
  claimChanges(move: string, since: number | null): Tracking {
    return this.#tracked().claim(move, since, this.#locks.held);
  }

  cutChanges(move: string, cookie: number): number {
    return this.#tracked().cut(move, cookie, this.#locks.held);
  }

  #tracked(): DirtyMap {
    if (this.dirty !== null) return this.dirty;
    throw new BlockferryError('generation', `nobody tracks the changes of ${this.image.path}`);
  }

  /** Blocks of [first, end) will not come: who waits for them gets `errno`. */
  giveUp(first: number, end: number, errno: number): void {
    for (const { request } of this.#parking.take(first, end)) request.complete(errno);
  }

  /** There is no room to keep blocks of [first, end): reads of them pass through, changes that need them fail. */
  overflow(first: number, end: number): void {
    for (const { request, retry } of this.#parking.take(first, end)) {
      if (retry === this.#retryRead && this.supplier !== null) this.supplier.readThrough(request);
      else request.complete(Errno.ENOSPC);
    }
  }

  /** Whether a request waits for a block of [first, end). */
  awaits(first: number, end: number): boolean {
    return this.#parking.has(first, end);
  }

  /** A session is over: what it has waiting for blocks is answered now, not when they come. They may not come for a long time. */
  dropAbandoned(): void {
    for (const { request } of this.#parking.takeAbandoned()) request.complete(Errno.EIO);
    this.supplier?.dropAbandoned();
  }

  /** Tries what waits for blocks of [first, end) again: what was fetched for them was not kept. */
  retry(first: number, end: number): void {
    this.#wake(first, end);
  }

  /** Reads blocks that are here: resolves with an errno. */
  async readLocal(buffer: Buffer, at: number, length: number, offset: number): Promise<number> {
    const now = this.readNow(offset, length, buffer, at);
    if (now !== LATER) return now;
    return this.#readOnThread(buffer, at, length, offset);
  }

  async #readOnThread(buffer: Buffer, at: number, length: number, offset: number): Promise<number> {
    this.#reading++;
    const done = await this.image.read(buffer, at, length, offset);
    this.#reading--;
    this.#tellIdle();
    return done === 0 ? Errno.OK : errnoOfSystem(done);
  }

  /** Tries everything that waits for blocks again, after `keeps` or the supplier changed. */
  retryParked(): void {
    for (const { request, retry } of this.#parking.takeAll()) retry(request);
  }

  // Durability

  flush(request: IoRequest): void {
    void this.commit().then((errno) => request.complete(errno));
  }

  /** Makes all that was answered so far durable. Resolves with an errno. Those who ask while one runs share the next. */
  commit(): Promise<number> {
    return this.#committer.commit();
  }

  /** Runs a step that must not meet a commit half way; one at a time, in order. */
  serially<T>(step: () => Promise<T>): Promise<T> {
    return this.#committer.serially(step);
  }

  /** Resolves when no thread has the image in hand. Changes that come meanwhile must be kept out by the gate. */
  idle(): Promise<void> {
    if (this.#locks.size === 0 && this.#reading === 0) return Promise.resolve();
    return new Promise((resolve) => this.#idle.push(resolve));
  }

  /** Resolves when no thread changes the image, however many read it; otherwise like `idle`. */
  unchanging(): Promise<void> {
    if (this.#locks.size === 0) return Promise.resolve();
    return new Promise((resolve) => this.#unchanging.push(resolve));
  }

  // What is where

  cache(request: IoRequest): void {
    const first = blockAt(request.offset);
    const end = blocksOf(request.offset + request.length);
    if (this.keeps && this.presence !== null) this.supplier?.prefetch(first, end);
    request.complete(Errno.OK);
  }

  status(request: StatusRequest): void {
    reportExtents(request, this.image, this.presence, this.keeps);
    request.complete(Errno.OK);
  }
}
