/** Read-ahead: which streams are found, and what is fetched in front of them. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { STREAM_MS, Streams, WINDOW_BLOCKS_MAX } from '../../../src/relocation/streams.js';
import type { Run } from '../../../src/relocation/zero-map.js';

const BLOCKS = 100_000;
const PIECE = 64;

/** A volume all of whose blocks are missing; what is asked for counts as fetched. */
class Disk {
  readonly here = new Set<number>();
  readonly asked: Run[] = [];
  readonly streams = new Streams(BLOCKS);
  nowMs = 0;

  readonly find = (first: number, end: number): Run | undefined => {
    let from = first;
    while (from < end && this.here.has(from)) from++;
    if (from >= end) return undefined;
    let to = from;
    while (to < end && to - from < PIECE && !this.here.has(to)) to++;
    return { first: from, end: to };
  };

  /** The guest reads; answers whether it had to wait. */
  read(first: number, length: number): boolean {
    const end = first + length;
    let waited = false;
    for (let block = first; block < end; block++) if (!this.here.has(block)) waited = true;
    this.streams.read(first, end, waited, this.nowMs);
    for (let block = first; block < end; block++) this.here.add(block);
    return waited;
  }

  /** Fetches all that the streams want. */
  fetch(): Run[] {
    const runs: Run[] = [];
    for (
      let run = this.streams.next(PIECE, this.find);
      run !== undefined;
      run = this.streams.next(PIECE, this.find)
    ) {
      assert.ok(run.first >= 0 && run.end <= BLOCKS && run.first < run.end, JSON.stringify(run));
      assert.ok(run.end - run.first <= PIECE);
      for (let block = run.first; block < run.end; block++) {
        assert.ok(!this.here.has(block), `block ${block} is asked for again`);
        this.here.add(block);
      }
      runs.push(run);
      assert.ok(runs.length < 10_000, 'it never ends');
    }
    return runs;
  }
}

test('one read is no stream, and neither are reads here and there', () => {
  const disk = new Disk();
  for (const first of [1000, 50_000, 7, 3000, 90_000, 12_345]) disk.read(first, 8);
  assert.equal(disk.streams.active, false);
  assert.deepEqual(disk.fetch(), []);
});

test('two reads that touch are: what is in front of them is fetched, and the guest does not wait any more', () => {
  const disk = new Disk();
  disk.read(1000, 32);
  disk.read(1032, 32);
  assert.ok(disk.streams.active);
  const [first] = disk.fetch();
  assert.equal(first!.first, 1064);
  for (let block = 1064; block < 20_000; block += 32) {
    assert.equal(disk.read(block, 32), false, `at ${block}`);
    disk.fetch();
  }
});

test('likewise backward', () => {
  const disk = new Disk();
  disk.read(20_000, 32);
  disk.read(19_968, 32);
  disk.fetch();
  for (let block = 19_936; block > 1000; block -= 32) {
    assert.equal(disk.read(block, 32), false, `at ${block}`);
    disk.fetch();
  }
});

test('likewise in strides, forward and backward, of which only what is read is fetched', () => {
  for (const step of [100, -100]) {
    const disk = new Disk();
    const at = (index: number): number => 50_000 + index * step;
    for (let index = 0; index < 4; index++) disk.read(at(index), 4);
    const runs = disk.fetch();
    assert.ok(runs.length >= 3);
    for (const { first, end } of runs) {
      assert.ok(Number.isInteger((first - 50_000) / step));
      assert.equal(end - first, 4);
    }
    for (let index = 4; index < 300; index++) {
      assert.equal(disk.read(at(index), 4), false, `read ${index}`);
      disk.fetch();
    }
  }
});

test('three at equal distances may be chance', () => {
  const disk = new Disk();
  for (const first of [100, 400, 700]) disk.read(first, 8);
  assert.equal(disk.streams.active, false);
});

test('reads of several streams may alternate', () => {
  const disk = new Disk();
  const starts = [0, 30_000, 60_000, 90_000];
  for (let index = 0; index < 50; index++) {
    for (const start of starts) {
      const waited = disk.read(start + index * 16, 16);
      if (index >= 2) assert.equal(waited, false, `read ${index} of ${start}`);
      disk.fetch();
    }
  }
});

test('the window doubles only while the guest waits, and has a limit', () => {
  const disk = new Disk();
  disk.read(0, 64);
  disk.read(64, 64);
  const window = (): number => disk.fetch().reduce((sum, { first, end }) => sum + end - first, 0);
  assert.equal(window(), 256);
  // All is here when it comes: as much is fetched as is read.
  for (let at = 128; at < 2048; at += 64) {
    assert.equal(disk.read(at, 64), false);
    assert.equal(window(), 64);
  }
  // Nothing is here when it comes: what was fetched is far away.
  const lost = new Disk();
  lost.read(0, 64);
  let most = 0;
  for (let at = 64; at < BLOCKS - WINDOW_BLOCKS_MAX - 64; at += 64) {
    lost.read(at, 64);
    const ahead = lost.fetch().reduce((end, run) => Math.max(end, run.end), 0) - at - 64;
    most = Math.max(most, ahead);
    for (let block = at + 64; block < at + 128; block++) lost.here.delete(block);
  }
  assert.equal(most, WINDOW_BLOCKS_MAX);
});

test('reads that overtake each other stay in their stream', () => {
  const disk = new Disk();
  const order = [0, 1, 3, 2, 5, 4, 7, 6, 9, 8];
  for (const index of order) disk.read(1000 + index * 16, 16);
  assert.ok(disk.fetch().every(({ first }) => first >= 1160));
});

test('a stream that nobody reads from is forgotten', () => {
  const disk = new Disk();
  disk.read(0, 8);
  disk.read(8, 8);
  disk.nowMs = STREAM_MS;
  disk.streams.expire(disk.nowMs);
  assert.ok(disk.streams.active);
  disk.nowMs++;
  disk.streams.expire(disk.nowMs);
  assert.equal(disk.streams.active, false);
});

test('the end of the volume, and its start, end a stream', () => {
  const disk = new Disk();
  disk.read(BLOCKS - 96, 32);
  disk.read(BLOCKS - 64, 32);
  assert.deepEqual(disk.fetch(), [{ first: BLOCKS - 32, end: BLOCKS }]);
  const back = new Disk();
  back.read(64, 32);
  back.read(32, 32);
  assert.deepEqual(back.fetch(), [{ first: 0, end: 32 }]);
});

test('whatever is read: nothing outside the volume is asked for, nothing twice, and it ends', () => {
  const read = fc.tuple(
    fc.oneof(
      fc.integer({ min: 0, max: BLOCKS - 1 }),
      fc.integer({ min: 0, max: 40 }).map((n) => n * 16),
    ),
    fc.integer({ min: 1, max: 300 }),
    fc.boolean(),
  );
  fc.assert(
    fc.property(fc.array(read, { maxLength: 60 }), (reads) => {
      const disk = new Disk();
      for (const [first, length, fetches] of reads) {
        disk.read(first, Math.min(length, BLOCKS - first));
        if (fetches) disk.fetch();
      }
    }),
    { numRuns: 300 },
  );
});
