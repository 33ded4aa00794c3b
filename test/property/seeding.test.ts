/** Any disk, any seeds that share blocks with it in any places, and a seed that changes meanwhile: the copy equals the source byte by byte. */
import assert from 'node:assert/strict';
import { closeSync, openSync, readFileSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import type { TestContext } from 'node:test';
import { test } from 'node:test';
import fc from 'fast-check';
import { useSeeds } from '../../src/relocation/seeds.js';
import { BLOCK, Lab, log, quiet, until } from '../lab/ferry.js';

/** Contents a block may have: by number, 0 for zeros. */
const CONTENTS = 12;
const BLOCKS_MAX = 300;

const contents = (blocksMax: number) =>
  fc.array(fc.integer({ min: 0, max: CONTENTS }), { minLength: 1, maxLength: blocksMax });

interface Case {
  disk: number[];
  /** Bytes of the last block. */
  tail: number;
  seeds: number[][];
  change: { kind: 'none' | 'write' | 'cut'; seed: number; block: number };
  allocation: boolean;
}

function imageOf(blocks: readonly number[]): Buffer {
  return Buffer.concat(blocks.map((content) => Buffer.alloc(BLOCK, content)));
}

async function run({ disk, tail, seeds, change, allocation }: Case): Promise<void> {
  const closers: (() => Promise<void>)[] = [];
  const lab = new Lab({
    after: (close: () => Promise<void>) => closers.push(close),
  } as unknown as TestContext);
  try {
    const data = imageOf(disk).subarray(0, (disk.length - 1) * BLOCK + tail);
    const source = await lab.source(data.length, { data });
    if (allocation) source.tellZeroes();
    source.tellHashes();
    const images = seeds.map((blocks, number) => {
      const path = join(lab.dir, `seed${number}.img`);
      writeFileSync(path, imageOf(blocks));
      return path;
    });
    const shared = useSeeds({ images, folder: join(lab.dir, 'seeds') }, log);
    lab.onClose(() => shared.release());
    await shared.built;
    const proxy = await lab.arrive(source, { seeds: images });
    proxy.service.pause();
    await proxy.service.takeover(2);
    await proxy.service.settle();
    await until(() => source.hashesOpened > 0, 'a connection for hashes');
    await quiet();
    const path = images[change.seed % images.length]!;
    const blocks = seeds[change.seed % images.length]!.length;
    if (change.kind === 'cut') truncateSync(path, (change.block % blocks) * BLOCK + 17);
    if (change.kind === 'write') {
      const file = openSync(path, 'r+');
      writeSync(file, Buffer.alloc(BLOCK, 99), 0, BLOCK, (change.block % blocks) * BLOCK + 1000);
      closeSync(file);
    }
    proxy.service.resume();
    await proxy.service.handedOff();
    assert.ok(readFileSync(proxy.image).equals(data), 'the copy is the source');
    const { backgroundBytes } = proxy.status.traffic;
    if (change.kind !== 'none') return;
    // All that a seed has came from it.
    const there = new Set(seeds.flat());
    const missing = disk.filter((content, block) => {
      const whole = block < disk.length - 1 || tail === BLOCK;
      return whole ? content !== 0 && !there.has(content) : !(allocation && content === 0);
    });
    assert.ok(
      backgroundBytes <= missing.length * BLOCK,
      `${backgroundBytes} bytes for ${missing.length} blocks`,
    );
  } finally {
    for (const close of closers) await close();
  }
}

test('a disk that shares blocks with seeds', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.record({
        disk: contents(BLOCKS_MAX),
        tail: fc.oneof(fc.constant(BLOCK), fc.integer({ min: 1, max: BLOCK })),
        seeds: fc.array(contents(40), { minLength: 1, maxLength: 3 }),
        change: fc.record({
          kind: fc.constantFrom('none' as const, 'write' as const, 'cut' as const),
          seed: fc.nat(2),
          block: fc.nat(40),
        }),
        allocation: fc.boolean(),
      }),
      run,
    ),
    { numRuns: 25, interruptAfterTimeLimit: 25_000, includeErrorInReport: true },
  );
});
