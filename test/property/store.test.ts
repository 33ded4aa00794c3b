/**
 * A relocating volume under any mixture of guest requests, fetches that arrive late, twice or for a takeover long retreated from,
 * threads that take their time, takeovers, retreats, kills: every read returns what a disk may return, and in the end all is here. And
 * the changes in the order in which the store tells of them, as a transaction log has them, make of the source what the image is.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { test } from 'node:test';
import fc from 'fast-check';
import { Errno } from '../../src/nbd/constants.js';
import { LATER } from '../../src/nbd/device.js';
import { GuestDevice } from '../../src/volume/faces.js';
import type { Supplier } from '../../src/volume/store.js';
import type { Volume } from '../../src/volume/volume.js';
import { DiskModel } from '../support/store-model.js';
import { Io, patterned, tempFolder, turns, until } from '../support/volume.js';
import { afterKill, proxiedVolume, reopened, SIZE } from '../support/volumes.js';

const B = 4096;
const BLOCKS = Math.ceil(SIZE / B);
const PARENT = existsSync('/dev/shm') ? '/dev/shm' : undefined;

type Range = readonly [offset: number, length: number];
type Action =
  | { do: 'read' | 'zero' | 'trim' | 'cache'; range: Range }
  | { do: 'write'; range: Range; seed: number; fua: boolean }
  | { do: 'fetch'; blocks: Range }
  | { do: 'deliver'; which: number; again: boolean }
  | { do: 'give up' | 'release' | 'abandon'; which: number }
  | { do: 'hold'; threads: boolean; cold: boolean }
  | { do: 'wait'; turns: number }
  | { do: 'flush' | 'held up' | 'retreat' | 'takeover' | 'hand off' | 'kill' };

interface Fetch {
  blocks: Range;
  epoch: number;
  content: Buffer;
}

/** A version of the source: three blocks of it are zeros, which ones changes from version to version. */
function sourceOf(version: number): Buffer {
  const at = version % 3;
  return patterned(SIZE, 1000 + version)
    .fill(0, at * B, (at + 2) * B)
    .fill(0, (6 - at) * B, (7 - at) * B);
}

class World implements Supplier {
  readonly #model = new DiskModel(SIZE);
  readonly #guest: GuestDevice;
  /** What the source holds; it goes on changing while the volume is in standby. */
  #content: Buffer;
  #version = 1;
  #fetches: Fetch[] = [];
  #through: Io[] = [];
  #pending: Io[] = [];
  #held: (() => Promise<void>)[] = [];
  #filling: Promise<number>[] = [];
  #holds = false;
  /** Between a retreat's begin and the next takeover's end the content is one change of the whole disk. */
  #moving: ReturnType<DiskModel['begin']> | null;
  /** What the disk was at the last takeover, and what changed since, in order; without content: to zeros. */
  #base: Buffer | null = null;
  #changes: { offset: number; length: number; content: Buffer | null }[] = [];

  constructor(
    readonly root: string,
    readonly volume: Volume,
  ) {
    this.#content = sourceOf(1);
    this.#moving = this.#model.begin(0, SIZE, this.#content);
    this.#guest = new GuestDevice(volume);
    volume.store.supplier = this;
    for (const method of ['zero', 'punch', 'read', 'writeLater'] as const) this.#makeSlow(method);
  }

  #makeSlow(method: 'zero' | 'punch' | 'read' | 'writeLater'): void {
    const image = this.volume.store.image as unknown as Record<
      string,
      (...args: unknown[]) => Promise<unknown>
    >;
    const real = image[method]!.bind(image);
    image[method] = (...args) => {
      if (!this.#holds) return real(...args);
      return new Promise((resolve) => {
        this.#held.push(async () => resolve(await real(...args)));
      });
    };
  }

  demand(first: number, end: number): void {
    assert.ok(first >= 0 && first < end && end <= BLOCKS);
    this.#fetch(first, end);
  }

  prefetch(first: number, end: number): void {
    this.#fetch(first, end);
  }

  dropAbandoned(): void {}

  readThrough(request: Io): void {
    this.#through.push(request);
  }

