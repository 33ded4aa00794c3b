/**
 * Read-ahead: the streams in which a guest reads, and what each is about to read. No I/O and no clock of its own.
 *
 * A stream is found by reads that had to wait: two that touch (forward or backward), or four at equal distances. From then on each of
 * its reads moves it, also those that find their blocks here. In front of it a *window* is fetched, which doubles while the guest still has to wait:
 * then the link's round trip is longer than the window lasts. Several streams take turns.
 *
 * Invariants
 * - A stream's reads lie on one side of `at`, what it has asked for on the other: forward (or strided) [at, asked), backward [asked, at).
 * - Nothing is asked for twice by one stream, unless the guest jumps over it.
 * - Bounded: STREAMS_MAX streams, the oldest makes room; RECENT_MAX reads that belong to none.
 */
import type { Run } from './zero-map.js';

/** The missing blocks of [first, end) that nobody fetches yet: the first run of them. */
export type FindRun = (first: number, end: number) => Run | undefined;

const STREAMS_MAX = 8;
const RECENT_MAX = 32;
/** Blocks in front of a stream: 256 KiB at least, 16 MiB at most. */
const WINDOW_BLOCKS_MIN = 64;
export const WINDOW_BLOCKS_MAX = 4096;
/** In reads as long as the last. */
const WINDOW_READS = 4;
/** Reads of one stream may overtake each other by so much. */
const SLACK_BLOCKS = 64;
/** From one read of a strided stream to the next, blocks. */
const STRIDE_BLOCKS_MAX = 4096;
/** Reads in front of a strided stream, at most. */
const STRIDE_READS_MAX = 256;
/** A stream that nobody read from for so long is over. */
export const STREAM_MS = 5_000;

interface Recent {
  readonly first: number;
  readonly end: number;
}

/** What comes next of one stream. */
abstract class Stream {
  protected window: number;
  #grownAt: number;
  usedAtMs: number;

  constructor(
    /** Where the guest is: see the invariants. */
    protected at: number,
    protected asked: number,
    window: number,
    nowMs: number,
  ) {
    this.window = Math.min(WINDOW_BLOCKS_MAX, window);
    this.#grownAt = at;
    this.usedAtMs = nowMs;
  }

  /** Moves the stream if the read belongs to it. */
  read(first: number, end: number, waited: boolean, nowMs: number): boolean {
    if (!this.moves(first, end)) return false;
    this.usedAtMs = nowMs;
    // Once a window: reads that wait together wait for the same reason.
    if (waited && Math.abs(this.at - this.#grownAt) >= this.window / 2) {
      this.#grownAt = this.at;
      this.window = Math.min(this.windowMax, this.window * 2);
    }
    return true;
  }

  protected get windowMax(): number {
    return WINDOW_BLOCKS_MAX;
  }

  protected abstract moves(first: number, end: number): boolean;
  abstract next(blocksMax: number, blocks: number, find: FindRun): Run | undefined;
}

class Forward extends Stream {
  protected moves(first: number, end: number): boolean {
    if (first < this.at - SLACK_BLOCKS || first > Math.max(this.asked, this.at) + SLACK_BLOCKS) return false;
    this.at = Math.max(this.at, end);
    return true;
  }

  next(blocksMax: number, blocks: number, find: FindRun): Run | undefined {
    const from = Math.max(this.asked, this.at);
    const target = Math.min(blocks, this.at + this.window);
    // Not block by block as the guest goes on.
    if (target - from < Math.min(blocksMax, this.window / 2) && target < blocks) return undefined;
    const run = from < target ? find(from, target) : undefined;
    this.asked = run === undefined ? Math.max(from, target) : run.end;
    return run;
  }
}

class Backward extends Stream {
  /** Of the piece that is asked for, from its start on: what is behind this. */
  #pieceAt = 0;
  #pieceEnd = 0;

  protected moves(first: number, end: number): boolean {
    if (end > this.at + SLACK_BLOCKS || end < Math.min(this.asked, this.at) - SLACK_BLOCKS) return false;
    this.at = Math.min(this.at, first);
    return true;
  }

