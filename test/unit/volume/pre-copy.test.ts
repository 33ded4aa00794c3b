/** A standby that has blocks before its takeover: what is kept, what is dropped, and what a kill or a crash of the machine leaves. */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { ALLOCATION_DEPTH, Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { DirtyMap } from '../../../src/volume/dirty.js';
import { GuestDevice } from '../../../src/volume/faces.js';
import { readIdentity } from '../../../src/volume/identity.js';
import { stampOfFile } from '../../../src/volume/image.js';
import type { SourceChanges, Volume } from '../../../src/volume/volume.js';
import {
  ahead,
  assertNothingStale,
  BLOCKS,
  blocksBut,
  CONTEXT,
  changed,
  dirtyFile,
  present,
  ROUND,
  rewrite,
  tells,
} from '../../support/pre-copy.js';
import { failsWith, Io, patterned, sparseFile, turns, until } from '../../support/volume.js';
import {
  afterKill,
  afterReboot,
  folderOf,
  host,
  plainVolume,
  proxiedVolume,
  reopened,
  SIZE,
  sourceOf,
  volumeIn,
} from '../../support/volumes.js';

const B = 4096;

describe('a standby that copies ahead', () => {
  test('keeps what is fetched, and answers nothing from it', async () => {
    const volume = await ahead();
    const source = sourceOf(volume);
    assert.equal(source.deliver(0, BLOCKS), Errno.OK);
    assert.deepEqual(present(volume), blocksBut());
    const guest = new GuestDevice(volume);
    assert.equal(guest.readNow(0, B, Buffer.alloc(B), 0), LATER);
    assert.equal(guest.zeroesNow(0, SIZE), 0);
    const direct = guest.direct()!;
    assert.deepEqual([direct.reads, direct.writes], [false, false]);
    const request = new Io(0, SIZE);
    guest.read(request);
    assert.equal(request.errno, undefined);
    assert.equal(source.through.length, 1);
    rewrite(source, 3);
    source.answerThrough();
    assert.ok(request.payload.equals(source.content), 'as it is at the source now');
    const status = Io.status(ALLOCATION_DEPTH, 0, SIZE);
    guest.status(status);
    assert.deepEqual(status.extents, [[SIZE, 2]]);
    const write = Io.write(0, patterned(B));
    guest.write(write);
    assert.equal(write.errno, Errno.EPERM);
  });

  test('that only has rounds and does not fill keeps nothing that is fetched', async () => {
    const volume = await ahead(host(), ROUND, false);
    sourceOf(volume).deliver(0, BLOCKS);
    assert.deepEqual(present(volume), []);
  });

  test('takes in nothing any more when it is closed, also not in the midst of it', async () => {
    const volume = await ahead();
    const source = sourceOf(volume);
    const { epoch } = volume.store;
    await volume.close();
    assert.equal(source.deliver(0, BLOCKS, epoch), Errno.OK);
    const again = await ahead();
    await again.close();
    assert.equal(await again.store.fillZeroes(again.store.epoch, 0, BLOCKS), Errno.OK);
  });

  test('at a refresh drops what the source changed, and what is on its way', async () => {
    const volume = await ahead();
    const source = sourceOf(volume);
    source.deliver(0, 6);
    const { epoch } = volume.store;
    await volume.refresh(ROUND, { runs: [1, 3, 5, 8], cookie: ROUND + 1 });
    assert.deepEqual(present(volume), [0, 3, 4]);
    assert.equal(volume.preCopy!.cookie, ROUND + 1);
    source.deliver(6, BLOCKS, epoch);
    await source.deliverLater(6, BLOCKS, epoch);
    await volume.store.fillZeroes(epoch, 6, BLOCKS);
    assert.deepEqual(present(volume), [0, 3, 4]);
    source.deliver(0, BLOCKS);
    assert.deepEqual(present(volume), blocksBut());
  });

  test('what a thread is keeping when blocks are dropped does not count', async () => {
    const volume = await ahead();
    const source = sourceOf(volume);
    const keeping = source.deliverLater(0, BLOCKS);
    rewrite(source, 2);
    await volume.refresh(ROUND, { runs: [2, 3], cookie: ROUND + 1 });
    await keeping;
    assert.deepEqual(present(volume), []);
    source.deliver(0, BLOCKS);
    assertNothingStale(volume, source.content, 'fetched again');
  });

  test('a refresh that is repeated changes nothing; of another round, or of everything, it is refused', async () => {
    const volume = await ahead();
    sourceOf(volume).deliver(0, BLOCKS);
    const changes = { runs: [1, 2], cookie: ROUND + 1 };
    await volume.refresh(ROUND, changes);
    await volume.refresh(ROUND, changes);
    assert.deepEqual(present(volume), blocksBut(1));
    const refused: [number, SourceChanges][] = [
      [ROUND, { runs: [3, 4], cookie: ROUND + 2 }],
      [ROUND + 2, { runs: [3, 4], cookie: ROUND + 3 }],
      [ROUND + 1, { runs: null, cookie: ROUND + 2 }],
      [ROUND + 1, { runs: null, cookie: null }],
    ];
    for (const [from, each] of refused)
      await assert.rejects(volume.refresh(from, each), failsWith('generation'));
    assert.deepEqual([present(volume), volume.preCopy!.cookie], [blocksBut(1), ROUND + 1]);
  });

  test('a volume in another phase, or without rounds, refuses a refresh', async () => {
    const changes = { runs: [], cookie: 2 };
    await assert.rejects((await plainVolume()).refresh(1, changes), failsWith('phase'));
    await assert.rejects((await proxiedVolume()).refresh(1, changes), failsWith('phase'));
    const volume = await ahead();
    tells(volume, { runs: [], cookie: ROUND });
    await volume.takeover(5);
    await assert.rejects(volume.refresh(ROUND, { runs: [], cookie: ROUND + 1 }), failsWith('phase'));
  });
});

describe('a takeover', () => {
  const lists: [name: string, changes: SourceChanges | null, left: number[]][] = [
    [
      'with the list of the round expected drops what is in it',
      { runs: [0, 2, 8, 9], cookie: ROUND },
      blocksBut(0, 1, 8),
    ],
    ['with an empty list drops nothing', { runs: [], cookie: ROUND }, blocksBut()],
    [
      "with the next round's list drops what that names: it has this one's as well",
      { runs: [0, 1], cookie: ROUND + 1 },
      blocksBut(0),
    ],
    [
      'with the list of the round before, read when the source was sealed: likewise',
      { runs: [0, 1], cookie: ROUND - 1 },
      blocksBut(0),
    ],
    ["with another round's list drops all", { runs: [0, 1], cookie: ROUND + 2 }, []],
    ['with a list without a round drops all', { runs: [0, 1], cookie: null }, []],
    ['with the word that all may have changed drops all', { runs: null, cookie: ROUND }, []],
    ['of a source that does not tell drops all', { runs: null, cookie: null }, []],
    ['that nobody can ask for it drops all', null, []],
  ];
  for (const [name, changes, left] of lists) {
    test(name, async () => {
      const root = host();
      const volume = await ahead(root);
      const source = sourceOf(volume);
      source.deliver(0, BLOCKS);
      assert.equal(await volume.store.commit(), Errno.OK);
      if (changes !== null) tells(volume, changes);
      assert.deepEqual(await volume.takeover(5), { generation: 5 });
      assert.deepEqual(present(volume), left);
      assert.equal(volume.preCopy, null);
      const crashed = await reopened(afterReboot(root));
      assert.deepEqual(
        [crashed.phase, present(crashed)],
        ['relocating', []],
        'nothing counts before a commit',
      );
      assert.equal(await volume.store.commit(), Errno.OK);
      assert.deepEqual(present(await reopened(afterReboot(root))), left, 'and all of it behind one');
      // It goes on as any: what is here is read, the rest is fetched.
      const request = new Io(0, SIZE);
      volume.store.read(request);
      source.deliverAll();
      await turns();
      if (request.errno === undefined) source.deliver(0, BLOCKS);
      assert.equal(request.errno, Errno.OK);
      assert.ok(request.payload.equals(source.content));
    });
  }

  test('of a standby alone, by its first write, drops what the list says before the write', async () => {
    const root = host();
    const preCopy = { context: 'qemu:dirty-bitmap:x', cookie: null, fills: true };
    const volume = await proxiedVolume(root, { arrival: null, preCopy });
    const source = sourceOf(volume);
    source.deliver(0, BLOCKS);
    rewrite(source, 4);
    tells(volume, { runs: [4, 5], cookie: null });
    const write = Io.write(B, patterned(B, 9));
    volume.store.write(write);
    assert.equal(await write.done, Errno.OK);
    assert.deepEqual([volume.phase, present(volume)], ['relocating', blocksBut(4)]);
    patterned(B, 9).copy(source.content, B);
    assertNothingStale(volume, source.content, 'after the first write');
  });

  test('whose list cannot be had fails, changes nothing, and can be made again', async () => {
    const volume = await ahead();
    sourceOf(volume).deliver(0, BLOCKS);
    volume.askChanges = () => Promise.reject(Object.assign(new Error('gone')));
    await assert.rejects(volume.takeover(5), /gone/);
    assert.deepEqual([volume.phase, volume.generation, present(volume)], ['standby', 4, blocksBut()]);
    tells(volume, { runs: [3, 4], cookie: ROUND });
    await volume.takeover(5);
    assert.deepEqual(present(volume), blocksBut(3));
    volume.askChanges = () => assert.fail('it is asked once');
    await volume.takeover(5);
    assert.deepEqual(present(volume), blocksBut(3));
  });

  test('that a refresh overtakes between the question and its turn drops what either names', async () => {
    const volume = await ahead();
    sourceOf(volume).deliver(0, BLOCKS);
    let answer: (changes: SourceChanges) => void = () => undefined;
    volume.askChanges = () =>
      new Promise((resolve) => {
        answer = resolve;
      });
    const taken = volume.takeover(5);
    await turns();
    await volume.refresh(ROUND, { runs: [2, 3], cookie: ROUND + 1 });
    answer({ runs: [3, 4], cookie: ROUND });
    await taken;
    assert.deepEqual(present(volume), blocksBut(2, 3));
  });

  test('of what could not be made durable before is none', async () => {
    const volume = await ahead();
    sourceOf(volume).deliver(0, BLOCKS);
    tells(volume, { runs: [], cookie: ROUND });
    volume.store.image.sync = () => Promise.resolve(-5);
    assert.equal(await volume.store.commit(), Errno.EIO);
    await assert.rejects(volume.takeover(5), failsWith('image-io'));
    assert.equal(volume.phase, 'standby');
    await assert.rejects(volume.close(), failsWith('image-io'));
  });

  test('that cannot be stored is none, and the standby goes without a trace', async () => {
    for (const killed of [false, true]) {
      const root = host();
      const volume = await ahead(root);
      tells(volume, { runs: [], cookie: ROUND });
      const { identity } = volume;
      const real = identity.update.bind(identity);
      identity.update = () => Promise.reject(new Error('no space'));
      await assert.rejects(volume.takeover(5), /no space/);
      identity.update = real;
      assert.equal(volume.store.dirty, null);
      const left = killed ? afterKill(root) : root;
      const standby = killed ? await reopened(left) : volume;
      assert.equal(standby.phase, 'standby');
      await standby.cancel();
      assert.deepEqual(readdirSync(folderOf(left)), [], killed ? 'killed' : 'cancelled');
      await volume.close();
    }
  });

  test('begins to track the changes, so that the volume can go home, until it is taken back', async () => {
    const root = host();
    const volume = await ahead(root);
    tells(volume, { runs: [], cookie: ROUND });
    await volume.takeover(5);
    assert.deepEqual([volume.store.dirty?.since, volume.store.dirty?.move], [4, null]);
    sourceOf(volume).deliver(0, BLOCKS);
    await volume.retreat();
    assert.deepEqual([volume.phase, volume.store.dirty, volume.preCopy], ['standby', null, null]);
    assert.ok(!existsSync(dirtyFile(root)));
    assert.deepEqual(present(volume), []);
    sourceOf(volume).deliver(0, BLOCKS);
    assert.deepEqual(present(volume), [], 'nor is anything taken in from now on');
    await volume.takeover(6);
    assert.deepEqual([present(volume), volume.store.dirty?.since], [[], 5]);
  });

  test('tracks what the guest writes from the first write on, over the hand-off and a restart', async () => {
    const root = host();
    const volume = await ahead(root);
    tells(volume, { runs: [], cookie: ROUND });
    const source = sourceOf(volume);
    await volume.takeover(5);
    const write = Io.write(2 * B, patterned(B, 9));
    volume.store.write(write);
    assert.equal(await write.done, Errno.OK);
    source.deliver(0, BLOCKS);
    assert.equal(await volume.handOff(), true);
    assert.equal(volume.store.writeNow(5 * B, 1, patterned(1), 0), Errno.OK);
    await volume.close();
    const again = await reopened(root);
    assert.equal(again.store.dirty?.since, 4);
    assert.equal((await again.track('home', 4)).home, true);
    assert.deepEqual(changed(again), [2, 5]);
  });
});

describe('a home standby', () => {
  async function atHome(root: string): Promise<{ volume: Volume; image: string }> {
    const image = sparseFile(SIZE, root);
    writeFileSync(image, patterned(SIZE, 77), { flag: 'r+' });
    const preCopy = { context: CONTEXT, cookie: ROUND, fills: false };
    return { volume: await proxiedVolume(root, { image, homeStamp: stampOfFile(image), preCopy }), image };
  }

  test('has all but what the source changed since', async () => {
    const root = host();
    const { volume } = await atHome(root);
    const source = sourceOf(volume);
    rewrite(source, 2, 3);
    assert.deepEqual(present(volume), blocksBut());
    const request = new Io(0, SIZE);
    volume.store.read(request);
    assert.equal(source.through.length, 1, 'nothing is read here before the takeover');
    source.answerThrough();
    tells(volume, { runs: [2, 4], cookie: ROUND });
    await volume.takeover(5);
    assert.deepEqual(present(volume), blocksBut(2, 3));
    assertNothingStale(volume, source.content, 'at home');
  });

  test('is nobody’s image any more if its round is another', async () => {
    const { volume } = await atHome(host());
    tells(volume, { runs: [], cookie: ROUND + 7 });
    await volume.takeover(5);
    assert.deepEqual(present(volume), []);
  });

  test('after a reboot has nothing', async () => {
    const root = host();
    const { volume } = await atHome(root);
    assert.equal(await volume.store.commit(), Errno.OK);
    assert.deepEqual(present(await reopened(afterReboot(root))), []);
  });

  test('that is cancelled leaves the image, and no state', async () => {
    const root = host();
    const { volume, image } = await atHome(root);
    const content = readFileSync(image);
    await volume.cancel();
    assert.ok(readFileSync(image).equals(content));
    assert.equal(await readIdentity(folderOf(root)), undefined);
  });

  test('is not made of an image that somebody changed', async () => {
    const root = host();
    const image = sparseFile(SIZE, root);
    const preCopy = { context: CONTEXT, cookie: ROUND, fills: false };
    const homeStamp = stampOfFile(image);
    writeFileSync(image, 'x', { flag: 'r+' });
    await assert.rejects(proxiedVolume(root, { image, homeStamp, preCopy }), failsWith('state-mismatch'));
    assert.ok(existsSync(image));
  });
});

test('a retreat keeps nothing that is read while its dirty map goes', async (t) => {
  const volume = await volumeIn('relocating');
  const source = sourceOf(volume);
  let go: (() => void) | undefined;
  t.mock.method(DirtyMap, 'remove', () => new Promise<void>((resolve) => (go = resolve)));
  const back = volume.retreat();
  await until(() => go !== undefined, 'the map is about to go');
  volume.store.read(new Io(0, B));
  assert.deepEqual([source.demands.length, source.through.length], [0, 1]);
  go!();
  await back;
  assert.deepEqual(present(volume), []);
});

test('a first write whose takeover fails leaves a standby that goes on', async () => {
  const preCopy = { context: 'qemu:dirty-bitmap:x', cookie: null, fills: true };
  const volume = await proxiedVolume(host(), { arrival: null, preCopy });
  sourceOf(volume).deliver(0, 1);
  let told = 0;
  volume.onChange = () => {
    told++;
  };
  volume.askChanges = () => Promise.reject(new Error('gone'));
  const write = Io.write(0, patterned(B));
  volume.store.write(write);
  assert.notEqual(await write.done, Errno.OK);
  assert.deepEqual([volume.phase, told], ['standby', 1]);
});
