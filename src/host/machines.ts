/**
 * The machines of one daemon: started, sent, received, stopped.
 *
 * Invariants
 * - A machine is started only while every volume of its disks is served here and writable, and no other machine has one of them.
 * - A process that waits for a migration is started only on standby volumes; it is ended by `discard` only while it cannot have
 *   written, that is, until its volumes have taken over.
 * - A guest runs on at the source (`revive`) only on volumes that accept its writes.
 * - A machine that departed is recorded so before its process ends.
 * - What was seen of a volume may be old when it is acted on (volumes.ts says why that is safe). After every such wait the entries and
 *   records are looked at again, which another request may have changed; `settle` of machine-processes.ts and the checks of
 *   machine-disks.ts do so in one step behind the last answer.
 */

import { BlockferryError } from '../errors.js';
import type { Machine, MachineDefinition, MigrationInfo } from '../hypervisor/driver.js';
import type { MachineState, MachineView } from './control/api.js';
import { MachineDisks } from './machine-disks.js';
import { end, type MachineEntry, newEntry, tcpHost, watchMachine } from './machine-entry.js';
import { MachineProcesses, type ProcessOptions } from './machine-processes.js';
import { delay, KeyedQueue } from './waiting.js';

const MACHINES_MAX = 1024;
/** How often a volume is looked at that a process of an earlier daemon may settle. */
const UNSEEN_POLL_MS = 100;
/** Migration statuses in which RAM is under way or the switch is. */
const UNDER_WAY = new Set([
  'setup',
  'active',
  'pre-switchover',
  'device',
  'cancelling',
  'postcopy-active',
  'wait-unplug',
]);

export interface MachinesOptions extends ProcessOptions {
  /** Host or IP at which an incoming process listens. */
  migrationAddress: string;
}

export class Machines {
  private readonly entries = new Map<string, MachineEntry>();
  private readonly queue = new KeyedQueue();
  private readonly disks: MachineDisks;
  private readonly processes: MachineProcesses;

  constructor(private readonly options: MachinesOptions) {
    this.processes = new MachineProcesses(options, this.entries);
    this.disks = new MachineDisks(options.volumes, this.entries, this.processes);
  }

  /** Makes a machine known. What was recorded of an earlier move of it counts more than its configuration. */
  define(definition: MachineDefinition): void {
    const entry = newEntry(definition);
    entry.departed = this.options.record.machine(definition.name)?.state === 'departed';
    this.entries.set(definition.name, entry);
  }

  /** Machines that came here by a move, before this daemon was started. */
  restore(): void {
    for (const [name, record] of this.options.record.machines()) {
      const entry = newEntry(record.definition);
      entry.departed = record.state === 'departed';
      if (record.state === 'incoming') entry.moveId = record.moveId;
      entry.ran = record.state === 'arrived';
      if (record.state !== 'departed' || !this.entries.has(name)) this.entries.set(name, entry);
    }
  }

  async view(name: string): Promise<MachineView> {
    const entry = this.entry(name);
    await this.processes.ranUnseen(name, entry);
    const { machine } = entry;
    const status = machine ? await machine.status().catch(() => null) : null;
    const gone: MachineState = entry.departed
      ? 'departed'
      : (await this.processes.isUnmanaged(name))
        ? 'unmanaged'
        : 'stopped';
    return {
      name,
      state: machine ? (status?.state ?? 'failed') : gone,
      detail: status?.detail ?? null,
      pid: machine?.pid ?? null,
      serialPath: machine?.serialPath ?? null,
      ran: entry.ran,
      moveId: entry.moveId,
      incomingUri: entry.incomingUri,
      migration: machine && entry.sent ? await machine.queryMigrate().catch(() => null) : null,
      definition: entry.definition,
      error: entry.error,
    };
  }

  views(): Promise<MachineView[]> {
    return Promise.all([...this.entries.keys()].sort().map((name) => this.view(name)));
  }

  start(name: string): Promise<MachineView> {
    return this.queue.run(name, async () => {
      const entry = this.entry(name);
      if (entry.machine)
        throw new BlockferryError('exists', `machine "${name}" has a process already (${entry.machine.pid})`);
      if (entry.departed) throw new BlockferryError('phase', `machine "${name}" moved away from this host`);
      await this.processes.ranUnseen(name, entry);
      if (this.options.record.machine(name)?.state === 'incoming') {
        throw new BlockferryError(
          'phase',
          `machine "${name}" is on its way here by ${entry.moveId} and may still run at its source: continue that with --resume or end it with --abort`,
        );
      }
      await this.processes.refuseUnmanaged(name);
      await this.disks.reserve(entry.definition, ['plain', 'relocating'], 'start', () =>
        this.processes.launch(entry, false),
      );
      entry.ran = true;
      return this.view(name);
    });
  }

