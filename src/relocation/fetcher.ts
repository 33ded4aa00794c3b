/**
 * Fetches missing blocks and fills them into the volume: on demand, for all who wait at once, and in bulk.
 *
 * Invariants
 * - A block is in flight at most once. Who wants a block that is in flight waits for that fetch.
 * - A fetch belongs to the epoch it began in; if the blocks were dropped meanwhile its data is too, and who waits asks again.
 * - Nothing is filled from a fetch that failed or came short. A block fails only if the source fails to read that very block.
 * - Reads that pass through (before a takeover, or with no room to keep blocks) share nothing and keep nothing. Before a takeover all of them come
 *   from the source: what is here may be stale.
 */
import { BlockferryError, type ErrorCode, errnoOf } from '../errors.js';
import { Errno } from '../nbd/constants.js';
import type { IoRequest } from '../nbd/device.js';
import { BLOCK_BYTES, blockAt, blocksOf, bytesOfBlocks } from '../volume/blocks.js';
import type { BlockStore, Supplier } from '../volume/store.js';
import { type Asker, Budget } from './budget.js';
import { BufferPool } from './buffers.js';
import { Histogram } from './histogram.js';
import { InFlight } from './in-flight.js';
import { DROPPED, type Lane, type Link } from './link.js';

/** Blocks of one fetch, at most: 1 MiB. */
const FETCH_BLOCKS_MAX = 256;
/** So many demand fetches in flight keep any link busy: who waits asks again for its further blocks when the first is here. */
const DEMANDS_AHEAD_MAX = 256;
/** Buffers of demand fetches, at most: twice what their lane may have in flight. Further ones wait for theirs. */
const DEMAND_BYTES_MAX = 64 << 20;

/** A demand fetch is for those who wait for its blocks, and nobody else may be. */
class Fetch implements Asker {
  done!: Promise<number>;
  /** Somebody waits for its end, whatever blocks he is after. */
  isAwaited = false;

  constructor(
    readonly store: BlockStore,
    readonly lane: Lane,
    readonly first: number,
    readonly end: number,
  ) {}

  get abandoned(): boolean {
    return this.lane === 'demand' && !this.isAwaited && !this.store.awaits(this.first, this.end);
  }
}

export interface Traffic {
  demandBytes: number;
  backgroundBytes: number;
  /** Passed through, not kept. */
  throughBytes: number;
  /** Known to be zero, never sent. */
  zeroBytes: number;
  /** Found in a seed on this host, never sent. */
  seedBytes: number;
}

export class Fetcher implements Supplier {
  readonly #store: BlockStore;
  readonly #link: Link;
  readonly #pool = new BufferPool();
  readonly #inFlight = new InFlight();
  readonly #underWay = new Set<Fetch>();
  readonly #demandRoom = new Budget(Number.POSITIVE_INFINITY, DEMAND_BYTES_MAX);
  #demandsInFlight = 0;
  #demandBytesInFlight = 0;
  readonly demandLatency = new Histogram();
  readonly traffic: Traffic = {
    demandBytes: 0,
    backgroundBytes: 0,
    throughBytes: 0,
    zeroBytes: 0,
    seedBytes: 0,
  };
  /** Told when a range is likely to be wanted. */
  onPrefetch: ((first: number, end: number) => void) | null = null;
  /** Told when the guest has to wait for blocks of a range. */
  onMiss: ((first: number, end: number) => void) | null = null;
  /** Told when a demand fetch is over. */
  onDemandDone: (() => void) | null = null;

  constructor(store: BlockStore, link: Link) {
    this.#store = store;
    this.#link = link;
  }

  get demandsInFlight(): number {
    return this.#demandsInFlight;
  }

  get demandBytesInFlight(): number {
    return this.#demandBytesInFlight;
  }

  // Supplier

