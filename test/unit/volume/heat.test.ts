import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import type { StatusRequest } from '../../../src/nbd/device.js';
import { HALF_LIFE_S, HEAT_HEAD_BYTES, Heat, REGION_BYTES, reportHeat } from '../../../src/volume/heat.js';

const TIB = 2 ** 40;

/** Not an Io, which has a buffer as long as its range. */
function statusOf(heat: Heat, offset: number, length: number, extentsMax = 1000): [number, number][] {
  const extents: [number, number][] = [];
  const extent = (bytes: number, status: number): unknown => extents.push([bytes, status]);
  reportHeat({ offset, length, extentsMax, extent } as unknown as StatusRequest, heat);
  return extents;
}

const reads = (status: number): number => status & 0xffff;
const writes = (status: number): number => status >>> 16;

/** As long as it takes to halve every count once. */
function halve(heat: Heat): void {
  for (let second = 0; second < HALF_LIFE_S; second++) heat.sweep();
}

describe('heat', () => {
  test('reads and writes count apart, once in each region they touch', () => {
    const heat = new Heat(8 * REGION_BYTES);
    heat.read(REGION_BYTES, 4096);
    heat.written(REGION_BYTES - 1, 2);
    heat.written(4 * REGION_BYTES, 2 * REGION_BYTES);
    assert.deepEqual(
      [0, 1, 2, 3, 4, 5, 6].map((region) => [reads(heat.status(region)), writes(heat.status(region))]),
      [
        [0, 1],
        [1, 1],
        [0, 0],
        [0, 0],
        [0, 1],
        [0, 1],
        [0, 0],
      ],
    );
    assert.equal(heat.counted, 3);
  });

  test('a count is right within its magnitude', () => {
    for (const requests of [1, 10, 100, 1000, 10_000]) {
      const heat = new Heat(256 * REGION_BYTES);
      for (let region = 0; region < 256; region++)
        for (let i = 0; i < requests; i++) heat.read(region * REGION_BYTES, 512);
      let sum = 0;
      for (let region = 0; region < 256; region++) sum += reads(heat.status(region));
      const mean = sum / 256;
      assert.ok(mean > requests * 0.75 && mean < requests * 1.25, `${requests} requests count ${mean}`);
    }
  });

  test('it saturates, and the other half of the byte is not touched', () => {
    const heat = new Heat(REGION_BYTES);
    heat.bytes[HEAT_HEAD_BYTES] = 0xff;
    for (let i = 0; i < 200_000; i++) heat.read(0, 1);
    assert.equal(heat.bytes[HEAT_HEAD_BYTES], 0xff);
    assert.equal(heat.status(0), 0x7fff_7fff);
    heat.bytes[HEAT_HEAD_BYTES] = 0xf0;
    for (let i = 0; i < 200_000; i++) heat.read(0, 1);
    assert.equal(writes(heat.status(0)), 0x7fff);
  });

  test('each half-life takes every level down by one, and 0 stays', () => {
    const regions = 1001; // no multiple of a word, nor of the sweep's parts
    const heat = new Heat(regions * REGION_BYTES - 1);
    for (let region = 0; region < regions; region++) heat.bytes[HEAT_HEAD_BYTES + region] = region & 0xff;
    halve(heat);
    const down = (level: number): number => Math.max(0, level - 1);
    for (let region = 0; region < regions; region++) {
      const was = region & 0xff;
      assert.equal(heat.bytes[HEAT_HEAD_BYTES + region], (down(was >> 4) << 4) | down(was & 15), `of ${was}`);
    }
    for (let times = 0; times < 15; times++) halve(heat);
    assert.deepEqual(statusOf(heat, 0, regions * REGION_BYTES - 1), [[regions * REGION_BYTES - 1, 0]]);
  });

  test('extents: equal neighbours are one, ranges need no alignment, the last region is cut', () => {
    const size = 10 * REGION_BYTES + 512;
    const heat = new Heat(size);
    heat.read(2 * REGION_BYTES, 2 * REGION_BYTES);
    heat.written(size - 1, 1);
    const all: [number, number][] = [
      [2 * REGION_BYTES, 0],
      [2 * REGION_BYTES, 1],
      [6 * REGION_BYTES, 0],
      [512, 1 << 16],
    ];
    assert.deepEqual(statusOf(heat, 0, size), all);
    assert.deepEqual(statusOf(heat, 0, size, 2), all.slice(0, 2));
    assert.deepEqual(statusOf(heat, 3 * REGION_BYTES + 100, 1000), [[1000, 1]]);
    assert.deepEqual(statusOf(heat, 4 * REGION_BYTES - 100, 200), [
      [100, 1],
      [100, 0],
    ]);
    assert.deepEqual(statusOf(heat, size - 1, 1), [[1, 1 << 16]]);
  });

  test('4 TiB take 16 MiB at most, memory only where they are touched, and no long stop', () => {
    const before = process.memoryUsage().rss;
    const heat = new Heat(4 * TIB);
    assert.equal(heat.bytes.length, HEAT_HEAD_BYTES + (16 << 20));
    halve(heat);
    assert.deepEqual(statusOf(heat, 0, 4 * TIB), [[4 * TIB, 0]]);
    const grown = process.memoryUsage().rss - before;
    assert.ok(grown < 8 << 20, `untouched it takes ${grown} bytes`);
    heat.written(4 * TIB - 1, 1);
    assert.deepEqual(statusOf(heat, 0, 4 * TIB), [
      [4 * TIB - REGION_BYTES, 0],
      [REGION_BYTES, 1 << 16],
    ]);
    heat.bytes.fill(0x5a, HEAT_HEAD_BYTES);
    const ms: number[] = [];
    for (let second = 0; second < HALF_LIFE_S; second++) {
      const since = performance.now();
      heat.sweep();
      ms.push(performance.now() - since);
    }
    ms.sort((a, b) => a - b);
    const median = ms[ms.length >> 1]!;
    assert.ok(median < 2, `a sweep takes ${median} ms`);
    assert.equal(heat.bytes[HEAT_HEAD_BYTES + (16 << 20) - 1], 0x49);
  });
});
