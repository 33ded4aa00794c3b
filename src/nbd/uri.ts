/**
 * NBD URIs. Source: NetworkBlockDevice/nbd, doc/uri.md, and RFC 3986.
 *
 *     nbd://example.com:10809/export          nbd+unix:///export?socket=/run/disk.sock
 *     nbds://user@example.com/export?tls-psk-file=keys.psk        nbds+unix:///export?socket=/run/disk.sock&tls-certificates=DIR
 *
 * The parameters of nbds are libnbd's (nbd_connect_uri(3)): tls-certificates, tls-psk-file, tls-hostname, tls-verify-peer.
 *
 * Parsed by hand, not with `URL`: that one resolves `..` and joins slashes, and an export name is free text.
 */

import { isIPv6 } from 'node:net';
import { BlockferryError } from '../errors.js';
import { DEFAULT_PORT, STRING_BYTES_MAX } from './constants.js';
import type { ClientTlsSettings } from './tls.js';

/** Where a server is: a host (name or IP address without brackets) and port 1..65535, or the path of a socket. */
export type NbdAddress =
  | { readonly kind: 'tcp'; readonly host: string; readonly port: number }
  | { readonly kind: 'unix'; readonly path: string };

/** What an NBD URI says. */
export interface NbdUri {
  readonly address: NbdAddress;
  /** May be empty: the server's default export. At most 4096 bytes of UTF-8, no NUL. */
  readonly exportName: string;
  /** There with nbds and nbds+unix: TLS is a must. What the URI leaves open is left out. */
  readonly tls?: ClientTlsSettings;
}

/** Longest path a unix socket address holds on Linux (sun_path, without its NUL), bytes. */
export const SOCKET_PATH_BYTES_MAX = 107;

