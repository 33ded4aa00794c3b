/**
 * First access: in which order a machine first reads the regions of its disk after a takeover, so that the next move of the volume, or of
 * another one made of the same template, brings them in that order. Also called the record.
 *
 * Invariants
 * - Recorded is what a machine waits for at a destination: READs, and blocks that a WRITE covers only in part. A WRITE of whole blocks needs
 *   nothing of the source; nor do TRIM and WRITE_ZEROES, but for their edges, which are too rare to count, and what is known to be a hole.
 * - The guest's device tells of requests that have to wait, in their order; these have left the fast path already. What was read without waiting
 *   costs the data plane nothing: each second a look at the heat finds the regions that became warm. Among those the order is the one of
 *   the move before, which has brought them in time, then ascending.
 * - A look takes LOOK_MS_MAX at most, and goes on where it was a second later: that is a look at all of a TiB each second.
 * - A takeover begins it anew. It ends with the relocation, or RECORD_MS_MIN after the takeover if that is later, since the next link may
 *   be slower; when the volume leaves; and when it is full.
 * - The record of the move before (`earlier`) counts as long as this one is trivial: a machine that did next to nothing while it moved, or is moved
 *   on at once, is not forgotten.
 * - It is a hint. Nothing that must be right may depend on it.
 */
import { AccessOrder } from './access-order.js';
import { BLOCK_BYTES } from './blocks.js';
import { type Heat, REGION_BYTES } from './heat.js';
import type { Phase } from './phase.js';

/** The least time that is recorded, if the volume stays so long: what a machine takes to start. */
export const RECORD_MS_MIN = 120_000;
/** A record of fewer regions (16 MiB) says little: a longer one of the move before counts. */
export const TRIVIAL_REGIONS = 64;

const LOOK_MS_MAX = 1;
/** Steps between two looks at the clock. */
const CLOCK_AFTER = 64;
/** Cold regions that are passed over in one step. */
const COLD_REGIONS_MAX = 1 << 16;
/** Regions that one look finds, at most: they are sorted in one go. */
const FOUND_MAX = 1024;

export class FirstAccess {
  readonly #own: AccessOrder;
  readonly #earlier: AccessOrder;
  #phase: Phase | null = null;
  #recording = false;
  #recordedUntilMs = Number.NEGATIVE_INFINITY;
  /** The region at which the next look begins. */
  #at = 0;
  /** What the heat had counted when the last look at region 0 began. */
  #counted = -1;
  /** Changes so far: whether it must be saved. */
  #changes = 0;

  constructor(private readonly heat: Heat) {
    this.#own = new AccessOrder(heat.regions);
    this.#earlier = new AccessOrder(heat.regions);
  }

  get own(): AccessOrder {
    return this.#own;
  }

  /** What the move before recorded. */
  get earlier(): AccessOrder {
    return this.#earlier;
  }

  /** What the next move is told. */
  get told(): AccessOrder {
    return isTrivial(this.#own.size, this.#earlier.size) ? this.#earlier : this.#own;
  }

  get changes(): number {
    return this.#changes;
  }

  get recording(): boolean {
    return this.#recording;
  }

  /** The volume is in this phase from now on. */
  follow(phase: Phase): void {
    const before = this.#phase;
    if (phase === before) return;
    this.#phase = phase;
    if (phase === 'relocating') {
      if (before === 'standby' && this.#own.size > 0) {
        this.#own.clear();
        this.#changes++;
      }
      this.#recordedUntilMs = performance.now() + RECORD_MS_MIN;
      this.#recording = !this.#own.full;
    } else if (phase !== 'plain') {
      this.look();
      this.#recording = false;
    }
  }

  /** The machine's READ of this range has to wait. */
  readWaits(offset: number, length: number): void {
    if (!this.#recording) return;
    const last = Math.floor((offset + length - 1) / REGION_BYTES);
    for (let region = Math.floor(offset / REGION_BYTES); region <= last; region++) this.#add(region);
  }

  /** Likewise its WRITE, whose edges may need what is at the source. */
  writeWaits(offset: number, length: number): void {
    if (!this.#recording) return;
    const past = offset + length;
    if (offset % BLOCK_BYTES !== 0) this.#add(Math.floor(offset / REGION_BYTES));
    if (past % BLOCK_BYTES !== 0) this.#add(Math.floor((past - 1) / REGION_BYTES));
  }

  #add(region: number): void {
    const before = this.#own.size;
    this.#own.add(region);
    if (this.#own.size > before) this.#changes++;
    if (this.#own.full) this.#recording = false;
  }

  /** Adds what was read since the last look. Due each second, before the heat decays. */
  look(): void {
    if (!this.#recording) return;
    const found = this.#find();
    if (found.length > 1) found.sort((a, b) => this.#placeOf(a) - this.#placeOf(b) || a - b);
    for (const region of found) this.#add(region);
    if (this.#phase === 'plain' && performance.now() >= this.#recordedUntilMs) this.#recording = false;
  }

  #placeOf(region: number): number {
    const rank = this.#earlier.rank(region);
    return rank === 0 ? this.#earlier.size + 1 : rank;
  }

  #find(): number[] {
    const { heat } = this;
    const { regions } = heat;
    const own = this.#own;
    const found: number[] = [];
    if (this.#at === 0) {
      if (heat.counted === this.#counted) return found;
      this.#counted = heat.counted;
    }
    const untilMs = performance.now() + LOOK_MS_MAX;
    let region = this.#at;
    for (let step = 1; region < regions && found.length < FOUND_MAX; step++) {
      if (heat.isCold(region)) region = heat.sameUntil(region, Math.min(region + COLD_REGIONS_MAX, regions));
      else {
        if (heat.wasRead(region) && !own.has(region)) found.push(region);
        region++;
      }
      if (step % CLOCK_AFTER === 0 && performance.now() > untilMs) break;
    }
    this.#at = region < regions ? region : 0;
    return found;
  }

  /** What the source recorded, or what was recorded of the template, by rank: in place of what was known of the move before. */
  inherit(regions: Iterable<number>): void {
    this.#earlier.clear();
    for (const region of regions) this.#earlier.add(region);
    this.#changes++;
  }

  /** As an earlier process left it. */
  restore(own: Iterable<number>, earlier: Iterable<number>): void {
    this.#own.clear();
    for (const region of own) this.#own.add(region);
    this.inherit(earlier);
    if (this.#own.full) this.#recording = false;
  }
}

/** Whether a record of so many regions counts for less than one of the move before. */
export function isTrivial(regions: number, earlierRegions: number): boolean {
  return regions < Math.min(earlierRegions, TRIVIAL_REGIONS);
}
