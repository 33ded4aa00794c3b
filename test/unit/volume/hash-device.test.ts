/** What a volume's blocks hash to, as another host reads it. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import type { IoRequest } from '../../../src/nbd/device.js';
import { LATER } from '../../../src/nbd/device.js';
import { HASH_BYTES } from '../../../src/volume/block-hash.js';
import { HashDevice, hashPool } from '../../../src/volume/hash-device.js';
import { createProxied, openPlain } from '../../../src/volume/open.js';
import type { Volume } from '../../../src/volume/volume.js';
import { patterned, tempFolder } from '../../support/volume.js';

const BLOCK = 4096;
const BLOCKS = 200;
const SIZE = (BLOCKS - 1) * BLOCK + 77;

after(() => hashPool().end());

function expected(content: Buffer): Buffer {
  const hashes: Buffer[] = [];
  for (let at = 0; at < content.length; at += BLOCK)
    hashes.push(
      createHash('sha256')
        .update(content.subarray(at, at + BLOCK))
        .digest(),
    );
  return Buffer.concat(hashes);
}

async function plain(): Promise<{ volume: Volume; content: Buffer; device: HashDevice }> {
  const folder = tempFolder();
  const image = join(folder, 'disk.img');
  const content = patterned(SIZE);
  writeFileSync(image, content);
  const volume = await openPlain({ stateDir: join(folder, 'state'), name: 'disk', image });
  return { volume, content, device: new HashDevice(volume) };
}

/** The errno, and what was read; `abandoned` from the start on if so asked. */
function read(
  device: HashDevice,
  offset: number,
  length: number,
  abandoned = false,
): Promise<{ errno: number; bytes: Buffer }> {
  const bytes = Buffer.alloc(length + 2, 0xee);
  return new Promise((resolve) => {
    const request: IoRequest = {
      offset,
      length,
      flags: 0,
      buffer: bytes,
      at: 1,
      abandoned,
      changed: () => undefined,
      complete: (errno) => {
        assert.deepEqual([bytes[0], bytes[length + 1]], [0xee, 0xee], 'nothing beside it is touched');
        resolve({ errno, bytes: bytes.subarray(1, length + 1) });
      },
    };
    device.read(request);
  });
}

test('32 bytes a block, the last one as it is, whatever range is read', async () => {
  const { volume, content, device } = await plain();
  assert.equal(device.size, BLOCKS * HASH_BYTES);
  assert.equal(device.readNow(), LATER);
  const all = expected(content);
  for (const [offset, length] of [
    [0, device.size],
    [0, HASH_BYTES],
    [31, 2],
    [5, 64 * HASH_BYTES + 7],
    [device.size - 40, 40],
  ] as const) {
    const { errno, bytes } = await read(device, offset, length);
    assert.equal(errno, Errno.OK);
    assert.deepEqual(bytes, all.subarray(offset, offset + length), `${length} bytes at ${offset}`);
  }
  const many = Array.from({ length: 40 }, (_, i) => read(device, i * 100, 2500));
  for (const [i, { bytes }] of (await Promise.all(many)).entries())
    assert.deepEqual(bytes, all.subarray(i * 100, i * 100 + 2500));
  await volume.close();
});

test('what was written is hashed, also while the volume is sealed', async () => {
  const { volume, content, device } = await plain();
  const written = patterned(BLOCK, 9);
  assert.equal(volume.store.writeNow(3 * BLOCK, BLOCK, written, 0), Errno.OK);
  written.copy(content, 3 * BLOCK);
  await volume.seal(2);
  assert.deepEqual((await read(device, 0, device.size)).bytes, expected(content));
  await volume.close();
});

test('a volume that lacks blocks has no hashes, nor has a closed one', async () => {
  const folder = tempFolder();
  for (const standby of [true, false]) {
    const volume = await createProxied({
      stateDir: join(folder, 'state'),
      name: `disk-${standby}`,
      image: join(folder, `${standby}.img`),
      size: SIZE,
      source: { uri: 'nbd://localhost/disk', description: null },
      standby,
      arrival: null,
    });
    const device = new HashDevice(volume);
    assert.equal((await read(device, 0, device.size)).errno, Errno.EPERM);
    if (!standby) {
      // Not even of the blocks that are here.
      assert.equal(volume.store.fill(1, 0, 1, Buffer.alloc(BLOCK, 1), 0), Errno.OK);
      assert.equal((await read(device, 0, HASH_BYTES)).errno, Errno.EPERM);
    }
    await volume.close();
    assert.equal((await read(device, 0, HASH_BYTES)).errno, Errno.ESHUTDOWN);
  }
});

test('nobody writes to it, and who is gone is not worked for', async () => {
  const { volume, device } = await plain();
  assert.equal(device.writeNow(), Errno.EPERM);
  assert.equal((await read(device, 0, device.size, true)).errno, Errno.EIO);
  // Places are given back: all of them are there for the next.
  const gone = await Promise.all(Array.from({ length: 30 }, () => read(device, 0, HASH_BYTES, true)));
  assert.ok(gone.every(({ errno }) => errno === Errno.EIO));
  assert.equal((await read(device, 0, device.size)).errno, Errno.OK);
  await volume.close();
});
