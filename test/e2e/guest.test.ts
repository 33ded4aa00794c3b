/** The detector detects: every kind of wrong block is found and called by its name. Without this, no verified move means anything. */

import assert from 'node:assert/strict';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import type { QemuMachine } from '../../src/hypervisor/qemu-machine.js';
import { buildGuest } from '../lab/guest.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createRawDisk, makeRecord, RECORD_BYTES } from '../lab/records.js';
import { guestMachine, labMissing, startServer, testFolder, type WorkloadOptions } from '../lab/vm.js';

const skip = (await labMissing()) ?? false;
const DISK_BYTES = 16 * 1024 * 1024;

function record(slot: number, sequence: number): Buffer {
  const words = new Uint32Array(RECORD_BYTES / 4);
  makeRecord(words, 0, slot, sequence);
  return Buffer.from(words.buffer);
}

async function rewrite(image: string, blocks: ReadonlyMap<number, Buffer>): Promise<void> {
  const file = await open(image, 'r+');
  for (const [slot, bytes] of blocks) await file.write(bytes, 0, RECORD_BYTES, slot * RECORD_BYTES);
  await file.close();
}

async function boot(
  t: TestContext,
  workload: WorkloadOptions,
  spoil: (image: string) => Promise<void> = async () => {},
): Promise<{ machine: QemuMachine; monitor: GuestMonitor; image: string }> {
  const folder = await testFolder();
  t.after(folder.remove);
  const image = join(folder.path, 'disk.img');
  const socketPath = join(folder.path, 'nbd.sock');
  await createRawDisk(image, DISK_BYTES, workload.slots);
  await spoil(image);
  const server = await startServer('qemu-nbd', ['-t', '-f', 'raw', '-k', socketPath, image], socketPath);
  t.after(() => server.terminate());
  const driver = new QemuDriver({ runtimeDir: join(folder.path, 'run'), dieWithParent: true });
  const definition = guestMachine({ name: 'vm1', guest: await buildGuest(), volume: 'disk', workload });
  const machine = await driver.start(definition, { disks: { disk: { socketPath } } });
  t.after(() => machine.kill());
  const monitor = new GuestMonitor();
  t.after(() => monitor.close());
  await monitor.attach('a', machine.serialPath!);
  await monitor.ready();
  return { machine, monitor, image };
}

test('zero, torn, misplaced, newer and foreign blocks are found', { skip }, async (t) => {
  const torn = record(7, 0);
  torn[RECORD_BYTES - 1]! ^= 1;
  const spoilt = new Map([
    [3, Buffer.alloc(RECORD_BYTES)],
    [7, torn],
    [500, record(501, 0)],
    [600, record(600, 4)],
    [1023, Buffer.alloc(RECORD_BYTES, 'not ours')],
  ]);
  const workload: WorkloadOptions = { mode: 'raw', slots: 1024, writes: 0, rate: 1 };
  const { machine, monitor, image } = await boot(t, workload, (path) => rewrite(path, spoilt));
  assert.equal((await checkRawDisk(image, workload.slots)).bad, 4); // the newer one is a good record, in its place
  assert.equal((await monitor.check('a')).bad, 5);
  const found = new Set(monitor.complaints);
  for (const complaint of [
    'BAD slot=3 want=0 got=0 kind=zero',
    'BAD slot=7 want=0 got=0 kind=torn',
    'BAD slot=500 want=0 got=0 kind=misplaced',
    'BAD slot=600 want=0 got=4 kind=newer',
  ]) {
    assert.ok(found.has(complaint), `${complaint}: ${[...found].join('; ')}`);
  }
  assert.ok(monitor.complaints.some((line) => /slot=1023 .* kind=garbage/.test(line)));
  const verdict = await monitor.finish('a');
  assert.equal(verdict.bad, 5);
  assert.ok(verdict.errors >= 10);
  await machine.exited;
});

test('blocks that went back to an earlier state are found, though each is a good record', {
  skip,
}, async (t) => {
  const workload: WorkloadOptions = { mode: 'raw', slots: 256 };
  const { machine, monitor, image } = await boot(t, workload);
  await monitor.progress('a', { records: 600 });
  await machine.pause();
  await rewrite(image, new Map(Array.from({ length: 128 }, (_, slot) => [slot, record(slot, 0)])));
  assert.equal((await checkRawDisk(image, workload.slots)).bad, 0);
  await machine.resume();
  const verdict = await monitor.finish('a');
  assert.ok(verdict.bad > 0 && verdict.errors >= verdict.bad, JSON.stringify(verdict));
  assert.ok(monitor.complaints.length > 0);
  for (const complaint of monitor.complaints) assert.match(complaint, /got=0 kind=stale/);
  await machine.exited;
});
