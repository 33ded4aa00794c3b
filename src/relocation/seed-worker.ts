/**
 * What the thread of the seeds runs: it indexes them, looks blocks up, and reads those that are there.
 *
 * Invariant: a block is answered only with what was read of a seed and hashed right then, to all 32 bytes of what was asked for. So a seed may be
 * written to, cut or replaced at any time, and an index may be damaged.
 */
import { closeSync, constants, mkdirSync, openSync, readSync } from 'node:fs';
import { parentPort, workerData } from 'node:worker_threads';
import { messageOf } from '../errors.js';
import { HASH_BYTES, hashBlocks } from '../volume/block-hash.js';
import { BLOCK_BYTES } from '../volume/blocks.js';
import { equalHashes, SeedIndex } from './seed-index.js';
import type { FromSeeds, SeedQuestion, SeedSettings } from './seeds.js';

if (parentPort === null) throw new Error('this is no program, but what the thread of the seeds runs');
const port = parentPort;
const { images, folder } = workerData as SeedSettings;

/** An index that another process builds is looked at so often. */
const OTHERS_MS = 1_000;

interface Seed {
  readonly path: string;
  readonly fd: number;
  readonly index: SeedIndex;
}

const seeds: Seed[] = [];
let told = false;

function say(message: FromSeeds, transfer: ArrayBuffer[] = []): void {
  port.postMessage(message, transfer);
}

function open(path: string): Seed | null {
  let fd = -1;
  try {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
    // O_NONBLOCK means nothing to files and block devices; opening a named pipe would wait for its other end.
    fd = openSync(path, constants.O_RDONLY | constants.O_NONBLOCK);
    return { path, fd, index: SeedIndex.open(folder, path, fd) };
  } catch (error) {
    if (fd !== -1) closeSync(fd);
    say({ kind: 'trouble', path, why: messageOf(error) });
    return null;
  }
}

function tellUsable({ index }: Seed): void {
  if (told || !index.usable) return;
  told = true;
  say({ kind: 'usable' });
}

/** Takes on the next index that nobody builds; one at a time, for the memory it takes. */
function buildNext(left: Set<Seed>): void {
  for (const seed of left) {
    const mine = seed.index.claim();
    tellUsable(seed);
    if (mine) {
      build(seed, left);
      return;
    }
    if (seed.index.complete) left.delete(seed);
  }
  if (left.size === 0) say({ kind: 'built' });
  else setTimeout(() => buildNext(left), OTHERS_MS);
}

/** Step by step: questions are answered in between. */
function build(seed: Seed, left: Set<Seed>): void {
  try {
    seed.index.build();
  } catch (error) {
    say({ kind: 'trouble', path: seed.path, why: messageOf(error) });
    left.delete(seed);
  }
  tellUsable(seed);
  if (left.has(seed) && !seed.index.complete) setImmediate(() => build(seed, left));
  else setImmediate(() => buildNext(left));
}

/** Reads the block that has the hash at hashes[at...] into content[to, to + length); false: it is nowhere. */
function find(hashes: Uint8Array, at: number, content: Uint8Array, to: number, length: number): boolean {
  for (const { fd, index } of seeds)
    for (const block of index.candidates(hashes, at)) {
      try {
        if (readSync(fd, content, to, length, block * BLOCK_BYTES) < length) continue;
      } catch {
        continue; // a block of the seed that cannot be read is one that is not there
      }
      if (equalHashes(hashBlocks(content.subarray(to, to + length)), 0, hashes, at)) return true;
    }
  return false;
}

function answer({ number, hashes, bytes }: SeedQuestion): void {
  const blocks = hashes.length / HASH_BYTES;
  const found = new Uint8Array(blocks);
  let content: Uint8Array<ArrayBuffer> | null = null;
  for (let block = 0; block < blocks; block++) {
    const to = block * BLOCK_BYTES;
    content ??= new Uint8Array(bytes);
    if (find(hashes, block * HASH_BYTES, content, to, Math.min(BLOCK_BYTES, bytes - to))) found[block] = 1;
  }
  if (content === null || !found.includes(1)) say({ kind: 'answer', number, found: null, content: null });
  else say({ kind: 'answer', number, found, content }, [found.buffer, content.buffer]);
}

port.on('message', answer);
for (const path of images) {
  const seed = open(path);
  if (seed !== null) seeds.push(seed);
}
buildNext(new Set(seeds));
