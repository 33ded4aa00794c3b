/** A session that reads and answers nothing, closes on DISC or when the client does, and remembers what happened to it. */
import type net from 'node:net';
import type { Duplex } from 'node:stream';
import { Command, REQUEST_HEADER_BYTES } from '../../src/nbd/constants.js';
import type { Session, SessionParameters, StartSession } from '../../src/nbd/server/listener.js';

export class IdleSession implements Session {
  readonly closed: Promise<void>;
  received: Buffer;
  drained = false;
  destroyed = false;
  /** Set false to be a session whose requests do not finish. */
  drains = true;
  #over = false;
  #resolve: () => void = () => {};

  constructor(
    readonly socket: net.Socket | Duplex,
    readonly parameters: SessionParameters,
  ) {
    this.received = parameters.rest;
    this.closed = new Promise((resolve) => {
      this.#resolve = resolve;
    });
    socket.on('data', (bytes: Buffer) => {
      this.received = Buffer.concat([this.received, bytes]);
      this.#look();
    });
    socket.once('end', () => this.#end());
    this.#look();
  }

  async drain(): Promise<void> {
    this.drained = true;
    if (this.drains) this.#end();
    await this.closed;
  }

  destroy(): void {
    this.destroyed = true;
    this.#end();
    this.socket.destroy();
  }

  #look(): void {
    for (let at = 0; this.received.length - at >= REQUEST_HEADER_BYTES; at += REQUEST_HEADER_BYTES)
      if (this.received.readUInt16BE(at + 6) === Command.DISC) this.#end();
  }

  #end(): void {
    if (this.#over) return;
    this.#over = true;
    this.socket.end();
    this.parameters.device.release();
    this.#resolve();
  }
}

/** A starter of such sessions, and those it started. */
export function idleSessions(): { start: StartSession; sessions: IdleSession[] } {
  const sessions: IdleSession[] = [];
  return {
    sessions,
    start(socket, parameters) {
      const session = new IdleSession(socket, parameters);
      sessions.push(session);
      return session;
    },
  };
}
