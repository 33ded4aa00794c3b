/** One client that gives its session no rest takes only so much of each turn of the event loop, which the other sessions wait for. */
import assert from 'node:assert/strict';
import { afterEach, describe, it } from 'node:test';
import { until } from '../../fakes/raw-client.js';
import { type Flood, Rig, read, withoutDirect, write } from '../../support/direct-session.js';
import { patterned } from '../../support/volume.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;
const B = 4096;
const ROUNDS = 300;
const CONTENT = patterned(SIZE);

const rig = new Rig();
afterEach(rig.end);

const many = Array.from({ length: 128 }, (_, i) => i);
const few = [0, 1, 2, 3];
/** `mostMiB`: what may be read or written in one turn. It is more than a session means to, which is limited by time as well. */
const floods: [name: string, mostMiB: number, roundBytes: number, flood: Flood][] = [
  ['small READs', 20, 128 * B, [many.map((i) => read(i, i * B, B)), 128 * (16 + B), 30]],
  ['READs of 60,000 bytes', 32, 128 * 60_000, [many.map((i) => read(i, i * B, 60_000)), 128 * 60_016, 30]],
  ['small WRITEs', 12, 128 * B, [many.map((i) => write(i, i * B, CONTENT.subarray(0, B))), 128 * 16, 1]],
  ['long READs', 32, 4 * MIB, [few.map((i) => read(i, i * MIB, MIB)), 4 * (16 + MIB), 1]],
  ['long WRITEs', 64, 4 * MIB, [few.map((i) => write(i, i * MIB, CONTENT.subarray(0, MIB))), 4 * 16, 1]],
];

for (const way of ['with direct access', 'without']) {
  describe(`session ${way}: a flood`, () => {
    for (const [name, mostMiB, roundBytes, flood] of floods) {
      it(`of ${name} leaves turns to others`, async () => {
        const { device } = rig.disk(CONTENT);
        const flooding = rig.flood(way === 'without' ? withoutDirect(device) : device, flood);
        await until(() => flooding.rounds > 0);
        let [last, most] = [flooding.rounds, 0];
        while (last < ROUNDS) {
          await new Promise((resolve) => setImmediate(resolve));
          most = Math.max(most, flooding.rounds - last);
          last = flooding.rounds;
        }
        const inMiB = (most * roundBytes) / MIB;
        assert.ok(inMiB <= mostMiB, `${inMiB} MiB in one turn`);
      });
    }
  });
}
