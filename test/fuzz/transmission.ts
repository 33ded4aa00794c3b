/**
 * A strict reader of the transmission phase that knows both streams: which replies the protocol allows to the requests that were made.
 * Written from doc/proto.md alone and for clarity alone; it shares no code with src.
 */
import type { ByteQueue } from './bytes.js';
import {
  CHUNK,
  CMD,
  ERRNOS,
  EXPORT,
  EXTENDED_BYTES,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  FLAG,
  REQUEST_BYTES,
  REQUEST_MAGIC,
  SIMPLE_BYTES,
  SIMPLE_MAGIC,
  STRUCTURED_BYTES,
  STRUCTURED_MAGIC,
  type Unit,
  unitOf,
} from './wire.js';

/** What the handshake agreed on. */
export interface Terms {
  /** Bytes. */
  size: bigint;
  /** Transmission flags. */
  flags: number;
  structured: boolean;
  extended: boolean;
  /** Ids of the selected metadata contexts. */
  contexts: ReadonlyMap<number, string>;
}

export interface Request {
  /** Its place among the requests of the connection. */
  index: number;
  extended: boolean;
  flags: number;
  command: number;
  cookie: bigint;
  offset: bigint;
  /** What it is about; of a BLOCK_STATUS with a payload that is said there. */
  length: bigint;
  payload: Buffer | null;
  /** BLOCK_STATUS with a payload: ids of the contexts it asks for. */
  filter: number[] | null;
}

export interface Answer {
  request: Request;
  /** 0: success. */
  errno: number;
  /** A READ that succeeded: all of it. */
  data: Buffer | null;
  /** A BLOCK_STATUS that succeeded: extents by context id. */
  status: Map<number, [length: bigint, status: bigint][]>;
}

interface Pending {
  request: Request;
  begun: boolean;
  errno: number;
  data: Buffer | null;
  /** Disjoint ranges of `data` that have come. */
  covered: [from: number, to: number][];
  contentChunks: number;
  status: Answer['status'];
}

/** Raised by what a side must not send. */
export class Breach extends Error {}

/** More payload than that in one chunk or request is not looked at: the reader gives up. */
const PAYLOAD_MAX = 128 << 20;
const MESSAGE_MAX = 4096;
/** A server may hang up on a payload that is longer than it allows. */
const EXTENDED_PAYLOAD_MAX = 64 << 20;
/** Error chunks longer than that are nonsense, though nothing forbids them. */
const ERROR_CHUNK_MAX = MESSAGE_MAX + 1024;

export class Transmission {
  readonly requests: Request[] = [];
  readonly answers: Answer[] = [];
  /** DISC was sent. */
  disconnected = false;
  /** What comes cannot be told any more: a cookie that stands for two requests, or a size beyond reason. Null while it can. */
  lost: string | null = null;
  /** A request began while another one had no answer yet. */
  overlapping = false;
  readonly #pending = new Map<bigint, Pending[]>();
  #waiting = 0;

  constructor(
    readonly terms: Terms,
    /** What a client may put up with is no breach: unknown flags of chunks, errors, types of error chunks. */
    private readonly lenient: boolean,
    private readonly onUnit: (side: 'client' | 'server', unit: Unit) => void,
  ) {}

  /** Requests that are complete and have no complete answer. */
  get waiting(): number {
    return this.#waiting;
  }

  /** One request; false while it is not complete. */
  readRequest(queue: ByteQueue): boolean {
    if (this.disconnected || this.lost !== null) {
      queue.clear();
      return false;
    }
    const magic = queue.peek(4)?.readUInt32BE(0);
    if (magic === undefined) return false;
    const { extended } = this.terms;
    if (magic !== (extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC)) {
      throw new Breach(`request magic ${magic.toString(16)}`);
    }
    const bytes = extended ? EXTENDED_BYTES : REQUEST_BYTES;
    const head = queue.peek(bytes);
    if (head === null) return false;
    const flags = head.readUInt16BE(4);
    const command = head.readUInt16BE(6);
    const length = extended ? head.readBigUInt64BE(24) : BigInt(head.readUInt32BE(24));
    // An extended WRITE must have the flag. Servers read its payload all the same, as QEMU does.
    // Behind a DISC nothing counts.
    const flagged = extended && (flags & FLAG.PAYLOAD) !== 0 && command !== CMD.DISC;
    const carries = command === CMD.WRITE || flagged;
    const payloadBytes = carries ? length : 0n;
    if (extended && payloadBytes > EXTENDED_PAYLOAD_MAX)
      throw new Breach(`a payload of ${payloadBytes} bytes`);
    if (payloadBytes > PAYLOAD_MAX) {
      this.lost = `a payload of ${payloadBytes} bytes`;
      return false;
    }
    const whole = queue.peek(bytes + Number(payloadBytes));
    if (whole === null) return false;
    const payload = carries ? Buffer.from(whole.subarray(bytes)) : null;
    const filter = extended && command === CMD.STATUS && payload !== null ? filterOf(payload) : null;
    const request: Request = {
      index: this.requests.length,
      extended,
      flags,
      command,
      cookie: head.readBigUInt64BE(8),
      offset: head.readBigUInt64BE(16),
      length: filter?.length ?? length,
      payload,
      filter: filter?.ids ?? null,
    };
    this.onUnit('client', unitOf('request', queue.take(whole.length)));
    if (command === CMD.DISC) this.disconnected = true;
    else this.#begin(request);
    return true;
  }

