/** Order policies: what they name, and in which order. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  HOT_REGIONS_MAX,
  Hot,
  Neighbours,
  type Order,
  REGION_BLOCKS,
  Recorded,
} from '../../../src/relocation/order.js';
import { RANKED_REGIONS_MAX } from '../../../src/volume/access-order.js';

const REGION_BYTES = REGION_BLOCKS * 4096;

/** The regions that the policy names, each fetched whole at once. */
function named(order: Order, here: Set<number> = new Set()): number[] {
  const regions: number[] = [];
  const find = (first: number, end: number) => (here.has(first) ? undefined : { first, end });
  for (let run = order.next(find); run !== undefined; run = order.next(find)) {
    regions.push(run.first / REGION_BLOCKS);
    here.add(run.first);
    order.taken(run.end);
  }
  return regions;
}

test('neighbours: the latest first, each once', () => {
  const order = new Neighbours();
  for (const block of [10, 70, 20, 5000, 5001, 5002]) order.note(block);
  assert.deepEqual(named(order), [78, 0, 1]);
  assert.deepEqual(named(order), []);
  order.note(10);
  order.clear();
  assert.deepEqual(named(order), []);
});

test('neighbours: of many, the latest are remembered', () => {
  const order = new Neighbours();
  for (let region = 0; region < 10_000; region++) order.note(region * REGION_BLOCKS);
  const regions = named(order);
  assert.equal(regions[0], 9999);
  assert.ok(regions.length >= 256 && regions.length <= 512, String(regions.length));
});

test('what was taken and has not come is not named again, what was not taken is', () => {
  const order = new Neighbours();
  order.note(0);
  const find = (first: number, end: number) => ({ first, end: Math.min(end, first + 16) });
  assert.deepEqual(order.next(find), { first: 0, end: 16 });
  assert.deepEqual(order.next(find), { first: 0, end: 16 });
  order.taken(16);
  assert.deepEqual(order.next(find), { first: 16, end: 32 });
  order.taken(REGION_BLOCKS);
  assert.equal(order.next(find), undefined);
});

test('hot: what was read most first, then what was only written, nothing else', () => {
  const order = new Hot();
  const reads = (count: number) => count;
  const writes = (count: number) => count * 0x10000;
  order.learn(0, [
    { length: REGION_BYTES, flags: writes(500) },
    { length: 2 * REGION_BYTES, flags: 0 },
    { length: 2 * REGION_BYTES, flags: reads(3) + writes(60_000) },
    { length: REGION_BYTES, flags: reads(9) },
  ]);
  order.learn(10 * REGION_BYTES, [{ length: REGION_BYTES / 2, flags: writes(65_535) }]);
  assert.deepEqual(named(order), [5, 3, 4, 10, 0]);
});

test('hot: what is learned later is sorted in', () => {
  const order = new Hot();
  order.learn(0, [{ length: REGION_BYTES, flags: 5 }]);
  const here = new Set<number>();
  assert.deepEqual(named(order, here), [0]);
  order.learn(REGION_BYTES, [{ length: 2 * REGION_BYTES, flags: 7 }]);
  assert.deepEqual(named(order, here), [1, 2]);
});

test('hot: of a huge volume the hottest regions are remembered', () => {
  const order = new Hot();
  const count = 3 * HOT_REGIONS_MAX;
  const extents = Array.from({ length: count }, (_, region) => ({
    length: REGION_BYTES,
    flags: 1 + (region % 1000),
  }));
  order.learn(0, extents);
  const regions = named(order);
  assert.ok(regions.length <= 2 * HOT_REGIONS_MAX && regions.length >= HOT_REGIONS_MAX);
  assert.ok(regions.slice(0, 700).every((region) => region % 1000 === 999));
});

test('recorded: by rank, nothing else, whatever order it is learned in', () => {
  const order = new Recorded();
  const region = (rank: number) => ({ length: REGION_BYTES, flags: rank });
  order.learn(0, [region(9), { length: 2 * REGION_BYTES, flags: 0 }, region(1), region(4)]);
  const here = new Set<number>();
  const find = (first: number, end: number) => (here.has(first) ? undefined : { first, end });
  assert.deepEqual(order.next(find), { first: 3 * REGION_BLOCKS, end: 4 * REGION_BLOCKS });
  here.add(3 * REGION_BLOCKS);
  order.taken(4 * REGION_BLOCKS);
  assert.equal(order.next(find)?.first, 4 * REGION_BLOCKS);
  // From the middle of a region on, to the middle of another.
  order.learn(10.5 * REGION_BYTES, [
    { length: REGION_BYTES / 2, flags: 2 },
    { length: 512, flags: 3 },
  ]);
  assert.deepEqual(named(order, here), [10, 11, 4, 0]);
  assert.deepEqual([order.size, [...order.regions()]], [5, [3, 10, 11, 4, 0]]);
  order.clear();
  assert.deepEqual([order.size, named(order)], [0, []]);
  order.learn(0, [region(5)]);
  assert.deepEqual(named(order), [0]);
});

test('recorded: what a source tells that no blockferry would costs nothing and does nothing', () => {
  const order = new Recorded();
  order.learn(0, [
    { length: 2 ** 44, flags: 7 },
    { length: REGION_BYTES, flags: 2 ** 32 - 1 },
    { length: REGION_BYTES, flags: RANKED_REGIONS_MAX + 1 },
    { length: REGION_BYTES, flags: RANKED_REGIONS_MAX },
  ]);
  assert.deepEqual(named(order), [0, 2 ** 26 + 2]);
});

test('recorded: a choice takes as long of a full record as of a short one', () => {
  const choices = (record: number): number => {
    const order = new Recorded();
    for (let rank = 1; rank <= record; rank++) order.put((rank * 7919) % RANKED_REGIONS_MAX, rank);
    const find = (first: number, end: number) => ({ first, end });
    const began = performance.now();
    for (let taken = 0; taken < 1000; taken++) order.taken(order.next(find)!.end);
    return performance.now() - began;
  };
  const times = (record: number): number => Math.min(...Array.from({ length: 9 }, () => choices(record)));
  choices(1001);
  const [short, full] = [times(1001), times(RANKED_REGIONS_MAX)];
  assert.ok(full < 10 * short + 1, `${full} ms, and ${short} ms`);
});