  /** Ends a machine's process; with 'powerdown' the guest is asked first and has `timeoutMs`. */
  async stop(name: string, mode: 'powerdown' | 'quit', timeoutMs: number): Promise<MachineView> {
    await this.queue.run(name, async () => {
      const { machine } = this.entry(name);
      if (machine) await end(machine, mode === 'powerdown' ? timeoutMs : 0);
    });
    return this.view(name);
  }

  /** Source: from now on only this move may send the machine, and its volumes stay the ones the move means. Repeatable. */
  async claim(name: string, moveId: string): Promise<void> {
    const entry = this.entry(name);
    if (entry.moveId !== null && entry.moveId !== moveId) {
      throw new BlockferryError(
        'exists',
        `machine "${name}" is being moved by ${entry.moveId}: continue that with --resume or end it with --abort`,
      );
    }
    if (!entry.machine) throw new BlockferryError('phase', `machine "${name}" does not run here`);
    entry.moveId = moveId;
    const { volumes } = this.options;
    await Promise.all(entry.definition.disks.map(({ volume }) => volumes.service(volume).remember()));
  }

  /** The move is over here. A guest that stands still in the middle of it would be forgotten: refused. */
  async release(name: string, moveId: string): Promise<void> {
    const entry = this.entries.get(name);
    if (entry?.moveId !== moveId) return;
    const { machine, sent } = entry;
    if (machine && sent && UNDER_WAY.has((await machine.queryMigrate()).status)) {
      throw new BlockferryError(
        'phase',
        `machine "${name}" is still on its way: revive it, or let it arrive`,
      );
    }
    entry.moveId = null;
  }

  /** Destination: starts a process that waits for the source's. Repeated for the same move it answers with the one there is. */
  incoming(name: string, moveId: string, definition: MachineDefinition): Promise<{ uri: string }> {
    return this.queue.run(name, async () => {
      if (definition.name !== name)
        throw new BlockferryError('usage', `the definition is of "${definition.name}", not "${name}"`);
      const present = this.entries.get(name);
      if (present?.moveId === moveId && present.machine && present.incomingUri !== null)
        return { uri: present.incomingUri };
      if (present && !present.departed && present.moveId !== moveId) {
        throw new BlockferryError(
          'exists',
          `there is a machine "${name}" here already: remove it from the configuration first`,
        );
      }
      if (!present && this.entries.size >= MACHINES_MAX) {
        throw new BlockferryError('no-space', `this daemon has ${MACHINES_MAX} machines and takes no more`);
      }
      await this.processes.refuseUnmanaged(name);
      const entry = newEntry(definition);
      entry.moveId = moveId;
      entry.before = present?.before ?? { record: this.options.record.machine(name), entry: present };
      return this.disks.reserve(definition, ['standby'], 'receive', () => this.receive(name, moveId, entry));
    });
  }

  private async receive(name: string, moveId: string, entry: MachineEntry): Promise<{ uri: string }> {
    const { definition } = entry;
    await this.options.record.setMachine(name, { state: 'incoming', moveId, definition });
    this.entries.set(name, entry);
    try {
      const machine = await this.processes.launch(entry, true);
      entry.incomingUri = await machine.incoming(`tcp:${tcpHost(this.options.migrationAddress)}:0`);
      return { uri: entry.incomingUri };
    } catch (error) {
      await this.forget(name, entry);
      throw error;
    }
  }

  async migrate(
    name: string,
    moveId: string,
    uri: string,
    bandwidthBytesPerSecond: number | null,
  ): Promise<void> {
    await this.queue.run(name, async () => {
      const { entry, machine } = this.claimed(name, moveId);
      if (entry.sent && UNDER_WAY.has((await machine.queryMigrate()).status)) return;
      await machine.migrate(uri, bandwidthBytesPerSecond === null ? {} : { bandwidthBytesPerSecond });
      entry.sent = true;
    });
  }

  /** What the migration is at when its status is among `statuses`, the process ends, or the time is over. */
  async waitMigration(
    name: string,
    statuses: readonly string[],
    timeoutMs: number,
    signal: AbortSignal,
  ): Promise<MigrationInfo> {
    const { machine } = this.running(name);
    return watchMachine(machine, timeoutMs, signal, async () => {
      const info = await machine.queryMigrate();
      return { done: statuses.includes(info.status), value: info };
    });
  }

  async migrateContinue(name: string, moveId: string): Promise<void> {
    const { machine } = this.claimed(name, moveId);
    const { status } = await machine.queryMigrate();
    // Repeated after an answer that was lost: it went on already.
    if (status === 'device' || status === 'completed') return;
    await machine.continueSwitchover();
  }

