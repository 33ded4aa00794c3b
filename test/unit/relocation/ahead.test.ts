/** A standby that copies ahead over a real link, from a source that tells its changes and whose answers the test holds back. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { type TestContext, test } from 'node:test';
import { DIRTY } from '../../../src/nbd/constants.js';
import { DIRTY_COOKIE_UNIT, DirtyFlag } from '../../../src/volume/dirty-status.js';
import {
  assertBlocks,
  BLOCK,
  type Ferry,
  Lab,
  MIB,
  pattern,
  readAt,
  type Source,
  until,
  VOLUME_ID,
} from '../../lab/ferry.js';
import { failsWith } from '../../support/volume.js';

const SIZE = 2 * MIB;
const BLOCKS = SIZE / BLOCK;
/** Blocks of a region that is left alone while it is overwritten. */
const REGION = 64;

/** What the source tells: `changed` of round `cookie`. */
class Tracked {
  cookie = 1;
  sealed = false;
  changed = new Set<number>();
  /** What was told in the round before. */
  told = new Set<number>();

  constructor(readonly source: Source) {
    const { device } = source;
    const others = device.extents;
    device.contexts = ['base:allocation', DIRTY];
    device.extents = (context, request) => {
      if (context !== DIRTY) return others(context, request);
      const round = this.cookie * DIRTY_COOKIE_UNIT + (this.sealed ? DirtyFlag.SEALED : 0);
      return Array.from({ length: request.length / BLOCK }, (_, index) => {
        const block = request.offset / BLOCK + index;
        return [BLOCK, round + Number(this.changed.has(block) || this.told.has(block))];
      });
    };
  }

  write(version: number, ...blocks: number[]): void {
    const content = pattern(SIZE, version);
    for (const block of blocks) {
      this.changed.add(block);
      content.copy(this.source.device.data, block * BLOCK, block * BLOCK, (block + 1) * BLOCK);
    }
  }

  /** The next round. */
  cut(): void {
    this.told = this.changed;
    this.changed = new Set();
    this.cookie++;
  }
}

/** `prepare`: before anything is asked of the source. */
async function standby(
  t: TestContext,
  prepare: (source: Source) => void = () => undefined,
): Promise<{ tracked: Tracked; proxy: Ferry; source: Source }> {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  prepare(source);
  const tracked = new Tracked(source);
  const proxy = await lab.proxy(source, {
    mode: {
      kind: 'arrive',
      sourceUri: source.uri,
      volumeId: VOLUME_ID,
      generation: 1,
      size: SIZE,
      rateBytesPerSecond: null,
      preCopy: { context: DIRTY, cookie: 1, fills: true },
    },
  });
  return { tracked, proxy, source };
}

function halfZero(source: Source): void {
  source.device.data.fill(0, SIZE / 2);
  source.tellZeroes();
}

const caughtUp = (proxy: Ferry) =>
  until(() => proxy.status.preCopy?.caughtUp === true, 'all is copied ahead');

async function refreshed({ tracked, proxy }: { tracked: Tracked; proxy: Ferry }): Promise<void> {
  const from = tracked.cookie;
  tracked.cut();
  await proxy.service.refresh(from, tracked.cookie);
}

/** Takes over and comes to its end with what the source has. */
async function arrives({
  tracked,
  proxy,
  source,
}: {
  tracked: Tracked;
  proxy: Ferry;
  source: Source;
}): Promise<void> {
  tracked.sealed = true;
  await proxy.service.takeover(2);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
}

test('all is copied ahead, and read from the source nevertheless; the takeover then needs nothing', async (t) => {
  const { tracked, proxy, source } = await standby(t);
  await caughtUp(proxy);
  assert.equal(proxy.status.preCopy!.missingBytes, 0);
  assert.equal(source.readBytes, SIZE);
  const guest = await proxy.guest();
  tracked.write(2, 3);
  assertBlocks(await readAt(guest, 0, SIZE), source.device.data, 'as it is at the source');
  assert.equal(source.readBytes, 2 * SIZE);
  await arrives({ tracked, proxy, source });
  assert.equal(source.readBytes, 2 * SIZE + BLOCK, 'what changed');
});

test('a refresh copies again what changed, and tells its round', async (t) => {
  const all = await standby(t);
  const { tracked, proxy, source } = all;
  await caughtUp(proxy);
  tracked.write(2, 0, 1, 200, BLOCKS - 1);
  await refreshed(all);
  await caughtUp(proxy);
  assert.deepEqual([proxy.status.preCopy!.cookie, proxy.status.preCopy!.missingBytes], [2, 0]);
  assert.equal(source.readBytes, SIZE + 4 * BLOCK);
  await proxy.service.refresh(1, 2);
  assert.equal(proxy.status.preCopy!.missingBytes, 0, 'repeated it drops nothing');
  tracked.told = new Set();
  await arrives(all);
  assert.equal(source.readBytes, SIZE + 4 * BLOCK);
});

