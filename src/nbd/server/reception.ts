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
import { dup, peerGone, sendBuffer } from '../../native/index.js';

/** Bytes one read can bring. */
export const RECEIVE_BUFFER_BYTES = 256 << 10;

/**
 * Bytes of answers that the kernel takes before the client has read them. Linux wakes the writer of a unix socket only when three
 * quarters of them are read: with its default of 208 KiB client and server wait for each other in turn.
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
    const handle = handleOf(socket);
    if (handle === null) this.#openPlain();
    else {
      socket.pause();
      if (socket.writableLength === 0) this.#takeOver(socket as net.Socket, handle);
      else socket.write('', () => this.#takeOver(socket as net.Socket, handle));
    }
  }

  resume(): void {
    if (this.#open) this.stream.resume();
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

  #takeOver(socket: net.Socket, handle: Handle): void {
    if (socket.destroyed || socket.writableEnded) return; // closed while we waited
    let descriptor: number;
    try {
      descriptor = dup(handle.fd);
    } catch {
      this.#openPlain(); // out of descriptors: slower, but served
      return;
    }
    sendBuffer(descriptor, SEND_BUFFER_BYTES); // not vital
    const chunks = [this.rest];
    for (let chunk = readAll(socket); chunk !== null; chunk = readAll(socket)) chunks.push(chunk);
    socket.off('close', this.#onClose);
    socket.destroy(); // closes the old descriptor only: the connection lives on in the new one
    const { sink } = this;
    const options: net.SocketConstructorOpts & net.ConnectOpts = {
      fd: descriptor,
      readable: true,
      writable: true,
      allowHalfOpen: true,
      onread: {
        buffer: Buffer.allocUnsafeSlow(RECEIVE_BUFFER_BYTES),
        callback: (length, chunk) => sink.onBytes(chunk as Buffer, length),
      },
    };
    this.stream = new net.Socket(options);
    this.stream.on('error', this.#onError);
    this.stream.on('close', this.#onClose);
    this.stream.on('end', this.#onEnd);
    this.#begin(Buffer.concat(chunks), descriptor);
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

/** What the socket object has read and nobody has taken. */
function readAll(socket: net.Socket): Buffer | null {
  return socket.read();
}

interface Handle {
  readonly fd: number;
}

/** The handle of a socket that can be taken over: of net.Socket itself, none of its descendants (TLS, terminals). */
function handleOf(socket: net.Socket | Duplex): Handle | null {
  if (Object.getPrototypeOf(socket) !== net.Socket.prototype) return null;
  return descriptorOf(socket) === null ? null : (socket as unknown as { _handle: Handle })._handle;
}

/** The descriptor of the connection, also below TLS. A stream that is none has none. */
function descriptorOf(socket: net.Socket | Duplex): number | null {
  const handle = (socket as { _handle?: Partial<Handle> | null })._handle;
  return handle && typeof handle.fd === 'number' && handle.fd >= 0 ? handle.fd : null;
}
