/**
 * What the background copy asks before it fetches: whether a block is in a seed on this host. Runs that the copy would fetch next are *sifted*: their
 * hashes come from the source, the seeds are looked through, what is found is filled, and only what is left is given back to be fetched.
 *
 * Invariants
 * - Filled is only content that was read here and hashed to what the source says the block has, by all of SHA-256. The source is believed about the
 *   hash as it is believed about the block: who lies about one could lie about the other.
 * - A hash is as old as a read of the block: it belongs to the epoch that was there before it was asked for, and is used at once or not at all.
 * - Only the copy waits: what a guest waits for, and what a stream is about to read, never comes here, and may come over the link at the same
 *   time. A fill leaves alone what came otherwise.
 * - A run that is sifted is *taken*: the copy does not find it. It is given back in any case, when it is sifted, or when the copy has been idle
 *   for its sake for too long, whoever is to blame (see #judge).
 */
import type { Logger } from 'pino';
import { Errno } from '../nbd/constants.js';
import { HASH_BYTES, ZERO_HASH } from '../volume/block-hash.js';
import { BLOCK_BYTES, bytesOfBlocks } from '../volume/blocks.js';
import type { BlockStore } from '../volume/store.js';
import type { Traffic } from './fetcher.js';
import { InFlight } from './in-flight.js';
import type { SourceHashes } from './seed-hashes.js';
import { equalHashes } from './seed-index.js';
import type { Found, SeedFinder } from './seeds.js';
import type { FindRun } from './streams.js';
import type { Run } from './zero-map.js';

/** Blocks of one run: 256 KiB, whose hashes are 2 KiB. */
export const SIFTED_BLOCKS_MAX = 64;
/** Taken, in all. */
const TAKEN_BYTES_MAX = 16 << 20;
const TAKEN_RUNS_MAX = 512;
/** Of what is taken, so much is expected to be left for the link: what covers a long round trip, and no more, as what is more urgent queues behind it. */
const LEFT_BYTES_MIN = 1 << 20;
const LEFT_MS = 400;
/** The weight of one run in the share that is left. */
const SHARE_WEIGHT = 1 / 16;
const SHARE_MIN = 1 / 64;
/** The copy may be idle for so long over what it would have fetched meanwhile. */
const LOST_MS_MAX = 2_000;
const LOOK_MS = 100;
/** What an idle copy is thought to miss, bytes a millisecond: no less than this where the link's rate is not known, and no more. */
const MISSED_RATE_UNKNOWN = 5_000;
const MISSED_RATE_MAX = 50_000;

/** What the sifting needs to know of the copy. */
export interface Copying {
  /** It has nothing under way. */
  readonly idle: boolean;
  /** Of the link, bytes a millisecond; 0: not known. */
  readonly linkRate: number;
  /** There may be something to fetch again. */
  pump(): void;
  /** So much will cross the link for hashes. */
  asked(bytes: number): void;
  /** So much was found here. */
  seeded(bytes: number): void;
}

interface Sift {
  readonly run: Run;
  /** It was given back. */
  over: boolean;
}

export class Seeder {
  #copying: Copying | null = null;
  #taken = new InFlight();
  #takenBytes = 0;
  readonly #sifts = new Set<Sift>();
  /** Sifted: to be fetched, if still missing. */
  #ready: Run[] = [];
  #timer: NodeJS.Timeout | undefined;
  /** Of what was sifted lately, the share that had to be fetched. */
  #leftShare = 0.5;
  #lostMs = 0;
  #lookedAtMs = 0;

  constructor(
    private readonly store: BlockStore,
    private readonly traffic: Traffic,
    private readonly hashes: Pick<
      SourceHashes,
      'usable' | 'of' | 'giveUp' | 'start' | 'stop' | 'close' | 'wireBytes'
    >,
    private readonly seeds: SeedFinder,
    private readonly log: Logger,
  ) {}

  /** What was received for hashes. */
  get wireBytes(): number {
    return this.hashes.wireBytes;
  }

  /** The source stands still from now on. */
  start(copying: Copying): void {
    this.#copying = copying;
    this.hashes.start();
  }

