/**
 * Requests that wait for missing blocks.
 *
 * Each waits on one block, the first that it lacks, and is found by that block's region. When the block arrives the
 * request is tried again from the start, and waits on the next one it lacks if there is one. Nothing here decides
 * whether a request may go on: trying again does.
 */
import type { IoRequest } from '../nbd/device.js';
import { REGION_BLOCKS } from './blocks.js';

export interface Parked {
  readonly request: IoRequest;
  readonly retry: (request: IoRequest) => void;
  /** The block it waits on. */
  readonly block: number;
}

export class Parking {
  readonly #byRegion = new Map<number, Parked[]>();
  #size = 0;

  get size(): number {
    return this.#size;
  }

  park(request: IoRequest, block: number, retry: (request: IoRequest) => void): void {
    const region = Math.floor(block / REGION_BLOCKS);
    const waiting = this.#byRegion.get(region);
    const parked = { request, retry, block };
    if (waiting === undefined) this.#byRegion.set(region, [parked]);
    else waiting.push(parked);
    this.#size++;
  }

  /** Takes out, in order of arrival, those that wait on a block of [first, end). */
  take(first: number, end: number): Parked[] {
    const taken: Parked[] = [];
    if (this.#size === 0) return taken;
    const from = Math.floor(first / REGION_BLOCKS);
    const to = Math.floor((end - 1) / REGION_BLOCKS);
    if (to - from < this.#byRegion.size) {
      for (let region = from; region <= to; region++) this.#takeFrom(region, first, end, taken);
    } else {
      for (const region of [...this.#byRegion.keys()]) {
        if (region >= from && region <= to) this.#takeFrom(region, first, end, taken);
      }
    }
    return taken;
  }

  #takeFrom(region: number, first: number, end: number, taken: Parked[]): void {
    const waiting = this.#byRegion.get(region);
    if (waiting === undefined) return;
    const staying: Parked[] = [];
    for (const parked of waiting)
      (parked.block >= first && parked.block < end ? taken : staying).push(parked);
    this.#size -= waiting.length - staying.length;
    if (staying.length === 0) this.#byRegion.delete(region);
    else if (staying.length < waiting.length) this.#byRegion.set(region, staying);
  }

  /** Whether anybody waits on a block of [first, end). */
  has(first: number, end: number): boolean {
    if (this.#size === 0) return false;
    const from = Math.floor(first / REGION_BLOCKS);
    const to = Math.floor((end - 1) / REGION_BLOCKS);
    for (let region = from; region <= to; region++) {
      for (const { block } of this.#byRegion.get(region) ?? [])
        if (block >= first && block < end) return true;
    }
    return false;
  }

  /** Takes out those whose session is gone. */
  takeAbandoned(): Parked[] {
    const taken: Parked[] = [];
    for (const [region, waiting] of this.#byRegion) {
      const staying = waiting.filter((parked) => !parked.request.abandoned);
      if (staying.length === waiting.length) continue;
      for (const parked of waiting) if (parked.request.abandoned) taken.push(parked);
      if (staying.length === 0) this.#byRegion.delete(region);
      else this.#byRegion.set(region, staying);
    }
    this.#size -= taken.length;
    return taken;
  }

  takeAll(): Parked[] {
    const all = [...this.#byRegion.values()].flat();
    this.#byRegion.clear();
    this.#size = 0;
    return all;
  }
}
