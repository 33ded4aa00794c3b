/** Host daemons with real volumes, links and control sockets, and machines that only pretend: moves without QEMU. */

import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { daemonParts } from '../../src/cli/parts.js';
import { ControlClient } from '../../src/host/control/client.js';
import { Daemon, type DaemonOptions } from '../../src/host/daemon.js';
import type { DaemonParts } from '../../src/host/parts.js';
import type { MachineDefinition } from '../../src/hypervisor/driver.js';
import { runMove } from '../../src/migration/coordinator.js';
import { Journal } from '../../src/migration/journal.js';
import { makePlan } from '../../src/migration/plan.js';
import type { MoveResult } from '../../src/migration/result.js';
import type { Direction } from '../../src/migration/steps.js';
import { FakeNetwork, FakeParts, silent } from '../unit/host/fakes.js';

export const SIZE = 1 << 20;
const DATA_THREADS = 2;
export const TIMING = { pollMs: 50, runningTimeoutMs: 1000, patienceMs: 1000, retryDelayMs: 5 };
export const VM: MachineDefinition = {
  name: 'vm1',
  binary: 'qemu',
  args: [],
  disks: [{ volume: 'disk', node: 'disk0' }],
  serial: false,
};

export interface RealHost {
  daemon: Daemon;
  client: ControlClient;
  machines: FakeParts['machines'];
  stateDir: string;
  /** Ends the daemon in order and starts it again on what it left. */
  restart(change?: Partial<DaemonOptions>): Promise<RealHost>;
}

export class RealHosts {
  readonly folder = mkdtempSync(join(tmpdir(), 'bfh-'));
  readonly network = new FakeNetwork();
  readonly image = join(this.folder, 'disk.img');
  readonly #running = new Set<Daemon>();
  readonly #clients: ControlClient[] = [];

  constructor(test: TestContext) {
    writeFileSync(this.image, Buffer.alloc(SIZE, 'a'));
    test.after(async () => {
      for (const client of this.#clients) client.close();
      for (const daemon of this.#running) await daemon.stop(AbortSignal.abort()).catch(() => undefined);
      rmSync(this.folder, { recursive: true, force: true });
    });
  }

  guestSocket(host: string, volume = 'disk'): string {
    return join(this.folder, host, `${volume}.nbd`);
  }

  async start(
    name: string,
    change: Partial<DaemonOptions> = {},
    parts: Partial<DaemonParts> = {},
  ): Promise<RealHost> {
    const home = join(this.folder, name);
    mkdirSync(home, { recursive: true });
    const machinesDir = join(home, 'vms');
    const fake = new FakeParts(this.network);
    const stateDir = join(home, 'state');
    const options: DaemonOptions = {
      kind: 'host',
      name,
      stateDir,
      control: join(home, 'c.sock'),
      link: `unix:${join(home, 'link.sock')}`,
      images: join(home, 'images'),
      folders: [],
      machinesDir,
      guestAddresses: (volume) => [`unix:${this.guestSocket(name, volume)}`],
      diskSocket: (volume) => this.guestSocket(name, volume),
      migrationAddress: '::1',
      stopTimeoutMs: 0,
      volumes: [],
      vms: [],
      toleratesBadVolumes: true,
      parts: { ...daemonParts(machinesDir, DATA_THREADS), hypervisor: fake.hypervisor, ...parts },
      log: silent,
      ...change,
    };
    const daemon = await Daemon.start(options);
    this.#running.add(daemon);
    const client = new ControlClient(options.control);
    this.#clients.push(client);
    return {
      daemon,
      client,
      machines: fake.machines,
      stateDir,
      restart: async (again = {}) => {
        await daemon.stop(AbortSignal.abort());
        this.#running.delete(daemon);
        return this.start(name, { ...change, ...again }, parts);
      },
    };
  }

  /** A host with the volume and the machine that runs on it. */
  withMachine(name: string, parts: Partial<DaemonParts> = {}): Promise<RealHost> {
    const change: Partial<DaemonOptions> = {
      volumes: [{ name: 'disk', image: this.image, mode: { kind: 'serve', readOnly: false } }],
      vms: [{ definition: VM, autostart: true }],
    };
    return this.start(name, change, parts);
  }

  async plan(from: ControlClient, to: ControlClient): Promise<Journal> {
    const request = {
      vm: 'vm1',
      switch: 'now',
      bandwidthBytesPerSecond: null,
      deleteSourceImages: false,
    } as const;
    return Journal.create(join(this.folder, 'migrations'), await makePlan(from, to, request));
  }

  async go(
    journal: Journal,
    from: ControlClient,
    to: ControlClient,
    direction: Direction = 'forward',
  ): Promise<MoveResult> {
    return runMove({ from, to, journal, direction, timing: TIMING });
  }

  async move(from: ControlClient, to: ControlClient): Promise<MoveResult> {
    const journal = await this.plan(from, to);
    try {
      return await this.go(journal, from, to);
    } finally {
      journal.close();
    }
  }
}
