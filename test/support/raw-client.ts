/** A client that sends and expects plain bytes, with a deadline on everything it waits for. */
import assert from 'node:assert/strict';
import net from 'node:net';

const DEADLINE_MS = 5000;

export class RawClient {
  readonly socket: net.Socket;
  #received = Buffer.alloc(0);
  #closed = false;
  #wake: () => void = () => {};

  private constructor(socket: net.Socket) {
    this.socket = socket;
    socket.on('data', (bytes) => {
      this.#received = Buffer.concat([this.#received, bytes]);
      this.#wake();
    });
    socket.on('error', () => {});
    for (const event of ['end', 'close'])
      socket.on(event, () => {
        this.#closed = true;
        this.#wake();
      });
  }

  static async connect(to: net.NetConnectOpts): Promise<RawClient> {
    const socket = net.connect({ ...to, allowHalfOpen: true });
    const client = new RawClient(socket);
    await within(
      new Promise<void>((resolve, reject) => {
        socket.once('connect', () => resolve());
        socket.once('error', reject);
      }),
      'connecting',
    );
    return client;
  }

  send(...bytes: Buffer[]): void {
    this.socket.write(Buffer.concat(bytes));
  }

  /** The next `length` bytes. */
  async receive(length: number): Promise<Buffer> {
    await this.#until(() => this.#received.length >= length, `${length} bytes`);
    assert.ok(
      this.#received.length >= length,
      `the server closed after ${this.#received.length} of ${length} bytes`,
    );
    const bytes = this.#received.subarray(0, length);
    this.#received = this.#received.subarray(length);
    return bytes;
  }

  /** What comes before the server closes its side. */
  async receiveAll(): Promise<Buffer> {
    await this.#until(() => this.#closed, 'the end');
    return this.#received;
  }

  close(): void {
    this.socket.destroy();
  }

  #until(condition: () => boolean, what: string): Promise<void> {
    return within(
      new Promise((resolve) => {
        this.#wake = () => {
          if (condition() || this.#closed) resolve();
        };
        this.#wake();
      }),
      what,
    );
  }
}

/** Fails when `promise` takes longer than a working program can need. */
export async function within<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const tooLate = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited in vain for ${what}`)), DEADLINE_MS);
  });
  try {
    return await Promise.race([promise, tooLate]);
  } finally {
    clearTimeout(timer);
  }
}

/** Polls a condition until it holds. */
export async function eventually(condition: () => boolean, what: string): Promise<void> {
  const deadline = Date.now() + DEADLINE_MS;
  while (!condition()) {
    assert.ok(Date.now() < deadline, `waited in vain for ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}
