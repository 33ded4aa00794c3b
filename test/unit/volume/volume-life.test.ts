/** Closing, cancelling, and a kill or a crash at any moment of each change of phase. */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, readdirSync, unlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { GuestDevice, LinkDevice } from '../../../src/volume/faces.js';
import { readIdentity } from '../../../src/volume/identity.js';
import { Image } from '../../../src/volume/image.js';
import { createProxied, reopen } from '../../../src/volume/open.js';
import { Volume } from '../../../src/volume/volume.js';
import { asLeftByAnotherBoot, failsWith, Io, patterned, turns, until } from '../../support/volume.js';
import {
  afterKill,
  afterReboot,
  folderOf,
  host,
  keep,
  momentsOf,
  NAME,
  proxiedVolume,
  reopened,
  SIZE,
  type State,
  sourceOf,
  stateOf,
  volumeIn,
} from '../../support/volumes.js';

const B = 4096;

function read(volume: Volume, offset = 0, length = SIZE): Buffer {
  const request = new Io(offset, length);
  volume.store.read(request);
  assert.equal(request.errno, Errno.OK);
  return request.payload;
}

describe('killed or rebooted at any moment', () => {
  const steps: [name: string, from: State, step: (volume: Volume) => Promise<unknown>][] = [
    ['seal', 'plain', (volume) => volume.seal(2)],
    ['unseal', 'sealed', (volume) => volume.unseal({ volumeId: volume.id, generation: 2 })],
    ['takeover', 'standby', (volume) => volume.takeover(5)],
    ['retreat', 'relocating', (volume) => volume.retreat()],
    ['settle', 'relocating', (volume) => volume.settle()],
    ['handOff', 'relocating, written', (volume) => volume.handOff()],
    ['close', 'relocating', (volume) => volume.close()],
    ['close', 'standby', (volume) => volume.close()],
  ];
  for (const [name, from, step] of steps) {
    test(`${name} in ${from}: before or after, and repeated it ends the same`, async () => {
      const root = host();
      const volume = await volumeIn(from, root);
      const here = from.startsWith('relocating') ? Math.ceil(SIZE / B) : 0;
      if (here > 0) {
        sourceOf(volume).deliver(0, here);
        assert.equal(await volume.store.commit(), Errno.OK);
      }
      const before = { ...volume.identity.current };
      const content = patterned(SIZE, here > 0 ? 77 : 1);
      const moments = await momentsOf(root, step(volume));
      const after = volume.identity.current;
      for (const moment of moments) {
        for (const leave of [afterKill, afterReboot]) {
          const left = leave(moment, root);
          if ((await readIdentity(folderOf(left))) === undefined) {
            assert.equal(name, 'seal', 'a plain volume has none until it is sealed');
            continue;
          }
          const again = await reopened(left);
          assert.ok([before.phase, after.phase].includes(again.phase));
          assert.ok(again.generation >= before.generation && again.generation <= after.generation);
          if (again.phase === 'standby' || from === 'standby') assert.equal(again.store.presence?.present, 0);
          else assert.ok(read(again).equals(content));
          if (name !== 'close') {
            await step(again);
            const { phase, generation, written } = again.identity.current;
            assert.deepEqual([phase, generation, written], [after.phase, after.generation, after.written]);
          }
          await again.close();
        }
      }
      await volume.close();
    });
  }

  test('creation: nothing, or a volume', async () => {
    const root = host();
    const moments = await momentsOf(root, proxiedVolume(root));
    for (const moment of moments) {
      if (!existsSync(stateOf(moment))) continue;
      const left = afterKill(moment, root);
      if ((await readIdentity(folderOf(left))) === undefined) await proxiedVolume(left);
      else await (await reopened(left)).close();
    }
  });

  test('cancel: the volume, or nothing once it was opened again, and a new one can be made', async () => {
    const root = host();
    const volume = await volumeIn('standby', root);
    const moments = await momentsOf(root, volume.cancel());
    let gone = 0;
    for (const moment of moments) {
      const left = afterKill(moment, root);
      const again = await reopened(left).catch((error: unknown) => error);
      if (again instanceof Volume) {
        await again.cancel();
        continue;
      }
      failsWith('not-found')(again);
      gone++;
      assert.deepEqual(readdirSync(folderOf(left)), []);
      assert.ok(!existsSync(join(left, 'disk.img')));
      await (await proxiedVolume(left)).close();
    }
    assert.ok(gone > 0 && gone < moments.length);
  });

  test('no answered write is lost to a kill, no flushed one to a reboot', async () => {
    const root = host();
    const volume = await volumeIn('relocating, written', root);
    const content = Buffer.from(sourceOf(volume).content);
    const write = async (offset: number, seed: number, flags = 0): Promise<void> => {
      const data = patterned(700, seed);
      const request = Io.write(offset, data, flags);
      volume.store.write(request);
      sourceOf(volume).deliver(0, 9);
      assert.equal(await request.done, Errno.OK);
      data.copy(content, offset);
    };
    await write(100, 1);
    await write(2 * B - 5, 2, CommandFlag.FUA);
    const flushed = Buffer.from(content);
    const rebooted = await reopened(afterReboot(root));
    assert.equal(rebooted.store.presence?.present, 9);
    assert.ok(read(rebooted).equals(flushed));
    await write(5 * B, 3);
    const killed = await reopened(afterKill(root));
    assert.ok(read(killed).equals(content));
  });
});

