/**
 * A source, a volume that comes from it, and guests, in one process: everything a relocation meets, at the test's command.
 *
 * The source is a real NBD server over a device in memory, whose requests can be held, failed or counted and whose connections can
 * be cut or refused. The proxy is what a daemon runs. All of it is closed, and its folder removed, when the test ends.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import pino from 'pino';
import { type OpenMode, openVolumeService } from '../../src/host/open.js';
import type { VolumeService } from '../../src/host/service.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import type { Compression } from '../../src/nbd/codec/frames.js';
import { Allocation } from '../../src/nbd/constants.js';
import type { BlockDevice } from '../../src/nbd/device.js';
import type { ExportEntry } from '../../src/nbd/server/exports.js';
import { Listener } from '../../src/nbd/server/listener.js';
import { type Session, startSession } from '../../src/nbd/server/session.js';
import type { BackgroundOrder } from '../../src/relocation/background.js';
import { Link, type LinkOptions } from '../../src/relocation/link.js';
import type { RelocationTiming } from '../../src/relocation/relocation.js';
import { describeVolume } from '../../src/relocation/source-identity.js';
import { hashBlocks } from '../../src/volume/block-hash.js';
import { type Call, MemoryDevice } from '../fakes/memory-device.js';

export const KIB = 1024;
export const MIB = 1024 * KIB;
export const BLOCK = 4096;
/** What a volume that arrives is called by its coordinator. */
export const VOLUME_ID = '6f1c2f6a-0000-4000-8000-000000000001';

/** FERRY_LOG=debug shows what the daemons would log. */
export const log = pino({ level: process.env.FERRY_LOG ?? 'silent' }, pino.destination(2));

/** Waits until `condition` holds; fails with `what` after the deadline. */
export async function until(condition: () => boolean, what: string, deadlineMs = 10_000): Promise<void> {
  const deadline = performance.now() + deadlineMs;
  while (!condition()) {
    if (performance.now() > deadline) assert.fail(`not within ${deadlineMs} ms: ${what}`);
    await delay(2);
  }
}

/** Lets everything that is under way on sockets of this process go as far as it can. */
export async function quiet(turns = 20): Promise<void> {
  for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setImmediate(resolve));
  await delay(5);
}

/** Content that tells block and version apart. */
export function pattern(size: number, version = 1): Buffer {
  const bytes = Buffer.alloc(size);
  for (let at = 0; at < size; at += 16) {
    const text = `${version}:${at.toString(36)}`.padEnd(16, '.').slice(0, Math.min(16, size - at));
    bytes.write(text, at, 'latin1');
  }
  return bytes;
}

export class Lab {
  readonly dir: string;
  readonly #closers: (() => unknown)[] = [];
  #names = 0;

  constructor(test: TestContext) {
    this.dir = mkdtempSync(join(tmpdir(), 'ferry-'));
    test.after(() => this.#close());
  }

  /** Run at the end of the test, last one first. */
  onClose(closer: () => unknown): void {
    this.#closers.push(closer);
  }

  async #close(): Promise<void> {
    const failures: unknown[] = [];
    for (const closer of this.#closers.reverse()) {
      try {
        await closer();
      } catch (error) {
        failures.push(error);
      }
    }
    rmSync(this.dir, { recursive: true, force: true });
    if (failures.length > 0) throw failures[0];
  }

  name(what: string): string {
    return `${what}${++this.#names}`;
  }

  /** A source of `size` bytes, of `pattern` unless `data` is given. */
  async source(size: number, options: { data?: Buffer; multiConn?: boolean } = {}): Promise<Source> {
    const device = new MemoryDevice(size, { multiConn: options.multiConn ?? true });
    (options.data ?? pattern(size)).copy(device.data);
    const source = new Source(join(this.dir, this.name('source')), device);
    await source.start();
    this.onClose(() => source.stop());
    return source;
  }