test('data that was read before a change, and comes after the list, is not kept', async (t) => {
  const all = await standby(t, (source) => source.hold());
  const { tracked, proxy, source } = all;
  await until(() => source.held > 0, 'reads are under way');
  const before = Buffer.from(source.device.data);
  tracked.write(2, ...Array.from({ length: BLOCKS / 2 }, (_, index) => 2 * index));
  await refreshed(all);
  const now = Buffer.from(source.device.data);
  before.copy(source.device.data);
  source.device.completeHeld();
  now.copy(source.device.data);
  await until(() => source.held > 0, 'it asks again');
  source.release();
  await caughtUp(proxy);
  tracked.told = new Set(); // all of it was told
  await arrives(all);
});

test('zeros that the source told of before a change, and that come after the list, are not kept', async (t) => {
  let holds = true;
  const all = await standby(t, (source) => {
    halfZero(source);
    source.device.manner = ({ kind }) => (kind === 'status' && holds ? 'held' : 'now');
  });
  const { tracked, proxy, source } = all;
  // The first is about heat, or about what is allocated: both are asked at once.
  await until(() => source.held > 0, 'a question is under way');
  holds = false;
  const before = Buffer.from(source.device.data);
  tracked.write(2, ...Array.from({ length: BLOCKS / 4 }, (_, index) => BLOCKS / 2 + 2 * index));
  await refreshed(all);
  const now = Buffer.from(source.device.data);
  before.copy(source.device.data);
  source.device.completeHeld();
  now.copy(source.device.data);
  await caughtUp(proxy);
  tracked.told = new Set();
  await arrives(all);
});

test('a region that is overwritten in every round is left alone until the takeover', async (t) => {
  const all = await standby(t);
  const { tracked, proxy, source } = all;
  await caughtUp(proxy);
  for (let round = 0; round < 2; round++) {
    tracked.write(round + 2, 2 * REGION + 1);
    await refreshed(all);
    await caughtUp(proxy);
  }
  assert.equal(proxy.status.preCopy!.missingBytes, BLOCK, 'it waits');
  const { readBytes } = source;
  // A round in which it rests: it comes.
  await refreshed(all);
  await refreshed(all);
  await caughtUp(proxy);
  assert.deepEqual([proxy.status.preCopy!.missingBytes, source.readBytes], [0, readBytes + BLOCK]);
  for (let round = 0; round < 2; round++) {
    tracked.write(round + 4, 2 * REGION + 1);
    await refreshed(all);
  }
  await caughtUp(proxy);
  assert.equal(proxy.status.preCopy!.missingBytes, BLOCK);
  await arrives(all);
});

test('no takeover of a source that is not sealed', async (t) => {
  const all = await standby(t);
  const { proxy } = all;
  await caughtUp(proxy);
  await assert.rejects(proxy.service.takeover(2), failsWith('phase', /not sealed/));
  assert.deepEqual([proxy.status.phase, proxy.status.generation], ['standby', 1]);
  assert.equal(proxy.status.preCopy!.missingBytes, 0, 'nothing is dropped');
  await arrives(all);
});

test("another round's list, or none: all is fetched anew", async (t) => {
  for (const spoil of [
    (tracked: Tracked) => {
      for (const _ of [1, 2]) tracked.cut();
    },
    (tracked: Tracked) => {
      tracked.cookie = 0;
    },
  ]) {
    const all = await standby(t);
    const { tracked, proxy, source } = all;
    await caughtUp(proxy);
    spoil(tracked);
    await arrives(all);
    assert.equal(source.readBytes, 2 * SIZE);
  }
});

test('a refresh to a round that the source does not tell of is refused, and drops nothing', async (t) => {
  const { tracked, proxy } = await standby(t);
  await caughtUp(proxy);
  tracked.write(2, 5);
  await assert.rejects(proxy.service.refresh(1, 2), failsWith('generation', /tells of round 1, not 2/));
  assert.deepEqual([proxy.status.preCopy!.cookie, proxy.status.preCopy!.missingBytes], [1, 0]);
});

test('what is zero at the source costs nothing ahead either', async (t) => {
  const all = await standby(t, halfZero);
  const { proxy, source } = all;
  await caughtUp(proxy);
  assert.equal(source.readBytes, SIZE / 2);
  await arrives(all);
});
