import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { StatusRequest } from '../../../src/nbd/device.js';
import { AccessOrder, RANKED_REGIONS_MAX, reportAccessOrder } from '../../../src/volume/access-order.js';
import { REGION_BYTES } from '../../../src/volume/heat.js';

const REGIONS_MAX = (16 * 2 ** 40) / REGION_BYTES;

function orderOf(regions: number, ...added: number[]): AccessOrder {
  const order = new AccessOrder(regions);
  for (const region of added) order.add(region);
  return order;
}

/** Not an Io, which has a buffer as long as its range. */
function statusOf(order: AccessOrder, offset: number, length: number, extentsMax = 1000): [number, number][] {
  const extents: [number, number][] = [];
  const extent = (bytes: number, status: number): unknown => extents.push([bytes, status]);
  reportAccessOrder({ offset, length, extentsMax, extent } as unknown as StatusRequest, order);
  return extents;
}

describe('an order of accesses', () => {
  test('each region once, at its first place; what lies beyond the volume has none', () => {
    const order = orderOf(10, 7, 3, 7, 10, 11, 2 ** 32 - 1, 9, 3);
    assert.deepEqual([...order.byRank()], [7, 3, 9]);
    assert.deepEqual(
      [3, 7, 9, 8].map((region) => order.rank(region)),
      [2, 1, 3, 0],
    );
    assert.deepEqual(
      [7, 8].map((region) => order.has(region)),
      [true, false],
    );
    order.clear();
    assert.deepEqual([order.size, order.has(7), order.nextRanked(0, 10)], [0, false, 10]);
    order.add(9);
    assert.equal(order.rank(9), 1);
  });

  test('it ends when it is full', () => {
    const order = new AccessOrder(REGIONS_MAX);
    for (let region = REGIONS_MAX; region >= 0; region -= 31) order.add(region);
    assert.deepEqual([order.full, order.size], [true, RANKED_REGIONS_MAX]);
    const first = [...order.byRank()].slice(0, 2);
    assert.deepEqual(first, [REGIONS_MAX - 31, REGIONS_MAX - 62]);
    assert.ok(!order.has(REGIONS_MAX % 31));
  });

  test('extents: a region each, those without rank together, ranges need no alignment, the last region is cut', () => {
    const size = 10 * REGION_BYTES + 512;
    const order = orderOf(11, 10, 3, 4);
    const all: [number, number][] = [
      [3 * REGION_BYTES, 0],
      [REGION_BYTES, 2],
      [REGION_BYTES, 3],
      [5 * REGION_BYTES, 0],
      [512, 1],
    ];
    assert.deepEqual(statusOf(order, 0, size), all);
    assert.deepEqual(statusOf(order, 0, size, 2), all.slice(0, 2));
    assert.deepEqual(statusOf(order, 3 * REGION_BYTES + 100, 1000), [[1000, 2]]);
    assert.deepEqual(statusOf(order, 4 * REGION_BYTES - 100, 200), [
      [100, 2],
      [100, 3],
    ]);
    assert.deepEqual(statusOf(new AccessOrder(11), 0, size), [[size, 0]]);
  });
});
