/**
 * A connection that was accepted here, and is served on its volume's thread.
 *
 * A plain connection goes there by its descriptor once the handshake's last answer has left; what was read already goes along, and
 * this thread has nothing to do with it any more. A connection behind TLS cannot: its keys are in this thread's OpenSSL. It stays, and
 * its bytes go through a pair of sockets, whose other end the volume's thread serves as any connection. So TLS costs this thread's
 * time and none of a guest's. The pair hides how the client left until what it sent before was read; that matters to
 * writes only (see session.ts), and a link reads.
 *
 * Life:  leaving (the last answer is on its way) -> away -> over. A socket that is lost leads from `leaving` to `over`, the thread's
 * word, or its death, from `away`; behind TLS `over` waits for the bytes that are still in the pair.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import { closeFd, socketPair } from '../../native/index.js';
import { detach, isDetachable, whenSent } from '../../nbd/server/detach.js';
import type { Session, SessionParameters } from '../../nbd/server/listener.js';
import type { SessionAway } from './data-thread.js';
import type { RemoteDevice } from './remote-volume.js';

/** Serves the connection on the device's thread. Throws when there are no descriptors for that. */
export function handOver(
  socket: net.Socket | Duplex,
  device: RemoteDevice,
  parameters: SessionParameters,
): Session {
  const session = new SessionElsewhere(socket, device, parameters);
  session.start();
  return session;
}

type State =
  | { kind: 'leaving'; draining: boolean }
  | { kind: 'away'; number: number }
  /** The thread is done; the pair is not empty yet. */
  | { kind: 'emptying' }
  | { kind: 'over' };

class SessionElsewhere implements Session, SessionAway {
  readonly closed: Promise<void>;
  #resolve: () => void = () => undefined;
  #reject: (error: Error) => void = () => undefined;
  #state: State = { kind: 'leaving', draining: false };
  /** Our end of the pair, behind TLS; null when there is none, or it has nothing left. */
  #pair: net.Socket | null = null;

  constructor(
    private readonly socket: net.Socket | Duplex,
    private readonly device: RemoteDevice,
    private readonly parameters: SessionParameters,
  ) {
    this.closed = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  start(): void {
    const { socket } = this;
    if (!isDetachable(socket)) {
      this.#go(this.#bridge(), []);
      return;
    }
    socket.pause();
    socket.once('close', this.#lost);
    whenSent(socket, () => this.#leave(socket));
  }

  #leave(socket: net.Socket): void {
    try {
      const { fd, read } = detach(socket);
      socket.off('close', this.#lost);
      this.#go(fd, read);
    } catch (error) {
      socket.destroy();
      this.over(error as Error);
    }
  }

  #go(fd: number, read: Buffer[]): void {
    const { device: _device, log, complain: _complain, rest, ...agreed } = this.parameters;
    const { thread, number: volume, linkDescription } = this.device.volume;
    const draining = this.#state.kind === 'leaving' && this.#state.draining;
    // A copy of its own: of a view, the whole memory behind it would be copied, with what it holds of other clients.
    const first = new Uint8Array(Buffer.concat([rest, ...read])) as Buffer;
    const number = thread.begin(this, {
      volume,
      face: this.device.face,
      fd,
      linkDescription,
      agreed: { ...agreed, rest: first },
      bindings: log.bindings(),
    });
    if (this.#state.kind !== 'leaving') return; // the thread is dead
    this.#state = { kind: 'away', number };
    if (draining) thread.drain(number);
  }

  /** The descriptor of the far end. */
  #bridge(): number {
    const { socket } = this;
    const [near, far] = socketPair();
    let pair: net.Socket;
    try {
      pair = new net.Socket({ fd: near, readable: true, writable: true, allowHalfOpen: true });
    } catch (error) {
      closeFd(near);
      closeFd(far);
      throw error;
    }
    this.#pair = pair;
    socket.allowHalfOpen = true; // answers still go out behind the client's end
    socket.pipe(pair).pipe(socket);
    socket.once('close', () => pair.destroy());
    pair.on('error', () => pair.destroy()); // the thread hung up while bytes were on their way to it
    pair.once('end', this.#emptied);
    pair.once('close', this.#emptied);
    return far;
  }

  readonly #emptied = (): void => {
    this.#pair = null;
    if (this.#state.kind === 'emptying') this.#finish();
  };

  readonly #lost = (): void => this.over(null);

  complaint(about: string, detail: string): void {
    this.parameters.complain?.(about, detail);
  }

  over(error: Error | null): void {
    if (this.#state.kind === 'over') return;
    if (error !== null) {
      this.#state = { kind: 'over' };
      this.#pair?.destroy();
      this.device.release();
      this.#reject(error);
    } else if (this.#pair === null) this.#finish();
    else this.#state = { kind: 'emptying' };
  }

  #finish(): void {
    this.#state = { kind: 'over' };
    this.device.release();
    this.#resolve();
  }

  drain(): Promise<void> {
    if (this.#state.kind === 'leaving') this.#state.draining = true;
    else if (this.#state.kind === 'away') this.device.volume.thread.drain(this.#state.number);
    return this.closed;
  }

  destroy(): void {
    if (this.#state.kind === 'leaving') this.socket.destroy();
    else if (this.#state.kind === 'away') this.device.volume.thread.destroy(this.#state.number);
    this.#pair?.destroy();
  }
}
