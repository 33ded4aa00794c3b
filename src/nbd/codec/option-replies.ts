/**
 * What a server sends during the handshake. Pure functions, a new Buffer each: none of this is on the hot path.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Newstyle negotiation» and «Option reply types».
 */
import {
  HandshakeFlag,
  Info,
  NBD_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  Option,
  OptionReply,
  STRING_BYTES_MAX,
  STRING_BYTES_PREFERRED,
} from '../constants.js';

export const OPTION_REPLY_HEADER_BYTES = 20;
const EXPORT_NAME_ANSWER_BYTES = 10;
const EXPORT_NAME_ZEROES_BYTES = 124;

/** The first 18 bytes of every connection. */
export function encodeGreeting(): Buffer {
  const bytes = Buffer.alloc(18);
  bytes.writeBigUInt64BE(NBD_MAGIC, 0);
  bytes.writeBigUInt64BE(OPTION_MAGIC, 8);
  bytes.writeUInt16BE(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES, 16);
  return bytes;
}

export function encodeAck(option: number): Buffer {
  return replyWith(option, OptionReply.ACK, 0);
}

/** `type` is one of OptionReply.ERR_*; `message` is for a person's eyes and cut at STRING_BYTES_PREFERRED bytes. */
export function encodeOptionError(option: number, type: number, message: string): Buffer {
  const text = clipUtf8(message, STRING_BYTES_PREFERRED);
  const bytes = replyWith(option, type, text.length);
  text.copy(bytes, OPTION_REPLY_HEADER_BYTES);
  return bytes;
}

/** One export in the answer to LIST. `name` has STRING_BYTES_MAX bytes at most; a longer description is cut. */
export function encodeServer(name: string, description: string): Buffer {
  const nameBytes = Buffer.from(name, 'utf8');
  const descriptionBytes = clipUtf8(description, STRING_BYTES_MAX);
  const bytes = replyWith(Option.LIST, OptionReply.SERVER, 4 + nameBytes.length + descriptionBytes.length);
  bytes.writeUInt32BE(nameBytes.length, OPTION_REPLY_HEADER_BYTES);
  nameBytes.copy(bytes, OPTION_REPLY_HEADER_BYTES + 4);
  descriptionBytes.copy(bytes, OPTION_REPLY_HEADER_BYTES + 4 + nameBytes.length);
  return bytes;
}

/** INFO_EXPORT in the answer to `option` (INFO or GO): size in bytes, transmission flags. */
export function encodeInfoExport(option: number, size: number, flags: number): Buffer {
  const bytes = infoWith(option, Info.EXPORT, 10);
  bytes.writeBigUInt64BE(BigInt(size), OPTION_REPLY_HEADER_BYTES + 2);
  bytes.writeUInt16BE(flags, OPTION_REPLY_HEADER_BYTES + 10);
  return bytes;
}

export function encodeInfoName(option: number, name: string): Buffer {
  return infoText(option, Info.NAME, name);
}

/** A description longer than STRING_BYTES_MAX bytes is cut. */
export function encodeInfoDescription(option: number, description: string): Buffer {
  return infoText(option, Info.DESCRIPTION, description);
}

/** All in bytes; minimum and preferred are powers of two. Source: «Size constraints». */
export function encodeInfoBlockSize(
  option: number,
  minimum: number,
  preferred: number,
  payloadMax: number,
): Buffer {
  const bytes = infoWith(option, Info.BLOCK_SIZE, 12);
  bytes.writeUInt32BE(minimum, OPTION_REPLY_HEADER_BYTES + 2);
  bytes.writeUInt32BE(preferred, OPTION_REPLY_HEADER_BYTES + 6);
  bytes.writeUInt32BE(payloadMax, OPTION_REPLY_HEADER_BYTES + 10);
  return bytes;
}

/** `id` is 0 in an answer to LIST_META_CONTEXT, unique among the selected ones in an answer to SET_META_CONTEXT. */
export function encodeMetaContext(option: number, id: number, name: string): Buffer {
  const text = Buffer.from(name, 'utf8');
  const bytes = replyWith(option, OptionReply.META_CONTEXT, 4 + text.length);
  bytes.writeUInt32BE(id, OPTION_REPLY_HEADER_BYTES);
  text.copy(bytes, OPTION_REPLY_HEADER_BYTES + 4);
  return bytes;
}

/** The answer to EXPORT_NAME, which has no reply header. `noZeroes`: both sides agreed on NO_ZEROES. */
export function encodeExportNameAnswer(size: number, flags: number, noZeroes: boolean): Buffer {
  const bytes = Buffer.alloc(EXPORT_NAME_ANSWER_BYTES + (noZeroes ? 0 : EXPORT_NAME_ZEROES_BYTES));
  bytes.writeBigUInt64BE(BigInt(size), 0);
  bytes.writeUInt16BE(flags, 8);
  return bytes;
}

/** `text` as UTF-8 in at most `bytesMax` bytes, cut between characters. */
export function clipUtf8(text: string, bytesMax: number): Buffer {
  const bytes = Buffer.from(text, 'utf8');
  if (bytes.length <= bytesMax) return bytes;
  let end = bytesMax;
  while (end > 0 && (bytes[end]! & 0xc0) === 0x80) end--; // bytes[end] continues a character: leave all of it out
  return bytes.subarray(0, end);
}

function infoText(option: number, info: number, text: string): Buffer {
  const textBytes = clipUtf8(text, STRING_BYTES_MAX);
  const bytes = infoWith(option, info, textBytes.length);
  textBytes.copy(bytes, OPTION_REPLY_HEADER_BYTES + 2);
  return bytes;
}

function infoWith(option: number, info: number, payloadLength: number): Buffer {
  const bytes = replyWith(option, OptionReply.INFO, 2 + payloadLength);
  bytes.writeUInt16BE(info, OPTION_REPLY_HEADER_BYTES);
  return bytes;
}

function replyWith(option: number, type: number, dataLength: number): Buffer {
  const bytes = Buffer.alloc(OPTION_REPLY_HEADER_BYTES + dataLength);
  bytes.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  bytes.writeUInt32BE(option, 8);
  bytes.writeUInt32BE(type, 12);
  bytes.writeUInt32BE(dataLength, 16);
  return bytes;
}
