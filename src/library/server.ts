/** An NBD server of one's own devices: the parts of `blockferry serve` without volumes, state and control. */

import type { Logger } from 'pino';
import { BlockferryError } from '../errors.js';
import { parseListenAddress } from '../nbd/address.js';
import { STRING_BYTES_MAX } from '../nbd/constants.js';
import type { BlockDevice } from '../nbd/device.js';
import { ACCESS_RULES_MAX, type AccessRule, parseAccessRule, unprovable } from '../nbd/server/access.js';
import { defaultOrNamed, type ExportEntry } from '../nbd/server/exports.js';
import type { Listener } from '../nbd/server/listener.js';
import type { ServerTlsSettings } from '../nbd/tls.js';

const LISTEN_DEFAULT = ['127.0.0.1:10809'];

/** A device under a name. */
export interface NbdExport {
  /** 1 to 4096 bytes of UTF-8 without NUL. A client that asks for the empty name gets the only export, if there is only one. */
  readonly name: string;
  /** For a person's eyes, up to 4096 bytes of UTF-8 without NUL. Default: none. */
  readonly description?: string;
  /** All connections share it; its `release` is called at the end of each. It must stay usable until the server is closed. */
  readonly device: BlockDevice;
  /** Shown to and opened for clients behind TLS only. Default: false. */
  readonly tlsOnly?: boolean;
  /**
   * Who may do what, up to 256 rules as `read:address=10.0.0.0/8` or `write:certificate=host-a` (docs/access.md has them all). The
   * first one that fits counts, and whom none fits sees nothing. Default: everybody may do what the device allows.
   */
  readonly access?: readonly string[];
  /** Clients served at the same time, >= 1. Default: no limit but the server's. */
  readonly connectionsMax?: number;
}

/** What to serve, where and to whom. */
export interface NbdServerOptions {
  /** A function is asked anew for each client, so that exports may come and go; clients keep what they have chosen. */
  readonly exports: readonly NbdExport[] | (() => readonly NbdExport[]);
  /**
   * `unix:PATH`, `HOST:PORT`, `[V6]:PORT`, `fd:N` (a descriptor that listens already) or `stdio`, one or more. Port 0 lets the system
   * choose. The socket file of a server that is gone is replaced, a live one refused. Default: `127.0.0.1:10809`.
   */
  readonly listen?: readonly string[];
  /** Default: no TLS. */
  readonly tls?: ServerTlsSettings;
  /** A pino logger for faults of clients and devices. Nothing is logged per request. Default: silence. */
  readonly log?: Logger;
  /** False: clients are not told the names of exports. Default: true. */
  readonly listExports?: boolean;
  /** Clients served at the same time, >= 1; further ones are refused. Default: 1024. */
  readonly connectionsMax?: number;
  /** Clients that are choosing their export, >= 1; further ones are cut off. Default: 512. */
  readonly handshakesMax?: number;
  /** For a client to choose its export. Default: 10 000. */
  readonly handshakeTimeoutMs?: number;
  /** For requests in flight to finish when the server is closed; then their connections are cut. Default: 10 000. */
  readonly drainTimeoutMs?: number;
}

/** A server that listens. */
export class NbdServer {
  readonly #listener: Listener;

  private constructor(listener: Listener) {
    this.#listener = listener;
  }

