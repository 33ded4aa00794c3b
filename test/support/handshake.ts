/** A client of the handshake made of plain bytes, a directory of exports in memory, and a strict reader of what a server sends. */
import assert from 'node:assert/strict';
import { HandshakeFlag, NBD_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC } from '../../src/nbd/constants.js';
import type { BlockDevice, IoRequest, StatusRequest } from '../../src/nbd/device.js';
import { defaultOrNamed, type ExportDirectory, type ExportEntry } from '../../src/nbd/server/exports.js';
import { Handshake, type HandshakeParameters, type HandshakeResult } from '../../src/nbd/server/handshake.js';
import type { TlsMode } from '../../src/nbd/tls.js';

export const GREETING_BYTES = 18;

export function clientFlags(flags: number = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES): Buffer {
  return u32(flags);
}

export function option(number: number, data: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u64(OPTION_MAGIC), u32(number), u32(data.length), data]);
}

export function infoData(name: string, infos: number[] = []): Buffer {
  return Buffer.concat([counted(name), u16(infos.length), ...infos.map(u16)]);
}

export function metaData(name: string, queries: string[]): Buffer {
  return Buffer.concat([counted(name), u32(queries.length), ...queries.map(counted)]);
}

export function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

export function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(value);
  return bytes;
}

/** 32 bits of length, then the text. */
export function counted(text: string): Buffer {
  const bytes = Buffer.from(text);
  return Buffer.concat([u32(bytes.length), bytes]);
}

export interface Reply {
  option: number;
  type: number;
  data: Buffer;
}

/** Reads a server's bytes behind the greeting as option replies. Whatever does not fit fails the test. */
export function readReplies(bytes: Buffer): Reply[] {
  const replies: Reply[] = [];
  let at = 0;
  while (at < bytes.length) {
    assert.ok(bytes.length - at >= 20, 'a reply header is cut off');
    assert.equal(bytes.readBigUInt64BE(at), OPTION_REPLY_MAGIC);
    const length = bytes.readUInt32BE(at + 16);
    assert.ok(bytes.length - at - 20 >= length, 'the data of a reply is cut off');
    const data = bytes.subarray(at + 20, at + 20 + length);
    replies.push({ option: bytes.readUInt32BE(at + 8), type: bytes.readUInt32BE(at + 12), data });
    at += 20 + length;
  }
  return replies;
}

export function readGreeting(bytes: Buffer): number {
  assert.ok(bytes.length >= GREETING_BYTES);
  assert.equal(bytes.readBigUInt64BE(0), NBD_MAGIC);
  assert.equal(bytes.readBigUInt64BE(8), OPTION_MAGIC);
  return bytes.readUInt16BE(16);
}

/** A device of zeroes that counts how often it was released. */
export class ZeroDevice implements BlockDevice {
  released = 0;
  readonly contexts: readonly string[];
  readonly size: number;
  readonly readOnly: boolean;
  readonly multiConn: boolean;
  readonly preferredBlock: number;

  constructor(entry: Omit<ExportEntry, 'open'>) {
    this.size = entry.size;
    this.readOnly = entry.readOnly;
    this.multiConn = entry.multiConn;
    this.preferredBlock = entry.preferredBlock;
    this.contexts = entry.contexts;
  }

  readNow(_offset: number, length: number, buffer: Buffer, at: number): number {
    buffer.fill(0, at, at + length);
    return 0;
  }
  writeNow(): number {
    return 0;
  }
  read(request: IoRequest): void {
    request.buffer.fill(0, request.at, request.at + request.length);
    request.complete(0);
  }
  write = done;
  flush = done;
  trim = done;
  zero = done;
  cache = done;
  status(request: StatusRequest): void {
    request.extent(request.length, 0);
    request.complete(0);
  }
  release(): void {
    this.released++;
  }
}

function done(request: IoRequest): void {
  request.complete(0);
}

export interface TestEntry extends ExportEntry {
  /** Devices opened so far. */
  readonly opened: ZeroDevice[];
}

export function entry(name: string, changes: Partial<ExportEntry> = {}): TestEntry {
  const opened: ZeroDevice[] = [];
  const described = {
    name,
    description: '',
    size: 1 << 20,
    readOnly: false,
    contexts: ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:blockferry'],
    preferredBlock: 4096,
    multiConn: true,
    ...changes,
  };
  return {
    opened,
    open() {
      const device = new ZeroDevice(described);
      opened.push(device);
      return device;
    },
    ...described,
  };
}

export function directory(...entries: ExportEntry[]): ExportDirectory & { shuttingDown: boolean } {
  return { list: () => entries, find: (name) => defaultOrNamed(entries, name), shuttingDown: false };
}

/** A handshake and what it sent. */
export class Conversation {
  readonly failures: unknown[] = [];
  readonly handshake: Handshake;
  #sent: Buffer[] = [];

  constructor(exports: ExportDirectory, more: Partial<HandshakeParameters> = {}) {
    this.handshake = new Handshake({
      exports,
      ...more,
      send: (bytes) => this.#sent.push(bytes),
      openFailed: (_entry, error) => this.failures.push(error),
    });
    this.handshake.start();
  }

  /** Past greeting and client flags. */
  static begun(
    exports: ExportDirectory,
    flags?: number,
    tls: TlsMode = 'off',
    more: Partial<HandshakeParameters> = {},
  ): Conversation {
    const conversation = new Conversation(exports, { tls, ...more });
    readGreeting(conversation.sent());
    assert.equal(conversation.push(clientFlags(flags)), undefined);
    return conversation;
  }

  push(...bytes: Buffer[]): HandshakeResult | undefined {
    return this.handshake.push(Buffer.concat(bytes));
  }

  /** Sends one option; the replies to it. */
  ask(number: number, data?: Buffer): Reply[] {
    this.push(option(number, data));
    return readReplies(this.sent());
  }

  /** What was sent since the last call. */
  sent(): Buffer {
    const bytes = Buffer.concat(this.#sent);
    this.#sent = [];
    return bytes;
  }
}
