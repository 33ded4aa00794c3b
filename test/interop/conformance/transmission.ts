/**
 * The client's side of transmission: sends requests valid or not, and takes replies apart. Throws where a reply breaks the
 * grammar: unknown cookies, content outside the request, twice or missing, lengths that do not fit.
 */
import { strict as assert } from 'node:assert';
import {
  ChunkFlag,
  ChunkType,
  Command,
  CommandFlag,
  Errno,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  STRING_BYTES_MAX,
  STRUCTURED_REPLY_MAGIC,
} from '../../../src/nbd/constants.js';
import type { Context, ExportFacts } from './haggle.js';
import { text } from './haggle.js';
import type { Wire } from './wire.js';

export const { PAYLOAD_LEN } = CommandFlag;
const { BLOCK_STATUS_EXT } = ChunkType;
/** No chunk here has reason to be longer: the largest payload asked for is 64 MiB. */
const CHUNK_BYTES_MAX = (64 << 20) + 4096;

export interface Asked {
  command: number;
  flags?: number;
  offset?: number | bigint;
  /** Default: the payload's. */
  length?: number | bigint;
  payload?: Buffer;
  /** Default: one that was not used yet. */
  cookie?: bigint;
  magic?: number;
}

export interface Chunk {
  type: number;
  flags: number;
  /** Content: where, and how many bytes. Otherwise 0. */
  offset: bigint;
  length: number;
  /** Bytes on the wire behind the header. */
  payloadBytes: number;
}

export interface Answer {
  cookie: bigint;
  errno: number;
  simple: boolean;
  data: Buffer;
  message: string;
  chunks: Chunk[];
  /** BLOCK_STATUS: descriptors by context id. */
  extents: Map<number, [length: number, status: number][]>;
  /** Extended headers: offsets the replies repeated. */
  echoed: bigint[];
}

interface Pending {
  command: number;
  offset: bigint;
  length: bigint;
  covered: bigint;
  answer: Answer;
}

export interface Agreed {
  structured: boolean;
  extended: boolean;
  contexts: Context[];
}

export class Transmission {
  readonly #pending = new Map<bigint, Pending>();
  readonly #answers = new Map<bigint, Answer>();
  /** Cookies in the order their answers were complete. */
  readonly order: bigint[] = [];
  #cookie = 0x0102_0304_0506_0700n;

  constructor(
    readonly wire: Wire,
    readonly facts: ExportFacts,
    readonly agreed: Agreed,
  ) {}

  /** The id of a selected context. */
  contextId(name: string): number {
    const found = this.agreed.contexts.find((context) => context.name === name);
    assert.ok(found !== undefined, `${name} is selected`);
    return found.id;
  }

  /** The bytes of a request; from now on an answer to it is expected. */
  encode(asked: Asked): [bytes: Buffer, cookie: bigint] {
    const payload = asked.payload ?? Buffer.alloc(0);
    const cookie = asked.cookie ?? ++this.#cookie;
    const offset = BigInt(asked.offset ?? 0);
    const length = BigInt(asked.length ?? payload.length);
    const extended = this.agreed.extended;
    const header = Buffer.alloc(extended ? 32 : 28);
    header.writeUInt32BE(asked.magic ?? (extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC), 0);
    header.writeUInt16BE(asked.flags ?? 0, 4);
    header.writeUInt16BE(asked.command, 6);
    header.writeBigUInt64BE(cookie, 8);
    header.writeBigUInt64BE(offset, 16);
    if (extended) header.writeBigUInt64BE(length, 24);
    else header.writeUInt32BE(Number(length), 24);
    const answer: Answer = {
      cookie,
      errno: Errno.OK,
      simple: false,
      data: Buffer.alloc(0),
      message: '',
      chunks: [],
      extents: new Map(),
      echoed: [],
    };
    this.#pending.set(cookie, { command: asked.command, offset, length, covered: 0n, answer });
    return [Buffer.concat([header, payload]), cookie];
  }

  send(...asked: Asked[]): bigint[] {
    const encoded = asked.map((one) => this.encode(one));
    this.wire.send(...encoded.map(([bytes]) => bytes));
    return encoded.map(([, cookie]) => cookie);
  }

  async ask(asked: Asked): Promise<Answer> {
    const [cookie] = this.send(asked);
    return this.answer(cookie!);
  }

  /** The answer to one request, whatever is answered before it. */
  async answer(cookie: bigint): Promise<Answer> {
    for (;;) {
      const answer = this.#answers.get(cookie);
      if (answer !== undefined) {
        this.#answers.delete(cookie);
        return answer;
      }
      await this.#next();
    }
  }

