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
import { accessSync, constants, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import { Campaign, type Moment, type VolumePlan } from '../lab/crash/campaign.js';
import { Spares } from '../lab/crash/daemon.js';
import { Random, SEED } from '../lab/crash/random.js';

const KILLS = Number(process.env.BLOCKFERRY_CRASH_KILLS ?? 220);
const MIB = 1 << 20;
const MOMENTS: Moment[] = ['work', 'work', 'work', 'work', 'work', 'start', 'flush', 'close'];
/** Everything is compared after so many kills, a sample after each. */
const COMPARE_EVERY = 10;

const random = new Random(SEED);
const spares = new Spares();
const folder = mkdtempSync(join(tmpdir(), 'blockferry-crash-'));
const inMemory = memoryFolder();
let kills = 0;

after(async () => {
  await spares.close();
  for (const path of [folder, inMemory]) rmSync(path, { recursive: true, force: true });
});

/** A folder on tmpfs, where reads take another path; on the disk where there is none. */
function memoryFolder(): string {
  try {
    accessSync('/dev/shm', constants.W_OK);
    return mkdtempSync('/dev/shm/blockferry-crash-');
  } catch {
    return mkdtempSync(join(tmpdir(), 'blockferry-crash-'));
  }
}

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
    kills += running.tally.kills;
    await running.close();
  }
}

const MIXED_VOLUMES: VolumePlan[] = [
  { name: 'disk', sizeBytes: 24 * MIB + 1234, folder, rateBytesPerSecond: MIB },
  { name: 'memory', sizeBytes: 16 * MIB + 512, folder: inMemory, rateBytesPerSecond: MIB / 2 },
  { name: 'sparse', sizeBytes: 20 * MIB, folder, sparse: true, rateBytesPerSecond: MIB },
  { name: 'failing', sizeBytes: 16 * MIB, folder, sourceErrors: 0.01, sourceDelayMsMax: 8 },
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
