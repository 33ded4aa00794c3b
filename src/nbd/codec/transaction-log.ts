/**
 * The records of a transaction log, as nbd-server writes them and nbd-trdump and nbd-trplay read them. Pure; encoders write into the
 * caller's buffer at `at`, allocate nothing, and return the offset behind what they wrote.
 *
 *     request   28 bytes, a request's header as on the wire; where the log has data, a WRITE's payload follows
 *     reply     16 bytes, a simple reply's header as on the wire
 *     switch    28 bytes, shaped like a request: from here on WRITEs are followed by their payload (length 1), or are not (0)
 *
 * Source: NetworkBlockDevice/nbd, nbd-trdump(1) and nbd-trplay(1), nbd-helper.h; doc/proto.md, «Reserved Magic values» (0x25609514).
 */
import {
  Command,
  REQUEST_HEADER_BYTES,
  REQUEST_MAGIC,
  SIMPLE_REPLY_HEADER_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_HEADER_BYTES,
  STRUCTURED_REPLY_MAGIC,
} from '../constants.js';

const SWITCH_MAGIC = 0x25609514;
/** The switch's type: whether payloads are there. */
const SET_DATALOG = 1;
/** What stands in a switch's offset: 0x4a93ba39a54f31b6. */
const SWITCH_OFFSET_HI = 0x4a93ba39;
const SWITCH_OFFSET_LO = 0xa54f31b6;

export const REQUEST_RECORD_BYTES = REQUEST_HEADER_BYTES;
export const REPLY_RECORD_BYTES = SIMPLE_REPLY_HEADER_BYTES;

/** `hi` and `lo`: the handle's two halves, unsigned. `length` below 2^32; `offset` up to Number.MAX_SAFE_INTEGER, bytes. */
export function encodeRequestRecord(
  buffer: Buffer,
  at: number,
  flags: number,
  command: number,
  hi: number,
  lo: number,
  offset: number,
  length: number,
): number {
  put32(buffer, at, REQUEST_MAGIC);
  put32(buffer, at + 4, (flags << 16) | command);
  put32(buffer, at + 8, hi);
  put32(buffer, at + 12, lo);
  put32(buffer, at + 16, Math.floor(offset / 0x1_0000_0000));
  put32(buffer, at + 20, offset);
  put32(buffer, at + 24, length);
  return at + REQUEST_RECORD_BYTES;
}

/** `errno` is one of Errno. */
export function encodeReplyRecord(buffer: Buffer, at: number, hi: number, lo: number, errno: number): number {
  put32(buffer, at, SIMPLE_REPLY_MAGIC);
  put32(buffer, at + 4, errno);
  put32(buffer, at + 8, hi);
  put32(buffer, at + 12, lo);
  return at + REPLY_RECORD_BYTES;
}

/** The switch that says whether payloads follow WRITEs from here on. */
export function encodeDataSwitch(withData: boolean): Buffer {
  const bytes = Buffer.alloc(REQUEST_RECORD_BYTES);
  put32(bytes, 0, SWITCH_MAGIC);
  put32(bytes, 4, SET_DATALOG);
  put32(bytes, 16, SWITCH_OFFSET_HI);
  put32(bytes, 20, SWITCH_OFFSET_LO);
  put32(bytes, 24, withData ? 1 : 0);
  return bytes;
}

export type LogRecord =
  | {
      kind: 'request';
      flags: number;
      command: number;
      /** The handle's two halves. */
      hi: number;
      lo: number;
      /** Bytes. */
      offset: number;
      length: number;
    }
  | { kind: 'reply'; hi: number; lo: number; errno: number }
  | { kind: 'switch'; withData: boolean }
  /** The header of a chunk of a structured reply: nbd-server writes them, we do not. */
  | { kind: 'chunk' };

/**
 * The record that begins at `at`, without its payload; 'cut' if `bytes` ends within its header, 'foreign' if no record begins so.
 */
export function decodeRecord(bytes: Buffer, at: number): LogRecord | 'cut' | 'foreign' {
  const left = bytes.length - at;
  if (left < 4) return 'cut';
  const magic = bytes.readUInt32BE(at);
  const size = headerBytes(magic);
  if (size === 0) return 'foreign';
  if (left < size) return 'cut';
  if (magic === STRUCTURED_REPLY_MAGIC) return { kind: 'chunk' };
  const hi = bytes.readUInt32BE(at + 8);
  const lo = bytes.readUInt32BE(at + 12);
  if (magic === SIMPLE_REPLY_MAGIC) return { kind: 'reply', hi, lo, errno: bytes.readUInt32BE(at + 4) };
  const length = bytes.readUInt32BE(at + 24);
  const offsetHi = bytes.readUInt32BE(at + 16);
  const offsetLo = bytes.readUInt32BE(at + 20);
  if (magic === SWITCH_MAGIC) {
    const ours = offsetHi === SWITCH_OFFSET_HI && offsetLo === SWITCH_OFFSET_LO;
    return ours && bytes.readUInt32BE(at + 4) === SET_DATALOG
      ? { kind: 'switch', withData: length !== 0 }
      : 'foreign';
  }
  const flags = bytes.readUInt16BE(at + 4);
  const command = bytes.readUInt16BE(at + 6);
  return { kind: 'request', flags, command, hi, lo, offset: offsetHi * 0x1_0000_0000 + offsetLo, length };
}

/** Bytes that the record takes in the log; `withData`: payloads are there. */
export function recordBytes(record: LogRecord, withData: boolean): number {
  if (record.kind === 'reply') return REPLY_RECORD_BYTES;
  if (record.kind === 'chunk') return STRUCTURED_REPLY_HEADER_BYTES;
  const payload = record.kind === 'request' && record.command === Command.WRITE && withData;
  return REQUEST_RECORD_BYTES + (payload ? record.length : 0);
}

function headerBytes(magic: number): number {
  if (magic === REQUEST_MAGIC || magic === SWITCH_MAGIC) return REQUEST_RECORD_BYTES;
  if (magic === SIMPLE_REPLY_MAGIC) return REPLY_RECORD_BYTES;
  return magic === STRUCTURED_REPLY_MAGIC ? STRUCTURED_REPLY_HEADER_BYTES : 0;
}

function put32(buffer: Buffer, at: number, value: number): void {
  buffer[at] = value >>> 24;
  buffer[at + 1] = value >>> 16;
  buffer[at + 2] = value >>> 8;
  buffer[at + 3] = value;
}
