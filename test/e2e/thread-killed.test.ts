/**
 * The data thread under a working machine dies, twice. The machine waits for its disk, which another thread serves a moment later, and
 * works on: not one record of it is lost, and no other process has to be started.
 */

import assert from 'node:assert/strict';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { Daemon } from '../../src/host/daemon.js';
import type { RemoteVolume } from '../../src/host/threads/remote-volume.js';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createRawDisk } from '../lab/records.js';
import { guestMachine, labMissing, testFolder, type WorkloadOptions } from '../lab/vm.js';
import { fail, faultyParts } from '../support/threaded-hosts.js';
import { until } from '../support/volume.js';
import { silent } from '../unit/host/fakes.js';

const DISK_BYTES = 96 << 20;
const WORKLOAD: WorkloadOptions = { mode: 'raw', slots: 8192, rate: 400, dirty: 16 };
const skip = (await labMissing()) ?? false;

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

test('a machine works on when the data thread of its disk dies', { skip }, async (t) => {
  const folder = await testFolder();
  t.after(folder.remove);
  const image = join(folder.path, 'disk.img');
  await createRawDisk(image, DISK_BYTES, WORKLOAD.slots);
  const vm = guestMachine({ name: 'vm1', guest, volume: 'disk', workload: WORKLOAD });
  const machinesDir = join(folder.path, 'vms');
  const nbd = join(folder.path, 'nbd');
  const diskSocket = (volume: string): string => join(nbd, `${volume}.sock`);
  const daemon = await Daemon.start({
    kind: 'host',
    name: 'a',
    stateDir: join(folder.path, 'state'),
    control: join(folder.path, 'c.sock'),
    link: null,
    images: null,
    folders: [nbd, machinesDir],
    machinesDir,
    guestAddresses: (volume) => [`unix:${diskSocket(volume)}`],
    diskSocket,
    migrationAddress: '127.0.0.1',
    stopTimeoutMs: 0,
    volumes: [{ name: 'disk', image, mode: { kind: 'serve', readOnly: false } }],
    vms: [{ definition: vm, autostart: true }],
    toleratesBadVolumes: false,
    parts: {
      ...faultyParts(1),
      hypervisor: new QemuDriver({ runtimeDir: machinesDir, dieWithParent: true }),
    },
    log: silent,
  });
  const monitor = new GuestMonitor();
  t.after(async () => {
    monitor.close();
    await daemon.stop(AbortSignal.abort());
  });
  const { serialPath, pid } = await daemon.machines.view('vm1');
  assert.ok(serialPath !== null && pid !== null);
  await monitor.attach('a', serialPath);
  await monitor.ready();
  await monitor.progress('a', { count: 50, records: 50 });

  const threadNow = (): string => {
    try {
      return (daemon.volumes.service('disk') as RemoteVolume).thread.name;
    } catch {
      return ''; // unavailable at the moment
    }
  };
  for (const how of ['throw', 'exit'] as const) {
    const before = threadNow();
    fail({ image, how });
    await until(() => !['', before].includes(threadNow()), 'another thread');
    await monitor.progress('a', { count: 50, records: 50 });
  }
  const view = await daemon.machines.view('vm1');
  assert.deepEqual([view.state, view.pid, view.error], ['running', pid, null]);
  const verdict = await monitor.finish('a');
  assert.deepEqual(monitor.complaints, []);
  assert.equal(verdict.bad + verdict.errors + verdict.ramErrors, 0, JSON.stringify(verdict));
  assert.deepEqual(await checkRawDisk(image, WORKLOAD.slots), {
    bad: 0,
    badSlots: [],
    digest: verdict.digest,
  });
});
