import assert from 'node:assert/strict';
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { GuestDevice, LinkDevice } from '../../../src/volume/faces.js';
import { Heat, REGION_BYTES } from '../../../src/volume/heat.js';
import { HeatFile } from '../../../src/volume/heat-file.js';
import { reopen } from '../../../src/volume/open.js';
import { Io, tempFolder } from '../../support/volume.js';
import { folderOf, host, keep, NAME, plainVolume, proxiedVolume, stateOf } from '../../support/volumes.js';

const OWNER = { id: '6b3f2f0a-7f0e-4a63-8f2e-0a2f6f1d9c11', size: 3 * 2 ** 40 + 5 };
const fileOf = (folder: string): string => join(folder, 'heat');

function heated(): Heat {
  const heat = new Heat(OWNER.size);
  for (let i = 0; i < 1000; i++) heat.read(i * 700_000_000, 4096);
  heat.written(0, 64 << 20);
  heat.written(OWNER.size - 1, 1);
  return heat;
}

async function saved(folder = tempFolder()): Promise<{ folder: string; heat: Heat }> {
  const heat = new Heat(OWNER.size);
  const file = new HeatFile(folder, OWNER, heat, () => true);
  heat.bytes.set(heated().bytes);
  await file.save();
  return { folder, heat };
}

async function loaded(folder: string, owner = OWNER): Promise<Heat> {
  const heat = new Heat(owner.size);
  await new HeatFile(folder, owner, heat, () => true).load();
  return heat;
}

const levels = (heat: Heat): Buffer => Buffer.from(heat.bytes.subarray(8));
const isCold = (heat: Heat): boolean =>
  heat.sameUntil(0, heat.regions) === heat.regions && heat.status(0) === 0;

describe('heat, kept', () => {
  test('what was saved is loaded; a GiB that is cold takes no room', async () => {
    const { folder, heat } = await saved();
    assert.ok(levels(await loaded(folder)).equals(levels(heat)));
    assert.ok(!existsSync(`${fileOf(folder)}.next`));
    const cold = tempFolder();
    const few = new Heat(OWNER.size);
    const file = new HeatFile(cold, OWNER, few, () => true);
    few.read(OWNER.size - 1, 1);
    await file.save();
    assert.equal(readFileSync(fileOf(cold)).length, 64 + 4100 + 4);
    assert.ok(levels(await loaded(cold)).equals(levels(few)));
  });

  test('it is written only when something was counted, and not for a volume that has no folder', async () => {
    const folder = tempFolder();
    let stored = false;
    const heat = new Heat(OWNER.size);
    const file = new HeatFile(folder, OWNER, heat, () => stored);
    heat.read(0, 1);
    await file.save();
    assert.ok(!existsSync(fileOf(folder)));
    stored = true;
    await file.save();
    writeFileSync(fileOf(folder), 'as it was');
    await file.save();
    assert.equal(readFileSync(fileOf(folder), 'latin1'), 'as it was');
    heat.read(0, 1);
    await file.save();
    assert.ok(!isCold(await loaded(folder)));
  });

  test('damaged anywhere, cut anywhere, missing or a folder: cold', async () => {
    const { folder } = await saved();
    const whole = readFileSync(fileOf(folder));
    for (const at of [0, 9, 20, 60, 64, 70, whole.length >> 1, whole.length - 1]) {
      const damaged = Buffer.from(whole);
      damaged[at]! ^= 1;
      writeFileSync(fileOf(folder), damaged);
      assert.ok(isCold(await loaded(folder)), `byte ${at}`);
    }
    for (const length of [0, 3, 64, 68, whole.length - 4100, whole.length - 1]) {
      writeFileSync(fileOf(folder), whole.subarray(0, length));
      assert.ok(isCold(await loaded(folder)), `${length} bytes`);
    }
    writeFileSync(fileOf(folder), Buffer.concat([whole, Buffer.alloc(100 << 20)]));
    assert.ok(isCold(await loaded(folder)), 'too long');
    assert.ok(isCold(await loaded(tempFolder())), 'missing');
    const odd = tempFolder();
    mkdirSync(fileOf(odd));
    assert.ok(isCold(await loaded(odd)), 'a folder');
    const file = new HeatFile(odd, OWNER, heated(), () => true);
    await file.save(); // fails, and says nothing
  });

  test('of another volume, or another size: cold', async () => {
    const { folder } = await saved();
    assert.ok(isCold(await loaded(folder, { ...OWNER, id: '7b3f2f0a-7f0e-4a63-8f2e-0a2f6f1d9c11' })));
    assert.ok(isCold(await loaded(folder, { ...OWNER, size: OWNER.size + 1 })));
  });
});