  demand(first: number, end: number): void {
    this.onMiss?.(first, end);
    for (let block = first; block < end; ) {
      if (block > first && this.#demandsInFlight >= DEMANDS_AHEAD_MAX) return;
      const run = this.nextRun(block, end, FETCH_BLOCKS_MAX);
      if (run === undefined) return;
      void this.#demandRun(run.first, run.end);
      block = run.end;
    }
  }

  async #demandRun(first: number, end: number): Promise<void> {
    const bytes = bytesOfBlocks(first, end, this.#store.image.size);
    this.#demandsInFlight++;
    this.#demandBytesInFlight += bytes;
    const { window } = this.#link;
    const mark = window.sent();
    const began = performance.now();
    const errno = await this.fetch('demand', first, end);
    const now = performance.now();
    this.demandLatency.add(now - began);
    if (errno === Errno.OK) window.demandAnswered(bytes, now - began, mark, now);
    this.#demandsInFlight--;
    this.#demandBytesInFlight -= bytes;
    this.onDemandDone?.();
  }

  prefetch(first: number, end: number): void {
    this.onPrefetch?.(first, end);
  }

  dropAbandoned(): void {
    this.#demandRoom.dropAbandoned();
    this.#link.dropAbandoned();
  }

  readThrough(request: IoRequest): void {
    void this.#passThrough(request).then((errno) => {
      const past = blocksOf(request.offset + request.length);
      const local = this.#localUntil(blockAt(request.offset), past) === past;
      // The link may have closed under it because all blocks came otherwise: they are here.
      if (errno !== Errno.OK && local) this.#store.read(request);
      else request.complete(errno);
    });
  }

  /** Local blocks from the image, the others from the source, straight into the request's buffer. */
  async #passThrough(request: IoRequest): Promise<number> {
    const { offset, length, buffer, at } = request;
    const past = offset + length;
    const end = blocksOf(past);
    const { presence, keeps } = this.#store;
    const parts: Promise<number>[] = [];
    for (let from = offset; from < past; ) {
      const block = blockAt(from);
      const localEnd = this.#localUntil(block, end);
      const local = localEnd > block;
      const next = local ? localEnd : keeps && presence !== null ? presence.nextPresent(block, end) : end;
      const to = Math.min(next * BLOCK_BYTES, past);
      const place = at + from - offset;
      parts.push(
        local
          ? this.#store.readLocal(buffer, place, to - from, from)
          : this.#through(from, to - from, buffer, place, request),
      );
      from = to;
    }
    // All must be over, also after a failure: the buffer belongs to them until then.
    const results = await Promise.allSettled(parts);
    for (const result of results) {
      if (result.status === 'rejected') return errnoOf(result.reason);
      if (result.value !== Errno.OK) return result.value;
    }
    return Errno.OK;
  }

  /** The end of the blocks from `block` on that are here and current, at most `end`. */
  #localUntil(block: number, end: number): number {
    const { presence, keeps } = this.#store;
    if (presence === null) return end;
    return keeps ? presence.nextMissing(block, end) : block;
  }

  async #through(offset: number, length: number, buffer: Buffer, at: number, asker: Asker): Promise<number> {
    await this.#link.read('demand', offset, length, buffer, at, asker);
    this.traffic.throughBytes += length;
    return Errno.OK;
  }

  // Fetches

  /** The first run of blocks in [from, end) that are missing and not in flight, `blocksMax` long at most. */
  nextRun(from: number, end: number, blocksMax: number): { first: number; end: number } | undefined {
    const { presence } = this.#store;
    if (presence === null) return undefined;
    let first = presence.nextMissing(from, end);
    for (;;) {
      if (first >= end) return undefined;
      const idle = this.#inFlight.nextIdle(first);
      if (idle === first) break;
      first = presence.nextMissing(idle, end);
    }
    const stop = presence.nextPresent(first, Math.min(end, first + blocksMax));
    return { first, end: this.#inFlight.nextBusy(first, stop) };
  }

  /**
   * Fetches and fills [first, end): blocks that are missing and not in flight, FETCH_BLOCKS_MAX at most. Resolves with an errno
   * when it is over; those who wait for the blocks have been told. On demand: only while there are any.
   */
  async fetch(lane: Lane, first: number, end: number): Promise<number> {
    const fetch = new Fetch(this.#store, lane, first, end);
    fetch.done = this.#run(fetch);
    this.#underWay.add(fetch);
    const errno = await fetch.done;
    this.#underWay.delete(fetch);
    return errno;
  }

  /** Resolves when the fetches that touch [first, end) now are over. */
  async settled(first: number, end: number): Promise<void> {
    const touching = [...this.#underWay].filter((fetch) => fetch.first < end && first < fetch.end);
    for (const fetch of touching) fetch.isAwaited = true;
    await Promise.all(touching.map((fetch) => fetch.done));
  }

  async #run(fetch: Fetch): Promise<number> {
    const { lane, first, end } = fetch;
    const bytes = bytesOfBlocks(first, end, this.#store.image.size);
    this.#inFlight.mark(first, end);
    if (lane === 'demand') {
      const turn = this.#demandRoom.take(bytes, fetch);
      if (turn !== null && !(await turn)) return this.#drop(first, end);
    }
    const buffer = this.#pool.take(bytes);
    const errno = await this.#transfer(fetch, this.#store.epoch, first, end, buffer);
    this.#pool.give(buffer);
    if (lane === 'demand') this.#demandRoom.give(bytes);
    return errno;
  }

  /** Nobody waited for it; whoever came meanwhile asks again. */
  #drop(first: number, end: number): number {
    this.#inFlight.unmark(first, end);
    this.#store.retry(first, end);
    return Errno.EIO;
  }

  /**
   * Reads [first, end) at once, and where the source fails to, half by half: a bad block of the source fails nobody who waits for
   * its neighbours. What is over is no longer in flight before those who wait are told, so that they may ask again.
   */
  async #transfer(fetch: Fetch, epoch: number, first: number, end: number, buffer: Buffer): Promise<number> {
    const { lane } = fetch;
    const bytes = bytesOfBlocks(first, end, this.#store.image.size);
    let failure: unknown;
    try {
      await this.#link.read(lane, first * BLOCK_BYTES, bytes, buffer, 0, fetch);
    } catch (error) {
      failure = error;
    }
    if (failure === DROPPED) return this.#drop(first, end);
    const stale = epoch !== this.#store.epoch;
    if (!stale && codeOf(failure) === 'source-io' && end - first > 1) {
      const middle = first + Math.ceil((end - first) / 2);
      const lower = await this.#transfer(fetch, epoch, first, middle, buffer);
      const upper = await this.#transfer(fetch, epoch, middle, end, buffer);
      return lower === Errno.OK ? upper : lower;
    }
    if (!stale && failure === undefined && lane === 'bulk' && this.#link.window.fast)
      return this.#keepLater(epoch, first, end, buffer, bytes);
    this.#inFlight.unmark(first, end);
    if (stale) {
      this.#store.retry(first, end);
      return Errno.OK;
    }
    if (failure !== undefined) return this.#fail(first, end, failure);
    this.traffic[lane === 'demand' ? 'demandBytes' : 'backgroundBytes'] += bytes;
    return this.#kept(this.#store.fill(epoch, first, end, buffer, 0), first, end);
  }

  /** In flight until a thread has written it: nobody need ask for it again. */
  async #keepLater(
    epoch: number,
    first: number,
    end: number,
    buffer: Buffer,
    bytes: number,
  ): Promise<number> {
    const errno = await this.#store.fillLater(epoch, first, end, buffer, 0);
    this.#inFlight.unmark(first, end);
    this.traffic.backgroundBytes += bytes;
    this.#kept(errno, first, end);
    // Who came meanwhile for blocks that were left alone did not ask for them.
    this.#store.retry(first, end);
    return errno;
  }

  #kept(errno: number, first: number, end: number): number {
    if (errno === Errno.ENOSPC) this.#store.overflow(first, end);
    else if (errno !== Errno.OK) this.#store.giveUp(first, end, errno);
    return errno;
  }

  #fail(first: number, end: number, failure: unknown): number {
    const errno = codeOf(failure) === 'closed' ? Errno.ESHUTDOWN : Errno.EIO;
    this.#store.giveUp(first, end, errno);
    return errno;
  }
}

function codeOf(error: unknown): ErrorCode | undefined {
  return error instanceof BlockferryError ? error.code : undefined;
}
