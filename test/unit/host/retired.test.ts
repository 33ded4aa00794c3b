/** What a volume that moved away leaves here, and when it is still the image of its generation. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync, renameSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import {
  bringRetiredBack,
  giveUpHome,
  homeOf,
  retiredId,
  setRetiredAside,
} from '../../../src/host/retired.js';
import { readIdentity } from '../../../src/volume/identity.js';
import { stampOfFile } from '../../../src/volume/image.js';
import { folderOf, host, NAME, plainVolume, stateOf } from '../../support/volumes.js';

async function retired(
  root = host(),
): Promise<{ root: string; stateDir: string; image: string; id: string }> {
  const volume = await plainVolume(root);
  const { id } = volume;
  const image = volume.store.image.path;
  await volume.seal(2);
  await volume.retire({ deleteImage: false });
  await volume.close();
  return { root, stateDir: stateOf(root), image, id };
}

describe('home', () => {
  test('is the image of the generation that was sealed, while nobody touches it', async () => {
    const { stateDir, image, id } = await retired();
    const stamp = stampOfFile(image);
    assert.deepEqual(await homeOf(stateDir, NAME), { id, generation: 1, image, stamp });
    readFileSync(image);
    assert.notEqual(await homeOf(stateDir, NAME), null, 'to read it is not to touch it');
  });

  const touches: [string, (image: string) => void][] = [
    ['written to', (image) => writeFileSync(image, 'x', { flag: 'r+' })],
    [
      'replaced by a copy',
      (image) => {
        writeFileSync(`${image}.new`, readFileSync(image));
        renameSync(`${image}.new`, image);
      },
    ],
    [
      'written to, with its time set back',
      (image) => {
        const before = new Date(1_700_000_000_000);
        writeFileSync(image, 'x', { flag: 'r+' });
        utimesSync(image, before, before);
      },
    ],
    ['deleted', (image) => rmSync(image)],
    ['moved away', (image) => renameSync(image, `${image}.away`)],
  ];
  for (const [how, touch] of touches) {
    test(`is none once the image was ${how}`, async () => {
      const { stateDir, image } = await retired();
      touch(image);
      assert.equal(await homeOf(stateDir, NAME), null);
    });
  }

  test('is none of a volume that is not retired, that is not there, or whose image was deleted with it', async () => {
    const root = host();
    assert.equal(await homeOf(stateOf(root), NAME), null);
    const volume = await plainVolume(root);
    await volume.remember();
    assert.equal(await homeOf(stateOf(root), NAME), null);
    await volume.seal(2);
    assert.equal(await homeOf(stateOf(root), NAME), null);
    await volume.retire({ deleteImage: true });
    assert.equal(await homeOf(stateOf(root), NAME), null);
    assert.equal((await readIdentity(folderOf(root)))?.imageStamp, null);
  });

  test('is given up durably before anything is written to the image, and stays so', async () => {
    const { root, stateDir, id } = await retired();
    await giveUpHome(stateDir, NAME);
    assert.equal(await homeOf(stateDir, NAME), null);
    assert.equal((await readIdentity(folderOf(root)))?.imageStamp, null);
    assert.equal(await retiredId(stateDir, NAME), id, 'it is still known that it moved away');
    await giveUpHome(stateDir, NAME);
    setRetiredAside(stateDir, NAME);
    assert.ok(!existsSync(folderOf(root)));
    bringRetiredBack(stateDir, NAME);
    assert.deepEqual([await homeOf(stateDir, NAME), await retiredId(stateDir, NAME)], [null, id]);
    await giveUpHome(join(stateDir, 'nothing'), NAME);
  });

  test('is still home after a volume that took another image was cancelled', async () => {
    const { stateDir, image } = await retired();
    setRetiredAside(stateDir, NAME);
    assert.equal(await homeOf(stateDir, NAME), null);
    bringRetiredBack(stateDir, NAME);
    assert.equal((await homeOf(stateDir, NAME))?.image, image);
    assert.ok(existsSync(dirname(image)));
  });
});
