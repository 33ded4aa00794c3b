/** A connection of plain bytes to any server, with a deadline on everything that is waited for. */
import { strict as assert } from 'node:assert';
import net from 'node:net';
import type { NbdAddress } from '../../../src/nbd/uri.js';

/** Far longer than a server that works needs; a server that hangs costs this once a case. */
export const DEADLINE_MS = 5_000;
/** For requests of tens of MiB. */
export const LONG_DEADLINE_MS = 20_000;

const RETRY_MS = 20;

export class Wire {
  deadlineMs = DEADLINE_MS;
  readonly #socket: net.Socket;
  #pieces: Buffer[] = [];
  #available = 0;
  #over = false;
  #detached = false;
  #wake: () => void = () => {};

  private constructor(socket: net.Socket) {
    this.#socket = socket;
    socket.on('data', this.#onData);
    socket.on('error', () => {}); // 'close' follows
    socket.on('end', this.#onOver);
    socket.on('close', this.#onOver);
  }

  readonly #onData = (bytes: Buffer): void => {
    this.#pieces.push(bytes);
    this.#available += bytes.length;
    this.#wake();
  };

  readonly #onOver = (): void => {
    this.#over = true;
    this.#wake();
  };

  static async connect(address: NbdAddress): Promise<Wire> {
    const to = address.kind === 'unix' ? { path: address.path } : { host: address.host, port: address.port };
    for (const deadline = performance.now() + DEADLINE_MS; ; ) {
      try {
        return await Wire.#connect(to);
      } catch (error) {
        // A unix socket whose server has not accepted its last clients yet.
        if ((error as NodeJS.ErrnoException).code !== 'EAGAIN' || performance.now() > deadline) throw error;
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
  }

  static async #connect(to: net.NetConnectOpts): Promise<Wire> {
    const socket = net.connect({ ...to, allowHalfOpen: true });
    const wire = new Wire(socket);
    const connected = new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    try {
      await within(connected, DEADLINE_MS, 'a connection');
    } catch (error) {
      socket.destroy();
      throw error;
    }
    return wire;
  }

  /** The server has closed its side. */
  get over(): boolean {
    return this.#over;
  }

  /** Bytes that have come and were not received yet. */
  get available(): number {
    return this.#available;
  }

  send(...bytes: Buffer[]): void {
    if (!this.#socket.destroyed) this.#socket.write(Buffer.concat(bytes));
  }

  /** One segment a byte, as far as that is in our hands. */
  async sendSlowly(bytes: Buffer): Promise<void> {
    this.#socket.setNoDelay(true);
    for (let at = 0; at < bytes.length; at++) {
      this.send(bytes.subarray(at, at + 1));
      await new Promise((resolve) => setImmediate(resolve));
    }
  }

  /** The next `length` bytes. */
  async receive(length: number, what = `${length} bytes`): Promise<Buffer> {
    await this.#until(() => this.#available >= length, what);
    assert.ok(this.#available >= length, `the server closed the connection instead of ${what}`);
    return this.#take(length);
  }

  /** What comes before the server closes its side. */
  async ended(): Promise<Buffer> {
    await this.#until(() => false, 'the server to close the connection');
    return this.#take(this.#available);
  }

  /** Ends our side: the server may still answer. */
  end(): void {
    this.#socket.end();
  }

  /** Nothing more is read from the connection. */
  pause(): void {
    this.#socket.pause();
  }

  /** A socket that was given away is closed by what is on top of it: Node 20 crashes when it goes away below TLS first. */
  close(): void {
    if (!this.#detached) this.#socket.destroy();
  }

  /**
   * Goes on with another stream on top of this connection (TLS): gives the socket away. Whoever takes it closes it through that stream
   * only: Node 20 crashes in SSL_read when the socket below a TLSSocket is destroyed beside it.
   */
  detach(): net.Socket {
    this.#detached = true;
    this.#socket.off('data', this.#onData);
    this.#socket.off('end', this.#onOver);
    this.#socket.off('close', this.#onOver);
    return this.#socket;
  }

  /** The same face for a stream that is connected already. */
  static over(socket: net.Socket): Wire {
    return new Wire(socket);
  }

  #take(length: number): Buffer {
    const taken: Buffer[] = [];
    let missing = length;
    while (missing > 0) {
      const piece = this.#pieces[0]!;
      if (piece.length > missing) {
        taken.push(piece.subarray(0, missing));
        this.#pieces[0] = piece.subarray(missing);
        break;
      }
      taken.push(piece);
      missing -= piece.length;
      this.#pieces.shift();
    }
    this.#available -= length;
    return taken.length === 1 ? taken[0]! : Buffer.concat(taken);
  }

  /** Until the condition holds or the server has closed. */
  #until(condition: () => boolean, what: string): Promise<void> {
    return within(
      new Promise((resolve) => {
        this.#wake = () => {
          if (condition() || this.#over) resolve();
        };
        this.#wake();
      }),
      this.deadlineMs,
      what,
    );
  }
}

export async function within<T>(promise: Promise<T>, timeoutMs: number, what: string): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`waited ${timeoutMs} ms in vain for ${what}`)), timeoutMs);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}
