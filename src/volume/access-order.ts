/**
 * Regions of a volume in the order of their first access: a region's rank is its place, from 1 on. Each is there once, and of those that are
 * too many, or lie beyond the volume, none is. Memory: 3 MB at most for the ranks, and one bit a region (512 KiB a TiB), given page by page
 * as it is touched.
 */
import { nextOne } from '../native/index.js';
import type { StatusRequest } from '../nbd/device.js';
import { REGION_BYTES } from './heat.js';
import { tellExtents } from './tell-extents.js';

/** Regions that have a rank, at most: 16 GiB. Of what is read later, how much it is read says more (heat). */
export const RANKED_REGIONS_MAX = 1 << 16;

const LOOK_AFTER = 64;

export class AccessOrder {
  /** In the order of their ranks. */
  readonly #ranks = new Map<number, number>();
  /** Which regions have one. */
  readonly #ranked: Uint8Array;

  /** `regions`: of the volume. */
  constructor(readonly regions: number) {
    this.#ranked = new Uint8Array(Math.ceil(regions / 8));
  }

  get size(): number {
    return this.#ranks.size;
  }

  get full(): boolean {
    return this.#ranks.size === RANKED_REGIONS_MAX;
  }

  has(region: number): boolean {
    return (this.#ranked[region >>> 3]! & (1 << (region & 7))) !== 0;
  }

  /** 0: it has none. */
  rank(region: number): number {
    return this.#ranks.get(region) ?? 0;
  }

  /** Gives the region the next rank, unless it has one. */
  add(region: number): void {
    if (region >= this.regions || this.full || this.has(region)) return;
    this.#ranked[region >>> 3]! |= 1 << (region & 7);
    this.#ranks.set(region, this.#ranks.size + 1);
  }

  byRank(): Iterable<number> {
    return this.#ranks.keys();
  }

  /** The first region of [region, end) that has a rank, or `end`. */
  nextRanked(region: number, end: number): number {
    return nextOne(this.#ranked, region, end);
  }

  clear(): void {
    for (const region of this.#ranks.keys()) this.#ranked[region >>> 3] = 0;
    this.#ranks.clear();
  }
}

/** Adds the extents of the request's range, from its start on and at most as many as it wants: ranks, 0 where there is none. */
export function reportAccessOrder(request: StatusRequest, order: AccessOrder): void {
  const regionsEnd = Math.ceil((request.offset + request.length) / REGION_BYTES);
  tellExtents(request, LOOK_AFTER, (at, past) => {
    const region = Math.floor(at / REGION_BYTES);
    const next = order.has(region) ? region + 1 : order.nextRanked(region, regionsEnd);
    const end = Math.min(next * REGION_BYTES, past);
    request.extent(end - at, order.rank(region));
    return end;
  });
}
