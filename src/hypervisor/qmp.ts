/**
 * QEMU's machine protocol (QMP) over a unix socket: JSON lines. QEMU greets, the client negotiates, then commands are answered by
 * id, and events come at any time.
 *
 * Invariants:
 * - Every command settles exactly once: by its answer, by its deadline, or by the end of the connection.
 * - Events are numbered from 1 in order of arrival, and the last EVENTS_KEPT are remembered, so that one who first asks
 *   for something and then waits for its event (`waitFor` with `after`) misses nothing.
 * - What cannot be understood ends the connection: after garbage the border between lines is not known any more.
 */

import { connect, type Socket } from 'node:net';
import { BlockferryError, messageOf } from '../errors.js';

/** QEMU's own answers stay far below (query-qmp-schema: about 250 KiB). */
const LINE_BYTES_MAX = 4 * 1024 * 1024;
const EVENTS_KEPT = 256;
const PENDING_MAX = 1024;
const COMMAND_TIMEOUT_MS = 30_000;
const HANDSHAKE_TIMEOUT_MS = 10_000;

export type JsonObject = Record<string, unknown>;

export interface QmpEvent {
  /** 1 for the first event of this connection. */
  readonly number: number;
  /** QEMU's name of it, e.g. RESUME. */
  readonly name: string;
  readonly data: JsonObject;
  /** QEMU's clock, milliseconds since 1970, with microseconds behind the point; 0 if it did not say. */
  readonly timestampMs: number;
}

interface Pending {
  command: string;
  resolve(answer: unknown): void;
  reject(error: Error): void;
  timer: NodeJS.Timeout;
}

interface Waiter {
  predicate(event: QmpEvent): boolean;
  resolve(event: QmpEvent): void;
  reject(error: Error): void;
  timer: NodeJS.Timeout;
}

export interface WaitOptions {
  timeoutMs: number;
  /** Events numbered above this count, also those that came already. Default: only those still to come. */
  after?: number;
}

/** QEMU's answer to a command it refused: `qemuClass` is GenericError, CommandNotFound, DeviceNotFound, ... */
export class QmpCommandError extends BlockferryError {
  constructor(
    readonly command: string,
    readonly qemuClass: string,
    readonly description: string,
  ) {
    super('hypervisor', `QEMU refused ${command}: ${description}`);
  }
}

export class QmpClient {
  readonly #socket: Socket;
  readonly #pending = new Map<number, Pending>();
  readonly #waiters = new Set<Waiter>();
  readonly #listeners = new Set<(event: QmpEvent) => void>();
  readonly #events: QmpEvent[] = [];
  #parts: Buffer[] = [];
  #partsBytes = 0;
  #nextId = 1;
  #lastEvent = 0;
  #ended: BlockferryError | null = null;
  #greeted: ((error: BlockferryError | null) => void) | null = null;
  /** Resolves with the reason when the connection is over. */
  readonly closed: Promise<BlockferryError>;
  #resolveClosed!: (reason: BlockferryError) => void;

