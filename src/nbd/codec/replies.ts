/**
 * What a server sends during transmission. Every function writes into the caller's buffer at `at`, allocates nothing and
 * returns the offset behind what it wrote; the caller has made room (the constants below say how much).
 *
 * A cookie is 8 opaque bytes: two unsigned 32-bit numbers, `hi` the first four bytes. Offsets in the device are bytes, up to
 * Number.MAX_SAFE_INTEGER.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Simple reply message», «Structured reply types».
 */
import {
  ChunkType,
  SIMPLE_REPLY_MAGIC,
  STRING_BYTES_PREFERRED,
  STRUCTURED_REPLY_HEADER_BYTES,
  STRUCTURED_REPLY_MAGIC,
} from '../constants.js';

/** Bytes before the data of an OFFSET_DATA chunk. */
export const DATA_CHUNK_HEADER_BYTES = STRUCTURED_REPLY_HEADER_BYTES + 8;
export const HOLE_CHUNK_BYTES = STRUCTURED_REPLY_HEADER_BYTES + 12;
export const NONE_CHUNK_BYTES = STRUCTURED_REPLY_HEADER_BYTES;
/** Bytes before the first extent of a BLOCK_STATUS chunk. */
export const STATUS_CHUNK_HEADER_BYTES = STRUCTURED_REPLY_HEADER_BYTES + 4;
export const EXTENT_BYTES = 8;
/** An ERROR chunk with the longest message we send. */
export const ERROR_CHUNK_BYTES_MAX = STRUCTURED_REPLY_HEADER_BYTES + 6 + STRING_BYTES_PREFERRED;
/** An ERROR_OFFSET chunk likewise. */
export const ERROR_OFFSET_CHUNK_BYTES_MAX = ERROR_CHUNK_BYTES_MAX + 8;

/** `errno` is one of Errno. The data of a successful READ follows. */
export function encodeSimpleReply(
  buffer: Buffer,
  at: number,
  errno: number,
  cookieHi: number,
  cookieLo: number,
): number {
  put32(buffer, at, SIMPLE_REPLY_MAGIC);
  put32(buffer, at + 4, errno);
  put32(buffer, at + 8, cookieHi);
  put32(buffer, at + 12, cookieLo);
  return at + 16;
}

/** `flags` of ChunkFlag, `type` of ChunkType, `length` of the payload that follows in bytes. */
export function encodeChunkHeader(
  buffer: Buffer,
  at: number,
  flags: number,
  type: number,
  cookieHi: number,
  cookieLo: number,
  length: number,
): number {
  put32(buffer, at, STRUCTURED_REPLY_MAGIC);
  put16(buffer, at + 4, flags);
  put16(buffer, at + 6, type);
  put32(buffer, at + 8, cookieHi);
  put32(buffer, at + 12, cookieLo);
  put32(buffer, at + 16, length);
  return at + STRUCTURED_REPLY_HEADER_BYTES;
}

/** Everything of an OFFSET_DATA chunk but its data: DATA_CHUNK_HEADER_BYTES. `length` of the data, bytes >= 1. */
export function encodeDataChunkHeader(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
  offset: number,
  length: number,
): number {
  const next = encodeChunkHeader(buffer, at, flags, ChunkType.OFFSET_DATA, cookieHi, cookieLo, 8 + length);
  return put64(buffer, next, offset);
}

/** A whole OFFSET_HOLE chunk. `length` of the hole, bytes >= 1. */
export function encodeHoleChunk(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
  offset: number,
  length: number,
): number {
  const next = encodeChunkHeader(buffer, at, flags, ChunkType.OFFSET_HOLE, cookieHi, cookieLo, 12);
  return put32(buffer, put64(buffer, next, offset), length);
}

/** A whole NONE chunk: the end of a reply that has nothing (more) to say. `flags` must have ChunkFlag.DONE. */
export function encodeNoneChunk(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
): number {
  return encodeChunkHeader(buffer, at, flags, ChunkType.NONE, cookieHi, cookieLo, 0);
}

/** Everything of a BLOCK_STATUS chunk but its extents, of which `extents` (>= 1) follow: STATUS_CHUNK_HEADER_BYTES. */
export function encodeStatusChunkHeader(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
  contextId: number,
  extents: number,
): number {
  const length = 4 + EXTENT_BYTES * extents;
  const next = encodeChunkHeader(buffer, at, flags, ChunkType.BLOCK_STATUS, cookieHi, cookieLo, length);
  return put32(buffer, next, contextId);
}

/** One extent of a BLOCK_STATUS chunk: its length in bytes, >= 1 and below 2^32, and its status in the chunk's context. */
export function encodeExtent(buffer: Buffer, at: number, length: number, status: number): number {
  return put32(buffer, put32(buffer, at, length), status);
}

/**
 * A whole ERROR chunk: at most ERROR_CHUNK_BYTES_MAX. `errno` is one of Errno but not OK; `message` is for a person's eyes,
 * may be empty, and is cut at STRING_BYTES_PREFERRED bytes.
 */
export function encodeErrorChunk(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
  errno: number,
  message: string,
): number {
  const textAt = at + STRUCTURED_REPLY_HEADER_BYTES + 6;
  const textLength = putText(buffer, textAt, message);
  encodeChunkHeader(buffer, at, flags, ChunkType.ERROR, cookieHi, cookieLo, 6 + textLength);
  put32(buffer, textAt - 6, errno);
  put16(buffer, textAt - 2, textLength);
  return textAt + textLength;
}

/** As `encodeErrorChunk`, and says at which `offset` of the device it went wrong: at most ERROR_OFFSET_CHUNK_BYTES_MAX. */
export function encodeErrorOffsetChunk(
  buffer: Buffer,
  at: number,
  flags: number,
  cookieHi: number,
  cookieLo: number,
  errno: number,
  message: string,
  offset: number,
): number {
  const textAt = at + STRUCTURED_REPLY_HEADER_BYTES + 6;
  const textLength = putText(buffer, textAt, message);
  encodeChunkHeader(buffer, at, flags, ChunkType.ERROR_OFFSET, cookieHi, cookieLo, 14 + textLength);
  put32(buffer, textAt - 6, errno);
  put16(buffer, textAt - 2, textLength);
  return put64(buffer, textAt + textLength, offset);
}

/** Buffer.write never cuts a character in two. */
function putText(buffer: Buffer, at: number, text: string): number {
  return text === '' ? 0 : buffer.write(text, at, STRING_BYTES_PREFERRED, 'utf8');
}

// Plain stores: a third of the time of Buffer's own writers, which check every value and place.

function put16(buffer: Buffer, at: number, value: number): number {
  buffer[at] = value >>> 8;
  buffer[at + 1] = value;
  return at + 2;
}

function put32(buffer: Buffer, at: number, value: number): number {
  buffer[at] = value >>> 24;
  buffer[at + 1] = value >>> 16;
  buffer[at + 2] = value >>> 8;
  buffer[at + 3] = value;
  return at + 4;
}

function put64(buffer: Buffer, at: number, value: number): number {
  put32(buffer, at, Math.floor(value / 0x1_0000_0000));
  return put32(buffer, at + 4, value >>> 0);
}
