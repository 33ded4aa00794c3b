/** The index of a seed: what it finds, how it is built, and what becomes of one that is damaged, old, or somebody else's. */
import assert from 'node:assert/strict';
import {
  closeSync,
  openSync,
  readdirSync,
  readFileSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { SEED_BYTES_MAX, SeedIndex } from '../../../src/relocation/seed-index.js';
import { HASH_BYTES, hashBlocks } from '../../../src/volume/block-hash.js';
import { failsWith, patterned, sparseFile, tempFolder } from '../../support/volume.js';

const BLOCK = 4096;
const MIB = 1 << 20;

class Place {
  readonly folder = tempFolder();
  readonly image = join(this.folder, 'seed.img');
  readonly #open = new Map<SeedIndex, number>();

  constructor(
    t: TestContext,
    readonly content: Buffer,
  ) {
    writeFileSync(this.image, content);
    t.after(() => {
      for (const index of this.#open.keys()) this.close(index);
    });
  }

  get file(): string {
    const [name] = readdirSync(this.folder).filter((entry) => entry.endsWith('.index'));
    return join(this.folder, name!);
  }

  index(): SeedIndex {
    const fd = openSync(this.image, 'r');
    const index = SeedIndex.open(this.folder, this.image, fd);
    this.#open.set(index, fd);
    return index;
  }

  close(index: SeedIndex): void {
    index.close();
    closeSync(this.#open.get(index)!);
    this.#open.delete(index);
  }
}

/** Steps it took. */
function build(index: SeedIndex): number {
  assert.ok(index.claim());
  let steps = 0;
  for (; !index.complete; steps++) index.build();
  return steps;
}

function find(index: SeedIndex, content: Buffer): number[] {
  return [...index.candidates(hashBlocks(content), 0)];
}

test('finds each block, of equal ones the first, and neither zeros nor what is not there', (t) => {
  const content = patterned(5 * MIB + 99);
  content.fill(0, 7 * BLOCK, 9 * BLOCK);
  content.copy(content, 700 * BLOCK, 3 * BLOCK, 4 * BLOCK);
  const place = new Place(t, content);
  const index = place.index();
  assert.deepEqual([index.usable, index.complete], [false, false]);
  assert.equal(build(index), 6);
  for (let at = 0; at < content.length; at += BLOCK) {
    const block = at / BLOCK;
    const expected = block === 7 || block === 8 ? [] : [block === 700 ? 3 : block];
    assert.deepEqual(find(index, content.subarray(at, at + BLOCK)), expected);
  }
  assert.deepEqual(find(index, patterned(BLOCK, 77)), []);
  // 17 bytes a block, as documented.
  assert.ok(readFileSync(place.file).length <= BLOCK + 1280 * 18 + BLOCK);
});

test('is made once for a file as it is, by one at a time, and can be used by all', (t) => {
  const place = new Place(t, patterned(2 * MIB));
  const builder = place.index();
  assert.ok(builder.claim());
  const other = place.index();
  assert.equal(other.claim(), false);
  while (!builder.complete) builder.build();
  assert.equal(other.claim(), false, 'nothing is left to do');
  assert.ok(other.complete);
  assert.deepEqual(find(other, place.content.subarray(5 * BLOCK, 6 * BLOCK)), [5]);
  assert.ok(place.index().complete, 'and so it is at the next start');

  utimesSync(place.image, 1, 1);
  const anew = place.index();
  assert.equal(anew.usable, false);
  build(anew); // neither of the others holds it any more
  assert.deepEqual(find(anew, place.content.subarray(5 * BLOCK, 6 * BLOCK)), [5]);
});

test('goes on where a build was stopped, and passes over holes', (t) => {
  const place = new Place(t, patterned(BLOCK));
  const size = 9 * 2 ** 30;
  truncateSync(place.image, size);
  const end = patterned(BLOCK, 5);
  writeFileSync(place.image, end, { flag: 'r+' });
  const index = place.index();
  assert.ok(index.claim());
  for (let steps = 0; !index.usable; steps++) {
    assert.ok(steps < 10);
    index.build();
  }
  assert.equal(index.complete, false);
  assert.deepEqual(find(index, end), [0]);
  place.close(index);
  const next = place.index();
  assert.ok(next.usable && !next.complete);
  assert.ok(build(next) < 10, 'two segments of holes');
  assert.deepEqual(find(next, end), [0]);
});

test('whatever its file holds, it gives places or none', (t) => {
  const place = new Place(t, patterned(3 * MIB));
  build(place.index());
  const good = readFileSync(place.file);
  for (const [at, value] of [
    [3, 1],
    [40, 1],
    [100, 1],
  ] as const) {
    const bad = Buffer.from(good);
    bad[at] = bad[at]! ^ value;
    writeFileSync(place.file, bad);
    const index = place.index();
    assert.equal(index.usable, false, `byte ${at}`);
    build(index);
    assert.deepEqual(readFileSync(place.file), good);
  }
  // Tables have no checksum: places are only where to look.
  const wild = Buffer.concat([good.subarray(0, BLOCK), patterned(good.length - BLOCK, 3)]);
  writeFileSync(place.file, wild);
  for (let block = 0; block < 768; block++)
    for (const candidate of find(place.index(), place.content.subarray(block * BLOCK, (block + 1) * BLOCK)))
      assert.ok(Number.isSafeInteger(candidate) && candidate >= 0);
  truncateSync(place.file, BLOCK + 10);
  assert.deepEqual(find(place.index(), place.content.subarray(0, BLOCK)), []);
});

test('a page that is full goes on in the next', (t) => {
  // 400 blocks whose hashes begin alike would take luck; a table of one page with more than 341 blocks is two pages by construction, so the
  // pages are filled to the brim by content that is searched for: all that lands on the first page of three.
  const blocks: Buffer[] = [];
  const seen = new Set<string>();
  for (let seed = 1; blocks.length < 345; seed++) {
    const block = Buffer.alloc(BLOCK);
    block.writeUInt32LE(seed);
    const hash = Buffer.from(hashBlocks(block));
    if (hash.readUInt32LE(8) >= 2 ** 32 / 2 || seen.has(hash.toString('hex'))) continue;
    seen.add(hash.toString('hex'));
    blocks.push(block);
  }
  const place = new Place(t, Buffer.concat(blocks));
  const index = place.index();
  build(index);
  assert.equal(readFileSync(place.file).length, 3 * BLOCK, 'a head and two pages');
  for (const [number, block] of blocks.entries()) assert.deepEqual(find(index, block), [number]);
});

test('refuses an image that is too large', (t) => {
  const folder = tempFolder('/dev/shm');
  const path = sparseFile(SEED_BYTES_MAX + 1, folder);
  const fd = openSync(path, 'r');
  t.after(() => closeSync(fd));
  assert.throws(() => SeedIndex.open(folder, path, fd), failsWith('bounds', /seed/));
  assert.equal(HASH_BYTES, 32);
});
