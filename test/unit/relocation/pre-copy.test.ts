/** The list of a source's changes, as it is asked for and as it counts. */
import assert from 'node:assert/strict';
import { describe, mock, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import type { Extent } from '../../../src/nbd/client/client.js';
import { DIRTY, DIRTY_BITMAP } from '../../../src/nbd/constants.js';
import {
  type ChangesQuestion,
  type ChangesSource,
  changesOf,
  RUNS_MAX,
} from '../../../src/relocation/pre-copy.js';
import { failsWith, turns } from '../../support/volume.js';

const B = 4096;
const SIZE = 100 * B + 512;
const COOKIE = 12345;
const ALL = { runs: null, cookie: null };

const round = (cookie = COOKIE, sealed = true): number => cookie * 8 + (sealed ? 2 : 0);

/** Answers with these extents, one after the other, of each question as many as it says. */
class Told implements ChangesSource {
  readonly asked: [offset: number, length: number][] = [];
  lengthMax = Number.POSITIVE_INFINITY;

  constructor(
    readonly extents: readonly Extent[],
    readonly atOnce = Number.POSITIVE_INFINITY,
  ) {}

  async dirty(_context: string, offset: number, length: number): Promise<Extent[] | null> {
    this.asked.push([offset, length]);
    if (length > this.lengthMax) throw new BlockferryError('bounds', 'too long');
    let at = 0;
    const answer: Extent[] = [];
    for (const extent of this.extents) {
      const [from, to] = [Math.max(at, offset), Math.min(at + extent.length, offset + length)];
      if (from < to && answer.length < this.atOnce) answer.push({ length: to - from, flags: extent.flags });
      at += extent.length;
    }
    return answer;
  }
}

const question = (more: Partial<ChangesQuestion> = {}): ChangesQuestion => ({
  size: SIZE,
  context: DIRTY,
  sealed: true,
  ...more,
});

describe('a list', () => {
  test('is the runs of changed blocks, with the round', async () => {
    const source = new Told([
      { length: 3 * B, flags: round() },
      { length: 2 * B, flags: round() + 1 },
      { length: SIZE - 6 * B, flags: round() },
      { length: B, flags: round() + 1 },
    ]);
    const last = SIZE - B;
    assert.deepEqual(await changesOf(source, question()), {
      runs: [3, 5, Math.floor(last / B), 101],
      lately: [3, 5, Math.floor(last / B), 101],
      cookie: COOKIE,
    });
    assert.deepEqual(source.asked, [[0, SIZE]]);
  });

  test('tells apart what changed in this round and what did in the one before', async () => {
    const source = new Told([
      { length: B, flags: round() + 1 },
      { length: B, flags: round() + 4 },
      { length: B, flags: round() + 5 },
      { length: SIZE - 3 * B, flags: round() },
    ]);
    const { runs, lately } = await changesOf(source, question());
    assert.deepEqual(
      [runs, lately],
      [
        [0, 3],
        [0, 1, 2, 3],
      ],
    );
  });

  test('of nothing is empty, which is not the same as everything', async () => {
    const source = new Told([{ length: SIZE, flags: round() }]);
    assert.deepEqual(await changesOf(source, question()), { runs: [], lately: [], cookie: COOKIE });
  });

  test('comes in pieces, and runs that touch are one', async () => {
    const flags = [1, 1, 0, 0, 1, 1, 1];
    const source = new Told(
      [
        ...flags.map((dirty) => ({ length: 4 * B, flags: round() + dirty })),
        { length: SIZE - 28 * B, flags: round() },
      ],
      1,
    );
    assert.deepEqual((await changesOf(source, question())).runs, [0, 8, 16, 28]);
    assert.equal(source.asked.length, 8);
  });

  test('of extents that are no whole blocks takes every block that they touch', async () => {
    const source = new Told([
      { length: B + 1, flags: round() },
      { length: 1, flags: round() + 1 },
      { length: 2 * B, flags: round() },
      { length: 100, flags: round() + 1 },
      { length: 100, flags: round() },
      { length: 1, flags: round() + 1 },
      { length: SIZE, flags: round() },
    ]);
    assert.deepEqual((await changesOf(source, question())).runs, [1, 2, 3, 4]);
  });

  test('goes in 32-bit lengths where the source has no longer ones', async () => {
    const size = 2 ** 33;
    const source = new Told([
      { length: 2 ** 32, flags: round() },
      { length: size - 2 ** 32, flags: round() + 1 },
    ]);
    source.lengthMax = 2 ** 32 - 1;
    const { runs } = await changesOf(source, question({ size }));
    assert.deepEqual(runs, [2 ** 32 / B, size / B]);
    assert.ok(source.asked.slice(1).every(([, length]) => length < 2 ** 32 && length % B === 0));
  });

  test('of a very long one the gaps count as changed: too much, never too little', async () => {
    const blocks = 4 * RUNS_MAX;
    const source: ChangesSource = {
      dirty: async (_context, offset, length) =>
        Array.from({ length: length / B }, (_, index) => ({
          length: B,
          flags: round() + ((offset / B + index) % 2 === 0 ? 1 : 0),
        })),
    };
    const { runs } = await changesOf(source, question({ size: blocks * B }));
    assert.ok(runs!.length >= 2 * RUNS_MAX && runs!.length <= 2 * RUNS_MAX + 100, `${runs!.length} numbers`);
    assert.deepEqual(runs!.slice(0, 4), [0, 1, 2, 3]);
    let covered = 0;
    for (let at = 0; at < runs!.length; at += 2) {
      const [first, end] = [runs![at]!, runs![at + 1]!];
      assert.ok(first < end && (at === 0 || first >= runs![at - 1]!));
      covered += Math.ceil(end / 2) - Math.ceil(first / 2);
    }
    assert.equal(covered, blocks / 2, 'every changed block is in a run');
  });
});

describe('everything may have changed', () => {
  const spoiled: [string, Extent[]][] = [
    [
      'a cut came between its parts',
      [
        { length: 3 * B, flags: round() },
        { length: SIZE - 3 * B, flags: round(COOKIE + 1) },
      ],
    ],
    [
      'a cut came between, and one more brought the first cookie back',
      [
        { length: B, flags: round() },
        { length: B, flags: round(COOKIE + 1) + 1 },
        { length: SIZE - 2 * B, flags: round() },
      ],
    ],
    ['nobody tracks there', [{ length: SIZE, flags: 2 }]],
    ['nobody tracks there, and all is dirty', [{ length: SIZE, flags: 3 }]],
    ['an empty answer', []],
  ];
  for (const [name, extents] of spoiled) {
    test(`when ${name}`, async () => {
      assert.deepEqual(await changesOf(new Told(extents, 1), question()), ALL);
    });
  }

  test('when the source does not know the context', async () => {
    assert.deepEqual(await changesOf({ dirty: async () => null }, question()), ALL);
  });
});

describe('the seal', () => {
  test("is asked for at a takeover: a source without it fails with 'phase'", async () => {
    const open = new Told([{ length: SIZE, flags: round(COOKIE, false) }]);
    await assert.rejects(changesOf(open, question()), failsWith('phase', /not sealed/));
    const half = new Told(
      [
        { length: B, flags: round() },
        { length: SIZE - B, flags: round(COOKIE, false) },
      ],
      1,
    );
    await assert.rejects(changesOf(half, question()), failsWith('phase'));
  });

  test('is of no matter between two rounds', async () => {
    const open = new Told([{ length: SIZE, flags: round(COOKIE, false) }]);
    assert.deepEqual(await changesOf(open, question({ sealed: false })), {
      runs: [],
      lately: [],
      cookie: COOKIE,
    });
  });

  test('is not told by a source that has only a bitmap, which has no rounds either', async () => {
    const source = new Told([
      { length: B, flags: 1 },
      { length: SIZE - B, flags: 0 },
    ]);
    for (const context of [DIRTY_BITMAP, 'qemu:dirty-bitmap:theirs'])
      assert.deepEqual(await changesOf(source, question({ context })), {
        runs: [0, 1],
        lately: [0, 1],
        cookie: null,
      });
  });
});

describe('a source that fails', () => {
  test('fails the list', async () => {
    const lost = new BlockferryError('source-unreachable', 'gone');
    await assert.rejects(
      changesOf({ dirty: () => Promise.reject(lost) }, question()),
      (error) => error === lost,
    );
    const narrow: ChangesSource = { dirty: () => Promise.reject(new BlockferryError('bounds', 'too long')) };
    await assert.rejects(changesOf(narrow, question()), failsWith('bounds'));
  });

  test("that takes too long is 'source-unreachable', and what it answers later is of no matter", async (t) => {
    mock.timers.enable({ apis: ['setTimeout'] });
    t.after(() => mock.timers.reset());
    let fail: (error: Error) => void = () => undefined;
    const hangs: ChangesSource = {
      dirty: () =>
        new Promise((_, reject) => {
          fail = reject;
        }),
    };
    const asked = changesOf(hangs, question({ timeoutMs: 250 }));
    const refused = assert.rejects(asked, failsWith('source-unreachable', /0\.25 s/));
    mock.timers.tick(249);
    assert.equal(await Promise.race([asked.catch(() => 'over'), turns(3).then(() => 'waits')]), 'waits');
    mock.timers.tick(1);
    await refused;
    fail(new Error('nobody hears this'));
    await turns();
  });

  test('that takes too long because it tells little at a time is not asked for ever', async (t) => {
    mock.timers.enable({ apis: ['setTimeout'] });
    t.after(() => mock.timers.reset());
    let asked = 0;
    const drips: ChangesSource = {
      dirty: async () => {
        asked++;
        await turns(1);
        return [{ length: 1, flags: round() }];
      },
    };
    const list = changesOf(drips, question({ timeoutMs: 250 }));
    const refused = assert.rejects(list, failsWith('source-unreachable'));
    await turns(10);
    assert.ok(asked > 1);
    mock.timers.tick(250);
    await refused;
    await turns(5);
    const last = asked;
    await turns(20);
    assert.equal(asked, last);
  });
});
