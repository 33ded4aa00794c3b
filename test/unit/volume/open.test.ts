import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import { VOLUME_BYTES_MAX } from '../../../src/volume/blocks.js';
import { bootId } from '../../../src/volume/boot.js';
import { type Identity, readIdentity } from '../../../src/volume/identity.js';
import { Image } from '../../../src/volume/image.js';
import { checkName, defaultName, openPlain, reopen } from '../../../src/volume/open.js';
import { failsWith, OTHER_BOOT, patterned, sparseFile } from '../../support/volume.js';
import {
  folderOf,
  host,
  keep,
  NAME,
  plainVolume,
  proxiedVolume,
  reopened,
  SIZE,
  stateOf,
  volumeIn,
} from '../../support/volumes.js';

/** Changes the stored identity of a volume that nobody has open. */
function edit(root: string, change: Partial<Identity>): void {
  const path = join(folderOf(root), 'volume.json');
  writeFileSync(path, JSON.stringify({ ...JSON.parse(readFileSync(path, 'utf8')), ...change }));
}

test('names', () => {
  for (const good of ['vm', 'vm-1.img', '_x', '0', 'A'.repeat(128)]) checkName(good);
  for (const bad of ['', '.', '..', '.vm', '-vm', 'a/b', '../vm', 'a b', 'ä', 'a\0', 'a\n', 'A'.repeat(129)])
    assert.throws(() => checkName(bad), failsWith('usage', /letters/));
  for (const path of ['/x/vm.img', '/x/.hidden', '/x/--', '/x/a b', '/', `/x/${'é'.repeat(200)}`])
    checkName(defaultName(path));
  assert.equal(defaultName('/images/vm.img'), 'vm.img');
});

describe('openPlain', () => {
  test('serves the image as it is and leaves no state behind', async () => {
    const root = host();
    const volume = await plainVolume(root);
    assert.deepEqual([volume.phase, volume.generation, volume.size], ['plain', 1, SIZE]);
    assert.equal(volume.store.writeNow(0, 1, patterned(1), 0), Errno.OK);
    await volume.close();
    assert.ok(!existsSync(folderOf(root)));
  });

  test('read-only: no write, and a file that cannot be written to will do', async () => {
    const image = sparseFile(SIZE);
    const volume = keep(await openPlain({ stateDir: stateOf(host()), name: NAME, image, readOnly: true }));
    assert.ok(volume.readOnly);
    assert.equal(volume.store.writeNow(0, 1, patterned(1), 0), Errno.EPERM);
    assert.equal(await volume.store.commit(), Errno.OK);
    await volume.close();
  });

  test('resumes what is there under that name, whatever its phase', async () => {
    for (const state of ['standby', 'relocating', 'sealed'] as const) {
      const root = host();
      const before = await volumeIn(state, root);
      const { path } = before.store.image;
      await before.close();
      for (const readOnly of [false, true]) {
        const volume = keep(await openPlain({ stateDir: stateOf(root), name: NAME, image: path, readOnly }));
        assert.deepEqual([volume.phase, volume.id], [state, before.id]);
        await volume.close();
      }
    }
  });

  test('refuses a bad name, a missing image, a name that belongs to another image', async () => {
    const root = host();
    const volume = await volumeIn('sealed', root);
    const stateDir = stateOf(root);
    await volume.close();
    const image = sparseFile(SIZE);
    await assert.rejects(openPlain({ stateDir, name: '../x', image }), failsWith('usage'));
    await assert.rejects(
      openPlain({ stateDir, name: 'x', image: `${image}.no` }),
      failsWith('image-missing'),
    );
    const other = openPlain({ stateDir, name: NAME, image });
    await assert.rejects(other, failsWith('state-mismatch', /has the image/));
    const missing = openPlain({ stateDir, name: NAME, image: `${image}.no` });
    await assert.rejects(missing, failsWith('image-missing', /has the image/));
  });

  test('refuses an image that is a volume under another name, also through a link', async () => {
    const root = host();
    const volume = await volumeIn('relocating', root);
    const { path } = volume.store.image;
    await volume.close();
    const link = join(root, 'link.img');
    symlinkSync(path, link);
    for (const image of [path, link]) {
      const other = openPlain({ stateDir: stateOf(root), name: 'other', image });
      await assert.rejects(other, failsWith('state-mismatch', /volume vm \(relocating\)/));
      const proxied = proxiedVolume(root, { name: 'other', image });
      await assert.rejects(proxied, failsWith('state-mismatch'));
    }
  });
});

