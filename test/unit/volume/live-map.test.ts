import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { LiveMap, type LiveTag } from '../../../src/volume/live-map.js';
import { tempFolder } from '../../support/volume.js';

const tag: LiveTag = { volumeId: randomUUID(), bootId: randomUUID(), blocks: 100_000, epoch: 7 };

/** A valid map with bit 3 of byte 5, left by a process that did not tidy up. */
async function left(): Promise<string> {
  const path = join(tempFolder(), 'presence.live');
  const map = await LiveMap.create(path, tag.blocks);
  map.validate(tag);
  map.bits[5] = 8;
  map.close();
  return path;
}

test('a map with just this tag is opened with its bits, also those of after the validation', async () => {
  const map = LiveMap.open(await left(), tag);
  assert.ok(map instanceof LiveMap);
  assert.equal(map.bits[5], 8);
  assert.ok(map.bits.length * 8 >= tag.blocks);
  map.close();
});

test('two openings see one another at once: the memory is shared', async () => {
  const path = await left();
  const [one, two] = [LiveMap.open(path, tag), LiveMap.open(path, tag)];
  assert.ok(one instanceof LiveMap && two instanceof LiveMap);
  one.bits[9] = 1;
  assert.equal(two.bits[9], 1);
  one.close();
  two.close();
});

test('another boot, volume, number of blocks, or a later epoch: missing', async () => {
  const path = await left();
  const others: Partial<LiveTag>[] = [
    { bootId: randomUUID() },
    { volumeId: randomUUID() },
    { blocks: tag.blocks + 1 },
    { epoch: tag.epoch - 1 },
  ];
  for (const other of others) assert.equal(LiveMap.open(path, { ...tag, ...other }), 'missing');
});

test('an earlier epoch, or none: unset', async () => {
  const path = await left();
  assert.equal(LiveMap.open(path, { ...tag, epoch: tag.epoch + 1 }), 'unset');
  const map = LiveMap.open(path, tag);
  assert.ok(map instanceof LiveMap);
  map.invalidate();
  assert.equal(LiveMap.open(path, tag), 'unset');
  map.validate({ ...tag, epoch: 8 });
  const again = LiveMap.open(path, { ...tag, epoch: 8 });
  assert.ok(again instanceof LiveMap);
  again.close();
  map.close();
});

test('an epoch of any size comes and goes whole', async () => {
  const path = await left();
  for (const epoch of [255, 256, 0x01020304, 0xffffffff]) {
    const map = await LiveMap.create(path, tag.blocks);
    map.validate({ ...tag, epoch });
    const again = LiveMap.open(path, { ...tag, epoch });
    assert.ok(again instanceof LiveMap);
    again.close();
    map.close();
  }
});

test('created but never validated: missing', async () => {
  const path = await left();
  (await LiveMap.create(path, tag.blocks)).close();
  assert.equal(LiveMap.open(path, tag), 'missing');
});

test('gone, cut, grown, or with a damaged head: missing', async () => {
  const path = await left();
  const whole = readFileSync(path);
  assert.equal(LiveMap.open(`${path}.none`, tag), 'missing');
  for (const size of [0, 4096, whole.length - 1, whole.length + 1]) {
    truncateSync(path, size);
    assert.equal(LiveMap.open(path, tag), 'missing');
    writeFileSync(path, whole);
  }
  for (const at of [0, 7, 16, 24, 70, 200, 4095]) {
    const damaged = Buffer.from(whole);
    damaged[at]! ^= 1;
    writeFileSync(path, damaged);
    assert.equal(LiveMap.open(path, tag), 'missing', `byte ${at}`);
  }
});

test('its space is reserved: a full disk shows when it is made, not as a signal later', async () => {
  const path = join(tempFolder(), 'presence.live');
  const map = await LiveMap.create(path, 2 ** 28);
  const { size, blocks } = statSync(path);
  assert.equal(size, 4096 + 2 ** 28 / 8);
  assert.ok(blocks * 512 >= size);
  map.close();
});
