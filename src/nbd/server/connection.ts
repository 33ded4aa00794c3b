/**
 * One client's connection: first the handshake, then a session that owns the socket. What the peer does here can end this
 * connection and nothing else.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { TLSSocket } from 'node:tls';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../../errors.js';
import type { CompressionLevel } from '../codec/frames.js';
import { CompressedStream } from '../compression/stream.js';
import type { BlockDevice } from '../device.js';
import { describeTlsError, isTlsError } from '../tls.js';
import type { Origin } from './access.js';
import type { Counted } from './admission.js';
import type { SelectedContext } from './contexts.js';
import type { ExportDirectory, ExportEntry } from './exports.js';
import { Handshake, type HandshakeParameters, type HandshakeResult } from './handshake.js';
import type { BehindCompression } from './handshake-result.js';
import type { ClientIdentity, TlsAcceptor } from './tls-acceptor.js';
import { VisibleExports } from './visible-exports.js';

/** The transmission phase of one connection. */
export interface Session {
  /** Resolves when the session is over and its device released. */
  readonly closed: Promise<void>;
  /** Takes no more requests, finishes those in flight, then closes. */
  drain(): Promise<void>;
  /** Ends at once; what is in flight is abandoned. */
  destroy(): void;
}

export interface SessionParameters {
  /** Released by the session when it is over. */
  device: BlockDevice;
  /** Writes are refused, though the device may take them. Default: as the device says. */
  readOnly?: boolean;
  structured: boolean;
  /** Extended headers were agreed on, and with them structured replies. Default: false. */
  extended?: boolean;
  contexts: readonly SelectedContext[];
  /** The first bytes of transmission, which came together with the end of the handshake. */
  rest: Buffer;
  log: Logger;
  /** Says that the client went wrong; `kind` comes from a bounded set. Without it nobody is told. */
  complain?(kind: string, detail: string): void;
}

/**
 * Takes over the socket. It is flowing, half-open when the client ends its side, and has no reader: the session must add one
 * before it returns.
 */
export type StartSession = (socket: net.Socket | Duplex, parameters: SessionParameters) => Session;

export interface ConnectionParameters {
  exports: ExportDirectory;
  listExports: boolean;
  /** Why no more clients can be served an export now. */
  refusal(entry: ExportEntry): string | undefined;
  startSession: StartSession;
  log: Logger;
  handshakeTimeoutMs: number;
  /** Links may have their connections compressed. */
  compression: boolean;
  /** Null: TLS is off. */
  tls: TlsAcceptor | null;
  /** Says that a client went wrong; `kind` comes from a bounded set. */
  complain(kind: string, detail: string, peer: string): void;
  /** Says that a client asked for an export that it may not see. */
  denied(entry: ExportEntry, peer: string, identity: ClientIdentity): void;
}

type State =
  | { kind: 'handshake'; handshake: Handshake }
  /** TLS is on its way; then another handshake follows. */
  | { kind: 'starttls' }
  | { kind: 'session'; session: Session; exportName: string }
  /** The last answer is on its way; `served`: that of a session. */
  | { kind: 'ending'; served: boolean }
  | { kind: 'closed' };

export class Connection implements Counted {
  /** Resolves when the socket is closed and the session, if there was one, is over. */
  readonly closed: Promise<void>;
  /** The TLS socket once there is one. */
  #socket: net.Socket | Duplex;
  #identity: ClientIdentity = null;
  /** We cut it off: what TLS says about that is no news. */
  #givenUp = false;
  readonly origin: Origin;
  readonly #parameters: ConnectionParameters;
  /** For the log. */
  readonly peer: string;
  /** Runs during the handshake, and whenever a last answer waits to be taken. */
  #deadline: NodeJS.Timeout;
  #state: State;
  #resolveClosed: () => void = () => {};

  constructor(socket: net.Socket | Duplex, origin: Origin, parameters: ConnectionParameters) {
    this.#socket = socket;
    this.origin = origin;
    this.#parameters = parameters;
    this.peer = peerOf(socket);
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    const handshake = this.#newHandshake();
    this.#state = { kind: 'handshake', handshake };
    this.#deadline = setTimeout(() => this.#timedOut(), parameters.handshakeTimeoutMs);
    this.#listen();
    handshake.start();
  }

