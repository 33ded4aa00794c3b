/**
 * A standby copies from a source whose guest works, in any order of writes, reads that take their time, rounds, kills and reboots: what is present after
 * the takeover is what the sealed source has. Source and standby are real volumes; what is between them is the test.
 */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import fc from 'fast-check';
import { DIRTY } from '../../src/nbd/constants.js';
import { type ChangesSource, changesOf, lastChangesOf } from '../../src/relocation/pre-copy.js';
import { BLOCK_BYTES, blocksOf, bytesOfBlocks } from '../../src/volume/blocks.js';
import { GuestDevice, LinkDevice } from '../../src/volume/faces.js';
import type { SourceChanges, Volume } from '../../src/volume/volume.js';
import { Io, patterned, until } from '../support/volume.js';
import {
  afterKill,
  afterReboot,
  host,
  plainVolume,
  proxiedVolume,
  reopened,
  SIZE,
} from '../support/volumes.js';

const MOVE = 'move-1';
const RUNS = Number(process.env.BLOCKFERRY_PRE_COPY_RUNS ?? 60);
const BLOCKS = blocksOf(SIZE);

type Step = readonly [
  kind:
    | 'write'
    | 'zero'
    | 'trim'
    | 'let'
    | 'ask'
    | 'read'
    | 'fill'
    | 'fill later'
    | 'cut'
    | 'cut again'
    | 'list'
    | 'refresh'
    | 'copy'
    | 'round'
    | 'kill source'
    | 'restart source'
    | 'kill standby'
    | 'reboot standby'
    | 'restart standby',
  a: number,
  b: number,
];

const step: fc.Arbitrary<Step> = fc.tuple(
  fc.oneof(
    { weight: 4, arbitrary: fc.constant('write' as const) },
    { weight: 8, arbitrary: fc.constant('copy' as const) },
    { weight: 4, arbitrary: fc.constant('round' as const) },
    { weight: 3, arbitrary: fc.constantFrom('zero' as const, 'trim' as const) },
    { weight: 3, arbitrary: fc.constant('let' as const) },
    { weight: 5, arbitrary: fc.constant('ask' as const) },
    { weight: 5, arbitrary: fc.constant('read' as const) },
    { weight: 5, arbitrary: fc.constantFrom('fill' as const, 'fill later' as const) },
    { weight: 5, arbitrary: fc.constantFrom('cut' as const, 'list' as const, 'refresh' as const) },
    { weight: 1, arbitrary: fc.constantFrom('cut again' as const, 'kill source' as const) },
    { weight: 1, arbitrary: fc.constantFrom('restart source' as const, 'restart standby' as const) },
    { weight: 1, arbitrary: fc.constantFrom('kill standby' as const, 'reboot standby' as const) },
  ),
  fc.nat(0xffff),
  fc.nat(0xffff),
);

/** A read on its way from the source to the standby. */
interface Fetch {
  readonly epoch: number;
  readonly first: number;
  readonly end: number;
  data: Buffer | null;
}

class World {
  source!: Volume;
  standby!: Volume;
  #sourceRoot = host();
  #standbyRoot = host();
  #fetches: Fetch[] = [];
  /** Changes that threads make when they are let to, and those that they made and have not told of. */
  #begun: (() => void)[] = [];
  #made: (() => void)[] = [];
  #running: Promise<unknown>[] = [];
  #cut: { from: number; to: number } | null = null;
  #changes: SourceChanges | null = null;