const URI = /^([a-z][a-z0-9+.-]*):\/\/([^/?#]*)(?:\/([^?#]*))?(?:\?([^#]*))?$/i;
const PARAMETERS: ReadonlySet<string> = new Set([
  'socket',
  'tls-certificates',
  'tls-psk-file',
  'tls-hostname',
  'tls-verify-peer',
]);
const TRUTH: ReadonlyMap<string, boolean> = new Map([
  ['true', true],
  ['1', true],
  ['false', false],
  ['0', false],
]);
const AUTHORITY = /^(?:\[([^\]]*)\]|([^:@[\]]*))(?::([0-9]*))?$/;

/** Parses an NBD URI. Throws BlockferryError 'address' when it is none. */
export function parseNbdUri(text: string): NbdUri {
  const match = URI.exec(text);
  if (match === null)
    throw refused(text, 'an NBD URI looks like nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH');
  const [, scheme, authority, path, query] = match as unknown as [string, string, string, string?, string?];
  const exportName = decode(text, path ?? '');
  checkName(text, exportName);
  const parameters = parseQuery(text, query ?? '');
  const kind = /^nbd(s?)(\+unix)?$/.exec(scheme.toLowerCase());
  if (kind === null)
    throw refused(text, `the scheme '${scheme}' is not nbd or nbd+unix, nor nbds or nbds+unix`);
  const at = authority.lastIndexOf('@');
  const host = authority.slice(at + 1);
  const tls = parseTls(text, kind[1] !== '', at < 0 ? undefined : authority.slice(0, at), parameters);
  if (kind[2] === undefined) {
    if (parameters.has('socket')) throw refused(text, "'socket' belongs to nbd+unix");
    return { address: parseAuthority(text, host), exportName, ...tls };
  }
  if (host !== '') throw refused(text, 'nbd+unix takes no host: write nbd+unix:///EXPORT?socket=PATH');
  return { address: parseSocket(text, parameters.get('socket')), exportName, ...tls };
}

/** The URI that `parseNbdUri` reads back as the same value. The default port and an empty export name are left out. */
export function formatNbdUri({ address, exportName, tls }: NbdUri): string {
  const name = encode(exportName);
  const scheme = tls === undefined ? 'nbd' : 'nbds';
  const user = tls?.username === undefined ? '' : `${encodeURIComponent(tls.username)}@`;
  const query = formatTls(tls);
  if (address.kind === 'unix') {
    query.unshift(`socket=${encode(address.path)}`);
    return `${scheme}+unix://${user}/${name}?${query.join('&')}`;
  }
  const host = isIPv6(address.host)
    ? `[${address.host.replaceAll('%', '%25')}]`
    : encodeURIComponent(address.host);
  const port = address.port === DEFAULT_PORT ? '' : `:${address.port}`;
  const path = `${name === '' ? '' : `/${name}`}${query.length === 0 ? '' : `?${query.join('&')}`}`;
  return `${scheme}://${user}${host}${port}${path}`;
}

function formatTls(tls: ClientTlsSettings | undefined): string[] {
  if (tls === undefined) return [];
  const { certificates, pskFile, hostname, verifyPeer } = tls;
  const pairs = [
    ['tls-certificates', certificates],
    ['tls-psk-file', pskFile],
    ['tls-hostname', hostname],
    ['tls-verify-peer', verifyPeer === undefined ? undefined : String(verifyPeer)],
  ] as const;
  return pairs.flatMap(([key, value]) => (value === undefined ? [] : [`${key}=${encode(value)}`]));
}

/** What a URI says of TLS; nothing if it is none with TLS. */
function parseTls(
  text: string,
  secure: boolean,
  user: string | undefined,
  parameters: ReadonlyMap<string, string>,
): { tls?: ClientTlsSettings } {
  if (!secure) {
    if (user !== undefined) throw refused(text, 'a user name is for TLS: write nbds');
    for (const key of parameters.keys())
      if (key.startsWith('tls-')) throw refused(text, `'${key}' is for TLS: write nbds`);
    return {};
  }
  const word = (key: string): string | undefined => {
    const value = parameters.get(key);
    if (value === '' || value?.includes('\0')) throw refused(text, `'${key}' must say something`);
    return value;
  };
  if (user?.includes(':')) throw refused(text, 'a password has no place in it');
  const username = user === undefined ? undefined : decode(text, user);
  const certificates = word('tls-certificates');
  const pskFile = word('tls-psk-file');
  const hostname = word('tls-hostname');
  if (certificates !== undefined && pskFile !== undefined)
    throw refused(text, "'tls-certificates' and 'tls-psk-file' rule each other out");
  const verify = word('tls-verify-peer');
  const verifyPeer = verify === undefined ? undefined : TRUTH.get(verify.toLowerCase());
  if (verify !== undefined && verifyPeer === undefined)
    throw refused(text, "'tls-verify-peer' is either true or false");
  return {
    tls: {
      ...(username === undefined || username === '' ? {} : { username }),
      ...(certificates === undefined ? {} : { certificates }),
      ...(pskFile === undefined ? {} : { pskFile }),
      ...(hostname === undefined ? {} : { hostname }),
      ...(verifyPeer === undefined ? {} : { verifyPeer }),
    },
  };
}

function parseAuthority(text: string, authority: string): NbdAddress {
  const match = AUTHORITY.exec(authority);
  if (match === null) throw refused(text, `'${authority}' is not HOST, HOST:PORT or [V6]:PORT`);
  const [, bracketed, name, digits] = match as unknown as [string, string?, string?, string?];
  const port = digits === undefined || digits === '' ? DEFAULT_PORT : Number(digits);
  if (port < 1 || port > 65535) throw refused(text, `the port ${digits} is not in 1..65535`);
  if (bracketed !== undefined) {
    const host = decode(text, bracketed);
    if (!isIPv6(host)) throw refused(text, `'${bracketed}' is not an IPv6 address`);
    return { kind: 'tcp', host, port };
  }
  const host = decode(text, name ?? '');
  if (host.includes('\0') || host.length > 255) throw refused(text, 'the host name is not one');
  return { kind: 'tcp', host: host === '' ? 'localhost' : host, port };
}

function parseSocket(text: string, path: string | undefined): NbdAddress {
  if (path === undefined || path === '') throw refused(text, "nbd+unix needs '?socket=PATH'");
  // A leading NUL names a socket of the abstract namespace; anywhere else it would cut the path short.
  if (path.includes('\0', 1)) throw refused(text, 'the socket path contains a NUL byte');
  if (Buffer.byteLength(path) > SOCKET_PATH_BYTES_MAX) {
    throw refused(text, `the socket path is longer than ${SOCKET_PATH_BYTES_MAX} bytes`);
  }
  return { kind: 'unix', path };
}

function parseQuery(text: string, query: string): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const pair of query.split('&')) {
    if (pair === '') continue;
    const equals = pair.indexOf('=');
    const key = decode(text, equals < 0 ? pair : pair.slice(0, equals));
    const value = decode(text, equals < 0 ? '' : pair.slice(equals + 1));
    if (key.startsWith('x-')) continue;
    if (!PARAMETERS.has(key)) throw refused(text, `the parameter '${key}' is not known`);
    if (parameters.has(key)) throw refused(text, `'${key}' is given twice`);
    parameters.set(key, value);
  }
  return parameters;
}

function checkName(text: string, name: string): void {
  if (name.includes('\0')) throw refused(text, 'the export name contains a NUL character');
  if (Buffer.byteLength(name) > STRING_BYTES_MAX) {
    throw refused(text, `the export name is longer than ${STRING_BYTES_MAX} bytes`);
  }
}

function decode(text: string, part: string): string {
  try {
    return decodeURIComponent(part);
  } catch (cause) {
    throw refused(text, `'${part}' is not percent-encoded UTF-8`, cause);
  }
}

/** '/' may stand for itself in a path as well as in a query (RFC 3986, sections 3.3 and 3.4). */
function encode(part: string): string {
  return encodeURIComponent(part).replaceAll('%2F', '/');
}

function refused(text: string, why: string, cause?: unknown): BlockferryError {
  const shown = text.length > 200 ? `${text.slice(0, 200)}...` : text;
  return new BlockferryError('address', `cannot use '${shown}' as an NBD URI: ${why}`, { cause });
}