  /** Source: ends a migration that is under way and lets the guest run. Repeatable. */
  async revive(name: string, moveId: string): Promise<void> {
    await this.queue.run(name, async () => {
      const { entry, machine } = this.claimed(name, moveId);
      await this.disks.check(entry.definition, ['plain', 'relocating'], 'run on');
      if (entry.sent && UNDER_WAY.has((await machine.queryMigrate()).status)) await machine.cancelMigration();
      const { state } = await machine.status();
      if (state !== 'running') await machine.resume();
    });
  }

  /** Destination: true once the guest ran here. */
  async waitRunning(name: string, timeoutMs: number, signal: AbortSignal): Promise<boolean> {
    if (await this.processes.isUnmanaged(name)) return this.waitRanUnseen(name, timeoutMs, signal);
    const { entry, machine } = this.running(name);
    return watchMachine(machine, timeoutMs, signal, async () => {
      if (!entry.ran && (await machine.status()).state === 'running')
        await this.processes.settle(name, entry);
      return { done: entry.ran || entry.machine !== machine, value: entry.ran };
    });
  }

  private async waitRanUnseen(name: string, timeoutMs: number, signal: AbortSignal): Promise<boolean> {
    const entry = this.entry(name);
    for (const deadline = performance.now() + timeoutMs; ; ) {
      if (await this.processes.ranUnseen(name, entry)) return true;
      const leftMs = deadline - performance.now();
      if (leftMs <= 0 || signal.aborted) return false;
      await delay(Math.min(leftMs, UNSEEN_POLL_MS), signal).catch(() => undefined);
    }
  }

  /** Source: the guest runs elsewhere, its process here ends. Repeatable. */
  depart(name: string, moveId: string): Promise<void> {
    return this.queue.run(name, async () => {
      const entry = this.entry(name);
      if (entry.departed && !entry.machine) return;
      if (entry.moveId !== null && entry.moveId !== moveId) {
        throw new BlockferryError(
          'exists',
          `machine "${name}" is being moved by ${entry.moveId}, not by ${moveId}`,
        );
      }
      await this.disks.check(entry.definition, ['sealed', 'retired', 'absent'], 'leave');
      await this.options.record.setMachine(name, { state: 'departed', moveId, definition: entry.definition });
      entry.departed = true;
      await entry.machine?.stop();
    });
  }

  /** Destination: ends a process that must not have written, and forgets the machine. Repeatable. */
  discard(name: string, moveId: string): Promise<void> {
    return this.queue.run(name, async () => {
      const entry = this.entries.get(name);
      if (!entry || (entry.departed && !entry.machine)) return;
      if (entry.moveId !== moveId) {
        throw new BlockferryError('exists', `machine "${name}" here did not come with move ${moveId}`);
      }
      await this.processes.refuseUnmanaged(name);
      await this.disks.check(entry.definition, ['standby', 'absent', 'unavailable'], 'be discarded');
      await this.forget(name, entry);
    });
  }

  names(): string[] {
    return [...this.entries.keys()];
  }

  /** Machines that have a process of ours. */
  active(): string[] {
    return [...this.entries].filter(([, entry]) => entry.machine !== null).map(([name]) => name);
  }

  private entry(name: string): MachineEntry {
    const entry = this.entries.get(name);
    if (!entry) throw new BlockferryError('not-found', `this daemon has no machine "${name}"`);
    return entry;
  }

  private running(name: string): { entry: MachineEntry; machine: Machine } {
    const entry = this.entry(name);
    if (entry.machine) return { entry, machine: entry.machine };
    const how = entry.error === null ? '' : ` (${entry.error})`;
    throw new BlockferryError('phase', `machine "${name}" has no process here${how}`);
  }

  private claimed(name: string, moveId: string): { entry: MachineEntry; machine: Machine } {
    const found = this.running(name);
    if (found.entry.moveId === moveId) return found;
    throw new BlockferryError('exists', `machine "${name}" is not claimed by move ${moveId}`);
  }

  /** Undoes `incoming`. */
  private async forget(name: string, entry: MachineEntry): Promise<void> {
    const { machine } = entry;
    if (machine) {
      await machine.kill();
      await machine.exited;
    }
    await this.options.record.setMachine(name, entry.before?.record ?? null);
    if (entry.before?.entry) this.entries.set(name, entry.before.entry);
    else this.entries.delete(name);
  }

  /**
   * Ends every machine, as the daemon must before it takes their disks away. Guests are asked to power off and
   * have `timeoutMs`; then they are paused, which flushes their disks, and end as by a power cut. `hurry` ends the waiting.
   */
  async stopAll(timeoutMs: number, hurry: AbortSignal): Promise<void> {
    await Promise.all(
      [...this.entries.values()].map(async ({ machine, ran, definition }) => {
        if (!machine) return;
        this.options.log.warn(
          { vm: definition.name },
          'this daemon stops and ends a machine whose disks it serves',
        );
        await end(machine, ran ? timeoutMs : 0, hurry);
      }),
    );
  }
}
