/**
 * kill -9 at random moments during mixed guest I/O through the proxy; after each the daemon is started again and what the guest finds
 * is compared with a model of what was acknowledged (test/lab/crash/model.ts).
 *
 * At least 200 kills are made. BLOCKFERRY_CRASH_KILLS=N makes about N instead, BLOCKFERRY_SEED=S repeats the choices of a run (the
 * moments of the kills follow the machine's own timing and are alike, not the same):
 *
 *     BLOCKFERRY_CRASH_KILLS=5000 node bin/run-tests.js crash/kill.test.ts
 */
import assert from 'node:assert/strict';
import { after, type TestContext, test } from 'node:test';
import { Campaign, type Moment, type VolumePlan } from '../lab/crash/campaign.js';
import { Spares } from '../lab/crash/daemon.js';
import { crashFolders } from '../lab/crash/folders.js';
import { MIXED } from '../lab/crash/guest.js';
import { Random, SEED } from '../lab/crash/random.js';

const KILLS = Number(process.env.BLOCKFERRY_CRASH_KILLS ?? 220);
const MIB = 1 << 20;
const MOMENTS: Moment[] = ['work', 'work', 'work', 'work', 'work', 'start', 'flush', 'close'];
/** Everything is compared after so many kills, a sample after each. */
const COMPARE_EVERY = 10;

const random = new Random(SEED);
const spares = new Spares();
const { folder, inMemory, remove } = crashFolders();

after(async () => {
  await spares.close();
  remove();
});

/** Runs lives of one volume; says the seed when something is wrong. */
async function campaign(plan: VolumePlan, lives: (campaign: Campaign) => Promise<void>): Promise<void> {
  const running = await Campaign.begin(plan, random.fork(), spares);
  try {
    await lives(running);
    running.check();
  } catch (error) {
    throw new Error(
      `after ${running.tally.kills} kills of ${plan.name}, BLOCKFERRY_SEED=${SEED}: ${(error as Error).message}`,
      {
        cause: error,
      },
    );
  } finally {
    await running.close();
  }
}

const MIXED_VOLUMES: VolumePlan[] = [
  { name: 'disk', sizeBytes: 24 * MIB + 1234, folder, rateBytesPerSecond: MIB },
  { name: 'memory', sizeBytes: 16 * MIB + 512, folder: inMemory, rateBytesPerSecond: MIB / 2 },
  { name: 'sparse', sizeBytes: 20 * MIB, folder, sparse: true, rateBytesPerSecond: MIB },
  {
    name: 'failing',
    sizeBytes: 16 * MIB,
    folder,
    sourceErrors: 0.04,
    sourceDelayMsMax: 8,
    rateBytesPerSecond: MIB,
  },
  { name: 'unhurried', sizeBytes: 24 * MIB, folder: inMemory, background: false },
];

for (const plan of MIXED_VOLUMES) {
  test(`killed at work: ${plan.name}`, async (t) => {
    await campaign(plan, async (running) => {
      const lives = Math.round((KILLS * 0.6) / MIXED_VOLUMES.length);
      for (let life = 1; life <= lives; life++)
        await running.live(running.random.pick(MOMENTS), { compare: life % COMPARE_EVERY === 0 });
      await running.finish();
      const { tally } = running;
      t.diagnostic(
        `${tally.kills} kills, ${tally.operations} answers checked (${tally.refused} refused), ` +
          `local of ${running.model.local.length} blocks on the way: ${tally.local.join(' ')}`,
      );
      assert.equal(tally.kills, lives);
    });
  });
}

/** Small volumes, one after the other, until so many kills were made; `lives` gets each when it is new and ends it. */
async function volumes(
  t: TestContext,
  plan: Omit<VolumePlan, 'name' | 'folder'> & { name: string },
  share: number,
  lives: (running: Campaign) => Promise<void>,
): Promise<void> {
  let kills = 0;
  let count = 0;
  while (kills < KILLS * share) {
    count++;
    const place = count % 2 === 0 ? folder : inMemory;
    await campaign({ ...plan, name: `${plan.name}-${count}`, folder: place }, async (running) => {
      await lives(running);
      await running.finish();
      kills += running.tally.kills;
    });
  }
  t.diagnostic(`${kills} kills of ${count} volumes`);
}

test('killed while a standby takes over at the first write', async (t) => {
  await volumes(t, { name: 'takeover', sizeBytes: MIB + 700, standby: true }, 0.12, async (running) => {
    const { model } = running;
    while (!model.keeps) {
      const { child, guest } = await running.resume();
      // Its writer was alive until now, so what was read must come from the source each time.
      if (running.phase() === 'standby') {
        await guest.readAll();
        assert.equal((await guest.compareAll()).localBlocks, 0, 'a standby kept what was read');
      }
      await running.killAtWork(child, guest, {
        answers: running.random.below(3),
        mix: { ...MIXED, read: 0 },
      });
    }
    await running.live('work', { compare: true });
  });
});

test('killed during the hand-off', async (t) => {
  await volumes(
    t,
    { name: 'handoff', sizeBytes: MIB / 2 + 4096, background: false },
    0.12,
    async (running) => {
      const last = running.model.size - 1;
      await running.live('work', { compare: true });
      for (let phase = 'relocating'; phase !== 'plain'; ) {
        const { child, guest } = await running.resume();
        phase = running.phase();
        if (phase !== 'plain') {
          await guest.readAll(last); // all but one byte, and so all but one block unless that came with another
          const handedOff = guest.read(guest.client, last, 1);
          await running.killNow(child, guest);
          await handedOff;
        } else {
          await running.killAtWork(child, guest, { answers: 20 });
        }
      }
    },
  );
});

test('killed while the volume is made', async (t) => {
  await volumes(t, { name: 'made', sizeBytes: MIB }, 0.05, async (running) => {
    for (let life = running.random.between(1, 3); life > 0; life--) await running.live('start');
    await running.live('work', { compare: true });
  });
});
