/**
 * The destination's daemon is killed while the machine is about to run there, and while it runs on a disk that is still on its way. QEMU
 * lives on and waits for its disk; the daemon that is started again serves it, knows by the guest's writes that it runs, and the
 * move is completed.
 */

import assert from 'node:assert/strict';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { buildGuest, type Guest } from '../lab/guest.js';
import { LabHost, runBlockferry } from '../lab/hosts.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createRawDisk } from '../lab/records.js';
import { guestMachine, labMissing, testFolder, type WorkloadOptions } from '../lab/vm.js';

const DISK_BYTES = 96 << 20;
const WORKLOAD: WorkloadOptions = { mode: 'raw', slots: 8192, rate: 400, dirty: 16 };
const skip = (await labMissing()) ?? false;

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

for (const step of ['continue', 'wait-handoff']) {
  test(`a destination daemon that is killed at ${step} serves the machine again, which has moved`, {
    skip,
  }, async (t) => {
    const folder = await testFolder();
    t.after(folder.remove);
    const image = join(folder.path, 'disk.img');
    await createRawDisk(image, DISK_BYTES, WORKLOAD.slots);
    const vm = guestMachine({ name: 'vm1', guest, volume: 'disk', workload: WORKLOAD });
    const volumes = [{ name: 'disk', image }];
    const a = await LabHost.start({ folder: folder.path, name: 'a', volumes, vms: [vm] });
    t.after(() => a.stop());
    let b = await LabHost.start({ folder: folder.path, name: 'b' });
    t.after(() => b.stop());
    const over = new AbortController();
    const monitor = new GuestMonitor();
    t.after(() => {
      over.abort();
      monitor.close();
    });
    await a.client.startMachine('vm1');
    await monitor.attach('a', await a.serialPath('vm1', AbortSignal.abort()));
    await monitor.ready();
    await monitor.progress('a', { count: 50, records: 50 });
    const listening = b.serialPath('vm1', over.signal).then((path) => monitor.attach('b', path));

    let restarted: Promise<void> | null = null;
    let pid = 0;
    const kill = async (): Promise<void> => {
      b.daemon.kill();
      await b.daemon.exited;
      b.client.close();
      b = await LabHost.start({ folder: folder.path, name: 'b' });
    };
    const moved = await runBlockferry(
      ['migrate', 'vm1', '--from', a.control, '--to', b.control, '--state-dir', folder.path, '--json'],
      {
        onLine: (line) => {
          if (line.startsWith('seal')) void b.client.machine('vm1').then((view) => (pid = view.pid ?? 0));
          if (line.startsWith(step)) restarted ??= kill();
        },
      },
    );
    t.after(() => {
      try {
        if (pid > 0) process.kill(pid, 'SIGKILL');
      } catch (error) {
        // The guest has powered off, and its process may be gone.
        if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
      }
    });
    assert.equal(moved.code, 0, moved.stderr);
    assert.ok(restarted !== null && pid > 0);
    await restarted;
    await listening;
    await monitor.progress('b', { count: 30, records: 30 });
    assert.equal((await b.client.machine('vm1')).state, 'unmanaged');
    assert.equal((await b.client.volume('disk')).phase, 'plain');
    const verdict = await monitor.finish('b');
    assert.deepEqual(monitor.complaints, []);
    assert.equal(verdict.bad + verdict.errors + verdict.ramErrors, 0, JSON.stringify(verdict));
    assert.deepEqual(await checkRawDisk(await b.imageOf('disk'), WORKLOAD.slots), {
      bad: 0,
      badSlots: [],
      digest: verdict.digest,
    });
  });
}
