/**
 * In which order the background copy brings what nobody asked for: policies, each of which says what comes next in constant time. What none of
 * them names comes in ascending order (`Background`), so that all blocks come whatever they do.
 *
 * A policy names a run until it is told that it was `taken`, and then goes on behind it, though it may not have come: what fails, and would
 * fail again, holds up nothing.
 */
import type { Extent } from '../nbd/client/client.js';
import { RANKED_REGIONS_MAX } from '../volume/access-order.js';
import { BLOCK_BYTES } from '../volume/blocks.js';
import type { FindRun } from './streams.js';
import type { Run } from './zero-map.js';

export interface Order {
  /** A run of missing blocks that should come now; undefined: none left. */
  next(find: FindRun): Run | undefined;
  /** The run it named is seen to, up to here. */
  taken(end: number): void;
  /** Nothing is left of what should be there before the machine moves. */
  readonly done: boolean;
  /** Begins with the first region again: some of what came was dropped. */
  again(): void;
  /** Forgets everything. */
  clear(): void;
}

/** One region after the other, each from its start to its end. */
abstract class Regions implements Order {
  /** Of the current region: what is before this is seen to. */
  #at = 0;

  /** The region that is next; undefined: none. */
  protected abstract current(): number | undefined;
  protected abstract drop(): void;

  next(find: FindRun): Run | undefined {
    for (let region = this.current(); region !== undefined; region = this.current()) {
      const end = (region + 1) * REGION_BLOCKS;
      const from = this.#at > region * REGION_BLOCKS && this.#at <= end ? this.#at : region * REGION_BLOCKS;
      const run = from < end ? find(from, end) : undefined;
      if (run !== undefined) return run;
      this.drop();
      this.#at = 0;
    }
    return undefined;
  }

  taken(end: number): void {
    this.#at = end;
  }

  get done(): boolean {
    return this.current() === undefined;
  }

  again(): void {
    this.#at = 0;
  }

  clear(): void {
    this.#at = 0;
  }
}

/** What a read is likely to be followed by lies near it: 256 KiB. */
export const REGION_BLOCKS = 64;
const REGION_BYTES = REGION_BLOCKS * BLOCK_BYTES;
const NEIGHBOURS_MAX = 256;
/** Regions whose heat is remembered, at most: the hottest. */
export const HOT_REGIONS_MAX = 1 << 18;

/** What one read weighs, in writes. */
const SCORE_READ = 0x10000;

/** The neighbours of what the guest had to wait for: the latest first. */
export class Neighbours extends Regions {
  /** Regions, the latest last; a region may be there twice, and is found empty the second time. */
  #regions: number[] = [];

  /** The guest waited for this block. */
  note(block: number): void {
    const region = Math.floor(block / REGION_BLOCKS);
    if (this.#regions.at(-1) === region) return;
    this.#regions.push(region);
    if (this.#regions.length > 2 * NEIGHBOURS_MAX) this.#regions.splice(0, NEIGHBOURS_MAX);
  }

  protected current(): number | undefined {
    return this.#regions.at(-1);
  }

  protected drop(): void {
    this.#regions.pop();
  }

  override clear(): void {
    super.clear();
    this.#regions = [];
  }
}

/**
 * The regions that the machine used at the source, by `blockferry:heat`: what was read most first, then what was only written. What was only
 * written is likely to be written again before it is read, and need not come at all then.
 */
export class Hot extends Regions {
  #regions: number[] = [];
  #scores: number[] = [];
  /** Of the sorted regions; -1: they are not. */
  #next = -1;

  /** Extents of heat that follow one another from `offset` on. */
  learn(offset: number, extents: readonly Extent[]): void {
    this.#next = -1;
    let at = offset;
    for (const { length, flags } of extents) {
      if (flags !== 0) {
        const score = (flags & 0xffff) * SCORE_READ + (flags >>> 16);
        const last = Math.floor((at + length - 1) / REGION_BYTES);
        for (let region = Math.floor(at / REGION_BYTES); region <= last; region++) this.#add(region, score);
      }
      at += length;
    }
  }

  #add(region: number, score: number): void {
    this.#regions.push(region);
    this.#scores.push(score);
    if (this.#regions.length >= 2 * HOT_REGIONS_MAX) this.#sort();
  }

  #sort(): void {
    const order = Uint32Array.from(this.#regions.keys());
    const scores = this.#scores;
    const regions = this.#regions;
    order.sort((a, b) => scores[b]! - scores[a]! || regions[a]! - regions[b]!);
    const kept = order.subarray(0, HOT_REGIONS_MAX);
    this.#regions = Array.from(kept, (index) => regions[index]!);
    this.#scores = Array.from(kept, (index) => scores[index]!);
  }

  protected current(): number | undefined {
    if (this.#next === -1) {
      this.#sort();
      this.#next = 0;
    }
    return this.#regions[this.#next];
  }

  protected drop(): void {
    this.#next++;
  }

  override again(): void {
    super.again();
    if (this.#next > 0) this.#next = 0;
  }

  /** Of what the machine read at the source; what it only wrote may come later. */
  override get done(): boolean {
    const region = this.current();
    return region === undefined || this.#scores[this.#next]! < SCORE_READ;
  }

  override clear(): void {
    super.clear();
    this.#regions = [];
    this.#scores = [];
    this.#next = -1;
  }
}

/**
 * The regions that the machine read first after its last move, in that order: by `blockferry:first-access`, or as a file has it. A rank is a
 * place, so that nothing need be sorted; what lies between two that are taken is passed over once.
 */
export class Recorded extends Regions {
  /** By rank, less one: the region's number and one more; 0: none. Empty while nothing was learned. */
  #places = new Uint32Array(0);
  #size = 0;
  #next = 0;
  /** Behind the last place that is taken. */
  #end = 0;

  /** Regions that have a place. */
  get size(): number {
    return this.#size;
  }

  /** Extents of `blockferry:first-access` that follow one another from `offset` on. No two regions have the same rank. */
  learn(offset: number, extents: readonly Extent[]): void {
    let at = offset;
    for (const { length, flags } of extents) {
      if (flags !== 0) this.put(Math.floor(at / REGION_BYTES), flags);
      at += length;
    }
  }

  /** A rank beyond those that anybody gives is passed over. */
  put(region: number, rank: number): void {
    if (rank > RANKED_REGIONS_MAX) return;
    if (this.#places.length === 0) this.#places = new Uint32Array(RANKED_REGIONS_MAX);
    const place = rank - 1;
    if (this.#places[place] === 0) this.#size++;
    this.#places[place] = region + 1;
    this.#next = Math.min(this.#next, place);
    this.#end = Math.max(this.#end, rank);
  }

  /** In the order of their ranks. */
  *regions(): Iterable<number> {
    for (let place = 0; place < this.#end; place++) {
      const region = this.#places[place]! - 1;
      if (region >= 0) yield region;
    }
  }

  protected current(): number | undefined {
    while (this.#next < this.#end && this.#places[this.#next] === 0) this.#next++;
    return this.#next < this.#end ? this.#places[this.#next]! - 1 : undefined;
  }

  protected drop(): void {
    this.#next++;
  }

  override again(): void {
    super.again();
    this.#next = 0;
  }

  override clear(): void {
    super.clear();
    this.#places = new Uint32Array(0);
    this.#size = 0;
    this.#next = 0;
    this.#end = 0;
  }
}
