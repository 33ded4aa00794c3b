/** Real machines move with their disks between two real daemons, by the commands and with failures at the worst moments. */

import assert from 'node:assert/strict';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { before, type TestContext, test } from 'node:test';
import { BlockferryError } from '../../src/errors.js';
import type { HostControl } from '../../src/host/control/api.js';
import { ControlClient } from '../../src/host/control/client.js';
import { migrationsDir } from '../../src/host/state-dir.js';
import { runMove } from '../../src/migration/coordinator.js';
import { Journal } from '../../src/migration/journal.js';
import { DEFAULT_TIMING } from '../../src/migration/perform.js';
import { makePlan } from '../../src/migration/plan.js';
import type { MoveResult } from '../../src/migration/result.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { LabHost, runBlockferry } from '../lab/hosts.js';
import { GuestMonitor } from '../lab/monitor.js';
import { checkRawDisk, createExt4Disk, createRawDisk } from '../lab/records.js';
import { guestMachine, labMissing, testFolder, type WorkloadOptions } from '../lab/vm.js';

const MIB = 1 << 20;
const DISK_BYTES = 96 * MIB;
const SLOTS = 8192;
const skip = (await labMissing()) ?? false;

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

/** Two hosts, and a guest that works at the first. */
class Lab {
  readonly monitor = new GuestMonitor();
  readonly #over = new AbortController();

  private constructor(
    readonly folder: string,
    readonly a: LabHost,
    readonly b: LabHost,
    readonly workload: WorkloadOptions,
  ) {}

  static async open(t: TestContext, workload: WorkloadOptions): Promise<Lab> {
    const folder = await testFolder();
    t.after(folder.remove);
    const image = join(folder.path, 'disk.img');
    if (workload.mode === 'raw') await createRawDisk(image, DISK_BYTES, workload.slots);
    else await createExt4Disk(image, DISK_BYTES, workload.slots, workload.files);
    const vm = guestMachine({ name: 'vm1', guest, volume: 'disk', workload });
    const volumes = [{ name: 'disk', image }];
    const a = await LabHost.start({ folder: folder.path, name: 'a', volumes, vms: [vm] });
    t.after(() => a.stop());
    const b = await LabHost.start({ folder: folder.path, name: 'b' });
    t.after(() => b.stop());
    const lab = new Lab(folder.path, a, b, workload);
    t.after(() => {
      lab.#over.abort();
      lab.monitor.close();
    });
    await a.client.startMachine('vm1');
    await lab.monitor.attach('a', await a.serialPath('vm1', AbortSignal.abort()));
    await lab.monitor.ready();
    await lab.monitor.progress('a', { count: 50, records: 50 });
    return lab;
  }

