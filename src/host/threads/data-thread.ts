/**
 * One data thread, from the control thread's side: questions and their answers, sessions that are served there, and its end.
 *
 * When a thread dies, Node has closed every descriptor that was opened there, the images' with their locks among them, and has waited
 * for the system calls that were under way on libuv's pool, before it says so ('exit'; worker option trackUnmanagedFds). So at that
 * moment its volumes are as after a kill of the process, and may be opened again; should a descriptor have stayed, the
 * image's lock refuses that. What is told of a death comes in this order: the volumes' holders, then who waits for answers,
 * then the sessions.
 */

import { Worker } from 'node:worker_threads';
import pino, { type Logger } from 'pino';
import { messageOf } from '../../errors.js';
import { closeFd } from '../../native/index.js';
import {
  type FromThread,
  type OpenOrder,
  ThreadLostError,
  type ToThread,
  unpackError,
  type Verb,
  type VolumeFacts,
} from './messages.js';
import { RemoteVolume } from './remote-volume.js';
import { isLast } from './volume-thread.js';

/** JavaScript heap of one thread. Buffers and maps are not on it; they have their own limits. */
const HEAP_MIB_MAX = 512;
/** How long a thread without volumes may take to end. */
const END_TIMEOUT_MS = 2000;

/** A session there. */
export interface SessionAway {
  complaint(about: string, detail: string): void;
  /** The last call. */
  over(error: Error | null): void;
}

/** What a message carries beside its number. */
type Without<Message, Key extends string> = Message extends unknown ? Omit<Message, Key> : never;
type Question = Without<Extract<ToThread, { request: number }>, 'request'>;
type Handover = Without<Extract<ToThread, { kind: 'session' }>, 'kind' | 'session'>;

interface Asked {
  resolve(value: unknown): void;
  reject(error: Error): void;
}

interface Resident {
  /** Null while it is being opened. */
  held: RemoteVolume | null;
  onLost: ((why: Error) => void) | undefined;
}

export class DataThread {
  readonly #worker: Worker;
  readonly #log: Logger;
  #numbers = 0;
  readonly #asked = new Map<number, Asked>();
  readonly #volumes = new Map<number, Resident>();
  readonly #sessions = new Map<number, SessionAway>();
  /** Descriptors that are on their way, by session. */
  readonly #fds = new Map<number, number>();
  #fault: Error | null = null;
  #ending = false;
  #lost: ThreadLostError | null = null;
  /** Resolves when it is over. `why` is null when it was asked to end. */
  readonly ended: Promise<string | null>;

