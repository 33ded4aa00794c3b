/**
 * The background copy: brings every block here while the guest works. First what the guest's streams are about to read, then ranges that were
 * asked for, then what the order says, then all others, in ascending order.
 *
 * - Bytes in flight are bounded by a window that follows the link's rate and delay. What the guest waits for comes off it.
 * - Ranges that the source says are zero cost no data: they are marked, or punched where the image holds something.
 * - Before the takeover it may copy as well, though the source still changes: what it learned of the source's zeros holds until it is told what
 *   changed (`#dropped`), regions that are overwritten all the time wait, and what came is made durable now and then, so that the guest's first flush need not.
 * - What fails is passed over and tried again on the next round. The copy stops for a while when there is no room here, when
 *   the source is out of reach, when nothing but failures comes, and between two rounds if one had any. Failures are shown as long
 *   as they last, and end nothing.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { messageOf } from '../errors.js';
import { Errno } from '../nbd/constants.js';
import { BLOCK_BYTES, bytesOfBlocks } from '../volume/blocks.js';
import type { BlockStore } from '../volume/store.js';
import type { Fetcher } from './fetcher.js';
import type { Link } from './link.js';
import { Hot, Neighbours, type Order } from './order.js';
import { Overwritten } from './overwritten.js';
import { RateLimit } from './rate-limit.js';
import type { Replay } from './replay.js';
import { type Copying, type Seeder, SIFTED_BLOCKS_MAX } from './seeder.js';
import { SourceAllocation } from './source-allocation.js';
import { type FindRun, STREAM_MS, Streams } from './streams.js';
import { type LinkWindow, PIECE_BYTES_MAX } from './window.js';
import type { Run } from './zero-map.js';

/** Of the source, asked about at once. */
const HEAT_BYTES = 64 * 2 ** 30;
/** Ranges that may wait to be prefetched. */
const WANTED_MAX = 1024;
/** So many fetches failed one after the other: there is no point in trying the next at once. */
const FAILURES_MAX = 4;
/** So much is made durable at once, before the takeover. */
const COMMIT_BYTES = 32 << 20;
const UNCOMMITTED_BYTES_MAX = 4 * COMMIT_BYTES;
/** Blocks that the guest has in hand are looked at again after so long. */
const LOCKED_MS = 10;
/** The rate shown is an average over about so long. */
const RATE_HALF_LIFE_MS = 2_000;
/** The guest waited for a read so lately that it is likely to wait for the next one. */
const BUSY_MS = 1_000;

export type BackgroundState = 'running' | 'paused' | 'waiting' | 'done' | 'off';

/** There is no data up to here. */
interface Zeroes {
  readonly end: number;
}

function isZeroes(found: Run | Zeroes): found is Zeroes {
  return !('first' in found);
}

interface Wanted {
  first: number;
  readonly end: number;
  readonly resolve: (() => void) | null;
}

/**
 * hot: neighbours of what the guest waited for, then what the machine read first after its last move, then what it used at the source, then
 * ascending; recorded: the same without what it used; linear: ascending only.
 */
export type BackgroundOrder = 'hot' | 'recorded' | 'linear';

export interface BackgroundOptions {
  enabled: boolean;
  /** What streams of the guest are about to read is fetched, whether the copy is on or not. */
  readAhead: boolean;
  order: BackgroundOrder;
  replay: Replay;
  rateBytesPerSecond: number | null;
  /** What of the copy's blocks is looked for on this host first; default: nothing. */
  seeder?: Seeder | null;
  log: Logger;
  /** How long the copy stops after failures. */
  retryAfterErrorMs: number;
}

export class Background {
  #started = false;
  /** Copying before the takeover. */
  #ahead = false;
  /** A takeover is under way. */
  #held = false;
  readonly #overwritten = new Overwritten();
  /** Came since the last commit, while copying ahead. */
  #uncommittedBytes = 0;
  #committing = false;
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
  readonly #window: LinkWindow;
  readonly #streams: Streams;
  readonly #neighbours = new Neighbours();
  readonly #hot = new Hot();
  /** Asked for: the copy begins when it is here. */
  #replayDue = false;
  /** Asked for: what no record names waits for the first answer. */
  #heatDue = false;
  #learnEra = 0;
  /** In this order, before all others. */
  readonly #orders: readonly Order[];
  readonly #allocation: SourceAllocation;
  readonly #limit: RateLimit;
  /** When the guest had to wait last. */
  #waitedAtMs = Number.NEGATIVE_INFINITY;
  #pumpDue = false;
  #streamTimer: NodeJS.Timeout | undefined;
  /** A run of zeros is being marked; one at a time, as each may keep a thread and a range lock for long. */
  #zeroing = false;
  #rate = 0;
  #rateAtMs = 0;
  #rateBeganMs = 0;
  readonly #find: FindRun = (first, end) => this.#findRun(first, end, this.#window.pieceBytes / BLOCK_BYTES);
  readonly #seeder: Seeder | null;
  /** As #find, for what nobody asked for: without what is being looked for on this host. */
  readonly #findForCopy: FindRun;