describe('createProxied', () => {
  test('makes a sparse image, in standby or taken over at once', async () => {
    const root = host();
    const volume = await proxiedVolume(root);
    const { phase, generation, written, takesOverAtWrite, imageCreated, openBootId } =
      volume.identity.current;
    assert.deepEqual(
      [phase, generation, written, takesOverAtWrite, imageCreated, openBootId],
      ['standby', 4, false, false, true, bootId()],
    );
    assert.deepEqual(await readIdentity(folderOf(root)), volume.identity.current);
    assert.ok(volume.store.image.isHole(0, SIZE));
    const alone = await proxiedVolume(host(), { arrival: null, standby: false });
    assert.deepEqual([alone.phase, alone.settled, alone.store.keeps], ['relocating', true, true]);
    const lonely = await proxiedVolume(host(), { arrival: null });
    assert.equal(lonely.identity.current.takesOverAtWrite, true);
  });

  test('makes the folders on the way to the image', async () => {
    const root = host();
    const volume = await proxiedVolume(root, { image: join(root, 'a/b/disk.img') });
    assert.equal(volume.store.image.path, join(root, 'a/b/disk.img'));
  });

  test('takes an image that is all hole and of the right size, and refuses others untouched', async () => {
    const root = host();
    const image = join(root, 'disk.img');
    (await Image.create(image, SIZE - 1)).close();
    await assert.rejects(proxiedVolume(root), failsWith('source-mismatch', /the source has/));
    writeFileSync(image, 'x', { flag: 'r+' });
    await assert.rejects(proxiedVolume(root), failsWith('exists', /holds data/));
    truncateSync(image, SIZE);
    await assert.rejects(proxiedVolume(root), failsWith('exists'));
    assert.equal(readFileSync(image).subarray(0, 1).toString(), 'x');
    truncateSync(image, 0);
    await assert.rejects(proxiedVolume(root), failsWith('image-io', /empty/));
    truncateSync(image, SIZE);
    assert.equal((await proxiedVolume(root)).identity.current.imageCreated, false);
  });

  test('refuses a name that is taken, also by a damaged volume, and sizes that cannot be', async () => {
    const root = host();
    const volume = await proxiedVolume(root);
    const again = proxiedVolume(root, { image: join(root, 'other.img') });
    await assert.rejects(again, failsWith('exists', /another name/));
    await volume.close();
    writeFileSync(join(folderOf(root), 'volume.json'), 'garbage');
    await assert.rejects(proxiedVolume(root, { image: join(root, 'other.img') }), failsWith('state-damaged'));
    assert.ok(!existsSync(join(root, 'other.img')));
    for (const size of [0, -4096, VOLUME_BYTES_MAX + 1, Number.NaN])
      await assert.rejects(proxiedVolume(host(), { size }), failsWith('bounds'));
  });

  test('an identity that cannot be stored leaves neither image nor maps', async () => {
    const root = host();
    const arrival = { volumeId: 'not a uuid', generation: 1 };
    await assert.rejects(proxiedVolume(root, { arrival }), failsWith('usage'));
    assert.ok(!existsSync(join(root, 'disk.img')));
    assert.deepEqual(readdirSync(folderOf(root)), []);
    await proxiedVolume(root);
  });

  test('maps that an earlier volume left behind count for nothing', async () => {
    const root = host();
    const first = await proxiedVolume(root);
    first.store.presence?.set(0, 5);
    assert.equal(await first.store.commit(), Errno.OK);
    await first.close();
    rmSync(join(folderOf(root), 'volume.json'));
    rmSync(join(root, 'disk.img'));
    const second = await proxiedVolume(root);
    assert.equal(second.store.presence?.present, 0);
  });
});

