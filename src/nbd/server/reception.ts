/**
 * Where a session's bytes come from. Two ways, one face:
 *
 * - A plain TCP or unix socket is taken over by its descriptor, once the handshake's last answer has left: a duplicate is
 *   opened with one receive buffer that every read reuses, and the socket object of the handshake goes. Nothing is
 *   lost: what that object had read already is handed on first.
 * - Any other stream (stdio, TLS) is read by its 'data' events. TLS keeps the connection's own descriptor below it, which tells
 *   whether the client is still there.
 */

import net from 'node:net';
import type { Duplex } from 'node:stream';
import { peerGone, sendBuffer } from '../../native/index.js';
import { descriptorOf, detach, isDetachable, whenSent } from './detach.js';

/** Bytes one read can bring: 256 KiB of payload in requests of 64 KiB, with their headers. */
export const RECEIVE_BUFFER_BYTES = 260 << 10;

/**
 * Bytes of answers that the kernel takes of a unix socket before the client has read them. Linux wakes its writer only when three quarters of
 * them are read: with the default of 208 KiB client and server wait for each other in turn. TCP finds a size by itself.
 */
const SEND_BUFFER_BYTES = 2 << 20;

export interface Sink {
  /**
   * The stream to write to, once, before the first bytes. What it has nothing queued before may also be sent straight to `descriptor`,
   * if there is one, until it is destroyed.
   */
  onOpen(stream: Duplex, descriptor: number | null): void;
  /**
   * [0, length) of `chunk` arrived. True: done with them. False: the rest must stay as it is and nothing more may come,
   * until `resume`.
   */
  onBytes(chunk: Buffer, length: number): boolean;
  /** The client sends no more. */
  onEnd(): void;
  onError(error: Error): void;
  /** The last call. */
  onClose(): void;
}

export class Reception {
  /** What is read and written now; changes at most once. */
  stream: net.Socket | Duplex;
  /** What every read of a connection that was taken over comes in; null without one. */
  buffer: Buffer | null = null;
  #open = false;

  /** `rest`: bytes of transmission that the handshake has read. */
  constructor(
    socket: net.Socket | Duplex,
    private readonly rest: Buffer,
    private readonly sink: Sink,
  ) {
    this.stream = socket;
  }

  /** May call the sink before it returns. */
  start(): void {
    const socket = this.stream;
    socket.on('error', this.#onError);
    socket.on('close', this.#onClose);
    if (!isDetachable(socket)) this.#openPlain();
    else {
      socket.pause();
      whenSent(socket, () => this.#takeOver(socket));
    }
  }

  resume(): void {
    if (this.#open) this.stream.resume();
  }

  pause(): void {
    this.stream.pause();
  }

  /** The client is known to send no more, though some of what it sent may not have been read yet. */
  get peerGone(): boolean {
    const descriptor = descriptorOf(this.stream);
    return this.stream.destroyed || (descriptor !== null && peerGone(descriptor) !== 0);
  }

  #openPlain(): void {
    const { stream, sink } = this;
    stream.allowHalfOpen = true; // answers still go out behind the client's end
    stream.on('end', this.#onEnd);
    stream.on('data', (chunk: Buffer) => {
      if (!sink.onBytes(chunk, chunk.length)) stream.pause();
    });
    this.#begin(this.rest, null);
  }

  #takeOver(socket: net.Socket): void {
    const unix = socket.remoteAddress === undefined; // of a socket that was detached nobody knows
    let taken: { fd: number; read: Buffer[] };
    try {
      taken = detach(socket);
    } catch {
      this.#openPlain(); // out of descriptors: slower, but served
      return;
    }
    if (unix) sendBuffer(taken.fd, SEND_BUFFER_BYTES); // not vital
    socket.off('close', this.#onClose);
    const { sink } = this;
    this.buffer = Buffer.allocUnsafeSlow(RECEIVE_BUFFER_BYTES);
    const options: net.SocketConstructorOpts & net.ConnectOpts = {
      fd: taken.fd,
      readable: true,
      writable: true,
      allowHalfOpen: true,
      onread: {
        buffer: this.buffer,
        callback: (length, chunk) => sink.onBytes(chunk as Buffer, length),
      },
    };
    this.stream = new net.Socket(options);
    this.stream.on('error', this.#onError);
    this.stream.on('close', this.#onClose);
    this.stream.on('end', this.#onEnd);
    this.#begin(Buffer.concat([this.rest, ...taken.read]), taken.fd);
  }

  #begin(first: Buffer, descriptor: number | null): void {
    this.#open = true;
    this.sink.onOpen(this.stream, descriptor);
    if (first.length === 0 || this.sink.onBytes(first, first.length)) this.stream.resume();
    else this.stream.pause();
  }

  readonly #onEnd = (): void => this.sink.onEnd();
  readonly #onError = (error: Error): void => {
    this.sink.onError(error);
    this.stream.destroy(); // a TLS socket tells of a damaged record and leaves the rest to us
  };
  readonly #onClose = (): void => this.sink.onClose();
}