  link(source: Source | string, options: Partial<LinkOptions> = {}): Link {
    const uri = typeof source === 'string' ? source : source.uri;
    const known = typeof source === 'string' ? { size: MIB, description: null } : factsOf(source);
    const link = new Link({ uri, known, sourceTimeoutMs: null, log, timing: QUICK, ...options });
    this.onClose(() => link.close());
    return link;
  }

  /** As the destination of a move: standby, until the test takes over. */
  arrive(source: Source, options: ProxyOptions = {}): Promise<Ferry> {
    return this.proxy(source, {
      ...options,
      mode: {
        kind: 'arrive',
        sourceUri: source.uri,
        volumeId: VOLUME_ID,
        generation: 1,
        size: source.device.size,
        rateBytesPerSecond: options.rateBytesPerSecond ?? null,
      },
    });
  }

  async proxy(source: Source | string, options: ProxyOptions = {}): Promise<Ferry> {
    const { mode: asked, ...settings } = options;
    const sourceUri = typeof source === 'string' ? source : source.uri;
    const mode: OpenMode = asked ?? {
      kind: 'proxy',
      sourceUri,
      standby: settings.standby ?? false,
      background: settings.background ?? false,
      readAhead: settings.readAhead ?? false,
      order: settings.order ?? 'linear',
      rateBytesPerSecond: settings.rateBytesPerSecond ?? null,
      sourceTimeoutMs: settings.sourceTimeoutMs ?? null,
    };
    const name = settings.name ?? this.name('disk');
    const image = settings.image ?? join(this.dir, `${name}.img`);
    const timing = { ...QUICK, ...settings.timing };
    const service = await openVolumeService({
      stateDir: join(this.dir, 'state'),
      name,
      image,
      mode,
      ...(settings.sourceCompression === undefined ? {} : { sourceCompression: settings.sourceCompression }),
      ...(settings.orderFrom === undefined ? {} : { orderFrom: settings.orderFrom }),
      ...(settings.seeds === undefined
        ? {}
        : { seeds: { images: settings.seeds, folder: join(this.dir, 'seeds') } }),
      log,
      timing,
    });
    const proxy = new Ferry(this, name, image, service);
    await proxy.listen(join(this.dir, this.name('proxy')));
    this.onClose(() => proxy.close());
    return proxy;
  }
}

function factsOf({ device, description }: Source): { size: number; description: string | null } {
  return { size: device.size, description: description === '' ? null : description };
}

/** Impatience that suits a test. */
export const QUICK: Partial<RelocationTiming> = {
  backoffMsMin: 5,
  backoffMsMax: 20,
  spareBackoffMs: 50,
  retryAfterErrorMs: 50,
  hashes: { backoffMsMin: 5, backoffMsMax: 20, giveUpMs: 20, answerTimeoutMs: 600_000 },
};

export interface ProxyOptions {
  name?: string;
  image?: string;
  /** In place of what follows. */
  mode?: OpenMode;
  standby?: boolean;
  background?: boolean;
  readAhead?: boolean;
  order?: BackgroundOrder;
  orderFrom?: string;
  rateBytesPerSecond?: number | null;
  sourceTimeoutMs?: number | null;
  sourceCompression?: Compression;
  seeds?: readonly string[];
  timing?: Partial<RelocationTiming>;
}

/** Serves one device, counts its connections, and can break them. */
class Server {
  #listener: Listener | null = null;
  readonly #sessions = new Set<Session>();
  /** Connections that finished their handshake, ever. */
  accepted = 0;
  description = '';
  /** What its blocks hash to, beside it; null: it has no such export. */
  hashes: BlockDevice | null = null;
  /** What that says of itself; null: what the volume says. */
  hashesDescription: string | null = null;
  /** How often it was asked for. */
  hashesOpened = 0;

  constructor(readonly path: string) {}

  get uri(): string {
    return `nbd+unix:///?socket=${this.path}`;
  }

