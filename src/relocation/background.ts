/**
 * The background copy: brings every block here while the guest works, in ascending order, ranges that were asked for first.
 *
 * - Bytes in flight are bounded by a window that follows the link's delay, and shrink while the guest waits for its own reads.
 * - Ranges that the source says are zero cost no data: they are marked, or punched where the image holds something.
 * - What fails is passed over and tried again on the next round. The copy stops for a while when there is no room here, when
 *   the source is out of reach, when nothing but failures comes, and between two rounds if one had any. Failures are shown as long
 *   as they last, and end nothing.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { Extent } from '../nbd/client/client.js';
import { Errno } from '../nbd/constants.js';
import { BLOCK_BYTES, bytesOfBlocks } from '../volume/blocks.js';
import type { BlockStore } from '../volume/store.js';
import type { Fetcher } from './fetcher.js';
import type { Link } from './link.js';
import { DelayWindow } from './window.js';
import { type Run, ZeroMap } from './zero-map.js';

/** Blocks of one bulk fetch: 256 KiB. */
const BULK_BLOCKS = 64;
/** Bytes of the source whose allocation is asked for at once. */
const ALLOCATION_BYTES = 1 << 30;
/** Ranges that may wait to be prefetched. */
const WANTED_MAX = 1024;
/** So many fetches failed one after the other: there is no point in trying the next at once. */
const FAILURES_MAX = 4;
/** Blocks that the guest has in hand are looked at again after so long. */
const LOCKED_MS = 10;
/** The rate shown is an average over about so long. */
const RATE_HALF_LIFE_MS = 2_000;

export type BackgroundState = 'running' | 'paused' | 'waiting' | 'done' | 'off';

interface Wanted {
  first: number;
  readonly end: number;
  readonly resolve: (() => void) | null;
}

export interface BackgroundOptions {
  enabled: boolean;
  rateBytesPerSecond: number | null;
  log: Logger;
  /** How long the copy stops after failures. */
  retryAfterErrorMs: number;
}

export class Background {
  #started = false;
  #paused = false;
  /** What failed last. */
  #error: string | null = null;
  /** Nothing is copied until #retryTimer fires. */
  #blocked = false;
  #failedThisRound = false;
  #failuresInARow = 0;
  #retryTimer: NodeJS.Timeout | undefined;
  readonly #wanted: Wanted[] = [];
  #cursor = 0;
  #inFlightBytes = 0;
  readonly #window = new DelayWindow();
  #known = ZeroMap.NOTHING;
  /** A run of zeros is being marked; one at a time, as each may keep a thread and a range lock for long. */
  #zeroing = false;
  #asking = false;
  #tellsAllocation = true;
  #rateLimit: number | null;
  #credit = 0;
  #creditAtMs = 0;
  #creditTimer: NodeJS.Timeout | undefined;
  #rate = 0;
  #rateAtMs = 0;
  #rateBeganMs = 0;

  constructor(
    private readonly store: BlockStore,
    private readonly fetcher: Fetcher,
    private readonly link: Link,
    private readonly options: BackgroundOptions,
  ) {
    this.#rateLimit = options.rateBytesPerSecond;
  }

