/** Listening sockets: opened at an address, with what is needed to do it safely, and known by where they really are. */
import { lstatSync, readFileSync, readlinkSync, type Stats, unlinkSync } from 'node:fs';
import net from 'node:net';
import { dirname, resolve } from 'node:path';
import { BlockferryError, messageOf } from '../../errors.js';
import { formatListenAddress, type ListenAddress } from '../address.js';
import { KEEPALIVE_IDLE_MS } from '../constants.js';

const NO_FOLDER = 'the folder does not exist: create it first';

/** Tries at a unix path: another daemon may be replacing the same stale socket. */
const UNIX_BIND_ATTEMPTS = 3;

export interface BoundServer {
  readonly server: net.Server;
  /** Where it is: the port the system chose, the path behind a descriptor; undefined for a socket without a name. */
  readonly bound: ListenAddress | undefined;
}

/**
 * Listens at an address (not stdio). Throws 'address'. A unix socket nobody answers at is replaced, anything else at that
 * path is left alone; the path of a socket opened here goes when the server is closed.
 * Its connections are half-open when the client ends its side: replies still under way can be sent.
 */
export async function bind(
  address: Exclude<ListenAddress, { kind: 'stdio' }>,
  accept: (socket: net.Socket) => void,
): Promise<BoundServer> {
  switch (address.kind) {
    case 'tcp': {
      const server = await listen(address, { host: address.host, port: address.port }, accept);
      return { server, bound: tcpAddressOf(server) };
    }
    case 'unix': {
      const server = await bindUnix(address.path, accept);
      return { server, bound: { kind: 'unix', path: resolve(address.path) } };
    }
    case 'fd': {
      const server = await listen(address, { fd: address.fd }, accept);
      return { server, bound: tcpAddressOf(server) ?? unixAddressOf(address.fd) };
    }
  }
}

async function bindUnix(path: string, accept: (socket: net.Socket) => void): Promise<net.Server> {
  const address: ListenAddress = { kind: 'unix', path };
  for (let attempt = 1; ; attempt++) {
    try {
      return await listen(address, { path }, accept);
    } catch (error) {
      if (causeCode(error) !== 'EADDRINUSE' || attempt === UNIX_BIND_ATTEMPTS) throw error;
    }
    await removeStaleSocket(path);
  }
}

/** Removes the socket at `path` if nobody listens there any more; throws if somebody does or if it is something else. */
async function removeStaleSocket(path: string): Promise<void> {
  const found = statOf(path);
  if (found === undefined) return;
  if (!found.isSocket())
    throw refused(path, 'there is a file that is no socket: move it away or choose another path');
  const answer = await knock(path);
  if (answer === 'connected')
    throw refused(path, 'another server is listening there: stop it or choose another path');
  if (answer === 'ENOENT') return;
  if (answer !== 'ECONNREFUSED')
    throw refused(
      path,
      `there is a socket and it cannot be told whether it is in use (${answer}): remove it or choose another path`,
    );
  // Not the one that was tried: somebody else replaced it meanwhile. Leave it, and find out about that one.
  const now = statOf(path);
  if (now?.ino !== found.ino || now.dev !== found.dev) return;
  try {
    unlinkSync(path);
  } catch (error) {
    if (causeOf(error)?.code !== 'ENOENT')
      throw refused(path, `the socket of a server that is gone cannot be removed: ${messageOf(error)}`);
  }
}

/** 'connected', or the system's code for why not. */
function knock(path: string): Promise<string> {
  return new Promise((resolveAnswer) => {
    const socket = net.connect(path);
    socket.once('connect', () => {
      socket.destroy();
      resolveAnswer('connected');
    });
    socket.once('error', (error: NodeJS.ErrnoException) => resolveAnswer(error.code ?? error.message));
  });
}

function listen(
  address: ListenAddress,
  options: net.ListenOptions & { fd?: number },
  accept: (socket: net.Socket) => void,
): Promise<net.Server> {
  return new Promise((resolveServer, reject) => {
    const server = net.createServer(
      { allowHalfOpen: true, noDelay: true, keepAlive: true, keepAliveInitialDelay: KEEPALIVE_IDLE_MS },
      accept,
    );
    const failed = (error: NodeJS.ErrnoException) => {
      reject(
        new BlockferryError(
          'address',
          `cannot listen on ${formatListenAddress(address)}: ${reasonOf(address, error)}`,
          { cause: error },
        ),
      );
    };
    server.once('error', failed);
    server.listen(options, () => {
      server.off('error', failed);
      resolveServer(server);
    });
  });
}

function reasonOf(address: ListenAddress, error: NodeJS.ErrnoException): string {
  if (address.kind === 'fd') return `descriptor ${address.fd} is no listening socket (${error.code})`;
  switch (error.code) {
    case 'EADDRINUSE':
      return address.kind === 'unix'
        ? 'the path is taken: choose another one'
        : 'the port is taken: stop the server that has it or choose another port';
    case 'EACCES':
      // What libuv makes of a folder that is not there, for unix sockets.
      return address.kind === 'unix' && statOf(dirname(address.path)) === undefined
        ? NO_FOLDER
        : 'permission denied: choose a place this user may use';
    case 'EADDRNOTAVAIL':
      return 'this machine does not have that address';
    case 'ENOTFOUND':
    case 'EAI_AGAIN':
      return 'the host name is not known here';
    case 'ENOENT':
      return NO_FOLDER;
    default:
      return error.message;
  }
}

function tcpAddressOf(server: net.Server): ListenAddress | undefined {
  const address = server.address();
  if (address === null || typeof address === 'string') return undefined;
  return { kind: 'tcp', host: address.address, port: address.port };
}

/** The path a listening descriptor was bound to by somebody else. Source: proc(5), /proc/net/unix. */
function unixAddressOf(fd: number): ListenAddress | undefined {
  try {
    const inode = /^socket:\[(\d+)\]$/.exec(readlinkSync(`/proc/self/fd/${fd}`))?.[1];
    for (const line of readFileSync('/proc/self/net/unix', 'utf8').split('\n')) {
      const fields = /^\S+ \S+ \S+ \S+ \S+ \S+ +(?<inode>\d+) (?<path>\/.*)$/.exec(line)?.groups;
      if (fields !== undefined && fields.inode === inode) return { kind: 'unix', path: fields.path! };
    }
  } catch {
    // Without /proc the socket serves all the same; only its name stays unknown.
  }
  return undefined;
}

function statOf(path: string): Stats | undefined {
  return lstatSync(path, { throwIfNoEntry: false });
}

function causeOf(error: unknown): NodeJS.ErrnoException | undefined {
  return error instanceof Error ? error : undefined;
}

function causeCode(error: unknown): string | undefined {
  return error instanceof BlockferryError ? causeOf(error.cause)?.code : undefined;
}

function refused(path: string, why: string): BlockferryError {
  return new BlockferryError('address', `cannot listen on unix:${path}: ${why}`);
}
