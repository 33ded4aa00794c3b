/** Order policies: what they name, and in which order. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  HOT_REGIONS_MAX,
  Hot,
  Neighbours,
  type Order,
  REGION_BLOCKS,
} from '../../../src/relocation/order.js';

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