  #fetch(first: number, end: number): void {
    const { epoch } = this.volume.store;
    this.#fetches.push({ blocks: [first, end], epoch, content: this.#content });
  }

  async act(action: Action): Promise<void> {
    switch (action.do) {
      case 'read':
        return this.#read(action.range);
      case 'write':
        return this.#write(action.range, action.seed, action.fua);
      case 'zero':
        return this.#change(new Io(...action.range), 'zero', false);
      case 'trim':
        return this.#change(new Io(...action.range), 'trim', true);
      case 'cache':
        return this.#guest.cache(new Io(...action.range));
      case 'flush':
        return this.#track(new Io(0, 0), (request) => this.#guest.flush(request));
      case 'held up':
        return this.#guest.directWriteHeldUp();
      case 'fetch':
        return this.#fetch(...action.blocks);
      case 'deliver':
        return this.#deliver(action.which, action.again);
      case 'give up': {
        const fetch = pick(this.#fetches, action.which);
        if (fetch !== undefined) this.volume.store.giveUp(...fetch.blocks, Errno.EIO);
        return;
      }
      case 'abandon': {
        const request = pick(this.#pending, action.which);
        if (request !== undefined) request.abandoned = true;
        return;
      }
      case 'release':
        return this.#release(action.which);
      case 'hold': {
        this.#holds = action.threads;
        if (action.cold) this.volume.store.image.readNow = () => -11;
        else Reflect.deleteProperty(this.volume.store.image, 'readNow');
        return;
      }
      case 'wait':
        return turns(action.turns);
      case 'retreat':
        return this.#retreat();
      case 'takeover':
        return this.#takeover();
      case 'hand off':
        return void (await this.volume.handOff());
      case 'kill':
        return this.#kill();
    }
  }

  #track(request: Io, start: (request: Io) => void, answered: (errno: number) => void = () => {}): void {
    const complete = request.complete.bind(request);
    request.complete = (errno) => {
      complete(errno);
      this.#pending.splice(this.#pending.indexOf(request), 1);
      answered(errno);
    };
    this.#pending.push(request);
    start(request);
  }

  #read(range: Range): void {
    const start = this.#model.now();
    const local = this.volume.phase !== 'standby';
    const check = (content: Buffer): void => {
      if (local) this.#model.check(start, range[0], content, `read of ${range}`);
    };
    const now = Buffer.alloc(range[1]);
    const done = this.#guest.readNow(range[0], range[1], now, 0);
    if (done !== LATER) {
      assert.equal(done, Errno.OK);
      check(now);
      return;
    }
    const request = new Io(...range);
    this.#track(
      request,
      (read) => this.#guest.read(read),
      (errno) => errno === Errno.OK && check(request.payload),
    );
  }

  #write(range: Range, seed: number, fua: boolean): void {
    const request = new Io(...range, fua ? 1 : 0, patterned(range[1], seed));
    if (!fua) {
      const change = this.#model.begin(request.offset, request.length, request.payload);
      const tried = { offset: request.offset, length: request.length, content: request.payload };
      this.#changes.push(tried);
      const done = this.#guest.writeNow(request.offset, request.length, request.buffer, request.at);
      if (done === Errno.OK) this.#model.done(change);
      else {
        this.#model.refused(change);
        assert.equal(this.#changes.pop(), tried, 'nothing happens in a write that does not');
      }
      assert.ok([Errno.OK, Errno.EPERM, LATER].includes(done));
      if (done !== LATER) return;
    }
    this.#change(request, 'write', false);
  }

  #change(request: Io, kind: 'write' | 'zero' | 'trim', optional: boolean): void {
    const { offset, length } = request;
    const change = this.#model.begin(offset, length, kind === 'write' ? request.payload : null, optional);
    const changed = request.changed.bind(request);
    request.changed = (from, bytes) => {
      changed(from, bytes);
      this.#changes.push({ offset: from, length: bytes, content: kind === 'write' ? request.payload : null });
    };
    this.#track(
      request,
      () => this.#guest[kind](request),
      (errno) => {
        if (errno === Errno.OK) this.#model.done(change);
        else if (errno === Errno.EPERM) this.#model.refused(change);
        else this.#model.failed(change);
      },
    );
  }

  #deliver(which: number, again: boolean): void {
    const fetch = pick(this.#fetches, which);
    if (fetch === undefined) return;
    if (!again) this.#fetches.splice(this.#fetches.indexOf(fetch), 1);
    const [first, end] = fetch.blocks;
    const data = fetch.content.subarray(first * B, end * B);
    if (data.every((byte) => byte === 0))
      this.#filling.push(this.volume.store.fillZeroes(fetch.epoch, first, end));
    else assert.equal(this.volume.store.fill(fetch.epoch, first, end, Buffer.from(data), 0), Errno.OK);
  }

  async #release(which: number): Promise<void> {
    const held = pick(this.#held, which);
    if (held === undefined) return;
    this.#held.splice(this.#held.indexOf(held), 1);
    await held();
  }

  async #retreat(): Promise<void> {
    if (this.volume.phase !== 'relocating' || this.#moving !== null) return;
    const content = sourceOf(++this.#version);
    const moving = this.#model.begin(0, SIZE, content);
    try {
      await this.volume.retreat();
    } catch {
      return this.#model.refused(moving);
    }
    assert.equal(this.volume.store.presence?.present, 0);
    this.#content = content;
    this.#moving = moving;
  }

  async #takeover(): Promise<void> {
    if (this.volume.phase !== 'standby') return;
    await this.volume.takeover();
    this.#model.done(this.#moving!);
    this.#moving = null;
    this.#base = Buffer.from(this.#content);
    this.#changes = [];
    // What was read ahead of the takeover is answered with what the source held by then.
    for (const request of this.#through.splice(0)) {
      this.#content.copy(request.buffer, request.at, request.offset, request.offset + request.length);
      request.complete(Errno.OK);
    }
  }

  /** What holds at every moment: the count of blocks, and that each block that is here is right on disk. */
  check(volume = this.volume, start = this.#model.now()): void {
    const { presence, image } = volume.store;
    if (presence === null || this.#moving !== null) return;
    const onDisk = readFileSync(image.path);
    let present = 0;
    for (let block = 0; block < BLOCKS; block++) {
      if (!presence.has(block)) continue;
      present++;
      const content = onDisk.subarray(block * B, (block + 1) * B);
      this.#model.check(start, block * B, content, `block ${block} on disk`);
    }
    assert.equal(presence.present, present);
  }

  async #kill(): Promise<void> {
    const start = this.#model.now();
    const present = this.volume.store.presence?.present;
    const again = await reopened(afterKill(this.root));
    this.check(again, start);
    assert.equal(again.store.presence?.present, present);
    await again.close();
  }

  #played(): Buffer {
    const disk = this.#base!;
    for (const { offset, length, content } of this.#changes) {
      if (content === null) disk.fill(0, offset, offset + length);
      else content.copy(disk, offset);
    }
    return disk;
  }

  /** Everything that is under way comes to its end, the last block arrives, and the volume is handed off. */
  async finish(): Promise<void> {
    this.#holds = false;
    while (this.#held.length > 0) await this.#release(0);
    if (this.volume.phase === 'standby') await this.#takeover();
    await until(() => {
      for (let i = this.#fetches.length; i > 0; i--) this.#deliver(0, false);
      while (this.#held.length > 0) void this.#release(0);
      return this.#pending.length === 0;
    }, `${this.#pending.length} requests are answered`);
    for (const errno of await Promise.all(this.#filling)) assert.equal(errno, Errno.OK);
    await this.volume.settle();
    this.#fetch(0, BLOCKS);
    this.#deliver(this.#fetches.length - 1, false);
    assert.equal(await this.volume.handOff(), true);
    const start = this.#model.now();
    const image = readFileSync(this.volume.store.image.path);
    this.#model.check(start, 0, image, 'in the end');
    assert.ok(this.#played().equals(image), 'the changes in order make the image');
    await this.volume.close();
  }
}

function pick<T>(from: T[], which: number): T | undefined {
  return from[which % Math.max(from.length, 1)];
}

// Ranges that begin and end at, just before and just behind the bounds of sectors and blocks.
const nearBound = fc
  .tuple(fc.constantFrom(512, B, B, B), fc.nat(SIZE / 512), fc.constantFrom(-1, 0, 0, 0, 0, 0, 1))
  .map(([unit, at, aside]) => Math.min(Math.max(unit * at + aside, 0), SIZE));
const range = fc
  .tuple(nearBound, nearBound)
  .map(([a, b]): Range => [Math.min(a, b, SIZE - 1), Math.max(Math.abs(a - b), 1)]);
const blocks = fc
  .tuple(fc.nat(BLOCKS - 1), fc.integer({ min: 1, max: BLOCKS }))
  .map(([first, count]): Range => [first, Math.min(first + count, BLOCKS)]);
const which = fc.nat(20);

const guest = fc.oneof(
  fc.record({
    do: fc.constantFrom('read' as const, 'read' as const, 'zero' as const, 'trim' as const),
    range,
  }),
  fc.record({
    do: fc.constant('write' as const),
    range,
    seed: fc.integer({ min: 1, max: 999 }),
    fua: fc.boolean(),
  }),
  fc.record({ do: fc.constant('cache' as const), range }),
);
const arrivals = fc.oneof(
  fc.record({ do: fc.constant('fetch' as const), blocks }),
  fc.record({ do: fc.constant('deliver' as const), which, again: fc.boolean() }),
  fc.record({ do: fc.constant('deliver' as const), which, again: fc.boolean() }),
  fc.record({ do: fc.constant('release' as const), which }),
  fc.record({ do: fc.constant('hold' as const), threads: fc.boolean(), cold: fc.boolean() }),
  fc.record({ do: fc.constant('wait' as const), turns: fc.integer({ min: 1, max: 3 }) }),
);
const rare = fc.oneof(
  fc.record({ do: fc.constantFrom('flush' as const, 'held up' as const, 'hand off' as const) }),
  fc.record({ do: fc.constantFrom('give up' as const, 'abandon' as const), which }),
);
const moves: fc.Arbitrary<Action> = fc.record({
  do: fc.constantFrom('retreat' as const, 'takeover' as const),
});
const reads: fc.Arbitrary<Action> = fc.record({
  do: fc.constantFrom('read' as const, 'cache' as const),
  range,
});

async function live(actions: readonly Action[], settled: boolean): Promise<void> {
  const root = tempFolder(PARENT);
  const volume = await proxiedVolume(root);
  // The image is not empty, as after a retreat: what is zeros at the source has to be made so by a thread.
  writeFileSync(volume.store.image.path, patterned(SIZE, 500), { flag: 'r+' });
  const world = new World(root, volume);
  try {
    await world.act({ do: 'takeover' });
    if (settled) await volume.settle();
    for (const action of actions) {
      await world.act(action);
      world.check();
    }
    await world.finish();
  } finally {
    await volume.close().catch(() => undefined);
  }
}

const any: fc.Arbitrary<Action> = fc.oneof(
  { weight: 5, arbitrary: guest as fc.Arbitrary<Action> },
  { weight: 6, arbitrary: arrivals as fc.Arbitrary<Action> },
  { weight: 1, arbitrary: rare as fc.Arbitrary<Action> },
);

test('a guest at work while the blocks arrive', async () => {
  await fc.assert(fc.asyncProperty(fc.array(any, { minLength: 5, maxLength: 60 }), fc.boolean(), live), {
    numRuns: 250,
  });
});

test('takeovers and retreats, then a guest at work', async () => {
  const before: fc.Arbitrary<Action> = fc.oneof(moves, reads, arrivals as fc.Arbitrary<Action>);
  const life = fc
    .tuple(fc.array(before, { maxLength: 40 }), fc.array(fc.oneof(any, moves), { maxLength: 25 }))
    .map(([first, then]): Action[] => [...first, ...then]);
  await fc.assert(fc.asyncProperty(life, fc.constant(false), live), { numRuns: 200 });
});

test('killed and opened again', async () => {
  const life = fc
    .tuple(fc.array(any, { maxLength: 30 }), fc.array(any, { maxLength: 10 }))
    .map(([first, then]): Action[] => [...first, { do: 'kill' }, ...then]);
  await fc.assert(fc.asyncProperty(life, fc.boolean(), live), { numRuns: 25 });
});
