/**
 * The client's side of the wire as pure functions: bytes in, bytes out, no sockets, no state.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, sections "Newstyle negotiation", "Option types", "Option reply types",
 * "Request message". Whatever a server says wrongly is a BlockferryError 'protocol'.
 */

import { BlockferryError } from '../../errors.js';
import {
  EXTENDED_REQUEST_MAGIC,
  HandshakeFlag,
  Info,
  NBD_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  Option,
  REQUEST_MAGIC,
  STRING_BYTES_MAX,
  TransmissionFlag,
} from '../constants.js';

export const GREETING_BYTES = 18;
export const OPTION_REPLY_HEADER_BYTES = 20;
/** Largest payload of one option reply that is read, bytes: name and description at their longest, and some room. */
export const OPTION_REPLY_BYTES_MAX = 64 << 10;
/** Reply to EXPORT_NAME: size and flags, and this many reserved bytes unless NO_ZEROES was agreed. */
export const EXPORT_NAME_REPLY_BYTES = 10;
export const EXPORT_NAME_ZEROES_BYTES = 124;

/** What old servers send where "IHAVEOPT" stands (proto.md, "Oldstyle negotiation"). */
const OLDSTYLE_MAGIC = 0x00420281861253n;
const U32 = 0x1_0000_0000;

export interface OptionReplyHeader {
  readonly option: number;
  /** One of OptionReply, or a number this client does not know. */
  readonly type: number;
  /** Bytes of payload that follow, <= OPTION_REPLY_BYTES_MAX. */
  readonly length: number;
}

/** What a server says of the requests it takes (INFO_BLOCK_SIZE). */
export interface BlockSize {
  /** Power of two, 1..65536: offsets and lengths of requests are multiples of it. Bytes. */
  readonly minimum: number;
  /** Power of two >= 512, bytes. */
  readonly preferred: number;
  /** Largest payload of one request, bytes; 0xffffffff: no limit. */
  readonly maximum: number;
}

export interface ExportBasics {
  /** Bytes, 0..2^53-1. */
  readonly size: number;
  /** TransmissionFlag bits. */
  readonly flags: number;
}

/** One answer to LIST; both strings may be empty and are at most 4096 bytes of UTF-8. */
export interface ListedExport {
  readonly name: string;
  readonly description: string;
}

export function protocolError(message: string): BlockferryError {
  return new BlockferryError('protocol', `the server broke the NBD protocol: ${message}`);
}

