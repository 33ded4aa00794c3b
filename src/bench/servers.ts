/** The servers that are compared, each started as its users would: nothing switched off, nothing that loses data. */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../errors.js';
import { WAIT_MS_MAX } from '../host/control/api.js';
import { ControlClient } from '../host/control/client.js';
import { controlSocketPath } from '../host/state-dir.js';
import { packageRoot } from '../native/index.js';
import { formatNbdUri, type NbdAddress } from '../nbd/uri.js';
import { VERSION } from '../version.js';

const START_TIMEOUT_MS = 10_000;
const STOP_TIMEOUT_MS = 10_000;
const HANDOFF_TIMEOUT_MS = WAIT_MS_MAX;
const POLL_MS = 5;
const STDERR_KEPT = 2000;
/** More than any load here opens. */
const CLIENTS_MAX = 64;

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

export interface ServerKind {
  name: string;
  ours: boolean;
  /** It makes its image itself, from the original. */
  brings?: boolean;
  /** Null if it is not installed. */
  version(): string | null;
  start(place: Place): Promise<RunningServer>;
}

/** Runs a server in the foreground until it is stopped; it dies with this process. */
class Program {
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

async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}

async function addressIn({ folder, transport }: Place, name = 'nbd'): Promise<NbdAddress> {
  if (transport === 'unix') return { kind: 'unix', path: join(folder, `${name}.sock`) };
  return { kind: 'tcp', host: '127.0.0.1', port: await freePort() };
}

function shown(words: readonly string[], { folder }: Place): string {
  return words.map((word) => word.replaceAll(folder, 'DIR')).join(' ');
}

async function running(words: readonly string[], address: NbdAddress, place: Place): Promise<RunningServer> {
  const program = new Program(words);
  await program.listens(address);
  return {
    uri: formatNbdUri({ address, exportName: '' }),
    pid: program.child.pid!,
    commandLine: shown(words, place),
    stop: () => program.stop(),
  };
}

