/**
 * The daemon is killed right before each step of each change of a volume, and the machine loses power there. What is left is the volume
 * before the change or after it, and after it if the change was answered; no acknowledged write is gone, no stale block is kept, the
 * same change can be made again with the same result, and a volume whose guest was let go is never written to by it.
 */
import assert from 'node:assert/strict';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import type { OpenMode } from '../../src/host/open.js';
import type { RetreatProof, VolumeStatus } from '../../src/host/service.js';
import { crashFolders } from '../lab/crash/folders.js';
import { Machine } from '../lab/crash/machine.js';
import { Random, SEED } from '../lab/crash/random.js';
import {
  Bench,
  type Change,
  FINAL_TAG,
  type Left,
  NAME,
  SIZE,
  UNREAD_BLOCK,
  VOLUME_ID,
} from '../lab/crash/steps.js';

const B = 4096;
const random = new Random(SEED);
const { inMemory, remove } = crashFolders();
let bench: Bench;

before(async () => {
  bench = await Bench.begin(new Machine(inMemory), inMemory, random);
});
after(async () => {
  await bench.close();
  remove();
});

const EARLIER_BOOT = 'bbbbbbbb-1111-4222-8333-444444444444';
const resume: OpenMode = { kind: 'resume' };

/** A plain volume with a write that was flushed. */
async function plain(bench: Bench): Promise<void> {
  writeFileSync(bench.image, bench.expected);
  await bench.open(bench.serving);
  await bench.write(1, 3 * B + 100, 2 * B);
  await bench.flush();
  await bench.shut();
}

async function sealed(bench: Bench): Promise<void> {
  await plain(bench);
  await bench.open(bench.serving);
  await bench.daemon.command({ do: 'seal', generation: 2 });
  await bench.shut();
}

async function standby(bench: Bench): Promise<void> {
  await bench.open(bench.arriving);
  await bench.shut();
}

/** Taken over, and not written to. */
async function relocating(bench: Bench): Promise<void> {
  await bench.open(bench.arriving);
  bench.sourceBecomes(FINAL_TAG);
  await bench.daemon.command({ do: 'takeover', generation: 2 });
  await bench.shut();
}

/** Taken over and written to; some blocks are local. */
async function written(bench: Bench): Promise<void> {
  await relocating(bench);
  await bench.open(bench.proxying);
  await bench.write(1, 3 * B + 100, 2 * B);
  await bench.write(2, 10 * B, 2 * B);
  await bench.flush();
  await bench.shut();
}

/** Writes that no flush covers: into local blocks, missing ones, and parts of both. */
async function writes(bench: Bench): Promise<void> {
  await bench.write(3, 4 * B, B);
  await bench.write(4, 11 * B + 50, 3 * B);
  await bench.write(5, 20 * B, 2 * B);
  await bench.write(6, SIZE - 200, 200);
}

/** What a standby reads may grow old: it is read while the machine still runs at the source, which then writes on. */
async function readsThenSourceWrites(bench: Bench): Promise<void> {
  await bench.read();
  bench.sourceBecomes(FINAL_TAG);
}

async function volumeId(bench: Bench): Promise<string> {
  return (await bench.daemon.command<VolumeStatus>({ do: 'status' })).id;
}

/** No retreat from a volume whose guest was told that its write was done. */
async function noWayBack(bench: Bench, _left: Left, answered: boolean): Promise<void> {
  if (answered) await bench.isRefused(bench.daemon.command({ do: 'retreat' }), 'phase');
}

async function closedToGuests(bench: Bench, left: Left): Promise<void> {
  if ('phase' in left && (left.phase === 'sealed' || left.phase === 'standby')) await bench.refusesWrites();
}

