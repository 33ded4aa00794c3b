/** The dirty map: what it tells, in rounds, and whom. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { COOKIE_MAX, DirtyMap } from '../../../src/volume/dirty.js';
import { BLOCKS, MOVE, OTHER_MOVE, place, SINCE, STAMP, second, told } from '../../support/dirty.js';
import { failsWith } from '../../support/volume.js';

describe('a new dirty map', () => {
  test('tells of nothing, belongs to no move, and knows since when', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, SINCE);
    assert.deepEqual([map.since, map.cookie, map.move, map.changedBlocks], [SINCE, 0, null, 0]);
    assert.deepEqual(told(map), []);
    map.unmap();
  });

  test('replaces an old one', async () => {
    const there = place();
    const { map } = await second(there);
    map.close(STAMP);
    const again = await DirtyMap.create(there.folder, there.owner, 3);
    assert.deepEqual([again.since, again.cookie, again.changedBlocks], [3, 0, 0]);
    assert.deepEqual(told(again), []);
    again.unmap();
  });

  test('of one block, and of the last block of many', async () => {
    const { folder, owner } = place(1);
    const map = await DirtyMap.create(folder, owner, 0);
    map.mark(0, 1);
    assert.deepEqual(told(map, 1), [[0, 1]]);
    map.unmap();
    const large = place();
    const other = await DirtyMap.create(large.folder, large.owner, 0);
    other.mark(BLOCKS - 1, BLOCKS);
    assert.deepEqual(told(other), [[BLOCKS - 1, BLOCKS]]);
    other.unmap();
  });
});

describe('rounds', () => {
  test('a cut tells what changed in the round before and since, and the next one the first no more', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    map.mark(0, 100);
    const { cookie, home } = map.claim(MOVE, null, []);
    assert.equal(home, false);
    assert.deepEqual(told(map), [], 'what changed before is of no matter to it');
    map.mark(7, 8);
    map.mark(5000, 6000);
    assert.equal(map.changedBlocks, 1001);
    const second = map.cut(MOVE, cookie, []);
    assert.notEqual(second, cookie);
    assert.equal(map.changedBlocks, 0);
    map.mark(5999, 6001);
    assert.deepEqual(told(map), [
      [7, 8],
      [5000, 6001],
    ]);
    const third = map.cut(MOVE, second, []);
    assert.deepEqual(told(map), [[5999, 6001]]);
    map.cut(MOVE, third, []);
    assert.deepEqual(told(map), []);
    map.unmap();
  });

  test('a cut that is asked for again changes nothing', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    const { cookie } = map.claim(MOVE, null, []);
    map.mark(3, 4);
    const next = map.cut(MOVE, cookie, []);
    map.mark(9, 10);
    const before = Buffer.from(map.bits);
    assert.equal(map.cut(MOVE, cookie, [{ first: 20, end: 30 }]), next);
    assert.deepEqual(Buffer.from(map.bits), before);
    assert.deepEqual(told(map), [
      [3, 4],
      [9, 10],
    ]);
    map.unmap();
  });

  test('a cut of another round, of an older one or of another move is refused and changes nothing', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    const { cookie: first } = map.claim(MOVE, null, []);
    map.mark(3, 4);
    const second = map.cut(MOVE, first, []);
    const third = map.cut(MOVE, second, []);
    map.mark(9, 10);
    for (const [move, cookie] of [
      [MOVE, first],
      [MOVE, 0],
      [MOVE, COOKIE_MAX],
      [OTHER_MOVE, third],
      [OTHER_MOVE, second],
    ] as const) {
      assert.throws(() => map.cut(move, cookie, []), failsWith('generation'));
      assert.equal(map.cookie, third);
      assert.deepEqual(told(map), [[9, 10]]);
    }
    map.unmap();
  });

  test('the first round of a move has none before it', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    map.claim(MOVE, null, []);
    assert.throws(() => map.cut(MOVE, 0, []), failsWith('generation'));
    map.unmap();
  });

  test('cookies are 30 bits and change with every round, also behind the largest', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    let { cookie } = map.claim(MOVE, null, []);
    const seen = new Set([cookie]);
    for (let round = 0; round < 200; round++) {
      const next = map.cut(MOVE, cookie, []);
      assert.ok(next >= 1 && next <= COOKIE_MAX && next !== cookie);
      seen.add(next);
      cookie = next;
    }
    assert.ok(seen.size > 195);
    map.unmap();
  });

  test('what threads have in hand stays told over a claim and a cut', async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    map.mark(100, 200); // as they were locked
    const locked = [{ first: 100, end: 200 }];
    const { cookie } = map.claim(MOVE, null, locked);
    assert.deepEqual(told(map), [[100, 200]]);
    const second = map.cut(MOVE, cookie, locked);
    const third = map.cut(MOVE, second, locked);
    assert.deepEqual(told(map), [[100, 200]]);
    map.cut(MOVE, third, []);
    assert.deepEqual(told(map), [[100, 200]], 'one round longer: it was marked in the last');
    map.unmap();
  });
});

describe('who may ask', () => {
  test('a claim that is repeated by the same move changes nothing', async () => {
    const there = place();
    const { map, cookie } = await second(there);
    const before = told(map);
    assert.deepEqual(map.claim(MOVE, null, []), { cookie, home: false });
    assert.deepEqual(map.claim(MOVE, SINCE, []), { cookie, home: false }, 'nor with another question');
    assert.deepEqual(told(map), before);
    assert.equal(map.move, MOVE);
    map.unmap();
  });

  test("another move's claim ends the rounds of the first", async () => {
    const there = place();
    const { map, cookie } = await second(there);
    const claimed = map.claim(OTHER_MOVE, null, []);
    assert.equal(map.move, OTHER_MOVE);
    assert.notEqual(claimed.cookie, cookie);
    assert.deepEqual(told(map), []);
    assert.throws(() => map.cut(MOVE, cookie, []), failsWith('generation'));
    map.unmap();
  });

  test('a move that goes home is told all that changed since, whatever moves came in between', async () => {
    const there = place();
    const { map } = await second(there);
    assert.equal(map.claim(OTHER_MOVE, SINCE, []).home, true);
    const all = [
      [1, 2],
      [5, 9],
      [30_000, 30_001],
    ];
    assert.deepEqual(told(map), all);
    // What its rounds take out is kept for the next that goes home.
    const { cookie } = map;
    const next = map.cut(OTHER_MOVE, cookie, []);
    map.cut(OTHER_MOVE, next, []);
    assert.deepEqual(told(map), []);
    map.mark(12, 13);
    map.release();
    assert.equal(map.claim('third', SINCE, []).home, true);
    assert.deepEqual(told(map), [...all.slice(0, 2), [12, 13], all[2]!]);
    map.unmap();
  });

  test('another generation, and none, is no home', async () => {
    for (const since of [SINCE - 1, SINCE + 1, 0, null]) {
      const { folder, owner } = place();
      const map = await DirtyMap.create(folder, owner, SINCE);
      map.mark(1, 2);
      assert.equal(map.claim(MOVE, since, []).home, false);
      assert.deepEqual(told(map), []);
      assert.equal(map.since, SINCE, 'what home has to know stays');
      map.unmap();
    }
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    assert.equal(map.claim(MOVE, 0, []).home, false, 'nobody has generation 0');
    map.unmap();
  });

  test('after a release no move copies, and nothing is lost for home', async () => {
    const there = place();
    const { map, cookie } = await second(there);
    map.release();
    assert.deepEqual([map.cookie, map.move], [0, null]);
    assert.throws(() => map.cut(MOVE, cookie, []), failsWith('generation'));
    assert.throws(() => map.cut(MOVE, 0, []), failsWith('generation'));
    assert.equal(map.claim('home', SINCE, []).home, true);
    assert.equal(told(map).length, 3);
    map.unmap();
  });

  test("a move's name that is too long is refused", async () => {
    const { folder, owner } = place();
    const map = await DirtyMap.create(folder, owner, 0);
    map.claim('m'.repeat(128), null, []);
    assert.equal(map.move, 'm'.repeat(128));
    assert.throws(() => map.claim('ä'.repeat(65), null, []), failsWith('usage'));
    map.claim('short', null, []);
    assert.equal(map.move, 'short');
    map.unmap();
  });
});
