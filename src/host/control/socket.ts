/** Control sockets in the file system: a stale one is replaced, a live one refused. */

import { lstatSync, readdirSync, unlinkSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { BlockferryError, messageOf } from '../../errors.js';

/** What the kernel's sockaddr_un holds, less the closing NUL. */
const SOCKET_PATH_BYTES_MAX = 107;
const PROBE_TIMEOUT_MS = 2000;
const SOCKETS_LISTED_MAX = 4096;

/** Whether something accepts connections at the unix socket `path`. A file that is no socket is not alive. */
export function isAlive(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = createConnection({ path });
    const done = (alive: boolean): void => {
      clearTimeout(timer);
      socket.destroy();
      resolve(alive);
    };
    const timer = setTimeout(() => done(true), PROBE_TIMEOUT_MS);
    socket.once('connect', () => done(true));
    // A full backlog is a sign of life as well.
    socket.once('error', (error: NodeJS.ErrnoException) => done(error.code === 'EAGAIN'));
  });
}

/** Makes `path` free to listen on. Fails with 'address' when a daemon answers there, or when it is no socket. */
export async function clearStaleSocket(path: string): Promise<void> {
  if (Buffer.byteLength(path) > SOCKET_PATH_BYTES_MAX) {
    throw new BlockferryError(
      'address',
      `${path} is too long for a unix socket (${SOCKET_PATH_BYTES_MAX} bytes): use a shorter folder`,
    );
  }
  try {
    if (!lstatSync(path).isSocket()) {
      throw new BlockferryError(
        'address',
        `${path} is there and no socket: remove it or choose another path`,
      );
    }
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    if (error instanceof BlockferryError) throw error;
    throw new BlockferryError('address', `cannot look at ${path}: ${messageOf(error)}`, { cause: error });
  }
  if (await isAlive(path)) {
    throw new BlockferryError(
      'address',
      `a daemon already answers at ${path}: stop it or choose another path`,
    );
  }
  try {
    unlinkSync(path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
      throw new BlockferryError('address', `cannot remove the stale socket ${path}: ${messageOf(error)}`, {
        cause: error,
      });
    }
  }
}

/** Control sockets of the daemons that are alive on this state folder. */
export async function liveControlSockets(stateDir: string): Promise<string[]> {
  const folder = join(stateDir, 'control');
  let names: string[];
  try {
    names = readdirSync(folder);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw new BlockferryError('control', `cannot list daemons in ${folder}: ${messageOf(error)}`, {
      cause: error,
    });
  }
  const paths = names
    .filter((name) => name.endsWith('.sock'))
    .sort()
    .slice(0, SOCKETS_LISTED_MAX)
    .map((name) => join(folder, name));
  const alive = await Promise.all(paths.map(isAlive));
  return paths.filter((_, index) => alive[index]);
}