describe('close', () => {
  test('makes all durable and lets go of everything; twice, at the same time or later', async () => {
    const root = host();
    const volume = await volumeIn('relocating, written', root);
    volume.store.writeNow(0, B, patterned(B), 0);
    await Promise.all([volume.close(), volume.close()]);
    await volume.close();
    assert.equal((await readIdentity(folderOf(root)))?.openBootId, null);
    Image.open(join(root, 'disk.img')).close();
    asLeftByAnotherBoot(folderOf(root));
    const again = await reopened(root);
    assert.ok(again.store.presence?.has(0));
    assert.ok(read(again, 0, B).equals(patterned(B)));
  });

  test('who waits for a block, a lock or the gate gets ESHUTDOWN, and so does who comes later', async () => {
    const volume = await volumeIn('relocating', host());
    sourceOf(volume);
    const requests = [new Io(0, B), Io.write(3, patterned(4))];
    volume.store.read(requests[0]!);
    volume.store.write(requests[1]!);
    await volume.close();
    assert.equal(await requests[0]!.done, Errno.ESHUTDOWN);
    const late = Io.write(0, patterned(B));
    volume.store.write(late);
    assert.equal(late.errno, Errno.ESHUTDOWN);
    await assert.rejects(volume.takeover(9), failsWith('closed'));
    await assert.rejects(volume.seal(9), failsWith('closed'));
  });

  test('waits for what a thread has in hand; a long fill of zeros ends', async () => {
    const root = host();
    const volume = await volumeIn('relocating, written', root);
    writeFileSync(join(root, 'disk.img'), patterned(SIZE), { flag: 'r+' });
    volume.store.writeNow(2 * B, B, patterned(B), 0); // the fill goes around it, in two steps
    const release: (() => void)[] = [];
    const { image } = volume.store;
    const zero = image.zero.bind(image);
    image.zero = (...range) => new Promise((done) => release.push(() => void zero(...range).then(done)));
    const filled = volume.store.fillZeroes(volume.store.epoch, 0, 9);
    let closed = false;
    const closing = volume.close().then(() => {
      closed = true;
    });
    await turns(10);
    assert.deepEqual([closed, release.length], [false, 1]);
    release[0]!();
    await closing;
    await filled;
    assert.equal(release.length, 1);
  });

  test('a flush that failed: close says so, and in this boot nothing is lost', async () => {
    const root = host();
    const volume = await volumeIn('relocating, written', root);
    volume.store.writeNow(0, B, patterned(B), 0);
    volume.store.image.sync = async () => -5;
    assert.equal(await volume.store.commit(), Errno.EIO);
    await assert.rejects(volume.close(), failsWith('image-io', /could not be made durable/));
    assert.notEqual((await readIdentity(folderOf(root)))?.openBootId, null);
    assert.ok((await reopened(root)).store.presence?.has(0));
  });

  test('a seal under a steady load of cold reads comes to its end', async () => {
    const volume = await volumeIn('plain');
    volume.store.image.readNow = () => -11;
    let sealed = false;
    const again = (): void => {
      const request = new Io(0, B);
      volume.store.read(request);
      void request.done.then(() => !sealed && again());
    };
    for (let i = 0; i < 4; i++) again();
    await volume.seal(2);
    sealed = true;
    await volume.close();
  });

  test('a seal waits for a zero under way, and is answered when all is durable', async () => {
    const volume = await volumeIn('plain');
    const zero = new Io(0, B);
    volume.store.zero(zero);
    const { image } = volume.store;
    const sync = image.sync.bind(image);
    let synced = 0;
    image.sync = () => {
      assert.deepEqual([zero.errno, volume.phase], [Errno.OK, 'plain']);
      synced++;
      return sync();
    };
    await volume.seal(2);
    assert.equal(synced, 1);
    assert.ok(read(volume, 0, B).equals(Buffer.alloc(B)));
  });

  test('a seal that cannot make all durable fails, and the volume is plain still', async () => {
    const root = host();
    const volume = await volumeIn('plain', root);
    volume.store.image.sync = async () => -5;
    await assert.rejects(volume.seal(2), failsWith('image-io'));
    assert.equal(volume.phase, 'plain');
    assert.equal(await readIdentity(folderOf(root)), undefined);
    assert.equal(volume.store.writeNow(0, B, patterned(B), 0), Errno.OK);
  });
});

