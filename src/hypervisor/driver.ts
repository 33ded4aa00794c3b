/**
 * What the coordinator needs of a hypervisor. QEMU is the first (qemu.ts); libvirt can be another.
 *
 * A move, in order (S source, D destination): D start(incoming), D incoming(), S migrate(), S waitPreSwitchover() - the machine is
 * stopped and its disks are flushed -, S continueSwitchover(), D waitResumed(), S waitCompleted(), S stop(). Until continueSwitchover()
 * S cancelMigration() makes the machine run on at the source.
 */

import { z } from 'zod';

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

/** One disk of a machine: `volume` is what blockferry calls it, `node` what the hypervisor's arguments call it. */
const diskSchema = z.strictObject({
  node: z
    .string()
    .regex(/^[A-Za-z][A-Za-z0-9._-]{0,30}$/, 'a QEMU node name: a letter, then letters, digits, ._-'),
  volume: z.string().regex(NAME, 'a volume name'),
});

/**
 * All a host needs to start a machine, except where its volumes are served. It travels with the move, so it names nothing that exists
 * on one host only: no socket paths, no disks of its own.
 */
export const machineDefinitionSchema = z.strictObject({
  name: z.string().regex(NAME, 'letters, digits, ._-, at most 64'),
  /** Program, looked up in PATH unless absolute. */
  binary: z.string().min(1).max(4096).default('qemu-system-x86_64'),
  /** Its arguments: machine, memory, kernel, and a `-device` line for each disk that says `drive=NODE`. */
  args: z.array(z.string().max(65_536)).max(512),
  disks: z.array(diskSchema).min(1).max(64),
  /** A serial port on a unix socket of the host (Machine.serialPath). */
  serial: z.boolean().default(false),
});

export type MachineDefinition = z.infer<typeof machineDefinitionSchema>;

/** Where a volume is served on this host. */
export interface DiskAddress {
  socketPath: string;
  /** NBD export name; the default export if absent. */
  exportName?: string;
}

export interface StartOptions {
  /** By volume name: one for every disk of the definition. */
  disks: Readonly<Record<string, DiskAddress>>;
  /** Wait for a migration (`incoming`) instead of booting. */
  incoming?: boolean;
}

export type RunState = 'running' | 'paused' | 'incoming' | 'migrated' | 'failed' | 'stopped';

export interface MachineStatus {
  state: RunState;
  /** The hypervisor's own word. */
  detail: string;
}

export interface MachineExit {
  code: number | null;
  signal: NodeJS.Signals | null;
  /** The last of what it wrote to stderr, at most some KiB. */
  stderr: string;
}

/** Progress and result of a RAM migration, as the source sees it. Undefined: not known yet. */
export interface MigrationInfo {
  /** The hypervisor's own word: none, setup, active, pre-switchover, device, completed, failed, cancelled, ... */
  status: string;
  ramTransferredBytes?: number;
  ramRemainingBytes?: number;
  ramTotalBytes?: number;
  bytesPerSecond?: number;
  totalTimeMs?: number;
  /** Between the source's stop and its end of sending: leaves out device load and page faults at the destination. */
  downtimeMs?: number;
  expectedDowntimeMs?: number;
  error?: string;
}

export interface MigrationLimits {
  /** Bytes a second for RAM; QEMU's own default is 128 MiB/s. */
  bandwidthBytesPerSecond?: number;
  downtimeLimitMs?: number;
}

export type MachineEvent =
  | { kind: 'stopped' }
  | { kind: 'resumed' }
  | { kind: 'migration'; status: string }
  | { kind: 'io-error'; node: string; operation: string; action: string; reason: string }
  | { kind: 'shutdown'; reason: string };

/** Failures are BlockferryError: 'hypervisor' when it said no, failed or died, 'timeout' when a deadline passed. */
export interface Machine {
  readonly definition: MachineDefinition;
  readonly pid: number;
  /** Unix socket of the serial port, null without one. */
  readonly serialPath: string | null;
  /** Resolves, and never rejects, when the machine's process is gone. */
  readonly exited: Promise<MachineExit>;
  status(): Promise<MachineStatus>;
  /** Told of all that happens from now on; the answer ends that. */
  onEvent(listener: (event: MachineEvent) => void): () => void;
  pause(): Promise<void>;
  resume(): Promise<void>;

  /** Destination: listens at `uri` (`tcp:HOST:0`, `unix:PATH`) and answers where really. */
  incoming(uri: string): Promise<string>;
  /** Destination: resolves when the machine runs here. */
  waitResumed(timeoutMs: number): Promise<void>;

  /** Source: starts to send RAM, and will stop in pre-switchover. */
  migrate(uri: string, limits?: MigrationLimits): Promise<void>;
  /** Source: resolves when the machine is stopped, its disks drained and flushed. */
  waitPreSwitchover(timeoutMs: number): Promise<void>;
  continueSwitchover(): Promise<void>;
  /** Source: resolves when all was sent. The machine must not run here any more. */
  waitCompleted(timeoutMs: number): Promise<void>;
  /**
   * Source: ends a migration that was not let go by continueSwitchover(); resolves when the machine runs here again, if it ran
   * before. After a migration that failed by itself it only waits for that.
   */
  cancelMigration(timeoutMs?: number): Promise<void>;
  queryMigrate(): Promise<MigrationInfo>;

  /** Asks the guest to power off; `exited` tells when it did. */
  powerdown(): Promise<void>;
  /** Ends the process, as by a power cut for the guest: asked first, then by signal. Idempotent. */
  stop(): Promise<void>;
  /** Ends the process at once. Idempotent. */
  kill(): Promise<void>;
}

export interface Hypervisor {
  readonly kind: string;
  /** Version of the program the definition names; fails if it cannot be run. */
  version(definition: Pick<MachineDefinition, 'binary'>): Promise<string>;
  start(definition: MachineDefinition, options: StartOptions): Promise<Machine>;
}
