import { once } from 'node:events';
import net from 'node:net';
import { socketPair } from '../../src/native/index.js';
import {
  ChunkFlag,
  ChunkType,
  Command,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from '../../src/nbd/constants.js';

export interface RawRequest {
  command: number;
  flags?: number;
  cookie: number;
  offset?: number | bigint;
  length?: number;
  payload?: Buffer;
  magic?: number;
}

export function encodeRequest(request: RawRequest): Buffer {
  const payload = request.payload ?? Buffer.alloc(0);
  const bytes = Buffer.alloc(28 + payload.length);
  bytes.writeUInt32BE(request.magic ?? REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(request.flags ?? 0, 4);
  bytes.writeUInt16BE(request.command, 6);
  bytes.writeBigUInt64BE(BigInt(request.cookie), 8);
  bytes.writeBigUInt64BE(BigInt(request.offset ?? 0), 16);
  bytes.writeUInt32BE(request.length ?? payload.length, 24);
  payload.copy(bytes, 28);
  return bytes;
}

export interface Reply {
  cookie: number;
  errno: number;
  /** It was one simple reply, no chunk. */
  simple: boolean;
  /** READ: the data. */
  data: Buffer | null;
  message: string;
  /** BLOCK_STATUS: extents by context id. */
  status: Map<number, [length: number, status: number][]>;
  /** Types of its chunks, in order. */
  chunks: number[];
}

/** Takes replies apart, and throws where they break the protocol's grammar. Knows the READs: simple replies need that. */
export class ReplyParser {
  #bytes: Buffer = Buffer.alloc(0);
  /** Pieces behind #bytes, joined when there are enough of them for the next step. */
  #pieces: Buffer[] = [];
  #total = 0;
  #needed = 16;
  readonly #reads = new Map<number, { offset: number; length: number }>();
  readonly #open = new Map<number, Reply>();

  constructor(private readonly structured: boolean) {}

  /** Bytes of a reply that is not complete yet. */
  get partial(): number {
    return this.#total + this.#open.size;
  }

  expectRead(cookie: number, offset: number, length: number): void {
    this.#reads.set(cookie, { offset, length });
  }

  push(bytes: Buffer): Reply[] {
    this.#pieces.push(Buffer.from(bytes));
    this.#total += bytes.length;
    if (this.#total < this.#needed) return [];
    this.#bytes = Buffer.concat([this.#bytes, ...this.#pieces]);
    this.#pieces = [];
    const replies: Reply[] = [];
    for (let reply = this.#next(); reply !== null; reply = this.#next()) {
      if (reply !== 'more') replies.push(reply);
    }
    this.#total = this.#bytes.length;
    return replies;
  }

  #next(): Reply | 'more' | null {
    const bytes = this.#bytes;
    this.#needed = 16;
    if (bytes.length < 16) return null;
    const magic = bytes.readUInt32BE(0);
    const cookie = Number(bytes.readBigUInt64BE(8));
    if (magic === SIMPLE_REPLY_MAGIC) return this.#simple(cookie, bytes.readUInt32BE(4));
    if (magic !== STRUCTURED_REPLY_MAGIC) throw new Error(`no reply magic: ${magic.toString(16)}`);
    if (!this.structured) throw new Error('a structured reply that was not negotiated');
    this.#needed = 20;
    if (bytes.length < 20) return null;
    const end = 20 + bytes.readUInt32BE(16);
    this.#needed = end;
    if (bytes.length < end) return null;
    const reply = this.#chunk(cookie, bytes.subarray(20, end));
    this.#bytes = bytes.subarray(end);
    return reply;
  }

  #simple(cookie: number, errno: number): Reply | null {
    const read = this.#reads.get(cookie);
    if (read !== undefined && this.structured) throw new Error('a simple reply to a READ');
    const length = read !== undefined && errno === 0 ? read.length : 0;
    this.#needed = 16 + length;
    if (this.#bytes.length < 16 + length) return null;
    const data =
      read !== undefined && errno === 0 ? Buffer.from(this.#bytes.subarray(16, 16 + length)) : null;
    this.#bytes = this.#bytes.subarray(16 + length);
    this.#reads.delete(cookie);
    return { cookie, errno, simple: true, data, message: '', status: new Map(), chunks: [] };
  }

  #chunk(cookie: number, payload: Buffer): Reply | 'more' {
    const flags = this.#bytes.readUInt16BE(4);
    const type = this.#bytes.readUInt16BE(6);
    const reply: Reply = this.#open.get(cookie) ?? {
      cookie,
      errno: 0,
      simple: false,
      data: null,
      message: '',
      status: new Map(),
      chunks: [],
    };
    reply.chunks.push(type);
    const read = this.#reads.get(cookie);
    if (type === ChunkType.OFFSET_DATA) {
      if (read === undefined) throw new Error('data for no READ');
      if (payload.length < 9) throw new Error('an OFFSET_DATA chunk without data');
      const offset = Number(payload.readBigUInt64BE(0));
      if (offset !== read.offset || payload.length - 8 !== read.length)
        throw new Error('data of another range');
      reply.data = Buffer.from(payload.subarray(8));
    } else if (type === ChunkType.BLOCK_STATUS) this.#extents(reply, payload);
    else if (type === ChunkType.ERROR) {
      reply.errno = payload.readUInt32BE(0);
      const length = payload.readUInt16BE(4);
      if (reply.errno === 0 || payload.length !== 6 + length) throw new Error('a malformed ERROR chunk');
      reply.message = payload.toString('utf8', 6);
    } else if (type !== ChunkType.NONE || payload.length > 0)
      throw new Error(`unexpected chunk type ${type}`);
    if ((flags & ~ChunkFlag.DONE) !== 0) throw new Error('unknown chunk flags');
    if ((flags & ChunkFlag.DONE) === 0) {
      if (type === ChunkType.NONE) throw new Error('NONE without DONE');
      this.#open.set(cookie, reply);
      return 'more';
    }
    this.#open.delete(cookie);
    this.#reads.delete(cookie);
    return reply;
  }

  #extents(reply: Reply, payload: Buffer): void {
    const id = payload.readUInt32BE(0);
    if (reply.status.has(id)) throw new Error('two BLOCK_STATUS chunks of one context');
    if (payload.length < 12 || payload.length % 8 !== 4) throw new Error('a malformed BLOCK_STATUS chunk');
    const extents: [number, number][] = [];
    for (let at = 4; at < payload.length; at += 8) {
      if (payload.readUInt32BE(at) === 0) throw new Error('an extent of length 0');
      extents.push([payload.readUInt32BE(at), payload.readUInt32BE(at + 4)]);
    }
    reply.status.set(id, extents);
  }
}

