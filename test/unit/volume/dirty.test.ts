/** The dirty map: what it tells whom, and what of it is trusted after a close, a kill and a crash of the machine. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync, linkSync, readFileSync, renameSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, mock, test } from 'node:test';
import { COOKIE_MAX, DirtyMap, type DirtyOwner } from '../../../src/volume/dirty.js';
import { failsWith, OTHER_BOOT, tempFolder } from '../../support/volume.js';

/** More than a page of bits, and no multiple of eight. */
const BLOCKS = 40_003;
const STAMP = '1:2:3:4';
const MOVE = 'vm1-20260101T000000Z-00000001';
const OTHER_MOVE = 'vm1-20260101T000000Z-00000002';
const SINCE = 7;
// Places in the file, as src/volume/dirty.ts has them.
const AT = { magic: 0, state: 8, crc: 12, blocks: 16, id: 24, boot: 64, since: 104, maps: 4096 };

interface Place {
  readonly folder: string;
  readonly file: string;
  readonly owner: DirtyOwner;
}

function place(blocks = BLOCKS): Place {
  const folder = tempFolder();
  return { folder, file: join(folder, 'dirty.live'), owner: { id: randomUUID(), blocks } };
}

/** Runs of blocks that are told as changed. */
function told(map: DirtyMap, blocks = BLOCKS): [number, number][] {
  const runs: [number, number][] = [];
  for (let at = 0; at < blocks; ) {
    const { dirty, end } = map.stretches(blocks)(at);
    assert.ok(end > at && end <= blocks);
    if (dirty) {
      const last = runs.at(-1);
      if (last?.[1] === at) last[1] = end;
      else runs.push([at, end]);
    }
    at = end;
  }
  return runs;
}

function damage(path: string, at: number, change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(path);
  change(bytes.subarray(at));
  writeFileSync(path, bytes);
}

const flip = (bytes: Buffer): void => {
  bytes[0]! ^= 1;
};

/** A map of a volume that came from generation SINCE, which a move copies in its second round. */
async function second({ folder, owner }: Place): Promise<{ map: DirtyMap; cookie: number }> {
  const map = await DirtyMap.create(folder, owner, SINCE);
  map.mark(1, 2);
  const { cookie } = map.claim(MOVE, null, []);
  map.mark(5, 9);
  const next = map.cut(MOVE, cookie, []);
  map.mark(30_000, 30_001);
  return { map, cookie: next };
}

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

describe('what the next process trusts', () => {
  test('closed in order, everything, if the image was not touched', async () => {
    const there = place();
    const { map, cookie } = await second(there);
    const before = told(map);
    map.close(STAMP);
    const again = DirtyMap.open(there.folder, there.owner, STAMP)!;
    assert.deepEqual([again.since, again.cookie, again.move], [SINCE, cookie, MOVE]);
    assert.deepEqual(told(again), before);
    again.unmap();
  });

  test('closed in order in an earlier boot as well', async () => {
    const there = place();
    const { map } = await second(there);
    const before = told(map);
    map.close(STAMP);
    damage(there.file, AT.boot, (bytes) => bytes.write(OTHER_BOOT, 'latin1'));
    const again = DirtyMap.open(there.folder, there.owner, STAMP)!;
    assert.deepEqual([again.since, told(again)], [SINCE, before]);
    again.unmap();
  });

  test('killed in this boot: the rounds go on, and home is not offered any more', async () => {
    const there = place();
    const { map, cookie } = await second(there);
    const before = told(map);
    map.unmap();
    const again = DirtyMap.open(there.folder, there.owner, 'another stamp')!;
    assert.deepEqual([again.since, again.cookie, again.move], [0, cookie, MOVE]);
    assert.deepEqual(told(again), before);
    const next = again.cut(MOVE, cookie, []);
    again.unmap();
    const third = DirtyMap.open(there.folder, there.owner, null)!;
    assert.equal(third.cut(MOVE, cookie, []), next, 'also the round before is known');
    assert.equal(third.claim(OTHER_MOVE, SINCE, []).home, false);
    third.unmap();
  });

  test('killed behind a close that was opened again: as killed', async () => {
    const there = place();
    const { map } = await second(there);
    map.close(STAMP);
    DirtyMap.open(there.folder, there.owner, STAMP)!.unmap();
    const again = DirtyMap.open(there.folder, there.owner, STAMP)!;
    assert.equal(again.since, 0);
    again.unmap();
  });

  /** Each with what becomes of the file; nothing of it is trusted. */
  const worthless: [
    name: string,
    close: string | null | 'killed',
    spoil: (there: Place) => void,
    stamp?: string,
  ][] = [
    ['an image that was touched', STAMP, () => undefined, '1:2:3:5'],
    ['an image without a stamp, killed in another boot', null, (there) => otherBoot(there)],
    ['a kill in another boot', 'killed', (there) => otherBoot(there)],
    ['a bit that flipped', STAMP, ({ file }) => damage(file, AT.maps + 20_000, flip)],
    ['a damaged checksum', STAMP, ({ file }) => damage(file, AT.crc, flip)],
    ['another generation in its head', STAMP, ({ file }) => damage(file, AT.since + 7, flip)],
    ['a damaged head', STAMP, ({ file }) => damage(file, AT.magic, flip)],
    [
      'a state that there is not',
      STAMP,
      ({ file }) => damage(file, AT.state + 3, (bytes) => bytes.fill(9, 0, 1)),
    ],
    ['another number of blocks', STAMP, ({ file }) => damage(file, AT.blocks + 7, flip)],
    ['another volume', STAMP, ({ file }) => damage(file, AT.id, flip)],
    ['a file that was cut', STAMP, ({ file }) => truncateSync(file, 3 * 4096)],
    ['an empty file', 'killed', ({ file }) => truncateSync(file, 0)],
    ['a file that is too long', 'killed', ({ file }) => truncateSync(file, 10 * 4096 + 4096)],
    ['zeros', STAMP, ({ file }) => damage(file, 0, (bytes) => bytes.fill(0))],
  ];
  for (const [name, close, spoil, stamp = STAMP] of worthless) {
    test(`${name}: nothing, and the file goes`, async () => {
      const there = place();
      const { map } = await second(there);
      if (close === 'killed') map.unmap();
      else map.close(close);
      spoil(there);
      assert.equal(DirtyMap.open(there.folder, there.owner, stamp), null);
      assert.ok(!existsSync(there.file));
    });
  }

  function otherBoot({ file }: Place): void {
    damage(file, AT.boot, (bytes) => bytes.write(OTHER_BOOT, 'latin1'));
  }

  test('killed while no move copied: nothing, for nobody can ask', async () => {
    const there = place();
    const map = await DirtyMap.create(there.folder, there.owner, SINCE);
    map.mark(1, 2);
    map.unmap();
    assert.equal(DirtyMap.open(there.folder, there.owner, STAMP), null);
    assert.ok(!existsSync(there.file));
  });

  test('closed without a stamp: nothing, for nobody can tell who changed the image since', async () => {
    const there = place();
    const { map } = await second(there);
    map.close(null);
    assert.equal(DirtyMap.open(there.folder, there.owner, null), null);
    assert.ok(!existsSync(there.file));
  });

  test('where there is none: nothing', async () => {
    const { folder, owner } = place();
    assert.equal(DirtyMap.open(folder, owner, STAMP), null);
    await DirtyMap.remove(folder);
  });

  test('removed, also a copy that a crash brings back is worth nothing', async () => {
    const there = place();
    const { map } = await second(there);
    map.close(STAMP);
    // What is removed is first marked as worth nothing, on disk: here the mark is seen through another name.
    linkSync(there.file, `${there.file}.other`);
    await DirtyMap.remove(there.folder);
    assert.ok(!existsSync(there.file));
    renameSync(`${there.file}.other`, there.file);
    assert.equal(DirtyMap.open(there.folder, there.owner, STAMP), null);
  });
});

