/** Opens a connection to an NBD server and takes it through the handshake. */

import net from 'node:net';
import { BlockferryError, messageOf } from '../../errors.js';
import { displayable, protocolError } from '../codec/client.js';
import { HANDSHAKE_TIMEOUT_MS } from '../constants.js';
import { formatNbdUri, type NbdAddress, type NbdUri } from '../uri.js';
import { ClientHandshake, type HandshakeGoal, type HandshakeOutcome } from './handshake.js';

/** Bytes one reception can bring: the connection's one receive buffer, used again and again. */
export const RECEIVE_BUFFER_BYTES = 512 << 10;
export const CONNECT_TIMEOUT_MS = 10_000;
/** After so long in silence the kernel asks whether a TCP peer is still there. */
const KEEP_ALIVE_MS = 30_000;

export interface ConnectLimits {
  /** Until the transport stands. Default CONNECT_TIMEOUT_MS. */
  readonly connectTimeoutMs?: number;
  /** From then until the handshake is over. Default HANDSHAKE_TIMEOUT_MS. */
  readonly handshakeTimeoutMs?: number;
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
  readonly socket: net.Socket;
  readonly outcome: HandshakeOutcome;
  /** Names the server in messages. */
  readonly peer: string;
  /** From now on `receiver` is told. */
  handTo(receiver: Receiver): void;
}

/**
 * Fails with 'source-unreachable' (no connection, or not without TLS), 'timeout', 'closed' (the server hung up, or `signal`
 * fired), 'protocol', 'not-found' (no such export) or 'source-io' (the server refused).
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
  readonly #socket: net.Socket;
  readonly #handshake: ClientHandshake;
  readonly #peer: string;
  #timer: NodeJS.Timeout;
  #over = false;
  #stands = false;
  #receiver: Receiver = this;

  constructor(
    uri: NbdUri,
    goal: HandshakeGoal,
    readonly limits: ConnectLimits,
    readonly resolve: (connection: Connection) => void,
    readonly reject: (error: BlockferryError) => void,
  ) {
    this.#peer = formatNbdUri(uri);
    this.#handshake = new ClientHandshake(goal);
    const connectTimeoutMs = limits.connectTimeoutMs ?? CONNECT_TIMEOUT_MS;
    this.#timer = setTimeout(
      () => this.#timedOut(`no connection within ${connectTimeoutMs} ms`),
      connectTimeoutMs,
    );
    this.#socket = dial(uri.address, (length, bytes) => {
      this.#receiver.received(bytes as Buffer, length);
      return true;
    });
    this.#socket.once('connect', () => this.#connected());
    this.#socket.on('error', (error) => this.#receiver.ended(error));
    this.#socket.on('end', () => this.#receiver.ended(null));
    this.#socket.on('close', () => this.#receiver.ended(null));
    limits.signal?.addEventListener('abort', this.#aborted, { once: true });
    if (limits.signal?.aborted) this.#aborted();
  }

  #connected(): void {
    if (this.#over) return;
    this.#stands = true;
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
    this.#fail('closed', `${describeLoss(error)} before ${this.#handshake.awaiting}`, error);
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
  return displayable(error.message);
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

function dial(address: NbdAddress, callback: (length: number, bytes: Uint8Array) => boolean): net.Socket {
  const onread = { buffer: Buffer.allocUnsafeSlow(RECEIVE_BUFFER_BYTES), callback };
  if (address.kind === 'unix') return net.connect({ path: address.path, onread });
  return net.connect({
    host: address.host,
    port: address.port,
    noDelay: true,
    keepAlive: true,
    keepAliveInitialDelay: KEEP_ALIVE_MS,
    onread,
  });
}
