/**
 * The servers that the comparison runs, each with its version, one process a face (plain, read-only, TLS). A process that ends is
 * started again at the same address before the next case: nbdkit 1.32.5 aborts on a FAST_ZERO it did not offer.
 */
import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { copyFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { formatNbdUri } from '../../../src/nbd/uri.js';
import { VERSION } from '../../../src/version.js';
import { DaemonProcess } from '../../lab/hosts.js';
import { Haggle } from './haggle.js';
import type { TargetUris } from './target.js';
import { Wire } from './wire.js';

export const SIZE = 80 << 20;
const START_TIMEOUT_MS = 10_000;
const POLL_MS = 10;

export interface Peer {
  readonly name: string;
  readonly version: string;
  readonly uris: TargetUris;
  /** Starts what has ended since. True: something had. */
  revive(): Promise<boolean>;
  stop(): Promise<void>;
}

/** One server process on a unix socket. */
class Face {
  #child: ChildProcess | null = null;
  #ended: Promise<unknown> = Promise.resolve();

  constructor(
    private readonly words: readonly string[],
    readonly socket: string,
  ) {}

  get running(): boolean {
    return this.#child !== null && this.#child.exitCode === null && this.#child.signalCode === null;
  }

  async start(): Promise<void> {
    rmSync(this.socket, { force: true });
    const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...this.words], { stdio: 'ignore' });
    this.#child = child;
    this.#ended = once(child, 'exit');
    const deadline = performance.now() + START_TIMEOUT_MS;
    while (!(await accepts(this.socket))) {
      if (!this.running || performance.now() > deadline)
        throw new Error(`${this.words.join(' ')} does not listen`);
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    }
  }

  /** Serves clients: a process that is dying still has a socket, and may take a while. */
  async greets(): Promise<boolean> {
    if (!this.running) return false;
    try {
      const wire = await Wire.connect({ kind: 'unix', path: this.socket });
      try {
        await Haggle.begin(wire, null);
      } finally {
        wire.close();
      }
      return true;
    } catch {
      return false;
    }
  }

  async stop(): Promise<void> {
    this.#child?.kill('SIGKILL');
    await this.#ended;
  }
}

async function accepts(path: string): Promise<boolean> {
  const socket = net.connect({ path });
  try {
    await once(socket, 'connect');
    return true;
  } catch {
    return false;
  } finally {
    socket.destroy();
  }
}

function uriOf(path: string, exportName: string): string {
  return formatNbdUri({ address: { kind: 'unix', path }, exportName });
}

function imageIn(folder: string, name: string): string {
  const image = join(folder, `${name}.img`);
  writeFileSync(image, '');
  truncateSync(image, SIZE);
  return image;
}

function versionOf(program: string, pattern: RegExp, ...words: string[]): string {
  return pattern.exec(execFileSync(program, words, { encoding: 'utf8' }))?.[1] ?? 'unknown';
}

async function facesOf(
  folder: string,
  name: string,
  version: string,
  command: (image: string, socket: string, kind: 'plain' | 'readOnly' | 'tls') => string[],
  exportName = '',
): Promise<Peer> {
  const faces = (['plain', 'readOnly', 'tls'] as const).map((kind) => {
    const label = `${name}-${kind}`;
    const socket = join(folder, `${label}.sock`);
    return new Face(command(imageIn(folder, label), socket, kind), socket);
  });
  const stop = async () => {
    await Promise.all(faces.map((face) => face.stop()));
  };
  try {
    for (const face of faces) await face.start();
  } catch (error) {
    await stop();
    throw error;
  }
  const [plain, readOnly, tls] = faces.map(({ socket }) => uriOf(socket, exportName)) as [
    string,
    string,
    string,
  ];
  return {
    name,
    version,
    uris: { uri: plain, readOnlyUri: readOnly, tlsUri: tls, tlsCertificates: folder },
    async revive() {
      let revived = false;
      for (const face of faces) {
        if (await face.greets()) continue;
        await face.stop();
        await face.start();
        revived = true;
      }
      return revived;
    },
    stop,
  };
}

/** Puts one certificate for everybody into a folder, in the layout of qemu and nbdkit. */
function certificatesIn(folder: string): string {
  const [key, certificate] = [join(folder, 'server-key.pem'), join(folder, 'server-cert.pem')];
  execFileSync(
    'openssl',
    [
      ...['req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', '2', '-subj', '/CN=localhost'],
      ...['-addext', 'basicConstraints=critical,CA:TRUE', '-keyout', key, '-out', certificate],
    ],
    { stdio: 'ignore' },
  );
  for (const name of ['ca-cert.pem', 'client-cert.pem']) copyFileSync(certificate, join(folder, name));
  copyFileSync(key, join(folder, 'client-key.pem'));
  return folder;
}