describe('killed within a step', () => {
  /** The file as it is before and after each change of it while `step` runs. */
  function momentsOf(there: Place, step: () => void): Buffer[] {
    const moments: Buffer[] = [];
    let looking = false;
    const look = (): void => {
      looking = true;
      const now = readFileSync(there.file);
      if (moments.at(-1)?.equals(now) !== true) moments.push(now);
      looking = false;
    };
    const typed = Object.getPrototypeOf(Uint8Array.prototype) as Uint8Array;
    const watch = (object: object, name: string): void => {
      const real = Reflect.get(object, name) as (...words: unknown[]) => unknown;
      mock.method(
        object,
        name as never,
        function (this: unknown, ...words: unknown[]) {
          if (looking) return Reflect.apply(real, this, words);
          look();
          const answer: unknown = Reflect.apply(real, this, words);
          look();
          return answer;
        } as never,
      );
    };
    watch(typed, 'fill');
    watch(typed, 'set');
    watch(Buffer.prototype, 'writeUInt32BE');
    try {
      step();
    } finally {
      mock.restoreAll();
    }
    look();
    return moments;
  }

  function has(runs: [number, number][], block: number): boolean {
    return runs.some(([first, end]) => first <= block && block < end);
  }

  test('a cut: the destination of either round is told too much, never too little', async () => {
    const there = place();
    const { map, cookie } = await second(there);
    // Round `cookie` told [5, 9), which its destination has taken to heart; 30000 changed in it.
    const moments = momentsOf(there, () => void map.cut(MOVE, cookie, []));
    const { cookie: next } = map;
    map.unmap();
    assert.ok(moments.length >= 4, `${moments.length}`);
    for (const moment of moments) {
      writeFileSync(there.file, moment);
      const left = DirtyMap.open(there.folder, there.owner, null)!;
      assert.ok(left.cookie === cookie || left.cookie === next);
      assert.ok(has(told(left), 30_000), 'a takeover now is told of it');
      const again = left.cut(MOVE, cookie, []);
      assert.ok(has(told(left), 30_000), 'and so is the next round');
      assert.equal(left.cookie, again);
      left.unmap();
    }
  });

  test('a claim: it is one of the old move, of the new one with all it must know, or of nobody', async () => {
    for (const since of [null, SINCE]) {
      const there = place();
      const { map, cookie } = await second(there);
      const moments = momentsOf(there, () => void map.claim(OTHER_MOVE, since, [{ first: 77, end: 78 }]));
      const next = map.cookie;
      map.unmap();
      let nobodys = 0;
      for (const moment of moments) {
        writeFileSync(there.file, moment);
        const left = DirtyMap.open(there.folder, there.owner, null);
        if (left === null) {
          nobodys++;
          continue;
        }
        if (left.cookie === cookie) {
          assert.equal(left.move, MOVE);
          assert.ok(has(told(left), 5) && has(told(left), 30_000));
        } else {
          assert.deepEqual([left.cookie, left.move], [next, OTHER_MOVE]);
          if (since === null) assert.deepEqual(told(left), [[77, 78]]);
          else for (const block of [1, 5, 30_000]) assert.ok(has(told(left), block));
        }
        left.unmap();
      }
      assert.ok(nobodys > 0, 'there is a moment in between');
    }
  });
});
