/** Who waits for whom: hits for nobody, demand never behind the copy. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { MemoryDevice } from '../../fakes/memory-device.js';
import { assertBlocks, BLOCK, isSettled, KIB, Lab, MIB, readAt, until, writeAt } from '../../lab/ferry.js';

test('hits at depth 1 are answered while another client’s misses at depth 16 wait (xNBD fault 2)', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(4 * MIB);
  const proxy = await lab.proxy(source);
  const [patient, other] = [await proxy.guest(), await proxy.guest()];
  await proxy.service.prefetch(0, MIB);
  source.hold();
  const misses = Array.from({ length: 16 }, (_, i) => readAt(other, 2 * MIB + i * 64 * KIB, BLOCK));
  await until(() => source.held === 16, 'all misses wait');
  for (let i = 0; i < 300; i++) {
    const at = ((i * 37) % 256) * BLOCK;
    assertBlocks(await readAt(patient, at, BLOCK), source.device.data.subarray(at, at + BLOCK));
  }
  // Nor on the same connection, nor behind writes and flushes.
  await writeAt(other, 100, Buffer.alloc(10, 1));
  await writeAt(other, 3 * MIB, Buffer.alloc(BLOCK, 1));
  await other.flush();
  await readAt(other, 0, BLOCK);
  assert.equal(source.held, 16);
  for (const miss of misses) assert.equal(await isSettled(miss), false);
  source.release();
  await Promise.all(misses);
});

test('a miss is answered while everything the copy asked for is held', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(16 * MIB);
  const devices = Array.from({ length: 4 }, () => {
    const device = new MemoryDevice(16 * MIB);
    source.device.data.copy(device.data);
    device.manner = () => 'held';
    return device;
  });
  const proxy = await lab.proxy(source);
  source.deviceOf = (connection) => devices[connection]!;
  source.cut();
  await until(() => source.connections === 3, 'connected again');
  void proxy.service.prefetch(0, 8 * MIB).catch(() => undefined);
  const [demand, ...bulk] = devices;
  await until(() => bulk.some(({ held }) => held.length > 0), 'the copy is under way');
  assert.equal(demand!.held.length, 0);
  demand!.manner = () => 'now';
  const guest = await proxy.guest();
  assertBlocks(await readAt(guest, 12 * MIB, BLOCK), source.device.data.subarray(12 * MIB, 12 * MIB + BLOCK));
  for (const device of devices) {
    device.manner = () => 'now';
    device.completeHeld();
  }
});

test('an answer that comes late holds up none that comes early', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.hold();
  const order: number[] = [];
  const reads = [0, 1, 2, 3].map((i) => readAt(guest, i * 10 * BLOCK, BLOCK).then(() => order.push(i)));
  await until(() => source.held === 4, 'all are at the source');
  source.device.manner = () => 'now';
  source.device.completeHeld((held) => held.reverse());
  await Promise.all(reads);
  assert.deepEqual(order, [3, 2, 1, 0]);
});
