/**
 * Heat: how often the guest reads and writes each region of 256 KiB, lately. Always on, so it must cost next to nothing.
 *
 * Invariants
 * - A region has one byte: the level of its reads in the low four bits, of its writes in the high four. Level n stands for about
 *   2^n - 1 requests: a request raises it with probability 2^-n (R. Morris, Counting large numbers of events in small registers, 1978).
 *   Level 15 stays. That orders regions by magnitude, within a factor of two or so, which is what an order of copying needs.
 * - Decay: every level above 0 falls by one each HALF_LIFE_S, which halves the count. It is done by a sweep that takes a small, equal part of
 *   the regions each second: never a long stop, however large the volume is.
 * - 4 MiB a TiB at most, in one array of zeros, which the kernel gives memory to page by page as it is touched: a page is 1 GiB of the volume.
 * - READs and WRITEs count, once for each region they touch, when they are answered or handed on: here, or in the native call, which raises the
 *   same bytes by the same rule (native/src/heat.h). TRIM and WRITE_ZEROES do not, nor what is known to be a hole: they move no data.
 * - It is a hint. Nothing that must be right may depend on it.
 */
import { nextOne } from '../native/index.js';
import type { StatusRequest } from '../nbd/device.js';
import { tellExtents } from './tell-extents.js';

export const REGION_BYTES = 256 << 10;
/** A count that is not raised any more is halved in this time. */
export const HALF_LIFE_S = 300;

/** Before the regions' bytes: the state of the dice, then how many requests were counted (both 32 bits, the machine's order). */
export const HEAT_HEAD_BYTES = 8;
const DICE = 0;
const COUNTED = 1;
const HEAD_WORDS = 2;
const SEED = 0x2545f491;

const LEVEL_MAX = 15;
const READ_SHIFT = 0;
const WRITE_SHIFT = 4;
/** The lowest bit of every level of a word. */
const ONES = 0x11111111;

/** Extents of equal heat are cut here, but for cold ones: it bounds the steps that one takes. */
const RUN_REGIONS_MAX = 4096;
const LOOK_AFTER = 64;

export class Heat {
  readonly regions: number;
  /** Head and regions, for the native call. */
  readonly bytes: Uint8Array;
  readonly #words: Uint32Array;
  /** Which part of the regions the next sweep is about: there are HALF_LIFE_S, some of them empty if the volume is small. */
  #part = 0;

  constructor(volumeBytes: number) {
    this.regions = Math.ceil(volumeBytes / REGION_BYTES);
    const words = HEAD_WORDS + Math.ceil(this.regions / 4);
    this.#words = new Uint32Array(words);
    this.#words[DICE] = SEED;
    this.bytes = new Uint8Array(this.#words.buffer);
  }

  /** Requests counted, modulo 2^32. */
  get counted(): number {
    return this.#words[COUNTED]!;
  }

  read(offset: number, length: number): void {
    this.#count(offset, length, READ_SHIFT);
  }

  written(offset: number, length: number): void {
    this.#count(offset, length, WRITE_SHIFT);
  }

  #count(offset: number, length: number, shift: number): void {
    const { bytes } = this;
    const last = HEAT_HEAD_BYTES + Math.floor((offset + length - 1) / REGION_BYTES);
    for (let at = HEAT_HEAD_BYTES + Math.floor(offset / REGION_BYTES); at <= last; at++) {
      const level = (bytes[at]! >>> shift) & LEVEL_MAX;
      if (level === 0 || (level < LEVEL_MAX && this.#throws(level))) bytes[at]! += 1 << shift;
    }
    this.#words[COUNTED]!++;
  }

  /** True once in 2^level. Marsaglia's xorshift, so that the native call throws the same dice. */
  #throws(level: number): boolean {
    let dice = this.#words[DICE]!;
    dice ^= dice << 13;
    dice ^= dice >>> 17;
    dice ^= dice << 5;
    this.#words[DICE] = dice;
    return (dice & ((1 << level) - 1)) === 0;
  }

  /** Decays the next part of the regions: due each second. */
  sweep(): void {
    const words = this.#words;
    const end = this.#partAt(this.#part + 1);
    for (let at = this.#partAt(this.#part); at < end; at++) {
      const word = words[at]!;
      if (word !== 0) words[at] = word - ((word | (word >>> 1) | (word >>> 2) | (word >>> 3)) & ONES);
    }
    this.#part = (this.#part + 1) % HALF_LIFE_S;
  }

  #partAt(part: number): number {
    return HEAD_WORDS + Math.floor(((this.#words.length - HEAD_WORDS) * part) / HALF_LIFE_S);
  }

  /** Of a region, as `blockferry:heat` has it: writes in the high 16 bits, reads in the low ones. */
  status(region: number): number {
    const both = this.bytes[HEAT_HEAD_BYTES + region]!;
    return (countOf(both >>> WRITE_SHIFT) << 16) | countOf(both & LEVEL_MAX);
  }

  /** Whether a region was read lately: a first read always shows. */
  wasRead(region: number): boolean {
    return (this.bytes[HEAT_HEAD_BYTES + region]! & LEVEL_MAX) !== 0;
  }

  /** Whether a region was neither read nor written lately. */
  isCold(region: number): boolean {
    return this.bytes[HEAT_HEAD_BYTES + region] === 0;
  }

  /** The end of the regions from `region` on that are like it, within [region, end); of warm ones perhaps only of the first. */
  sameUntil(region: number, end: number): number {
    const { bytes } = this;
    const both = bytes[HEAT_HEAD_BYTES + region]!;
    if (both === 0) {
      const bit = nextOne(bytes, (HEAT_HEAD_BYTES + region) * 8, (HEAT_HEAD_BYTES + end) * 8);
      return Math.floor(bit / 8) - HEAT_HEAD_BYTES;
    }
    const most = Math.min(end, region + RUN_REGIONS_MAX);
    let same = region + 1;
    while (same < most && bytes[HEAT_HEAD_BYTES + same] === both) same++;
    return same;
  }
}

function countOf(level: number): number {
  return (1 << level) - 1;
}

/** Adds the extents of the request's range, from its start on and at most as many as it wants. */
export function reportHeat(request: StatusRequest, heat: Heat): void {
  const regionsEnd = Math.ceil((request.offset + request.length) / REGION_BYTES);
  tellExtents(request, LOOK_AFTER, (at, past) => {
    const region = Math.floor(at / REGION_BYTES);
    const end = Math.min(heat.sameUntil(region, regionsEnd) * REGION_BYTES, past);
    request.extent(end - at, heat.status(region));
    return end;
  });
}
