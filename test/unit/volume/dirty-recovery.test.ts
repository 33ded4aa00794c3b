/** What of a dirty map is trusted after a close, a kill and a crash of the machine. */
import assert from 'node:assert/strict';
import { existsSync, linkSync, readFileSync, renameSync, truncateSync, writeFileSync } from 'node:fs';
import { describe, mock, test } from 'node:test';
import { DirtyMap } from '../../../src/volume/dirty.js';
import { MOVE, OTHER_MOVE, type Place, place, SINCE, STAMP, second, told } from '../../support/dirty.js';
import { OTHER_BOOT } from '../../support/volume.js';

// Places in the file, as src/volume/dirty.ts has them.
const AT = { magic: 0, state: 8, crc: 12, blocks: 16, id: 24, boot: 64, since: 104, maps: 4096 };

function damage(path: string, at: number, change: (bytes: Buffer) => void): void {
  const bytes = readFileSync(path);
  change(bytes.subarray(at));
  writeFileSync(path, bytes);
}

const flip = (bytes: Buffer): void => {
  bytes[0]! ^= 1;
};

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