  /** Connections now. */
  get connections(): number {
    return this.#sessions.size;
  }

  /** `open` gives what a connection is served, `device` what it is told of it before. */
  async serve(device: () => BlockDevice, open = device): Promise<void> {
    const entryOf = (name: string, of: () => BlockDevice, opened = of): ExportEntry => {
      const { size, readOnly, contexts, multiConn } = of();
      const description = (name === 'disk' ? null : this.hashesDescription) ?? this.description;
      return { name, description, size, readOnly, contexts, preferredBlock: 4096, multiConn, open: opened };
    };
    const entry = (): ExportEntry => entryOf('disk', device, open);
    const companion = (): ExportEntry | undefined => {
      const { hashes } = this;
      if (hashes === null) return undefined;
      return entryOf(
        'disk/sha256',
        () => hashes,
        () => {
          this.hashesOpened++;
          return hashes;
        },
      );
    };
    this.#listener = await Listener.open({
      addresses: [{ kind: 'unix', path: this.path }],
      exports: {
        list: () => [entry()],
        find: (name) => (name === '' ? entry() : name === 'disk/sha256' ? companion() : undefined),
        shuttingDown: false,
      },
      startSession: (socket, parameters) => {
        const session = startSession(socket, parameters);
        this.accepted++;
        this.#sessions.add(session);
        void session.closed.then(() => this.#sessions.delete(session));
        return session;
      },
      log,
      compression: true,
      handshakeDrainTimeoutMs: 100,
      sessionDrainTimeoutMs: 100,
    });
  }

  /** Breaks every connection; new ones are let in. */
  cut(): void {
    for (const session of this.#sessions) session.destroy();
  }

  /** Tells clients that it shuts down, answers what is in flight, and is gone. */
  async close(): Promise<void> {
    const listener = this.#listener;
    this.#listener = null;
    await listener?.close();
  }
}

export class Source extends Server {
  /** It is a blockferry's, and tells what its blocks hash to. The device is where that is told. */
  tellHashes(): MemoryDevice {
    const hashes = hashBlocks(this.device.data);
    const device = new MemoryDevice(hashes.length, { multiConn: true });
    device.data.set(hashes);
    this.description = describeVolume(VOLUME_ID, 1);
    this.hashes = device;
    return device;
  }

  /** What the n-th connection (from 0) is served, in place of `device`. */
  deviceOf: ((connection: number) => BlockDevice) | null = null;
  #opened = 0;

  constructor(
    path: string,
    public device: MemoryDevice,
  ) {
    super(path);
  }

  async start(): Promise<void> {
    await this.serve(
      () => this.device,
      () => this.deviceOf?.(this.#opened++) ?? this.device,
    );
  }

  /** Dies: no connection, and none can be made. */
  async stop(): Promise<void> {
    this.device.completeHeld();
    this.cut();
    await this.close();
  }

  /** READs that reached the device. */
  get reads(): Call[] {
    return this.device.calls.filter(({ kind }) => kind === 'read');
  }

  get readBytes(): number {
    return this.reads.reduce((sum, { length }) => sum + length, 0);
  }

  /** How often each block was read. */
  readsPerBlock(): Map<number, number> {
    const counts = new Map<number, number>();
    for (const { offset, length } of this.reads) {
      for (let block = Math.floor(offset / BLOCK); block * BLOCK < offset + length; block++)
        counts.set(block, (counts.get(block) ?? 0) + 1);
    }
    return counts;
  }

  /** READs (of which `which` is true) are not answered until `release`. */
  hold(which: (call: Call) => boolean = () => true): void {
    this.device.manner = (call) => (call.kind === 'read' && which(call) ? 'held' : 'now');
  }

  get held(): number {
    return this.device.held.length;
  }

  /** Answers what is held, and holds no more. */
  release(): void {
    this.device.manner = () => 'now';
    this.device.completeHeld();
  }

  /** `base:allocation` tells runs of zeros, as they are when it is asked, in pieces of `grain` bytes. */
  tellZeroes(grain = BLOCK): void {
    const zeroes = Buffer.alloc(grain);
    this.device.extents = (_context, { offset, length }) => {
      const extents: [number, number][] = [];
      for (let at = offset; at < offset + length; ) {
        const past = Math.min(offset + length, at - (at % grain) + grain);
        const isZero = this.device.data.compare(zeroes, 0, past - at, at, past) === 0;
        extents.push([past - at, isZero ? Allocation.HOLE | Allocation.ZERO : 0]);
        at = past;
      }
      return extents;
    };
  }

  /** READs that touch these blocks fail with `errno`. */
  failBlocks(blocks: readonly number[], errno = 5): void {
    this.device.failure = ({ kind, offset, length }) => {
      const hit = blocks.some((block) => offset < (block + 1) * BLOCK && block * BLOCK < offset + length);
      return kind === 'read' && hit ? errno : 0;
    };
  }
}

export class Ferry {
  #server: Server | null = null;
  readonly #guests: NbdClient[] = [];