/** Ways to come to life. */
function opening(bench: Bench): Change[] {
  const atOnce = { ...bench.proxying, standby: false } as OpenMode;
  return [
    {
      name: 'making a standby',
      prepare: async () => undefined,
      make: (bench) => bench.open(bench.arriving),
      reopen: resume,
      from: { refused: 'not-found' },
      after: { phase: 'standby', generation: 1 },
      look: closedToGuests,
      again: (left) => 'refused' in left,
    },
    {
      name: 'making a volume that relocates at once',
      prepare: async () => undefined,
      make: (bench) => bench.open(atOnce),
      reopen: atOnce,
      from: { phase: 'relocating', generation: 1 },
      after: { phase: 'relocating', generation: 1 },
    },
    {
      name: 'opening what a killed daemon left',
      prepare: async (bench) => {
        await written(bench);
        await bench.killedAfter(async () => {
          await bench.open(bench.proxying);
          await writes(bench);
        });
      },
      make: (bench) => bench.open(bench.proxying),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
    },
    {
      name: 'opening after a loss of power',
      prepare: async (bench) => {
        bench.machine.boot(EARLIER_BOOT);
        await written(bench);
        await bench.killedAfter(async () => {
          await bench.open(bench.proxying);
          await writes(bench);
          await bench.flush();
        });
      },
      make: (bench) => bench.open(bench.proxying),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
    },
  ];
}

/** The destination becomes the writer. */
function takingOver(bench: Bench): Change[] {
  return [
    {
      name: 'takeover',
      prepare: standby,
      mode: bench.proxying,
      before: readsThenSourceWrites,
      make: (bench) => bench.daemon.command({ do: 'takeover', generation: 2 }),
      from: { phase: 'standby', generation: 1 },
      after: { phase: 'relocating', generation: 2 },
      look: closedToGuests,
      finally: async (bench) => bench.compare(await bench.read(), false, 'the disk after the takeover'),
    },
    {
      name: 'takeover by the first write',
      prepare: async (bench) => {
        await bench.open(bench.proxying);
        await bench.shut();
      },
      mode: bench.proxying,
      before: readsThenSourceWrites,
      make: (bench) => bench.write(1, 3 * B + 100, 2 * B),
      from: { phase: 'standby', generation: 1 },
      after: { phase: 'relocating', generation: 2 },
      finally: async (bench) => bench.compare(await bench.read(), false, 'the disk after the write'),
    },
    {
      name: 'first write after a takeover',
      prepare: relocating,
      mode: bench.proxying,
      make: (bench) => bench.write(1, 3 * B + 100, 2 * B),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
      look: noWayBack,
    },
    {
      name: 'settle',
      prepare: relocating,
      mode: bench.proxying,
      make: (bench) => bench.daemon.command({ do: 'settle' }),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
      look: noWayBack,
    },
  ];
}

/** It does not, after all. */
function turningBack(bench: Bench): Change[] {
  return [
    {
      name: 'retreat',
      prepare: relocating,
      mode: bench.proxying,
      before: async (bench) => void (await bench.read()), // kept, and old after the retreat
      make: (bench) => bench.daemon.command<RetreatProof>({ do: 'retreat' }),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'standby', generation: 2 },
      look: closedToGuests,
      finally: async (bench) => {
        assert.deepEqual(bench.answer, { volumeId: VOLUME_ID, generation: 2 });
        bench.sourceBecomes(FINAL_TAG + 1);
        await bench.isRefused(bench.daemon.command({ do: 'takeover', generation: 2 }), 'generation');
        await bench.daemon.command({ do: 'takeover', generation: 3 });
        bench.compare(await bench.read(), false, 'the disk after the next takeover');
      },
    },
    {
      name: 'cancel',
      prepare: standby,
      mode: bench.proxying,
      reopen: resume,
      make: (bench) => bench.daemon.command<RetreatProof>({ do: 'cancel' }),
      from: { phase: 'standby', generation: 1 },
      after: { refused: 'not-found' },
      look: async (bench, left) => {
        if ('phase' in left) return bench.refusesWrites();
        assert.ok(!existsSync(bench.image), 'the image is left over');
        const folder = join(bench.stateDir, NAME);
        assert.deepEqual(existsSync(folder) ? readdirSync(folder) : [], []);
      },
      again: (left) => 'phase' in left,
      finally: async (bench) => assert.deepEqual(bench.answer, { volumeId: VOLUME_ID, generation: 2 }),
    },
  ];
}

