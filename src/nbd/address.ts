/** Addresses a server listens on, as the command line writes them, and the NBD URIs under which clients find it there. */
import { isIP, isIPv6 } from 'node:net';
import { BlockferryError } from '../errors.js';
import { DEFAULT_PORT } from './constants.js';

export type ListenAddress =
  | { kind: 'unix'; path: string }
  /** `host` is a name or an IP address without brackets; port 0 lets the system choose. */
  | { kind: 'tcp'; host: string; port: number }
  /** A descriptor that listens already (socket activation). */
  | { kind: 'fd'; fd: number }
  /** One session over standard input and output. */
  | { kind: 'stdio' };

export const DEFAULT_LISTEN_ADDRESS: ListenAddress = { kind: 'tcp', host: '127.0.0.1', port: DEFAULT_PORT };

/** Longest path of a unix socket, bytes. Source: unix(7), sun_path with its final NUL. */
const UNIX_PATH_BYTES_MAX = 107;
/** First descriptor of socket activation. Source: sd_listen_fds(3). */
const ACTIVATED_FD_FIRST = 3;
const ACTIVATED_FDS_MAX = 64;

/** Parses ADDR: `unix:PATH`, `HOST:PORT`, `[V6]:PORT`, `fd:N` or `stdio`. Throws 'address'. */
export function parseListenAddress(text: string): ListenAddress {
  if (text === 'stdio') return { kind: 'stdio' };
  if (text.startsWith('unix:')) return { kind: 'unix', path: checkedUnixPath(text.slice('unix:'.length)) };
  if (text.startsWith('fd:')) {
    const fd = decimal(text.slice('fd:'.length), 0x7fffffff);
    if (fd === undefined) throw malformed(text, 'fd: wants the number of an open descriptor, as in fd:3');
    return { kind: 'fd', fd };
  }
  const bracketed = /^\[(?<host>[^\]]*)\]:(?<port>.*)$/.exec(text)?.groups;
  if (bracketed !== undefined) {
    if (!isIPv6(bracketed.host!))
      throw malformed(text, 'brackets are for an IPv6 address, as in [::1]:10809');
    return { kind: 'tcp', host: bracketed.host!, port: checkedPort(text, bracketed.port!) };
  }
  const colon = text.lastIndexOf(':');
  if (colon < 0) throw malformed(text, 'write unix:PATH, HOST:PORT, [V6]:PORT, fd:N or stdio');
  const host = text.slice(0, colon);
  if (host.includes(':')) throw malformed(text, 'an IPv6 address is written in brackets, as in [::1]:10809');
  if (!/^[A-Za-z0-9._-]+$/.test(host))
    throw malformed(text, 'HOST is a name or an address, as in 127.0.0.1:10809');
  return { kind: 'tcp', host, port: checkedPort(text, text.slice(colon + 1)) };
}

/** As `parseListenAddress` reads it. */
export function formatListenAddress(address: ListenAddress): string {
  switch (address.kind) {
    case 'unix':
      return `unix:${address.path}`;
    case 'tcp':
      return `${bracketed(address.host)}:${address.port}`;
    case 'fd':
      return `fd:${address.fd}`;
    case 'stdio':
      return 'stdio';
  }
}

/**
 * The NBD URI of the export `name` (empty: the default export) at an address. Descriptors and stdio have none. `secure`: with TLS,
 * by a certificate of `hostname` if it is not the address's.
 * Source: NetworkBlockDevice/nbd, doc/uri.md.
 */
export function exportUri(
  address: ListenAddress,
  name: string,
  secure?: { readonly hostname: string | undefined },
): string | undefined {
  const scheme = secure === undefined ? 'nbd' : 'nbds';
  const named = secure?.hostname === undefined ? '' : `tls-hostname=${encodeURIComponent(secure.hostname)}`;
  // A name may hold slashes; a leading one must not be taken for an authority, so all of them are encoded.
  const path = encodeURIComponent(name);
  switch (address.kind) {
    case 'unix':
      return `${scheme}+unix:///${path}?socket=${encodeURIComponent(address.path).replaceAll('%2F', '/')}${named && `&${named}`}`;
    case 'tcp':
      return `${scheme}://${bracketed(address.host).replace('%', '%25')}:${address.port}/${path}${named && `?${named}`}`;
    case 'fd':
    case 'stdio':
      return undefined;
  }
}

/**
 * The descriptors that a service manager (systemd, nbdinfo -- [ ... ]) opened for the process `pid`, from LISTEN_PID and
 * LISTEN_FDS; none if the variables are not for us. They are taken out of `env`, so that no child believes them to be its own.
 * Source: sd_listen_fds(3). Throws 'address' when they are for us and make no sense.
 */
export function activatedAddresses(env: NodeJS.ProcessEnv, pid: number): ListenAddress[] {
  const { LISTEN_PID: forPid, LISTEN_FDS: count } = env;
  if (forPid === undefined || count === undefined || forPid !== String(pid)) return [];
  delete env.LISTEN_PID;
  delete env.LISTEN_FDS;
  delete env.LISTEN_FDNAMES;
  const fds = decimal(count, ACTIVATED_FDS_MAX);
  if (fds === undefined)
    throw new BlockferryError(
      'address',
      `LISTEN_FDS=${JSON.stringify(count)} is not a number of sockets: at most ${ACTIVATED_FDS_MAX} can be taken over`,
    );
  return Array.from({ length: fds }, (_, index) => ({ kind: 'fd', fd: ACTIVATED_FD_FIRST + index }));
}

function bracketed(host: string): string {
  return isIP(host) === 6 ? `[${host}]` : host;
}

function checkedUnixPath(path: string): string {
  if (path === '')
    throw malformed('unix:', 'unix: wants the path of a socket, as in unix:/run/blockferry.sock');
  if (path.includes('\0')) throw malformed(`unix:${path}`, 'a path has no NUL');
  const bytes = Buffer.byteLength(path);
  if (bytes > UNIX_PATH_BYTES_MAX)
    throw malformed(
      `unix:${path}`,
      `the system allows ${UNIX_PATH_BYTES_MAX} bytes for a socket's path and this one has ${bytes}: choose a shorter one`,
    );
  return path;
}

function checkedPort(address: string, text: string): number {
  const port = decimal(text, 65_535);
  if (port === undefined) throw malformed(address, 'PORT is a number up to 65535');
  return port;
}

function decimal(text: string, max: number): number | undefined {
  if (!/^[0-9]{1,10}$/.test(text)) return undefined;
  const value = Number(text);
  return value <= max ? value : undefined;
}

function malformed(address: string, advice: string): BlockferryError {
  return new BlockferryError('address', `cannot listen on ${JSON.stringify(address)}: ${advice}`);
}
