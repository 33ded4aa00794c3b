/**
 * A source in this process: a pattern that is different everywhere and nowhere zero, answered after a random delay. It sees
 * which blocks are asked for, and may fail.
 */
import { rmSync } from 'node:fs';
import { pino } from 'pino';
import { parseListenAddress } from '../../../src/nbd/address.js';
import { BASE_ALLOCATION, Errno } from '../../../src/nbd/constants.js';
import { type BlockDevice, type IoRequest, LATER, type StatusRequest } from '../../../src/nbd/device.js';
import { Listener } from '../../../src/nbd/server/listener.js';
import { startSession } from '../../../src/nbd/server/session.js';
import { blockAt, blocksOf } from '../../../src/volume/blocks.js';

export class Source {
  /** Delay of the next answer, ms; 0: a turn of the loop. */
  delayMs: () => number = () => 0;
  /** Errno of the next answer. */
  errno: () => number = () => Errno.OK;
  /** Told of a new connection; gives who is told of its reads: blocks [first, end). */
  onConnection: () => (first: number, end: number) => void = () => () => undefined;
  reads = 0;

  constructor(
    readonly content: Buffer,
    /** Ranges that are all zero, said to be so. */
    readonly zeroes: readonly { offset: number; length: number }[] = [],
  ) {
    for (const { offset, length } of zeroes) content.fill(0, offset, offset + length);
  }
}

/** The source as one connection sees it. */
class SourceDevice implements BlockDevice {
  readonly readOnly = true;
  readonly multiConn = true;
  readonly preferredBlock = 4096;
  readonly contexts = [BASE_ALLOCATION];
  readonly #onRead: (first: number, end: number) => void;

  constructor(private readonly source: Source) {
    this.#onRead = source.onConnection();
  }

  get size(): number {
    return this.source.content.length;
  }

  readNow(): number {
    return LATER;
  }

  writeNow(): number {
    return Errno.EPERM;
  }

  read(request: IoRequest): void {
    this.source.reads++;
    this.#onRead(blockAt(request.offset), blocksOf(request.offset + request.length));
    const delayMs = this.source.delayMs();
    if (delayMs === 0) setImmediate(() => this.#answer(request));
    else setTimeout(() => this.#answer(request), delayMs);
  }

  #answer(request: IoRequest): void {
    const errno = this.source.errno();
    if (errno === Errno.OK)
      this.source.content.copy(request.buffer, request.at, request.offset, request.offset + request.length);
    request.complete(errno);
  }

  status(request: StatusRequest): void {
    const past = request.offset + request.length;
    let at = request.offset;
    for (const zero of this.source.zeroes) {
      if (zero.offset + zero.length <= at || zero.offset >= past) continue;
      if (zero.offset > at) request.extent(zero.offset - at, 0);
      at = Math.max(at, zero.offset);
      const stop = Math.min(zero.offset + zero.length, past);
      request.extent(stop - at, 3);
      at = stop;
    }
    if (at < past) request.extent(past - at, 0);
    request.complete(Errno.OK);
  }

  write(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }

  trim(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }

  zero(request: IoRequest): void {
    request.complete(Errno.EPERM);
  }

  flush(request: IoRequest): void {
    request.complete(Errno.OK);
  }

  cache(request: IoRequest): void {
    request.complete(Errno.OK);
  }

  release(): void {}
}

export interface RunningSource {
  readonly uri: string;
  close(): Promise<void>;
}

/** Serves `source` at a unix socket. */
export async function serveSource(source: Source, socket: string): Promise<RunningSource> {
  const entry = {
    name: 'source',
    description: '',
    size: source.content.length,
    readOnly: true,
    contexts: [BASE_ALLOCATION],
    preferredBlock: 4096,
    multiConn: true,
    open: () => new SourceDevice(source),
  };
  const listener = await Listener.open({
    addresses: [parseListenAddress(`unix:${socket}`)],
    exports: { list: () => [entry], find: () => entry, shuttingDown: false },
    startSession,
    log: pino({ enabled: false }),
    sessionDrainTimeoutMs: 100,
  });
  return {
    uri: `nbd+unix:///source?socket=${socket}`,
    async close() {
      await listener.close();
      rmSync(socket, { force: true });
    },
  };
}
