/** A supervised child process: its last words kept within bounds, its end known, and no way to leave it behind. */

import { type ChildProcess, spawn } from 'node:child_process';
import { BlockferryError } from '../errors.js';
import type { MachineExit } from './driver.js';

const STDERR_BYTES_KEPT = 8192;
/** After the exit, for what is still in the pipe; a grandchild may hold it open for ever. */
const STDERR_DRAIN_MS = 200;
const TERMINATE_TIMEOUT_MS = 5_000;
const KILL_TIMEOUT_MS = 10_000;

export interface ProcessOptions {
  /** The kernel kills the child when this process ends, however it ends. Needs setpriv (util-linux). */
  dieWithParent?: boolean;
}

export class SupervisedProcess {
  readonly #child: ChildProcess;
  readonly pid: number;
  readonly exited: Promise<MachineExit>;
  #stderr = Buffer.alloc(0);
  #exit: MachineExit | null = null;

  private constructor(child: ChildProcess) {
    this.#child = child;
    this.pid = child.pid ?? 0;
    const stderr = child.stderr!;
    stderr.on('data', (chunk: Buffer) => {
      this.#stderr = Buffer.concat([this.#stderr, chunk]).subarray(-STDERR_BYTES_KEPT);
    });
    this.exited = new Promise((resolve) => {
      child.once('exit', (code, signal) => {
        const done = () => {
          clearTimeout(timer);
          this.#exit ??= { code, signal, stderr: this.#stderr.toString('utf8').trim() };
          stderr.destroy();
          resolve(this.#exit);
        };
        const timer = setTimeout(done, STDERR_DRAIN_MS);
        if (stderr.readableEnded) done();
        else stderr.once('end', done);
      });
    });
  }

  /** Fails if the program cannot be started at all. The child has a process group of its own: no Ctrl-C reaches it. */
  static async start(
    program: string,
    args: readonly string[],
    options: ProcessOptions = {},
  ): Promise<SupervisedProcess> {
    const words = options.dieWithParent
      ? ['setpriv', '--pdeathsig', 'KILL', '--', program, ...args]
      : [program, ...args];
    const child = spawn(words[0]!, words.slice(1), { stdio: ['ignore', 'ignore', 'pipe'], detached: true });
    const supervised = new SupervisedProcess(child);
    await new Promise<void>((resolve, reject) => {
      child.once('spawn', resolve);
      child.once('error', (error) => {
        reject(
          new BlockferryError('hypervisor', `cannot start ${words[0]}: ${error.message}`, { cause: error }),
        );
      });
    });
    // From here on an 'error' is a signal that could not be sent; the deadlines below see to that.
    child.on('error', () => {});
    return supervised;
  }

  /** Null while it runs. */
  get exit(): MachineExit | null {
    return this.#exit;
  }

  /** The end of the process, or null if it did not come within `timeoutMs`. */
  async exitWithin(timeoutMs: number): Promise<MachineExit | null> {
    let timer: NodeJS.Timeout | undefined;
    const late = new Promise<null>((resolve) => {
      timer = setTimeout(resolve, timeoutMs, null);
    });
    const result = await Promise.race([this.exited, late]);
    clearTimeout(timer);
    return result;
  }

  /** SIGTERM, and SIGKILL when that does not help within `timeoutMs`. */
  async terminate(timeoutMs = TERMINATE_TIMEOUT_MS): Promise<void> {
    if (this.#exit !== null) return;
    this.#child.kill('SIGTERM');
    if ((await this.exitWithin(timeoutMs)) === null) await this.kill();
  }

  async kill(): Promise<void> {
    if (this.#exit !== null) return;
    this.#child.kill('SIGKILL');
    if ((await this.exitWithin(KILL_TIMEOUT_MS)) === null) {
      throw new BlockferryError(
        'timeout',
        `process ${this.pid} is still there ${KILL_TIMEOUT_MS} ms after SIGKILL`,
      );
    }
  }
}

/** `ended (code 1): last line of stderr`, for error messages. */
export function describeExit(exit: MachineExit): string {
  const how = exit.signal !== null ? `was killed by ${exit.signal}` : `ended with code ${exit.code}`;
  const last = exit.stderr.slice(exit.stderr.lastIndexOf('\n') + 1);
  return last === '' ? how : `${how}: ${last}`;
}
