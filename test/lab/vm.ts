/** Machines for tests: the test guest's definition, and whether this machine can run it. */

import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { isAlive } from '../../src/host/control/socket.js';
import { type MachineDefinition, machineDefinitionSchema } from '../../src/hypervisor/driver.js';
import { SupervisedProcess } from '../../src/hypervisor/process.js';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import { type Guest, guestMissing } from './guest.js';

const QEMU = 'qemu-system-x86_64';
/** Debian 12's 7.2 loses dirty RAM pages under TCG, which looks like a storage fault. */
const QEMU_MAJOR_MIN = 8;
const SERVER_START_TIMEOUT_MS = 10_000;
const POLL_MS = 5;

/** Parameters of the workload; test/lab/guest/workload.c says what each does. */
export interface WorkloadOptions {
  mode: 'raw' | 'ext4';
  slots: number;
  files?: number;
  writes?: number;
  rate?: number;
  dirty?: number;
  dirtyrate?: number;
}

export interface GuestMachineOptions {
  name: string;
  guest: Guest;
  volume: string;
  workload: WorkloadOptions;
  memoryMiB?: number;
}

/** The test guest as a machine with one disk, node `disk0`. TCG: /dev/kvm may be there and yet not boot it. */
export function guestMachine({
  name,
  guest,
  volume,
  workload,
  memoryMiB = 192,
}: GuestMachineOptions): MachineDefinition {
  const parameters = Object.entries(workload).map(([key, value]) => `bf.${key}=${value}`);
  return machineDefinitionSchema.parse({
    name,
    binary: QEMU,
    args: [
      ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
      ...['-machine', 'q35', '-accel', 'tcg', '-cpu', 'max', '-m', String(memoryMiB), '-smp', '1'],
      ...['-kernel', guest.kernel, '-initrd', guest.initrd],
      ...['-append', ['console=ttyS0 quiet panic=1 oops=panic', ...parameters].join(' ')],
      ...['-device', 'virtio-blk-pci,drive=disk0,id=vd0,rerror=stop,werror=stop'],
    ],
    disks: [{ node: 'disk0', volume }],
    serial: true,
  });
}

/** What is missing on this machine for tests with a real guest, in one line; null if nothing is. */
export async function labMissing(): Promise<string | null> {
  const version = await new QemuDriver({ runtimeDir: tmpdir() }).version({ binary: QEMU }).catch(() => null);
  if (version === null) return 'qemu-system-x86 is not installed';
  if (Number.parseInt(version, 10) < QEMU_MAJOR_MIN) {
    return `QEMU ${version} loses guest RAM under TCG: install ${QEMU_MAJOR_MIN} or newer (Debian 12: bookworm-backports)`;
  }
  return guestMissing();
}

/** A folder for one test with a short path (socket paths have 107 bytes at most). */
export async function testFolder(): Promise<{ path: string; remove(): Promise<void> }> {
  const path = await mkdtemp(join(tmpdir(), 'bf-'));
  return { path, remove: () => rm(path, { recursive: true, force: true }) };
}

/** Starts a server that dies with this process, and waits until its unix socket takes connections. */
export async function startServer(
  program: string,
  args: string[],
  socketPath: string,
): Promise<SupervisedProcess> {
  const server = await SupervisedProcess.start(program, args, { dieWithParent: true });
  const deadline = performance.now() + SERVER_START_TIMEOUT_MS;
  while (!(await isAlive(socketPath))) {
    const exit = await server.exitWithin(POLL_MS);
    if (exit !== null) throw new Error(`${program} ended with code ${exit.code}: ${exit.stderr}`);
    if (performance.now() < deadline) continue;
    await server.kill();
    throw new Error(`${program} does not listen on ${socketPath} after ${SERVER_START_TIMEOUT_MS} ms`);
  }
  return server;
}