/** Text of a server, made fit for one line of a message: control characters replaced, at most 256 characters. */
export function displayable(text: string): string {
  // biome-ignore lint/suspicious/noControlCharactersInRegex: they are what is looked for
  return text.slice(0, 256).replace(/[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/g, ' ');
}

// Encoding: handshake

/** Answers the greeting: 4 bytes. */
export function encodeClientFlags(flags: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(flags);
  return bytes;
}

/** Option header of 16 bytes and its data. */
export function encodeOption(option: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const bytes = Buffer.alloc(16 + data.length);
  bytes.writeBigUInt64BE(OPTION_MAGIC, 0);
  bytes.writeUInt32BE(option, 8);
  bytes.writeUInt32BE(data.length, 12);
  data.copy(bytes, 16);
  return bytes;
}

/** GO or INFO: the export name, and which INFO items are wanted beside EXPORT. */
export function encodeGo(option: number, exportName: string, wanted: readonly number[]): Buffer {
  const name = Buffer.from(exportName);
  const data = Buffer.alloc(4 + name.length + 2 + 2 * wanted.length);
  data.writeUInt32BE(name.length, 0);
  name.copy(data, 4);
  data.writeUInt16BE(wanted.length, 4 + name.length);
  wanted.forEach((item, i) => {
    data.writeUInt16BE(item, 6 + name.length + 2 * i);
  });
  return encodeOption(option, data);
}

/** LIST_META_CONTEXT or SET_META_CONTEXT. A query is `namespace:leaf`. */
export function encodeMetaContext(option: number, exportName: string, queries: readonly string[]): Buffer {
  const parts = [sized(exportName), Buffer.alloc(4), ...queries.map(sized)];
  (parts[1] as Buffer).writeUInt32BE(queries.length);
  return encodeOption(option, Buffer.concat(parts));
}

export function encodeExportName(exportName: string): Buffer {
  return encodeOption(Option.EXPORT_NAME, Buffer.from(exportName));
}

function sized(text: string): Buffer {
  const body = Buffer.from(text);
  const bytes = Buffer.alloc(4 + body.length);
  bytes.writeUInt32BE(body.length);
  body.copy(bytes, 4);
  return bytes;
}

// Encoding: transmission

/**
 * Writes a request header, REQUEST_HEADER_BYTES long, into `into` from `at` on; returns its end. Allocates nothing.
 * The cookie is given in two halves of 32 bits; offset <= 2^53-1, length < 2^32.
 */
export function encodeRequest(
  into: Buffer,
  at: number,
  flags: number,
  command: number,
  cookieHigh: number,
  cookieLow: number,
  offset: number,
  length: number,
): number {
  const end = putUpToOffset(into, at, REQUEST_MAGIC, flags, command, cookieHigh, cookieLow, offset);
  return into.writeUInt32BE(length, end);
}

/** As `encodeRequest`, an extended header of EXTENDED_REQUEST_HEADER_BYTES; length <= 2^53-1. */
export function encodeExtendedRequest(
  into: Buffer,
  at: number,
  flags: number,
  command: number,
  cookieHigh: number,
  cookieLow: number,
  offset: number,
  length: number,
): number {
  const end = putUpToOffset(into, at, EXTENDED_REQUEST_MAGIC, flags, command, cookieHigh, cookieLow, offset);
  return put64(into, end, length);
}

/** What both headers begin with. */
function putUpToOffset(
  into: Buffer,
  at: number,
  magic: number,
  flags: number,
  command: number,
  cookieHigh: number,
  cookieLow: number,
  offset: number,
): number {
  into.writeUInt32BE(magic, at);
  into.writeUInt32BE(((flags << 16) | command) >>> 0, at + 4);
  into.writeUInt32BE(cookieHigh, at + 8);
  into.writeUInt32BE(cookieLow, at + 12);
  return put64(into, at + 16, offset);
}

function put64(into: Buffer, at: number, value: number): number {
  into.writeUInt32BE(Math.floor(value / U32), at);
  return into.writeUInt32BE(value >>> 0, at + 4);
}

/** Payload of a BLOCK_STATUS that asks for one context only: 12 bytes. */
export function encodeStatusFilter(length: number, contextId: number): Buffer {
  const bytes = Buffer.alloc(12);
  bytes.writeBigUInt64BE(BigInt(length), 0);
  bytes.writeUInt32BE(contextId, 8);
  return bytes;
}

// Decoding: handshake

/** Handshake flags of a greeting of GREETING_BYTES; unknown bits are dropped. */
export function decodeGreeting(bytes: Buffer): { fixedNewstyle: boolean; noZeroes: boolean } {
  if (bytes.readBigUInt64BE(0) !== NBD_MAGIC)
    throw protocolError('no NBD greeting: this is not an NBD server');
  const magic = bytes.readBigUInt64BE(8);
  if (magic === OLDSTYLE_MAGIC)
    throw protocolError('it speaks oldstyle NBD, which is too old: use a newstyle server');
  if (magic !== OPTION_MAGIC) throw protocolError('the greeting has a wrong magic');
  const flags = bytes.readUInt16BE(16);
  return {
    fixedNewstyle: (flags & HandshakeFlag.FIXED_NEWSTYLE) !== 0,
    noZeroes: (flags & HandshakeFlag.NO_ZEROES) !== 0,
  };
}

/** Header of an option reply, OPTION_REPLY_HEADER_BYTES from `at` on; null when fewer bytes are there. */
export function decodeOptionReplyHeader(bytes: Buffer, at: number): OptionReplyHeader | null {
  if (bytes.length - at < OPTION_REPLY_HEADER_BYTES) return null;
  if (bytes.readBigUInt64BE(at) !== OPTION_REPLY_MAGIC)
    throw protocolError('an option reply has a wrong magic');
  const length = bytes.readUInt32BE(at + 16);
  if (length > OPTION_REPLY_BYTES_MAX) throw protocolError(`an option reply of ${length} bytes is too long`);
  return { option: bytes.readUInt32BE(at + 8), type: bytes.readUInt32BE(at + 12), length };
}

/** Size and flags, EXPORT_NAME_REPLY_BYTES from `at` on: the answer to EXPORT_NAME and the body of INFO_EXPORT. */
export function decodeExportBasics(bytes: Buffer, at: number): ExportBasics {
  const size = bytes.readBigUInt64BE(at);
  if (size > BigInt(Number.MAX_SAFE_INTEGER))
    throw protocolError(`an export of ${size} bytes is not possible`);
  const flags = bytes.readUInt16BE(at + 8);
  if ((flags & TransmissionFlag.HAS_FLAGS) === 0)
    throw protocolError('the transmission flags lack HAS_FLAGS');
  return { size: Number(size), flags };
}

export type InfoItem =
  | ({ readonly kind: 'export' } & ExportBasics)
  | { readonly kind: 'name'; readonly name: string }
  | { readonly kind: 'description'; readonly description: string }
  | { readonly kind: 'block-size'; readonly blockSize: BlockSize }
  | { readonly kind: 'unknown' };

/** Payload of a REP_INFO. Types that are not known are to be ignored, says the protocol. */
export function decodeInfo(payload: Buffer): InfoItem {
  if (payload.length < 2) throw protocolError('an INFO reply without a type');
  switch (payload.readUInt16BE(0)) {
    case Info.EXPORT:
      if (payload.length !== 12) throw protocolError(`INFO_EXPORT of ${payload.length} bytes instead of 12`);
      return { kind: 'export', ...decodeExportBasics(payload, 2) };
    case Info.NAME:
      return { kind: 'name', name: decodeString(payload, 2, payload.length, 'the export name') };
    case Info.DESCRIPTION:
      return {
        kind: 'description',
        description: decodeString(payload, 2, payload.length, 'the description'),
      };
    case Info.BLOCK_SIZE:
      if (payload.length !== 14)
        throw protocolError(`INFO_BLOCK_SIZE of ${payload.length} bytes instead of 14`);
      return { kind: 'block-size', blockSize: decodeBlockSize(payload) };
    default:
      return { kind: 'unknown' };
  }
}

function decodeBlockSize(payload: Buffer): BlockSize {
  const minimum = payload.readUInt32BE(2);
  const preferred = payload.readUInt32BE(6);
  const maximum = payload.readUInt32BE(10);
  if (!isPowerOfTwo(minimum) || minimum > 65536) throw protocolError(`a minimum block size of ${minimum}`);
  if (!isPowerOfTwo(preferred) || preferred < Math.max(minimum, 512)) {
    throw protocolError(`a preferred block size of ${preferred}`);
  }
  if (maximum < preferred)
    throw protocolError(`a maximum payload of ${maximum} under the preferred block ${preferred}`);
  return { minimum, preferred, maximum };
}

function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value));
}

