import { once } from 'node:events';
import net from 'node:net';
import { socketPair } from '../../src/native/index.js';
import {
  ChunkFlag,
  ChunkType,
  Command,
  CommandFlag,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  REQUEST_MAGIC,
  type ReplyForm,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
} from '../../src/nbd/constants.js';

export interface RawRequest {
  command: number;
  flags?: number;
  cookie: number;
  offset?: number | bigint;
  /** Of what the request is about, or of its payload. Default: the payload's. */
  length?: number | bigint;
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
  bytes.writeUInt32BE(Number(request.length ?? payload.length), 24);
  payload.copy(bytes, 28);
  return bytes;
}

/** As `encodeRequest`, with an extended header; a WRITE has the flag PAYLOAD_LEN unless `flags` are exact. */
export function encodeExtendedRequest(request: RawRequest, exactFlags = false): Buffer {
  const payload = request.payload ?? Buffer.alloc(0);
  const implied = request.command === Command.WRITE && !exactFlags ? CommandFlag.PAYLOAD_LEN : 0;
  const bytes = Buffer.alloc(32 + payload.length);
  bytes.writeUInt32BE(request.magic ?? EXTENDED_REQUEST_MAGIC, 0);
  bytes.writeUInt16BE((request.flags ?? 0) | implied, 4);
  bytes.writeUInt16BE(request.command, 6);
  bytes.writeBigUInt64BE(BigInt(request.cookie), 8);
  bytes.writeBigUInt64BE(BigInt(request.offset ?? 0), 16);
  bytes.writeBigUInt64BE(BigInt(request.length ?? payload.length), 24);
  payload.copy(bytes, 32);
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
  /** Extended headers: the offset that its chunks repeat. */
  offset: bigint | null;
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

  readonly #form: ReplyForm;

  /** True and false: with and without structured replies. */
  constructor(form: ReplyForm | boolean) {
    this.#form = typeof form === 'string' ? form : form ? 'structured' : 'simple';
  }

  private get structured(): boolean {
    return this.#form !== 'simple';
  }

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
    if (this.#form === 'extended') return this.#extended(magic, cookie);
    if (magic === SIMPLE_REPLY_MAGIC) return this.#simple(cookie, bytes.readUInt32BE(4));
    if (magic !== STRUCTURED_REPLY_MAGIC) throw new Error(`no reply magic: ${magic.toString(16)}`);
    if (!this.structured) throw new Error('a structured reply that was not negotiated');
    this.#needed = 20;
    if (bytes.length < 20) return null;
    const end = 20 + bytes.readUInt32BE(16);
    this.#needed = end;
    if (bytes.length < end) return null;
    const reply = this.#chunk(cookie, bytes.subarray(20, end), null);
    this.#bytes = bytes.subarray(end);
    return reply;
  }

  #extended(magic: number, cookie: number): Reply | 'more' | null {
    const bytes = this.#bytes;
    if (magic !== EXTENDED_REPLY_MAGIC) throw new Error(`no extended reply magic: ${magic.toString(16)}`);
    this.#needed = 32;
    if (bytes.length < 32) return null;
    const end = 32 + Number(bytes.readBigUInt64BE(24));
    this.#needed = end;
    if (bytes.length < end) return null;
    const reply = this.#chunk(cookie, bytes.subarray(32, end), bytes.readBigUInt64BE(16));
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
    return { cookie, errno, simple: true, data, message: '', status: new Map(), chunks: [], offset: null };
  }

  #chunk(cookie: number, payload: Buffer, echoed: bigint | null): Reply | 'more' {
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
      offset: echoed,
    };
    if (reply.offset !== echoed) throw new Error('chunks of one reply repeat different offsets');
    reply.chunks.push(type);
    const read = this.#reads.get(cookie);
    if (type === ChunkType.OFFSET_DATA || type === ChunkType.OFFSET_HOLE) {
      if (read === undefined) throw new Error('data for no READ');
      content(reply, read, type === ChunkType.OFFSET_HOLE, payload);
    } else if (type === (this.#form === 'extended' ? ChunkType.BLOCK_STATUS_EXT : ChunkType.BLOCK_STATUS))
      this.#extents(reply, payload);
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
    if (read !== undefined && reply.errno === 0 && (reply.data?.length ?? 0) !== read.length)
      throw new Error('a READ that is not all answered');
    return reply;
  }

  #extents(reply: Reply, payload: Buffer): void {
    const id = payload.readUInt32BE(0);
    if (reply.status.has(id)) throw new Error('two BLOCK_STATUS chunks of one context');
    const wide = this.#form === 'extended';
    const [head, each] = wide ? [8, 16] : [4, 8];
    if (payload.length < head + each || (payload.length - head) % each !== 0)
      throw new Error('a malformed BLOCK_STATUS chunk');
    const number = (at: number) => (wide ? Number(payload.readBigUInt64BE(at)) : payload.readUInt32BE(at));
    const extents: [number, number][] = [];
    for (let at = head; at < payload.length; at += each) {
      if (number(at) === 0) throw new Error('an extent of length 0');
      extents.push([number(at), number(at + each / 2)]);
    }
    if (wide && payload.readUInt32BE(4) !== extents.length) throw new Error('a wrong count of extents');
    reply.status.set(id, extents);
  }
}

/** Content must come in ascending order here, without gaps: as a server does that has no reason to do otherwise. */
function content(
  reply: Reply,
  read: { offset: number; length: number },
  hole: boolean,
  payload: Buffer,
): void {
  if (hole ? payload.length !== 12 : payload.length < 9) throw new Error('a malformed content chunk');
  const data = hole ? Buffer.alloc(payload.readUInt32BE(8)) : payload.subarray(8);
  const had = reply.data ?? Buffer.alloc(0);
  if (data.length === 0) throw new Error('a hole of length 0');
  if (
    Number(payload.readBigUInt64BE(0)) !== read.offset + had.length ||
    had.length + data.length > read.length
  )
    throw new Error('data of another range');
  reply.data = Buffer.concat([had, data]);
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
    private readonly form: ReplyForm | boolean,
  ) {
    this.#parser = new ReplyParser(form);
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
      this.#parser.expectRead(request.cookie, Number(request.offset ?? 0), Number(request.length ?? 0));
    }
    return this.form === 'extended' ? encodeExtendedRequest(request) : encodeRequest(request);
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
