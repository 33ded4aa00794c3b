/**
 * An NBD server that does what a script says, right or wrong: every way a source can misbehave is a few lines.
 *
 * The script gets a `FakePeer` for each connection and speaks the server's side by hand. It listens on a unix socket in a
 * directory of its own, or over TCP.
 */

import { mkdtemp, rm } from 'node:fs/promises';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import tls from 'node:tls';
import {
  ChunkFlag,
  ChunkType,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_HEADER_BYTES,
  HandshakeFlag,
  Info,
  NBD_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  Option,
  OptionReply,
  REQUEST_HEADER_BYTES,
  SIMPLE_REPLY_MAGIC,
  STRUCTURED_REPLY_MAGIC,
  TransmissionFlag,
} from '../../src/nbd/constants.js';
import { formatNbdUri, type NbdUri } from '../../src/nbd/uri.js';

export interface FakeRequest {
  readonly flags: number;
  readonly command: number;
  readonly cookie: bigint;
  readonly offset: number;
  readonly length: number;
}

export interface FakeExport {
  readonly size?: bigint;
  readonly flags?: number;
  readonly structured?: boolean;
  /** Extended headers are agreed on. Default: false. */
  readonly extended?: boolean;
  readonly description?: string;
  /** Contexts granted, as [id, name]. */
  readonly contexts?: readonly (readonly [number, string])[];
  readonly blockSize?: readonly [number, number, number];
}

export const ALL_FLAGS =
  TransmissionFlag.HAS_FLAGS |
  TransmissionFlag.SEND_FLUSH |
  TransmissionFlag.SEND_FUA |
  TransmissionFlag.SEND_TRIM |
  TransmissionFlag.SEND_WRITE_ZEROES |
  TransmissionFlag.SEND_CACHE;

// Bytes of the server's side

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

export function u64(value: bigint | number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
}

export function greeting(flags: number = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES): Buffer {
  return Buffer.concat([u64(NBD_MAGIC), u64(OPTION_MAGIC), u16(flags)]);
}

export function optionReply(option: number, type: number, payload: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u64(OPTION_REPLY_MAGIC), u32(option), u32(type), u32(payload.length), payload]);
}

export function infoExport(size: bigint, flags: number): Buffer {
  return Buffer.concat([u16(Info.EXPORT), u64(size), u16(flags)]);
}

export function infoDescription(description: string): Buffer {
  return Buffer.concat([u16(Info.DESCRIPTION), Buffer.from(description)]);
}

export function infoBlockSize(minimum: number, preferred: number, maximum: number): Buffer {
  return Buffer.concat([u16(Info.BLOCK_SIZE), u32(minimum), u32(preferred), u32(maximum)]);
}

export function simpleReply(cookie: bigint, errno = 0, payload: Buffer = Buffer.alloc(0)): Buffer {
  return Buffer.concat([u32(SIMPLE_REPLY_MAGIC), u32(errno), u64(cookie), payload]);
}

export function chunk(
  cookie: bigint,
  type: number,
  payload: Buffer,
  { done = false, length = payload.length } = {},
): Buffer {
  const head = [
    u32(STRUCTURED_REPLY_MAGIC),
    u16(done ? ChunkFlag.DONE : 0),
    u16(type),
    u64(cookie),
    u32(length),
  ];
  return Buffer.concat([...head, payload]);
}

export function dataChunk(cookie: bigint, offset: number, data: Buffer, done = false): Buffer {
  return chunk(cookie, ChunkType.OFFSET_DATA, Buffer.concat([u64(offset), data]), { done });
}

export function holeChunk(cookie: bigint, offset: number, length: number, done = false): Buffer {
  return chunk(cookie, ChunkType.OFFSET_HOLE, Buffer.concat([u64(offset), u32(length)]), { done });
}

export function doneChunk(cookie: bigint): Buffer {
  return chunk(cookie, ChunkType.NONE, Buffer.alloc(0), { done: true });
}

export function statusChunk(
  cookie: bigint,
  context: number,
  extents: readonly (readonly [number, number])[],
  done = false,
): Buffer {
  const body = extents.map(([length, flags]) => Buffer.concat([u32(length), u32(flags)]));
  return chunk(cookie, ChunkType.BLOCK_STATUS, Buffer.concat([u32(context), ...body]), { done });
}

export function errorChunk(cookie: bigint, errno: number, message = '', done = true): Buffer {
  const text = Buffer.from(message);
  return chunk(cookie, ChunkType.ERROR, Buffer.concat([u32(errno), u16(text.length), text]), { done });
}

/** A chunk with an extended header; `to` is the request it answers. */
export function extendedChunk(
  to: { readonly cookie: bigint; readonly offset: number | bigint },
  type: number,
  payload: Buffer,
  { done = true, length = BigInt(payload.length) } = {},
): Buffer {
  const head = [
    u32(EXTENDED_REPLY_MAGIC),
    u16(done ? ChunkFlag.DONE : 0),
    u16(type),
    u64(to.cookie),
    u64(to.offset),
    u64(length),
  ];
  return Buffer.concat([...head, payload]);
}

/** One accepted connection, from the server's side. `read` fails once the client has hung up. */
export class FakePeer {
  #received: Buffer = Buffer.alloc(0);
  #ended = false;
  #wake: (() => void) | null = null;
  #extended = false;
  /** The client has hung up. */
  readonly gone: Promise<void>;

  constructor(readonly socket: net.Socket) {
    socket.on('data', (bytes) => {
      this.#received = Buffer.concat([this.#received, bytes]);
      this.#wake?.();
    });
    socket.on('error', () => {});
    this.gone = new Promise((resolve) => {
      socket.on('close', () => {
        this.#ended = true;
        this.#wake?.();
        resolve();
      });
    });
    socket.on('end', () => {
      this.#ended = true;
      this.#wake?.();
    });
  }

