/**
 * A data thread from the inside: the volumes that live here, and the sessions that were handed over to them.
 *
 * Messages are taken in their order, and what a call does up to its first wait is done before the next message is looked at: calls to
 * one volume begin in the order in which the control thread made them.
 */

import net from 'node:net';
import type { MessagePort } from 'node:worker_threads';
import pino, { type Logger } from 'pino';
import { BlockferryError } from '../../errors.js';
import { closeFd } from '../../native/index.js';
import type { Session, StartSession } from '../../nbd/server/listener.js';
import type { HeldVolume, HoldVolume } from '../held-volume.js';
import {
  type DeviceFacts,
  type FromThread,
  packError,
  type ThreadData,
  type ToThread,
  VERBS,
  type Verb,
  type VolumeFacts,
} from './messages.js';

export interface ThreadParts {
  hold: HoldVolume;
  startSession: StartSession;
}

/** Does what the port asks for until it is told to end. */
export function runVolumeThread(port: MessagePort, data: ThreadData, parts: ThreadParts): void {
  const thread = new VolumeThread(port, data, parts);
  port.on('message', (message: ToThread) => thread.take(message));
}

interface Resident {
  readonly held: HeldVolume;
  /** The description the control thread was told last. */
  told: string;
}

class VolumeThread {
  readonly #volumes = new Map<number, Resident>();
  readonly #sessions = new Map<number, Session>();
  readonly #log: Logger;

  constructor(
    private readonly port: MessagePort,
    data: ThreadData,
    private readonly parts: ThreadParts,
  ) {
    const { level, bindings } = data.log;
    const sink = { write: (line: string): void => this.#post({ kind: 'log', line }) };
    this.#log = pino({ level, base: null }, sink).child(bindings);
  }

  take(message: ToThread): void {
    switch (message.kind) {
      case 'open':
        void this.#answer(message.request, message.volume, () => this.#open(message));
        return;
      case 'call':
        void this.#answer(message.request, message.volume, () => this.#call(message));
        return;
      case 'session':
        this.#begin(message);
        return;
      case 'drain':
        void this.#sessions.get(message.session)?.drain();
        return;
      case 'destroy':
        this.#sessions.get(message.session)?.destroy();
        return;
      case 'end':
        this.port.close();
        return;
    }
  }

  #post(message: FromThread): void {
    this.port.postMessage(message);
  }

  async #answer(request: number, volume: number, act: () => Promise<unknown>): Promise<void> {
    try {
      const value = await act();
      this.#tellDescription(volume);
      this.#post({ kind: 'answer', request, value });
    } catch (error) {
      this.#tellDescription(volume);
      this.#post({ kind: 'failure', request, error: packError(error) });
    }
  }

  #tellDescription(volume: number): void {
    const resident = this.#volumes.get(volume);
    if (resident === undefined) return;
    const { linkDescription } = resident.held;
    if (linkDescription === resident.told) return;
    resident.told = linkDescription;
    this.#post({ kind: 'description', volume, linkDescription });
  }

  async #open({ volume, order }: Extract<ToThread, { kind: 'open' }>): Promise<VolumeFacts> {
    const held = await this.parts.hold({ ...order, log: this.#log });
    const { id, image, linkDescription, link, hashes } = held;
    this.#volumes.set(volume, { held, told: linkDescription });
    return { id, image, linkDescription, link: factsOf(link), hashes: factsOf(hashes) };
  }

  async #call(message: Extract<ToThread, { kind: 'call' }>): Promise<unknown> {
    const { volume, verb } = message;
    const resident = this.#volumes.get(volume);
    if (resident === undefined) throw new BlockferryError('closed', 'the volume is closed');
    if (!VERBS.includes(verb)) throw new Error(`there is no verb ${verb}`);
    const act = resident.held[verb] as (...words: unknown[]) => Promise<unknown>;
    if (verb !== 'close') {
      const value = await act.apply(resident.held, message.arguments);
      if (isLast(verb)) this.#volumes.delete(volume);
      return value;
    }
    try {
      return await act.apply(resident.held, message.arguments);
    } finally {
      this.#volumes.delete(volume); // closed, though perhaps not in order
    }
  }

  #begin(message: Extract<ToThread, { kind: 'session' }>): void {
    const { session: number, volume, face, fd, agreed } = message;
    // Said before the descriptor is used: should this thread die right here, it is better left open than closed twice, which might
    // close another file.
    this.#post({ kind: 'taken', session: number });
    let socket: net.Socket;
    try {
      socket = new net.Socket({ fd, readable: true, writable: true, allowHalfOpen: true });
    } catch (error) {
      closeFd(fd);
      this.#post({ kind: 'closed', session: number, error: packError(error) });
      return;
    }
    const resident = this.#volumes.get(volume);
    if (resident === undefined || resident.held.linkDescription !== message.linkDescription) {
      this.#tellDescription(volume);
      socket.destroy();
      this.#post({ kind: 'closed', session: number, error: null });
      return;
    }
    try {
      const { buffer, byteOffset, byteLength } = agreed.rest;
      const session = this.parts.startSession(socket, {
        ...agreed,
        rest: Buffer.from(buffer, byteOffset, byteLength),
        device: resident.held[face],
        log: this.#log.child(message.bindings),
        complain: (about, detail) => this.#post({ kind: 'complaint', session: number, about, detail }),
      });
      this.#sessions.set(number, session);
      session.closed.then(
        () => this.#ended(number, null),
        (error: unknown) => this.#ended(number, error),
      );
    } catch (error) {
      socket.destroy();
      this.#post({ kind: 'closed', session: number, error: packError(error) });
    }
  }

  #ended(session: number, error: unknown): void {
    this.#sessions.delete(session);
    this.#post({ kind: 'closed', session, error: error === null ? null : packError(error) });
  }
}

/** The volume is no more once it succeeded. */
export function isLast(verb: Verb): boolean {
  return verb === 'cancel' || verb === 'close';
}

function factsOf(device: DeviceFacts): DeviceFacts {
  const { size, readOnly, multiConn, fastZero = false, preferredBlock, contexts } = device;
  return { size, readOnly, multiConn, fastZero, preferredBlock, contexts: [...contexts] };
}
