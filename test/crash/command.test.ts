/**
 * The real command, `blockferry proxy`, killed with -9 while a guest works on its disk; its next life is compared with the same model as
 * in kill.test.ts, where the reasons and the settings are.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Campaign, type Moment } from '../lab/crash/campaign.js';
import { crashFolders } from '../lab/crash/folders.js';
import { Random, SEED } from '../lab/crash/random.js';

const KILLS = Math.ceil(Number(process.env.BLOCKFERRY_CRASH_KILLS ?? 220) / 15);
const MIB = 1 << 20;
const MOMENTS: Moment[] = ['work', 'work', 'work', 'start', 'flush', 'close', 'stopped'];

const random = new Random(SEED);
const { folder, remove } = crashFolders();
after(remove);

for (const standby of [false, true]) {
  test(`blockferry proxy${standby ? ' --standby' : ''} is killed at work`, async (t) => {
    const name = standby ? 'standby' : 'disk';
    const plan = { name, sizeBytes: 8 * MIB + 100, folder, standby, rateBytesPerSecond: MIB };
    const running = await Campaign.begin(plan, random.fork(), 'command');
    try {
      await running.live('work');
      for (let life = 2; life <= KILLS; life++)
        await running.live(running.random.pick(MOMENTS), { compare: true });
      await running.finish();
    } catch (error) {
      const where = `after ${running.tally.kills} kills, BLOCKFERRY_SEED=${SEED}`;
      throw new Error(`${where}: ${(error as Error).message}`, { cause: error });
    } finally {
      await running.close();
    }
    const { kills, operations } = running.tally;
    t.diagnostic(`${kills} kills, ${operations} answers checked`);
    assert.ok(operations > 0);
  });
}
