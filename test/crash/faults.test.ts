/**
 * Faults seen in xNBD 0.4.1, each of which a restart could bring back: bits set before their data, hits that wait behind misses, a
 * request with many missing runs, a lost source that parks everything for good, and 100 % shown before the end.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import type { VolumeStatus } from '../../src/host/service.js';
import { BLOCK_BYTES } from '../../src/volume/blocks.js';
import { Campaign, type VolumePlan } from '../lab/crash/campaign.js';
import { type ChildDaemon, type Daemon, Spares } from '../lab/crash/daemon.js';
import { crashFolders } from '../lab/crash/folders.js';
import type { Guest } from '../lab/crash/guest.js';
import { Random, SEED } from '../lab/crash/random.js';

const MIB = 1 << 20;
/** A hit that waited for a miss of the slow source would take as long as that. */
const SLOW_MS = 2500;
const FIRST_64 = Array.from({ length: 64 }, (_, block) => block);

const random = new Random(SEED);
const spares = new Spares();
const { folder, remove } = crashFolders();

after(async () => {
  await spares.close();
  remove();
});

async function volume(
  plan: Omit<VolumePlan, 'folder' | 'sizeBytes'> & { sizeBytes?: number },
  lives: (running: Campaign) => Promise<void>,
): Promise<void> {
  const running = await Campaign.begin({ sizeBytes: 4 * MIB, ...plan, folder }, random.fork(), spares);
  try {
    await lives(running);
    running.check();
  } catch (error) {
    throw new Error(`${plan.name}, BLOCKFERRY_SEED=${SEED}: ${(error as Error).message}`, { cause: error });
  } finally {
    await running.close();
  }
}

function statusOf(child: Daemon): Promise<VolumeStatus> {
  return (child as ChildDaemon).command<VolumeStatus>({ do: 'status' });
}

/** Reads the blocks one by one; each is local afterwards. */
async function bring(guest: Guest, blocks: Iterable<number>): Promise<void> {
  for (const block of blocks) await guest.read(guest.client, block * BLOCK_BYTES, BLOCK_BYTES);
}

test('no bit is set before its data: killed during sequential reads over a 20 ms source', async (t) => {
  await volume({ name: 'bits' }, async (running) => {
    running.source.delayMs = () => 20;
    let local = 0;
    for (let life = 0; life < 12; life++) {
      const { child, guest } = await running.resume();
      const before = running.source.reads;
      let over = false;
      const reads = Array.from({ length: 8 }, async (_, reader) => {
        for (let at = reader * 65_536; at < MIB; at += 8 * 65_536)
          await guest.read(guest.client, (life % 4) * MIB + at, 65_536);
      });
      const kill = async (): Promise<void> => {
        // What earlier lives brought needs no source: the reads may be over before it was asked that often.
        while (running.source.reads - before < 5 && !over) await new Promise(setImmediate);
        await running.killNow(child, guest);
      };
      const readers = Promise.all(reads).finally(() => {
        over = true;
      });
      await Promise.all([readers, kill()]);
      // Without the source, nothing but what the bits say is here can be read.
      await running.withoutSource(async () => {
        const again = await running.resume();
        local = (await again.guest.compareAll()).localBlocks;
        await running.killNow(again.child, again.guest);
      });
    }
    t.diagnostic(`${local} of ${running.model.local.length} blocks local in the end`);
    assert.ok(local > 0, 'nothing was fetched: the test tests nothing');
    running.source.delayMs = () => 0;
    await running.finish();
  });
});

test('hits do not wait behind misses, nor does a restart make them', async () => {
  await volume({ name: 'hits', background: false }, async (running) => {
    const first = await running.resume();
    await bring(first.guest, FIRST_64);
    await running.killNow(first.child, first.guest);

    const { child, guest } = await running.resume();
    running.source.delayMs = () => SLOW_MS;
    let missed = 0;
    const misses = Array.from({ length: 16 }, async (_, i) => {
      await guest.read(guest.client, 2 * MIB + i * 65_536, BLOCK_BYTES);
      missed++;
    });
    for (let round = 0; round < 4; round++) await bring(guest, FIRST_64);
    assert.equal(missed, 0, '256 hits took longer than misses that were sent before them');
    await Promise.all(misses);
    assert.equal(missed, 16);
    await running.killNow(child, guest);
  });
});

test('one request with hundreds of separate missing runs, also after a restart', async () => {
  await volume({ name: 'runs', background: false }, async (running) => {
    const first = await running.resume();
    await bring(
      first.guest,
      Array.from({ length: 256 }, (_, i) => 2 * i),
    );
    await running.killNow(first.child, first.guest);

    const { child, guest } = await running.resume();
    await guest.read(guest.client, 0, 2 * MIB);
    assert.equal(guest.completed, 1);
    await running.killNow(child, guest);
    await running.finish();
  });
});

test('a source that is away when the daemon starts again: hits go on, misses wait and come by themselves', async () => {
  await volume({ name: 'away', background: false }, async (running) => {
    const first = await running.resume();
    await bring(first.guest, [0, 1, 2, 3]);
    await running.killNow(first.child, first.guest);

    let miss: Promise<void> | undefined;
    let missed = true;
    let parts: Awaited<ReturnType<Campaign['resume']>> | undefined;
    await running.withoutSource(async () => {
      parts = await running.resume();
      const { guest, child } = parts;
      miss = guest.read(guest.client, 3 * MIB, 8 * BLOCK_BYTES).then(() => {
        missed = false;
      });
      await bring(guest, [0, 1, 2, 3]);
      await guest.change(guest.client, 'write', MIB, 8 * BLOCK_BYTES); // whole blocks need no source
      await guest.read(guest.client, MIB, 8 * BLOCK_BYTES);
      assert.ok(missed, 'a missing block was answered without its source');
      const status = await statusOf(child);
      assert.notEqual(status.source?.state, 'connected');
    });
    await miss;
    assert.equal(parts!.guest.refused, 0);
    assert.equal(parts!.guest.completed, 7);
    await running.killNow(parts!.child, parts!.guest);
    await running.finish();
  });
});

test('what is local is never said to be all before it is', async () => {
  await volume({ name: 'early', sizeBytes: MIB + 10, background: false }, async (running) => {
    const { size } = running.model;
    const last = Math.ceil(size / BLOCK_BYTES) - 1;
    const all = Array.from({ length: last + 1 }, (_, block) => block);
    for (const missing of [all.filter((block) => block % 50 === 0), [last]]) {
      const before = await running.resume();
      await bring(
        before.guest,
        all.slice(0, last).filter((block) => !missing.includes(block)),
      );
      await running.killNow(before.child, before.guest);

      const { child, guest } = await running.resume();
      const status = await statusOf(child);
      assert.ok(
        status.presentBytes < size,
        `${status.presentBytes} of ${size} bytes, ${missing.length} blocks missing`,
      );
      assert.equal(status.phase, 'relocating');
      assert.equal(status.handoffAt, null);
      await running.killNow(child, guest);
    }
    await running.finish();
  });
});
