/**
 * Takes a connection out of its socket object, by its descriptor, so that another object, on this thread or another, goes on with it.
 *
 * Only the object goes: closing it closes one descriptor, and never shuts the connection down (libuv closes, and takes the
 * descriptor out of epoll), which lives on in the duplicate. Whatever the object has read already goes along.
 */
import net from 'node:net';
import type { Duplex } from 'node:stream';
import { dup } from '../../native/index.js';

/** Whether the connection can be taken out: of net.Socket itself, none of its descendants (TLS, terminals). */
export function isDetachable(socket: net.Socket | Duplex): socket is net.Socket {
  return Object.getPrototypeOf(socket) === net.Socket.prototype && descriptorOf(socket) !== null;
}

/** The descriptor of the connection, also below TLS. A stream that is none has none. */
export function descriptorOf(socket: net.Socket | Duplex): number | null {
  const handle = (socket as { _handle?: { fd?: unknown } | null })._handle;
  return handle && typeof handle.fd === 'number' && handle.fd >= 0 ? handle.fd : null;
}

/** Calls `then` when all that was written has left, in this turn if that is so already; never if the socket is closed before. */
export function whenSent(socket: net.Socket, then: () => void): void {
  if (socket.writableLength === 0) then();
  else socket.write('', () => (socket.destroyed || socket.writableEnded ? undefined : then()));
}

/**
 * The connection of a socket that has nothing left to send (`whenSent`) and no reader. In one step: nothing can arrive in between.
 * `fd` is the caller's; `read` is what was read and nobody has taken. Throws, and leaves the socket as it is, when there is no
 * descriptor left for the duplicate.
 */
export function detach(socket: net.Socket): { fd: number; read: Buffer[] } {
  const descriptor = descriptorOf(socket);
  if (descriptor === null) throw new Error('the socket is closed');
  const fd = dup(descriptor);
  const read: Buffer[] = [];
  for (let chunk = socket.read() as Buffer | null; chunk !== null; chunk = socket.read() as Buffer | null)
    read.push(chunk);
  socket.destroy();
  return { fd, read };
}
