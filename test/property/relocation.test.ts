/** Any guest, any source that breaks: what the guest reads, and the image in the end, equal a model of its answered requests. */
import assert from 'node:assert/strict';
import { closeSync, openSync, readFileSync, writeFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { mock, type TestContext, test } from 'node:test';
import fc from 'fast-check';
import { Errno } from '../../src/nbd/constants.js';
import { LinkWindow } from '../../src/relocation/window.js';
import { HASH_BYTES } from '../../src/volume/block-hash.js';
import { assertBlocks, BLOCK, Lab, pattern, readAt, writeAt } from '../lab/ferry.js';

const SIZE = 96 * BLOCK + 700;

type Step =
  | { kind: 'read' | 'zero' | 'trim'; offset: number; length: number }
  | { kind: 'write'; offset: number; length: number; fill: number; fua: boolean }
  | { kind: 'prefetch'; offset: number; length: number }
  | { kind: 'flush' | 'cut' | 'down' | 'up' | 'hold' | 'release' | 'wait' | 'restart' }
  | { kind: 'fail' | 'spoil'; block: number };

const place = fc
  .tuple(
    fc.integer({ min: 0, max: SIZE - 1 }),
    fc.oneof(fc.integer({ min: 1, max: 2 * BLOCK }), fc.integer({ min: 1, max: 40 * BLOCK })),
    fc.boolean(),
  )
  .map(([at, span, aligned]) => {
    const offset = aligned ? at - (at % BLOCK) : at;
    return { offset, length: Math.min(aligned ? Math.ceil(span / BLOCK) * BLOCK : span, SIZE - offset) };
  });

const step: fc.Arbitrary<Step> = fc.oneof(
  { weight: 6, arbitrary: place.map((at) => ({ kind: 'read' as const, ...at })) },
  {
    weight: 8,
    arbitrary: fc
      .tuple(place, fc.integer({ min: 1, max: 255 }), fc.boolean())
      .map(([at, fill, fua]) => ({ kind: 'write' as const, ...at, fill, fua })),
  },
  { weight: 2, arbitrary: place.map((at) => ({ kind: 'zero' as const, ...at })) },
  { weight: 1, arbitrary: place.map((at) => ({ kind: 'trim' as const, ...at })) },
  { weight: 1, arbitrary: place.map((at) => ({ kind: 'prefetch' as const, ...at })) },
  {
    weight: 6,
    arbitrary: fc
      .constantFrom('flush', 'cut', 'down', 'up', 'hold', 'release', 'wait', 'restart')
      .map((kind) => ({ kind }) as Step),
  },
  {
    weight: 1,
    arbitrary: fc
      .tuple(fc.integer({ min: 0, max: 97 }), fc.constantFrom('fail' as const, 'spoil' as const))
      .map(([block, kind]) => ({ kind, block })),
  },
);

async function inTime(what: string, ms: number, done: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not over in ${ms} ms`)), ms);
  });
  await Promise.race([done, late]).finally(() => clearTimeout(timer));
}

interface Settings {
  background: boolean;
  readAhead: boolean;
  sparse: boolean;
  /** Threads write what the copy brings. */
  fast: boolean;
  /** There is a seed with most of the source's blocks, elsewhere; and what the source says of hashes. */
  seeded: 'no' | 'well' | 'lies' | 'fails';
}

/** Every third block is missing, and the others are in another order. */
function seedOf(data: Buffer): Buffer {
  const blocks: Buffer[] = [];
  for (let at = 0; at < data.length; at += BLOCK)
    if ((at / BLOCK) % 3 !== 0) blocks.unshift(data.subarray(at, at + BLOCK));
  return Buffer.concat(blocks);
}

async function run(steps: readonly Step[], settings: Settings): Promise<void> {
  const closers: (() => Promise<void>)[] = [];
  mock.getter(LinkWindow.prototype, 'fast', () => settings.fast);
  const lab = new Lab({
    after: (close: () => Promise<void>) => closers.push(close),
  } as unknown as TestContext);
  try {
    await inTime('the run', 20_000, runIn(lab, steps, settings));
  } finally {
    for (const close of closers) await inTime('the end', 20_000, close());
    mock.restoreAll();
  }
}

async function runIn(
  lab: Lab,
  steps: readonly Step[],
  { background, readAhead, sparse, seeded }: Settings,
): Promise<void> {
  const model = pattern(SIZE);
  if (sparse) model.fill(0, 20 * BLOCK, 60 * BLOCK);
  const source = await lab.source(SIZE, { data: model });
  if (sparse) source.tellZeroes(512);
  const order = readAhead ? 'hot' : 'linear';
  const seed = join(lab.dir, 'seed.img');
  writeFileSync(seed, seedOf(model));
  const seeds = seeded === 'no' ? {} : { seeds: [seed] };
  if (seeded !== 'no') {
    const hashes = source.tellHashes();
    if (seeded === 'lies') hashes.data.fill(1, 40 * HASH_BYTES + 1, 60 * HASH_BYTES + 1);
    if (seeded === 'fails') hashes.failure = ({ offset }) => (offset > 60 * HASH_BYTES ? Errno.EIO : 0);
  }
  let proxy = await lab.proxy(source, { background, readAhead, order, ...seeds });
  let guest = await proxy.guest();
  let up = true;
  /** Requests in flight; no two overlap, so that the model is certain. */
  let busy: { offset: number; length: number; done: Promise<void> }[] = [];

  const settleAll = async () => {
    if (!up) await source.start();
    up = true;
    source.failBlocks([]);
    source.release();
    await inTime('requests', 5000, Promise.all(busy.map(({ done }) => done)));
    busy = [];
  };
  const start = async (offset: number, length: number, request: () => Promise<unknown>) => {
    if (busy.some((other) => other.offset < offset + length && offset < other.offset + other.length))
      await settleAll();
    // A request that failed with EIO did nothing: it is sent again when the source is well.
    const done = (async () => {
      for (;;) {
        try {
          await request();
          return;
        } catch (error) {
          assert.equal((error as { cause?: { errno?: number } }).cause?.errno, Errno.EIO, String(error));
          source.failBlocks([]);
        }
      }
    })();
    busy.push({ offset, length, done });
  };
  for (const step of steps) {
    switch (step.kind) {
      case 'read': {
        const expected = Buffer.from(model.subarray(step.offset, step.offset + step.length));
        await start(step.offset, step.length, async () =>
          assertBlocks(await readAt(guest, step.offset, step.length), expected, 'a read'),
        );
        break;
      }
      case 'write': {
        const bytes = Buffer.alloc(step.length, step.fill);
        await start(step.offset, step.length, () =>
          guest.write(step.offset, bytes, 0, step.length, { fua: step.fua }),
        );
        bytes.copy(model, step.offset);
        break;
      }
      case 'zero':
        await start(step.offset, step.length, () => guest.zero(step.offset, step.length));
        model.fill(0, step.offset, step.offset + step.length);
        break;
      case 'trim': {
        // What a trim leaves is told by a read of it.
        await start(step.offset, step.length, () => guest.trim(step.offset, step.length));
        await settleAll();
        await inTime(
          'a read after a trim',
          5000,
          readAt(guest, step.offset, step.length).then((bytes) => bytes.copy(model, step.offset)),
        );
        break;
      }
      case 'prefetch':
        void proxy.service.prefetch(step.offset, step.length).catch(() => undefined);
        break;
      case 'flush':
        await inTime('a flush', 5000, guest.flush());
        break;
      case 'cut':
        source.cut();
        break;
      case 'down':
        if (up) await inTime('the stop of the source', 5000, source.stop());
        up = false;
        break;
      case 'up':
        if (!up) await source.start();
        up = true;
        break;
      case 'hold':
        source.hold();
        break;
      case 'release':
        source.release();
        break;
      case 'fail':
        source.failBlocks([step.block]);
        break;
      case 'spoil': {
        const file = openSync(seed, 'r+');
        writeSync(file, `spoilt ${step.block}`, step.block * BLOCK + 100);
        closeSync(file);
        break;
      }
      case 'wait':
        await settleAll();
        break;
      case 'restart':
        await settleAll();
        await inTime('a restart', 5000, proxy.close());
        proxy = await proxy.restart({ background, ...seeds });
        guest = await proxy.guest();
        break;
    }
  }
  await settleAll();
  await writeAt(guest, 0, model.subarray(0, 10));
  await inTime('the last prefetch', 5000, proxy.service.prefetch(0, SIZE));
  await inTime('the hand-off', 5000, proxy.service.handedOff());
  assertBlocks(await readAt(guest, 0, SIZE), model, 'what the guest sees');
  assertBlocks(readFileSync(proxy.image), model, 'the image');
}

test('a guest over a source whose connections break', async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(step, { minLength: 5, maxLength: 60 }),
      fc.record({
        background: fc.boolean(),
        readAhead: fc.boolean(),
        sparse: fc.boolean(),
        fast: fc.boolean(),
        seeded: fc.constantFrom('no' as const, 'well' as const, 'lies' as const, 'fails' as const),
      }),
      run,
    ),
    { numRuns: 40, interruptAfterTimeLimit: 25_000, includeErrorInReport: true },
  );
});
