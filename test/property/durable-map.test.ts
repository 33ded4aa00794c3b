/**
 * presence.map through any sequence of commits, kills of the process and crashes of the machine, at every step of every commit:
 * what was answered is there, what is there has its data in the image, and no file that a crash left is refused.
 */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { copyFileSync, existsSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import fc from 'fast-check';
import { CrashDisk, type CrashKind, randomFrom } from '../support/crash-disk.js';
import { tempFolder } from '../support/volume.js';

const { copyPages, DurableMap, PAGE_BITS } = await CrashDisk.load();
const PAGE_BYTES = PAGE_BITS / 8;
const VOLUME = randomUUID();
/** Crashes are simulated above the file system: the faster one will do. */
const MEMORY = existsSync('/dev/shm') ? '/dev/shm' : undefined;

interface Round {
  /** Each commit is of the bits set since the one before. */
  commits: number[][];
  crashAt: number;
  kind: CrashKind;
  seed: number;
}

/** A volume whose image has nothing but bits: which were written, which are on stable storage. */
class Model {
  readonly #path = join(tempFolder(MEMORY), 'presence.map');
  readonly #disk = new CrashDisk(this.#path);
  /** What the process knows, or the live map after it was killed. */
  #written = new Set<number>();
  #onStableStorage = new Set<number>();
  #answered = new Set<number>();
  readonly #bits: number;

  constructor(readonly pages: number) {
    this.#bits = pages * PAGE_BITS;
  }

  async create(): Promise<void> {
    (await DurableMap.create(this.#path, VOLUME, this.#bits, 1)).close();
    this.#disk.settle();
  }

  async round({ commits, crashAt, kind, seed }: Round): Promise<void> {
    let map: Awaited<ReturnType<typeof DurableMap.open>> | undefined;
    await this.#disk.run(crashAt, kind, seed, async () => {
      const loaded = new Uint8Array(this.pages * PAGE_BYTES);
      map = await DurableMap.open(this.#path, VOLUME, this.#bits, 1, loaded);
      let before: Uint8Array = loaded;
      for (const bits of [[], ...commits]) {
        for (const bit of bits) this.#written.add(bit % this.#bits);
        const now = this.#asBytes();
        const pages = Array.from({ length: this.pages }, (_, i) => i).filter(
          (page) => !Buffer.from(pageOf(now, page)).equals(pageOf(before, page)),
        );
        before = now;
        if (pages.length === 0) continue;
        const committed = [...this.#written];
        await map.commit(copyPages(now, pages), () => this.#syncImage());
        for (const bit of committed) this.#answered.add(bit);
      }
    });
    map?.close();
    if (kind !== 'killed') await this.#afterCrash();
  }

  #syncImage(): Promise<void> {
    const covered = [...this.#written];
    return this.#disk.syncing(() => {
      for (const bit of covered) this.#onStableStorage.add(bit);
    });
  }

  #asBytes(): Uint8Array {
    const bytes = new Uint8Array(this.pages * PAGE_BYTES);
    for (const bit of this.#written) bytes[bit >> 3]! |= 1 << (bit & 7);
    return bytes;
  }

  /** Reads the file as the crash left it, in a copy: opening repairs, and the next round is to meet the file unrepaired. */
  async #afterCrash(): Promise<void> {
    const copy = `${this.#path}.copy`;
    copyFileSync(this.#path, copy);
    const bytes = new Uint8Array(this.pages * PAGE_BYTES);
    (await DurableMap.open(copy, VOLUME, this.#bits, 1, bytes)).close();
    const there = new Set<number>();
    for (const [at, byte] of bytes.entries()) {
      for (let bit = 0; byte !== 0 && bit < 8; bit++) if ((byte & (1 << bit)) !== 0) there.add(8 * at + bit);
    }
    for (const bit of this.#answered) assert.ok(there.has(bit), `bit ${bit} was answered and is lost`);
    for (const bit of there) assert.ok(this.#onStableStorage.has(bit), `bit ${bit} came before its data`);
    this.#written = there;
  }
}

function pageOf(bytes: Uint8Array, page: number): Uint8Array {
  return bytes.subarray(page * PAGE_BYTES, (page + 1) * PAGE_BYTES);
}

async function live(pages: number, rounds: Round[]): Promise<void> {
  const model = new Model(pages);
  await model.create();
  for (const round of rounds) await model.round(round);
  // A long quiet life at the end: what the crashes left does not harm later.
  await model.round({ commits: [[1], [2]], crashAt: 1e9, kind: 'killed', seed: 1 });
  await model.round({ commits: [[3]], crashAt: 1e9, kind: 'any', seed: 1 });
}

const kinds = fc.constantFrom<CrashKind>('killed', 'all lost', 'all arrived', 'any', 'any');

function rounds(pages: number): fc.Arbitrary<Round[]> {
  const bits = fc.array(fc.nat(pages * PAGE_BITS - 1), { maxLength: 6 });
  const round = fc.record({
    commits: fc.array(bits, { maxLength: 4 }),
    crashAt: fc.integer({ min: 1, max: 60 }),
    kind: kinds,
    seed: fc.nat(),
  });
  return fc.array(round, { minLength: 1, maxLength: 6 });
}

test('any life of a small map', async () => {
  // Killed in the middle of a sync, and again soon after.
  const killedTwice: Round[] = [
    { commits: [[0], [1]], crashAt: 13, kind: 'killed', seed: 308737984 },
    { commits: [], crashAt: 3, kind: 'killed', seed: 20542418 },
  ];
  await fc.assert(
    fc.asyncProperty(rounds(3), (lives) => live(3, lives)),
    { numRuns: 400, examples: [[killedTwice]] },
  );
});

test('each step of three commits of all pages, then of one page, then of another', async () => {
  const pages = 3;
  const commits = [[0, PAGE_BITS, 2 * PAGE_BITS], [5], [PAGE_BITS + 5], [6, PAGE_BITS + 6]];
  for (const kind of ['all lost', 'all arrived', 'any'] as const) {
    for (let crashAt = 1; crashAt <= 45; crashAt++) {
      const again: Round = {
        commits: [[2 * PAGE_BITS + 9]],
        crashAt: 1 + (crashAt % 12),
        kind: 'any',
        seed: crashAt,
      };
      await live(pages, [{ commits, crashAt, kind, seed: 7 * crashAt }, again]);
    }
  }
});

test('a map whose headers take more than a sector, from its first commit on', async () => {
  const pages = 150;
  const all = Array.from({ length: pages }, (_, page) => page * PAGE_BITS + page);
  for (let i = 0; i < 45; i++) {
    const random = randomFrom(i + 1);
    // At the first header, at the second one (behind 150 pages), anywhere.
    const crashAt = 1 + [random(7), 154 + random(10), random(330)][i % 3]!;
    await live(pages, [
      { commits: [all, all.map((bit) => bit + 1)], crashAt, kind: 'any', seed: i },
      { commits: [all.map((bit) => bit + 2)], crashAt: 1 + random(20), kind: 'any', seed: i + 50 },
    ]);
  }
});
