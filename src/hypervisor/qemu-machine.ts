/**
 * One running QEMU, seen through QMP.
 *
 * Invariants:
 * - #running and #migration follow QEMU's events; every wait looks at them first, so an event that came early is not missed.
 * - When the process ends, or its QMP connection does, every wait rejects with what QEMU said last.
 * - Nothing here starts a machine by itself (`cont`) after a migration: only QEMU knows whether its own end may run on.
 */

import { rm } from 'node:fs/promises';
import { BlockferryError } from '../errors.js';
import type {
  Machine,
  MachineDefinition,
  MachineEvent,
  MachineExit,
  MachineStatus,
  MigrationInfo,
  MigrationLimits,
  RunState,
} from './driver.js';
import { describeExit, type SupervisedProcess } from './process.js';
import { isObject, type JsonObject, type QmpClient, QmpCommandError, type QmpEvent } from './qmp.js';

const STOP_STEP_TIMEOUT_MS = 5_000;
const CANCEL_TIMEOUT_MS = 30_000;
const LISTEN_TIMEOUT_MS = 5_000;
const LISTEN_POLL_MS = 10;
/** Between the end of the QMP connection and that of the process, to say which of the two it was. */
const EXIT_AFTER_CLOSE_MS = 1_000;

const RUN_STATES: Record<string, RunState> = {
  running: 'running',
  inmigrate: 'incoming',
  postmigrate: 'migrated',
  'io-error': 'failed',
  'internal-error': 'failed',
  'guest-panicked': 'failed',
  shutdown: 'stopped',
};

/** A migration in one of these is over. */
const OVER = new Set(['none', 'completed', 'failed', 'cancelled']);

interface Parts {
  definition: MachineDefinition;
  child: SupervisedProcess;
  qmp: QmpClient;
  serialPath: string | null;
  /** Removed when the process ends. */
  folder: string;
  /** How long `stop` waits for the effect of `quit`, and again of SIGTERM. */
  stopStepTimeoutMs?: number | undefined;
}

export class QemuMachine implements Machine {
  readonly definition: MachineDefinition;
  readonly serialPath: string | null;
  readonly pid: number;
  readonly exited: Promise<MachineExit>;
  readonly #child: SupervisedProcess;
  readonly #qmp: QmpClient;
  readonly #stopStepTimeoutMs: number;
  readonly #listeners = new Set<(event: MachineEvent) => void>();
  #running = false;
  #migration = 'none';
  #ranBeforeMigration = false;
  /** The destination may run from here on: cancelling could make two of one machine. */
  #letGo = false;

