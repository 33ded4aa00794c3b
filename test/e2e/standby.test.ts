/**
 * A destination QEMU opens and reads its disk seconds before the switch, while the guest still writes at the source. What was read
 * then must not be kept. `proxy --standby` keeps nothing; the stand-in that shows that this test can fail is the same proxy
 * without --standby, which takes the live disk for one that stands still. ext4 and e2fsck would not notice: the raw disk does.
 */

import assert from 'node:assert/strict';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { before, type TestContext, test } from 'node:test';
import type { Machine } from '../../src/hypervisor/driver.js';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { DaemonProcess, runBlockferry } from '../lab/hosts.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createRawDisk } from '../lab/records.js';
import { guestMachine, labMissing, testFolder, type WorkloadOptions } from '../lab/vm.js';

const DISK_BYTES = 64 << 20;
const STEP_TIMEOUT_MS = 60_000;
const skip = (await labMissing()) ?? false;
const WORKLOAD: WorkloadOptions = { mode: 'raw', slots: 4096, rate: 400 };

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

interface Moved {
  monitor: GuestMonitor;
  destination: Machine;
  image: string;
  state: string;
}

/** serve at the source, proxy at the destination, and a guest that moves between them without a coordinator. */
async function moveOver(t: TestContext, proxyWords: string[]): Promise<Moved> {
  const folder = await testFolder();
  t.after(folder.remove);
  const at = (name: string): string => join(folder.path, name);
  await createRawDisk(at('source.img'), DISK_BYTES, WORKLOAD.slots);
  const serve = await DaemonProcess.start([
    'serve',
    at('source.img'),
    '--name',
    'disk',
    '--listen',
    `unix:${at('s.sock')}`,
    '--state-dir',
    at('s'),
  ]);
  t.after(() => serve.stop());
  const uri = `nbd+unix:///disk?socket=${at('s.sock')}`;
  const proxy = await DaemonProcess.start([
    'proxy',
    uri,
    at('here.img'),
    '--name',
    'disk',
    '--listen',
    `unix:${at('d.sock')}`,
    '--state-dir',
    at('d'),
    ...proxyWords,
  ]);
  t.after(() => proxy.stop());
  mkdirSync(at('run'));
  const driver = new QemuDriver({ runtimeDir: at('run'), dieWithParent: true });
  const monitor = new GuestMonitor();
  t.after(() => monitor.close());
  const start = async (host: string, socketPath: string, incoming: boolean): Promise<Machine> => {
    const definition = guestMachine({ name: 'vm1', guest, volume: 'disk', workload: WORKLOAD });
    const machine = await driver.start(definition, { disks: { disk: { socketPath } }, incoming });
    t.after(() => machine.kill());
    await monitor.attach(host, machine.serialPath!);
    return machine;
  };
  const source = await start('a', at('s.sock'), false);
  await monitor.ready();
  const destination = await start('b', at('d.sock'), true);
  // The destination has opened its disk; the guest goes on writing at the source.
  await monitor.progress('a', { count: 150, records: 200 });
  await source.migrate(await destination.incoming('tcp:127.0.0.1:0'));
  await source.waitPreSwitchover(STEP_TIMEOUT_MS);
  await source.continueSwitchover();
  await destination.waitResumed(STEP_TIMEOUT_MS);
  await source.waitCompleted(STEP_TIMEOUT_MS);
  await source.stop();
  return { monitor, destination, image: at('here.img'), state: at('d') };
}

test('what was read before the switch is not kept: not one stale record', { skip }, async (t) => {
  const { monitor, destination, image, state } = await moveOver(t, ['--standby']);
  await monitor.progress('b', { count: 50, records: 20 });
  const { code, stderr } = await runBlockferry(['watch', 'disk', '--state-dir', state]);
  assert.equal(code, 0, stderr);
  const verdict = await monitor.finish('b');
  assert.deepEqual(monitor.complaints, []);
  assert.equal(verdict.bad + verdict.errors + verdict.ramErrors, 0, JSON.stringify(verdict));
  assert.equal((await destination.exited).code, 0);
  assert.deepEqual(await checkRawDisk(image, WORKLOAD.slots), {
    bad: 0,
    badSlots: [],
    digest: verdict.digest,
  });
});

test('the same check sees the stale records of a stand-in that keeps what it read', { skip }, async (t) => {
  const { monitor } = await moveOver(t, []);
  const verdict = await monitor.finish('b');
  assert.ok(
    verdict.bad > 0,
    `a proxy that kept blocks of a running guest showed none of them: ${JSON.stringify(verdict)}`,
  );
  t.diagnostic(`${verdict.bad} of ${verdict.slots} records stale`);
});