  /** Asks, and demands success. */
  async done(asked: Asked): Promise<Answer> {
    const answer = await this.ask(asked);
    assert.equal(errnoName(answer.errno), 'OK', `command ${asked.command} succeeds: ${answer.message}`);
    return answer;
  }

  /** Asks, and demands one of these errors. */
  async fails(asked: Asked, ...errnos: number[]): Promise<Answer> {
    const answer = await this.ask(asked);
    const expected = errnos.map(errnoName).join(' or ');
    assert.ok(
      errnos.includes(answer.errno),
      `answered with ${errnoName(answer.errno)} instead of ${expected}`,
    );
    return answer;
  }

  async read(offset: number | bigint, length: number, flags = 0): Promise<Buffer> {
    return (await this.done({ command: Command.READ, offset, length, flags })).data;
  }

  async write(offset: number | bigint, payload: Buffer, flags = 0): Promise<void> {
    const own = this.agreed.extended ? PAYLOAD_LEN : 0;
    await this.done({ command: Command.WRITE, offset, payload, flags: flags | own });
  }

  /** The connection is still of use: a small read is answered. */
  async goesOn(): Promise<void> {
    await this.read(0, Number(this.facts.size < 512n ? this.facts.size : 512n));
  }

  /** Asks what a server may answer as it likes; says what it did. A disconnect counts only if that is allowed. */
  async choice(asked: Asked, mayDisconnect = false): Promise<string> {
    try {
      const { errno } = await this.ask(asked);
      await this.goesOn();
      return errnoName(errno);
    } catch (error) {
      if (mayDisconnect && this.wire.over) return 'disconnects';
      throw error;
    }
  }

  /** DISC, then nothing more comes and the server closes. */
  async leave(): Promise<void> {
    this.send({ command: Command.DISC });
    assert.equal((await this.wire.ended()).length, 0, 'nothing comes behind DISC');
  }

  async #next(): Promise<void> {
    const { wire } = this;
    const magic = (await wire.receive(4, 'a reply')).readUInt32BE(0);
    if (magic === SIMPLE_REPLY_MAGIC && !this.agreed.extended) {
      const rest = await wire.receive(12, 'a simple reply');
      await this.#simple(rest.readUInt32BE(0), this.#pendingOf(rest.readBigUInt64BE(4)));
    } else if (magic === STRUCTURED_REPLY_MAGIC && this.agreed.structured && !this.agreed.extended) {
      const rest = await wire.receive(16, 'a structured reply');
      const cookie = rest.readBigUInt64BE(4);
      await this.#chunk(rest.readUInt16BE(0), rest.readUInt16BE(2), cookie, rest.readUInt32BE(12));
    } else if (magic === EXTENDED_REPLY_MAGIC && this.agreed.extended) {
      const rest = await wire.receive(28, 'an extended reply');
      const cookie = rest.readBigUInt64BE(4);
      this.#pendingOf(cookie).answer.echoed.push(rest.readBigUInt64BE(12));
      const length = Number(rest.readBigUInt64BE(20));
      await this.#chunk(rest.readUInt16BE(0), rest.readUInt16BE(2), cookie, length);
    } else throw new Error(`0x${magic.toString(16)} is no reply magic that was agreed on`);
  }

  #pendingOf(cookie: bigint): Pending {
    const pending = this.#pending.get(cookie);
    assert.ok(pending !== undefined, `a reply has a cookie of no request: ${cookie}`);
    return pending;
  }

  async #simple(errno: number, pending: Pending): Promise<void> {
    const { answer, command, length } = pending;
    assert.equal(answer.chunks.length, 0, 'a simple reply in the middle of a structured one');
    answer.simple = true;
    answer.errno = errno;
    if (command === Command.READ) {
      assert.ok(!this.agreed.structured, 'a READ has a structured reply once those were agreed on');
      if (errno === Errno.OK) answer.data = await this.wire.receive(Number(length), 'the data of a READ');
    }
    this.#finish(pending);
  }

  async #chunk(flags: number, type: number, cookie: bigint, length: number): Promise<void> {
    const pending = this.#pendingOf(cookie);
    assert.ok(length <= CHUNK_BYTES_MAX, `a chunk of ${length} bytes`);
    const payload = await this.wire.receive(length, 'the payload of a chunk');
    const chunk: Chunk = { type, flags, offset: 0n, length: 0, payloadBytes: length };
    if (type === ChunkType.NONE) {
      assert.equal(length, 0, 'a NONE chunk has no payload');
      assert.ok((flags & ChunkFlag.DONE) !== 0, 'a NONE chunk is the last one');
    } else if (type === ChunkType.OFFSET_DATA || type === ChunkType.OFFSET_HOLE)
      this.#content(pending, chunk, payload);
    else if (type === ChunkType.BLOCK_STATUS || type === BLOCK_STATUS_EXT)
      extents(pending, type === BLOCK_STATUS_EXT, payload);
    else if (type >= 0x8000) failure(pending.answer, type, payload);
    else throw new Error(`chunks of type ${type} are not known`);
    if (type === ChunkType.BLOCK_STATUS || type === BLOCK_STATUS_EXT)
      assert.equal(
        type === BLOCK_STATUS_EXT,
        this.agreed.extended,
        'BLOCK_STATUS_EXT with extended headers only',
      );
    pending.answer.chunks.push(chunk);
    if ((flags & ChunkFlag.DONE) === 0) return;
    if (pending.command === Command.READ && pending.answer.errno === Errno.OK)
      assert.equal(pending.covered, pending.length, 'the chunks cover the request');
    this.#finish(pending);
  }

  #content(pending: Pending, chunk: Chunk, payload: Buffer): void {
    const { answer, offset, length, command } = pending;
    const hole = chunk.type === ChunkType.OFFSET_HOLE;
    assert.equal(command, Command.READ, 'only a READ has content');
    if (hole) assert.equal(payload.length, 12, 'an OFFSET_HOLE has 12 bytes');
    else assert.ok(payload.length >= 9, 'an OFFSET_DATA has an offset and data');
    chunk.offset = payload.readBigUInt64BE(0);
    chunk.length = hole ? payload.readUInt32BE(8) : payload.length - 8;
    assert.ok(chunk.length > 0, 'a hole has a length');
    const end = chunk.offset + BigInt(chunk.length);
    assert.ok(chunk.offset >= offset && end <= offset + length, 'content lies within the request');
    for (const other of answer.chunks)
      assert.ok(
        other.offset >= end || other.offset + BigInt(other.length) <= chunk.offset || other.length === 0,
        'content does not overlap',
      );
    if (answer.data.length === 0) answer.data = Buffer.alloc(Number(length));
    if (!hole) payload.copy(answer.data, Number(chunk.offset - offset), 8);
    pending.covered += BigInt(chunk.length);
  }

  #finish({ answer }: Pending): void {
    this.#pending.delete(answer.cookie);
    this.#answers.set(answer.cookie, answer);
    this.order.push(answer.cookie);
  }
}