  /** It may change: nothing that was learned of it counts any more. */
  stop(): void {
    this.hashes.stop();
    for (const sift of this.#sifts) sift.over = true;
    this.#sifts.clear();
    this.#ready = [];
    this.#taken = new InFlight();
    this.#takenBytes = 0;
    this.#lostMs = 0;
    this.#look();
  }

  async close(): Promise<void> {
    this.stop();
    this.seeds.release();
    await this.hashes.close();
  }

  /** Runs are sifted before they are fetched. */
  get active(): boolean {
    return this.#copying !== null && this.hashes.usable && this.seeds.usable;
  }

  /** The first run of `find` in [first, end) that is not taken. */
  untaken(first: number, end: number, find: FindRun): Run | undefined {
    for (let from = first; from < end; ) {
      const run = find(from, end);
      if (run === undefined) return undefined;
      from = this.#taken.nextIdle(run.first);
      if (from === run.first) return { first: from, end: this.#taken.nextBusy(from, run.end) };
    }
    return undefined;
  }

  /** What to fetch next: of what was sifted, what `find` still finds missing. `pick` gives what the copy would fetch next without seeds. */
  next(find: FindRun, pick: () => Run | undefined): Run | undefined {
    while (this.active && this.#hasRoom) {
      const run = pick();
      if (run === undefined) break;
      void this.#sift(run);
    }
    for (let run = this.#ready[0]; run !== undefined; run = this.#ready[0]) {
      const left = find(run.first, run.end);
      const end = left?.end ?? run.end;
      this.#giveBack(run.first, end);
      run.first = end;
      if (run.first === run.end) this.#ready.shift();
      if (left !== undefined) return left;
    }
    return this.active ? undefined : pick();
  }

  get #hasRoom(): boolean {
    const left = Math.max(LEFT_BYTES_MIN, LEFT_MS * (this.#copying?.linkRate ?? 0));
    const bytesMax = Math.min(TAKEN_BYTES_MAX, left / Math.max(SHARE_MIN, this.#leftShare));
    return this.#takenBytes < bytesMax && this.#sifts.size + this.#ready.length < TAKEN_RUNS_MAX;
  }

  #giveBack(first: number, end: number): void {
    this.#taken.unmark(first, end);
    this.#takenBytes -= (end - first) * BLOCK_BYTES;
  }

  async #sift({ first, end }: Run): Promise<void> {
    const sift: Sift = { run: { first, end }, over: false };
    this.#taken.mark(first, end);
    this.#takenBytes += (end - first) * BLOCK_BYTES;
    this.#sifts.add(sift);
    this.#look();
    const { epoch } = this.store;
    this.#copying?.asked((end - first) * HASH_BYTES);
    const hashes = await this.hashes.of(first, end);
    const filled = hashes === null || sift.over ? 0 : await this.#fillWhatIsHere(sift, epoch, hashes);
    if (sift.over) return;
    this.#over(sift);
    this.#leftShare += (1 - filled / (end - first) - this.#leftShare) * SHARE_WEIGHT;
    this.#lostMs = Math.max(0, this.#lostMs - ((end - first) * BLOCK_BYTES) / this.#missedRate);
    this.#copying?.pump();
  }

  #over(sift: Sift): void {
    sift.over = true;
    this.#sifts.delete(sift);
    this.#ready.push(sift.run);
    this.#look();
  }

  /** Resolves with the number of blocks. */
  async #fillWhatIsHere(sift: Sift, epoch: number, hashes: Uint8Array): Promise<number> {
    let filled = 0;
    const { first, end } = sift.run;
    const { size } = this.store.image;
    const bytes = bytesOfBlocks(first, end, size);
    const found = await this.seeds.find(hashes, bytes);
    for (let block = first; block < end; ) {
      const kind = kindOf(hashes, found, block - first);
      let past = block + 1;
      while (past < end && kindOf(hashes, found, past - first) === kind) past++;
      if (sift.over || epoch !== this.store.epoch) return filled;
      if (kind !== 'missing') {
        // What could not be written is fetched, and then the copy sees to it.
        if ((await this.#fill(epoch, block, past, first, found)) !== Errno.OK) return filled;
        filled += past - block;
      }
      block = past;
    }
    return filled;
  }

  /** Blocks of zeros, where `found` has nothing. Resolves with an errno. */
  async #fill(epoch: number, first: number, end: number, base: number, found: Found | null): Promise<number> {
    const bytes = bytesOfBlocks(first, end, this.store.image.size);
    if (found === null || found.found[first - base] === 0) {
      const errno = await this.store.fillZeroes(epoch, first, end);
      if (errno === Errno.OK) this.traffic.zeroBytes += bytes;
      return errno;
    }
    const errno = await this.store.fillLater(epoch, first, end, found.content, (first - base) * BLOCK_BYTES);
    if (errno === Errno.OK) {
      this.traffic.seedBytes += bytes;
      this.#copying?.seeded(bytes);
    }
    return errno;
  }

  get #missedRate(): number {
    const { linkRate } = this.#copying ?? { linkRate: 0 };
    return linkRate === 0 ? MISSED_RATE_UNKNOWN : Math.min(linkRate, MISSED_RATE_MAX);
  }

  /** While something is sifted, whether it pays is looked at now and then. */
  #look(): void {
    if (this.#sifts.size === 0) {
      clearInterval(this.#timer);
      this.#timer = undefined;
    } else if (this.#timer === undefined) {
      this.#lookedAtMs = performance.now();
      this.#timer = setInterval(() => this.#judge(), LOOK_MS);
      this.#timer.unref();
    }
  }

  /**
   * Counts how long the copy has been idle for the sake of sifting, less the time in which the link would have brought what was sifted. So
   * neither a source that gives no hashes, or few, nor a seed on a disk that hangs keeps the copy for long: everything is given back, and after
   * a while, longer each time, it is tried again.
   */
  #judge(): void {
    const now = performance.now();
    const passedMs = Math.min(now - this.#lookedAtMs, 2 * LOOK_MS); // not those in which this very thread did not get round to it
    this.#lookedAtMs = now;
    if (this.#copying === null || !this.#copying.idle || this.#ready.length > 0) return;
    this.#lostMs += passedMs;
    if (this.#lostMs <= LOST_MS_MAX) return;
    this.#lostMs = 0;
    this.log.debug('sifting by hashes takes longer than to fetch');
    this.hashes.giveUp('to look for blocks in the seeds takes longer than to fetch them');
    for (const sift of [...this.#sifts]) this.#over(sift);
    this.#copying.pump();
  }
}

/** What is to be done with block `index` of a run. */
function kindOf(hashes: Uint8Array, found: Found | null, index: number): 'found' | 'zeros' | 'missing' {
  if (found?.found[index] === 1) return 'found';
  return equalHashes(hashes, index * HASH_BYTES, ZERO_HASH, 0) ? 'zeros' : 'missing';
}
