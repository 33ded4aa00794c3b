/**
 * The machines of one daemon: started, sent, received, stopped.
 *
 * Invariants
 * - A machine is started only while every volume of its disks is served here and writable, and no other machine has one of them.
 * - A process that waits for a migration is started only on standby volumes; it is ended by `discard` only while it cannot have
 *   written, that is, until its volumes have taken over.
 * - `ran` is said of a machine that arrived only after its volumes are settled: from then on no takeover can be taken back.
 * - A guest runs on at the source (`revive`) only on volumes that accept its writes.
 * - A machine that departed is recorded so before its process ends.
 * - Processes do not outlive the daemon's knowledge of them unseen: one that an earlier daemon left is shown as `unmanaged`, and its
 *   machine is not started a second time.
 */

import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type {
  Hypervisor,
  Machine,
  MachineDefinition,
  MigrationInfo,
  StartOptions,
} from '../hypervisor/driver.js';
import type { MachineState, MachineView } from './control/api.js';
import { MachineDisks } from './machine-disks.js';
import { describeExit, end, type MachineEntry, newEntry, tcpHost, watchMachine } from './machine-entry.js';
import type { DaemonRecord } from './record.js';
import type { Volumes } from './volumes.js';
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

export interface MachinesOptions {
  volumes: Volumes;
  hypervisor: Hypervisor;
  /** Where a volume's guest face is served. */
  diskSocket: (volume: string) => string;
  /** Whether a process of an earlier daemon still runs the machine. */
  hasLeftover: (machine: string) => Promise<boolean>;
  /** Host or IP at which an incoming process listens. */
  migrationAddress: string;
  record: DaemonRecord;
  log: Logger;
}

export class Machines {
  private readonly entries = new Map<string, MachineEntry>();
  private readonly queue = new KeyedQueue();
  private readonly disks: MachineDisks;
  /** Machines whose process is on its way, by name. */
  private readonly starting = new Set<string>();

  constructor(private readonly options: MachinesOptions) {
    this.disks = new MachineDisks(options.volumes, this.entries, (name) => this.isUnmanaged(name));
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

  /**
   * Whether the guest ran here though this daemon did not see it: it writes to disks that are served again, or an earlier daemon ended
   * before it could note its first write. Only a guest that runs settles a volume.
   */
  private async ranUnseen(name: string, entry: MachineEntry): Promise<boolean> {
    const { record, volumes, log } = this.options;
    if (entry.ran || entry.machine) return entry.ran;
    const noted = record.machine(name);
    if (noted?.state !== 'incoming' || noted.moveId !== entry.moveId) return false;
    if (!entry.definition.disks.some(({ volume }) => volumes.settled(volume))) return false;
    entry.ran = true;
    await record
      .setMachine(name, { ...noted, state: 'arrived' })
      .catch((error: unknown) => log.error({ vm: name, err: error }, 'its arrival is not noted'));
    return true;
  }

  async view(name: string): Promise<MachineView> {
    const entry = this.entry(name);
    await this.ranUnseen(name, entry);
    const { machine } = entry;
    const status = machine ? await machine.status().catch(() => null) : null;
    const gone: MachineState = entry.departed
      ? 'departed'
      : (await this.isUnmanaged(name))
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
      await this.ranUnseen(name, entry);
      if (this.options.record.machine(name)?.state === 'incoming') {
        throw new BlockferryError(
          'phase',
          `machine "${name}" is on its way here by ${entry.moveId} and may still run at its source: continue that with --resume or end it with --abort`,
        );
      }
      await this.refuseUnmanaged(name);
      await this.disks.reserve(entry.definition, ['plain', 'relocating'], 'start', () =>
        this.launch(entry, false),
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
      await this.refuseUnmanaged(name);
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
      const machine = await this.launch(entry, true);
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
    if (await this.isUnmanaged(name)) return this.waitRanUnseen(name, timeoutMs, signal);
    const { entry, machine } = this.running(name);
    return watchMachine(machine, timeoutMs, signal, async () => {
      if (!entry.ran && (await machine.status()).state === 'running') await this.settle(name, entry);
      return { done: entry.ran || entry.machine !== machine, value: entry.ran };
    });
  }

  private async waitRanUnseen(name: string, timeoutMs: number, signal: AbortSignal): Promise<boolean> {
    const entry = this.entry(name);
    for (const deadline = performance.now() + timeoutMs; ; ) {
      if (await this.ranUnseen(name, entry)) return true;
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
      await this.refuseUnmanaged(name);
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

  private async refuseUnmanaged(name: string): Promise<void> {
    if (!(await this.isUnmanaged(name))) return;
    throw new BlockferryError(
      'exists',
      `a process of an earlier daemon still runs machine "${name}": end it first, this daemon does not take it over`,
    );
  }

  private async isUnmanaged(name: string): Promise<boolean> {
    // A process that is starting is ours, and asking it would fill the short queue in front of its control socket.
    if (this.entries.get(name)?.machine || this.starting.has(name)) return false;
    return this.options.hasLeftover(name);
  }

  private async launch(entry: MachineEntry, incoming: boolean): Promise<Machine> {
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
  private async settle(name: string, entry: MachineEntry): Promise<void> {
    if (entry.ran) return;
    await Promise.all(
      entry.definition.disks.map(({ volume }) => this.options.volumes.service(volume).settle()),
    );
    if (entry.ran) return;
    entry.ran = true;
    const { moveId, definition } = entry;
    await this.options.record.setMachine(name, { state: 'arrived', moveId: moveId ?? '', definition });
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