  /** Listens to the guest at B from the moment there is a process for it. */
  listenAtB(): Promise<void> {
    return this.b.serialPath('vm1', this.#over.signal).then((path) => this.monitor.attach('b', path));
  }

  /** `blockferry migrate`, as a person types it. */
  async migrate(): Promise<MoveResult> {
    const listening = this.listenAtB();
    const words = [
      'migrate',
      'vm1',
      '--from',
      this.a.control,
      '--to',
      this.b.control,
      '--state-dir',
      this.folder,
      '--json',
    ];
    const { code, stdout, stderr } = await runBlockferry(words);
    assert.equal(code, 0, stderr);
    await listening;
    return JSON.parse(stdout) as MoveResult;
  }

  /** The same move by a coordinator in this process, one of whose calls is replaced. */
  async migrateWith(change: (from: HostControl, to: HostControl) => void): Promise<MoveResult> {
    const [from, to] = [new ControlClient(this.a.control), new ControlClient(this.b.control)];
    const request = {
      vm: 'vm1',
      switch: 'now',
      bandwidthBytesPerSecond: null,
      deleteSourceImages: false,
    } as const;
    const journal = Journal.create(migrationsDir(this.folder), await makePlan(from, to, request));
    change(from, to);
    try {
      return await runMove({
        from,
        to,
        journal,
        direction: 'forward',
        timing: { ...DEFAULT_TIMING, patienceMs: 2000 },
      });
    } finally {
      journal.close();
      from.close();
      to.close();
    }
  }

  /** The guest's verdict at its end on `host`, and that of the image there. */
  async verify(host: LabHost): Promise<void> {
    const image = await host.imageOf('disk');
    const verdict = await this.monitor.finish(host.name);
    assert.deepEqual(this.monitor.complaints, []);
    assert.equal(verdict.bad + verdict.errors + verdict.ramErrors, 0, JSON.stringify(verdict));
    assert.ok(verdict.records > 0 && verdict.checked > 0);
    await host.client.stopMachine('vm1', { mode: 'quit' });
    if (this.workload.mode !== 'raw') return;
    assert.deepEqual(await checkRawDisk(image, this.workload.slots), {
      bad: 0,
      badSlots: [],
      digest: verdict.digest,
    });
  }

  /** The move left nothing at B, and the guest works on at A. */
  async expectBackAtA(result: MoveResult): Promise<void> {
    assert.equal(result.outcome, 'aborted');
    await this.monitor.progress('a', { count: 30, records: 30 });
    const status = await this.b.client.status();
    assert.deepEqual([status.volumes, status.vms], [[], []]);
    const images = join(this.b.folder, 'images');
    assert.deepEqual(existsSync(images) ? readdirSync(images) : [], []);
    const disk = await this.a.client.volume('disk');
    assert.equal(disk.phase, 'plain');
  }
}

const RAW: WorkloadOptions = { mode: 'raw', slots: SLOTS, rate: 400, dirty: 16 };

for (const workload of [RAW, { ...RAW, mode: 'ext4', files: 3 }] satisfies WorkloadOptions[]) {
  test(`blockferry migrate moves a working machine with its disk (${workload.mode})`, { skip }, async (t) => {
    const lab = await Lab.open(t, workload);
    const result = await lab.migrate();
    assert.equal(result.outcome, 'moved');
    assert.ok(result.demandBytes + result.backgroundBytes > 0);
    assert.ok(result.downtimeMs !== null && result.handoffMs !== null);
    await lab.monitor.progress('b', { count: 30, records: 30 });

    const there = await lab.b.client.volume('disk');
    assert.equal(there.phase, 'plain');
    assert.ok(
      there.phase === 'plain' &&
        there.source === null &&
        there.presentBytes === there.size &&
        there.handoffAt !== null,
    );
    const here = await lab.a.client.volume('disk');
    assert.ok(here.phase === 'retired' || here.phase === 'unavailable', here.phase);
    assert.equal(await lab.a.stop(), 0, 'the source daemon can be stopped');
    await lab.monitor.progress('b', { count: 30, records: 30 });
    await lab.verify(lab.b);
    t.diagnostic(`longest heartbeat gap ${lab.monitor.longestGapMs().toFixed(0)} ms`);
  });
}

test('a move that fails in pre-switchover leaves the machine at the source, and the next one succeeds', {
  skip,
}, async (t) => {
  const lab = await Lab.open(t, RAW);
  const refused = await lab.migrateWith((from) => {
    from.seal = () => Promise.reject(new BlockferryError('image-io', 'the seal fails'));
  });
  await lab.expectBackAtA(refused);
  assert.equal((await lab.migrate()).outcome, 'moved');
  await lab.monitor.progress('b', { count: 30, records: 30 });
  await lab.verify(lab.b);
});

test('sealed for a takeover that fails: the source refuses writes, and is unsealed only with proof', {
  skip,
}, async (t) => {
  const lab = await Lab.open(t, RAW);
  let refusal: unknown;
  const result = await lab.migrateWith((_from, to) => {
    to.takeover = async () => {
      const socket = join(lab.a.folder, 'run', 'nbd', 'disk.sock');
      const client = await NbdClient.connect(`nbd+unix:///?socket=${socket}`);
      refusal = await client.write(0, Buffer.alloc(4096), 0, 4096).catch((error: unknown) => error);
      await client.close();
      throw new BlockferryError('image-io', 'the takeover fails');
    };
  });
  assert.ok(refusal instanceof BlockferryError, 'the sealed source took a write');
  await lab.expectBackAtA(result);
  await lab.verify(lab.a);
});

test('a takeover is taken back while the guest has not run at the destination', { skip }, async (t) => {
  const lab = await Lab.open(t, RAW);
  const result = await lab.migrateWith((from) => {
    from.migrateContinue = () => Promise.reject(new BlockferryError('hypervisor', 'it does not go on'));
  });
  await lab.expectBackAtA(result);
  assert.equal((await lab.migrate()).outcome, 'moved');
  await lab.monitor.progress('b', { count: 30, records: 30 });
  await lab.verify(lab.b);
});

test('a destination daemon that dies while the memory is on its way: the machine works on, and all is undone later', {
  skip,
}, async (t) => {
  const lab = await Lab.open(t, RAW);
  const killed = lab.migrateWith((from) => {
    const wait = from.waitMigration.bind(from);
    from.waitMigration = async (...words) => {
      lab.b.daemon.kill();
      await lab.b.daemon.exited;
      return wait(...words);
    };
  });
  await assert.rejects(killed, { code: 'migration' });
  await lab.monitor.progress('a', { count: 30, records: 30 });
  assert.equal((await lab.a.client.volume('disk')).phase, 'plain');

  const b = await LabHost.start({ folder: lab.folder, name: 'b' });
  t.after(() => b.stop());
  const { code, stderr } = await runBlockferry(['migrate', 'vm1', '--abort', '--state-dir', lab.folder]);
  assert.equal(code, 0, stderr);
  const status = await b.client.status();
  assert.deepEqual([status.volumes, status.vms], [[], []]);
  await lab.verify(lab.a);
});