  async open(home: boolean): Promise<void> {
    this.source = this.#slow(await plainVolume(this.#sourceRoot));
    const { cookie } = await this.source.track(MOVE, null);
    this.standby = await proxiedVolume(this.#standbyRoot, {
      preCopy: { context: DIRTY, cookie, fills: true },
    });
    if (home) {
      // As if its image were what the source's was when tracking began.
      const { store } = this.standby;
      const content = readFileSync(this.source.store.image.path);
      assert.equal(store.fill(store.epoch, 0, BLOCKS, content, 0), 0);
    }
  }

  /** What a thread does waits for `let` before and behind it. */
  #slow(volume: Volume): Volume {
    const { image } = volume.store;
    const held = <Result>(act: () => Promise<Result>): Promise<Result> => {
      const wait = (list: (() => void)[]): Promise<void> => new Promise((resolve) => list.push(resolve));
      const [begun, made] = [this.#begun, this.#made];
      return wait(begun)
        .then(act)
        .then(async (result) => {
          await wait(made);
          return result;
        });
    };
    const [zero, punch] = [image.zero.bind(image), image.punch.bind(image)];
    image.zero = (...words) => held(() => zero(...words));
    image.punch = (...words) => held(() => punch(...words));
    return volume;
  }

  async #let(): Promise<void> {
    const next = this.#made.shift() ?? this.#begun.shift();
    if (next === undefined) return;
    next();
    await new Promise((resolve) => setImmediate(resolve));
  }

  async letAll(): Promise<void> {
    const over = Promise.all(this.#running).then(() => true);
    let done = false;
    void over.then(() => {
      done = true;
    });
    await until(() => {
      for (const next of [...this.#begun.splice(0), ...this.#made.splice(0)]) next();
      return done;
    }, 'changes by threads');
    this.#running = [];
  }

  /** Killed: what threads were about to do may still happen, and nobody tells of it. */
  async #killSource(happens: boolean): Promise<void> {
    const [begun, made] = [this.#begun, this.#made];
    if (happens && begun.length > 0) {
      const due = begun.length + made.length;
      await until(() => {
        for (const next of begun.splice(0)) next(); // to zero may begin to punch
        return made.length >= due;
      }, 'what threads had begun');
    }
    this.#sourceRoot = afterKill(this.#sourceRoot);
    await this.letAll(); // in the place that was left behind
    this.source = this.#slow(await reopened(this.#sourceRoot));
  }

  readonly #asked: ChangesSource = {
    dirty: async (context, offset, length) => {
      const request = Io.status(context, offset, Math.min(length, 3 * BLOCK_BYTES));
      new LinkDevice(this.source).status(request);
      assert.equal(await request.done, 0);
      return request.extents.map(([bytes, flags]) => ({ length: bytes, flags }));
    },
  };

  async list(sealed: boolean): Promise<SourceChanges> {
    const question = { size: SIZE, context: DIRTY, sealed };
    if (!sealed) return changesOf(this.#asked, question);
    return lastChangesOf(this.#asked, question, this.standby.preCopy!.cookie);
  }

  async take([kind, a, b]: Step): Promise<void> {
    const first = a % BLOCKS;
    const end = Math.min(BLOCKS, first + 1 + (b % 4));
    const offset = first * BLOCK_BYTES;
    const bytes = bytesOfBlocks(first, end, SIZE);
    switch (kind) {
      case 'write': {
        const at = Math.min(SIZE - 1, offset + (b & 1) * 100);
        const length = Math.min(SIZE - at, 1 + (b % 9000));
        const request = Io.write(at, patterned(length, a ^ b));
        new GuestDevice(this.source).write(request);
        this.#running.push(request.done);
        return;
      }
      case 'zero':
      case 'trim': {
        const request = new Io(offset, bytes);
        new GuestDevice(this.source)[kind](request);
        this.#running.push(request.done);
        return;
      }
      case 'let':
        return this.#let();
      case 'ask': {
        const { presence, epoch } = this.standby.store;
        const missing = presence!.nextMissing(first, BLOCKS);
        const busy = this.#fetches.some((other) => other.first < end && missing < other.end);
        if (missing < end && !busy) this.#fetches.push({ epoch, first: missing, end, data: null });
        return;
      }
      case 'read': {
        const unread = this.#fetches.find((other) => other.data === null);
        if (unread === undefined) return;
        const request = new Io(unread.first * BLOCK_BYTES, bytesOfBlocks(unread.first, unread.end, SIZE));
        new LinkDevice(this.source).read(request);
        assert.equal(await request.done, 0);
        unread.data = Buffer.from(request.payload);
        return;
      }
      case 'fill':
      case 'fill later': {
        const arrived = this.#fetches.filter((other) => other.data !== null);
        const fetch = arrived[a % Math.max(1, arrived.length)];
        if (fetch === undefined || fetch.data === null) return;
        this.#fetches.splice(this.#fetches.indexOf(fetch), 1);
        const words = [fetch.epoch, fetch.first, fetch.end, fetch.data, 0] as const;
        const { store } = this.standby;
        assert.equal(kind === 'fill' ? store.fill(...words) : await store.fillLater(...words), 0);
        return;
      }
      case 'cut': {
        const from = this.standby.preCopy!.cookie!;
        const { cookie: to } = await this.source.cut(MOVE, from);
        this.#cut = { from, to };
        return;
      }
      case 'cut again':
        if (this.#cut !== null && this.#cut.to === this.source.store.dirty?.cookie)
          assert.equal((await this.source.cut(MOVE, this.#cut.from)).cookie, this.#cut.to);
        return;
      case 'list':
        this.#changes = await this.list(false);
        return;
      case 'refresh': {
        // As Relocation.refresh: the list must be of the round that the coordinator names.
        const [cut, changes] = [this.#cut, this.#changes];
        if (cut === null || changes === null || changes.cookie !== cut.to) return;
        if (this.standby.preCopy!.cookie !== cut.from && this.standby.preCopy!.cookie !== cut.to) return;
        await this.standby.refresh(cut.from, changes);
        return;
      }
      case 'kill source':
        return this.#killSource((a & 1) === 1);
      case 'copy':
        for (const kind of ['ask', 'read', 'fill'] as const) await this.take([kind, a, b]);
        return;
      case 'round':
        for (const kind of ['cut', 'list', 'refresh'] as const) await this.take([kind, a, b]);
        return;
      case 'restart source':
        await this.letAll();
        await this.source.close();
        this.source = this.#slow(await reopened(this.#sourceRoot));
        return;
      case 'kill standby':
      case 'reboot standby':
        this.#fetches = [];
        this.#standbyRoot = (kind === 'kill standby' ? afterKill : afterReboot)(this.#standbyRoot);
        this.standby = await reopened(this.#standbyRoot);
        return;
      case 'restart standby':
        this.#fetches = [];
        await this.standby.close();
        this.standby = await reopened(this.#standbyRoot);
        return;
    }
  }

  /** Seals, takes over, and compares what is present. Also what a loss of power right behind it leaves. */
  async end(orderly: boolean): Promise<number> {
    await this.letAll();
    // A coordinator ends the round that it began.
    const round = this.source.store.dirty?.cookie ?? 0;
    if (orderly && this.#cut?.to === round)
      for (const kind of ['list', 'refresh'] as const) await this.take([kind, 0, 0]);
    await this.source.seal(5);
    this.standby.askChanges = () => this.list(true);
    await this.standby.takeover(5);
    for (const fetch of this.#fetches)
      if (fetch.data !== null) this.standby.store.fill(fetch.epoch, fetch.first, fetch.end, fetch.data, 0);
    const present = this.#compare(this.standby);
    this.#compare(await reopened(afterReboot(this.#standbyRoot)));
    return present;
  }

  #compare({ store }: Volume): number {
    const source = readFileSync(this.source.store.image.path);
    const here = readFileSync(store.image.path);
    const { presence } = store;
    let present = 0;
    for (let block = 0; block < BLOCKS; block++) {
      if (presence !== null && !presence.has(block)) continue;
      present++;
      const [from, to] = [block * BLOCK_BYTES, Math.min(SIZE, (block + 1) * BLOCK_BYTES)];
      assert.ok(here.subarray(from, to).equals(source.subarray(from, to)), `block ${block} is stale`);
    }
    return present;
  }

  async close(): Promise<void> {
    await this.letAll().catch(() => undefined);
    await this.source.close();
    await this.standby.close();
  }
}

for (const home of [false, true]) {
  test(`what is present after the takeover is what the source has${home ? ', all from the beginning' : ''}`, async () => {
    let present = 0;
    let all = 0;
    await fc.assert(
      fc.asyncProperty(
        fc.array(step, { minLength: 10, maxLength: 80, size: 'max' }),
        fc.nat(9),
        async (steps, chance) => {
          const world = new World();
          await world.open(home);
          try {
            for (const next of steps) await world.take(next);
            present += await world.end(chance > 0);
            all += BLOCKS;
          } finally {
            await world.close();
          }
        },
      ),
      { numRuns: RUNS, endOnFailure: true },
    );
    assert.ok(present > all / 20, `next to nothing was ever present: ${present} of ${all}`);
  });
}
