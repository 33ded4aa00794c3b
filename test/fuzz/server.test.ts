/**
 * Clients that send anything, in front of our server on a device in memory: it never crashes or hangs, holds a bounded amount of memory,
 * answers by the protocol's grammar, and does exactly what it says.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import fc from 'fast-check';
import { IN_FLIGHT_BYTES_MAX, PAYLOAD_BYTES_MAX } from '../../src/nbd/constants.js';
import { OUTPUT_SLAB_BYTES } from '../../src/nbd/server/output.js';
import { TlsAcceptor } from '../../src/nbd/server/tls-acceptor.js';
import type { TlsMode } from '../../src/nbd/tls.js';
import { type Manner, MemoryDevice } from '../fakes/memory-device.js';
import { type Attack, attack, carryOut, inTime } from './attack.js';
import { campaign } from './campaign.js';
import { checkDisk } from './disk-model.js';
import { MemoryLine } from './line.js';
import { loadSeeds } from './seeds.js';
import { Faults, serveStream } from './target.js';
import { DISK_BYTES } from './wire.js';

const seeds = loadSeeds('server');
const before = Buffer.alloc(DISK_BYTES);
for (let at = 0; at < DISK_BYTES; at++) before[at] = (at >> 9) & 0xff;

const manners = fc.oneof(
  fc.constant(['now' as const]),
  fc.array(fc.constantFrom<Manner>('now', 'sync', 'turn'), { minLength: 1, maxLength: 5 }),
);

interface Server {
  manners: readonly Manner[];
  readOnly: boolean;
  tls: TlsMode;
}

const server: fc.Arbitrary<Server> = fc.record({
  manners,
  readOnly: fc.nat(9).map((n) => n === 9),
  tls: fc.oneof(
    { weight: 8, arbitrary: fc.constant('off' as const) },
    { weight: 1, arbitrary: fc.constantFrom('allowed' as const, 'required' as const) },
  ),
});
const USUAL: Server = { manners: ['now'], readOnly: false, tls: 'off' };

const folder = mkdtempSync(join(tmpdir(), 'blockferry-fuzz-'));
after(() => rmSync(folder, { recursive: true, force: true }));
const pskFile = join(folder, 'keys.psk');
writeFileSync(pskFile, `alice:${'5a'.repeat(32)}\n`, { mode: 0o600 });
const acceptors = {
  off: null,
  allowed: new TlsAcceptor({ mode: 'allowed', pskFile }),
  required: new TlsAcceptor({ mode: 'required', pskFile }),
};

async function run(plan: Attack, { manners: delays, readOnly, tls }: Server): Promise<void> {
  const device = new MemoryDevice(DISK_BYTES, { readOnly });
  before.copy(device.data);
  device.contexts = ['base:allocation', 'qemu:allocation-depth'];
  let turn = 0;
  device.manner = () => delays[turn++ % delays.length]!;
  const faults = new Faults();
  const line = new MemoryLine(plan.reader);
  const connection = serveStream(line.stream, device, faults, acceptors[tls]);
  const conversation = await carryOut(plan, seeds, line);
  line.abort();
  await inTime('the session', connection.closed);
  assert.deepEqual(faults.told, []);
  assert.ok(device.released <= 1, 'released more than once');
  assert.equal(device.released, conversation.transmission === null ? device.released : 1);
  assert.ok(line.heldMax <= IN_FLIGHT_BYTES_MAX + PAYLOAD_BYTES_MAX + OUTPUT_SLAB_BYTES);
  const { transmission, lost } = conversation;
  // Who is gone before the answers come does not know how far the server got.
  if (transmission === null) assert.ok(plan.ending === 'abort' || device.data.equals(before), 'written to');
  else if (!lost) {
    const immediate = !delays.includes('turn');
    const exact = transmission.waiting === 0 && (immediate || !transmission.overlapping);
    checkDisk(before, [transmission], device.data, exact);
  }
}

campaign(
  'clients that send anything',
  { runs: 2500, share: 0.3 },
  fc.tuple(attack, server),
  ([plan, serving]) => run(plan, serving),
);

test('the recordings as they are', async () => {
  for (let seed = 0; seed < seeds.length; seed++)
    for (const pieces of [[], [1], [Number.MAX_SAFE_INTEGER]])
      await run({ seed, mutations: [], pieces, ending: 'patient', cut: 1000, reader: 'eager' }, USUAL);
});
