/**
 * Replies of one session, put into its output, in the form that was agreed on (doc/proto.md, «Transmission»):
 * simple      nothing but simple replies;
 * structured  whatever carries data or an error is chunks, and other success stays a simple reply;
 * extended    nothing but chunks, with the longer header, which repeats the request's offset.
 */

import {
  DATA_PAYLOAD_HEAD_BYTES,
  ERROR_PAYLOAD_BYTES_MAX,
  EXTENDED_EXTENT_BYTES,
  EXTENDED_STATUS_PAYLOAD_HEAD_BYTES,
  EXTENT_BYTES,
  encodeChunkHeader,
  encodeDataPayloadHead,
  encodeErrorPayload,
  encodeExtendedChunkHeader,
  encodeExtendedStatusPayloadHead,
  encodeHolePayload,
  encodeSimpleReply,
  encodeStatusPayloadHead,
  HOLE_PAYLOAD_BYTES,
  STATUS_PAYLOAD_HEAD_BYTES,
} from '../codec/replies.js';
import {
  ChunkFlag,
  ChunkType,
  Errno,
  EXTENDED_REPLY_HEADER_BYTES,
  type ReplyForm,
  SIMPLE_REPLY_HEADER_BYTES,
  STRUCTURED_REPLY_HEADER_BYTES,
} from '../constants.js';
import type { Output } from './output.js';
import type { Request } from './request.js';
import { HEAD_ROOM, type Slab, type SlabPool } from './slab.js';
import type { Refusal } from './validate.js';

/** Longer lists of extents leave in the slab they were made in, without being copied. */
const COPIED_BYTES_MAX = 4096;

/** What a reply repeats of its request, each in two halves of 32 bits. */
export interface ReplyTo {
  readonly cookieHi: number;
  readonly cookieLo: number;
  readonly offsetHi: number;
  readonly offsetLo: number;
}

export class Replies {
  /** Header bytes before the data of a READ. */
  readonly dataHeaderBytes: number;
  readonly #structured: boolean;
  readonly #extended: boolean;
  readonly #chunkHeaderBytes: number;

  constructor(
    private readonly output: Output,
    private readonly pool: SlabPool,
    form: ReplyForm,
  ) {
    this.#structured = form !== 'simple';
    this.#extended = form === 'extended';
    this.#chunkHeaderBytes = this.#extended ? EXTENDED_REPLY_HEADER_BYTES : STRUCTURED_REPLY_HEADER_BYTES;
    this.dataHeaderBytes = this.#structured
      ? this.#chunkHeaderBytes + DATA_PAYLOAD_HEAD_BYTES
      : SIMPLE_REPLY_HEADER_BYTES;
  }

