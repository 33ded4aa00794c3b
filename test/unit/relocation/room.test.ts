/** No room at the destination: nothing is lost, reads go on, and all is well once there is room. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { mock, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import { IdentityFile } from '../../../src/volume/identity.js';
import { Image } from '../../../src/volume/image.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  KIB,
  Lab,
  MIB,
  pattern,
  readAt,
  until,
  writeAt,
} from '../../lab/ferry.js';

const ENOSPC = 28;

/** From now on every write to an image fails, until it is told that there is room. */
function fillUp(lab: Lab): () => void {
  const write = mock.method(Image.prototype, 'write', () => -ENOSPC);
  const stop = () => write.mock.restore();
  lab.onClose(stop);
  return stop;
}

test('reads of missing blocks pass through, writes get ENOSPC, and the copy goes on once there is room', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB);
  const proxy = await lab.proxy(source, { background: true, timing: { retryAfterErrorMs: 100 } });
  const guest = await proxy.guest();
  proxy.service.pause();
  await writeAt(guest, 7 * MIB, Buffer.alloc(BLOCK, 1));
  const makeRoom = fillUp(lab);
  proxy.service.resume();
  await until(() => proxy.status.background.state === 'waiting', 'the copy waits');
  assert.match(proxy.status.error!, /no room/);
  const { presentBytes } = proxy.status;
  const { data } = source.device;
  assertBlocks(await readAt(guest, 3 * MIB, 64 * KIB), data.subarray(3 * MIB, 3 * MIB + 64 * KIB));
  // Local and missing blocks in one read.
  const mixed = Buffer.from(data.subarray(7 * MIB - BLOCK, 7 * MIB + 2 * BLOCK)).fill(1, BLOCK, 2 * BLOCK);
  assertBlocks(await readAt(guest, 7 * MIB - BLOCK, 3 * BLOCK), mixed);
  assert.equal(await errnoOfRequest(writeAt(guest, 0, Buffer.alloc(BLOCK))), Errno.ENOSPC);
  assert.equal(await errnoOfRequest(writeAt(guest, 100, Buffer.alloc(10))), Errno.ENOSPC);
  await guest.flush();
  assert.equal(proxy.status.presentBytes, presentBytes);
  makeRoom();
  await proxy.service.handedOff();
  const expected = Buffer.from(data).fill(1, 7 * MIB, 7 * MIB + BLOCK);
  assertBlocks(await readAt(guest, 0, 8 * MIB), expected);
  assert.equal(proxy.status.error, null);
});

test('a hand-off that fails for want of room in the state folder comes later', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  source.hold();
  const proxy = await lab.proxy(source, { background: true });
  await until(() => source.held > 0, 'the copy began');
  let failures = 0;
  const update = mock.method(IdentityFile.prototype, 'update', async () => {
    failures++;
    throw Object.assign(new Error('ENOSPC: no space left on device'), { code: 'ENOSPC' });
  });
  lab.onClose(() => update.mock.restore());
  source.release();
  await until(() => failures >= 2, 'the hand-off is tried again');
  const { phase, handoffAt, presentBytes, error } = proxy.status;
  assert.deepEqual([phase, handoffAt, presentBytes], ['relocating', null, MIB]);
  assert.match(error!, /no space/);
  update.mock.restore();
  await proxy.service.handedOff();
  assert.equal(proxy.status.error, null);
});

const canMount =
  spawnSync('unshare', ['-m', 'mount', '-t', 'tmpfs', 'none', '/mnt'], { stdio: 'ignore' }).status === 0 &&
  process.getuid?.() === 0;

test('a real filesystem that is full', {
  skip: canMount ? false : 'needs root to mount a tmpfs',
}, async (t) => {
  const lab = new Lab(t);
  const small = join(lab.dir, 'small');
  mkdirSync(small);
  assert.equal(spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=6m', 'ferry-test', small]).status, 0);
  lab.onClose(() => {
    assert.equal(spawnSync('umount', [small]).status, 0);
  });
  writeFileSync(join(small, 'ballast'), Buffer.alloc(3 * MIB));
  const source = await lab.source(4 * MIB);
  const image = join(small, 'disk.img');
  const proxy = await lab.proxy(source, { background: true, image });
  const guest = await proxy.guest();
  await until(() => /no room/.test(proxy.status.error ?? ''), 'it is full');
  const { presentBytes } = proxy.status;
  assert.ok(presentBytes > 2 * MIB && presentBytes < 4 * MIB, `${presentBytes} bytes`);
  assertBlocks(await readAt(guest, 0, 4 * MIB), pattern(4 * MIB));
  assert.equal(await errnoOfRequest(writeAt(guest, 4 * MIB - BLOCK, Buffer.alloc(BLOCK))), Errno.ENOSPC);
  await writeAt(guest, 0, Buffer.alloc(BLOCK, 5));
  rmSync(join(small, 'ballast'));
  await proxy.service.handedOff();
  assertBlocks(await readAt(guest, 0, 4 * MIB), pattern(4 * MIB).fill(5, 0, BLOCK));
});