export async function blockferry(folder: string): Promise<Peer> {
  const daemons: DaemonProcess[] = [];
  const serve = async (name: string, ...options: string[]) => {
    const listen = ['--listen', `unix:${join(folder, `${name}.sock`)}`, '--state-dir', join(folder, name)];
    const words = ['serve', imageIn(folder, name), '--name', name, ...listen, '--log-level', 'silent'];
    const daemon = await DaemonProcess.start([...words, ...options]);
    daemons.push(daemon);
    return daemon.uris[0]!;
  };
  const certificates = certificatesIn(folder);
  const uris: TargetUris = {
    uri: await serve('disk'),
    readOnlyUri: await serve('still', '--read-only'),
    tlsUri: await serve('safe', '--tls', 'required', '--tls-certificates', certificates),
    tlsCertificates: certificates,
  };
  return {
    name: 'blockferry',
    version: VERSION,
    uris,
    revive: async () => {
      if (daemons.some(({ child }) => child.exitCode !== null)) throw new Error('blockferry has ended');
      return false;
    },
    stop: async () => {
      await Promise.all(daemons.map((daemon) => daemon.stop()));
    },
  };
}

export function nbdkit(folder: string): Promise<Peer> {
  const certificates = certificatesIn(folder);
  const extra = { plain: [], readOnly: ['-r'], tls: ['--tls=require', `--tls-certificates=${certificates}`] };
  const version = versionOf('nbdkit', /nbdkit ([\d.]+)/, '--version');
  // Without the filter it serves its one export under any name.
  const names = ['exportname=disk', 'exportname-strict=true', 'default-export=disk'];
  const command = (image: string, socket: string, kind: 'plain' | 'readOnly' | 'tls') => [
    ...['nbdkit', '-f', '-U', socket, ...extra[kind], '--filter=exportname', 'file', image, ...names],
  ];
  return facesOf(folder, 'nbdkit', version, command, 'disk');
}

export function qemuNbd(folder: string): Promise<Peer> {
  // sanity-check: one certificate is the authority's and the server's here.
  const options = 'endpoint=server,verify-peer=off,sanity-check=off';
  const creds = `tls-creds-x509,id=t,dir=${certificatesIn(folder)},${options}`;
  const extra = { plain: [], readOnly: ['-r'], tls: ['--object', creds, '--tls-creds', 't'] };
  const version = versionOf('qemu-nbd', /qemu-nbd ([\d.]+)/, '--version');
  return facesOf(folder, 'qemu-nbd', version, (image, socket, kind) => [
    ...['qemu-nbd', '-t', '-e', '1000', '-f', 'raw', '--discard=unmap', '-k', socket, ...extra[kind], image],
  ]);
}

export function nbdServer(folder: string): Promise<Peer> {
  const certificates = certificatesIn(folder);
  const version = versionOf('sh', /version ([\d.]+)/, '-c', 'nbd-server -V 2>&1 || true');
  const face = (image: string, socket: string, kind: 'plain' | 'readOnly' | 'tls') => {
    const authority = `cacertfile = ${join(certificates, 'ca-cert.pem')}\n`;
    const tls = `${authority}certfile = ${join(certificates, 'server-cert.pem')}\nkeyfile = ${join(certificates, 'server-key.pem')}\nforce_tls = true\n`;
    const config = `${socket}.conf`;
    writeFileSync(
      config,
      `[generic]\nunixsock = ${socket}\nallowlist = true\n${kind === 'tls' ? tls : ''}` +
        `[disk]\nexportname = ${image}\nflush = true\nfua = true\ntrim = true\nreadonly = ${kind === 'readOnly'}\n`,
    );
    return config;
  };
  return facesOf(
    folder,
    'nbd-server',
    version,
    // It serves one client in the foreground, more only as a daemon; in a process name space of its own that ends with us.
    (image, socket, kind) => [
      ...['unshare', ...(process.getuid?.() === 0 ? [] : ['-Ur']), '-p', '-f', '--kill-child', 'sh', '-c'],
      ...['nbd-server -C "$0" -p "$0.pid" && exec sleep infinity', face(image, socket, kind)],
    ],
    'disk',
  );
}