  #begin(request: Request): void {
    this.requests.push(request);
    if (this.#waiting++ > 0) this.overlapping = true;
    const pending: Pending = {
      request,
      begun: false,
      errno: 0,
      data: null,
      covered: [],
      contentChunks: 0,
      status: new Map(),
    };
    const same = this.#pending.get(request.cookie);
    if (same === undefined) this.#pending.set(request.cookie, [pending]);
    else same.push(pending);
  }

  /** One reply or chunk; false while it is not complete. */
  readReply(queue: ByteQueue): boolean {
    if (this.lost !== null) {
      queue.clear();
      return false;
    }
    const head = queue.peek(SIMPLE_BYTES);
    if (head === null) return false;
    const magic = head.readUInt32BE(0);
    const { structured, extended } = this.terms;
    if (magic === SIMPLE_MAGIC && !extended) return this.#simple(queue, head);
    if (magic === STRUCTURED_MAGIC && structured && !extended) return this.#chunk(queue, STRUCTURED_BYTES);
    if (magic === EXTENDED_REPLY_MAGIC && extended) return this.#chunk(queue, EXTENDED_BYTES);
    throw new Breach(`reply magic ${magic.toString(16)}`);
  }

  #find(cookie: bigint): Pending | null {
    const pending = this.#pending.get(cookie);
    if (pending === undefined) throw new Breach(`a reply to no request: cookie ${cookie.toString(16)}`);
    if (pending.length > 1) {
      this.lost = 'two requests in flight have the same cookie';
      return null;
    }
    return pending[0]!;
  }

  #simple(queue: ByteQueue, head: Buffer): boolean {
    const errno = head.readUInt32BE(4);
    const pending = this.#find(head.readBigUInt64BE(8));
    if (pending === null) return false;
    const { request } = pending;
    if (pending.begun) throw new Breach('a simple reply after chunks');
    if (this.terms.structured && request.command === CMD.READ) throw new Breach('a simple reply to READ');
    if (request.command === CMD.STATUS && errno === 0) throw new Breach('block status without any');
    if (errno !== 0) this.#checkErrno(errno);
    const reads = request.command === CMD.READ && errno === 0;
    if (reads && request.length > PAYLOAD_MAX) throw new Breach(`a READ of ${request.length} bytes succeeds`);
    const bytes = SIMPLE_BYTES + (reads ? Number(request.length) : 0);
    if (queue.peek(bytes) === null) return false;
    const unit = queue.take(bytes);
    this.onUnit('server', unitOf('reply', unit));
    if (reads) {
      pending.data = unit.subarray(SIMPLE_BYTES);
      if (request.length > 0) pending.covered = [[0, Number(request.length)]];
    }
    pending.errno = errno;
    this.#finish(pending);
    return true;
  }

  #chunk(queue: ByteQueue, headBytes: number): boolean {
    const head = queue.peek(headBytes);
    if (head === null) return false;
    const flags = head.readUInt16BE(4);
    const type = head.readUInt16BE(6);
    const pending = this.#find(head.readBigUInt64BE(8));
    if (pending === null) return false;
    const extended = headBytes === EXTENDED_BYTES;
    if (extended && head.readBigUInt64BE(16) !== pending.request.offset)
      throw new Breach('the offset is not the one of the request');
    const length = extended ? head.readBigUInt64BE(24) : BigInt(head.readUInt32BE(16));
    if ((flags & ~1) !== 0 && !this.lenient) throw new Breach(`unknown chunk flags ${flags}`);
    this.#checkChunkLength(pending.request, type, length, (flags & 1) !== 0);
    const bytes = headBytes + Number(length);
    if (queue.peek(bytes) === null) return false;
    const unit = queue.take(bytes);
    this.onUnit('server', unitOf('chunk', unit));
    pending.begun = true;
    this.#content(pending, type, unit.subarray(headBytes));
    if ((flags & 1) !== 0) this.#finish(pending);
    return true;
  }

  /** What can be said before the payload is there: a receiver must not wait for bytes that are nonsense. */
  #checkChunkLength(request: Request, type: number, length: bigint, done: boolean): void {
    const { command } = request;
    const wrong = (): never => {
      throw new Breach(`a chunk of type ${type} and ${length} bytes in the reply to command ${command}`);
    };
    switch (type) {
      case CHUNK.NONE:
        if (length !== 0n || !done) wrong();
        return;
      case CHUNK.DATA:
        if (command !== CMD.READ || length < 9n || length - 8n > request.length || length > PAYLOAD_MAX)
          wrong();
        return;
      case CHUNK.HOLE:
        if (command !== CMD.READ || length !== 12n) wrong();
        return;
      case CHUNK.STATUS:
        if (this.terms.extended || command !== CMD.STATUS || length < 12n || length % 8n !== 4n) wrong();
        if ((length - 4n) / 8n > 1n << 20n) wrong();
        return;
      case CHUNK.STATUS_EXT:
        if (!this.terms.extended || command !== CMD.STATUS || length < 24n || length % 16n !== 8n) wrong();
        if ((length - 8n) / 16n > 1n << 20n) wrong();
        return;
      default:
        if ((type & 0x8000) === 0) wrong();
        if (type !== CHUNK.ERROR && type !== CHUNK.ERROR_OFFSET && !this.lenient) wrong();
        if (length < (type === CHUNK.ERROR_OFFSET ? 14n : 6n) || length > ERROR_CHUNK_MAX) wrong();
    }
  }

  #content(pending: Pending, type: number, payload: Buffer): void {
    if (type === CHUNK.NONE) return;
    if (type === CHUNK.DATA) this.#place(pending, payload.readBigUInt64BE(0), payload.subarray(8));
    else if (type === CHUNK.HOLE) {
      const length = payload.readUInt32BE(8);
      if (length === 0) throw new Breach('a hole of no bytes');
      const offset = payload.readBigUInt64BE(0);
      this.#checkRange(pending.request, offset, BigInt(length));
      this.#place(pending, offset, Buffer.alloc(length));
    } else if (type === CHUNK.STATUS || type === CHUNK.STATUS_EXT) this.#extents(pending, type, payload);
    else this.#error(pending, type, payload);
  }

  #checkRange({ offset, length }: Request, at: bigint, bytes: bigint): void {
    if (at < offset || at + bytes > offset + length)
      throw new Breach(`${bytes} bytes at ${at} in the reply to a READ of ${length} at ${offset}`);
  }

  #place(pending: Pending, at: bigint, bytes: Buffer): void {
    const { request } = pending;
    this.#checkRange(request, at, BigInt(bytes.length));
    pending.contentChunks++;
    if ((request.flags & FLAG.DF) !== 0 && pending.contentChunks > 1 && !this.lenient)
      throw new Breach('several chunks despite DF');
    if (pending.data === null) pending.data = Buffer.alloc(Number(request.length));
    const from = Number(at - request.offset);
    const to = from + bytes.length;
    if (pending.covered.some(([first, end]) => from < end && first < to))
      throw new Breach(`bytes at ${at} come twice`);
    pending.covered.push([from, to]);
    bytes.copy(pending.data, from);
  }

  #extents(pending: Pending, type: number, payload: Buffer): void {
    const { request, status } = pending;
    const id = payload.readUInt32BE(0);
    const { filter } = request;
    if (filter !== null && !filter.includes(id)) throw new Breach(`status of the context ${id}, unasked`);
    if (!this.terms.contexts.has(id)) throw new Breach(`status of the context ${id}, which was not selected`);
    if (status.has(id)) throw new Breach(`the context ${id} answers twice`);
    const wide = type === CHUNK.STATUS_EXT;
    const width = wide ? 16 : 8;
    const extents: [bigint, bigint][] = [];
    for (let at = wide ? 8 : 4; at < payload.length; at += width) {
      if (wide) extents.push([payload.readBigUInt64BE(at), payload.readBigUInt64BE(at + 8)]);
      else extents.push([BigInt(payload.readUInt32BE(at)), BigInt(payload.readUInt32BE(at + 4))]);
    }
    if (wide && payload.readUInt32BE(4) !== extents.length && payload.readUInt32BE(4) !== 0)
      throw new Breach('the count of extents is wrong');
    const last = extents.at(-1)!;
    const sum = extents.reduce((total, [length]) => total + length, 0n);
    if (extents.some(([length]) => length === 0n)) throw new Breach('an extent of no bytes');
    if (sum - last[0] >= request.length) throw new Breach('extents beyond what was asked for');
    if ((request.flags & FLAG.REQ_ONE) !== 0 && (extents.length > 1 || sum > request.length))
      throw new Breach('more than the one extent asked for');
    if (!this.lenient && request.offset + sum > this.terms.size)
      throw new Breach('extents beyond the end of the export');
    status.set(id, extents);
  }

  #error(pending: Pending, type: number, payload: Buffer): void {
    const errno = payload.readUInt32BE(0);
    const messageBytes = payload.readUInt16BE(4);
    const fixed = type === CHUNK.ERROR_OFFSET ? 14 : 6;
    if (errno === 0) throw new Breach('an error chunk without an error');
    this.#checkErrno(errno);
    const exact = payload.length === fixed + messageBytes;
    if (messageBytes > MESSAGE_MAX || fixed + messageBytes > payload.length || (!exact && !this.lenient))
      throw new Breach(`an error message of ${messageBytes} bytes in a chunk of ${payload.length}`);
    if (!this.lenient) checkText(payload.subarray(6, 6 + messageBytes));
    if (type === CHUNK.ERROR_OFFSET) {
      const at = payload.readBigUInt64BE(6 + messageBytes);
      const { offset, length } = pending.request;
      if (at < offset || at >= offset + length) throw new Breach(`an error at ${at}`);
    }
    if (pending.errno === 0) pending.errno = errno;
  }

  #checkErrno(errno: number): void {
    if (!this.lenient && !ERRNOS.has(errno)) throw new Breach(`the error ${errno} is none of NBD`);
  }

  #finish(pending: Pending): void {
    const { request, errno, status, covered } = pending;
    if (errno === 0) {
      const bytes = covered.reduce((sum, [from, to]) => sum + to - from, 0);
      if (request.command === CMD.READ && BigInt(bytes) !== request.length)
        throw new Breach(`${bytes} bytes in a reply to a READ of ${request.length}`);
      const wanted = request.filter === null ? this.terms.contexts.size : new Set(request.filter).size;
      if (request.command === CMD.STATUS && status.size !== wanted)
        throw new Breach(`${status.size} of ${wanted} contexts answer`);
    }
    const same = this.#pending.get(request.cookie)!;
    if (same.length === 1) this.#pending.delete(request.cookie);
    else same.splice(same.indexOf(pending), 1);
    this.#waiting--;
    const data = request.command === CMD.READ && errno === 0 ? (pending.data ?? Buffer.alloc(0)) : null;
    this.answers.push({ request, errno, data, status });
  }
}

