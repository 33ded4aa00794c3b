/**
 * The machine loses power at random moments of guest I/O through the proxy, and boots again: what a flush or FUA covered is there, what
 * came later is there or not, and no block is stale or foreign. What the machine finds on its disk is worked out from the daemon's
 * system calls (test/lab/crash/power.ts). Now and then only the daemon dies.
 *
 * BLOCKFERRY_CRASH_KILLS=N makes about N crashes, BLOCKFERRY_SEED=S repeats the choices of a run.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Campaign, type Moment, type Tally, type VolumePlan } from '../lab/crash/campaign.js';
import { Spares } from '../lab/crash/daemon.js';
import { crashFolders } from '../lab/crash/folders.js';
import { MIXED } from '../lab/crash/guest.js';
import { Machine } from '../lab/crash/machine.js';
import { Random, SEED } from '../lab/crash/random.js';

const KILLS = Number(process.env.BLOCKFERRY_CRASH_KILLS ?? 96);
const MIB = 1 << 20;
const MOMENTS: Moment[] = ['work', 'work', 'work', 'start', 'flush', 'close', 'stopped'];
/** Flushes are frequent: what they promise is what is tested. */
const MIX = { ...MIXED, flush: 12 };

const random = new Random(SEED);
const { inMemory, remove } = crashFolders();
const machine = new Machine(inMemory);
const spares = new Spares(() => machine.env());

after(async () => {
  await spares.close();
  remove();
});

const VOLUMES: Omit<VolumePlan, 'folder' | 'machine'>[] = [
  { name: 'disk', sizeBytes: 6 * MIB + 700, rateBytesPerSecond: MIB },
  { name: 'sparse', sizeBytes: 4 * MIB, sparse: true, background: false },
  { name: 'standby', sizeBytes: 2 * MIB, standby: true, rateBytesPerSecond: MIB },
  { name: 'handoff', sizeBytes: MIB },
];

/** A volume has most to lose while few of its blocks are here: after so many crashes a new one is taken. */
const CRASHES_PER_VOLUME = 8;

async function crashes(plan: VolumePlan, count: number): Promise<Tally> {
  const running = await Campaign.begin(plan, random.fork(), spares);
  try {
    for (let life = 0; life < count; life++)
      await running.live(running.random.pick(MOMENTS), { compare: true, mix: MIX });
    await running.finish();
    return running.tally;
  } catch (error) {
    const where = `after ${running.tally.kills} crashes of ${plan.name}, BLOCKFERRY_SEED=${SEED}`;
    throw new Error(`${where}: ${(error as Error).message}`, { cause: error });
  } finally {
    await running.close();
  }
}

for (const plan of VOLUMES) {
  test(`power lost at work: ${plan.name}`, async (t) => {
    const tallies: Tally[] = [];
    for (let left = Math.round(KILLS / VOLUMES.length); left > 0; left -= CRASHES_PER_VOLUME) {
      const name = `${plan.name}-${tallies.length + 1}`;
      tallies.push(
        await crashes({ ...plan, name, folder: inMemory, machine }, Math.min(left, CRASHES_PER_VOLUME)),
      );
    }
    const sum = (what: 'kills' | 'powerLosses' | 'operations') =>
      tallies.reduce((total, tally) => total + tally[what], 0);
    t.diagnostic(
      `${sum('powerLosses')} losses of power of ${sum('kills')} crashes, ${sum('operations')} answers checked`,
    );
    assert.ok(sum('powerLosses') > 0);
  });
}
