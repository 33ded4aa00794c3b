/**
 * The background copy: brings every block here while the guest works, in ascending order, ranges that were asked for first.
 *
 * - Bytes in flight are bounded by a window that follows the link's delay, and shrink while the guest waits for its own reads.
 * - Ranges that the source says are zero cost no data: they are marked, or punched where the image holds something.
 * - Failures (an I/O error of the source, no room here) are tried again later; they are shown, and end nothing.
 */
import type { Logger } from 'pino';
import { Errno } from '../nbd/constants.js';
import { BLOCK_BYTES, blockAt, blocksOf, bytesOfBlocks } from '../volume/blocks.js';
import type { BlockStore } from '../volume/store.js';
import type { Fetcher } from './fetcher.js';
import type { Link } from './link.js';
import { DelayWindow } from './window.js';

/** Blocks of one bulk fetch: 256 KiB. */
const BULK_BLOCKS = 64;
/** Bytes of the source whose allocation is asked for at once. */
const ALLOCATION_BYTES = 1 << 30;
/** Ranges that may wait to be prefetched. */
const WANTED_MAX = 1024;
const RETRY_AFTER_ERROR_MS = 5_000;
/** The rate shown is an average over about so long. */
const RATE_HALF_LIFE_MS = 2_000;
/** Status bit of `base:allocation`: reads as zeros. */
const ZERO = 2;

export type BackgroundState = 'running' | 'paused' | 'waiting' | 'done' | 'off';

interface Wanted {
  first: number;
  readonly end: number;
  readonly resolve: (() => void) | null;
}

export class Background {
  #started = false;
  #paused = false;
  #stopped = false;
  #error: string | null = null;
  readonly #wanted: Wanted[] = [];
  #cursor = 0;
  #inFlightBytes = 0;
  readonly #window = new DelayWindow();
  /** What is known of the source's allocation: [from, to) in blocks, the zero runs in it in ascending order. */
  #known = { from: 0, to: 0, zeroes: [] as { first: number; end: number }[] };
  #asking = false;
  #tellsAllocation = true;
  #rateLimit: number | null;
  #credit = 0;
  #creditAtMs = 0;
  #timer: NodeJS.Timeout | undefined;
  #rate = 0;
  #rateAtMs = 0;
  #rateBeganMs = 0;

  constructor(
    private readonly store: BlockStore,
    private readonly fetcher: Fetcher,
    private readonly link: Link,
    private readonly options: { enabled: boolean; rateBytesPerSecond: number | null; log: Logger },
  ) {
    this.#rateLimit = options.rateBytesPerSecond;
  }

