/** Opens a connection to an NBD server and takes it through the handshake. */

import net from 'node:net';
import tls from 'node:tls';
import { BlockferryError, messageOf } from '../../errors.js';
import { displayable, protocolError } from '../codec/client.js';
import type { CompressionLevel } from '../codec/frames.js';
import { CompressedStream } from '../compression/stream.js';
import { HANDSHAKE_TIMEOUT_MS } from '../constants.js';
import {
  type ClientTlsSettings,
  describeTlsError,
  isTlsError,
  loadClientTls,
  mergeClientTls,
} from '../tls.js';
import { formatNbdUri, type NbdAddress, type NbdUri } from '../uri.js';
import { ClientHandshake, type HandshakeGoal, type HandshakeOutcome } from './handshake.js';

/** Bytes one reception can bring: the connection's one receive buffer, used again and again. */
export const RECEIVE_BUFFER_BYTES = 512 << 10;
export const CONNECT_TIMEOUT_MS = 10_000;
/** After so long in silence the kernel asks whether a TCP peer is still there. */
const KEEP_ALIVE_MS = 30_000;

/** How to connect. Times are milliseconds. */
export interface ConnectLimits {
  /** For URIs with TLS, where they leave something open. */
  readonly tls?: ClientTlsSettings;
  /** Until the transport stands. Default CONNECT_TIMEOUT_MS. */
  readonly connectTimeoutMs?: number;
  /** From then until the handshake is over. Default HANDSHAKE_TIMEOUT_MS. */
  readonly handshakeTimeoutMs?: number;
  /** A peer that was reached sooner is near, and not asked for compression: it would cost more than it gains. Default 0. */
  readonly compressionFromMs?: number;
  /** Gives up connecting ('closed'). Of no effect once connected. */
  readonly signal?: AbortSignal;
}

/** Where received bytes and the end of the connection are told. May be replaced while the connection lives. */
export interface Receiver {
  /** bytes[0, length) were received; the buffer is used again afterwards. Must not throw. */
  received(bytes: Buffer, length: number): void;
  /** The server will send no more, or the connection broke (`error`). May be told more than once. */
  ended(error: Error | null): void;
}

export interface Connection {
  readonly socket: net.Socket | CompressedStream;
  /** What is below TLS and compression. */
  readonly transport: net.Socket;
  readonly outcome: HandshakeOutcome;
  /** Names the server in messages. */
  readonly peer: string;
  /** From now on `receiver` is told. */
  handTo(receiver: Receiver): void;
}

/**
 * Fails with 'source-unreachable' (no connection, or not without TLS), 'timeout', 'closed' (the server hung up, or `signal`
 * fired), 'protocol', 'not-found' (no such export), 'source-io' (the server refused), or 'tls' (credentials, or the peer's).
 */
export function openConnection(
  uri: NbdUri,
  goal: HandshakeGoal,
  limits: ConnectLimits = {},
): Promise<Connection> {
  return new Promise((resolve, reject) => {
    new Attempt(uri, goal, limits, resolve, reject);
  });
}

/** One attempt to connect. It is over as soon as it resolved or rejected. */
class Attempt implements Receiver {
  /** The TLS socket once TLS begins; then the compressed stream, if there is one. */
  #socket: net.Socket | CompressedStream;
  readonly #transport: net.Socket;
  readonly #secrets: tls.ConnectionOptions | null;
  readonly #handshake: ClientHandshake;
  readonly #level: CompressionLevel;
  readonly #peer: string;
  #timer: NodeJS.Timeout;
  #over = false;
  #stands = false;
  readonly #begunAtMs = performance.now();
  #receiver: Receiver = this;