describe('cancel', () => {
  test('leaves nothing of a standby, and proves that its next generation never comes', async () => {
    const root = host();
    const volume = await volumeIn('standby', root);
    assert.deepEqual(await volume.cancel(), { volumeId: volume.id, generation: 5 });
    assert.deepEqual(readdirSync(folderOf(root)), []);
    assert.ok(!existsSync(join(root, 'disk.img')));
    await volume.close();
    await assert.rejects(reopen({ stateDir: stateOf(root), name: NAME }), failsWith('not-found'));
  });

  test('keeps an image that was there before', async () => {
    const root = host();
    (await Image.create(join(root, 'disk.img'), SIZE)).close();
    await (await proxiedVolume(root)).cancel();
    assert.ok(existsSync(join(root, 'disk.img')));
  });

  test('is refused from the takeover on', async () => {
    for (const state of ['relocating', 'plain', 'sealed'] as const)
      await assert.rejects((await volumeIn(state)).cancel(), failsWith('phase', /cancel refused/));
  });
});

test('retire deletes the image if asked, and can be repeated', async () => {
  const volume = await volumeIn('sealed');
  const { path } = volume.store.image;
  await volume.retire({ deleteImage: false });
  assert.ok(existsSync(path));
  await volume.retire({ deleteImage: true });
  await volume.retire({ deleteImage: true });
  assert.ok(!existsSync(path));
});

test('changed maps become durable when nobody flushes', async (t) => {
  t.mock.timers.enable({ apis: ['setInterval'] });
  const root = host();
  const volume = keep(
    await createProxied({
      stateDir: stateOf(root),
      name: NAME,
      image: join(root, 'disk.img'),
      size: SIZE,
      source: { uri: 'nbd://source/vm', description: null },
      standby: false,
      arrival: null,
    }),
  );
  volume.store.writeNow(0, B, patterned(B), 0);
  t.mock.timers.tick(10_000);
  await until(() => volume.store.presence?.changed === false, 'the commit');
  await volume.close();
});

describe('a full or failing disk under the state', () => {
  /** From now on volume.json cannot be replaced, as when there is no room for its draft. */
  const block = (root: string): string => {
    const draft = join(folderOf(root), 'volume.json.next');
    mkdirSync(draft, { recursive: true });
    return draft;
  };

  test('a volume whose process was killed opens again without any room', async () => {
    const root = host();
    await volumeIn('relocating, written', root);
    const left = afterKill(root);
    block(left);
    const volume = await reopened(left);
    assert.equal(volume.phase, 'relocating');
  });

  test('maps that cannot be removed at the hand-off are in nobody’s way', async () => {
    const root = host();
    const volume = await volumeIn('relocating, written', root);
    volume.store.fill(volume.store.epoch, 0, volume.store.blocks, patterned(SIZE, 7), 0);
    const map = join(folderOf(root), 'presence.map');
    unlinkSync(map);
    mkdirSync(join(map, 'in the way'), { recursive: true });
    await assert.rejects(volume.handOff());
    assert.equal(volume.phase, 'plain');
    const buffer = Buffer.alloc(B);
    assert.equal(new GuestDevice(volume).readNow(0, B, buffer, 0), 0);
    assert.deepEqual(buffer, patterned(SIZE, 7).subarray(0, B));
    assert.equal(await volume.handOff(), true);
  });
});

test('a closed volume answers nothing to a link session that outlives it: its descriptor may be another file by then', async () => {
  const volume = await volumeIn('plain');
  const link = new LinkDevice(volume);
  await volume.close();
  assert.equal(link.readNow(0, B, Buffer.alloc(B), 0), Errno.ESHUTDOWN);
  const read = new Io(0, B);
  link.read(read);
  assert.equal(read.errno, Errno.ESHUTDOWN);
});
