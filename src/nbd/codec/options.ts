/**
 * What a client sends during the handshake, parsed. Pure functions: complete units in, values out. Nothing here throws on
 * what a peer may send; malformed data is a value of `Parsed`.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Fixed newstyle negotiation» and «Option types».
 */
import { isUtf8 } from 'node:buffer';
import { HandshakeFlag, Info, OPTION_MAGIC, STRING_BYTES_MAX } from '../constants.js';

export const CLIENT_FLAGS_BYTES = 4;
export const OPTION_HEADER_BYTES = 16;

/** `problem` is a short sentence that can be sent to the client. */
export type Parsed<T> = { ok: true; value: T } | { ok: false; problem: string };

export interface ClientFlags {
  fixedNewstyle: boolean;
  noZeroes: boolean;
}

/** The 4 bytes after our greeting. A bit we do not know or did not offer is malformed. */
export function parseClientFlags(bytes: Buffer): Parsed<ClientFlags> {
  const flags = bytes.readUInt32BE(0);
  if ((flags & ~(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)) !== 0)
    return malformed(`unknown client flags 0x${flags.toString(16)}`);
  return parsed({
    fixedNewstyle: (flags & HandshakeFlag.FIXED_NEWSTYLE) !== 0,
    noZeroes: (flags & HandshakeFlag.NO_ZEROES) !== 0,
  });
}

export interface OptionHeader {
  option: number;
  /** Bytes of data that follow. */
  length: number;
}

/** The 16 bytes before an option's data. Malformed means the magic is wrong: the stream cannot be followed any further. */
export function parseOptionHeader(bytes: Buffer): Parsed<OptionHeader> {
  if (bytes.readBigUInt64BE(0) !== OPTION_MAGIC) return malformed('not an option: wrong magic');
  return parsed({ option: bytes.readUInt32BE(8), length: bytes.readUInt32BE(12) });
}

/** Data of EXPORT_NAME: the name and nothing else. */
export function parseExportName(data: Buffer): Parsed<string> {
  return parseString(data, 'the export name');
}

export interface InfoRequest {
  /** Empty: the default export. */
  name: string;
  /** The information types asked for, those we know. */
  infos: ReadonlySet<number>;
}

const KNOWN_INFOS: ReadonlySet<number> = new Set(Object.values(Info));

/** Data of INFO and GO. */
export function parseInfoRequest(data: Buffer): Parsed<InfoRequest> {
  if (data.length < 6) return malformed('the request is shorter than its fixed fields');
  const nameLength = data.readUInt32BE(0);
  if (nameLength > data.length - 6) return malformed('the export name is longer than the request');
  const name = parseString(data.subarray(4, 4 + nameLength), 'the export name');
  if (!name.ok) return name;
  const listAt = 4 + nameLength + 2;
  const count = data.readUInt16BE(listAt - 2);
  if (data.length !== listAt + 2 * count)
    return malformed('the list of information types does not fit the request');
  const infos = new Set<number>();
  for (let at = listAt; at < data.length; at += 2) {
    const info = data.readUInt16BE(at);
    if (KNOWN_INFOS.has(info)) infos.add(info);
  }
  return parsed({ name: name.value, infos });
}

export interface MetaContextRequest {
  name: string;
  /** Each `namespace:leaf`. */
  queries: readonly string[];
}

/** Data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export function parseMetaContextRequest(data: Buffer): Parsed<MetaContextRequest> {
  if (data.length < 8) return malformed('the request is shorter than its fixed fields');
  const nameLength = data.readUInt32BE(0);
  if (nameLength > data.length - 8) return malformed('the export name is longer than the request');
  const name = parseString(data.subarray(4, 4 + nameLength), 'the export name');
  if (!name.ok) return name;
  let at = 4 + nameLength;
  const count = data.readUInt32BE(at);
  at += 4;
  const queries: string[] = [];
  // Each query takes 4 bytes of `data` at least: a count that promises more ends the loop at the first missing one.
  for (let index = 0; index < count; index++) {
    if (data.length - at < 4) return malformed('a query is missing');
    const length = data.readUInt32BE(at);
    at += 4;
    if (length > data.length - at) return malformed('a query is longer than the request');
    const query = parseString(data.subarray(at, at + length), 'a query');
    if (!query.ok) return query;
    if (!query.value.includes(':'))
      return malformed('a query has no namespace: it is written namespace:leaf');
    queries.push(query.value);
    at += length;
  }
  if (at !== data.length) return malformed('there are bytes after the last query');
  return parsed({ name: name.value, queries });
}

function parseString(bytes: Buffer, what: string): Parsed<string> {
  if (bytes.length > STRING_BYTES_MAX) return malformed(`${what} is longer than ${STRING_BYTES_MAX} bytes`);
  if (bytes.includes(0)) return malformed(`${what} contains NUL`);
  if (!isUtf8(bytes)) return malformed(`${what} is not UTF-8`);
  return parsed(bytes.toString('utf8'));
}

export function parsed<T>(value: T): Parsed<T> {
  return { ok: true, value };
}

export function malformed<T>(problem: string): Parsed<T> {
  return { ok: false, problem };
}
