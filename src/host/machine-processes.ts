/**
 * The processes of a daemon's machines: how one is started, and whether its guest runs, or ran, here.
 *
 * Invariants
 * - `ran` is said of a machine that arrived only after its volumes are settled: from then on no takeover can be taken back.
 * - Processes do not outlive the daemon's knowledge of them unseen: one that an earlier daemon left is shown as `unmanaged`, and its
 *   machine is not started a second time.
 * - After every wait this file looks again at the entries and records, which another request may have changed (machines.ts).
 */

import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { Hypervisor, Machine, StartOptions } from '../hypervisor/driver.js';
import { describeExit, type MachineEntry } from './machine-entry.js';
import type { DaemonRecord } from './record.js';
import type { Volumes } from './volumes.js';

export interface ProcessOptions {
  volumes: Volumes;
  hypervisor: Hypervisor;
  /** Where a volume's guest face is served. */
  diskSocket: (volume: string) => string;
  /** Whether a process of an earlier daemon still runs the machine. */
  hasLeftover: (machine: string) => Promise<boolean>;
  record: DaemonRecord;
  log: Logger;
}

export class MachineProcesses {
  /** Machines whose process is on its way, by name. */
  private readonly starting = new Set<string>();

  constructor(
    private readonly options: ProcessOptions,
    private readonly entries: ReadonlyMap<string, MachineEntry>,
  ) {}

  /** Starts one; `incoming`: one that waits for a migration. */
  async launch(entry: MachineEntry, incoming: boolean): Promise<Machine> {
    const { hypervisor, diskSocket, log } = this.options;
    const { definition } = entry;
    const disks: Record<string, StartOptions['disks'][string]> = {};
    for (const { volume } of definition.disks) {
      disks[volume] = { socketPath: diskSocket(volume), exportName: volume };
    }
    entry.error = null;
    entry.ran = false;
    entry.sent = false;
    let machine: Machine;
    this.starting.add(definition.name);
    try {
      machine = await hypervisor.start(definition, { disks, incoming });
    } catch (error) {
      entry.error = messageOf(error);
      throw error;
    } finally {
      this.starting.delete(definition.name);
    }
    entry.machine = machine;
    log.info({ vm: definition.name, pid: machine.pid, incoming }, 'machine started');
    machine.onEvent((event) => {
      if (event.kind === 'resumed' && entry.incomingUri !== null) {
        this.settle(definition.name, entry).catch((error: unknown) =>
          log.warn({ vm: definition.name, err: error }, 'the machine runs on volumes that did not take over'),
        );
      }
      if (event.kind === 'io-error') {
        entry.error = `I/O error on ${event.node} (${event.operation}): ${event.reason}`;
        log.error({ vm: definition.name, ...event }, 'guest I/O error');
      }
    });
    void machine.exited.then((exit) => {
      entry.machine = null;
      entry.error = describeExit(exit) ?? entry.error;
      log.info({ vm: definition.name, code: exit.code, signal: exit.signal }, 'machine ended');
    });
    return machine;
  }

  /** The guest runs here. Where its volumes were retreated from in the same moment, it counts as never having run. */
  async settle(name: string, entry: MachineEntry): Promise<void> {
    if (entry.ran) return;
    await Promise.all(
      entry.definition.disks.map(({ volume }) => this.options.volumes.service(volume).settle()),
    );
    if (entry.ran || this.entries.get(name) !== entry) return;
    entry.ran = true;
    const { moveId, definition } = entry;
    await this.options.record.setMachine(name, { state: 'arrived', moveId: moveId ?? '', definition });
  }

  /**
   * Whether the guest ran here though this daemon did not see it: it writes to disks that are served again, or an earlier daemon ended
   * before it could note its first write. Only a guest that runs settles a volume.
   */
  async ranUnseen(name: string, entry: MachineEntry): Promise<boolean> {
    const { record, volumes, log } = this.options;
    if (entry.ran || entry.machine) return entry.ran;
    const noted = record.machine(name);
    if (noted?.state !== 'incoming' || noted.moveId !== entry.moveId) return false;
    const settled = await Promise.all(entry.definition.disks.map(({ volume }) => volumes.settled(volume)));
    // While they were asked, the machine may have been discarded, started, or seen to run.
    if (!settled.includes(true) || this.entries.get(name) !== entry || record.machine(name) !== noted)
      return entry.ran;
    entry.ran = true;
    await record
      .setMachine(name, { ...noted, state: 'arrived' })
      .catch((error: unknown) => log.error({ vm: name, err: error }, 'its arrival is not noted'));
    return true;
  }

  async refuseUnmanaged(name: string): Promise<void> {
    if (!(await this.isUnmanaged(name))) return;
    throw new BlockferryError(
      'exists',
      `a process of an earlier daemon still runs machine "${name}": end it first, this daemon does not take it over`,
    );
  }

  /** A process of an earlier daemon runs it. */
  async isUnmanaged(name: string): Promise<boolean> {
    // A process that is starting is ours, and asking it would fill the short queue in front of its control socket.
    if (this.entries.get(name)?.machine || this.starting.has(name)) return false;
    return this.options.hasLeftover(name);
  }
}