  constructor(
    private readonly store: BlockStore,
    private readonly fetcher: Fetcher,
    private readonly link: Link,
    private readonly options: BackgroundOptions,
  ) {
    this.#window = link.window;
    const seeder = options.seeder ?? null;
    this.#seeder = seeder;
    const findSifted: FindRun = (first, end) => this.#findRun(first, end, SIFTED_BLOCKS_MAX);
    this.#findForCopy =
      seeder === null
        ? this.#find
        : (first, end) => seeder.untaken(first, end, seeder.active ? findSifted : this.#find);
    const replaying = [this.#neighbours, options.replay.order];
    this.#orders = { hot: [...replaying, this.#hot], recorded: replaying, linear: [] }[options.order];
    this.#limit = new RateLimit(options.rateBytesPerSecond, PIECE_BYTES_MAX, () => this.#pump());
    this.#streams = new Streams(store.blocks);
    store.onDrop = (runs) => this.#dropped(runs);
    this.#allocation = new SourceAllocation(link, store.image.size, options.log, (unreachable) => {
      if (unreachable) this.#failed(Errno.EIO);
      this.#pump();
    });
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

  get order(): BackgroundOrder {
    return this.options.order;
  }

  get rateLimit(): number | null {
    return this.#limit.bytesPerSecond;
  }

  /** Bytes per second that came lately. */
  get rate(): number {
    const now = performance.now();
    const decayed = this.#rate * 2 ** (-(now - this.#rateAtMs) / RATE_HALF_LIFE_MS);
    // A copy that began a moment ago has not had the time to reach its average.
    const begun = 1 - 2 ** (-(now - this.#rateBeganMs) / RATE_HALF_LIFE_MS);
    return begun > 0 ? decayed / begun : 0;
  }

  /** Of a standby: nothing more is to be copied before the takeover, as far as the source has told. */
  get caughtUp(): boolean {
    if (!this.#started || this.#zeroing || this.#inFlightBytes > 0) return false;
    return this.#find(0, this.store.blocks) === undefined;
  }

  /** All is here of what the machine reads at the source, as far as that is known. */
  get hotDone(): boolean {
    return this.#started && !this.#replayDue && !this.#heatDue && this.#orders.every((order) => order.done);
  }

  /** Copy. `ahead`: before the takeover, while the source may change; otherwise it stands still from now on. */
  start(ahead = false): void {
    if (this.#ahead && !ahead) this.#overwritten.clear();
    this.#ahead = ahead;
    this.#held = false;
    if (!this.#started) {
      this.#rateBeganMs = performance.now();
      // Both at once: each takes a round trip.
      if (this.options.enabled) void this.#allocation.ask(0);
      if (this.options.order !== 'linear' && this.options.enabled) void this.#learn();
    }
    this.#started = true;
    this.#limit.start();
    this.#seeder?.start(this.#asCopying());
    this.#pump();
  }

  /** The source changed these blocks (BlockStore.drop): what it said of its zeros before may be untrue, and what was copied is to be copied again. */
  #dropped(runs: readonly number[] | null): void {
    this.#allocation.forget();
    this.#cursor = 0;
    for (const order of this.#orders) order.again();
    if (runs !== null) this.#overwritten.note(runs);
    this.#pump();
  }

  /** The first run of [first, end) to copy, `most` blocks long at most. */
  #findRun(first: number, end: number, most: number): Run | undefined {
    const stop = Math.min(end, this.store.blocks);
    if (!this.#ahead) return this.fetcher.nextRun(first, stop, most);
    for (let from = this.#overwritten.past(first); from < stop; ) {
      const run = this.fetcher.nextRun(from, stop, most);
      if (run === undefined) return undefined;
      from = this.#overwritten.past(run.first);
      if (from === run.first) return { first: from, end: this.#overwritten.until(from, run.end) };
    }
    return undefined;
  }

  #asCopying(): Copying {
    const isIdle = (): boolean => this.#inFlightBytes === 0;
    const { link } = this;
    return {
      get idle() {
        return isIdle();
      },
      get linkRate() {
        return link.window.bytesPerMs;
      },
      pump: () => this.#pump(),
      asked: (bytes) => this.#limit.spend(bytes),
      seeded: (bytes) => this.#count(bytes, performance.now()),
    };
  }

  /**
   * No more until `start`. What was learned of the source is forgotten, as it may change meanwhile, and who waits for a range is
   * let go.
   */
  stop(): void {
    this.#started = false;
    this.#ahead = false;
    this.#held = false;
    this.#overwritten.clear();
    this.#seeder?.stop();
    this.#allocation.forget();
    this.#learnEra++;
    this.#replayDue = false;
    this.#heatDue = false;
    for (const order of this.#orders) order.clear();
    this.#streams.clear();
    this.#watch();
    this.#cursor = 0;
    this.#forgive();
    this.#limit.stop();
    for (const { resolve } of this.#wanted.splice(0)) resolve?.();
  }

  /** Nothing more is begun until `start` or `stop`: the machine stands still, and waits for other answers of the source. */
  hold(): void {
    this.#held = true;
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
    this.#limit.set(bytesPerSecond);
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

  /** The guest reads blocks of [first, end), and waits for some. */
  missed(first: number, end: number): void {
    if (!this.#started) return;
    const now = performance.now();
    this.#waitedAtMs = now;
    this.#neighbours.note(first);
    if (this.options.readAhead) {
      this.#streams.read(first, end, true, now);
      this.#watch();
    }
    this.#pumpSoon();
  }

  /** Reads that need not wait are told as well, while there are streams. */
  #watch(): void {
    if (!this.#streams.active) {
      this.store.watch = null;
      clearTimeout(this.#streamTimer);
      this.#streamTimer = undefined;
    } else if (this.#streamTimer === undefined) {
      this.store.watch = this.#onHit;
      this.#streamTimer = setTimeout(() => {
        this.#streamTimer = undefined;
        this.#streams.expire(performance.now());
        this.#watch();
      }, STREAM_MS).unref();
    }
  }

  /** The guest read blocks that are here. */
  readonly #onHit = (first: number, end: number): void => {
    this.#streams.read(first, end, false, performance.now());
    this.#pumpSoon();
  };

  /** Not in the midst of the guest's request, and once for all of a turn. */
  #pumpSoon(): void {
    if (this.#pumpDue) return;
    this.#pumpDue = true;
    setImmediate(() => {
      this.#pumpDue = false;
      this.#pump();
    });
  }

  #pump(): void {
    if (!this.#started || this.#held || this.store.presence === null) return;
    for (;;) {
      if (this.#ahead && this.#uncommittedBytes >= UNCOMMITTED_BYTES_MAX) return; // the disk is slower than the link
      const piece = this.#window.pieceBytes;
      if (this.#inFlightBytes > 0 && this.#inFlightBytes + piece > this.#allowance()) return;
      const run = this.#next();
      if (run === undefined) return;
      void this.#copy(run.first, run.end);
    }
  }

  /** The guest's own reads come first. */
  #allowance(): number {
    const { demandsInFlight, demandBytesInFlight } = this.fetcher;
    const busy = demandsInFlight > 0 || performance.now() - this.#waitedAtMs < BUSY_MS;
    return this.#window.bytes(busy) - demandBytesInFlight;
  }

  #next(): Run | undefined {
    const ahead = this.#streams.active ? this.#nextOf(this.#streams) : undefined;
    if (ahead !== undefined) return ahead;
    if (!this.#limit.allows) return undefined;
    for (let wanted = this.#wanted[0]; wanted !== undefined; wanted = this.#wanted[0]) {
      const run = this.#find(wanted.first, wanted.end);
      if (run !== undefined) {
        wanted.first = run.end;
        return run;
      }
      this.#wanted.shift();
      wanted.resolve?.();
    }
    const copies = this.options.enabled && !this.#paused && !this.#blocked && !this.#replayDue;
    if (!copies) return undefined;
    return this.#seeder === null ? this.#nextOfCopy() : this.#seeder.next(this.#find, this.#pick);
  }

  readonly #pick = (): Run | undefined => this.#nextOfCopy();

  /** What a stream is about to read, without what is known to be zeros there. */
  #nextOf(streams: Streams): Run | undefined {
    for (;;) {
      const run = streams.next(this.#window.pieceBytes / BLOCK_BYTES, this.#find);
      if (run === undefined || !this.#allocation.told) return run;
      const zero = this.#allocation.around(run.first)?.next(run.first);
      if (zero === undefined || zero.first >= run.end) return run;
      if (zero.first > run.first) return { first: run.first, end: zero.first };
      if (!this.#zeroing) void this.#markZeroes(run.first, zero.end);
    }
  }

  /** What the machine read first, and what it used at the source. Hints: without them the copy goes on all the same. */
  async #learn(): Promise<void> {
    const era = ++this.#learnEra;
    this.#replayDue = true;
    this.#heatDue = this.options.order === 'hot';
    const heat = this.#learnHeat(era); // both at once: each takes a round trip
    await this.options.replay.learn(() => era === this.#learnEra);
    if (era === this.#learnEra) {
      this.#replayDue = false;
      this.#pump();
    }
    await heat;
  }

  async #learnHeat(era: number): Promise<void> {
    const { size } = this.store.image;
    try {
      for (let offset = 0; this.options.order === 'hot' && offset < size && era === this.#learnEra; ) {
        const extents = await this.link.heat(offset, Math.min(HEAT_BYTES, size - offset));
        if (extents === null || extents.length === 0 || era !== this.#learnEra) break;
        this.#hot.learn(offset, extents);
        for (const { length } of extents) offset += length;
        this.#heatLearned(era);
      }
    } catch (error) {
      this.options.log.debug({ why: messageOf(error) }, 'the source does not tell what its machine used');
    }
    this.#heatLearned(era);
  }

  #heatLearned(era: number): void {
    if (era !== this.#learnEra) return;
    this.#heatDue = false;
    this.#pump();
  }

  #nextOfCopy(): Run | undefined {
    for (const order of this.#orders) {
      for (let run = order.next(this.#findForCopy); run !== undefined; run = order.next(this.#findForCopy)) {
        const data = this.#withoutZeroes(run);
        if (data === undefined) return undefined;
        order.taken(data.end);
        if (!isZeroes(data)) return data;
      }
    }
    return this.#heatDue ? undefined : this.#nextLinear();
  }

  #nextLinear(): Run | undefined {
    const { blocks } = this.store;
    for (let wrapped = false; ; ) {
      const run = this.#findForCopy(this.#cursor, blocks);
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
      this.#cursor = data.end;
      if (!isZeroes(data)) return data;
    }
  }

  /**
   * The part of a run that has data. Where its allocation is unknown, that is asked for first (undefined: wait); a run that
   * begins with zeros has them marked, and the search goes on behind them.
   */
  #withoutZeroes(run: Run): Run | Zeroes | undefined {
    const allocation = this.#allocation;
    if (!allocation.told) return run;
    const known = allocation.around(run.first);
    if (known === undefined) {
      void allocation.ask(run.first);
      return undefined;
    }
    const end = Math.min(run.end, known.to);
    const zero = known.next(run.first);
    if (zero === undefined || zero.first >= end) return { first: run.first, end };
    if (zero.first > run.first) return { first: run.first, end: zero.first };
    if (this.#zeroing) return undefined;
    void this.#markZeroes(run.first, zero.end);
    return { end: zero.end };
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

  async #copy(first: number, end: number): Promise<void> {
    const bytes = bytesOfBlocks(first, end, this.store.image.size);
    this.#inFlightBytes += bytes;
    this.#limit.spend(bytes);
    const full = this.#inFlightBytes + bytes > this.#allowance();
    const mark = this.#window.sent();
    const began = performance.now();
    const errno = await this.fetcher.fetch('bulk', first, end);
    this.#inFlightBytes -= bytes;
    const now = performance.now();
    if (errno === Errno.OK) {
      this.#failuresInARow = 0;
      if (!this.#failedThisRound) this.#error = null;
      this.#window.answered(bytes, now - began, mark, full, now);
      this.#count(bytes, now);
      if (this.#ahead) void this.#commitNowAndThen(bytes);
    } else if (errno === Errno.ESHUTDOWN) {
      return; // the link is closed
    } else {
      this.#failed(errno);
    }
    this.#pump();
  }

  /** The guest's first flush behind the takeover makes durable what was copied ahead: there should be little left. */
  async #commitNowAndThen(bytes: number): Promise<void> {
    this.#uncommittedBytes += bytes;
    if (this.#committing || this.#uncommittedBytes < COMMIT_BYTES) return;
    this.#committing = true;
    const begun = this.#uncommittedBytes;
    await this.store.commit();
    this.#uncommittedBytes -= begun;
    this.#committing = false;
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

  #count(bytes: number, now: number): void {
    const decay = 2 ** (-(now - this.#rateAtMs) / RATE_HALF_LIFE_MS);
    this.#rate = this.#rate * decay + (bytes * Math.LN2 * 1000) / RATE_HALF_LIFE_MS;
    this.#rateAtMs = now;
  }
}
