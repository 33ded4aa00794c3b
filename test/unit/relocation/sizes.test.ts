/** Volumes that end within a block, and sources that want requests of their own shape. */
import assert from 'node:assert/strict';
import { closeSync, ftruncateSync, openSync, readFileSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import {
  assertBlocks,
  BLOCK,
  KIB,
  Lab,
  MIB,
  pattern,
  quiet,
  readAt,
  until,
  writeAt,
} from '../../lab/ferry.js';
import { lacking, serverOn } from '../../lab/programs.js';

for (const size of [1, 511, BLOCK - 1, BLOCK, BLOCK + 1, 64 * BLOCK + 512, MIB - 1]) {
  test(`a volume of ${size} bytes: reads, writes at its end, copy, hand-off`, async (t) => {
    const lab = new Lab(t);
    const source = await lab.source(size);
    const proxy = await lab.proxy(source);
    const guest = await proxy.guest();
    assert.equal(guest.info.size, size);
    const expected = Buffer.from(source.device.data);
    assertBlocks(await readAt(guest, size - 1, 1), expected.subarray(size - 1));
    await writeAt(guest, size - 1, Buffer.alloc(1, 0x7a));
    expected.fill(0x7a, size - 1);
    assertBlocks(await readAt(guest, 0, size), expected);
    await guest.flush();
    await proxy.service.handedOff();
    assert.equal(proxy.status.presentBytes, size);
    assertBlocks(readFileSync(proxy.image), expected);
  });
}

test('a write of the cut last block as a whole needs no source', async (t) => {
  const lab = new Lab(t);
  const size = 3 * BLOCK + 100;
  const source = await lab.source(size);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  await writeAt(guest, 3 * BLOCK, Buffer.alloc(100, 1));
  assert.equal(source.reads.length, 0);
  assert.equal(proxy.status.presentBytes, BLOCK);
});

for (const { minimum, maximum } of [
  { minimum: 512, maximum: 64 * KIB },
  { minimum: 4 * KIB, maximum: 32 * KIB },
  { minimum: 64 * KIB, maximum: 128 * KIB },
]) {
  test(`a source that takes requests of ${minimum} to ${maximum} bytes only`, {
    skip: lacking('nbdkit'),
  }, async (t) => {
    const lab = new Lab(t);
    const size = MIB + 64 * KIB;
    const data = pattern(size);
    const disk = join(lab.dir, 'disk');
    writeFileSync(disk, data);
    const socket = join(lab.dir, 'nbdkit');
    const server = await serverOn(
      socket,
      'nbdkit',
      ...['-f', '-r', '-U', socket, '--filter=blocksize-policy', 'file', disk],
      ...[`blocksize-minimum=${minimum}`, `blocksize-preferred=${Math.max(4096, minimum)}`],
      ...[`blocksize-maximum=${maximum}`, 'blocksize-error-policy=error'],
    );
    lab.onClose(() => server.stop());
    const uri = `nbd+unix:///?socket=${socket}`;
    const standby = await lab.proxy(uri, { standby: true });
    const reader = await standby.guest();
    assertBlocks(await readAt(reader, 0, size), data);
    assertBlocks(await readAt(reader, 70_001, 7), data.subarray(70_001, 70_008));
    assertBlocks(await readAt(reader, size - 5, 5), data.subarray(size - 5));
    const proxy = await lab.proxy(uri, { background: true });
    const guest = await proxy.guest();
    await writeAt(guest, size - 3, Buffer.alloc(3, 1));
    await writeAt(guest, 10 * BLOCK + 1, Buffer.alloc(5, 2));
    await proxy.service.handedOff();
    const expected = Buffer.from(data)
      .fill(1, size - 3)
      .fill(2, 10 * BLOCK + 1, 10 * BLOCK + 6);
    assertBlocks(await readAt(guest, 0, size), expected);
  });
}

test('a qemu-nbd that lets in one client at a time', { skip: lacking('qemu-nbd') }, async (t) => {
  const lab = new Lab(t);
  const data = pattern(4 * MIB);
  const disk = join(lab.dir, 'disk');
  writeFileSync(disk, data);
  const socket = join(lab.dir, 'qemu-nbd');
  const server = await serverOn(socket, 'qemu-nbd', '-t', '-r', '-e', '1', '-f', 'raw', '-k', socket, disk);
  lab.onClose(() => server.stop());
  const proxy = await lab.proxy(`nbd+unix:///?socket=${socket}`, {
    timing: { spareBackoffMs: 20, connectTimeoutMs: 300 },
  });
  const guest = await proxy.guest();
  assertBlocks(await readAt(guest, MIB + 5, MIB), data.subarray(MIB + 5, 2 * MIB + 5));
  await until(() => proxy.status.source!.state === 'connected', 'connected');
  await quiet();
  proxy.service.resume();
  await proxy.service.prefetch(0, 4 * MIB);
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), data);
});

test('a qemu-nbd that allows several, and zeros it tells of', { skip: lacking('qemu-nbd') }, async (t) => {
  const lab = new Lab(t);
  const data = Buffer.alloc(64 * MIB);
  pattern(MIB).copy(data, 10 * MIB);
  const disk = join(lab.dir, 'disk');
  writeFileSync(disk, Buffer.alloc(0));
  const fd = openSync(disk, 'r+');
  ftruncateSync(fd, data.length);
  writeSync(fd, data, 10 * MIB, MIB, 10 * MIB);
  closeSync(fd);
  const socket = join(lab.dir, 'qemu-nbd');
  const server = await serverOn(socket, 'qemu-nbd', '-t', '-r', '-e', '8', '-f', 'raw', '-k', socket, disk);
  lab.onClose(() => server.stop());
  const proxy = await lab.proxy(`nbd+unix:///?socket=${socket}`, { background: true });
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), data);
  assert.ok(
    proxy.status.traffic.fromSourceBytes <= 2 * MIB,
    `${proxy.status.traffic.fromSourceBytes} bytes read`,
  );
});
