import assert from 'node:assert/strict';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { crc32 } from 'node:zlib';
import { FirstAccess } from '../../../src/volume/first-access.js';
import { FirstAccessFile, readRecord } from '../../../src/volume/first-access-file.js';
import { Heat, REGION_BYTES } from '../../../src/volume/heat.js';
import { tempFolder } from '../../support/volume.js';
import { folderOf, host, NAME, plainVolume, proxiedVolume, reopened } from '../../support/volumes.js';

const OWNER = { id: '6b3f2f0a-7f0e-4a63-8f2e-0a2f6f1d9c11', size: 300 * 2 ** 30 + 5 };
const OWN = [70_000, 3, 1_200_000, 0];
const EARLIER = [9, 8, 1_000_000];
const fileOf = (folder: string): string => join(folder, 'first-access');

function recordOf(owner = OWNER): FirstAccess {
  const record = new FirstAccess(new Heat(owner.size));
  record.follow('relocating');
  return record;
}

const contentOf = ({ own, earlier }: FirstAccess): number[][] => [[...own.byRank()], [...earlier.byRank()]];

async function saved(folder = tempFolder(), own = OWN, earlier = EARLIER): Promise<string> {
  const record = recordOf();
  const file = new FirstAccessFile(folder, OWNER, record, () => true);
  record.restore(own, earlier);
  await file.save();
  return folder;
}

async function loaded(folder: string, owner = OWNER): Promise<number[][]> {
  const record = recordOf(owner);
  await new FirstAccessFile(folder, owner, record, () => true).load();
  return contentOf(record);
}

const NONE = [[], []];

describe('first accesses, kept', () => {
  test('what was saved is loaded, and is in nobody’s way', async () => {
    const folder = await saved();
    assert.deepEqual(await loaded(folder), [OWN, EARLIER]);
    assert.ok(!existsSync(`${fileOf(folder)}.next`));
    assert.equal(readFileSync(fileOf(folder)).length, 64 + 4 * 7 + 4);
  });

  test('it is written only when something changed, and not for a volume that has no folder', async () => {
    const folder = tempFolder();
    let stored = false;
    const record = recordOf();
    const file = new FirstAccessFile(folder, OWNER, record, () => stored);
    record.readWaits(0, 1);
    await file.save();
    assert.ok(!existsSync(fileOf(folder)));
    stored = true;
    await file.save();
    writeFileSync(fileOf(folder), 'as it was');
    record.readWaits(0, 1);
    await file.save();
    assert.equal(readFileSync(fileOf(folder), 'latin1'), 'as it was');
    record.readWaits(REGION_BYTES, 1);
    await file.save();
    assert.deepEqual(await loaded(folder), [[0, 1], []]);
  });

  test('what was read since the last look is in it', async () => {
    const folder = tempFolder();
    const heat = new Heat(OWNER.size);
    const record = new FirstAccess(heat);
    record.follow('relocating');
    heat.read(5 * REGION_BYTES, 1);
    await new FirstAccessFile(folder, OWNER, record, () => true).save();
    assert.deepEqual(await loaded(folder), [[5], []]);
  });

  test('damaged anywhere, cut anywhere, missing or no file: no record', async () => {
    const folder = await saved();
    const whole = readFileSync(fileOf(folder));
    for (let at = 0; at < whole.length; at++) {
      const damaged = Buffer.from(whole);
      damaged[at]! ^= 1;
      writeFileSync(fileOf(folder), damaged);
      assert.deepEqual(await loaded(folder), NONE, `byte ${at}`);
      await assert.rejects(readRecord(fileOf(folder)), /no record/);
    }
    for (let length = 0; length < whole.length; length++) {
      writeFileSync(fileOf(folder), whole.subarray(0, length));
      assert.deepEqual(await loaded(folder), NONE, `${length} bytes`);
    }
    writeFileSync(fileOf(folder), Buffer.concat([whole, Buffer.alloc(100 << 20)]));
    assert.deepEqual(await loaded(folder), NONE, 'too long');
    const odd = tempFolder();
    mkdirSync(fileOf(odd));
    assert.deepEqual(await loaded(odd), NONE, 'a folder');
    await saved(odd); // fails, and says nothing
    assert.deepEqual(await loaded(tempFolder()), NONE, 'missing');
    await assert.rejects(readRecord('/dev/zero'), /no record/);
    await assert.rejects(readRecord(join(folder, 'nothing')), { code: 'ENOENT' });
  });

  test('whole by its checksum and nonsense all the same: what can be used of it', async () => {
    const folder = await saved();
    const file = readFileSync(fileOf(folder));
    file.writeUInt32BE(4_000_000_000, 52);
    file.writeUInt32BE(4_000_000_000, 64);
    file.writeUInt32BE(3, 72);
    file.writeUInt32BE(crc32(file.subarray(0, -4)), file.length - 4);
    writeFileSync(fileOf(folder), file);
    assert.deepEqual(await loaded(folder), [[3, 0, 9, 8, 1_000_000], []]);
  });

  test('of another volume, or another size: no record; but anybody may replay it', async () => {
    const folder = await saved();
    assert.deepEqual(await loaded(folder, { ...OWNER, id: '7b3f2f0a-7f0e-4a63-8f2e-0a2f6f1d9c11' }), NONE);
    assert.deepEqual(await loaded(folder, { ...OWNER, size: OWNER.size + 1 }), NONE);
    assert.deepEqual(await readRecord(fileOf(folder)), OWN);
    assert.deepEqual(await readRecord(fileOf(await saved(undefined, [1], EARLIER))), EARLIER);
  });
});

describe('first accesses of a volume, kept', () => {
  test('over a restart while it relocates, over the hand-off, and over one behind it', async () => {
    const root = host();
    const volume = await proxiedVolume(root);
    await volume.takeover(5);
    await volume.settle();
    volume.firstAccess.inherit([0]);
    volume.firstAccess.readWaits(0, 1);
    await volume.close();
    const again = await reopened(root);
    assert.deepEqual(contentOf(again.firstAccess), [[0], [0]]);
    assert.equal(again.firstAccess.recording, true);
    const { store } = again;
    assert.equal(store.fill(store.epoch, 0, store.blocks, Buffer.alloc(again.size), 0), 0);
    assert.equal(await again.handOff(), true);
    await again.close();
    const plain = await reopened(root);
    assert.deepEqual(contentOf(plain.firstAccess), [[0], [0]]);
    assert.deepEqual([plain.phase, plain.firstAccess.recording], ['plain', false]);
    await plain.close();
    writeFileSync(fileOf(folderOf(root)), 'garbage');
    assert.deepEqual(contentOf((await reopened(root)).firstAccess), NONE);
  });

  test('it goes with the volume: retired, or cancelled', async () => {
    const root = host();
    const plain = await plainVolume(root);
    await plain.remember();
    plain.firstAccess.inherit([0]);
    await plain.firstAccessFile.save();
    assert.ok(existsSync(fileOf(folderOf(root))), NAME);
    await plain.seal(2);
    await plain.retire({ deleteImage: false });
    assert.ok(!existsSync(fileOf(folderOf(root))));
    plain.firstAccess.inherit([0]);
    await plain.close();
    assert.ok(!existsSync(fileOf(folderOf(root))));

    const other = host();
    const standby = await proxiedVolume(other);
    standby.firstAccess.inherit([0]);
    await standby.firstAccessFile.save();
    assert.ok(existsSync(fileOf(folderOf(other))));
    await standby.cancel();
    assert.ok(!existsSync(fileOf(folderOf(other))));
  });
});
