/** Daemons that a test starts, talks to and kills. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { BlockferryError, type ErrorCode } from '../../../src/errors.js';
import type { VolumeStatus } from '../../../src/host/service.js';
import type { ChildCommand, Load, OpenCommand } from '../proxy-child.js';

const CHILD = fileURLToPath(new URL('../proxy-child.js', import.meta.url));
const COMMAND = fileURLToPath(new URL('../../../../bin/blockferry', import.meta.url));
const READY_TIMEOUT_MS = 20_000;

/** A process that was killed, or ended, before it answered. */
export class Died extends Error {}

type Waiting = { resolve: (value: unknown) => void; reject: (error: Error) => void };

/** Starts `words` so that it dies with this process. */
function start(words: string[], env: NodeJS.ProcessEnv): ChildProcess {
  return spawn('setpriv', ['--pdeathsig', 'KILL', '--', process.execPath, ...words], {
    stdio: ['pipe', 'pipe', 'pipe'],
    env: { ...process.env, UV_USE_IO_URING: '0', ...env },
  });
}

/** Any daemon of ours that can be killed. */
export abstract class Daemon {
  readonly exited: Promise<void>;
  #gone = false;
  #stderr = '';

  constructor(
    readonly process: ChildProcess,
    readonly env: NodeJS.ProcessEnv,
  ) {
    this.exited = once(process, 'exit').then(() => {
      this.#gone = true;
    });
    process.stdin?.on('error', () => undefined);
    process.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-4000);
    });
  }

  get gone(): boolean {
    return this.#gone;
  }

  /** The end of what it said on standard error. */
  get stderr(): string {
    return this.#stderr;
  }

  /** Asks it to end in order. */
  abstract end(): void;

  /** An orderly end. */
  async stop(): Promise<void> {
    this.end();
    await this.exited;
  }

  /** kill -9; resolves when nothing of it is left. */
  async kill(): Promise<void> {
    if (!this.#gone) this.process.kill('SIGKILL');
    await this.exited;
  }
}

/** test/lab/proxy-child.ts. */
export class ChildDaemon extends Daemon {
  #id = 0;
  readonly #waiting = new Map<number, Waiting>();

  constructor(env: NodeJS.ProcessEnv = {}) {
    super(start([CHILD], env), env);
    createInterface({ input: this.process.stdout! }).on('line', (line) => this.#answered(line));
    void this.exited.then(() => {
      for (const { reject } of this.#waiting.values()) reject(new Died(`the daemon died: ${this.stderr}`));
      this.#waiting.clear();
    });
  }

  #answered(line: string): void {
    const { id, value, error } = JSON.parse(line) as {
      id: number;
      value?: unknown;
      error?: { code: ErrorCode; message: string };
    };
    const waiting = this.#waiting.get(id);
    this.#waiting.delete(id);
    if (error === undefined) waiting?.resolve(value);
    else waiting?.reject(new BlockferryError(error.code, error.message));
  }

  /** Fails as the command does, or with Died. */
  command<T = unknown>(command: ChildCommand): Promise<T> {
    if (this.gone) return Promise.reject(new Died(`the daemon died: ${this.stderr}`));
    const id = ++this.#id;
    const answer = new Promise<unknown>((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
    answer.catch(() => undefined);
    this.process.stdin!.write(`${JSON.stringify({ id, ...command })}\n`);
    return answer as Promise<T>;
  }

  /** The URI of the guest's export. */
  open(
    volume: OpenCommand['volume'],
    socket: string,
    more: Pick<OpenCommand, 'tcp' | 'listener'> = {},
  ): Promise<string> {
    return this.command<string>({ do: 'open', volume, socket, ...more });
  }

  status(): Promise<VolumeStatus> {
    return this.command({ do: 'status' });
  }

  load(): Promise<Load> {
    return this.command({ do: 'load' });
  }

  /** The most memory it had resident since it began, or since `forgetPeak`, bytes. */
  peakBytes(): number {
    const text = readFileSync(`/proc/${this.process.pid}/status`, 'utf8');
    return Number(/^VmHWM:\s+(\d+) kB$/m.exec(text)![1]) * 1024;
  }

  forgetPeak(): void {
    writeFileSync(`/proc/${this.process.pid}/clear_refs`, '5');
  }

  /** Sockets it has open. */
  sockets(): number {
    const folder = `/proc/${this.process.pid}/fd`;
    const targets = readdirSync(folder).map((name) => {
      try {
        return readlinkSync(`${folder}/${name}`);
      } catch {
        return ''; // closed meanwhile
      }
    });
    return targets.filter((target) => target.startsWith('socket:')).length;
  }

  end(): void {
    this.process.stdin!.end();
  }
}

/** Keeps one child started ahead, so that a restart takes no time. */
export class Spares {
  #next: ChildDaemon | undefined;

  /** `env`: asked for each child. */
  constructor(private readonly env: () => NodeJS.ProcessEnv = () => ({})) {}

  take(): ChildDaemon {
    const child = this.#next ?? new ChildDaemon(this.env());
    this.#next = new ChildDaemon(this.env());
    return child;
  }

  async close(): Promise<void> {
    await this.#next?.kill();
  }
}

/** The real daemon: `blockferry WORDS...`. */
export class CommandDaemon extends Daemon {
  readonly #ready: Promise<string>;

  constructor(words: string[], env: NodeJS.ProcessEnv = {}) {
    super(start([COMMAND, ...words], env), env);
    this.#ready = new Promise((resolve, reject) => {
      createInterface({ input: this.process.stdout! }).once('line', resolve);
      void this.exited.then(() => reject(new Died(`the daemon ended: ${this.stderr}`)));
      setTimeout(() => reject(new Error(`not ready: ${this.stderr}`)), READY_TIMEOUT_MS).unref();
    });
    this.#ready.catch(() => undefined);
  }

  /** Resolves with the NBD URI that it prints when it is ready. */
  async ready(): Promise<string> {
    const line = await this.#ready;
    const uri = line.split(' ').find((word) => word.startsWith('nbd'));
    if (uri === undefined) throw new Error(`no URI in what it printed: ${line}`);
    return uri;
  }

  end(): void {
    this.process.kill('SIGTERM');
  }
}