/** The first thing in a program's first line that looks like a version. */
function versionOf(...words: [string, ...string[]]): string | null {
  try {
    const said = execFileSync(words[0], words.slice(1), {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    return /\d+(\.\d+)+/.exec(said)?.[0] ?? 'unknown';
  } catch {
    return null;
  }
}

// ---- blockferry

function ourWords(place: Place, address: NbdAddress, ...words: string[]): string[] {
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

function ourLine(words: readonly string[], place: Place): string {
  return shown(['blockferry', ...words.slice(2)], place);
}

const serve: ServerKind = {
  name: 'blockferry',
  ours: true,
  version: () => VERSION,
  async start(place) {
    const address = await addressIn(place);
    const words = ourWords(place, address, 'serve', place.image);
    return { ...(await running(words, address, place)), commandLine: ourLine(words, place) };
  },
};

const handedOff: ServerKind = {
  name: 'blockferry proxy, handed off',
  ours: true,
  brings: true,
  version: () => VERSION,
  async start(place) {
    const sourcePlace = { ...place, folder: join(place.folder, 'source') };
    const sourceAddress: NbdAddress = { kind: 'unix', path: join(place.folder, 'source.sock') };
    const source = await running(
      ourWords(sourcePlace, sourceAddress, 'serve', place.original, '--read-only'),
      sourceAddress,
      place,
    );
    try {
      const address = await addressIn(place);
      const words = ourWords(place, address, 'proxy', source.uri, place.image);
      const server = await running(words, address, place);
      const control = new ControlClient(controlSocketPath(join(place.folder, 'state'), 'disk'));
      try {
        const { done } = await control.waitHandoff('disk', HANDOFF_TIMEOUT_MS);
        if (!done) throw new BlockferryError('timeout', 'the proxy did not hand off');
      } catch (error) {
        await server.stop();
        throw error;
      } finally {
        control.close();
      }
      return { ...server, commandLine: ourLine(words, place) };
    } finally {
      await source.stop();
    }
  },
};

// ---- Peers

const nbdkit: ServerKind = {
  name: 'nbdkit file',
  ours: false,
  version: () => versionOf('nbdkit', '--version'),
  async start(place) {
    const address = await addressIn(place);
    const at =
      address.kind === 'unix' ? ['-U', address.path] : ['-i', address.host, '-p', String(address.port)];
    return running(['nbdkit', '-f', ...at, 'file', place.image], address, place);
  },
};

function qemuNbd(aio: 'threads' | 'io_uring'): ServerKind {
  return {
    name: `qemu-nbd ${aio}`,
    ours: false,
    version: () => versionOf('qemu-nbd', '--version'),
    async start(place) {
      const address = await addressIn(place);
      const at =
        address.kind === 'unix' ? ['-k', address.path] : ['-b', address.host, '-p', String(address.port)];
      const words = ['-t', '-e', String(CLIENTS_MAX), '-f', 'raw', '--cache=writeback', `--aio=${aio}`];
      return running(['qemu-nbd', ...words, ...at, place.image], address, place);
    },
  };
}

/** In the foreground it serves a single client, so it is left to go into the background; a shell sees to its end. */
const nbdServer: ServerKind = {
  name: 'nbd-server',
  ours: false,
  version: () => versionOf('nbd-server', '--version'),
  async start(place) {
    const address = await addressIn(place);
    const port = address.kind === 'tcp' ? address.port : await freePort();
    const config = join(place.folder, 'nbd-server.conf');
    const pidFile = join(place.folder, 'nbd-server.pid');
    const socket = address.kind === 'unix' ? `unixsock = ${address.path}\n` : '';
    writeFileSync(
      config,
      `[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nport = ${port}\n${socket}` +
        `[disk]\nexportname = ${place.image}\nflush = true\nfua = true\ntrim = true\n`,
    );
    const words = ['nbd-server', '-C', config, '-p', pidFile];
    // Also when we are killed: then the pipe ends.
    const script = '"$@" && read _; kill "$(cat "$0")"';
    const program = new Program(['sh', '-c', script, pidFile, ...words], 'pipe');
    await program.listens(address);
    return {
      uri: formatNbdUri({ address, exportName: 'disk' }),
      pid: await pidIn(pidFile),
      commandLine: shown(words, place),
      stop: () => program.stop(),
    };
  },
};

async function pidIn(path: string): Promise<number> {
  const deadline = performance.now() + START_TIMEOUT_MS;
  while (performance.now() < deadline) {
    try {
      const pid = Number.parseInt(readFileSync(path, 'latin1'), 10);
      if (pid > 0) return pid;
    } catch {
      // Not written yet.
    }
    await delay(POLL_MS);
  }
  throw new BlockferryError('bench', `nbd-server did not write ${path}`);
}

export const SERVERS: readonly ServerKind[] = [
  serve,
  handedOff,
  nbdkit,
  qemuNbd('threads'),
  qemuNbd('io_uring'),
  nbdServer,
];

// ---- For hits beside misses

/** An image behind a delay of each read; null without nbdkit. */
export async function delayedSource(
  folder: string,
  image: string,
  delayMs: number,
): Promise<RunningServer | null> {
  if (nbdkit.version() === null) return null;
  const address: NbdAddress = { kind: 'unix', path: join(folder, 'delayed.sock') };
  const words = ['nbdkit', '-f', '-U', address.path, '--filter=delay', 'file', image, `rdelay=${delayMs}ms`];
  return running(words, address, { folder, image, original: image, transport: 'unix' });
}

/** Our proxy, which fetches only what is read. */
export async function proxyOverSource(folder: string, source: RunningServer): Promise<RunningServer> {
  const image = join(folder, 'disk.img');
  const place: Place = { folder, image, original: image, transport: 'unix' };
  const address = await addressIn(place);
  const words = ourWords(place, address, 'proxy', source.uri, image, '--no-background');
  return { ...(await running(words, address, place)), commandLine: ourLine(words, place) };
}

/** nbdkit's, whose overlay is a temporary file. */
export async function cowOverSource(folder: string, source: RunningServer): Promise<RunningServer> {
  const place: Place = { folder, image: '', original: '', transport: 'unix' };
  const address: NbdAddress = { kind: 'unix', path: join(folder, 'nbd.sock') };
  const words = ['nbdkit', '-f', '-U', address.path, '--filter=cow', '-t', '64', 'nbd', source.uri];
  return running([...words, 'cow-on-read=true', 'shared=1'], address, place);
}
