/**
 * Accepts clients at all addresses of a daemon, leads each through the handshake and hands it to a session. Holds every
 * connection until it is closed, and closes in order: no new clients, requests in flight finished, then the rest cut off.
 */
import type net from 'node:net';
import type { Duplex } from 'node:stream';
import type { Logger } from 'pino';
import { exportUri, type ListenAddress } from '../address.js';
import {
  CONNECTIONS_MAX,
  HANDSHAKE_DRAIN_TIMEOUT_MS,
  HANDSHAKE_TIMEOUT_MS,
  HANDSHAKES_MAX,
  SESSION_DRAIN_TIMEOUT_MS,
} from '../constants.js';
import type { ServerTlsSettings } from '../tls.js';
import { originOf } from './access.js';
import { Admission } from './admission.js';
import { Connection, type ConnectionParameters, type StartSession } from './connection.js';
import type { ExportDirectory, ExportEntry } from './exports.js';
import { type BoundServer, bind } from './sockets.js';
import { openStdio } from './stdio.js';
import { type ClientIdentity, TlsAcceptor } from './tls-acceptor.js';

export type { Session, SessionParameters, StartSession } from './connection.js';

export interface ListenerParameters {
  addresses: readonly ListenAddress[];
  exports: ExportDirectory;
  startSession: StartSession;
  log: Logger;
  /** Default: no TLS. */
  tls?: ServerTlsSettings;
  /** Default: false. Clients that ask for it have their connections compressed (docs/protocol.md). */
  compression?: boolean;
  /** Default: true. False: clients must know the names. */
  listExports?: boolean;
  /** Clients in transmission, >= 1. Default: CONNECTIONS_MAX. */
  connectionsMax?: number;
  /** Clients in the handshake, >= 1. Default: HANDSHAKES_MAX. */
  handshakesMax?: number;
  /** Default: HANDSHAKE_TIMEOUT_MS. */
  handshakeTimeoutMs?: number;
  /** Default: HANDSHAKE_DRAIN_TIMEOUT_MS. */
  handshakeDrainTimeoutMs?: number;
  /** Default: SESSION_DRAIN_TIMEOUT_MS. */
  sessionDrainTimeoutMs?: number;
}

export class Listener {
  /** Resolves when the session on stdio is over, and with it the reason to be; never without stdio among the addresses. */
  readonly stdioClosed: Promise<void>;
  readonly #parameters: ListenerParameters;
  readonly #tls: TlsAcceptor | null;
  readonly #connectionParameters: ConnectionParameters;
  readonly #admission: Admission<Connection>;
  readonly #servers: BoundServer[] = [];
  readonly #complained = new Set<string>();
  #resolveStdioClosed: () => void = () => {};
  #closing: Promise<void> | undefined;

  /** Listens at all addresses, or at none and throws 'address', or 'tls' when there is something wrong with the credentials. */
  static async open(parameters: ListenerParameters): Promise<Listener> {
    const listener = new Listener(parameters);
    try {
      await listener.#open();
    } catch (error) {
      await listener.close();
      throw error;
    }
    return listener;
  }

