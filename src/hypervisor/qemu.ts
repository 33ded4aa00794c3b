/**
 * Starts QEMU machines whose disks are NBD exports on unix sockets of this host. Each machine has a folder of its own for its
 * sockets, which goes when the machine does.
 */

import { execFile } from 'node:child_process';
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { BlockferryError, messageOf } from '../errors.js';
import type { DiskAddress, Hypervisor, MachineDefinition, StartOptions } from './driver.js';
import { describeExit, SupervisedProcess } from './process.js';
import { QemuMachine } from './qemu-machine.js';
import { QmpClient } from './qmp.js';

const START_TIMEOUT_MS = 30_000;
const CONNECT_RETRY_MS = 10;
const VERSION_TIMEOUT_MS = 10_000;
/** A guest's I/O waits this long for an NBD server that went away before it fails. */
const RECONNECT_DELAY_S = 30;
/** sockaddr_un.sun_path, with its closing zero. */
const SOCKET_PATH_BYTES_MAX = 107;

export interface QemuDriverOptions {
  /** Folder for the machines' own folders; made if it is not there. Short: socket paths have 107 bytes at most. */
  runtimeDir: string;
  /** Machines are killed when this process ends, however it ends. For tests and one-command demonstrations. */
  dieWithParent?: boolean;
  /** How long a machine's `stop` waits for the effect of QMP's quit, and again of SIGTERM, before SIGKILL. Default 5 s. */
  stopStepTimeoutMs?: number;
}

export class QemuDriver implements Hypervisor {
  readonly kind = 'qemu';
  readonly #options: QemuDriverOptions;

  constructor(options: QemuDriverOptions) {
    this.#options = options;
  }

  /** For example `10.0.2`. */
  async version(definition: Pick<MachineDefinition, 'binary'>): Promise<string> {
    const answer = await promisify(execFile)(definition.binary, ['--version'], {
      timeout: VERSION_TIMEOUT_MS,
    }).catch((error: unknown) => {
      const why = messageOf(error).split('\n')[0];
      throw new BlockferryError('hypervisor', `cannot run ${definition.binary}: ${why}`, { cause: error });
    });
    const version = /version (\d+\.\d+(?:\.\d+)?)/.exec(answer.stdout)?.[1];
    if (version === undefined) {
      throw new BlockferryError('hypervisor', `${definition.binary} --version names no version: is it QEMU?`);
    }
    return version;
  }

  async start(definition: MachineDefinition, options: StartOptions): Promise<QemuMachine> {
    await mkdir(this.#options.runtimeDir, { recursive: true, mode: 0o700 });
    const folder = await mkdtemp(join(this.#options.runtimeDir, `${definition.name}-`));
    try {
      const args = qemuArguments(definition, options, folder);
      const dieWithParent = this.#options.dieWithParent ?? false;
      const child = await SupervisedProcess.start(definition.binary, args, { dieWithParent });
      try {
        const qmp = await connectWhenReady(definition, child, qmpPath(folder));
        const serialPath = definition.serial ? serialSocketPath(folder) : null;
        const { stopStepTimeoutMs } = this.#options;
        return await QemuMachine.create({ definition, child, qmp, serialPath, folder, stopStepTimeoutMs });
      } catch (error) {
        await child.kill();
        throw error;
      }
    } catch (error) {
      await rm(folder, { recursive: true, force: true });
      throw error;
    }
  }
}

/** The command line, without the program's name. `folder`: where the machine's sockets go. */
export function qemuArguments(
  definition: MachineDefinition,
  options: StartOptions,
  folder: string,
): string[] {
  const args = ['-name', `guest=${definition.name}`, ...definition.args];
  args.push(
    '-chardev',
    socketChardev('blockferry-qmp', qmpPath(folder)),
    '-mon',
    'chardev=blockferry-qmp,mode=control',
  );
  if (definition.serial) {
    const serial = socketChardev('blockferry-serial', serialSocketPath(folder));
    args.push('-chardev', serial, '-serial', 'chardev:blockferry-serial');
  }
  for (const { node, volume } of definition.disks) {
    const address = options.disks[volume];
    if (address === undefined) {
      const why = `machine ${definition.name} needs volume ${volume}, which is not served on this host`;
      throw new BlockferryError('hypervisor', why);
    }
    args.push('-blockdev', blockdev(node, address));
  }
  if (options.incoming) args.push('-incoming', 'defer');
  return args;
}

/** JSON, so that no character of a path or name has a meaning. Direct: what the guest was told is written is with our server. */
function blockdev(node: string, address: DiskAddress): string {
  return JSON.stringify({
    driver: 'nbd',
    'node-name': node,
    server: { type: 'unix', path: shortPath(address.socketPath) },
    ...(address.exportName === undefined ? {} : { export: address.exportName }),
    cache: { direct: true },
    discard: 'unmap',
    'reconnect-delay': RECONNECT_DELAY_S,
  });
}

function socketChardev(id: string, path: string): string {
  return `socket,id=${id},path=${shortPath(path).replaceAll(',', ',,')},server=on,wait=off`;
}

function shortPath(path: string): string {
  if (Buffer.byteLength(path) <= SOCKET_PATH_BYTES_MAX) return path;
  const why = `socket path longer than ${SOCKET_PATH_BYTES_MAX} bytes: ${path}; use a shorter folder`;
  throw new BlockferryError('address', why);
}

function qmpPath(folder: string): string {
  return join(folder, 'qmp.sock');
}

function serialSocketPath(folder: string): string {
  return join(folder, 'serial.sock');
}

/** How a connect fails while the socket is not there, not listening yet, or listening with its short queue (of one) full. */
const NOT_YET: ReadonlySet<string> = new Set(['ENOENT', 'ECONNREFUSED', 'EAGAIN']);

/** QEMU listens early and greets when its machine is built, which includes a first connection to every disk. */
async function connectWhenReady(
  definition: MachineDefinition,
  child: SupervisedProcess,
  path: string,
): Promise<QmpClient> {
  const deadline = performance.now() + START_TIMEOUT_MS;
  for (;;) {
    const left = Math.max(1, deadline - performance.now());
    try {
      return await QmpClient.connect(path, left);
    } catch (error) {
      const code = ((error as Error).cause as NodeJS.ErrnoException | undefined)?.code;
      const notYet = code !== undefined && NOT_YET.has(code);
      const exit = await child.exitWithin(notYet ? CONNECT_RETRY_MS : 2 * CONNECT_RETRY_MS);
      if (exit !== null) {
        const why = `QEMU of machine ${definition.name} did not start, it ${describeExit(exit)}`;
        throw new BlockferryError('hypervisor', why);
      }
      if (!notYet || performance.now() >= deadline) throw error;
    }
  }
}