  #newHandshake(behind: Pick<HandshakeParameters, 'behindTls' | 'behindCompression'> = {}): Handshake {
    const { exports, listExports, tls, log, compression } = this.#parameters;
    const secure = behind.behindTls !== undefined || behind.behindCompression?.secure === true;
    const socket = this.#socket;
    const identity = this.#identity;
    return new Handshake({
      exports: new VisibleExports({
        exports,
        client: { origin: this.origin, identity },
        secure,
        denied: (entry) => this.#parameters.denied(entry, this.peer, identity),
      }),
      listExports,
      refusal: (entry) => this.#parameters.refusal(entry),
      tls: tls?.mode ?? 'off',
      compression,
      ...behind,
      send: (bytes) => socket.write(bytes),
      openFailed: (entry, error) =>
        log.error({ err: error, export: entry.name, peer: this.peer }, 'the export cannot be opened'),
    });
  }

  #listen(): void {
    const socket = this.#socket;
    socket.on('error', this.#onError);
    socket.once('close', this.#onClose);
    socket.once('end', this.#onEnd);
    socket.on('drain', this.#onDrain);
    socket.on('data', this.#onData);
  }

  /** From now on the handshake has no say in what is read. */
  #stopReading(): void {
    this.#socket.off('data', this.#onData);
    this.#socket.off('drain', this.#onDrain);
    this.#socket.off('end', this.#onEnd);
  }

  get stage(): Counted['stage'] {
    // A session that is cut off counts until its device is released.
    if (this.#state.kind === 'session') return 'transmission';
    if (this.#givenUp || this.#state.kind === 'closed') return 'ending';
    return this.#state.kind === 'ending' && this.#state.served ? 'ending' : 'handshake';
  }

  giveWay(): void {
    this.#givenUp = true;
    this.#socket.destroy();
  }

  /** The export it is served, once it is in transmission. */
  get exportName(): string | undefined {
    return this.#state.kind === 'session' ? this.#state.exportName : undefined;
  }

  /** Lets the client finish what it began, within the time allowed, and closes. */
  async shutDown(handshakeTimeoutMs: number, sessionTimeoutMs: number): Promise<void> {
    const inSession = this.#state.kind === 'session';
    if (this.#state.kind === 'session')
      this.#state.session.drain().catch((error: unknown) => this.#sessionFailed(error));
    if (await settledWithin(this.closed, inSession ? sessionTimeoutMs : handshakeTimeoutMs)) return;
    if (inSession)
      this.#parameters.log.warn(
        { peer: this.peer },
        'a client was cut off: its requests did not finish in time',
      );
    this.destroy();
  }

  destroy(): void {
    this.#givenUp = true;
    if (this.#state.kind === 'session') this.#state.session.destroy();
    this.#socket.destroy();
  }

  readonly #onData = (bytes: Buffer): void => {
    if (this.#state.kind !== 'handshake') return;
    let result: HandshakeResult | undefined;
    this.#socket.cork();
    try {
      result = this.#state.handshake.push(bytes);
    } catch (error) {
      this.#parameters.log.error(
        { err: error, peer: this.peer },
        'a handshake failed through a fault of ours',
      );
      this.#socket.destroy();
      return;
    } finally {
      this.#socket.uncork();
    }
    if (result === undefined) {
      if (this.#socket.writableNeedDrain) this.#socket.pause();
    } else if (result.kind === 'transmission') this.#startSession(result);
    else if (result.kind === 'starttls') this.#startTls(result.behindTls);
    else if (result.kind === 'compression') this.#compress(result);
    else this.#end(result);
  };

  /** The client reads its answers again. */
  readonly #onDrain = (): void => {
    this.#socket.resume();
  };

  /** The client went away in the middle of the handshake: no fault, it may have seen enough. */
  readonly #onEnd = (): void => {
    this.#state = { kind: 'ending', served: false };
    this.#socket.end();
  };

  #startTls(behindTls: { noZeroes: boolean }): void {
    const { tls } = this.#parameters;
    if (tls === null) throw new Error('STARTTLS was accepted without credentials');
    this.#stopReading();
    this.#state = { kind: 'starttls' };
    // The client has only now been told that it may go on: what was read already is clear text, and goes.
    while (this.#socket.read() !== null);
    tls.accept(this.#socket, {
      secured: (socket, identity) => this.#secured(socket, identity, behindTls),
      failed: (kind, why) => {
        if (!this.#givenUp) this.#parameters.complain(kind, why, this.peer);
        this.#socket.destroy();
      },
    });
  }

  /** What is read and written from here on is frames; the answer to the option has left in clear. */
  #compress({ level, behindCompression, rest }: Extract<HandshakeResult, { kind: 'compression' }>): void {
    this.#stopReading();
    const stream = this.#compressed(level, behindCompression);
    if (rest.length > 0) stream.feed(rest);
  }

  #compressed(level: CompressionLevel, behindCompression: BehindCompression): CompressedStream {
    const below = this.#socket;
    below.off('close', this.#onClose); // the stream's counts, which takes the other with it
    below.allowHalfOpen = true;
    const stream = new CompressedStream(below, level);
    this.#socket = stream;
    const handshake = this.#newHandshake({ behindCompression });
    this.#state = { kind: 'handshake', handshake };
    this.#listen();
    below.resume();
    handshake.start();
    return stream;
  }

  #secured(socket: TLSSocket, identity: ClientIdentity, behindTls: { noZeroes: boolean }): void {
    // Cut off meanwhile: the TLS socket goes when the one below it has closed. Not here: Node is inside OpenSSL, and with nothing
    // left below it would free at once what OpenSSL is using.
    if (this.#state.kind !== 'starttls' || this.#socket.destroyed) return;
    this.#socket.off('close', this.#onClose); // from now on the TLS socket's counts, which takes the other with it
    this.#socket = socket;
    this.#identity = identity;
    const handshake = this.#newHandshake({ behindTls });
    this.#state = { kind: 'handshake', handshake };
    this.#listen();
    handshake.start();
  }

  #startSession(result: Extract<HandshakeResult, { kind: 'transmission' }>): void {
    const { entry, device, structured, extended, contexts, rest } = result;
    const { log, startSession } = this.#parameters;
    clearTimeout(this.#deadline);
    this.#stopReading();
    let session: Session;
    try {
      session = startSession(this.#socket, {
        device,
        readOnly: entry.readOnly,
        structured,
        extended,
        contexts,
        rest,
        log: log.child({
          export: entry.name,
          peer: this.peer,
          ...(this.#identity === null ? {} : { client: this.#identity.name }),
        }),
        complain: (kind, detail) => this.#parameters.complain(kind, detail, this.peer),
      });
    } catch (error) {
      device.release();
      this.#state = { kind: 'ending', served: false };
      this.#sessionFailed(error);
      this.#socket.destroy();
      return;
    }
    this.#state = { kind: 'session', session, exportName: entry.name };
    session.closed.then(
      () => this.#sessionClosed(),
      (error: unknown) => {
        this.#sessionFailed(error);
        this.#socket.destroy();
        this.#sessionClosed();
      },
    );
  }

  #end({ reason, detail }: Extract<HandshakeResult, { kind: 'end' }>): void {
    this.#state = { kind: 'ending', served: false };
    if (reason !== 'abort') this.#parameters.complain(reason, detail, this.peer);
    // What the client still sends is read and dropped: unread bytes would turn our close into a reset, and a reset can
    // overtake the last answer.
    this.#socket.end();
  }

  #timedOut(): void {
    this.#givenUp = true;
    if (this.#state.kind === 'handshake' || this.#state.kind === 'starttls')
      this.#parameters.complain('timeout', 'the handshake took too long', this.peer);
    this.#socket.destroy();
  }

  readonly #onError = (error: NodeJS.ErrnoException): void => {
    if (error instanceof BlockferryError) this.#parameters.complain(error.code, error.message, this.peer);
    else if (this.#state.kind === 'handshake')
      this.#parameters.complain(`socket-${error.code ?? 'error'}`, lossOf(error), this.peer);
    this.#socket.destroy(); // a TLS socket leaves that to us
  };

  #sessionFailed(error: unknown): void {
    this.#parameters.log.error({ err: error, peer: this.peer }, `a session failed: ${messageOf(error)}`);
  }

  readonly #onClose = (): void => {
    clearTimeout(this.#deadline);
    if (this.#state.kind === 'session') return; // over when the session says so
    this.#state = { kind: 'closed' };
    this.#resolveClosed();
  };

  /** The session has said all it had to say; the client has a while to take it. */
  #sessionClosed(): void {
    const socket = this.#socket;
    this.#state = { kind: 'ending', served: true };
    if (socket.closed) {
      this.#onClose();
      return;
    }
    this.#deadline = setTimeout(() => this.#timedOut(), this.#parameters.handshakeTimeoutMs);
    if (socket.writableFinished) socket.destroy();
    else socket.once('finish', () => socket.destroy());
    if (!socket.writableEnded) socket.end();
  }
}

function lossOf(error: Error): string {
  return isTlsError(error) ? `TLS failed: ${describeTlsError(error)}` : error.message;
}

function peerOf(socket: net.Socket | Duplex): string {
  if (!(socket instanceof net.Socket)) return 'stdio';
  return socket.remoteAddress === undefined ? 'local' : `${socket.remoteAddress} port ${socket.remotePort}`;
}

/** Whether `promise` settled before the time was up. */
async function settledWithin(promise: Promise<void>, timeoutMs: number): Promise<boolean> {
  let timer: NodeJS.Timeout | undefined;
  const timeUp = new Promise<boolean>((resolve) => {
    timer = setTimeout(resolve, timeoutMs, false);
  });
  const settled = await Promise.race([promise.then(() => true), timeUp]);
  clearTimeout(timer);
  return settled;
}
