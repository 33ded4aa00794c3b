/** The servers that are compared, each started as its users would: nothing switched off, nothing that loses data. */

import { execFileSync } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../errors.js';
import { WAIT_MS_MAX } from '../host/control/api.js';
import { ControlClient } from '../host/control/client.js';
import { controlSocketPath } from '../host/state-dir.js';
import { packageRoot } from '../native/index.js';
import { formatNbdUri, type NbdAddress } from '../nbd/uri.js';
import { VERSION } from '../version.js';
import {
  addressIn,
  freePort,
  ourLine,
  ourWords,
  type Place,
  Program,
  type RunningServer,
  running,
  shown,
} from './program.js';

const HANDOFF_TIMEOUT_MS = WAIT_MS_MAX;
const PID_TIMEOUT_MS = 10_000;
const POLL_MS = 5;
/** More than any load here opens. */
const CLIENTS_MAX = 64;

export interface ServerKind {
  name: string;
  ours: boolean;
  /** It makes its image itself, from the original. */
  brings?: boolean;
  /** Null if it is not installed. */
  version(): string | null;
  start(place: Place): Promise<RunningServer>;
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

/** With the commit, in a checkout. */
export function ourVersion(): string {
  try {
    const words = ['-C', packageRoot(), 'describe', '--always', '--dirty'];
    const commit = execFileSync('git', words, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] });
    return `${VERSION} (${commit.trim()})`;
  } catch {
    return VERSION;
  }
}

// ---- blockferry

const serve: ServerKind = {
  name: 'blockferry',
  ours: true,
  version: ourVersion,
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
  version: ourVersion,
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

export const nbdkit: ServerKind = {
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
  const deadline = performance.now() + PID_TIMEOUT_MS;
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
