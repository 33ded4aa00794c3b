/** The lab itself: a guest moves between two QEMUs over one shared disk, with nothing of blockferry's data path in between. */

import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { before, test } from 'node:test';
import type { Machine } from '../../src/hypervisor/driver.js';
import type { SupervisedProcess } from '../../src/hypervisor/process.js';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createExt4Disk, createRawDisk } from '../lab/records.js';
import { guestMachine, labMissing, startServer, testFolder, type WorkloadOptions } from '../lab/vm.js';

const MIB = 1024 * 1024;
const DISK_BYTES = 64 * MIB;
const STEP_TIMEOUT_MS = 60_000;
const skip = (await labMissing()) ?? false;

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

class Lab {
  readonly monitor = new GuestMonitor();
  readonly events: string[] = [];
  readonly #cleanUp: (() => Promise<unknown>)[] = [];
  #driver!: QemuDriver;
  image!: string;
  #socket!: string;
  #workload!: WorkloadOptions;

  async open(workload: WorkloadOptions): Promise<void> {
    const folder = await testFolder();
    this.#cleanUp.push(folder.remove);
    this.#workload = workload;
    this.image = join(folder.path, 'disk.img');
    this.#socket = join(folder.path, 'nbd.sock');
    this.#driver = new QemuDriver({ runtimeDir: join(folder.path, 'run'), dieWithParent: true });
    mkdirSync(join(folder.path, 'run'));
    if (workload.mode === 'raw') await createRawDisk(this.image, DISK_BYTES, workload.slots);
    else await createExt4Disk(this.image, DISK_BYTES, workload.slots, workload.files);
    const args = ['-t', '-e', '4', '-f', 'raw', '-k', this.#socket, this.image];
    const server: SupervisedProcess = await startServer('qemu-nbd', args, this.#socket);
    this.#cleanUp.push(() => server.terminate());
  }

  async start(host: string, incoming: boolean): Promise<Machine> {
    const definition = guestMachine({ name: 'vm1', guest, volume: 'disk', workload: this.#workload });
    const machine = await this.#driver.start(definition, {
      disks: { disk: { socketPath: this.#socket } },
      incoming,
    });
    this.#cleanUp.push(() => machine.kill());
    machine.onEvent((event) =>
      this.events.push(`${host} ${event.kind === 'migration' ? event.status : event.kind}`),
    );
    await this.monitor.attach(host, machine.serialPath!);
    return machine;
  }

  async close(): Promise<void> {
    this.monitor.close();
    for (const step of this.#cleanUp.reverse()) await step();
  }
}

/** The verdict of the guest on `host`, its end, and then what the image says. */
async function verify(lab: Lab, host: string, machine: Machine, workload: WorkloadOptions): Promise<void> {
  const verdict = await lab.monitor.finish(host);
  assert.deepEqual(lab.monitor.complaints, []);
  assert.equal(lab.monitor.broken, null);
  assert.equal(verdict.bad + verdict.errors + verdict.ramErrors, 0, JSON.stringify(verdict));
  assert.equal(verdict.slots, workload.slots);
  assert.ok(verdict.records > 0 && verdict.checked > 0);
  assert.equal((await machine.exited).code, 0);
  if (workload.mode === 'raw') {
    assert.deepEqual(await checkRawDisk(lab.image, workload.slots), {
      bad: 0,
      badSlots: [],
      digest: verdict.digest,
    });
  } else {
    execFileSync('/sbin/e2fsck', ['-fn', lab.image], { stdio: 'pipe' });
  }
}

async function move(lab: Lab, source: Machine, destination: Machine, uri = 'tcp:127.0.0.1:0'): Promise<void> {
  await source.migrate(await destination.incoming(uri));
  await source.waitPreSwitchover(STEP_TIMEOUT_MS);
  assert.equal((await source.status()).state, 'paused');
  await source.continueSwitchover();
  await destination.waitResumed(STEP_TIMEOUT_MS);
  await source.waitCompleted(STEP_TIMEOUT_MS);
  const info = await source.queryMigrate();
  assert.equal(info.status, 'completed');
  assert.ok(info.downtimeMs !== undefined && info.ramTransferredBytes! > MIB, JSON.stringify(info));
  assert.equal((await source.status()).state, 'migrated');
  await source.stop();
  await lab.monitor.progress('b', { count: 50, records: 50 });
}

for (const workload of [
  { mode: 'raw', slots: 8192, rate: 300, dirty: 16 },
  { mode: 'ext4', slots: 4096, files: 3, rate: 300, dirty: 16 },
] satisfies WorkloadOptions[]) {
  test(`a live migration over a shared disk leaves every record right (${workload.mode})`, {
    skip,
  }, async (t) => {
    const lab = new Lab();
    t.after(() => lab.close());
    await lab.open(workload);
    const source = await lab.start('a', false);
    await lab.monitor.ready();
    await lab.monitor.progress('a', { count: 50, records: 50 });
    const destination = await lab.start('b', true);
    assert.equal((await destination.status()).state, 'incoming');
    await move(lab, source, destination);

    const order = ['a stopped', 'a pre-switchover', 'b resumed'].map((event) => lab.events.indexOf(event));
    assert.deepEqual(
      [...order].sort((x, y) => x - y),
      order,
      lab.events.join(', '),
    );
    assert.ok(!order.includes(-1), lab.events.join(', '));
    await verify(lab, 'b', destination, workload);
    t.diagnostic(`longest heartbeat gap ${lab.monitor.longestGapMs().toFixed(0)} ms`);
  });
}

test('a migration cancelled in pre-switchover leaves the guest at the source, and a second one moves it', {
  skip,
}, async (t) => {
  const workload: WorkloadOptions = { mode: 'raw', slots: 4096, rate: 300 };
  const lab = new Lab();
  t.after(() => lab.close());
  await lab.open(workload);
  const source = await lab.start('a', false);
  await lab.monitor.ready();
  const first = await lab.start('b', true);
  await source.migrate(await first.incoming('tcp:127.0.0.1:0'));
  await source.waitPreSwitchover(STEP_TIMEOUT_MS);
  await source.cancelMigration();
  assert.equal((await source.status()).state, 'running');
  await lab.monitor.progress('a', { count: 20, records: 20 });
  await first.kill();

  const second = await lab.start('b', true);
  await move(lab, source, second, `unix:${join(dirname(lab.image), 'ram.sock')}`);
  await verify(lab, 'b', second, workload);
});

test('a destination that dies during a migration leaves the guest at the source', { skip }, async (t) => {
  const workload: WorkloadOptions = { mode: 'raw', slots: 4096, rate: 300 };
  const lab = new Lab();
  t.after(() => lab.close());
  await lab.open(workload);
  const source = await lab.start('a', false);
  await lab.monitor.ready();
  const destination = await lab.start('b', true);
  // Slow enough that it cannot be over before the kill.
  await source.migrate(await destination.incoming('tcp:127.0.0.1:0'), { bandwidthBytesPerSecond: MIB });
  const failed = assert.rejects(source.waitPreSwitchover(STEP_TIMEOUT_MS), { code: 'hypervisor' });
  await destination.kill();
  await failed;
  assert.equal((await source.status()).state, 'running');
  await lab.monitor.progress('a', { count: 20, records: 20 });
  await verify(lab, 'a', source, workload);
});
