/** Sifting by itself: what is taken and given back, by whom it is kept waiting, and what is dropped. */
import assert from 'node:assert/strict';
import { mock, type TestContext, test } from 'node:test';
import pino from 'pino';
import { Errno } from '../../../src/nbd/constants.js';
import type { Traffic } from '../../../src/relocation/fetcher.js';
import { type Copying, Seeder } from '../../../src/relocation/seeder.js';
import type { Found } from '../../../src/relocation/seeds.js';
import type { Run } from '../../../src/relocation/zero-map.js';
import { HASH_BYTES, ZERO_HASH } from '../../../src/volume/block-hash.js';
import type { BlockStore } from '../../../src/volume/store.js';
import { quiet } from '../../lab/ferry.js';

const BLOCK = 4096;
const BLOCKS = 1 << 20;

/** A copy in ascending order over a store that only notes what is filled. */
class Bench {
  readonly filled: string[] = [];
  readonly asked: { first: number; end: number; answer: (hashes: Uint8Array | null) => void }[] = [];
  readonly looked: { answer: (found: Found | null) => void }[] = [];
  readonly missing = new Array<boolean>(2048).fill(true);
  cursor = 0;
  gaveUp = 0;
  idle = true;
  usable = true;
  fillErrno: number = Errno.OK;
  readonly store = {
    epoch: 1,
    image: { size: BLOCKS * BLOCK },
    fillLater: async (epoch: number, first: number, end: number) => this.#fill('data', epoch, first, end),
    fillZeroes: async (epoch: number, first: number, end: number) => this.#fill('zeros', epoch, first, end),
  };
  readonly traffic: Traffic = {
    demandBytes: 0,
    backgroundBytes: 0,
    throughBytes: 0,
    zeroBytes: 0,
    seedBytes: 0,
  };
  readonly seeder: Seeder;
  readonly copying: Copying;

  constructor(t: TestContext) {
    const bench = this;
    this.copying = {
      get idle() {
        return bench.idle;
      },
      linkRate: 0,
      pump: () => undefined,
      asked: () => undefined,
      seeded: () => undefined,
    };
    this.seeder = new Seeder(
      this.store as unknown as BlockStore,
      this.traffic,
      {
        get usable() {
          return bench.usable;
        },
        of: (first, end) => new Promise((answer) => this.asked.push({ first, end, answer })),
        giveUp: () => {
          this.gaveUp++;
          this.usable = false;
        },
        start: () => undefined,
        stop: () => undefined,
        close: async () => undefined,
        wireBytes: 0,
      },
      {
        usable: true,
        find: () => new Promise((answer) => this.looked.push({ answer })),
        release: () => undefined,
      },
      pino({ level: 'silent' }),
    );
    this.seeder.start(this.copying);
    t.after(() => this.seeder.close());
  }

  #fill(what: string, epoch: number, first: number, end: number): number {
    if (this.fillErrno !== Errno.OK) return this.fillErrno;
    if (epoch !== this.store.epoch) return Errno.OK;
    this.filled.push(`${what} ${first}-${end}`);
    this.missing.fill(false, first, end);
    return Errno.OK;
  }

  readonly find = (first: number, end: number): Run | undefined => {
    const from = this.missing.indexOf(true, first);
    if (from === -1 || from >= end) return undefined;
    const past = this.missing.indexOf(false, from);
    return { first: from, end: Math.min(end, from + 64, past === -1 ? end : past) };
  };

  /** The next 64 blocks that are not taken. */
  readonly pick = (): Run | undefined => {
    const run = this.seeder.untaken(this.cursor, 2048, this.find);
    if (run !== undefined) this.cursor = run.end;
    return run;
  };

  next(): Run | undefined {
    return this.seeder.next(this.find, this.pick);
  }
}

/** Hashes of `blocks` blocks; those of `zeros` are of zeros. */
function hashes(blocks: number, zeros: readonly number[] = []): Uint8Array {
  const bytes = new Uint8Array(blocks * HASH_BYTES).fill(1);
  for (const block of zeros) bytes.set(ZERO_HASH, block * HASH_BYTES);
  return bytes;
}

function found(blocks: number, which: readonly number[]): Found {
  const flags = new Uint8Array(blocks);
  for (const block of which) flags[block] = 1;
  return { found: flags, content: Buffer.alloc(blocks * BLOCK) };
}

