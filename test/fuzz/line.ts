/** The client's end of a connection that is attacked: a stream in memory, or a socket. */
import net from 'node:net';
import { Duplex } from 'node:stream';

/** How the client takes what it is sent: at once, some turns later, or not before it has to. */
export type Reader = 'eager' | 'slow' | 'late';

export abstract class Line {
  /** The server has sent its end, or is gone. */
  ended = false;
  /** Nothing can come any more, and nothing can be sent. */
  closed = false;
  #waiting: (() => void)[] = [];
  #listener: ((bytes: Buffer) => void) | null = null;
  #early: Buffer[] = [];

  /** Is told what the server sends, and has sent already. */
  listen(listener: (bytes: Buffer) => void): void {
    this.#listener = listener;
    for (const bytes of this.#early.splice(0)) listener(bytes);
  }

  /** Resolves when the server has room for more, or is gone. */
  abstract send(bytes: Buffer): Promise<void>;
  /** The client's end. */
  abstract end(): void;
  abstract abort(): void;
  /** Takes what the server sends from now on: a late reader's last moment. */
  abstract read(): void;

  /** Resolves when something has happened. */
  news(): Promise<void> {
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  protected received(bytes: Buffer): void {
    if (this.#listener === null) this.#early.push(Buffer.from(bytes));
    else this.#listener(bytes);
  }

  protected tell(): void {
    for (const wake of this.#waiting.splice(0)) wake();
  }
}

/** What the server reads is pushed, what it writes comes to `onBytes`. */
export class MemoryLine extends Line {
  readonly stream: Duplex;
  /** Most bytes that the server had waiting to be taken. */
  heldMax = 0;
  #roomy = true;
  #taking: boolean;
  #held: (() => void) | null = null;

  constructor(reader: Reader) {
    super();
    this.#taking = reader !== 'late';
    this.stream = new Duplex({
      allowHalfOpen: true,
      read: () => {
        this.#roomy = true;
        this.tell();
      },
      write: (bytes: Buffer, _encoding, done) => {
        const take = () => {
          this.#held = null;
          this.received(bytes);
          done();
          this.tell();
        };
        this.heldMax = Math.max(this.heldMax, this.stream.writableLength);
        // Until `done` the memory must stay as it is.
        this.#held = take;
        if (!this.#taking) return;
        if (reader === 'eager') take();
        else setImmediate(() => this.#held === take && take());
      },
      final: (done) => {
        this.ended = true;
        done();
        this.tell();
      },
    });
    this.stream.once('close', () => {
      this.#held?.(); // what was sent before it hung up still arrives
      this.ended = true;
      this.closed = true;
      this.tell();
    });
  }

  async send(bytes: Buffer): Promise<void> {
    while (!this.#roomy && !this.closed) {
      this.read(); // it waits for us: a client that does not read cannot go on
      await this.news();
    }
    if (!this.closed && bytes.length > 0) this.#roomy = this.stream.push(bytes);
  }

  end(): void {
    if (!this.closed) this.stream.push(null);
  }

  abort(): void {
    this.stream.destroy();
  }

  read(): void {
    this.#taking = true;
    const held = this.#held;
    if (held !== null) setImmediate(() => this.#held === held && held());
  }
}

/** A connection to a unix socket. */
export class SocketLine extends Line {
  readonly #socket: net.Socket;

  constructor(path: string, reader: Reader) {
    super();
    this.#socket = net.connect({ path, allowHalfOpen: true });
    this.#socket.on('data', (bytes) => {
      this.received(bytes);
      this.tell();
      if (reader === 'slow') {
        this.#socket.pause();
        setImmediate(() => this.#socket.resume());
      }
    });
    if (reader === 'late') this.#socket.pause();
    this.#socket.on('error', () => {});
    this.#socket.on('end', () => {
      this.ended = true;
      this.tell();
    });
    this.#socket.on('close', () => {
      this.ended = true;
      this.closed = true;
      this.tell();
    });
  }

  send(bytes: Buffer): Promise<void> {
    return new Promise((resolve) => {
      if (this.closed) {
        resolve();
        return;
      }
      this.#socket.once('close', resolve);
      const roomy = this.#socket.write(bytes, () => {
        this.#socket.off('close', resolve);
        setImmediate(resolve); // the server has its turn: pieces stay pieces
      });
      if (!roomy) this.read();
    });
  }

  end(): void {
    this.#socket.end();
  }

  abort(): void {
    this.#socket.destroy();
  }

  read(): void {
    if (this.#socket.isPaused()) this.#socket.resume();
  }
}
