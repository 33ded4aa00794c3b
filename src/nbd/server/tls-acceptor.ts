/**
 * The server's half of a TLS handshake, on a connection whose client has just been told to begin.
 *
 * Node gives what it found out about a client to the tls.Server a connection was put into, and not to whoever put it there; so
 * each handshake has a server of its own while it lasts. Making one costs about as much as the handshake: one whose handshake
 * succeeded will never hear of that connection again, and serves the next.
 */
import type { Duplex } from 'node:stream';
import tls from 'node:tls';
import {
  describeTlsError,
  loadServerTls,
  type ServerTlsOptions,
  type ServerTlsSettings,
  type TlsMode,
} from '../tls.js';

/** Servers kept for further handshakes. */
const IDLE_MAX = 8;

/** Who a client proved to be: the common name of its verified certificate, or the name of its key. Null: it proved nothing. */
export type ClientIdentity = { readonly kind: 'x509' | 'psk'; readonly name: string } | null;

export interface TlsOutcome {
  secured(socket: tls.TLSSocket, identity: ClientIdentity): void;
  /** `kind` comes from a bounded set. The connection is of no use any more. */
  failed(kind: string, why: string): void;
}

export class TlsAcceptor {
  readonly mode: Exclude<TlsMode, 'off'>;
  readonly hostname: string | undefined;
  readonly #options: ServerTlsOptions;
  readonly #idle: Slot[] = [];

  /** Throws as `loadServerTls` does. */
  constructor(settings: ServerTlsSettings) {
    this.mode = settings.mode;
    this.hostname = settings.hostname;
    this.#options = loadServerTls(settings);
  }

  /** Nobody else reads from `socket` any more. One call of `outcome` follows, unless the socket is destroyed first. */
  accept(socket: Duplex, outcome: TlsOutcome): void {
    const slot = this.#idle.pop() ?? new Slot(this.#options, (used) => this.#giveBack(used));
    slot.accept(socket, outcome);
  }

  #giveBack(slot: Slot): void {
    if (this.#idle.length < IDLE_MAX) this.#idle.push(slot);
  }
}

class Slot {
  readonly #server: tls.Server;
  readonly #options: ServerTlsOptions;
  readonly #done: (slot: Slot) => void;
  #outcome: TlsOutcome | null = null;
  /** What the client calls itself. It is true once the handshake succeeded with that name's key. */
  #claimed: string | null = null;

  constructor(options: ServerTlsOptions, done: (slot: Slot) => void) {
    const { context, verifyPeer, keys } = options;
    this.#options = options;
    this.#done = done;
    this.#server = tls.createServer({
      ...context,
      requestCert: verifyPeer,
      rejectUnauthorized: verifyPeer,
      ...(keys === null ? {} : { pskCallback: (_socket: tls.TLSSocket, name: string) => this.#keyOf(name) }),
    });
    this.#server.on('secureConnection', (socket) => this.#secured(socket));
    this.#server.on('tlsClientError', (error, socket) => this.#failed(error, socket));
  }

  accept(socket: Duplex, outcome: TlsOutcome): void {
    this.#outcome = outcome;
    this.#claimed = null;
    this.#server.emit('connection', socket);
  }

  #keyOf(name: string): Buffer | null {
    this.#claimed = name;
    return this.#options.keys?.get(name) ?? null;
  }

  #secured(socket: tls.TLSSocket): void {
    const outcome = this.#outcome;
    this.#outcome = null;
    if (outcome === null) {
      socket.destroy();
      return;
    }
    const { keys, verifyPeer } = this.#options;
    const proven = keys === null ? !verifyPeer || socket.authorized : keys.has(this.#claimed ?? '');
    if (!proven) {
      socket.destroy();
      outcome.failed('tls-unproven', 'the client did not prove who it is');
      return;
    }
    const identity = this.#identityOf(socket);
    this.#done(this);
    outcome.secured(socket, identity);
  }

  #identityOf(socket: tls.TLSSocket): ClientIdentity {
    if (this.#options.keys !== null) return { kind: 'psk', name: this.#claimed ?? '' };
    if (!this.#options.verifyPeer) return null;
    const { subject } = socket.getPeerCertificate();
    const name: unknown = subject?.CN;
    return { kind: 'x509', name: typeof name === 'string' ? name : '' };
  }

  /** The slot is not used again: this connection may still have something to say to it. */
  #failed(error: NodeJS.ErrnoException, socket: tls.TLSSocket): void {
    const outcome = this.#outcome;
    this.#outcome = null;
    if (outcome === null) return;
    const { keys } = this.#options;
    // What Node found wrong with a certificate; then it just hangs up.
    const unauthorized = socket.authorizationError as unknown;
    if (typeof unauthorized === 'string' && unauthorized !== '') {
      const why = describeTlsError(Object.assign(new Error(unauthorized), { code: unauthorized }));
      outcome.failed(`tls-${unauthorized}`, `TLS failed: ${why}`);
    } else if (keys !== null && this.#claimed !== null && !keys.has(this.#claimed)) {
      outcome.failed(
        'tls-unknown-name',
        `TLS failed: there is no key of ${JSON.stringify(this.#claimed.slice(0, 64))}`,
      );
    } else outcome.failed(`tls-${error.code ?? 'error'}`, `TLS failed: ${describeTlsError(error)}`);
  }
}
