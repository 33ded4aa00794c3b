/**
 * One client's connection: first the handshake, then a session that owns the socket. What the peer does here can end this
 * connection and nothing else.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import type { Logger } from 'pino';
import { messageOf } from '../../errors.js';
import type { BlockDevice } from '../device.js';
import type { SelectedContext } from './contexts.js';
import type { ExportDirectory } from './exports.js';
import { Handshake, type HandshakeResult } from './handshake.js';

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
  structured: boolean;
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
  startSession: StartSession;
  log: Logger;
  handshakeTimeoutMs: number;
  /** Says that a client went wrong; `kind` comes from a bounded set. */
  complain(kind: string, detail: string, peer: string): void;
}

type State =
  | { kind: 'handshake'; handshake: Handshake }
  | { kind: 'session'; session: Session; exportName: string }
  /** The last answer is on its way. */
  | { kind: 'ending' }
  | { kind: 'closed' };

export class Connection {
  /** Resolves when the socket is closed and the session, if there was one, is over. */
  readonly closed: Promise<void>;
  readonly #socket: net.Socket | Duplex;
  readonly #parameters: ConnectionParameters;
  readonly #peer: string;
  /** Runs during the handshake, and whenever a last answer waits to be taken. */
  #deadline: NodeJS.Timeout;
  #state: State;
  #resolveClosed: () => void = () => {};

  constructor(socket: net.Socket | Duplex, parameters: ConnectionParameters) {
    this.#socket = socket;
    this.#parameters = parameters;
    this.#peer = peerOf(socket);
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    const handshake = new Handshake({
      exports: parameters.exports,
      send: (bytes) => socket.write(bytes),
      openFailed: (entry, error) =>
        parameters.log.error(
          { err: error, export: entry.name, peer: this.#peer },
          'the export cannot be opened',
        ),
    });
    this.#state = { kind: 'handshake', handshake };
    this.#deadline = setTimeout(() => this.#timedOut(), parameters.handshakeTimeoutMs);
    socket.on('error', (error: NodeJS.ErrnoException) => this.#failed(error));
    socket.once('close', () => this.#socketClosed());
    socket.once('end', this.#onEnd);
    socket.on('drain', this.#onDrain);
    socket.on('data', this.#onData);
    handshake.start();
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
        { peer: this.#peer },
        'a client was cut off: its requests did not finish in time',
      );
    this.destroy();
  }

  destroy(): void {
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
        { err: error, peer: this.#peer },
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
    else this.#end(result);
  };

  /** The client reads its answers again. */
  readonly #onDrain = (): void => {
    this.#socket.resume();
  };

  /** The client went away in the middle of the handshake: no fault, it may have seen enough. */
  readonly #onEnd = (): void => {
    this.#state = { kind: 'ending' };
    this.#socket.end();
  };

  #startSession(result: Extract<HandshakeResult, { kind: 'transmission' }>): void {
    const { entry, device, structured, contexts, rest } = result;
    const { log, startSession } = this.#parameters;
    clearTimeout(this.#deadline);
    this.#socket.off('data', this.#onData);
    this.#socket.off('drain', this.#onDrain);
    this.#socket.off('end', this.#onEnd);
    let session: Session;
    try {
      session = startSession(this.#socket, {
        device,
        structured,
        contexts,
        rest,
        log: log.child({ export: entry.name, peer: this.#peer }),
        complain: (kind, detail) => this.#parameters.complain(kind, detail, this.#peer),
      });
    } catch (error) {
      device.release();
      this.#state = { kind: 'ending' };
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
    this.#state = { kind: 'ending' };
    if (reason !== 'abort') this.#parameters.complain(reason, detail, this.#peer);
    // What the client still sends is read and dropped: unread bytes would turn our close into a reset, and a reset can
    // overtake the last answer.
    this.#socket.end();
  }

  #timedOut(): void {
    if (this.#state.kind === 'handshake')
      this.#parameters.complain('timeout', 'the handshake took too long', this.#peer);
    this.#socket.destroy();
  }

  #failed(error: NodeJS.ErrnoException): void {
    if (this.#state.kind === 'handshake')
      this.#parameters.complain(`socket-${error.code ?? 'error'}`, error.message, this.#peer);
  }

  #sessionFailed(error: unknown): void {
    this.#parameters.log.error({ err: error, peer: this.#peer }, `a session failed: ${messageOf(error)}`);
  }

  #socketClosed(): void {
    clearTimeout(this.#deadline);
    if (this.#state.kind === 'session') return; // over when the session says so
    this.#state = { kind: 'closed' };
    this.#resolveClosed();
  }

  /** The session has said all it had to say; the client has a while to take it. */
  #sessionClosed(): void {
    const socket = this.#socket;
    this.#state = { kind: 'ending' };
    if (socket.closed) {
      this.#socketClosed();
      return;
    }
    this.#deadline = setTimeout(() => this.#timedOut(), this.#parameters.handshakeTimeoutMs);
    if (socket.writableFinished) socket.destroy();
    else socket.once('finish', () => socket.destroy());
    if (!socket.writableEnded) socket.end();
  }
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