function extents({ answer, command }: Pending, extended: boolean, payload: Buffer): void {
  assert.equal(command, Command.BLOCK_STATUS, 'only a BLOCK_STATUS has descriptors');
  const [head, each] = extended ? [8, 16] : [4, 8];
  assert.ok(payload.length >= head + each, 'a BLOCK_STATUS chunk has a context and a descriptor');
  assert.equal((payload.length - head) % each, 0, 'a BLOCK_STATUS chunk has whole descriptors');
  const id = payload.readUInt32BE(0);
  assert.ok(!answer.extents.has(id), 'there is one BLOCK_STATUS chunk a context');
  const list: [number, number][] = [];
  for (let at = head; at < payload.length; at += each) {
    const wide = (from: number) => Number(payload.readBigUInt64BE(from));
    const [length, status] = extended
      ? [wide(at), wide(at + 8)]
      : [payload.readUInt32BE(at), payload.readUInt32BE(at + 4)];
    assert.ok(length > 0, 'a descriptor has a length');
    list.push([length, status]);
  }
  if (extended) assert.equal(payload.readUInt32BE(4), list.length, 'the count of descriptors is right');
  answer.extents.set(id, list);
}

function failure(answer: Answer, type: number, payload: Buffer): void {
  assert.ok(payload.length >= 6, 'an error chunk has an error and the length of its message');
  const errno = payload.readUInt32BE(0);
  const length = payload.readUInt16BE(4);
  assert.notEqual(errno, 0, 'an error chunk has an error');
  assert.ok(length <= STRING_BYTES_MAX, `an error message of ${length} bytes`);
  const expected = 6 + length + (type === ChunkType.ERROR_OFFSET ? 8 : 0);
  if (type === ChunkType.ERROR || type === ChunkType.ERROR_OFFSET)
    assert.equal(payload.length, expected, 'an error chunk ends behind its message');
  if (answer.errno === Errno.OK) answer.errno = errno;
  answer.message = text(payload.subarray(6, 6 + length));
}

const ERRNO_NAMES = new Map<number, string>(Object.entries(Errno).map(([name, errno]) => [errno, name]));

export function errnoName(errno: number): string {
  return ERRNO_NAMES.get(errno) ?? `errno ${errno}`;
}