  private constructor({ definition, child, qmp, serialPath, folder, stopStepTimeoutMs }: Parts) {
    this.definition = definition;
    this.#stopStepTimeoutMs = stopStepTimeoutMs ?? STOP_STEP_TIMEOUT_MS;
    this.serialPath = serialPath;
    this.pid = child.pid;
    this.#child = child;
    this.#qmp = qmp;
    qmp.onEvent((event) => this.#follow(event));
    this.exited = child.exited.then(async (exit) => {
      qmp.close();
      await rm(folder, { recursive: true, force: true }).catch(() => {});
      return exit;
    });
  }

  static async create(parts: Parts): Promise<QemuMachine> {
    const machine = new QemuMachine(parts);
    machine.#running = (await machine.status()).state === 'running';
    return machine;
  }

  async status(): Promise<MachineStatus> {
    const answer = await this.execute('query-status');
    const detail = isObject(answer) ? String(answer.status) : 'unknown';
    return { state: RUN_STATES[detail] ?? 'paused', detail };
  }

  onEvent(listener: (event: MachineEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  async pause(): Promise<void> {
    await this.execute('stop');
  }

  async resume(): Promise<void> {
    await this.execute('cont');
  }

  /** For what the driver's interface does not name (multifd, auto-converge, ...). */
  async setCapabilities(capabilities: Readonly<Record<string, boolean>>): Promise<void> {
    const list = Object.entries(capabilities).map(([capability, state]) => ({ capability, state }));
    await this.execute('migrate-set-capabilities', { capabilities: list });
  }

  async incoming(uri: string): Promise<string> {
    await this.setCapabilities({ events: true });
    await this.execute('migrate-incoming', { uri });
    const deadline = performance.now() + LISTEN_TIMEOUT_MS;
    for (;;) {
      const info = await this.execute('query-migrate');
      const address = isObject(info) ? listenUri(info['socket-address']) : null;
      if (address !== null) return address;
      if (performance.now() >= deadline) {
        throw this.#error('timeout', `does not say where it listens for its migration (${uri})`);
      }
      const exit = await this.#child.exitWithin(LISTEN_POLL_MS);
      if (exit !== null) throw this.#error('hypervisor', describeExit(exit));
    }
  }

  async waitResumed(timeoutMs: number): Promise<void> {
    await this.#until(
      () => this.#running,
      () => this.#migration === 'failed',
      timeoutMs,
      'did not run',
    );
  }

  async migrate(uri: string, limits: MigrationLimits = {}): Promise<void> {
    if (!OVER.has(this.#migration))
      throw this.#error('hypervisor', `is being migrated already (${this.#migration})`);
    await this.setCapabilities({ events: true, 'pause-before-switchover': true });
    const parameters: JsonObject = {};
    if (limits.bandwidthBytesPerSecond !== undefined)
      parameters['max-bandwidth'] = limits.bandwidthBytesPerSecond;
    if (limits.downtimeLimitMs !== undefined) parameters['downtime-limit'] = limits.downtimeLimitMs;
    if (Object.keys(parameters).length > 0) await this.execute('migrate-set-parameters', parameters);
    this.#ranBeforeMigration = this.#running;
    this.#letGo = false;
    this.#migration = 'setup';
    try {
      await this.execute('migrate', { uri });
    } catch (error) {
      if (error instanceof QmpCommandError) this.#migration = 'none';
      throw error;
    }
  }

  async waitPreSwitchover(timeoutMs: number): Promise<void> {
    await this.#untilMigration('pre-switchover', timeoutMs);
  }

  async continueSwitchover(): Promise<void> {
    this.#letGo = true;
    try {
      await this.execute('migrate-continue', { state: 'pre-switchover' });
    } catch (error) {
      if (error instanceof QmpCommandError) this.#letGo = false;
      throw error;
    }
  }

  async waitCompleted(timeoutMs: number): Promise<void> {
    await this.#untilMigration('completed', timeoutMs);
  }

  async cancelMigration(timeoutMs = CANCEL_TIMEOUT_MS): Promise<void> {
    if (!OVER.has(this.#migration)) {
      if (this.#letGo) throw this.#error('hypervisor', 'has begun its switchover, which cannot be cancelled');
      await this.execute('migrate_cancel');
      await this.#until(
        () => OVER.has(this.#migration),
        () => false,
        timeoutMs,
        'did not cancel its migration',
      );
    }
    if (this.#migration === 'completed') {
      throw this.#error('hypervisor', 'had completed its migration before it could be cancelled');
    }
    if (!this.#ranBeforeMigration) return;
    await this.#until(
      () => this.#running,
      () => false,
      timeoutMs,
      'did not run on after its migration was cancelled',
    );
  }

  async queryMigrate(): Promise<MigrationInfo> {
    const answer = await this.execute('query-migrate');
    return migrationInfo(isObject(answer) ? answer : {});
  }

  async powerdown(): Promise<void> {
    await this.execute('system_powerdown');
  }

  async stop(): Promise<void> {
    if (this.#child.exit === null) {
      const timeoutMs = this.#stopStepTimeoutMs;
      this.#qmp.execute('quit', {}, timeoutMs).catch(() => {}); // dead, deaf or gone: the signals follow
      if ((await this.#child.exitWithin(timeoutMs)) === null) await this.#child.terminate(timeoutMs);
    }
    await this.exited;
  }

  async kill(): Promise<void> {
    await this.#child.kill();
    await this.exited;
  }

  /** One QMP command; what QEMU returned, unchecked. */
  async execute(command: string, args: JsonObject = {}, timeoutMs?: number): Promise<unknown> {
    try {
      return await this.#qmp.execute(command, args, timeoutMs);
    } catch (error) {
      throw await this.#explain(error);
    }
  }

  #follow(event: QmpEvent): void {
    if (event.name === 'RESUME') this.#running = true;
    else if (event.name === 'STOP') this.#running = false;
    else if (event.name === 'MIGRATION') this.#migration = String(event.data.status);
    const told = machineEvent(event);
    if (told !== null) for (const listener of this.#listeners) listener(told);
  }

  async #untilMigration(wanted: string, timeoutMs: number): Promise<void> {
    const passed = wanted === 'completed' ? () => false : () => this.#migration === 'device';
    await this.#until(
      () => this.#migration === wanted,
      () => OVER.has(this.#migration) || passed(),
      timeoutMs,
      `did not get to ${wanted}`,
    );
  }

  /** Looks again after every event until `reached`, or `lost`: then it never will be. */
  async #until(
    reached: () => boolean,
    lost: () => boolean,
    timeoutMs: number,
    failure: string,
  ): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    while (!reached()) {
      if (lost())
        throw this.#error(
          'hypervisor',
          `${failure}: its migration is ${this.#migration}${await this.#reason()}`,
        );
      const left = deadline - performance.now();
      if (left <= 0) {
        throw this.#error(
          'timeout',
          `${failure} within ${timeoutMs} ms, its migration is ${this.#migration}`,
        );
      }
      try {
        await this.#qmp.waitFor(isTurn, { timeoutMs: left });
      } catch (error) {
        if (error instanceof BlockferryError && error.code === 'timeout') continue;
        throw await this.#explain(error);
      }
    }
  }

  /** A destination whose migration failed ends at once, and says why on stderr. */
  async #reason(): Promise<string> {
    const info = await this.queryMigrate().catch(() => null);
    if (info?.error !== undefined) return ` (${info.error})`;
    const exit = await this.#child.exitWithin(EXIT_AFTER_CLOSE_MS);
    return exit === null ? '' : ` (it ${describeExit(exit)})`;
  }

  /** If the connection broke because the process died, its last words are what the user needs. */
  async #explain(error: unknown): Promise<unknown> {
    if (
      !(error instanceof BlockferryError) ||
      error.code !== 'hypervisor' ||
      error instanceof QmpCommandError
    )
      return error;
    const exit = await this.#child.exitWithin(EXIT_AFTER_CLOSE_MS);
    return this.#error('hypervisor', exit === null ? error.message : describeExit(exit), error);
  }

  #error(code: 'hypervisor' | 'timeout', what: string, cause?: unknown): BlockferryError {
    return new BlockferryError(code, `QEMU of machine ${this.definition.name} ${what}`, { cause });
  }
}