  constructor(
    uri: NbdUri,
    goal: HandshakeGoal,
    readonly limits: ConnectLimits,
    readonly resolve: (connection: Connection) => void,
    readonly reject: (error: BlockferryError) => void,
  ) {
    this.#peer = formatNbdUri(uri);
    this.#secrets = secretsOf(uri, limits.tls);
    this.#handshake = new ClientHandshake(goal, this.#secrets !== null);
    const { compression = 'off' } = goal.kind === 'connect' ? goal : {};
    this.#level = compression === 'off' ? 'auto' : compression;
    const connectTimeoutMs = limits.connectTimeoutMs ?? CONNECT_TIMEOUT_MS;
    this.#timer = setTimeout(
      () => this.#timedOut(`no connection within ${connectTimeoutMs} ms`),
      connectTimeoutMs,
    );
    if (this.#secrets === null)
      this.#transport = dial(uri.address, (length, bytes) => {
        this.#onBytes(bytes as Buffer, length);
        return true;
      });
    else {
      this.#transport = dial(uri.address, null);
      this.#transport.on('data', this.#onData);
    }
    this.#socket = this.#transport;
    this.#socket.once('connect', () => this.#connected());
    this.#socket.on('error', this.#onError);
    this.#socket.on('end', this.#onEnd);
    this.#socket.on('close', this.#onEnd);
    limits.signal?.addEventListener('abort', this.#aborted, { once: true });
    if (limits.signal?.aborted) this.#aborted();
  }

  #onBytes: (bytes: Buffer, length: number) => void = (bytes, length) =>
    this.#receiver.received(bytes, length);
  readonly #onData = (bytes: Buffer): void => this.#receiver.received(bytes, bytes.length);
  readonly #onError = (error: Error): void => this.#receiver.ended(error);
  readonly #onEnd = (): void => this.#receiver.ended(null);

  #startTls(secrets: tls.ConnectionOptions): void {
    const plain = this.#transport;
    this.#stopListening(plain);
    plain.on('error', () => {}); // the TLS socket tells
    const socket = tls.connect({ ...secrets, socket: plain });
    this.#socket = socket;
    socket.on('error', this.#onError);
    socket.on('end', this.#onEnd);
    socket.on('close', this.#onEnd);
    socket.once('secureConnect', () => {
      if (this.#over) return;
      if (secrets.pskCallback !== undefined && Object.keys(socket.getPeerCertificate()).length > 0) {
        this.#fail('tls', 'it showed a certificate where a key (PSK) was expected', null);
        return;
      }
      socket.on('data', this.#onData);
      socket.write(this.#handshake.secured());
    });
  }

  #startCompression(): void {
    const below = this.#socket;
    this.#stopListening(below);
    // A plain socket has no 'data', but fills one buffer again and again.
    const feeds = this.#secrets !== null;
    const stream = new CompressedStream(below, this.#level, { feeds });
    if (!feeds) this.#onBytes = stream.feed;
    this.#socket = stream;
    stream.on('error', this.#onError);
    stream.on('end', this.#onEnd);
    stream.on('close', this.#onEnd);
    stream.on('data', this.#onData);
    stream.write(this.#handshake.compressed());
  }

  #stopListening(socket: net.Socket | CompressedStream): void {
    socket.off('data', this.#onData);
    socket.off('error', this.#onError);
    socket.off('end', this.#onEnd);
    socket.off('close', this.#onEnd);
  }

  #connected(): void {
    if (this.#over) return;
    this.#stands = true;
    this.#handshake.plain = performance.now() - this.#begunAtMs < (this.limits.compressionFromMs ?? 0);
    clearTimeout(this.#timer);
    const timeoutMs = this.limits.handshakeTimeoutMs ?? HANDSHAKE_TIMEOUT_MS;
    this.#timer = setTimeout(
      () => this.#timedOut(`${this.#handshake.awaiting} did not come within ${timeoutMs} ms`),
      timeoutMs,
    );
  }

  received(bytes: Buffer, length: number): void {
    if (this.#over) return;
    try {
      const reply = this.#handshake.receive(bytes.subarray(0, length));
      if (reply !== null) this.#socket.write(reply);
      if (this.#handshake.startsTls && this.#secrets !== null) this.#startTls(this.#secrets);
      if (this.#handshake.startsCompression) this.#startCompression();
    } catch (error) {
      const known = error instanceof BlockferryError ? error : protocolError(messageOf(error));
      this.#fail(known.code, known.message, known);
      return;
    }
    const { outcome } = this.#handshake;
    if (outcome === null) return;
    this.#end();
    this.resolve({
      socket: this.#socket,
      transport: this.#transport,
      outcome,
      peer: this.#peer,
      handTo: (receiver) => {
        this.#receiver = receiver;
      },
    });
  }

  ended(error: Error | null): void {
    if (this.#over) return;
    if (!this.#stands) {
      this.#fail('source-unreachable', describeRefusal(error), error);
      return;
    }
    if (error instanceof BlockferryError) {
      this.#fail(error.code, error.message, error); // what a compressed connection ends with
      return;
    }
    if (error !== null && isTlsError(error)) {
      this.#fail('tls', `TLS failed: ${describeTlsError(error)}`, error);
      return;
    }
    // Some servers say nothing when they do not like a client's certificate.
    const perhaps = this.#handshake.refusesSilently ? ' (perhaps it does not accept our credentials)' : '';
    this.#fail('closed', `${describeLoss(error)} before ${this.#handshake.awaiting}${perhaps}`, error);
  }

  #timedOut(why: string): void {
    this.#fail('timeout', why, null);
  }

  readonly #aborted = (): void => {
    this.#fail('closed', 'connecting was called off', this.limits.signal?.reason);
  };

  #fail(code: BlockferryError['code'], why: string, cause: unknown): void {
    if (this.#over) return;
    this.#end();
    const { farewell } = this.#handshake;
    if (farewell !== null && this.#socket.writable) this.#socket.write(farewell);
    this.#socket.destroySoon();
    // destroySoon waits for the farewell to be sent, which a hanging server may prevent.
    setTimeout(() => this.#socket.destroy(), 1000).unref();
    this.reject(new BlockferryError(code, `cannot connect to ${this.#peer}: ${why}`, { cause }));
  }

  #end(): void {
    this.#over = true;
    clearTimeout(this.#timer);
    this.limits.signal?.removeEventListener('abort', this.#aborted);
  }
}

/** Why a connection ended, in words. */
export function describeLoss(error: Error | null): string {
  if (error === null) return 'the server hung up';
  // What net throws when each address of a host failed has no message of its own.
  if (error instanceof AggregateError) return displayable(error.errors.map(messageOf).join(', '));
  return displayable(isTlsError(error) ? describeTlsError(error) : error.message);
}

function secretsOf(uri: NbdUri, defaults: ClientTlsSettings = {}): tls.ConnectionOptions | null {
  if (uri.tls === undefined) return null;
  const host = uri.address.kind === 'tcp' ? uri.address.host : null;
  return loadClientTls(mergeClientTls(uri.tls, defaults), host);
}

/** What to do where a connection never came to be, for the reasons that people meet. */
const ADVICE: Record<string, string> = {
  ECONNREFUSED: 'nobody listens there, start the server first',
  ENOENT: 'there is no such socket, start the server first or check the path',
  ENOTFOUND: 'the host name is not known, check it',
  EACCES: 'permission denied, run as a user who may use the socket',
};

function describeRefusal(error: Error | null): string {
  const first = error instanceof AggregateError ? error.errors[0] : error;
  const advice = ADVICE[(first as NodeJS.ErrnoException | null)?.code ?? ''];
  return advice === undefined ? describeLoss(error) : `${advice} (${describeLoss(error)})`;
}

/** Without `callback` what is received comes as the socket's 'data'. */
function dial(
  address: NbdAddress,
  callback: ((length: number, bytes: Uint8Array) => boolean) | null,
): net.Socket {
  const into =
    callback === null ? {} : { onread: { buffer: Buffer.allocUnsafeSlow(RECEIVE_BUFFER_BYTES), callback } };
  if (address.kind === 'unix') return net.connect({ path: address.path, ...into });
  return net.connect({
    host: address.host,
    port: address.port,
    noDelay: true,
    keepAlive: true,
    keepAliveInitialDelay: KEEP_ALIVE_MS,
    ...into,
  });
}