  async read(length: number): Promise<Buffer> {
    while (this.#received.length < length) {
      if (this.#ended) throw new Error('the client hung up');
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    const bytes = this.#received.subarray(0, length);
    this.#received = this.#received.subarray(length);
    return bytes;
  }

  send(...parts: Buffer[]): void {
    this.socket.write(Buffer.concat(parts));
  }

  hangUp(): void {
    this.socket.destroySoon();
  }

  /** Over TCP: with a reset, and what was not sent yet is lost. */
  reset(): void {
    this.socket.resetAndDestroy();
  }

  /** Answers STARTTLS with ACK and goes on in TLS. */
  secured(credentials: tls.SecureContextOptions): FakePeer {
    this.send(optionReply(Option.STARTTLS, OptionReply.ACK));
    this.socket.removeAllListeners('data');
    this.socket.removeAllListeners('end');
    const context = tls.createSecureContext(credentials);
    return new FakePeer(new tls.TLSSocket(this.socket, { isServer: true, secureContext: context }));
  }

  async readOption(): Promise<{ option: number; data: Buffer }> {
    const header = await this.read(16);
    return { option: header.readUInt32BE(8), data: await this.read(header.readUInt32BE(12)) };
  }

  /** The handshake, done properly up to GO. */
  async handshake(wish: FakeExport = {}): Promise<void> {
    this.send(greeting());
    await this.read(4);
    await this.options(wish);
  }

  /** The handshake from the first option on. */
  async options(wish: FakeExport = {}): Promise<void> {
    for (;;) {
      const { option } = await this.readOption();
      switch (option) {
        case Option.EXTENDED_HEADERS:
          this.#extended = wish.extended ?? false;
          this.send(optionReply(option, this.#extended ? OptionReply.ACK : OptionReply.ERR_UNSUP));
          break;
        case Option.STRUCTURED_REPLY:
          this.send(optionReply(option, (wish.structured ?? true) ? OptionReply.ACK : OptionReply.ERR_UNSUP));
          break;
        case Option.SET_META_CONTEXT:
          for (const [id, name] of wish.contexts ?? []) {
            this.send(
              optionReply(option, OptionReply.META_CONTEXT, Buffer.concat([u32(id), Buffer.from(name)])),
            );
          }
          this.send(optionReply(option, OptionReply.ACK));
          break;
        case Option.GO:
          this.send(
            optionReply(
              option,
              OptionReply.INFO,
              infoExport(wish.size ?? 1n << 20n, wish.flags ?? ALL_FLAGS),
            ),
          );
          if (wish.description !== undefined)
            this.send(optionReply(option, OptionReply.INFO, infoDescription(wish.description)));
          if (wish.blockSize)
            this.send(optionReply(option, OptionReply.INFO, infoBlockSize(...wish.blockSize)));
          this.send(optionReply(option, OptionReply.ACK));
          return;
        default:
          this.send(optionReply(option, OptionReply.ERR_UNSUP));
      }
    }
  }

  /** The next request; a WRITE's payload is left to `read`. */
  async request(): Promise<FakeRequest> {
    const bytes = await this.read(this.#extended ? EXTENDED_REQUEST_HEADER_BYTES : REQUEST_HEADER_BYTES);
    return {
      flags: bytes.readUInt16BE(4),
      command: bytes.readUInt16BE(6),
      cookie: bytes.readBigUInt64BE(8),
      offset: Number(bytes.readBigUInt64BE(16)),
      length: this.#extended ? Number(bytes.readBigUInt64BE(24)) : bytes.readUInt32BE(24),
    };
  }
}

export interface FakeServer {
  readonly uri: string;
  /** Of its unix socket. */
  readonly path: string;
  /** Hangs up on everybody. */
  cut(): void;
  /** Nobody is let in any more; those who are in stay. */
  deaf(): Promise<void>;
  /** After `deaf`. */
  listen(): Promise<void>;
  /** Stops it. Rejects with what went wrong in the script, other than the client hanging up. */
  stop(): Promise<void>;
}

export async function startFakeServer(
  script: (peer: FakePeer) => Promise<void>,
  { over = 'unix', secure }: { over?: 'unix' | 'tcp'; secure?: NbdUri['tls'] } = {},
): Promise<FakeServer> {
  const directory = await mkdtemp(join(tmpdir(), 'blockferry-fake-'));
  const path = join(directory, 'nbd.sock');
  const peers = new Set<FakePeer>();
  let failure: unknown = null;
  const server = net.createServer((socket) => {
    const peer = new FakePeer(socket);
    peers.add(peer);
    void peer.gone.then(() => peers.delete(peer));
    script(peer).catch((error: unknown) => {
      if (!(error instanceof Error && error.message === 'the client hung up')) failure = error;
    });
  });
  const listen = (): Promise<void> =>
    new Promise((resolve) => {
      if (over === 'unix') server.listen(path, resolve);
      else server.listen(0, '127.0.0.1', resolve);
    });
  await listen();
  const { port } = over === 'tcp' ? (server.address() as net.AddressInfo) : { port: 0 };
  const cut = (): void => {
    for (const peer of peers) peer.socket.destroy();
  };
  return {
    uri: formatNbdUri({
      address: over === 'unix' ? { kind: 'unix', path } : { kind: 'tcp', host: '127.0.0.1', port },
      exportName: '',
      ...(secure === undefined ? {} : { tls: secure }),
    }),
    path,
    cut,
    deaf: async () => void server.close(),
    listen,
    async stop() {
      cut();
      await new Promise((resolve) => server.close(resolve));
      await rm(directory, { recursive: true, force: true });
      if (failure !== null) throw failure;
    },
  };
}
