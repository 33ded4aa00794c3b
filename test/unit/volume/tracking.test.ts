/** A source that tracks its changes: when, for whom, and that whatever changes the image is marked. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync, writeFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { DirtyMap } from '../../../src/volume/dirty.js';
import { GuestDevice } from '../../../src/volume/faces.js';
import { readIdentity } from '../../../src/volume/identity.js';
import { openPlain } from '../../../src/volume/open.js';
import { ahead, BLOCKS, changed, dirtyFile, MOVE, ROUND, tells } from '../../support/pre-copy.js';
import { StoreFixture } from '../../support/store.js';
import { failsWith, Io, patterned, tempFolder } from '../../support/volume.js';
import {
  folderOf,
  host,
  keep,
  NAME,
  plainVolume,
  proxiedVolume,
  SIZE,
  sourceOf,
  stateOf,
} from '../../support/volumes.js';

const B = 4096;

describe('tracking at the source', () => {
  test('is for a plain volume, and remembers what it is', async () => {
    const root = host();
    const volume = await plainVolume(root);
    assert.equal(await readIdentity(folderOf(root)), undefined);
    await volume.track(MOVE, null);
    assert.equal((await readIdentity(folderOf(root)))?.id, volume.id);
    for (const other of [await proxiedVolume(), await ahead()])
      await assert.rejects(other.track(MOVE, null), failsWith('phase'));
    await volume.seal(2);
    await assert.rejects(volume.track(MOVE, null), failsWith('phase'));
  });

  test('says how much changed in a round, and of a volume that nobody tracks makes no cut', async () => {
    const volume = await plainVolume();
    await assert.rejects(volume.cut(MOVE, 1), failsWith('generation'));
    const { cookie, home } = await volume.track(MOVE, null);
    assert.equal(home, false);
    volume.store.writeNow(B - 1, 2, patterned(2), 0);
    const cut = await volume.cut(MOVE, cookie);
    assert.equal(cut.changedBytes, 2 * B);
    volume.store.writeNow(0, SIZE, patterned(SIZE, 5), 0);
    assert.equal((await volume.cut(MOVE, cut.cookie)).changedBytes, SIZE, 'the last block is cut short');
  });

  test('ends with the move, unless home may ask; another move ends nothing', async () => {
    const root = host();
    const volume = await plainVolume(root);
    await volume.untrack(MOVE);
    await volume.track(MOVE, null);
    await volume.untrack('another');
    assert.equal(volume.store.dirty?.move, MOVE);
    await volume.untrack(MOVE);
    assert.deepEqual([volume.store.dirty, existsSync(dirtyFile(root))], [null, false]);
    assert.equal(volume.store.direct().dirty, null);

    const home = await ahead();
    tells(home, { runs: [], cookie: ROUND });
    await home.takeover(5);
    sourceOf(home).deliver(0, BLOCKS);
    await home.settle();
    assert.equal(await home.handOff(), true);
    await home.track(MOVE, null);
    home.store.writeNow(0, 1, patterned(1), 0);
    await home.untrack(MOVE);
    assert.deepEqual([home.store.dirty?.since, home.store.dirty?.move], [4, null]);
    assert.equal((await home.track('home', 4)).home, true);
    assert.deepEqual(changed(home), [0]);
  });

  test('goes on over seal and unseal, and ends when the volume is retired', async () => {
    const root = host();
    const volume = await plainVolume(root);
    const { cookie } = await volume.track(MOVE, null);
    volume.store.writeNow(0, 1, patterned(1), 0);
    await volume.seal(2);
    assert.deepEqual([changed(volume), volume.store.dirty?.cookie], [[0], cookie]);
    await volume.unseal({ volumeId: volume.id, generation: 2 });
    assert.equal(volume.store.writeNow(3 * B, 1, patterned(1), 0), Errno.OK);
    assert.deepEqual(changed(volume), [0, 3]);
    await volume.seal(3);
    await volume.retire({ deleteImage: false });
    assert.deepEqual([volume.store.dirty, existsSync(dirtyFile(root))], [null, false]);
  });

  test('closed in order, the next process goes on; not if the image was touched in between', async () => {
    for (const touched of [false, true]) {
      const root = host();
      const volume = await plainVolume(root);
      const { path } = volume.store.image;
      const { cookie } = await volume.track(MOVE, null);
      volume.store.writeNow(2 * B, 1, patterned(1), 0);
      await volume.close();
      if (touched) writeFileSync(path, Buffer.alloc(1), { flag: 'r+' });
      const again = keep(await openPlain({ stateDir: stateOf(root), name: NAME, image: path }));
      if (touched) assert.equal(again.store.dirty, null);
      else {
        assert.equal((await again.track(MOVE, null)).cookie, cookie);
        assert.deepEqual(changed(again), [2]);
      }
      await again.close();
    }
  });

  test('also what the session writes without asking is marked', async () => {
    const volume = await plainVolume();
    assert.equal(volume.store.direct().dirty, null);
    await volume.track(MOVE, null);
    const direct = new GuestDevice(volume).direct()!;
    assert.equal(direct.dirty, volume.store.dirty!.bits);
    direct.dirty![0]! |= 0x20;
    assert.deepEqual(changed(volume), [5]);
  });
});

describe('what changes the image marks it', () => {
  let it: StoreFixture;
  let map: DirtyMap;
  beforeEach(async () => {
    it = await StoreFixture.of(16 * B);
    it.source.deliver(0, 16);
    map = await DirtyMap.create(tempFolder(), { id: randomUUID(), blocks: 16 }, 0);
    it.store.dirty = map;
    map.claim(MOVE, null, []);
  });
  afterEach(() => {
    map.unmap();
    it.close();
  });

  function told(): number[] {
    return Array.from({ length: 16 }, (_, block) => block).filter(
      (block) => map.stretches(block + 1)(block).changed,
    );
  }

  test('a write, before it', () => {
    const real = it.image.write.bind(it.image);
    const seen: number[][] = [];
    it.image.write = (...args) => {
      seen.push(told());
      return real(...args);
    };
    assert.equal(it.store.writeNow(3 * B - 1, 2, patterned(2), 0), Errno.OK);
    assert.deepEqual(seen, [[2, 3]]);
  });

  test('a write that fails as well', () => {
    it.image.write = () => -5;
    assert.equal(it.store.writeNow(B, 1, patterned(1), 0), Errno.EIO);
    assert.deepEqual(told(), [1]);
  });

  test('a fill and a refused write do not', () => {
    it.store.drop([0, 4]);
    it.source.deliver(0, 4);
    it.store.setGate({ kind: 'refused', errno: Errno.EPERM });
    const write = Io.write(0, patterned(B));
    it.store.write(write);
    assert.equal(write.errno, Errno.EPERM);
    assert.deepEqual(told(), []);
  });

  const threads: [
    name: string,
    method: 'writeLater' | 'zero' | 'punch',
    start: () => Io,
    blocks: number[],
  ][] = [
    [
      'a write on a thread',
      'writeLater',
      () => {
        it.store.directWriteHeldUp();
        const request = Io.write(2 * B + 5, patterned(B, 4));
        it.store.write(request);
        return request;
      },
      [2, 3],
    ],
    [
      'a zero',
      'zero',
      () => {
        const request = new Io(4 * B - 1, 2, CommandFlag.NO_HOLE);
        it.store.zero(request);
        return request;
      },
      [3, 4],
    ],
    [
      'a trim',
      'punch',
      () => {
        const request = new Io(5 * B - 1, 2 * B);
        it.store.trim(request);
        return request;
      },
      [5],
    ],
  ];
  for (const [name, method, start, blocks] of threads) {
    test(`${name}: before it, at each cut under way, and when it is over`, async () => {
      const { calls } = it.hold(method);
      const request = start();
      assert.equal(calls.length, 1);
      assert.deepEqual(told(), blocks, 'before');
      let { cookie } = map;
      for (let round = 0; round < 3; round++) {
        cookie = it.store.cutChanges(MOVE, cookie);
        assert.deepEqual(told(), blocks, `round ${round}`);
      }
      // Another move that begins meanwhile must hear of it as well.
      ({ cookie } = it.store.claimChanges('another', null));
      assert.deepEqual(told(), blocks);
      map.bits.fill(0);
      await calls[0]!.release();
      assert.equal(await request.done, Errno.OK);
      assert.deepEqual(told(), blocks, 'when it is over');
      cookie = it.store.cutChanges('another', cookie);
      it.store.cutChanges('another', cookie);
      assert.deepEqual(told(), [], 'and no longer');
    });

    test(`${name} that fails has changed something, or may have`, async () => {
      const { calls } = it.hold(method);
      const request = start();
      map.bits.fill(0);
      await calls[0]!.release(-5);
      assert.notEqual(await request.done, Errno.OK);
      assert.deepEqual(told(), blocks);
    });
  }

  test('a seal waits for it, and the list behind the seal has it', async () => {
    const root = host();
    const volume = await plainVolume(root);
    await volume.track(MOVE, null);
    const request = new Io(B, 3 * B, CommandFlag.NO_HOLE);
    volume.store.zero(request);
    const sealed = volume.seal(2);
    await sealed;
    assert.equal(request.errno === Errno.OK || request.errno === Errno.EPERM, true);
    if (request.errno === Errno.OK) assert.deepEqual(changed(volume), [1, 2, 3]);
    assert.ok(changed(volume).length >= 3, 'also of one that was stopped half way');
  });
});