const heatOf = async (device: GuestDevice | LinkDevice): Promise<number> => {
  const request = Io.status('blockferry:heat', 0, 512);
  device.status(request);
  assert.equal(await request.done, 0);
  return request.extents[0]![1];
};

describe('heat of a volume', () => {
  test('the guest is counted and the link is not; both are told', async () => {
    const volume = await plainVolume();
    const [guest, link] = [new GuestDevice(volume), new LinkDevice(volume)];
    const buffer = Buffer.alloc(512);
    assert.equal(link.readNow(0, 512, buffer, 0), 0);
    const request = new Io(0, 512);
    link.read(request);
    assert.equal(await request.done, 0);
    assert.equal(link.direct()!.heat, null);
    assert.deepEqual([await heatOf(guest), volume.heat.counted], [0, 0]);
    assert.equal(guest.direct()!.heat, volume.heat.bytes);
    assert.equal(guest.readNow(0, 512, buffer, 0), 0);
    assert.equal(guest.writeNow(0, 512, buffer, 0), 0);
    assert.equal(link.direct()!.heat, null, 'the guest was asked in between');
    assert.deepEqual([await heatOf(guest), await heatOf(link)], [0x10001, 0x10001]);
  });

  test('a write that is refused does not count', async () => {
    const volume = await plainVolume();
    await volume.seal(2);
    const guest = new GuestDevice(volume);
    assert.notEqual(guest.writeNow(0, 512, Buffer.alloc(512), 0), 0);
    const request = Io.write(0, Buffer.alloc(512));
    guest.write(request);
    assert.notEqual(await request.done, 0);
    assert.equal(volume.heat.counted, 0);
  });

  test('it is kept over a restart once the volume is stored', async () => {
    const root = host();
    const volume = await plainVolume(root);
    await volume.remember();
    assert.equal(new GuestDevice(volume).writeNow(0, 512, Buffer.alloc(512), 0), 0);
    await volume.close();
    const again = keep(await reopen({ stateDir: stateOf(root), name: NAME }));
    assert.equal(again.heat.status(0), 1 << 16);
    assert.equal(again.size < REGION_BYTES, true);
    await again.close();
    writeFileSync(fileOf(folderOf(root)), 'garbage');
    assert.equal(keep(await reopen({ stateDir: stateOf(root), name: NAME })).heat.status(0), 0);
  });

  test('it goes with the volume: retired, or cancelled', async () => {
    const root = host();
    const plain = await plainVolume(root);
    await plain.remember();
    plain.heat.read(0, 1);
    await plain.heatFile.save();
    assert.ok(existsSync(fileOf(folderOf(root))));
    await plain.seal(2);
    await plain.retire({ deleteImage: false });
    assert.ok(!existsSync(fileOf(folderOf(root))));
    plain.heat.read(0, 1);
    await plain.close();
    assert.ok(!existsSync(fileOf(folderOf(root))));

    const other = host();
    const standby = await proxiedVolume(other);
    standby.heat.read(0, 1);
    await standby.heatFile.save();
    assert.ok(existsSync(fileOf(folderOf(other))));
    await standby.cancel();
    assert.ok(!existsSync(fileOf(folderOf(other))));
  });
});
