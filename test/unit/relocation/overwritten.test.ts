import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { REGION_BLOCKS as R } from '../../../src/relocation/order.js';
import { Overwritten } from '../../../src/relocation/overwritten.js';

describe('regions that are overwritten all the time', () => {
  test('are those that changed in two rounds in turn', () => {
    const overwritten = new Overwritten(R);
    overwritten.note([0, 1, 3 * R, 3 * R + 1]);
    assert.equal(overwritten.past(0), 0, 'once is no habit');
    assert.equal(overwritten.until(0, 10 * R), 10 * R);
    overwritten.note([R - 1, R, 5 * R, 5 * R + 1]);
    assert.equal(overwritten.past(0), R);
    assert.equal(overwritten.past(R - 1), R);
    assert.equal(overwritten.past(R), R);
    assert.equal(overwritten.past(3 * R), 3 * R, 'not in the last round');
    overwritten.note([5 * R + 9, 5 * R + 10]);
    assert.equal(overwritten.past(0), 0, 'it rests');
    assert.equal(overwritten.past(5 * R + 3), 6 * R);
    overwritten.note([]);
    assert.equal(overwritten.past(5 * R), 5 * R);
  });

  test('a run over several regions counts in each, and several runs in one count once', () => {
    const overwritten = new Overwritten(R);
    const runs = [1, 2, 3, 4, 5, 6, 2 * R - 1, 4 * R + 1];
    overwritten.note(runs);
    assert.equal(overwritten.past(0), 0);
    overwritten.note(runs);
    assert.equal(overwritten.past(0), 5 * R, 'regions 0 to 4 touch one another');
    assert.equal(overwritten.past(5 * R), 5 * R);
  });

  test('what ends at a border touches no region behind it', () => {
    const overwritten = new Overwritten(R);
    for (let round = 0; round < 2; round++) overwritten.note([R, 2 * R]);
    assert.deepEqual([overwritten.past(R), overwritten.past(2 * R)], [2 * R, 2 * R]);
    assert.equal(overwritten.until(0, 3 * R), R);
  });

  test('end a run that is to be copied', () => {
    const overwritten = new Overwritten(R);
    for (let round = 0; round < 2; round++) overwritten.note([2 * R + 1, 2 * R + 2]);
    assert.equal(overwritten.until(5, 10 * R), 2 * R);
    assert.equal(overwritten.until(5, 2 * R), 2 * R);
    assert.equal(overwritten.until(5, 2 * R - 1), 2 * R - 1);
    assert.equal(overwritten.until(3 * R, 10 * R), 10 * R);
  });

  test('are none after they were forgotten', () => {
    const overwritten = new Overwritten(R);
    for (let round = 0; round < 2; round++) overwritten.note([0, 10]);
    overwritten.clear();
    assert.equal(overwritten.past(0), 0);
    overwritten.note([0, 10]);
    assert.equal(overwritten.past(0), 0, 'it is counted anew');
  });

  test('of a list over everything no more are remembered than there is room for', () => {
    const overwritten = new Overwritten(R);
    const most = 1 << 18;
    const all = [0, 4 * most * R];
    for (let round = 0; round < 2; round++) overwritten.note(all);
    assert.equal(overwritten.past(0), most * R);
  });
});