  next(blocksMax: number, _blocks: number, find: FindRun): Run | undefined {
    const target = Math.max(0, this.at - this.window);
    for (;;) {
      const run = this.#pieceAt < this.#pieceEnd ? find(this.#pieceAt, this.#pieceEnd) : undefined;
      if (run !== undefined) {
        this.#pieceAt = run.end;
        return run;
      }
      const to = Math.min(this.asked, this.at);
      if (to <= target || (to - target < Math.min(blocksMax, this.window / 2) && target > 0))
        return undefined;
      this.#pieceAt = this.asked = Math.max(target, to - blocksMax);
      this.#pieceEnd = to;
    }
  }
}

class Strided extends Stream {
  constructor(
    at: number,
    private readonly step: number,
    private readonly length: number,
    nowMs: number,
  ) {
    super(at, at, Math.abs(step) * WINDOW_READS, nowMs);
  }

  protected override get windowMax(): number {
    return Math.min(
      Math.abs(this.step) * STRIDE_READS_MAX,
      (WINDOW_BLOCKS_MAX * Math.abs(this.step)) / this.length,
    );
  }

  protected moves(first: number): boolean {
    const steps = (first - this.at) / this.step;
    if (!Number.isInteger(steps) || steps <= 0 || steps > STRIDE_READS_MAX) return false;
    this.at = first;
    return true;
  }

  next(_blocksMax: number, blocks: number, find: FindRun): Run | undefined {
    for (;;) {
      const last = this.step > 0 ? Math.max(this.asked, this.at) : Math.min(this.asked, this.at);
      const first = last + this.step;
      if (Math.abs(first - this.at) > this.window || first < 0 || first + this.length > blocks)
        return undefined;
      this.asked = first;
      const run = find(first, first + this.length);
      if (run !== undefined) return run;
    }
  }
}

export class Streams {
  readonly #streams: Stream[] = [];
  #recent: Recent[] = [];
  #turn = 0;

  /** Of a volume of so many blocks. */
  constructor(private readonly blocks: number) {}

  /** Reads that find their blocks here matter, too. */
  get active(): boolean {
    return this.#streams.length > 0;
  }

  /** The guest reads [first, end); `waited`: some of it is missing. */
  read(first: number, end: number, waited: boolean, nowMs: number): void {
    for (const stream of this.#streams) if (stream.read(first, end, waited, nowMs)) return;
    if (!waited) return;
    const found = this.#find(first, end, nowMs);
    if (found === undefined) {
      this.#recent.push({ first, end });
      if (this.#recent.length > RECENT_MAX) this.#recent.shift();
      return;
    }
    if (this.#streams.length === STREAMS_MAX) {
      const oldest = this.#streams.reduce((a, b) => (b.usedAtMs < a.usedAtMs ? b : a));
      this.#streams.splice(this.#streams.indexOf(oldest), 1);
    }
    this.#streams.push(found);
  }

  #find(first: number, end: number, nowMs: number): Stream | undefined {
    const length = end - first;
    const window = Math.max(WINDOW_BLOCKS_MIN, WINDOW_READS * length);
    for (let index = this.#recent.length - 1; index >= 0; index--) {
      const other = this.#recent[index]!;
      if (other.end === first) {
        this.#recent.splice(index, 1);
        return new Forward(end, end, window, nowMs);
      }
      if (other.first === end) {
        this.#recent.splice(index, 1);
        return new Backward(first, first, window, nowMs);
      }
      const step = first - other.first;
      if (step !== 0 && Math.abs(step) <= STRIDE_BLOCKS_MAX && this.#wasAt(other.first - step, length)) {
        if (this.#wasAt(other.first - 2 * step, length)) return new Strided(first, step, length, nowMs);
      }
    }
    return undefined;
  }

  #wasAt(first: number, length: number): boolean {
    return this.#recent.some((other) => other.first === first && other.end - other.first === length);
  }

  /** What one of the streams is about to read, blocksMax blocks at most. */
  next(blocksMax: number, find: FindRun): Run | undefined {
    for (let count = this.#streams.length; count > 0; count--) {
      this.#turn = (this.#turn + 1) % this.#streams.length;
      const run = this.#streams[this.#turn]!.next(blocksMax, this.blocks, find);
      if (run !== undefined) return run;
    }
    return undefined;
  }

  /** Forgets the streams that are over. */
  expire(nowMs: number): void {
    for (let index = this.#streams.length - 1; index >= 0; index--)
      if (nowMs - this.#streams[index]!.usedAtMs > STREAM_MS) this.#streams.splice(index, 1);
  }

  clear(): void {
    this.#streams.length = 0;
    this.#recent = [];
  }
}
