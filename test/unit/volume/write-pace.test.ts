import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { WritePace } from '../../../src/volume/write-pace.js';

const B = 4096;
const MIB = 1 << 20;

/** A pace behind a write that was held up. */
function slowPace(): WritePace {
  const pace = new WritePace();
  pace.heldUp();
  return pace;
}

/** Writes on the pool, one after the other. */
function there(pace: WritePace, count: number, ms: number, length = B): void {
  for (let i = 0; i < count; i++) {
    pace.begun(length);
    pace.tookThere(length, ms);
  }
}

describe('the pace of writes', () => {
  test('is not slow before anything was, nor behind quick ones', () => {
    const pace = new WritePace();
    assert.equal(pace.slow, false);
    for (const [length, ms] of [
      [B, 0],
      [B, 4],
      [1, 4],
      [64 * MIB, 100],
    ] as const) {
      pace.tookHere(length, ms);
      assert.equal(pace.slow, false, `${length} bytes in ${ms} ms`);
    }
  });

  test('is slow behind one that took longer than its copy can, and behind one that is said to have been held up', () => {
    for (const [length, ms] of [
      [B, 5],
      [MIB, 7],
      [64 * MIB, 133],
    ] as const) {
      const pace = new WritePace();
      pace.tookHere(length, ms);
      assert.equal(pace.slow, true, `${length} bytes in ${ms} ms`);
    }
    assert.equal(slowPace().slow, true);
  });

  test('is over behind 32 in turn that were quick on the pool', () => {
    const pace = slowPace();
    there(pace, 31, 1);
    assert.equal(pace.slow, true);
    there(pace, 1, 1);
    assert.equal(pace.slow, false);
    there(pace, 3, 0);
    assert.equal(pace.slow, false);
  });

  test('begins anew with each slow one, on the pool and here', () => {
    const pace = slowPace();
    there(pace, 31, 0);
    there(pace, 1, 1.1);
    there(pace, 31, 0);
    pace.tookHere(B, 5);
    there(pace, 31, 0);
    assert.equal(pace.slow, true);
    there(pace, 1, 0);
    assert.equal(pace.slow, false);
  });

  test('those that wait on the pool behind others are not held up by the kernel', () => {
    const pace = slowPace();
    for (let round = 0; round < 8; round++) {
      for (let i = 0; i < 4; i++) pace.begun(MIB);
      for (const ms of [3, 5, 3, 3]) pace.tookThere(MIB, ms);
    }
    assert.equal(pace.slow, false);
    pace.heldUp();
    there(pace, 40, 3.1, MIB);
    assert.equal(pace.slow, true, 'alone a mebibyte does not take as long');
    there(pace, 32, 3, MIB);
    assert.equal(pace.slow, false);
  });
});