  constructor(
    readonly name: string,
    script: URL,
    log: Logger,
    onDeath: (why: string) => void,
  ) {
    this.#log = log;
    this.#worker = new Worker(script, {
      name,
      workerData: { log: { level: log.level, bindings: log.bindings() } },
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB_MAX },
      trackUnmanagedFds: true,
    });
    this.#worker.on('message', (message: FromThread) => this.#take(message));
    this.#worker.on('messageerror', (error) => this.#broken(error));
    this.#worker.on('error', (error) => {
      this.#fault = error;
    });
    this.ended = new Promise((resolve) => {
      this.#worker.on('exit', (code) => {
        const why = this.#ending ? null : this.#describeDeath(code);
        if (why !== null) onDeath(why);
        this.#over(new ThreadLostError(why ?? 'it ended'));
        resolve(why);
      });
    });
  }

  /** Volumes that live here or are being opened here. */
  get load(): number {
    return this.#volumes.size;
  }

  get alive(): boolean {
    return this.#lost === null && !this.#ending;
  }

  async open(
    name: string,
    order: OpenOrder,
    onLost: ((why: Error) => void) | undefined,
  ): Promise<RemoteVolume> {
    const volume = this.#number();
    const resident: Resident = { held: null, onLost };
    this.#volumes.set(volume, resident);
    try {
      const facts = (await this.#ask({ kind: 'open', volume, order })) as VolumeFacts;
      // The answer and the death behind it can arrive in one step, before this line.
      if (this.#lost !== null) throw this.#lost;
      resident.held = new RemoteVolume(this, volume, name, facts);
      return resident.held;
    } catch (error) {
      this.#volumes.delete(volume);
      throw error;
    }
  }

  async call(volume: number, verb: Verb, words: unknown[]): Promise<unknown> {
    try {
      const value = await this.#ask({ kind: 'call', volume, verb, arguments: words });
      if (isLast(verb)) this.#volumes.delete(volume);
      return value;
    } catch (error) {
      if (verb === 'close') this.#volumes.delete(volume);
      throw error;
    }
  }

  /** Hands a connection over; its descriptor is the thread's from now on. Its number, for `drain` and `destroy`. */
  begin(session: SessionAway, handover: Handover): number {
    const number = this.#number();
    if (this.#lost !== null) {
      closeFd(handover.fd);
      session.over(this.#lost);
      return number;
    }
    this.#sessions.set(number, session);
    this.#fds.set(number, handover.fd);
    try {
      this.#post({ kind: 'session', session: number, ...handover });
    } catch (error) {
      this.#sessions.delete(number);
      this.#fds.delete(number);
      closeFd(handover.fd);
      session.over(error as Error);
    }
    return number;
  }

  drain(session: number): void {
    this.#post({ kind: 'drain', session });
  }

  destroy(session: number): void {
    this.#post({ kind: 'destroy', session });
  }

  /** Ends the thread, whose volumes are closed. */
  async end(): Promise<void> {
    if (!this.alive) return;
    this.#ending = true;
    this.#post({ kind: 'end' });
    const timer = setTimeout(() => void this.#worker.terminate(), END_TIMEOUT_MS);
    await this.ended;
    clearTimeout(timer);
  }

  #number(): number {
    this.#numbers++;
    return this.#numbers;
  }

  #post(message: ToThread): void {
    if (this.#lost === null) this.#worker.postMessage(message);
  }

  #ask(question: Question): Promise<unknown> {
    if (this.#lost !== null) return Promise.reject(this.#lost);
    return new Promise((resolve, reject) => {
      const request = this.#number();
      this.#asked.set(request, { resolve, reject });
      this.#worker.postMessage({ ...question, request } satisfies ToThread);
    });
  }

  #answered(request: number): Asked | undefined {
    const asked = this.#asked.get(request);
    this.#asked.delete(request);
    return asked;
  }

  #take(message: FromThread): void {
    switch (message.kind) {
      case 'answer':
        this.#answered(message.request)?.resolve(message.value);
        return;
      case 'failure':
        this.#answered(message.request)?.reject(unpackError(message.error));
        return;
      case 'description': {
        const held = this.#volumes.get(message.volume)?.held;
        if (held) held.linkDescription = message.linkDescription;
        return;
      }
      case 'taken':
        this.#fds.delete(message.session);
        return;
      case 'complaint':
        this.#sessions.get(message.session)?.complaint(message.about, message.detail);
        return;
      case 'closed': {
        const session = this.#sessions.get(message.session);
        this.#sessions.delete(message.session);
        session?.over(message.error === null ? null : unpackError(message.error));
        return;
      }
      case 'log':
        writeLine(this.#log, message.line);
        return;
    }
  }

  #broken(error: Error): void {
    this.#fault ??= error;
    void this.#worker.terminate();
  }

  #describeDeath(code: number): string {
    if (this.#fault === null) return `it ended with code ${code}`;
    this.#log.fatal({ err: this.#fault, thread: this.name }, 'a data thread failed');
    return messageOf(this.#fault).split('\n')[0] ?? '';
  }

  #over(why: ThreadLostError): void {
    this.#lost = why;
    for (const fd of this.#fds.values()) closeFd(fd);
    this.#fds.clear();
    const volumes = [...this.#volumes.values()];
    this.#volumes.clear();
    // Those that were not open yet hear of it as their opening fails.
    for (const { held, onLost } of volumes) if (held !== null) onLost?.(why);
    const asked = [...this.#asked.values()];
    this.#asked.clear();
    for (const { reject } of asked) reject(why);
    const sessions = [...this.#sessions.values()];
    this.#sessions.clear();
    for (const session of sessions) session.over(null);
  }
}

/** A line that another thread's log made, in its place among ours. */
function writeLine(log: Logger, line: string): void {
  const { [pino.symbols.streamSym]: stream } = log as unknown as {
    [pino.symbols.streamSym]: { write(line: string): void };
  };
  stream.write(line);
}