  private constructor(parameters: ListenerParameters) {
    const { exports, startSession, log } = parameters;
    this.#parameters = parameters;
    const { connectionsMax = CONNECTIONS_MAX, handshakesMax = HANDSHAKES_MAX } = parameters;
    this.#admission = new Admission({ connectionsMax, handshakesMax });
    this.stdioClosed = new Promise((resolve) => {
      this.#resolveStdioClosed = resolve;
    });
    this.#tls = parameters.tls === undefined ? null : new TlsAcceptor(parameters.tls);
    const isClosing = () => this.#closing !== undefined;
    this.#connectionParameters = {
      exports: {
        list: () => exports.list(),
        find: (name) => exports.find(name),
        get shuttingDown() {
          return isClosing() || exports.shuttingDown;
        },
      },
      listExports: parameters.listExports ?? true,
      refusal: (entry) => this.#refusal(entry),
      startSession,
      log,
      compression: parameters.compression ?? false,
      tls: this.#tls,
      handshakeTimeoutMs: parameters.handshakeTimeoutMs ?? HANDSHAKE_TIMEOUT_MS,
      complain: (kind, detail, peer) => this.#complain(kind, detail, peer),
      denied: (entry, peer, identity) => this.#denied(entry, peer, identity),
    };
  }

  async #open(): Promise<void> {
    for (const address of this.#parameters.addresses) {
      if (address.kind === 'stdio') continue;
      const bound = await bind(address, (socket) => this.#accept(socket));
      bound.server.on('error', (error: NodeJS.ErrnoException) =>
        this.#complain(`accept-${error.code ?? 'error'}`, error.message, 'unknown'),
      );
      this.#servers.push(bound);
    }
    if (this.#parameters.addresses.some((address) => address.kind === 'stdio'))
      void (this.#accept(openStdio())?.closed ?? Promise.resolve()).then(this.#resolveStdioClosed);
  }

  /** The NBD URIs of an export (default: the default export) at all addresses that have one, those with TLS first. */
  addresses(exportName = ''): string[] {
    const all = (secure?: { hostname: string | undefined }) =>
      this.#servers.flatMap(({ bound }) => (bound && exportUri(bound, exportName, secure)) ?? []);
    if (this.#tls === null) return all();
    const { mode, hostname } = this.#tls;
    return mode === 'required' ? all({ hostname }) : [...all({ hostname }), ...all()];
  }

  /** Clients in the transmission phase of an export. */
  connections(exportName: string): number {
    return this.#admission.inTransmission(exportName);
  }

  /** Stops accepting, lets sessions finish their requests, cuts off what takes too long. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const {
      handshakeDrainTimeoutMs = HANDSHAKE_DRAIN_TIMEOUT_MS,
      sessionDrainTimeoutMs = SESSION_DRAIN_TIMEOUT_MS,
    } = this.#parameters;
    const serversClosed = this.#servers.map(
      ({ server }) => new Promise<void>((resolve) => server.close(() => resolve())),
    );
    await Promise.all(
      this.#admission
        .all()
        .map((connection) => connection.shutDown(handshakeDrainTimeoutMs, sessionDrainTimeoutMs)),
    );
    await Promise.all(serversClosed);
  }

  #accept(socket: net.Socket | Duplex): Connection | undefined {
    const origin = originOf(socket);
    if (this.#closing !== undefined || origin === undefined) {
      socket.on('error', () => {});
      socket.destroy();
      return undefined;
    }
    const pushedOut = this.#admission.makeRoom();
    if (pushedOut !== undefined)
      this.#complain(
        'handshakes-max',
        'it was the longest in the handshake of too many from its address',
        pushedOut.peer,
      );
    const connection = new Connection(socket, origin, this.#connectionParameters);
    this.#admission.add(connection);
    void connection.closed.then(() => this.#admission.remove(connection));
    return connection;
  }

  #refusal(entry: ExportEntry): string | undefined {
    const refusal = this.#admission.refusal(entry);
    if (refusal !== undefined) this.#logOnce('connections-max', {}, `a client was refused: ${refusal}`);
    return refusal;
  }

  #denied(entry: ExportEntry, peer: string, identity: ClientIdentity): void {
    const client = identity === null ? {} : { client: identity.name };
    this.#logOnce(
      'access',
      { peer, export: entry.name, ...client },
      'a client asked for an export that its access rules keep from it',
    );
  }

  #complain(kind: string, detail: string, peer: string): void {
    this.#logOnce(kind, { peer }, `a client was cut off: ${detail}`);
  }

  /** Logs each kind of trouble once: a client must not be able to fill the log. */
  #logOnce(kind: string, facts: Record<string, string>, message: string): void {
    if (this.#complained.has(kind)) return;
    this.#complained.add(kind);
    this.#parameters.log.warn({ kind, ...facts }, `${message}; further ones of this kind are not logged`);
  }
}
