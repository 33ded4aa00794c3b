/**
 * NBD URIs. Source: NetworkBlockDevice/nbd, doc/uri.md, and RFC 3986.
 *
 *     nbd://example.com:10809/export          nbd+unix:///export?socket=/run/disk.sock
 *
 * Parsed by hand, not with `URL`: that one resolves `..` and joins slashes, and an export name is free text.
 */

import { isIPv6 } from 'node:net';
import { BlockferryError } from '../errors.js';
import { DEFAULT_PORT, STRING_BYTES_MAX } from './constants.js';

export type NbdAddress =
  | { readonly kind: 'tcp'; readonly host: string; readonly port: number }
  | { readonly kind: 'unix'; readonly path: string };

export interface NbdUri {
  readonly address: NbdAddress;
  /** May be empty: the server's default export. At most 4096 bytes of UTF-8, no NUL. */
  readonly exportName: string;
}

/** Longest path a unix socket address holds on Linux (sun_path, without its NUL), bytes. */
export const SOCKET_PATH_BYTES_MAX = 107;

const URI = /^([a-z][a-z0-9+.-]*):\/\/([^/?#]*)(?:\/([^?#]*))?(?:\?([^#]*))?$/i;
const AUTHORITY = /^(?:\[([^\]]*)\]|([^:@[\]]*))(?::([0-9]*))?$/;

/** Parses an NBD URI. Throws BlockferryError 'address' when it is none, or needs TLS, which is not available yet. */
export function parseNbdUri(text: string): NbdUri {
  const match = URI.exec(text);
  if (match === null)
    throw refused(text, 'an NBD URI looks like nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=PATH');
  const [, scheme, authority, path, query] = match as unknown as [string, string, string, string?, string?];
  const exportName = decode(text, path ?? '');
  checkName(text, exportName);
  const parameters = parseQuery(text, query ?? '');
  switch (scheme.toLowerCase()) {
    case 'nbd':
      if (parameters.has('socket')) throw refused(text, "'socket' belongs to nbd+unix");
      return { address: parseAuthority(text, authority), exportName };
    case 'nbd+unix':
      if (authority !== '')
        throw refused(text, 'nbd+unix takes no host: write nbd+unix:///EXPORT?socket=PATH');
      return { address: parseSocket(text, parameters.get('socket')), exportName };
    case 'nbds':
    case 'nbds+unix':
      throw refused(text, 'TLS is not available yet');
    default:
      throw refused(text, `the scheme '${scheme}' is not nbd or nbd+unix`);
  }
}

/** The URI that `parseNbdUri` reads back as the same value. The default port and an empty export name are left out. */
export function formatNbdUri({ address, exportName }: NbdUri): string {
  const name = encode(exportName);
  if (address.kind === 'unix') return `nbd+unix:///${name}?socket=${encode(address.path)}`;
  const host = isIPv6(address.host)
    ? `[${address.host.replaceAll('%', '%25')}]`
    : encodeURIComponent(address.host);
  const port = address.port === DEFAULT_PORT ? '' : `:${address.port}`;
  return `nbd://${host}${port}${name === '' ? '' : `/${name}`}`;
}

function parseAuthority(text: string, authority: string): NbdAddress {
  if (authority.includes('@')) throw refused(text, 'a user name is for TLS, which is not available yet');
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
    if (key.startsWith('tls-')) throw refused(text, `'${key}' is for TLS, which is not available yet`);
    if (key !== 'socket') throw refused(text, `the parameter '${key}' is not known`);
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