  get state(): BackgroundState {
    if (this.store.presence === null || this.store.presence.complete) return 'done';
    if (!this.options.enabled) return 'off';
    if (this.#paused) return 'paused';
    return this.#started && this.link.state === 'connected' && this.#error === null ? 'running' : 'waiting';
  }

  get error(): string | null {
    return this.#error;
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
    this.#stopped = false;
    this.#creditAtMs = performance.now();
    this.#pump();
  }

  /** No more until `start`. What was learned of the source is forgotten: it may change meanwhile. */
  stop(): void {
    this.#started = false;
    this.#known = { from: 0, to: 0, zeroes: [] };
    this.#cursor = 0;
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  /** For good: nothing is fetched any more, and who waits for a range is let go. */
  close(): void {
    this.stop();
    this.#stopped = true;
    for (const { resolve } of this.#wanted.splice(0)) resolve?.();
  }

  pause(): void {
    this.#paused = true;
  }

  resume(): void {
    this.#paused = false;
    this.#error = null;
    this.#pump();
  }

  setRate(bytesPerSecond: number | null): void {
    this.#rateLimit = bytesPerSecond;
    this.#credit = 0;
    this.#creditAtMs = performance.now();
    clearTimeout(this.#timer);
    this.#timer = undefined;
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
    if (!this.#started || this.#stopped || this.store.presence === null) return;
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
    return this.options.enabled && !this.#paused && this.#error === null;
  }

  /** The guest's own reads come first: while it waits for some, the copy keeps to a quarter. */
  #allowance(): number {
    return this.fetcher.demandsInFlight > 0 ? this.#window.bytes / 4 : this.#window.bytes;
  }

  #next(): { first: number; end: number } | undefined {
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
    if (!this.options.enabled || this.#paused || this.#error !== null) return undefined;
    return this.#nextLinear();
  }

  #nextLinear(): { first: number; end: number } | undefined {
    const { blocks } = this.store;
    for (let wrapped = false; ; ) {
      const run = this.fetcher.nextRun(this.#cursor, blocks, BULK_BLOCKS);
      if (run === undefined) {
        if (wrapped || this.#cursor === 0) return undefined;
        wrapped = true;
        this.#cursor = 0; // what was skipped, or failed, on the way
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
  #withoutZeroes(run: { first: number; end: number }): { first: number; end: number } | 'zeroes' | undefined {
    if (!this.#tellsAllocation) return run;
    const { from, to, zeroes } = this.#known;
    if (run.first < from || run.first >= to) {
      void this.#askAllocation(run.first);
      return undefined;
    }
    // Zero runs are met in ascending order: those behind the cursor are done with.
    while (zeroes.length > 0 && zeroes[0]!.end <= run.first) zeroes.shift();
    const zero = zeroes[0];
    if (zero === undefined || zero.first >= run.end) return { first: run.first, end: Math.min(run.end, to) };
    if (zero.first > run.first) return { first: run.first, end: Math.min(zero.first, to) };
    void this.#markZeroes(run.first, zero.end);
    this.#cursor = zero.end;
    return 'zeroes';
  }

  async #markZeroes(first: number, end: number): Promise<void> {
    const before = this.store.presence?.present ?? 0;
    const errno = await this.store.fillZeroes(this.store.epoch, first, end);
    const after = this.store.presence?.present ?? this.store.blocks;
    // Others may have added some meanwhile: a bound, exact where nothing was punched.
    this.fetcher.traffic.zeroBytes += Math.min(after - before, end - first) * BLOCK_BYTES;
    if (errno !== Errno.OK && errno !== Errno.ESHUTDOWN) this.#failed(errno);
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
      // Copying without knowing is right, only dearer.
      this.options.log.warn({ error }, 'the source does not tell what is allocated, copying all');
      this.#tellsAllocation = false;
    } finally {
      this.#asking = false;
      this.#pump();
    }
  }

  #learn(offset: number, extents: { length: number; flags: number }[] | null): void {
    if (extents === null) {
      this.#tellsAllocation = false;
      return;
    }
    const { size } = this.store.image;
    const zeroes: { first: number; end: number }[] = [];
    let at = offset;
    for (const { length, flags } of extents) {
      const past = Math.min(at + length, size);
      const first = blocksOf(at);
      const end = past === size ? this.store.blocks : blockAt(past);
      if ((flags & ZERO) !== 0 && first < end) zeroes.push({ first, end });
      at = past;
    }
    const from = blockAt(offset);
    const to = at === size ? this.store.blocks : blockAt(at);
    if (to <= from)
      this.#tellsAllocation = false; // extents smaller than a block lead nowhere
    else this.#known = { from, to, zeroes };
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
      this.#window.answered(bytes, now - began, full, now);
      this.#count(bytes, now);
    } else if (errno !== Errno.ESHUTDOWN) {
      this.#failed(errno);
    }
    this.#pump();
  }

  #failed(errno: number): void {
    this.#error =
      errno === Errno.ENOSPC ? 'no room for fetched blocks: free some space' : 'the source has I/O errors';
    this.options.log.warn({ why: this.#error }, 'background copy waits');
    this.#after(RETRY_AFTER_ERROR_MS, () => {
      this.#error = null;
    });
  }

  #after(ms: number, first?: () => void): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      first?.();
      this.#pump();
    }, ms);
    this.#timer.unref();
  }

  /** Whether the rate limit lets one more fetch go; if not, it is tried again when it does. */
  #hasCredit(): boolean {
    if (this.#rateLimit === null) return true;
    const now = performance.now();
    const burst = Math.max(this.#rateLimit / 10, BULK_BLOCKS * BLOCK_BYTES);
    this.#credit = Math.min(burst, this.#credit + ((now - this.#creditAtMs) / 1000) * this.#rateLimit);
    this.#creditAtMs = now;
    if (this.#credit > 0) return true;
    if (this.#timer === undefined) this.#after(Math.max(1, (-this.#credit / this.#rateLimit) * 1000 + 1));
    return false;
  }

  #count(bytes: number, now: number): void {
    const decay = 2 ** (-(now - this.#rateAtMs) / RATE_HALF_LIFE_MS);
    this.#rate = this.#rate * decay + (bytes * Math.LN2 * 1000) / RATE_HALF_LIFE_MS;
    this.#rateAtMs = now;
  }
}
