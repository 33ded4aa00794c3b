/**
 * A proxy under a guest that works all the time, and every bad source of the list. Whatever the source does: what the guest reads is
 * right, what is here goes on, nothing of a lie is kept, `status` says what is wrong, waits end with the source timeout if there is
 * one, memory stays small, and a good source that comes back makes everything go on.
 *
 * The proxies run in processes of their own, several fakes one after the other in each.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from '../../src/nbd/client/client.js';
import { Errno } from '../../src/nbd/constants.js';
import { ChildDaemon } from '../lab/crash/daemon.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  isSettled,
  KIB,
  MIB,
  pattern,
  readAt,
  writeAt,
} from '../lab/ferry.js';
import { makePki, type Pki } from '../support/pki.js';
import { BAD_SOURCES } from './bad-sources.js';
import { type BadSource, FakeSource } from './fake-source.js';

/** They wait more than they work. */
const LANES = 8;
const POLL_MS = 10;
const SIZE = 516 * KIB;
const BLOCKS = SIZE / BLOCK;
const DATA = pattern(SIZE);
/** What the guest writes, in turn. */
const WRITTEN = Array.from({ length: 13 }, (_, version) => pattern(SIZE, 2 + version));
/** Of a whole proxy process; half of it is Node. */
const RESIDENT_BYTES_MAX = 200 * MIB;
const DEADLINE_MS = 10_000;
const SOURCE_TIMEOUT_MS = 150;
/** A connection that hangs is given up after its own limits, and then the source timeout runs. */
const EIO_WITHIN_MS = 3_000;

const IMPATIENT = {
  backoffMsMin: 5,
  backoffMsMax: 40,
  spareBackoffMs: 50,
  connectTimeoutMs: 250,
  requestTimeoutMs: 200,
  retryAfterErrorMs: 50,
};

let pki: Pki;
const lanes: ChildDaemon[] = [];
before(() => {
  pki = makePki();
});
after(async () => {
  pki.remove();
  await Promise.all(lanes.map((lane) => lane.stop()));
});