test('a run is given back without what was found, which is filled in runs', async (t) => {
  const bench = new Bench(t);
  assert.equal(bench.next(), undefined);
  assert.equal(bench.asked.length, 8, 'as if half of them had to be fetched');
  const [first] = bench.asked;
  assert.deepEqual([first!.first, first!.end], [0, 64]);
  first!.answer(hashes(64, [10, 11, 50]));
  await quiet(2);
  bench.looked[0]!.answer(found(64, [0, 1, 2, 9, 60, 61, 62, 63]));
  await quiet(2);
  assert.deepEqual(bench.filled, ['data 0-3', 'data 9-10', 'zeros 10-12', 'zeros 50-51', 'data 60-64']);
  assert.deepEqual([bench.traffic.seedBytes, bench.traffic.zeroBytes], [8 * BLOCK, 3 * BLOCK]);
  assert.deepEqual(bench.next(), { first: 3, end: 9 });
  bench.missing.fill(false, 3, 9);
  assert.deepEqual(bench.next(), { first: 12, end: 50 });
  bench.missing.fill(false, 12, 50);
  assert.deepEqual(bench.next(), { first: 51, end: 60 });
  bench.missing.fill(false, 51, 60);
  assert.equal(bench.next(), undefined, 'the rest waits for its hashes');
});

test('what was asked for in one epoch is filled in no other', async (t) => {
  const bench = new Bench(t);
  bench.next();
  bench.store.epoch = 2;
  bench.asked[0]!.answer(hashes(64));
  await quiet(2);
  bench.looked[0]!.answer(found(64, [0, 1]));
  await quiet(2);
  assert.deepEqual(bench.filled, []);
});

test('behind a stop nothing is filled, and nothing is taken', async (t) => {
  const bench = new Bench(t);
  bench.next();
  bench.asked[0]!.answer(hashes(64));
  await quiet(2);
  bench.seeder.stop();
  bench.looked[0]!.answer(found(64, [0, 1]));
  await quiet(2);
  assert.deepEqual(bench.filled, []);
  bench.cursor = 0;
  bench.usable = false;
  assert.deepEqual(bench.next(), { first: 0, end: 64 });
});

test('what cannot be filled is fetched', async (t) => {
  const bench = new Bench(t);
  bench.fillErrno = Errno.ENOSPC;
  bench.next();
  bench.asked[0]!.answer(hashes(64));
  await quiet(2);
  bench.looked[0]!.answer(found(64, [0, 1]));
  await quiet(2);
  assert.equal(bench.traffic.seedBytes, 0);
  assert.deepEqual(bench.next(), { first: 0, end: 64 });
});

test('what is taken is bounded', async (t) => {
  const bench = new Bench(t);
  for (let block = 1; block < 2048; block += 2) bench.missing[block] = false;
  bench.next();
  assert.equal(bench.asked.length, 512, 'runs of one block');
  bench.asked[0]!.answer(null);
  await quiet(2);
  assert.deepEqual(bench.next(), { first: 0, end: 1 });
});

test('it looks further ahead the more it finds', async (t) => {
  const [all, nothing] = [new Bench(t), new Bench(t)];
  for (const bench of [all, nothing]) {
    const blocks = bench === all ? Array.from({ length: 64 }, (_, i) => i) : [];
    for (let run = 0; run < 12; run++) {
      bench.next();
      bench.asked[run]!.answer(hashes(64));
      await quiet(1);
      bench.looked[run]!.answer(found(64, blocks));
      await quiet(1);
      for (let left = bench.next(); left !== undefined; left = bench.next())
        bench.missing.fill(false, left.first, left.end);
    }
  }
  assert.deepEqual([all.asked.length, nothing.asked.length], [12 + 17, 12 + 6]);
});

test('a copy that is idle for its sake goes on without, however far the sifting is', async (t) => {
  mock.timers.enable({ apis: ['setInterval'] });
  t.after(() => mock.timers.reset());
  let now = 1000;
  t.mock.method(performance, 'now', () => now);
  const pass = (ms: number): void => {
    for (let left = ms; left > 0; left -= 100) {
      now += 100;
      mock.timers.tick(100);
    }
  };
  const bench = new Bench(t);
  bench.next();
  bench.idle = false;
  pass(60_000);
  assert.equal(bench.gaveUp, 0, 'a copy that has work loses nothing');
  bench.idle = true;
  // What is sifted makes up for the wait: 256 KiB are 52 ms of a link whose rate is not known.
  pass(1900);
  bench.asked[0]!.answer(hashes(64));
  for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
  bench.looked[0]!.answer(
    found(
      64,
      Array.from({ length: 64 }, (_, i) => i),
    ),
  );
  for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
  assert.equal(bench.next(), undefined);
  pass(100);
  assert.equal(bench.gaveUp, 0);
  // One waits for its hashes, one for the seeds.
  bench.asked[1]!.answer(hashes(64));
  for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
  pass(300);
  assert.equal(bench.gaveUp, 1);
  assert.deepEqual(bench.next(), { first: 64, end: 128 });
  assert.deepEqual(bench.next(), { first: 128, end: 192 });
  // What comes after all is not waited for, nor kept.
  bench.looked[1]!.answer(found(64, [0, 1]));
  for (let turn = 0; turn < 3; turn++) await new Promise((resolve) => setImmediate(resolve));
  assert.deepEqual(bench.filled, ['data 0-64']);
});
