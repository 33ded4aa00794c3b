/** An NBD server of one's own devices: the parts of `blockferry serve` without volumes, state and control. */

import type { Logger } from 'pino';
import { BlockferryError } from '../errors.js';
import { parseListenAddress } from '../nbd/address.js';
import { STRING_BYTES_MAX } from '../nbd/constants.js';
import type { BlockDevice } from '../nbd/device.js';
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
}

/** What to serve, where and to whom. */
export interface NbdServerOptions {
  /** A function is asked anew for each client, so that exports may come and go; clients keep what they have chosen. */
  readonly exports: readonly NbdExport[] | (() => readonly NbdExport[]);
  /**
   * `unix:PATH`, `HOST:PORT`, `[V6]:PORT`, `fd:N` (a descriptor that listens already) or `stdio`, one or more. Port 0 lets the system choose.
   * The socket file of a server that is gone is replaced, a live one refused. Default: `127.0.0.1:10809`.
   */
  readonly listen?: readonly string[];
  /** Default: no TLS. */
  readonly tls?: ServerTlsSettings;
  /** A pino logger for faults of clients and devices. Nothing is logged per request. Default: silence. */
  readonly log?: Logger;
  /** Further clients are cut off. Default: 1024. */
  readonly connectionsMax?: number;
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
    const { exports: given, tls, log, connectionsMax, handshakeTimeoutMs, drainTimeoutMs } = options;
    const addresses = (options.listen ?? LISTEN_DEFAULT).map(parseListenAddress);
    if (addresses.length === 0) throw new BlockferryError('usage', 'a server needs an address to listen on');
    const entries = typeof given === 'function' ? () => entriesOf(given()) : constant(entriesOf(given));
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
      ...(connectionsMax === undefined ? {} : { connectionsMax }),
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

function entriesOf(exports: readonly NbdExport[]): ExportEntry[] {
  const names = new Set<string>();
  return exports.map((offer) => {
    const { name, description = '', device, tlsOnly = false } = offer;
    checkString('the name of an export', name);
    checkString('the description of an export', description);
    if (name === '') throw new BlockferryError('usage', 'an export needs a name');
    if (names.has(name)) throw new BlockferryError('usage', `two exports have the name '${name}'`);
    names.add(name);
    const { size, readOnly, contexts, preferredBlock, multiConn } = device;
    const facts = { size, readOnly, contexts, preferredBlock, multiConn };
    return { name, description, ...facts, tlsOnly, open: () => device };
  });
}

function checkString(what: string, text: string): void {
  if (text.includes('\0') || Buffer.byteLength(text) > STRING_BYTES_MAX)
    throw new BlockferryError('usage', `${what} is more than ${STRING_BYTES_MAX} bytes, or has a NUL`);
}