/** Payload of a REP_SERVER: one export of a LIST. */
export function decodeListedExport(payload: Buffer): ListedExport {
  const length = payload.length < 4 ? -1 : payload.readUInt32BE(0);
  if (length < 0 || length > payload.length - 4)
    throw protocolError('a listed export name is longer than its reply');
  return {
    name: decodeString(payload, 4, 4 + length, 'a listed export name'),
    description: decodeString(payload, 4 + length, payload.length, 'a description'),
  };
}

/** Payload of a REP_META_CONTEXT. */
export function decodeMetaContext(payload: Buffer): { id: number; name: string } {
  if (payload.length < 5) throw protocolError('a metadata context without a name');
  return {
    id: payload.readUInt32BE(0),
    name: decodeString(payload, 4, payload.length, 'a metadata context'),
  };
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

function decodeString(bytes: Buffer, from: number, to: number, what: string): string {
  if (to - from > STRING_BYTES_MAX) throw protocolError(`${what} is longer than ${STRING_BYTES_MAX} bytes`);
  let text: string;
  try {
    text = utf8.decode(bytes.subarray(from, to));
  } catch {
    throw protocolError(`${what} is not UTF-8`);
  }
  if (text.includes('\0')) throw protocolError(`${what} contains a NUL character`);
  return text;
}