describe('reopen', () => {
  test('says that there is nothing', async () => {
    await assert.rejects(reopen({ stateDir: stateOf(host()), name: NAME }), failsWith('not-found'));
  });

  test('marks in whose boot the maps are open', async () => {
    const root = host();
    await (await volumeIn('relocating', root)).close();
    assert.equal((await readIdentity(folderOf(root)))?.openBootId, null);
    await reopened(root);
    assert.equal((await readIdentity(folderOf(root)))?.openBootId, bootId());
  });

  test('refuses what is open already, and the one who has it does not notice', async () => {
    const root = host();
    const volume = await volumeIn('relocating', root);
    volume.store.presence?.set(0, 1);
    await assert.rejects(reopened(root), failsWith('image-in-use'));
    await assert.rejects(
      openPlain({ stateDir: stateOf(root), name: NAME, image: volume.store.image.path }),
      failsWith('image-in-use'),
    );
    assert.equal(volume.store.presence?.present, 1);
    assert.equal((await volume.takeover(5)).generation, 5);
  });

  test('refuses a retired volume, another image, another size, a missing image, damaged state', async () => {
    const refusals: [harm: (root: string) => void, code: Parameters<typeof failsWith>[0], text: RegExp][] = [
      [(root) => edit(root, { phase: 'retired' }), 'phase', /moved to another host/],
      [(root) => edit(root, { size: SIZE + 512 }), 'state-mismatch', /bytes/],
      [(root) => truncateSync(join(root, 'disk.img'), SIZE - 512), 'state-mismatch', /restore the image/],
      [(root) => rmSync(join(root, 'disk.img')), 'image-missing', /disk\.img/],
      [(root) => truncateSync(join(folderOf(root), 'volume.json'), 9), 'state-damaged', /restore/],
      [
        (root) => {
          rmSync(join(folderOf(root), 'presence.live'));
          edit(root, { openBootId: bootId() });
        },
        'state-damaged',
        /presence\.live/,
      ],
      [
        (root) => {
          rmSync(join(folderOf(root), 'presence.map'));
          rmSync(join(folderOf(root), 'presence.live'));
          edit(root, { openBootId: OTHER_BOOT });
        },
        'state-damaged',
        /presence\.map/,
      ],
    ];
    for (const [harm, code, text] of refusals) {
      const root = host();
      await (await volumeIn('relocating', root)).close();
      harm(root);
      await assert.rejects(reopened(root), failsWith(code, text));
      if (existsSync(join(root, 'disk.img'))) Image.open(join(root, 'disk.img')).close(); // and lets go of it
    }
  });

  test('refuses another image than its own', async () => {
    const root = host();
    await (await volumeIn('relocating', root)).close();
    const image = sparseFile(SIZE);
    const other = reopen({ stateDir: stateOf(root), name: NAME, image });
    await assert.rejects(other, failsWith('state-mismatch'));
  });

  test('what another process did between the look at the identity and the lock is not overwritten', async (t) => {
    const root = host();
    await (await volumeIn('standby', root)).close();
    const open = Image.open;
    t.mock.method(Image, 'open', (...args: Parameters<typeof open>) => {
      edit(root, { phase: 'relocating', generation: 5 }); // and that process is gone
      return open.apply(Image, args);
    });
    await assert.rejects(reopened(root), failsWith('image-in-use', /try again/));
    const stored = await readIdentity(folderOf(root));
    assert.deepEqual([stored?.phase, stored?.generation], ['relocating', 5]);
  });

  test('removes maps that a hand-off left, and does not look at them', async () => {
    const root = host();
    await (await volumeIn('relocating', root)).close();
    edit(root, { phase: 'plain', openBootId: null, source: null });
    truncateSync(join(folderOf(root), 'presence.map'), 10);
    const volume = await reopened(root);
    assert.equal(volume.store.presence, null);
    assert.deepEqual(readdirSync(folderOf(root)), ['dirty.live', 'volume.json']);
  });

  test('a folder of the state folder that is no volume disturbs nobody', async () => {
    const root = host();
    mkdirSync(join(stateOf(root), 'lost+found'), { recursive: true });
    mkdirSync(join(stateOf(root), randomUUID()));
    writeFileSync(join(stateOf(root), 'file'), '');
    writeFileSync(join(stateOf(root), 'lost+found', 'volume.json'), 'garbage');
    await (await plainVolume(root)).close();
  });
});
