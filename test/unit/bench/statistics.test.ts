import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { parseStat } from '../../../src/bench/processes.js';
import { medianOf, spreadOf, spreadPercent } from '../../../src/bench/statistics.js';

describe('statistics', () => {
  test('the median, and how far the values lie apart', () => {
    assert.deepEqual(spreadOf([5, 1, 3]), { median: 3, min: 1, max: 5 });
    assert.deepEqual(spreadOf([4, 1, 2, 100]), { median: 3, min: 1, max: 100 });
    assert.equal(medianOf([7]), 7);
    assert.throws(() => medianOf([]), RangeError);
    assert.equal(spreadPercent({ median: 100, min: 90, max: 120 }), 30);
    assert.equal(spreadPercent({ median: 0, min: 0, max: 0 }), 0);
  });

  test('values are left in their order', () => {
    const values = [3, 1, 2];
    medianOf(values);
    assert.deepEqual(values, [3, 1, 2]);
  });
});

describe('a line of /proc/PID/stat', () => {
  test('CPU time is that of the process and of the children it waited for', () => {
    const stat = parseStat(
      '1234 (nbd-server) S 77 1234 1234 0 -1 4194624 100 200 0 0 30 12 5 3 20 0 1 0 999 1000 2\n',
    );
    assert.deepEqual(stat, { pid: 1234, parent: 77, cpuMs: 500 });
  });

  test('a name may hold what separates fields', () => {
    const stat = parseStat('9 (a) b ( c) R 1 9 9 0 -1 0 0 0 0 0 1 2 0 0 20 0\n');
    assert.deepEqual(stat, { pid: 9, parent: 1, cpuMs: 30 });
  });
});
