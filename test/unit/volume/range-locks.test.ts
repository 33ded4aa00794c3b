import assert from 'node:assert/strict';
import { test } from 'node:test';
import { RangeLocks } from '../../../src/volume/range-locks.js';

test('overlaps: neighbours do not, a shared block does', () => {
  const locks = new RangeLocks();
  locks.lock(10, 20);
  for (const [first, end] of [
    [0, 10],
    [20, 30],
  ] as const)
    assert.equal(locks.overlaps(first, end), false);
  for (const [first, end] of [
    [9, 11],
    [19, 20],
    [0, 100],
    [12, 13],
  ] as const)
    assert.equal(locks.overlaps(first, end), true);
});

test('unlock lets go of just that lock, and can be repeated', () => {
  const locks = new RangeLocks();
  const lock = locks.lock(0, 5);
  locks.lock(5, 9);
  locks.unlock(lock);
  locks.unlock(lock);
  assert.equal(locks.size, 1);
  assert.equal(locks.overlaps(0, 5), false);
  assert.equal(locks.overlaps(4, 6), true);
});

test('run: the stretch that is all free or all locked', () => {
  const locks = new RangeLocks();
  assert.deepEqual(locks.run(3, 50), { locked: false, end: 50 });
  locks.lock(30, 40);
  locks.lock(10, 20);
  assert.deepEqual(locks.run(0, 50), { locked: false, end: 10 });
  assert.deepEqual(locks.run(0, 5), { locked: false, end: 5 });
  assert.deepEqual(locks.run(10, 50), { locked: true, end: 20 });
  assert.deepEqual(locks.run(15, 17), { locked: true, end: 17 });
  assert.deepEqual(locks.run(20, 50), { locked: false, end: 30 });
  assert.deepEqual(locks.run(40, 50), { locked: false, end: 50 });
});

test('run walks over any locks and tells of each block what it is', () => {
  const locks = new RangeLocks();
  const held = new Set<number>();
  for (const [first, end] of [
    [1, 2],
    [2, 4],
    [9, 15],
    [20, 21],
  ] as const) {
    locks.lock(first, end);
    for (let block = first; block < end; block++) held.add(block);
  }
  for (let block = 0; block < 30; ) {
    const run = locks.run(block, 30);
    assert.ok(run.end > block);
    for (; block < run.end; block++) assert.equal(run.locked, held.has(block), `block ${block}`);
  }
});