  constructor(
    private readonly lab: Lab,
    readonly name: string,
    readonly image: string,
    readonly service: VolumeService,
  ) {}

  get uri(): string {
    return this.#server!.uri;
  }

  /** Guests that are connected. */
  get connections(): number {
    return this.#server!.connections;
  }

  async listen(path: string): Promise<void> {
    this.#server = new Server(path);
    await this.#server.serve(() => this.service.guest);
  }

  async guest(): Promise<NbdClient> {
    const guest = await NbdClient.connect(this.uri, {
      contexts: ['base:allocation', 'qemu:allocation-depth'],
    });
    this.#guests.push(guest);
    return guest;
  }

  get status() {
    return this.service.status();
  }

  /** As a daemon that is told to stop. */
  async close(): Promise<void> {
    for (const guest of this.#guests.splice(0)) guest.destroy();
    await this.#server?.close();
    this.#server = null;
    await this.service.close();
  }

  /** Closed and opened again, from what is on disk. */
  async restart(options: ProxyOptions = {}): Promise<Ferry> {
    await this.close();
    return this.lab.proxy('', { name: this.name, image: this.image, mode: { kind: 'resume' }, ...options });
  }
}

/** Reads [offset, offset + length). */
export async function readAt(guest: NbdClient, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length, 0xee);
  await guest.read(offset, length, buffer, 0);
  return buffer;
}

export async function writeAt(guest: NbdClient, offset: number, bytes: Buffer): Promise<void> {
  await guest.write(offset, bytes, 0, bytes.length);
}

/** Whether a promise is settled by now. */
export async function isSettled(promise: Promise<unknown>): Promise<boolean> {
  const open = Symbol('open');
  return (await Promise.race([promise.catch(() => undefined), quiet(1).then(() => open)])) !== open;
}

/** The NBD errno that a guest's request failed with; fails if it did not. */
export async function errnoOfRequest(request: Promise<unknown>): Promise<number> {
  try {
    await request;
  } catch (error) {
    const { cause } = error as { cause?: { errno?: number } };
    if (cause?.errno !== undefined) return cause.errno;
    throw error;
  }
  return assert.fail('the request succeeded');
}

export function assertBlocks(actual: Buffer, expected: Buffer, what = 'content'): void {
  if (actual.equals(expected)) return;
  for (let at = 0; at < expected.length; at += 16) {
    const is = actual.subarray(at, at + 16);
    const should = expected.subarray(at, at + 16);
    if (!is.equals(should))
      assert.fail(
        `${what}: at ${at} (block ${Math.floor(at / BLOCK)}) there is ${is.toString('latin1')}, not ${should.toString('latin1')}`,
      );
  }
  assert.fail(`${what}: ${actual.length} bytes, not ${expected.length}`);
}