  get state(): BackgroundState {
    if (this.store.presence === null || this.store.presence.complete) return 'done';
    if (!this.options.enabled) return 'off';
    if (this.#paused) return 'paused';
    return this.#started && this.link.state === 'connected' && !this.#blocked ? 'running' : 'waiting';
  }

  get error(): string | null {
    return this.state === 'done' ? null : this.#error;
  }

  get rateLimit(): number | null {
    return this.#rateLimit;
  }

  /** Bytes per second that came lately. */
  get rate(): number {
    const now = performance.now();
    const decayed = this.#rate * 2 ** (-(now - this.#rateAtMs) / RATE_HALF_LIFE_MS);
    // A copy that began a moment ago has not had the time to reach its average.
    const begun = 1 - 2 ** (-(now - this.#rateBeganMs) / RATE_HALF_LIFE_MS);
    return begun > 0 ? decayed / begun : 0;
  }

  /** The source stands still from now on: copy. */
  start(): void {
    if (!this.#started) this.#rateBeganMs = performance.now();
    this.#started = true;
    this.#creditAtMs = performance.now();
    this.#pump();
  }

  /**
   * No more until `start`. What was learned of the source is forgotten, as it may change meanwhile, and who waits for a range is
   * let go.
   */
  stop(): void {
    this.#started = false;
    this.#known = ZeroMap.NOTHING;
    this.#tellsAllocation = true;
    this.#cursor = 0;
    this.#forgive();
    clearTimeout(this.#creditTimer);
    this.#creditTimer = undefined;
    for (const { resolve } of this.#wanted.splice(0)) resolve?.();
  }

  pause(): void {
    this.#paused = true;
  }

  resume(): void {
    this.#paused = false;
    this.#forgive();
    this.#pump();
  }

  setRate(bytesPerSecond: number | null): void {
    this.#rateLimit = bytesPerSecond;
    this.#credit = 0;
    this.#creditAtMs = performance.now();
    clearTimeout(this.#creditTimer);
    this.#creditTimer = undefined;
    this.#pump();
  }

  /** A hint: [first, end) before the rest. Dropped when too many wait. */
  want(first: number, end: number): void {
    if (this.#wanted.length >= WANTED_MAX) return;
    this.#wanted.push({ first, end, resolve: null });
    this.#pump();
  }

  /** Resolves when every block of [first, end) was fetched or failed, also while the copy is paused or off. */
  async bring(first: number, end: number): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#wanted.push({ first, end, resolve });
      this.#pump();
    });
    await this.fetcher.settled(first, end);
  }

  /** The guest's reads changed: there may be room for more. */
  nudge(): void {
    this.#pump();
  }

  #pump(): void {
    if (!this.#started || this.store.presence === null) return;
    for (;;) {
      const bulk = BULK_BLOCKS * BLOCK_BYTES;
      if (this.#inFlightBytes > 0 && this.#inFlightBytes + bulk > this.#allowance()) return;
      if (!this.#mayCopy() || !this.#hasCredit()) return;
      const run = this.#next();
      if (run === undefined) return;
      void this.#copy(run.first, run.end);
    }
  }

  /** Wanted ranges are served in any case, the rest only while the copy is on. */
  #mayCopy(): boolean {
    if (this.#wanted.length > 0) return true;
    return this.options.enabled && !this.#paused && !this.#blocked;
  }

  /** The guest's own reads come first: while it waits for some, the copy keeps to a quarter. */
  #allowance(): number {
    return this.fetcher.demandsInFlight > 0 ? this.#window.bytes / 4 : this.#window.bytes;
  }

  #next(): Run | undefined {
    for (;;) {
      const wanted = this.#wanted[0];
      if (wanted === undefined) break;
      const run = this.fetcher.nextRun(wanted.first, wanted.end, BULK_BLOCKS);
      if (run !== undefined) {
        wanted.first = run.end;
        return run;
      }
      this.#wanted.shift();
      wanted.resolve?.();
    }
    return this.#mayCopy() ? this.#nextLinear() : undefined;
  }

  #nextLinear(): Run | undefined {
    const { blocks } = this.store;
    for (let wrapped = false; ; ) {
      const run = this.fetcher.nextRun(this.#cursor, blocks, BULK_BLOCKS);
      if (run === undefined) {
        if (wrapped || this.#cursor === 0) return undefined;
        wrapped = true;
        this.#cursor = 0; // what was skipped, or failed, on the way
        if (this.#failedThisRound) {
          this.#block();
          return undefined;
        }
        this.#error = null;
        continue;
      }
      const data = this.#withoutZeroes(run);
      if (data === undefined) return undefined;
      if (data !== 'zeroes') {
        this.#cursor = data.end;
        return data;
      }
    }
  }

  /**
   * The part of a run that has data. Where its allocation is unknown, that is asked for first (undefined: wait); a run that
   * begins with zeros has them marked, and the search goes on behind them.
   */
  #withoutZeroes(run: Run): Run | 'zeroes' | undefined {
    if (!this.#tellsAllocation) return run;
    if (!this.#known.knows(run.first)) {
      void this.#askAllocation(run.first);
      return undefined;
    }
    const end = Math.min(run.end, this.#known.to);
    const zero = this.#known.next(run.first);
    if (zero === undefined || zero.first >= end) return { first: run.first, end };
    if (zero.first > run.first) return { first: run.first, end: zero.first };
    if (this.#zeroing) return undefined;
    void this.#markZeroes(run.first, zero.end);
    this.#cursor = zero.end;
    return 'zeroes';
  }

  async #markZeroes(first: number, end: number): Promise<void> {
    this.#zeroing = true;
    const before = this.store.presence?.present ?? 0;
    const errno = await this.store.fillZeroes(this.store.epoch, first, end);
    const after = this.store.presence?.present ?? this.store.blocks;
    // Others may have added some meanwhile: a bound, exact where nothing was punched.
    this.fetcher.traffic.zeroBytes += Math.min(after - before, end - first) * BLOCK_BYTES;
    if (errno !== Errno.OK) this.#failed(errno, 'the image has I/O errors');
    // The guest has these very blocks in hand, on a thread whose end is only seen if the loop goes on turning.
    else if (after === before) await delay(LOCKED_MS);
    this.#zeroing = false;
    this.#pump();
  }

  async #askAllocation(block: number): Promise<void> {
    if (this.#asking) return;
    this.#asking = true;
    const { size } = this.store.image;
    const { epoch } = this.store;
    const offset = block * BLOCK_BYTES;
    try {
      const extents = await this.link.allocation(offset, Math.min(ALLOCATION_BYTES, size - offset));
      if (epoch === this.store.epoch && this.#started) this.#learn(offset, extents);
    } catch (error) {
      const code = error instanceof BlockferryError ? error.code : undefined;
      if (code === 'source-unreachable') this.#failed(Errno.EIO);
      else if (code !== 'closed') {
        // Copying without knowing is right, only dearer.
        this.options.log.warn(
          { why: messageOf(error) },
          'the source does not tell what is allocated, copying all',
        );
        this.#tellsAllocation = false;
      }
    } finally {
      this.#asking = false;
      this.#pump();
    }
  }

  #learn(offset: number, extents: Extent[] | null): void {
    this.#known = extents === null ? ZeroMap.NOTHING : ZeroMap.of(offset, extents, this.store.image.size);
    // Extents smaller than a block lead nowhere.
    this.#tellsAllocation = this.#known.to > this.#known.from;
  }

  async #copy(first: number, end: number): Promise<void> {
    const bytes = bytesOfBlocks(first, end, this.store.image.size);
    this.#inFlightBytes += bytes;
    if (this.#rateLimit !== null) this.#credit -= bytes;
    const full = this.#inFlightBytes + bytes > this.#allowance();
    const began = performance.now();
    const errno = await this.fetcher.fetch('bulk', first, end);
    this.#inFlightBytes -= bytes;
    const now = performance.now();
    if (errno === Errno.OK) {
      this.#failuresInARow = 0;
      if (!this.#failedThisRound) this.#error = null;
      this.#window.answered(bytes, now - began, full, now);
      this.#count(bytes, now);
    } else if (errno === Errno.ESHUTDOWN) {
      return; // the link is closed
    } else {
      this.#failed(errno);
    }
    this.#pump();
  }

  /** Something could not be copied; `why` in place of the source's fault, if it is not that. */
  #failed(errno: number, why = 'the source has I/O errors'): void {
    if (!this.#started) return;
    const full = errno === Errno.ENOSPC;
    const lost = this.link.state !== 'connected';
    this.#failedThisRound = true;
    this.#failuresInARow++;
    const before = this.#error;
    if (full) this.#error = 'no room for fetched blocks: free some space';
    else this.#error = lost ? 'the source is out of reach' : why;
    if (this.#error !== before)
      this.options.log.warn({ why: this.#error }, 'the background copy had a failure');
    if (full || lost || this.#failuresInARow >= FAILURES_MAX) this.#block();
  }

  /** Copies nothing for a while, and then as if nothing had happened. */
  #block(): void {
    this.#blocked = true;
    this.#retryTimer ??= setTimeout(() => {
      const error = this.#error;
      this.#forgive();
      this.#error = error; // until something succeeds
      this.#pump();
    }, this.options.retryAfterErrorMs).unref();
  }

  #forgive(): void {
    clearTimeout(this.#retryTimer);
    this.#retryTimer = undefined;
    this.#blocked = false;
    this.#failedThisRound = false;
    this.#failuresInARow = 0;
    this.#error = null;
  }

  /** Whether the rate limit lets one more fetch go; if not, it is tried again when it does. */
  #hasCredit(): boolean {
    if (this.#rateLimit === null) return true;
    const now = performance.now();
    const burst = Math.max(this.#rateLimit / 10, BULK_BLOCKS * BLOCK_BYTES);
    this.#credit = Math.min(burst, this.#credit + ((now - this.#creditAtMs) / 1000) * this.#rateLimit);
    this.#creditAtMs = now;
    if (this.#credit > 0) return true;
    this.#creditTimer ??= setTimeout(
      () => {
        this.#creditTimer = undefined;
        this.#pump();
      },
      Math.max(1, (-this.#credit / this.#rateLimit) * 1000 + 1),
    ).unref();
    return false;
  }

  #count(bytes: number, now: number): void {
    const decay = 2 ** (-(now - this.#rateAtMs) / RATE_HALF_LIFE_MS);
    this.#rate = this.#rate * decay + (bytes * Math.LN2 * 1000) / RATE_HALF_LIFE_MS;
    this.#rateAtMs = now;
  }
}
