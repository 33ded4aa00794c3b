/**
 * Replies of one session, put into its output. Without structured replies all are simple; with them whatever carries data
 * or an error is a chunk, and other success stays a simple reply (doc/proto.md, «Transmission»).
 */

import {
  DATA_CHUNK_HEADER_BYTES,
  ERROR_CHUNK_BYTES_MAX,
  EXTENT_BYTES,
  encodeDataChunkHeader,
  encodeErrorChunk,
  encodeNoneChunk,
  encodeSimpleReply,
  encodeStatusChunkHeader,
  NONE_CHUNK_BYTES,
  STATUS_CHUNK_HEADER_BYTES,
} from '../codec/replies.js';
import { ChunkFlag, Errno, SIMPLE_REPLY_HEADER_BYTES } from '../constants.js';
import type { Output } from './output.js';
import type { Request } from './request.js';
import { HEAD_ROOM, type Slab, type SlabPool } from './slab.js';
import type { Refusal } from './validate.js';

/** Longer lists of extents leave in the slab they were made in, without being copied. */
const COPIED_BYTES_MAX = 4096;

export class Replies {
  /** Header bytes before the data of a READ. */
  readonly dataHeaderBytes: number;

  constructor(
    private readonly output: Output,
    private readonly pool: SlabPool,
    private readonly structured: boolean,
  ) {
    this.dataHeaderBytes = structured ? DATA_CHUNK_HEADER_BYTES : SIMPLE_REPLY_HEADER_BYTES;
  }

  success(cookieHi: number, cookieLo: number): void {
    const at = this.output.reserve(SIMPLE_REPLY_HEADER_BYTES);
    encodeSimpleReply(this.output.buffer, at, Errno.OK, cookieHi, cookieLo);
    this.output.advance(SIMPLE_REPLY_HEADER_BYTES);
  }

  error(cookieHi: number, cookieLo: number, refusal: Refusal): void {
    const output = this.output;
    if (!this.structured) {
      const at = output.reserve(SIMPLE_REPLY_HEADER_BYTES);
      encodeSimpleReply(output.buffer, at, refusal.errno, cookieHi, cookieLo);
      output.advance(SIMPLE_REPLY_HEADER_BYTES);
      return;
    }
    const at = output.reserve(ERROR_CHUNK_BYTES_MAX);
    const { errno, message } = refusal;
    const end = encodeErrorChunk(output.buffer, at, ChunkFlag.DONE, cookieHi, cookieLo, errno, message);
    output.advance(end - at);
  }

  /** A READ of length 0. */
  emptyRead(cookieHi: number, cookieLo: number): void {
    if (!this.structured) {
      this.success(cookieHi, cookieLo);
      return;
    }
    const at = this.output.reserve(NONE_CHUNK_BYTES);
    encodeNoneChunk(this.output.buffer, at, ChunkFlag.DONE, cookieHi, cookieLo);
    this.output.advance(NONE_CHUNK_BYTES);
  }

  /** Writes the header of a READ's reply at `at`, `dataHeaderBytes` before its data. */
  dataHeader(buffer: Buffer, at: number, hi: number, lo: number, offset: number, length: number): void {
    if (this.structured) encodeDataChunkHeader(buffer, at, ChunkFlag.DONE, hi, lo, offset, length);
    else encodeSimpleReply(buffer, at, Errno.OK, hi, lo);
  }

  /** A READ whose data lies in a slab of its own, from HEAD_ROOM on. The slab is the output's from now on. */
  data(hi: number, lo: number, offset: number, length: number, slab: Slab): void {
    const at = HEAD_ROOM - this.dataHeaderBytes;
    this.dataHeader(slab.buffer, at, hi, lo, offset, length);
    this.output.push(slab, at, HEAD_ROOM + length);
  }

  /** One context's chunk of a BLOCK_STATUS. Takes the request's slab. */
  status(request: Request, done: boolean): void {
    const { cookieHi, cookieLo, contextId, extents } = request;
    const slab = request.slab!;
    const at = HEAD_ROOM - STATUS_CHUNK_HEADER_BYTES;
    const end = HEAD_ROOM + extents * EXTENT_BYTES;
    const flags = done ? ChunkFlag.DONE : 0;
    encodeStatusChunkHeader(slab.buffer, at, flags, cookieHi, cookieLo, contextId, extents);
    if (end - at > COPIED_BYTES_MAX) {
      this.output.push(slab, at, end);
      return;
    }
    const to = this.output.reserve(end - at); // before `buffer` is looked at: it may change it
    slab.buffer.copy(this.output.buffer, to, at, end);
    this.output.advance(end - at);
    this.pool.give(slab);
  }
}
