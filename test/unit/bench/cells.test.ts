import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { barOf } from '../../../src/bench/bars.js';
import { CELLS, loadOf, QUICK, selectCells } from '../../../src/bench/cells.js';

function named(filter: string): string[] {
  return selectCells([filter]).map(({ name }) => name);
}

describe('cells', () => {
  test('each has a name of its own', () => {
    assert.equal(new Set(CELLS.map(({ name }) => name)).size, CELLS.length);
  });

  test('"all" is all of them', () => {
    assert.deepEqual(selectCells(['all']), CELLS);
    assert.deepEqual(named('all d1 seq 1m read unix cache'), ['read 1m seq d1 c1 unix cache']);
  });

  test('a filter is words that a cell must have, or with "-" must not', () => {
    assert.deepEqual(named('read 4k d16 c1 unix tmpfs'), ['read 4k random d16 c1 unix tmpfs']);
    assert.deepEqual(named('UNIX tmpfs write d1 4k c1'), [
      'write 4k random d1 c1 unix tmpfs',
      'write 4k random d1 c1 flush32 unix tmpfs',
    ]);
    assert.deepEqual(named('unix tmpfs write d1 4k c1 -flush32'), ['write 4k random d1 c1 unix tmpfs']);
    // Not a part of a word: d1 is not d16.
    assert.ok(named('d1').every((name) => !name.includes('d16')));
  });

  test('several filters are all that one of them has, in the order of the matrix', () => {
    const both = selectCells(['1m read d8 unix cache', '4k read d1 c4 unix tmpfs']);
    assert.deepEqual(
      both.map(({ name }) => name),
      ['read 4k random d1 c4 unix tmpfs', 'read 1m seq d8 c1 unix cache'],
    );
  });

  test('a filter without a cell is wrong usage', () => {
    assert.throws(() => selectCells(['read 5k']), { code: 'usage' });
    assert.throws(() => selectCells(['write cold']), { code: 'usage' });
  });

  test('what --quick measures is there', () => {
    for (const filter of QUICK) assert.equal(selectCells([filter]).length, 1, filter);
  });

  test('a cold cache is read once, without warming up', () => {
    const [cell] = selectCells(['read 4k d16 c1 unix cold']);
    const load = loadOf(cell, { durationMs: 1000, warmupMs: 300 });
    assert.equal(load.lap, true);
    assert.equal(load.order, 'shuffled');
    assert.equal(load.warmupMs, undefined);
  });

  test('bars as the issue has them', () => {
    const bar = (filter: string) => barOf(selectCells([filter])[0]);
    assert.equal(bar('read 4k d1 c1 unix tmpfs'), 1.1);
    assert.equal(bar('read 4k d16 c4 tcp cache'), 1.5);
    assert.equal(bar('read 4k d64 c1 unix tmpfs'), 2.2);
    assert.equal(bar('write 4k d16 c1 unix tmpfs -flush32'), 1.2);
    assert.equal(bar('mixed 4k d64 c1 unix tmpfs'), 1.5);
    assert.equal(bar('read 1m d8 tcp tmpfs'), 1);
    assert.equal(bar('read 4k d16 c1 unix cold'), 1);
    assert.equal(bar('read 4k d64 c1 unix cold'), null);
    assert.equal(bar('write 4k d16 flush32 unix tmpfs'), null);
  });
});
