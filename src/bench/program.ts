/** Programs that serve: started where they are to serve, awaited, and stopped; they die with this process. */

import { type ChildProcess, spawn } from 'node:child_process';
import net from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../errors.js';
import { packageRoot } from '../native/index.js';
import { formatNbdUri, type NbdAddress } from '../nbd/uri.js';

const START_TIMEOUT_MS = 10_000;
const STOP_TIMEOUT_MS = 10_000;
const POLL_MS = 5;
const STDERR_KEPT = 2000;

/** What a server is to serve, and where. */
export interface Place {
  /** Its own, for whatever it needs. */
  folder: string;
  /** Its own image; not there if it `brings` one. */
  image: string;
  /** The same content, for reading only. */
  original: string;
  transport: 'unix' | 'tcp';
}

export interface RunningServer {
  uri: string;
  /** Of the process whose costs, with its descendants', are the server's. */
  pid: number;
  /** As it was started; its folder is called DIR. */
  commandLine: string;
  stop(): Promise<void>;
}

/** Runs a server in the foreground until it is stopped; it dies with this process. */
export class Program {
  readonly child: ChildProcess;
  readonly #ended: Promise<void>;
  #stderr = '';

  constructor(
    readonly words: readonly string[],
    stdin: 'ignore' | 'pipe' = 'ignore',
  ) {
    this.child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...words], {
      stdio: [stdin, 'ignore', 'pipe'],
      env: { ...process.env, LISTEN_FDS: undefined, LISTEN_PID: undefined },
    });
    this.#ended = new Promise((resolve) => {
      this.child.once('exit', () => resolve());
      this.child.once('error', (error) => {
        this.#stderr = error.message;
        resolve();
      });
    });
    this.child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_KEPT);
    });
  }

  get #running(): boolean {
    return this.child.pid !== undefined && this.child.exitCode === null && this.child.signalCode === null;
  }

  /** Waits until connections are accepted; else it is stopped, and its last words are thrown. */
  async listens(address: NbdAddress): Promise<void> {
    const deadline = performance.now() + START_TIMEOUT_MS;
    while (this.#running && performance.now() < deadline) {
      if (await accepts(address)) return;
      await delay(POLL_MS);
    }
    await this.stop();
    const said = this.#stderr.trim().split('\n').at(-1) ?? '';
    throw new BlockferryError('bench', `${this.words[0]} does not start: ${said}`);
  }

  async stop(): Promise<void> {
    if (this.child.stdin === null) this.child.kill('SIGTERM');
    else this.child.stdin.end();
    const timer = setTimeout(() => this.child.kill('SIGKILL'), STOP_TIMEOUT_MS);
    await this.#ended;
    clearTimeout(timer);
  }
}

function accepts(address: NbdAddress): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect(address.kind === 'unix' ? { path: address.path } : address);
    const done = (yes: boolean) => {
      socket.destroy();
      resolve(yes);
    };
    socket.once('connect', () => done(true));
    socket.once('error', () => done(false));
  });
}

export async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

export async function addressIn({ folder, transport }: Place, name = 'nbd'): Promise<NbdAddress> {
  if (transport === 'unix') return { kind: 'unix', path: join(folder, `${name}.sock`) };
  return { kind: 'tcp', host: '127.0.0.1', port: await freePort() };
}

export function shown(words: readonly string[], { folder }: Place): string {
  return words.map((word) => word.replaceAll(folder, 'DIR')).join(' ');
}

/** Starts a server in the foreground, which serves its default export there. */
export async function running(
  words: readonly string[],
  address: NbdAddress,
  place: Place,
): Promise<RunningServer> {
  const program = new Program(words);
  await program.listens(address);
  return {
    uri: formatNbdUri({ address, exportName: '' }),
    pid: program.child.pid!,
    commandLine: shown(words, place),
    stop: () => program.stop(),
  };
}

/** The words of a command of ours that serves the volume "disk". */
export function ourWords(place: Place, address: NbdAddress, ...words: string[]): string[] {
  const listen = address.kind === 'unix' ? `unix:${address.path}` : `${address.host}:${address.port}`;
  const common = ['--name', 'disk', '--listen', listen, '--state-dir', join(place.folder, 'state')];
  return [
    process.execPath,
    join(packageRoot(), 'bin/blockferry'),
    ...words,
    ...common,
    '--log-level',
    'warn',
  ];
}

/** As a person would type it. */
export function ourLine(words: readonly string[], place: Place): string {
  return shown(['blockferry', ...words.slice(2)], place);
}