  success(to: ReplyTo): void {
    if (this.#extended) this.#none(to);
    else this.#simple(to, Errno.OK);
  }

  error(to: ReplyTo, refusal: Refusal): void {
    if (!this.#structured) {
      this.#simple(to, refusal.errno);
      return;
    }
    const { output } = this;
    const at = output.reserve(this.#chunkHeaderBytes + ERROR_PAYLOAD_BYTES_MAX);
    const payloadAt = at + this.#chunkHeaderBytes;
    const end = encodeErrorPayload(output.buffer, payloadAt, refusal.errno, refusal.message);
    this.#header(output.buffer, at, ChunkFlag.DONE, ChunkType.ERROR, to, end - payloadAt);
    output.advance(end - at);
  }

  /** A READ of length 0. */
  emptyRead(to: ReplyTo): void {
    if (this.#structured) this.#none(to);
    else this.#simple(to, Errno.OK);
  }

  /** Writes the header of a READ's last or only data at `at`, `dataHeaderBytes` before that data. */
  dataHeader(buffer: Buffer, at: number, to: ReplyTo, offset: number, length: number): void {
    if (!this.#structured) {
      encodeSimpleReply(buffer, at, Errno.OK, to.cookieHi, to.cookieLo);
      return;
    }
    const bytes = DATA_PAYLOAD_HEAD_BYTES + length;
    const payloadAt = this.#header(buffer, at, ChunkFlag.DONE, ChunkType.OFFSET_DATA, to, bytes);
    encodeDataPayloadHead(buffer, payloadAt, offset);
  }

  /** A READ's last or only data, from HEAD_ROOM on in a slab of its own, which is the output's from now on. */
  data(to: ReplyTo, offset: number, length: number, slab: Slab): void {
    const at = HEAD_ROOM - this.dataHeaderBytes;
    this.dataHeader(slab.buffer, at, to, offset, length);
    this.output.push(slab, at, HEAD_ROOM + length);
  }

  /** A part of a READ that is zeros, not in simple replies; `done`: the last part. */
  hole(to: ReplyTo, offset: number, length: number, done: boolean): void {
    const { output } = this;
    const bytes = this.#chunkHeaderBytes + HOLE_PAYLOAD_BYTES;
    const at = output.reserve(bytes);
    const flags = done ? ChunkFlag.DONE : 0;
    const payloadAt = this.#header(output.buffer, at, flags, ChunkType.OFFSET_HOLE, to, HOLE_PAYLOAD_BYTES);
    encodeHolePayload(output.buffer, payloadAt, offset, length);
    output.advance(bytes);
    if (!done) output.fence(); // the last chunk must come last
  }

  /** One context's chunk of a BLOCK_STATUS. Takes the request's slab. */
  status(request: Request, done: boolean): void {
    const slab = request.slab!;
    const at = this.#statusHeader(slab.buffer, request, done ? ChunkFlag.DONE : 0);
    const end = HEAD_ROOM + request.extents * (this.#extended ? EXTENDED_EXTENT_BYTES : EXTENT_BYTES);
    if (end - at > COPIED_BYTES_MAX) {
      this.output.push(slab, at, end);
      return;
    }
    const to = this.output.reserve(end - at); // before `buffer` is looked at: it may change it
    slab.buffer.copy(this.output.buffer, to, at, end);
    this.output.advance(end - at);
    if (!done) this.output.fence();
    this.pool.give(slab);
  }

  /** Writes all that comes before the extents, which lie from HEAD_ROOM on; returns where it begins. */
  #statusHeader(buffer: Buffer, request: Request, flags: number): number {
    const { contextId, extents } = request;
    if (!this.#extended) {
      const at = HEAD_ROOM - STATUS_PAYLOAD_HEAD_BYTES - this.#chunkHeaderBytes;
      const bytes = STATUS_PAYLOAD_HEAD_BYTES + extents * EXTENT_BYTES;
      const payloadAt = this.#header(buffer, at, flags, ChunkType.BLOCK_STATUS, request, bytes);
      encodeStatusPayloadHead(buffer, payloadAt, contextId);
      return at;
    }
    const at = HEAD_ROOM - EXTENDED_STATUS_PAYLOAD_HEAD_BYTES - this.#chunkHeaderBytes;
    const bytes = EXTENDED_STATUS_PAYLOAD_HEAD_BYTES + extents * EXTENDED_EXTENT_BYTES;
    const payloadAt = this.#header(buffer, at, flags, ChunkType.BLOCK_STATUS_EXT, request, bytes);
    encodeExtendedStatusPayloadHead(buffer, payloadAt, contextId, extents);
    return at;
  }

  #simple(to: ReplyTo, errno: number): void {
    const at = this.output.reserve(SIMPLE_REPLY_HEADER_BYTES);
    encodeSimpleReply(this.output.buffer, at, errno, to.cookieHi, to.cookieLo);
    this.output.advance(SIMPLE_REPLY_HEADER_BYTES);
  }

  /** The end of a reply that has nothing to say. */
  #none(to: ReplyTo): void {
    const at = this.output.reserve(this.#chunkHeaderBytes);
    this.#header(this.output.buffer, at, ChunkFlag.DONE, ChunkType.NONE, to, 0);
    this.output.advance(this.#chunkHeaderBytes);
  }

  /** Returns where the chunk's payload begins. */
  #header(buffer: Buffer, at: number, flags: number, type: number, to: ReplyTo, length: number): number {
    const { cookieHi, cookieLo } = to;
    if (!this.#extended) return encodeChunkHeader(buffer, at, flags, type, cookieHi, cookieLo, length);
    const { offsetHi, offsetLo } = to;
    return encodeExtendedChunkHeader(buffer, at, flags, type, cookieHi, cookieLo, offsetHi, offsetLo, length);
  }
}