/** What was written is made durable. */
function keeping(bench: Bench): Change[] {
  return [
    {
      name: 'flush',
      prepare: written,
      mode: bench.proxying,
      before: writes,
      make: (bench) => bench.flush(),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
      durable: true,
      again: () => false,
    },
    {
      name: 'close',
      prepare: written,
      mode: bench.proxying,
      before: writes,
      make: (bench) => bench.daemon.command({ do: 'close' }),
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'relocating', generation: 2 },
      durable: true,
      again: () => false,
    },
    {
      name: 'hand-off',
      prepare: async (bench) => {
        await written(bench);
        await bench.open(bench.proxying);
        await bench.read();
        await bench.shut();
      },
      mode: bench.proxying,
      before: async (bench) => {
        await bench.write(3, 4 * B, B);
        await bench.write(4, 11 * B + 50, 3 * B);
      },
      make: async (bench) => {
        await (await bench.client()).read(UNREAD_BLOCK * B, B, Buffer.alloc(B)); // the last one that was missing
        await bench.daemon.command({ do: 'handedOff' });
      },
      from: { phase: 'relocating', generation: 2 },
      after: { phase: 'plain', generation: 2 },
      durable: true,
      finally: async (bench) => {
        await bench.shut();
        await bench.open(resume);
        // But for heat and first accesses, which are hints.
        const hint = /^(heat|first-access)/;
        const files = readdirSync(join(bench.stateDir, NAME)).filter((name) => !hint.test(name));
        assert.deepEqual(files, ['volume.json']);
        bench.compare(readFileSync(bench.image), true, 'the image');
      },
    },
  ];
}

/** The source lets go. */
function leaving(bench: Bench): Change[] {
  return [
    {
      name: 'seal',
      prepare: plain,
      mode: bench.serving,
      before: writes,
      make: (bench) => bench.daemon.command({ do: 'seal', generation: 2 }),
      from: { phase: 'plain', generation: 1 },
      after: { phase: 'sealed', generation: 1 },
      durable: true,
      look: closedToGuests,
      finally: async (bench) => {
        await bench.refusesWrites();
        await bench.isRefused(bench.daemon.command({ do: 'seal', generation: 3 }), 'phase');
      },
    },
    {
      name: 'unseal',
      prepare: sealed,
      mode: bench.serving,
      make: async (bench) => {
        const proof = { volumeId: await volumeId(bench), generation: 2 };
        return bench.daemon.command({ do: 'unseal', proof });
      },
      from: { phase: 'sealed', generation: 1 },
      after: { phase: 'plain', generation: 2 },
      look: closedToGuests,
      finally: (bench) => bench.write(7, 0, B),
    },
    {
      name: 'retire',
      prepare: sealed,
      mode: bench.serving,
      make: (bench) => bench.daemon.command({ do: 'retire', deleteImage: false }),
      from: { phase: 'sealed', generation: 1 },
      after: { refused: 'phase' },
      look: closedToGuests,
      again: (left) => 'phase' in left,
    },
    {
      name: 'retire, and the image goes',
      prepare: sealed,
      mode: bench.serving,
      make: (bench) => bench.daemon.command({ do: 'retire', deleteImage: true }),
      from: { phase: 'sealed', generation: 1 },
      after: { refused: 'phase' },
      look: async (bench, left, answered) => {
        if ('phase' in left) await bench.refusesWrites();
        if (answered) assert.ok(!existsSync(bench.image), 'the image is still there');
      },
      again: (left) => 'phase' in left,
    },
  ];
}

const CHANGES = [opening, takingOver, turningBack, keeping, leaving];

test('killed before each step of each change of a volume', async (t) => {
  let crashes = 0;
  for (const change of CHANGES.flatMap((kind) => kind(bench))) {
    await t.test(change.name, async (t) => {
      try {
        const steps = await bench.everyStep(change);
        crashes += steps;
        t.diagnostic(`${steps} steps`);
      } catch (error) {
        throw new Error(`BLOCKFERRY_SEED=${SEED}: ${(error as Error).message}`, { cause: error });
      }
    });
  }
  t.diagnostic(`${crashes} crashes, each with the process's death and with two losses of power`);
});
