/** BLOCK_STATUS of a dirty map, as the two contexts have it. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { ALLOCATION_DEPTH, DIRTY, DIRTY_BITMAP, Errno } from '../../../src/nbd/constants.js';
import { COOKIE_MAX, DirtyMap } from '../../../src/volume/dirty.js';
import { DIRTY_COOKIE_UNIT, DirtyFlag, reportDirty } from '../../../src/volume/dirty-status.js';
import { GuestDevice, LinkDevice } from '../../../src/volume/faces.js';
import type { Volume } from '../../../src/volume/volume.js';
import { Io, patterned, tempFolder } from '../../support/volume.js';
import { plainVolume, SIZE } from '../../support/volumes.js';

const B = 4096;
const BLOCKS = 100;

describe('extents', () => {
  let map: DirtyMap;
  beforeEach(async () => {
    map = await DirtyMap.create(tempFolder(), { id: randomUUID(), blocks: BLOCKS }, 0);
  });
  afterEach(() => map.unmap());

  function extentsOf(offset: number, length: number, more = 0, most?: number): [number, number][] {
    const request = Io.status(DIRTY, offset, length, most);
    reportDirty(request, map, more);
    return request.extents;
  }

  test('of a map in which nothing changed: one', () => {
    assert.deepEqual(extentsOf(0, BLOCKS * B), [[BLOCKS * B, 0]]);
  });

  test('alternate, are as long as the answer is the same, and cover just the range', () => {
    map.mark(3, 5);
    map.mark(99, 100);
    assert.deepEqual(extentsOf(0, BLOCKS * B), [
      [3 * B, 0],
      [2 * B, 1],
      [94 * B, 0],
      [B, 1],
    ]);
    assert.deepEqual(extentsOf(4 * B + 100, B), [
      [B - 100, 1],
      [100, 0],
    ]);
    assert.deepEqual(extentsOf(3 * B + 1, 1), [[1, 1]]);
    assert.deepEqual(extentsOf(99 * B + 7, B - 7), [[B - 7, 1]]);
  });

  test('tell what changed in this round from what did in the last one', () => {
    const { cookie } = map.claim('move', null, []);
    map.mark(10, 12);
    map.cut('move', cookie, []);
    map.mark(11, 14);
    map.mark(20, 21);
    assert.deepEqual(extentsOf(0, 30 * B), [
      [10 * B, 0],
      [B, DirtyFlag.TOLD],
      [B, DirtyFlag.TOLD + DirtyFlag.CHANGED],
      [2 * B, DirtyFlag.CHANGED],
      [6 * B, 0],
      [B, DirtyFlag.CHANGED],
      [9 * B, 0],
    ]);
  });

  test('are no more than the request wants', () => {
    for (let block = 0; block < BLOCKS; block += 2) map.mark(block, block + 1);
    assert.deepEqual(extentsOf(0, BLOCKS * B, 0, 3), [
      [B, 1],
      [B, 0],
      [B, 1],
    ]);
    assert.equal(extentsOf(0, BLOCKS * B).length, BLOCKS);
  });

  test('all tell what is told of every extent besides', () => {
    map.mark(3, 5);
    const more = DirtyFlag.SEALED + COOKIE_MAX * DIRTY_COOKIE_UNIT;
    const flags = extentsOf(0, 10 * B, more).map(([, each]) => each);
    assert.deepEqual(flags, [more, more + 1, more]);
    assert.equal(more + DirtyFlag.CHANGED + DirtyFlag.TOLD, 0xffffffff, 'as much as the wire holds');
  });

  test('where nobody tracks, all changed', () => {
    const request = Io.status(DIRTY, 100, 5 * B);
    reportDirty(request, null, 0);
    assert.deepEqual(request.extents, [[5 * B, 1]]);
  });
});

describe('a volume', () => {
  function ask(volume: Volume, context: string): [number, number][] {
    const request = Io.status(context, 0, SIZE);
    new LinkDevice(volume).status(request);
    assert.equal(request.errno, Errno.OK);
    return request.extents;
  }

  test('that nobody tracks: all of it may have changed, in no round', async () => {
    const volume = await plainVolume();
    assert.deepEqual(ask(volume, DIRTY), [[SIZE, DirtyFlag.CHANGED]]);
    assert.deepEqual(ask(volume, DIRTY_BITMAP), [[SIZE, 1]]);
  });

  test('that is tracked: every extent has the cookie, and behind the seal says so', async () => {
    const volume = await plainVolume();
    const { cookie } = await volume.track('move', null);
    volume.store.writeNow(B, 10, patterned(10), 0);
    const round = cookie * DIRTY_COOKIE_UNIT;
    const last = SIZE - 2 * B;
    assert.deepEqual(ask(volume, DIRTY), [
      [B, round],
      [B, round + 1],
      [last, round],
    ]);
    assert.deepEqual(ask(volume, DIRTY_BITMAP), [
      [B, 0],
      [B, 1],
      [last, 0],
    ]);
    await volume.seal(2);
    assert.deepEqual(ask(volume, DIRTY), [
      [B, round + 2],
      [B, round + 3],
      [last, round + 2],
    ]);
    assert.deepEqual(ask(volume, DIRTY_BITMAP)[1], [B, 1]);
    await volume.unseal({ volumeId: volume.id, generation: 2 });
    assert.deepEqual(ask(volume, DIRTY)[0], [B, round]);
  });

  test('says the same to its guest, and other contexts are what they were', async () => {
    const volume = await plainVolume();
    await volume.track('move', null);
    const guest = new GuestDevice(volume);
    const request = Io.status(DIRTY_BITMAP, 0, SIZE);
    guest.status(request);
    assert.deepEqual(request.extents, [[SIZE, 0]]);
    assert.deepEqual(ask(volume, ALLOCATION_DEPTH), [[SIZE, 1]]);
    for (const device of [guest, new LinkDevice(volume)])
      assert.ok(device.contexts.includes(DIRTY) && device.contexts.includes(DIRTY_BITMAP));
  });
});