  private constructor(socket: Socket) {
    this.#socket = socket;
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    socket.on('data', (chunk: Buffer) => this.#receive(chunk));
    socket.on('error', (error) => this.#end(`the QMP connection failed: ${error.message}`, error));
    socket.on('close', () => this.#end('QEMU closed the QMP connection'));
  }

  /** Connects to a socket that exists, waits for the greeting and negotiates. */
  static async connect(path: string, timeoutMs = HANDSHAKE_TIMEOUT_MS): Promise<QmpClient> {
    const client = new QmpClient(connect({ path }));
    const timer = setTimeout(() => {
      client.#end(`no QMP greeting within ${timeoutMs} ms`, undefined, 'timeout');
    }, timeoutMs);
    try {
      await new Promise<void>((resolve, reject) => {
        client.#greeted = (error) => (error === null ? resolve() : reject(error));
      });
      await client.execute('qmp_capabilities', {}, timeoutMs);
      return client;
    } catch (error) {
      client.close();
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Number of the last event that came; for `after`. */
  get lastEvent(): number {
    return this.#lastEvent;
  }

  /** Runs a command; the answer is QEMU's `return` value, unchecked. */
  execute(command: string, args: JsonObject = {}, timeoutMs = COMMAND_TIMEOUT_MS): Promise<unknown> {
    if (this.#ended !== null) return Promise.reject(this.#ended);
    if (this.#pending.size >= PENDING_MAX) {
      return Promise.reject(
        new BlockferryError('hypervisor', `too many QMP commands wait for an answer, ${command} not sent`),
      );
    }
    const id = this.#nextId++;
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#pending.delete(id);
        reject(new BlockferryError('timeout', `QEMU did not answer ${command} within ${timeoutMs} ms`));
      }, timeoutMs);
      this.#pending.set(id, { command, resolve, reject, timer });
      this.#socket.write(`${JSON.stringify({ execute: command, arguments: args, id })}\r\n`);
    });
  }

  /** The first event that fits. Rejects with 'timeout', or with the connection's end. */
  waitFor(predicate: (event: QmpEvent) => boolean, options: WaitOptions): Promise<QmpEvent> {
    if (options.after !== undefined) {
      const after = options.after;
      const found = this.#events.find((event) => event.number > after && predicate(event));
      if (found !== undefined) return Promise.resolve(found);
    }
    if (this.#ended !== null) return Promise.reject(this.#ended);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#waiters.delete(waiter);
        reject(
          new BlockferryError(
            'timeout',
            `the awaited QEMU event did not come within ${options.timeoutMs} ms`,
          ),
        );
      }, options.timeoutMs);
      const waiter: Waiter = { predicate, resolve, reject, timer };
      this.#waiters.add(waiter);
    });
  }

  /** Calls for each event to come; the answer ends that. A listener must not throw. */
  onEvent(listener: (event: QmpEvent) => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  close(): void {
    this.#end('the QMP connection was closed');
  }

  #receive(chunk: Buffer): void {
    let from = 0;
    for (;;) {
      const newline = chunk.indexOf(0x0a, from);
      if (newline < 0) break;
      this.#parts.push(chunk.subarray(from, newline));
      const line = Buffer.concat(this.#parts).toString('utf8').trim();
      this.#parts = [];
      this.#partsBytes = 0;
      from = newline + 1;
      if (line.length > 0) this.#line(line);
      if (this.#ended !== null) return;
    }
    if (from === chunk.length) return;
    this.#parts.push(chunk.subarray(from));
    this.#partsBytes += chunk.length - from;
    if (this.#partsBytes > LINE_BYTES_MAX)
      this.#end(`QEMU sent a QMP line of more than ${LINE_BYTES_MAX} bytes`);
  }

  #line(line: string): void {
    let message: unknown;
    try {
      message = JSON.parse(line);
    } catch (error) {
      this.#end(`no JSON on the QMP connection (${messageOf(error)}): is it the right socket?`, error);
      return;
    }
    if (!isObject(message)) this.#end('a QMP message is not an object: is it the right socket?');
    else if ('QMP' in message) this.#greet();
    else if (typeof message.event === 'string') this.#event(message.event, message);
    else if ('return' in message || 'error' in message) this.#answer(message);
    // Anything else is from a newer protocol: not for us.
  }

  #greet(): void {
    this.#greeted?.(null);
    this.#greeted = null;
  }

  #answer(message: JsonObject): void {
    const id = message.id;
    const pending = typeof id === 'number' ? this.#pending.get(id) : undefined;
    // No such command: it was given up at its deadline, or QEMU complains of a line it could not read (no id).
    if (pending === undefined) return;
    this.#pending.delete(id as number);
    clearTimeout(pending.timer);
    const error = message.error;
    if (error === undefined) {
      pending.resolve(message.return);
      return;
    }
    const { class: kind, desc } = isObject(error) ? error : {};
    pending.reject(
      new QmpCommandError(pending.command, String(kind ?? 'unknown'), String(desc ?? 'no reason given')),
    );
  }

  #event(name: string, message: JsonObject): void {
    const { seconds, microseconds } = isObject(message.timestamp) ? message.timestamp : {};
    const timed = typeof seconds === 'number' && typeof microseconds === 'number';
    const event: QmpEvent = {
      number: ++this.#lastEvent,
      name,
      data: isObject(message.data) ? message.data : {},
      timestampMs: timed ? seconds * 1000 + microseconds / 1000 : 0,
    };
    this.#events.push(event);
    if (this.#events.length > EVENTS_KEPT) this.#events.shift();
    for (const listener of this.#listeners) listener(event);
    for (const waiter of this.#waiters) {
      if (!waiter.predicate(event)) continue;
      this.#waiters.delete(waiter);
      clearTimeout(waiter.timer);
      waiter.resolve(event);
    }
  }

  #end(why: string, cause?: unknown, code: 'hypervisor' | 'timeout' = 'hypervisor'): void {
    if (this.#ended !== null) return;
    const error = new BlockferryError(code, why, { cause });
    this.#ended = error;
    this.#socket.destroy();
    this.#parts = [];
    for (const { timer, reject } of [...this.#pending.values(), ...this.#waiters]) {
      clearTimeout(timer);
      reject(error);
    }
    this.#pending.clear();
    this.#waiters.clear();
    this.#listeners.clear();
    this.#greeted?.(error);
    this.#greeted = null;
    this.#resolveClosed(error);
  }
}

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
