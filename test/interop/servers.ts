/**
 * Other people's NBD servers, each on a unix socket in a directory of its own. They die with the test, and are stopped by
 * their process id.
 */

import { type ChildProcess, spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { formatNbdUri } from '../../src/nbd/uri.js';

export interface PeerServer {
  /** The default export. */
  readonly uri: string;
  readonly directory: string;
  /** Path of its unix socket. */
  readonly socket: string;
  uriOf(exportName: string): string;
  stop(): Promise<void>;
}

/** Starts a server that stays in the foreground; `command` says how, given its directory and socket. */
export async function startPeer(
  command: (directory: string, socket: string) => Promise<string[]> | string[],
): Promise<PeerServer> {
  const directory = await mkdtemp(join(tmpdir(), 'blockferry-peer-'));
  const path = join(directory, 'nbd.sock');
  const server = new Program(await command(directory, path));
  const stop = async () => {
    await server.stop();
    await rm(directory, { recursive: true, force: true });
  };
  if (!(await server.listensOn(path))) {
    await stop();
    throw new Error(`${server.words.join(' ')} does not listen: ${server.errors}`);
  }
  return { ...addressed(path), directory, stop };
}

/** Relays connections to `connect`'s sockets until it is closed. */
class Relay {
  readonly #sockets: net.Socket[] = [];
  readonly server: net.Server;

  constructor(connect: () => net.Socket | Promise<net.Socket>) {
    this.server = net.createServer({ allowHalfOpen: true, noDelay: true }, (client) => {
      this.#join(client, connect).catch((error: unknown) => client.destroy(error as Error));
    });
  }

  async #join(client: net.Socket, connect: () => net.Socket | Promise<net.Socket>): Promise<void> {
    client.on('error', () => {});
    const server = await connect();
    this.#sockets.push(client, server);
    for (const [from, to] of [
      [client, server],
      [server, client],
    ] as const) {
      from.pipe(to);
      from.on('error', () => to.destroy());
      from.on('close', () => to.destroySoon());
    }
  }

  async listen(where: net.ListenOptions): Promise<void> {
    await new Promise<void>((resolve) => this.server.listen(where, resolve));
  }

  async close(): Promise<void> {
    const closed = new Promise((resolve) => this.server.close(resolve));
    for (const socket of this.#sockets) socket.destroy();
    await closed;
  }
}

/** The server at a unix socket, over TCP on loopback: for those that would want a fixed port. */
export async function overTcp(socket: string): Promise<{ port: number; close(): Promise<void> }> {
  const relay = new Relay(() => net.connect({ path: socket, allowHalfOpen: true }));
  await relay.listen({ host: '127.0.0.1', port: 0 });
  return { port: (relay.server.address() as net.AddressInfo).port, close: () => relay.close() };
}

/**
 * nbd-server with exports of the given names, all of one image, and `generic` lines in its configuration. In the foreground it serves a
 * single client and ends, so there is one for each connection, behind a relay.
 */
export async function startNbdServer(
  image: (directory: string) => Promise<string>,
  names: readonly string[],
  generic = '',
): Promise<PeerServer> {
  const directory = await mkdtemp(join(tmpdir(), 'blockferry-peer-'));
  const path = join(directory, 'nbd.sock');
  const file = await image(directory);
  const sections = names.map(
    (name) => `[${name}]\nexportname = ${file}\nflush = true\nfua = true\ntrim = true\n`,
  );
  const programs: Program[] = [];
  const relay = new Relay(async () => {
    const inner = join(directory, `${programs.length}.sock`);
    const config = join(directory, `${programs.length}.conf`);
    const program = new Program(['nbd-server', '-d', '-C', config], false);
    programs.push(program);
    const head = `[generic]\nunixsock = ${inner}\nallowlist = true\n${generic}`;
    await writeFile(config, head + sections.join(''));
    program.start();
    if (!(await program.listensOn(inner))) throw new Error(`nbd-server does not listen: ${program.errors}`);
    return net.connect({ path: inner });
  });
  await relay.listen({ path });
  const stop = async () => {
    await relay.close();
    await Promise.all(programs.map((program) => program.stop()));
    await rm(directory, { recursive: true, force: true });
  };
  return { ...addressed(path), directory, stop };
}

function addressed(path: string): Pick<PeerServer, 'uri' | 'uriOf' | 'socket'> {
  const uriOf = (exportName: string) => formatNbdUri({ address: { kind: 'unix', path }, exportName });
  return { uri: uriOf(''), uriOf, socket: path };
}

class Program {
  #child: ChildProcess | null = null;
  #ended: Promise<void> = Promise.resolve();
  errors = '';

  constructor(
    readonly words: readonly string[],
    start = true,
  ) {
    if (start) this.start();
  }

  start(): void {
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...this.words], {
      stdio: ['ignore', 'ignore', 'pipe'],
    });
    child.stderr.on('data', (bytes: Buffer) => {
      this.errors += bytes;
    });
    this.#ended = new Promise((resolve) => child.once('exit', () => resolve()));
    this.#child = child;
  }

  async stop(): Promise<void> {
    this.#child?.kill('SIGKILL');
    await this.#ended;
  }

  /** Waits until the socket is listened on, without connecting: some servers serve a single client. */
  async listensOn(path: string): Promise<boolean> {
    const deadline = performance.now() + 10_000;
    while (performance.now() < deadline && this.#child?.exitCode === null) {
      if (isListening(path)) return true;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return false;
  }
}

/** Columns of /proc/net/unix: address, references, protocol, flags (0x10000: listening), type, state, inode, path. */
function isListening(path: string): boolean {
  return readFileSync('/proc/net/unix', 'latin1')
    .split('\n')
    .some((line) => line.endsWith(` ${path}`) && line.split(/\s+/)[3] === '00010000');
}
