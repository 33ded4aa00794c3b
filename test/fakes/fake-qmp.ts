/** A QMP server that does what it is told: answers by table, sends events and garbage, goes silent, dies. */

import { createServer, type Server, type Socket } from 'node:net';

type Json = Record<string, unknown>;

/** What to do with a command: answer with a value, refuse it, or nothing at all. */
export type FakeAnswer =
  | { return: unknown }
  | { error: { class: string; desc: string } }
  | 'silence'
  | 'hang-up';
export type FakeHandler = (args: Json) => FakeAnswer;

const GREETING =
  '{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}}, "capabilities": ["oob"]}}';

export interface FakeQmpOptions {
  /** First line that is sent, null for none. */
  greeting?: string | null;
  handlers?: Record<string, FakeHandler>;
}

export class FakeQmp {
  readonly commands: { execute: string; arguments: Json }[] = [];
  readonly handlers: Record<string, FakeHandler>;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #connected: Promise<void>;

  private constructor(options: FakeQmpOptions) {
    this.handlers = { qmp_capabilities: () => ({ return: {} }), ...options.handlers };
    let connected!: () => void;
    this.#connected = new Promise((resolve) => {
      connected = resolve;
    });
    this.#server = createServer((socket) => {
      this.#sockets.add(socket);
      socket.on('error', () => {});
      socket.on('close', () => this.#sockets.delete(socket));
      let rest = '';
      socket.setEncoding('utf8');
      socket.on('data', (chunk: string) => {
        const lines = (rest + chunk).split('\n');
        rest = lines.pop()!;
        for (const line of lines) this.#command(socket, JSON.parse(line) as Json);
      });
      const greeting = options.greeting === undefined ? GREETING : options.greeting;
      if (greeting !== null) socket.write(`${greeting}\r\n`);
      connected();
    });
  }

  static async listen(path: string, options: FakeQmpOptions = {}): Promise<FakeQmp> {
    const fake = new FakeQmp(options);
    await new Promise<void>((resolve, reject) => {
      fake.#server.once('error', reject);
      fake.#server.listen(path, resolve);
    });
    return fake;
  }

  /** Resolves when the first client is there. */
  get connected(): Promise<void> {
    return this.#connected;
  }

  event(name: string, data: Json = {}): void {
    this.raw(
      `${JSON.stringify({ event: name, data, timestamp: { seconds: 1_700_000_000, microseconds: 250_000 } })}\r\n`,
    );
  }

  migration(...statuses: string[]): void {
    for (const status of statuses) this.event('MIGRATION', { status });
  }

  /** Bytes to every client, as they are. */
  raw(bytes: string | Buffer): void {
    for (const socket of this.#sockets) socket.write(bytes);
  }

  hangUp(): void {
    for (const socket of this.#sockets) socket.destroy();
  }

  async close(): Promise<void> {
    this.hangUp();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
  }

  #command(socket: Socket, message: Json): void {
    const execute = String(message.execute);
    const args = (message.arguments ?? {}) as Json;
    this.commands.push({ execute, arguments: args });
    const refusal = {
      error: { class: 'CommandNotFound', desc: `The command ${execute} has not been found` },
    };
    const answer = this.handlers[execute]?.(args) ?? refusal;
    if (answer === 'hang-up') socket.destroy();
    else if (answer !== 'silence') socket.write(`${JSON.stringify({ ...answer, id: message.id })}\r\n`);
  }
}
