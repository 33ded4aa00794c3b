/** Two real hosts, and a real guest that works at the first: it is moved by the command or by a coordinator in this process, and verified. */
import assert from 'node:assert/strict';
import { existsSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import type { HostControl } from '../../src/host/control/api.js';
import { ControlClient } from '../../src/host/control/client.js';
import { migrationsDir } from '../../src/host/state-dir.js';
import { runMove } from '../../src/migration/coordinator.js';
import { Journal } from '../../src/migration/journal.js';
import { DEFAULT_TIMING } from '../../src/migration/perform.js';
import { makePlan, type Switch } from '../../src/migration/plan.js';
import type { MoveResult } from '../../src/migration/result.js';
import type { Guest } from './guest.js';
import { LabHost, runBlockferry } from './hosts.js';
import { GuestMonitor } from './monitor.js';
import { checkRawDisk, createExt4Disk, createRawDisk } from './records.js';
import { guestMachine, testFolder, type WorkloadOptions } from './vm.js';

const DISK_BYTES = 96 << 20;

export class TwoHosts {
  readonly monitor = new GuestMonitor();
  readonly #over = new AbortController();
  a!: LabHost;
  b!: LabHost;

  private constructor(
    readonly folder: string,
    readonly workload: WorkloadOptions,
    readonly guest: Guest,
  ) {}

  static async open(t: TestContext, guest: Guest, workload: WorkloadOptions): Promise<TwoHosts> {
    const folder = await testFolder();
    t.after(folder.remove);
    const lab = new TwoHosts(folder.path, workload, guest);
    const image = lab.image;
    if (workload.mode === 'raw') await createRawDisk(image, DISK_BYTES, workload.slots);
    else await createExt4Disk(image, DISK_BYTES, workload.slots, workload.files);
    await lab.start('a');
    t.after(() => lab.a.stop());
    await lab.start('b');
    t.after(() => lab.b.stop());
    t.after(() => {
      lab.#over.abort();
      lab.monitor.close();
    });
    await lab.a.client.startMachine('vm1');
    await lab.monitor.attach('a', await lab.a.serialPath('vm1', AbortSignal.abort()));
    await lab.monitor.ready();
    await lab.monitor.progress('a', { count: 50, records: 50 });
    return lab;
  }

  /** The disk that the guest began with. */
  get image(): string {
    return join(this.folder, 'disk.img');
  }

  /** Starts a host's daemon, also one that was killed: on what it left, at the same addresses. */
  async start(name: 'a' | 'b'): Promise<void> {
    const vm = guestMachine({ name: 'vm1', guest: this.guest, volume: 'disk', workload: this.workload });
    const volumes = [{ name: 'disk', image: this.image }];
    const more = { link: `unix:${join(this.folder, `${name}.link`)}` };
    this[name] = await LabHost.start({
      folder: this.folder,
      name,
      more,
      ...(name === 'a' ? { volumes, vms: [vm] } : {}),
    });
  }

  async restart(name: 'a' | 'b'): Promise<void> {
    const { daemon, client } = this[name];
    daemon.kill();
    await daemon.exited;
    client.close();
    await this.start(name);
  }

  /** Listens to the guest at a host from the moment there is a process for it. */
  listenAt(name: 'a' | 'b'): Promise<void> {
    return this[name].serialPath('vm1', this.#over.signal).then((path) => this.monitor.attach(name, path));
  }

  /** `blockferry migrate`, as a person types it. */
  async migrate(to: 'a' | 'b' = 'b', ...words: string[]): Promise<MoveResult> {
    const listening = this.listenAt(to);
    const from = to === 'a' ? 'b' : 'a';
    const hosts = ['--from', this[from].control, '--to', this[to].control, '--state-dir', this.folder];
    const { code, stdout, stderr } = await runBlockferry(['migrate', 'vm1', ...hosts, '--json', ...words]);
    assert.equal(code, 0, stderr);
    await listening;
    return JSON.parse(stdout) as MoveResult;
  }

  /** The same move by a coordinator in this process, some of whose calls are replaced. */
  async migrateWith(
    change: (from: HostControl, to: HostControl) => void,
    when: Switch = 'now',
  ): Promise<MoveResult> {
    const [from, to] = [new ControlClient(this.a.control), new ControlClient(this.b.control)];
    const request = {
      vm: 'vm1',
      switch: when,
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
    if ((await host.client.machine('vm1')).state !== 'unmanaged')
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
    await this.expectNothingAtB();
  }

  async expectNothingAtB(): Promise<void> {
    await this.monitor.progress('a', { count: 30, records: 30 });
    const status = await this.b.client.status();
    assert.deepEqual([status.volumes, status.vms], [[], []]);
    const images = join(this.b.folder, 'images');
    assert.deepEqual(existsSync(images) ? readdirSync(images) : [], []);
    const disk = await this.a.client.volume('disk');
    assert.ok(disk.phase === 'plain' && disk.tracking === null);
  }
}
