/**
 * What a server sends during transmission. Every function writes into the caller's buffer at `at`, allocates nothing and
 * returns the offset behind what it wrote; the caller has made room (the constants below say how much).
 *
 * A cookie is 8 opaque bytes: two unsigned 32-bit numbers, `hi` the first four bytes. Offsets in the device are bytes, up to
 * Number.MAX_SAFE_INTEGER.
 *
 * A chunk is a header, of structured replies (`encodeChunkHeader`) or of extended ones (`encodeExtendedChunkHeader`), and a payload, which
 * is the same for both but for BLOCK_STATUS.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Simple reply message», «Structured reply types»; branch extension-ext-header,
 * «Extended reply chunk message».
 */
import {
  EXTENDED_REPLY_MAGIC,
  SIMPLE_REPLY_HEADER_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRING_BYTES_PREFERRED,
  STRUCTURED_REPLY_MAGIC,
} from '../constants.js';

/** Payload of an OFFSET_DATA chunk before its data. */
export const DATA_PAYLOAD_HEAD_BYTES = 8;
export const HOLE_PAYLOAD_BYTES = 12;
/** Payload of a BLOCK_STATUS chunk before its first extent; an extent. */
export const STATUS_PAYLOAD_HEAD_BYTES = 4;
export const EXTENT_BYTES = 8;
/** The same of a BLOCK_STATUS_EXT chunk. */
export const EXTENDED_STATUS_PAYLOAD_HEAD_BYTES = 8;
export const EXTENDED_EXTENT_BYTES = 16;
/** Payload of an ERROR chunk with the longest message we send. */
export const ERROR_PAYLOAD_BYTES_MAX = 6 + STRING_BYTES_PREFERRED;

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
  return at + SIMPLE_REPLY_HEADER_BYTES;
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
  const end = putUpToCookie(buffer, at, STRUCTURED_REPLY_MAGIC, flags, type, cookieHi, cookieLo);
  return put32(buffer, end, length);
}

/** As `encodeChunkHeader`; the request's offset comes back as it came: 8 bytes, in two halves as the cookie. `length` is below 2^32. */
export function encodeExtendedChunkHeader(
  buffer: Buffer,
  at: number,
  flags: number,
  type: number,
  cookieHi: number,
  cookieLo: number,
  offsetHi: number,
  offsetLo: number,
  length: number,
): number {
  const end = putUpToCookie(buffer, at, EXTENDED_REPLY_MAGIC, flags, type, cookieHi, cookieLo);
  put32(buffer, end, offsetHi);
  put32(buffer, end + 4, offsetLo);
  put32(buffer, end + 8, 0);
  return put32(buffer, end + 12, length);
}

/** What both chunk headers begin with. */
function putUpToCookie(
  buffer: Buffer,
  at: number,
  magic: number,
  flags: number,
  type: number,
  cookieHi: number,
  cookieLo: number,
): number {
  put32(buffer, at, magic);
  put16(buffer, at + 4, flags);
  put16(buffer, at + 6, type);
  put32(buffer, at + 8, cookieHi);
  return put32(buffer, at + 12, cookieLo);
}

/** Payload of OFFSET_DATA: where its data, which follows, lies in the device. */
export function encodeDataPayloadHead(buffer: Buffer, at: number, offset: number): number {
  return put64(buffer, at, offset);
}

/** Payload of OFFSET_HOLE. `length` of the hole, bytes >= 1 and below 2^32. */
export function encodeHolePayload(buffer: Buffer, at: number, offset: number, length: number): number {
  return put32(buffer, put64(buffer, at, offset), length);
}

/** Payload of BLOCK_STATUS before its extents, of which at least one follows. */
export function encodeStatusPayloadHead(buffer: Buffer, at: number, contextId: number): number {
  return put32(buffer, at, contextId);
}

/** An extent of BLOCK_STATUS: its length in bytes, >= 1 and below 2^32, and its status in the chunk's context, 32 bits. */
export function encodeExtent(buffer: Buffer, at: number, length: number, status: number): number {
  return put32(buffer, put32(buffer, at, length), status);
}

/** Payload of BLOCK_STATUS_EXT before its extents, of which `extents` >= 1 follow. */
export function encodeExtendedStatusPayloadHead(
  buffer: Buffer,
  at: number,
  contextId: number,
  extents: number,
): number {
  return put32(buffer, put32(buffer, at, contextId), extents);
}

/** An extent of BLOCK_STATUS_EXT: as `encodeExtent`, but up to Number.MAX_SAFE_INTEGER bytes long. */
export function encodeExtendedExtent(buffer: Buffer, at: number, length: number, status: number): number {
  return put64(buffer, put64(buffer, at, length), status >>> 0);
}

/**
 * Payload of ERROR: at most ERROR_PAYLOAD_BYTES_MAX. `errno` is one of Errno but not OK; `message` is for a person's eyes,
 * may be empty, and is cut at STRING_BYTES_PREFERRED bytes.
 */
export function encodeErrorPayload(buffer: Buffer, at: number, errno: number, message: string): number {
  // Buffer.write never cuts a character in two.
  const length = message === '' ? 0 : buffer.write(message, at + 6, STRING_BYTES_PREFERRED, 'utf8');
  put16(buffer, put32(buffer, at, errno), length);
  return at + 6 + length;
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