/** The payload of a BLOCK_STATUS: a length, then ids. Null: it is malformed. */
function filterOf(payload: Buffer): { length: bigint; ids: number[] } | null {
  if (payload.length < 12 || payload.length % 4 !== 0) return null;
  const ids: number[] = [];
  for (let at = 8; at < payload.length; at += 4) ids.push(payload.readUInt32BE(at));
  return { length: payload.readBigUInt64BE(0), ids };
}

export function checkText(bytes: Buffer): void {
  if (bytes.length > MESSAGE_MAX) throw new Breach(`a text of ${bytes.length} bytes`);
  if (bytes.includes(0)) throw new Breach('a text with NUL');
  new TextDecoder('utf8', { fatal: true }).decode(bytes);
}

/**
 * Whether a request must be refused ('invalid'), must not be ('valid'), or is a matter of taste ('free'): the rules of «Size
 * constraints» and «Request types».
 */
export function judge(request: Request, terms: Terms): 'valid' | 'invalid' | 'free' {
  const { command, offset, length } = request;
  const { FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD } = FLAG;
  const fast = (terms.flags & EXPORT.FAST_ZERO) !== 0 ? FAST_ZERO : 0;
  const own: Record<number, number> = {
    [CMD.READ]: (terms.flags & EXPORT.DF) !== 0 ? DF : 0,
    [CMD.WRITE]: terms.extended ? PAYLOAD : 0,
    [CMD.FLUSH]: 0,
    [CMD.TRIM]: 0,
    [CMD.CACHE]: 0,
    [CMD.ZERO]: NO_HOLE | fast,
    [CMD.STATUS]: terms.extended && terms.contexts.size > 0 ? REQ_ONE | PAYLOAD : REQ_ONE,
  };
  const allowed = own[command];
  if (allowed === undefined || (request.flags & ~(allowed | FUA)) !== 0) return 'invalid';
  if (command === CMD.FLUSH) return offset === 0n && length === 0n ? 'valid' : 'free';
  const changes = command === CMD.WRITE || command === CMD.TRIM || command === CMD.ZERO;
  if (changes && (terms.flags & EXPORT.READ_ONLY) !== 0) return 'invalid';
  if (offset + length > terms.size) return 'invalid';
  if (command === CMD.STATUS && terms.contexts.size === 0) return 'invalid';
  if (command === CMD.STATUS && request.payload !== null) {
    const { filter } = request;
    if (filter?.some((id) => !terms.contexts.has(id)) ?? true) return 'invalid';
    if (new Set(filter).size < filter!.length) return 'free'; // an id twice
  }
  if (command === CMD.WRITE && terms.extended && (request.flags & PAYLOAD) === 0) return 'free';
  return length === 0n ? 'free' : 'valid';
}
