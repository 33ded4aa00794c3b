/**
 * Frames of a compressed connection, and the data of the option that asks for one. Pure functions but for `FrameReader`, which keeps
 * the incomplete frame.
 *
 *     frame:   u16 magic 0x6266 | u8 kind (0 raw, 1 zstd) | u8 0 | u32 payload bytes | u32 content bytes | payload
 *     option:  u16 version 1 | i16 level the server is to use (0: as it sees fit)
 *
 * A frame holds 1 to FRAME_BYTES_MAX bytes of content. The payload of a raw frame is the content, that of a zstd frame is shorter.
 * Whatever breaks these rules throws BlockferryError 'protocol'. So nobody can announce, nor unpack, more than FRAME_BYTES_MAX at a time.
 */
import { BlockferryError } from '../../errors.js';
import { malformed, type Parsed, parsed } from './options.js';

export const FRAME_MAGIC = 0x6266; // "bf"
export const FRAME_HEADER_BYTES = 12;
/** Most content of one frame, bytes. */
export const FRAME_BYTES_MAX = 1 << 20;
export const FrameKind = { RAW: 0, ZSTD: 1 } as const;

export const COMPRESSION_VERSION = 1;
export const COMPRESSION_OPTION_BYTES = 4;
export const LEVEL_MIN = -7;
export const LEVEL_MAX = 19;

/** What a side compresses with: a level of zstd, or whatever pays. */
export type CompressionLevel = 'auto' | number;

/** What a client asks for. */
export type Compression = 'off' | CompressionLevel;

/** A level that can be asked for; zstd takes 0 for its default, and so it means nothing here. */
export function isLevel(level: number): boolean {
  return Number.isInteger(level) && level >= LEVEL_MIN && level <= LEVEL_MAX && level !== 0;
}

export function encodeCompressionRequest(level: CompressionLevel): Buffer {
  const data = Buffer.alloc(COMPRESSION_OPTION_BYTES);
  data.writeUInt16BE(COMPRESSION_VERSION, 0);
  data.writeInt16BE(level === 'auto' ? 0 : level, 2);
  return data;
}

/** Undefined: a version we do not know. */
export function parseCompressionRequest(data: Buffer): Parsed<CompressionLevel | undefined> {
  if (data.length !== COMPRESSION_OPTION_BYTES)
    return malformed(`the request has ${data.length} bytes instead of ${COMPRESSION_OPTION_BYTES}`);
  if (data.readUInt16BE(0) !== COMPRESSION_VERSION) return parsed(undefined);
  const level = data.readInt16BE(2);
  if (level === 0) return parsed('auto');
  return isLevel(level) ? parsed(level) : malformed(`there is no level ${level}`);
}

/** Writes the header of a frame to bytes[at, at + FRAME_HEADER_BYTES). */
export function writeFrameHeader(
  bytes: Uint8Array,
  at: number,
  kind: number,
  payloadBytes: number,
  contentBytes: number,
): void {
  bytes[at] = FRAME_MAGIC >> 8;
  bytes[at + 1] = FRAME_MAGIC & 0xff;
  bytes[at + 2] = kind;
  bytes[at + 3] = 0;
  writeUInt32(bytes, at + 4, payloadBytes);
  writeUInt32(bytes, at + 8, contentBytes);
}

function writeUInt32(bytes: Uint8Array, at: number, value: number): void {
  bytes[at] = value >>> 24;
  bytes[at + 1] = (value >>> 16) & 0xff;
  bytes[at + 2] = (value >>> 8) & 0xff;
  bytes[at + 3] = value & 0xff;
}

/** What ends a connection whose peer, a client or a server, breaks the rules of frames. */
export function frameError(what: string): BlockferryError {
  return new BlockferryError('protocol', `the peer broke the rules of a compressed connection: ${what}`);
}

/** A frame that was received. */
export interface Frame {
  readonly kind: 'raw' | 'zstd';
  /** In memory of its own, from its start on. */
  readonly payload: Buffer;
  readonly contentBytes: number;
}

function checkedHeader(header: Buffer): { kind: Frame['kind']; payloadBytes: number; contentBytes: number } {
  if (header.readUInt16BE(0) !== FRAME_MAGIC) throw frameError('it sent no frame where one was due');
  const kind = header[2];
  const payloadBytes = header.readUInt32BE(4);
  const contentBytes = header.readUInt32BE(8);
  if ((kind !== FrameKind.RAW && kind !== FrameKind.ZSTD) || header[3] !== 0)
    throw frameError(`it sent a frame of unknown kind ${kind}`);
  if (contentBytes === 0 || contentBytes > FRAME_BYTES_MAX)
    throw frameError(`it announced a frame of ${contentBytes} bytes`);
  const fits =
    kind === FrameKind.RAW ? payloadBytes === contentBytes : payloadBytes > 0 && payloadBytes < contentBytes;
  if (!fits) throw frameError(`it announced ${payloadBytes} bytes for ${contentBytes} of content`);
  return { kind: kind === FrameKind.RAW ? 'raw' : 'zstd', payloadBytes, contentBytes };
}

/** Makes frames of bytes that come in pieces of any size. Holds one incomplete frame at most. */
export class FrameReader {
  readonly #header = Buffer.alloc(FRAME_HEADER_BYTES);
  #headerBytes = 0;
  #kind: Frame['kind'] = 'raw';
  #contentBytes = 0;
  #payload: Buffer | null = null;
  #payloadBytes = 0;

  /** In the middle of a frame. */
  get incomplete(): boolean {
    return this.#headerBytes > 0;
  }

  /** Takes bytes[at, end), which are not kept, and tells of each frame that is whole. */
  push(bytes: Buffer, at: number, end: number, take: (frame: Frame) => void): void {
    for (let from = at; from < end; ) {
      if (this.#payload === null) {
        const copied = bytes.copy(this.#header, this.#headerBytes, from, end);
        this.#headerBytes += copied;
        from += copied;
        if (this.#headerBytes < FRAME_HEADER_BYTES) return;
        const { kind, payloadBytes, contentBytes } = checkedHeader(this.#header);
        this.#kind = kind;
        this.#contentBytes = contentBytes;
        this.#payload = Buffer.allocUnsafeSlow(payloadBytes);
        this.#payloadBytes = 0;
      }
      const copied = bytes.copy(this.#payload, this.#payloadBytes, from, end);
      this.#payloadBytes += copied;
      from += copied;
      if (this.#payloadBytes < this.#payload.length) return;
      const frame = { kind: this.#kind, payload: this.#payload, contentBytes: this.#contentBytes };
      this.#payload = null;
      this.#headerBytes = 0;
      take(frame);
    }
  }
}
