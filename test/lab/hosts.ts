/** Hosts for tests and the quickstart: real `blockferry host` daemons, and the commands a person would type. */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { stringify } from 'yaml';
import { ControlClient } from '../../src/host/control/client.js';
import type { MachineDefinition } from '../../src/hypervisor/driver.js';
import { type WanHost, words as wordsOn } from './wan.js';

export const BLOCKFERRY = fileURLToPath(new URL('../../../bin/blockferry', import.meta.url));

const START_TIMEOUT_MS = 30_000;
const STOP_TIMEOUT_MS = 30_000;
const POLL_MS = 5;
const STDERR_KEPT = 20_000;

export interface Finished {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** Starts `blockferry WORDS...`, on a host of a WAN lab or here, so that it dies with this process. */
export function spawnBlockferry(
  words: readonly string[],
  stdio: 'pipe' | 'inherit-stderr' = 'pipe',
  on?: WanHost,
): ChildProcess {
  const command = [process.execPath, BLOCKFERRY, ...words];
  return spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...(on ? wordsOn(on, command) : command)], {
    stdio: ['ignore', 'pipe', stdio === 'pipe' ? 'pipe' : 'inherit'],
  });
}

/** Runs `blockferry WORDS...` to its end. `onLine` is told each line of stderr. */
export async function runBlockferry(
  words: readonly string[],
  options: { onLine?: (line: string) => void; onStart?: (child: ChildProcess) => void } = {},
): Promise<Finished> {
  const child = spawnBlockferry(words);
  options.onStart?.(child);
  let stdout = '';
  let stderr = '';
  let rest = '';
  child.stdout!.setEncoding('utf8').on('data', (text: string) => {
    stdout += text;
  });
  child.stderr!.setEncoding('utf8').on('data', (text: string) => {
    stderr += text;
    const lines = (rest + text).split('\n');
    rest = lines.pop()!;
    for (const line of lines) options.onLine?.(line);
  });
  const [code] = (await once(child, 'close')) as [number | null];
  return { code, stdout, stderr };
}

/** A daemon process of ours: waits for its readiness line, and stops it in order. */
export class DaemonProcess {
  readonly exited: Promise<number | null>;
  #stderr = '';
  uris: string[] = [];

  private constructor(readonly child: ChildProcess) {
    this.exited = once(child, 'close').then(([code]) => code as number | null);
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_KEPT);
    });
  }

  static async start(words: readonly string[], on?: WanHost): Promise<DaemonProcess> {
    const daemon = new DaemonProcess(spawnBlockferry(words, 'pipe', on));
    try {
      await daemon.#ready(words[0] ?? '');
    } catch (error) {
      daemon.kill();
      throw error;
    }
    return daemon;
  }

  #ready(what: string): Promise<void> {
    return new Promise((resolve, reject) => {
      let text = '';
      const timer = setTimeout(
        () =>
          reject(new Error(`blockferry ${what} is not ready after ${START_TIMEOUT_MS} ms: ${this.#stderr}`)),
        START_TIMEOUT_MS,
      );
      this.child.stdout!.setEncoding('utf8').on('data', (chunk: string) => {
        text += chunk;
        const line = /^ready(.*)\n/m.exec(text);
        if (line === null) return;
        clearTimeout(timer);
        this.uris = line[1]!.trim().split(' ');
        resolve();
      });
      void this.exited.then((code) => {
        clearTimeout(timer);
        reject(new Error(`blockferry ${what} ended with code ${code}: ${this.#stderr}`));
      });
    });
  }

  /** What it wrote to stderr lately. */
  get stderr(): string {
    return this.#stderr;
  }

  kill(): void {
    this.child.kill('SIGKILL');
  }

  /** SIGTERM, then SIGKILL; resolves with its exit code. */
  async stop(): Promise<number | null> {
    this.child.kill('SIGTERM');
    const timer = setTimeout(() => this.kill(), STOP_TIMEOUT_MS);
    const code = await this.exited;
    clearTimeout(timer);
    return code;
  }
}

export interface LabHostOptions {
  /** Folder of the test; the host gets one of its own in it. */
  folder: string;
  name: string;
  /** Where its daemon and machines run, and what their addresses are; default here, and loopback. */
  network?: WanHost;
  volumes?: { name: string; image: string; access?: string[]; connections?: number }[];
  vms?: MachineDefinition[];
  /** The configuration's `tls`. */
  tls?: Readonly<Record<string, unknown>>;
  /** More of the configuration. */
  more?: Readonly<Record<string, unknown>>;
}

export class LabHost {
  private constructor(
    readonly name: string,
    readonly folder: string,
    readonly daemon: DaemonProcess,
    readonly control: string,
    readonly client: ControlClient,
  ) {}

  static async start({
    folder,
    name,
    network,
    volumes = [],
    vms = [],
    tls,
    more = {},
  }: LabHostOptions): Promise<LabHost> {
    const home = join(folder, name);
    mkdirSync(home, { recursive: true });
    const control = join(home, 'c.sock');
    const config = join(home, 'host.yaml');
    const settings = {
      name,
      stateDir: join(home, 'state'),
      control,
      images: join(home, 'images'),
      run: join(home, 'run'),
      ...(network === undefined ? {} : { link: `${network.address}:0`, migrationAddress: network.address }),
      ...(tls === undefined ? {} : { tls }),
    };
    // The test's end is the machines' end too: no guest is given time to power off.
    writeFileSync(config, stringify({ ...settings, ...more, stopTimeoutSeconds: 0, volumes, vms }));
    const daemon = await DaemonProcess.start(['host', '--config', config], network);
    return new LabHost(name, home, daemon, control, new ControlClient(control));
  }

  /** Path of the image of a volume that arrived here. */
  async imageOf(volume: string): Promise<string> {
    const view = await this.client.volume(volume);
    if (view.phase === 'unavailable') throw new Error(view.error);
    return view.image;
  }

  /** The serial socket of a machine here, as soon as it has a process. */
  async serialPath(vm: string, stop: AbortSignal): Promise<string> {
    for (;;) {
      const machine = await this.client.machine(vm).catch(() => null);
      if (machine?.serialPath) return machine.serialPath;
      if (stop.aborted) throw new Error(`there is no machine ${vm} on host ${this.name}`);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  async stop(): Promise<number | null> {
    this.client.close();
    return this.daemon.stop();
  }
}
