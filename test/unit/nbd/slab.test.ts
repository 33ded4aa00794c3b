import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { HEAD_ROOM, SlabPool } from '../../../src/nbd/server/slab.js';

describe('slab pool', () => {
  it('gives the next power of two from 4 KiB to 1 MiB, and larger ones exactly', () => {
    const pool = new SlabPool();
    const rows = [
      [0, 4096],
      [1, 4096],
      [4096, 4096],
      [4097, 8192],
      [65_536, 65_536],
      [65_537, 131_072],
      [1 << 20, 1 << 20],
      [(1 << 20) + 1, (1 << 20) + 1],
      [64 << 20, 64 << 20],
    ];
    for (const [asked, given] of rows) assert.equal(pool.take(asked!).buffer.length, HEAD_ROOM + given!);
  });

  it('reuses what came back, by class', () => {
    const pool = new SlabPool();
    const small = pool.take(10);
    const large = pool.take(10_000);
    pool.give(small);
    pool.give(large);
    assert.equal(pool.pooledBytes, small.buffer.length + large.buffer.length);
    assert.equal(pool.take(9000), large);
    assert.equal(pool.take(4096), small);
    assert.equal(pool.pooledBytes, 0);
  });

  it('keeps a bounded amount, and nothing above 1 MiB', () => {
    const pool = new SlabPool();
    const slabs = Array.from({ length: 100 }, () => pool.take(1 << 20));
    for (const slab of slabs) pool.give(slab);
    assert.ok(pool.pooledBytes <= 32 << 20);
    const before = pool.pooledBytes;
    pool.give(pool.take(2 << 20));
    assert.equal(pool.pooledBytes, before);
  });
});