/** A client that sends what it is told and keeps what it gets. */
export class RawClient {
  readonly replies: Reply[] = [];
  /** Resolves when the server closed; the client closes its own side only if told. */
  readonly ended: Promise<void>;
  grammarError: Error | null = null;
  readonly #parser: ReplyParser;
  readonly #waiting: (() => void)[] = [];

  constructor(
    readonly socket: net.Socket,
    structured: boolean,
  ) {
    this.#parser = new ReplyParser(structured);
    this.ended = new Promise((resolve) => {
      socket.once('close', () => resolve());
    });
    socket.on('error', () => {});
    socket.on('end', () => socket.end());
    socket.on('data', (bytes: Buffer) => {
      try {
        this.replies.push(...this.#parser.push(bytes));
      } catch (error) {
        this.grammarError = error as Error;
      }
      for (const wake of this.#waiting.splice(0)) wake();
    });
    socket.on('close', () => {
      for (const wake of this.#waiting.splice(0)) wake();
    });
  }

  get partial(): number {
    return this.#parser.partial;
  }

  /** Bytes of a request whose reply will be understood. */
  encode(request: RawRequest): Buffer {
    if (request.command === Command.READ) {
      this.#parser.expectRead(request.cookie, Number(request.offset ?? 0), request.length ?? 0);
    }
    return encodeRequest(request);
  }

  send(...requests: RawRequest[]): void {
    this.socket.write(Buffer.concat(requests.map((request) => this.encode(request))));
  }

  /** Waits until `count` replies have come, and returns all. */
  async got(count: number): Promise<Reply[]> {
    while (this.replies.length < count) {
      if (this.grammarError !== null) throw this.grammarError;
      if (this.socket.closed) throw new Error(`closed after ${this.replies.length} of ${count} replies`);
      await new Promise<void>((resolve) => this.#waiting.push(resolve));
    }
    if (this.grammarError !== null) throw this.grammarError;
    return this.replies;
  }

  /** The reply with that cookie. */
  async reply(cookie: number): Promise<Reply> {
    for (let count = 1; ; count++) {
      const reply = (await this.got(count)).find((candidate) => candidate.cookie === cookie);
      if (reply !== undefined) return reply;
      count = Math.max(count, this.replies.length);
    }
  }

  /** Sends one request and waits for its reply. */
  ask(request: RawRequest): Promise<Reply> {
    this.send(request);
    return this.reply(request.cookie);
  }
}

/** Read by 'data' events, as every socket that is not net.Socket itself. */
export class OtherSocket extends net.Socket {}

/** Two ends of a unix socket pair: the server's, taken over by descriptor or read by events, and the client's. */
export function connectedPair(transport: 'descriptor' | 'events'): [server: net.Socket, client: net.Socket] {
  const [server, client] = socketPair();
  const Kind = transport === 'descriptor' ? net.Socket : OtherSocket;
  const options = { readable: true, writable: true, allowHalfOpen: true };
  return [new Kind({ fd: server, ...options }), new net.Socket({ fd: client, ...options })];
}

/** Two ends of a TCP connection over loopback. */
export async function tcpPair(): Promise<[server: net.Socket, client: net.Socket]> {
  const listener = net.createServer({ allowHalfOpen: true });
  listener.listen(0, '127.0.0.1');
  await once(listener, 'listening');
  const accepted = once(listener, 'connection');
  const client = net.connect({ port: (listener.address() as net.AddressInfo).port, allowHalfOpen: true });
  const [server] = (await accepted) as [net.Socket];
  listener.close();
  return [server, client];
}

/** Waits until `condition` holds, for at most `timeoutMs`. */
export async function until(condition: () => boolean, timeoutMs = 5000): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not within ${timeoutMs} ms: ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}