/** Fails with `what` unless `done` settles in time. */
async function inTime<T>(what: string, done: Promise<T>, ms = DEADLINE_MS): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not within ${ms} ms: ${what}`)), ms);
  });
  return Promise.race([done, late]).finally(() => clearTimeout(timer));
}

/** One proxy, its source, and the guest with what it knows of its disk. */
class Scene {
  readonly model = Buffer.from(DATA);
  readonly #folder = mkdtempSync(join(tmpdir(), 'fakes-'));
  readonly #image = join(this.#folder, 'disk.img');
  #version = 0;
  source!: FakeSource;
  guest!: NbdClient;

  constructor(
    readonly child: ChildDaemon,
    readonly bad: BadSource,
  ) {}

  /** The guest has written the first 16 blocks; then the source turns bad. */
  async begin(sourceTimeoutMs: number | null): Promise<void> {
    const { child, bad } = this;
    this.source = await FakeSource.start(DATA, pki, bad.over);
    const background = bad.background ?? false;
    const mode = {
      kind: 'proxy' as const,
      sourceUri: this.source.uri,
      standby: background,
      background,
      rateBytesPerSecond: null,
      sourceTimeoutMs,
    };
    const volume = { stateDir: join(this.#folder, 'state'), name: 'disk', image: this.#image, mode };
    // A source that answers is never given up: a busy machine must not make it look silent.
    const timing = bad.outcome === 'failing' ? { ...IMPATIENT, requestTimeoutMs: DEADLINE_MS } : IMPATIENT;
    const uri = await child.open({ ...volume, timing }, join(this.#folder, 'guest'));
    this.guest = await NbdClient.connect(uri);
    if (background) {
      await this.source.turn(bad);
      await child.command({ do: 'takeover', generation: 2 });
    }
    await this.write(0, 16 * BLOCK);
    if (!background) await this.source.turn(bad);
  }

  async end(): Promise<void> {
    this.guest?.destroy();
    if (!this.child.gone) await this.child.command({ do: 'close' });
    await this.source?.stop();
    rmSync(this.#folder, { recursive: true, force: true });
  }

  async write(offset: number, length: number): Promise<void> {
    const bytes = WRITTEN[++this.#version % WRITTEN.length]!.subarray(offset, offset + length);
    await writeAt(this.guest, offset, bytes);
    bytes.copy(this.model, offset);
  }

  async verify(offset: number, length: number): Promise<void> {
    assertBlocks(await readAt(this.guest, offset, length), this.model.subarray(offset, offset + length));
  }

  /** What is here is read and written. */
  async work(): Promise<void> {
    const block = this.#version % 12;
    await this.write(block * BLOCK + 17, 3 * BLOCK);
    await this.verify(0, 16 * BLOCK);
  }

  /** Reads, and a write inside a block, that need the source. */
  needs(): Promise<void>[] {
    return [
      this.verify(64 * BLOCK, 16 * BLOCK),
      this.verify(100 * BLOCK, BLOCK),
      this.write(120 * BLOCK + 100, 50),
    ];
  }

  /** Every block of the image is what the guest would read, or not there. */
  assertNoLie(): void {
    const image = readFileSync(this.#image);
    const nothing = Buffer.alloc(BLOCK);
    for (let block = 0; block < BLOCKS; block++) {
      const is = image.subarray(block * BLOCK, (block + 1) * BLOCK);
      if (!is.equals(nothing))
        assertBlocks(
          is,
          this.model.subarray(block * BLOCK, (block + 1) * BLOCK),
          `block ${block} of the image`,
        );
    }
  }

  async assertWhole(): Promise<void> {
    const { background = false } = this.bad;
    if (!background) await inTime('all blocks to be read', this.verify(0, SIZE));
    await inTime('the hand-off', this.child.command({ do: 'handedOff' }));
    await this.verify(0, SIZE);
    assertBlocks(readFileSync(this.#image), this.model, 'the image');
    assert.equal((await this.child.status()).phase, 'plain');
  }

  /** Works until the source was met, and `status` says what is wrong with it. */
  async untilTold(): Promise<void> {
    const { bad, source, child } = this;
    const deadline = performance.now() + DEADLINE_MS;
    for (;;) {
      await this.work();
      const { source: seen } = await child.status();
      const met = bad.instead !== undefined || source.connections > 1;
      const told =
        bad.tells?.test(seen?.error ?? '') && (bad.state === undefined || seen?.state === bad.state);
      if (met && told) return;
      if (performance.now() > deadline)
        assert.fail(`${source.connections} connections; status says ${seen?.state}: ${seen?.error}`);
      await delay(POLL_MS);
    }
  }
}

async function goesOn(scene: Scene): Promise<void> {
  await scene.begin(null);
  const { bad, source } = scene;
  const needs = scene.needs();
  for (const need of needs) need.catch(() => undefined);
  if (bad.outcome === 'lost') {
    await scene.untilTold();
    for (const need of needs) assert.equal(await isSettled(need), false, 'it was answered');
    scene.assertNoLie();
    await source.reform();
  } else if (bad.outcome === 'failing') {
    for (const need of needs) assert.equal(await inTime('EIO', errnoOfRequest(need)), Errno.EIO);
    await scene.work();
    scene.assertNoLie();
    assert.equal(source.connections, 1, 'no connection is given up for it');
    await source.reform({ cut: true });
    needs.splice(0, needs.length, ...scene.needs());
  }
  await scene.work();
  await inTime('what waited for the source', Promise.all(needs));
  await scene.assertWhole();
}

async function timesOut(scene: Scene): Promise<void> {
  await scene.begin(SOURCE_TIMEOUT_MS);
  const began = performance.now();
  const reads = [64, 100].map((block) => errnoOfRequest(readAt(scene.guest, block * BLOCK, BLOCK)));
  await scene.work();
  assert.deepEqual(await inTime('EIO', Promise.all(reads)), [Errno.EIO, Errno.EIO]);
  const took = performance.now() - began;
  assert.ok(took < EIO_WITHIN_MS, `EIO after ${took} ms`);
  await scene.work();
  scene.assertNoLie();
}

async function play(bad: BadSource, plot: (scene: Scene) => Promise<void>): Promise<void> {
  const child = lanes.pop() ?? new ChildDaemon();
  const scene = new Scene(child, bad);
  let fine = false;
  try {
    await child.command({ do: 'close' }); // it has started
    const sockets = child.sockets();
    child.forgetPeak();
    try {
      await plot(scene);
    } finally {
      await scene.end();
    }
    assert.equal(child.sockets(), sockets, 'sockets were left open');
    assert.ok(child.peakBytes() < RESIDENT_BYTES_MAX, `${child.peakBytes() >> 20} MiB were resident`);
    assert.equal(child.stderr, '');
    fine = true;
  } finally {
    if (fine) lanes.push(child);
    else await child.kill();
  }
}

describe('a source that', { concurrency: LANES }, () => {
  for (const bad of BAD_SOURCES) {
    test(bad.name, async () => {
      await play(bad, goesOn);
      if (bad.outcome === 'lost') await play(bad, timesOut);
    });
  }
});
