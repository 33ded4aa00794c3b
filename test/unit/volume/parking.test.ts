import assert from 'node:assert/strict';
import { test } from 'node:test';
import { REGION_BLOCKS } from '../../../src/volume/blocks.js';
import { Parking } from '../../../src/volume/parking.js';
import { Io } from '../../support/volume.js';

const retry = (): void => {};

/** Parks one request for each block. */
function parked(...blocks: number[]): { parking: Parking; requests: Io[] } {
  const parking = new Parking();
  const requests = blocks.map((block) => {
    const request = new Io(0, 1);
    parking.park(request, block, retry);
    return request;
  });
  return { parking, requests };
}

test('take gives who waits on a block of the range, in order of arrival, once', () => {
  const { parking, requests } = parked(5, 6, 5, 7);
  assert.equal(parking.size, 4);
  assert.deepEqual(
    parking.take(5, 7).map((it) => it.request),
    [requests[0], requests[1], requests[2]],
  );
  assert.equal(parking.size, 1);
  assert.deepEqual(parking.take(5, 7), []);
  assert.equal(parking.take(7, 8)[0]?.retry, retry);
  assert.equal(parking.size, 0);
});

test('the ends of a range, and of regions', () => {
  const edge = REGION_BLOCKS;
  const { parking } = parked(edge - 1, edge, edge + 1, 3 * edge);
  assert.deepEqual(
    parking.take(edge - 1, edge).map((it) => it.block),
    [edge - 1],
  );
  assert.deepEqual(
    parking.take(edge + 1, 3 * edge).map((it) => it.block),
    [edge + 1],
  );
  assert.deepEqual(
    parking.take(0, 3 * edge + 1).map((it) => it.block),
    [edge, 3 * edge],
  );
});

test('a range of more regions than wait: the same answer', () => {
  const { parking } = parked(3, 100_000 * REGION_BLOCKS, 5);
  assert.deepEqual(
    parking
      .take(4, 2 ** 32)
      .map((it) => it.block)
      .sort((a, b) => a - b),
    [5, 100_000 * REGION_BLOCKS],
  );
  assert.equal(parking.size, 1);
});

test('takeAll gives all and leaves none', () => {
  const { parking, requests } = parked(1, 1000, 2);
  assert.equal(parking.takeAll().length, requests.length);
  assert.equal(parking.size, 0);
  assert.deepEqual(parking.take(0, 2000), []);
});

test('who is parked again while it was taken waits again', () => {
  const { parking, requests } = parked(1);
  for (const { request } of parking.take(0, 10)) parking.park(request, 2, retry);
  assert.deepEqual(
    parking.take(2, 3).map((it) => it.request),
    requests,
  );
});

test('has tells whether anybody waits on a block of a range', () => {
  const { parking } = parked(5, 3 * REGION_BLOCKS);
  for (const [first, end, expected] of [
    [0, 5, false],
    [5, 6, true],
    [6, 3 * REGION_BLOCKS, false],
    [6, 3 * REGION_BLOCKS + 1, true],
    [3 * REGION_BLOCKS + 1, 4 * REGION_BLOCKS, false],
  ] as const)
    assert.equal(parking.has(first, end), expected, `[${first}, ${end})`);
  parking.takeAll();
  assert.equal(parking.has(5, 6), false);
});

test('takeAbandoned gives those whose session is gone, and leaves the others in order', () => {
  const { parking, requests } = parked(1, 1, REGION_BLOCKS, 1);
  requests[1]!.abandoned = true;
  requests[2]!.abandoned = true;
  assert.deepEqual(
    parking.takeAbandoned().map((it) => it.request),
    [requests[1], requests[2]],
  );
  assert.equal(parking.size, 2);
  assert.equal(parking.has(REGION_BLOCKS, REGION_BLOCKS + 1), false);
  assert.deepEqual(parking.takeAbandoned(), []);
  assert.deepEqual(
    parking.take(1, 2).map((it) => it.request),
    [requests[0], requests[3]],
  );
});