  /**
   * Serves at all addresses, or at none and rejects: 'address' (cannot listen), 'tls' (credentials), 'usage' (exports or settings that
   * make no sense), 'not-found' when the native addon was not built. It keeps the process alive until it is closed.
   */
  static async listen(options: NbdServerOptions): Promise<NbdServer> {
    const { exports: given, tls, log, drainTimeoutMs } = options;
    const { listExports, connectionsMax, handshakesMax, handshakeTimeoutMs } = options;
    const limits = { connectionsMax, handshakesMax, handshakeTimeoutMs, drainTimeoutMs };
    for (const [name, value] of Object.entries(limits)) checkLimit(name, value);
    const addresses = (options.listen ?? LISTEN_DEFAULT).map(parseListenAddress);
    if (addresses.length === 0) throw new BlockferryError('usage', 'a server needs an address to listen on');
    const entries =
      typeof given === 'function' ? () => entriesOf(given(), tls) : constant(entriesOf(given, tls));
    const [{ Listener }, { startSession }, { pino }] = await Promise.all([
      import('../nbd/server/listener.js'),
      import('../nbd/server/session.js'), // native code
      import('pino'),
    ]);
    const listener = await Listener.open({
      addresses,
      exports: {
        list: entries,
        find: (name) => defaultOrNamed(entries(), name),
        shuttingDown: false,
      },
      startSession,
      log: log ?? pino({ level: 'silent' }),
      ...(tls === undefined ? {} : { tls }),
      ...(listExports === undefined ? {} : { listExports }),
      ...(connectionsMax === undefined ? {} : { connectionsMax }),
      ...(handshakesMax === undefined ? {} : { handshakesMax }),
      ...(handshakeTimeoutMs === undefined ? {} : { handshakeTimeoutMs }),
      ...(drainTimeoutMs === undefined ? {} : { sessionDrainTimeoutMs: drainTimeoutMs }),
    });
    return new NbdServer(listener);
  }

  /** NBD URIs of an export at every address that has one, those with TLS first. Default: the default export. */
  uris(exportName = ''): string[] {
    return this.#listener.addresses(exportName);
  }

  /** Clients that have chosen this export and are still here. */
  connections(exportName: string): number {
    return this.#listener.connections(exportName);
  }

  /** Resolves when the client on `stdio` is gone; never without `stdio` among the addresses. */
  get stdioClosed(): Promise<void> {
    return this.#listener.stdioClosed;
  }

  /**
   * Drains: no new clients, new requests get ESHUTDOWN, those in flight are finished within `drainTimeoutMs`, then all connections are
   * closed. Devices are left open. Never rejects; may be called again.
   */
  close(): Promise<void> {
    return this.#listener.close();
  }
}

function constant<T>(value: T): () => T {
  return () => value;
}

function entriesOf(exports: readonly NbdExport[], tls: ServerTlsSettings | undefined): ExportEntry[] {
  const names = new Set<string>();
  return exports.map((offer) => {
    const { name, description = '', device, tlsOnly = false, connectionsMax } = offer;
    checkString('the name of an export', name);
    checkString('the description of an export', description);
    if (name === '') throw new BlockferryError('usage', 'an export needs a name');
    if (names.has(name)) throw new BlockferryError('usage', `two exports have the name '${name}'`);
    names.add(name);
    const { size, readOnly, contexts, preferredBlock, multiConn } = device;
    const fastZero = device.fastZero ?? false;
    const facts = { size, readOnly, contexts, preferredBlock, multiConn, fastZero };
    checkLimit('connectionsMax', connectionsMax);
    return {
      ...{ name, description, ...facts, tlsOnly, open: () => device },
      ...(offer.access === undefined ? {} : { access: rulesOf(name, offer.access, tls) }),
      ...(connectionsMax === undefined ? {} : { connectionsMax }),
    };
  });
}

function rulesOf(
  name: string,
  texts: readonly string[],
  tls: ServerTlsSettings | undefined,
): readonly AccessRule[] {
  if (texts.length > ACCESS_RULES_MAX)
    throw new BlockferryError('usage', `export '${name}' has more than ${ACCESS_RULES_MAX} access rules`);
  const rules = texts.map(parseAccessRule);
  const kind = unprovable(rules, tls);
  if (kind !== undefined)
    throw new BlockferryError(
      'usage',
      `no client can prove the ${kind} that an access rule of export '${name}' asks for: see the option tls`,
    );
  return rules;
}

function checkLimit(name: string, value: number | undefined): void {
  if (value !== undefined && !(Number.isSafeInteger(value) && value >= 1))
    throw new BlockferryError('usage', `${name} is ${value}, not a whole number from 1 on`);
}

function checkString(what: string, text: string): void {
  if (text.includes('\0') || Buffer.byteLength(text) > STRING_BYTES_MAX)
    throw new BlockferryError('usage', `${what} is more than ${STRING_BYTES_MAX} bytes, or has a NUL`);
}