/** Events after which a wait looks again. */
function isTurn(event: QmpEvent): boolean {
  return event.name === 'MIGRATION' || event.name === 'RESUME' || event.name === 'STOP';
}

function machineEvent({ name, data }: QmpEvent): MachineEvent | null {
  switch (name) {
    case 'STOP':
      return { kind: 'stopped' };
    case 'RESUME':
      return { kind: 'resumed' };
    case 'MIGRATION':
      return { kind: 'migration', status: String(data.status) };
    case 'SHUTDOWN':
      return { kind: 'shutdown', reason: String(data.reason) };
    case 'BLOCK_IO_ERROR':
      return {
        kind: 'io-error',
        node: String(data['node-name'] ?? data.device),
        operation: String(data.operation),
        action: String(data.action),
        reason: String(data.reason),
      };
    default:
      return null;
  }
}

/** First entry of query-migrate's socket-address as a migration URI. */
function listenUri(addresses: unknown): string | null {
  const first: unknown = Array.isArray(addresses) ? addresses[0] : undefined;
  if (!isObject(first)) return null;
  if (first.type === 'unix') return `unix:${String(first.path)}`;
  if (first.type !== 'inet') return null;
  const host = String(first.host);
  return `tcp:${host.includes(':') ? `[${host}]` : host}:${String(first.port)}`;
}

function migrationInfo(answer: JsonObject): MigrationInfo {
  const info: MigrationInfo = { status: typeof answer.status === 'string' ? answer.status : 'none' };
  const ram = isObject(answer.ram) ? answer.ram : {};
  const numbers: [Exclude<keyof MigrationInfo, 'status' | 'error'>, unknown][] = [
    ['ramTransferredBytes', ram.transferred],
    ['ramRemainingBytes', ram.remaining],
    ['ramTotalBytes', ram.total],
    ['totalTimeMs', answer['total-time']],
    ['downtimeMs', answer.downtime],
    ['expectedDowntimeMs', answer['expected-downtime']],
    ['bytesPerSecond', typeof ram.mbps === 'number' ? (ram.mbps * 1e6) / 8 : undefined],
  ];
  for (const [name, value] of numbers) {
    if (typeof value === 'number') info[name] = value;
  }
  if (typeof answer['error-desc'] === 'string') info.error = answer['error-desc'];
  return info;
}
