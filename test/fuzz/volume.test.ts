/**
 * Clients that send anything, over unix sockets, one or several at a time, in front of real volumes: a plain one, and a proxy whose
 * blocks come from a source. Disk and source are what they must be afterwards. bin/fuzz and test/fuzz/sanitized.test.ts run this with the
 * native addon under sanitizers.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import fc from 'fast-check';
import { openVolumeService } from '../../src/host/open.js';
import type { VolumeService } from '../../src/host/service.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { MemoryDevice } from '../fakes/memory-device.js';
import { type Attack, attack, carryOut, inTime } from './attack.js';
import { campaign } from './campaign.js';
import type { Conversation } from './conversation.js';
import { checkDisk } from './disk-model.js';
import { SocketLine } from './line.js';
import { loadSeeds } from './seeds.js';
import { Faults, serveSocket } from './target.js';
import { DISK_BYTES } from './wire.js';

const seeds = loadSeeds('server');
const folder = mkdtempSync(join(tmpdir(), 'blockferry-fuzz-'));
const faults = new Faults();
const stateDir = join(folder, 'state');
const content = Buffer.alloc(DISK_BYTES, 'what the disk holds ');
const attacks = fc.array(attack, { minLength: 1, maxLength: 3 });

after(() => rmSync(folder, { recursive: true, force: true }));

/** All at once on one volume. */
async function attackVolume(plans: readonly Attack[], service: VolumeService): Promise<Conversation[]> {
  const { path, listener } = await serveSocket(folder, 'attacked', service.guest, faults);
  try {
    return await Promise.all(
      plans.map(async (plan) => {
        const line = new SocketLine(path, plan.reader);
        try {
          return await carryOut(plan, seeds, line);
        } finally {
          line.abort();
        }
      }),
    );
  } finally {
    await inTime('the listener', listener.close());
    assert.deepEqual(faults.told, []);
  }
}

/** What the disk may hold is known only where all was seen. */
function checkAll(
  plans: readonly Attack[],
  seen: readonly Conversation[],
  before: Buffer,
  disk: Buffer,
): void {
  if (plans.some(({ ending }) => ending === 'abort') || seen.some(({ lost }) => lost)) return;
  const transmissions = seen.flatMap(({ transmission }) => transmission ?? []);
  const alone = transmissions.length === 1 && !transmissions[0]!.overlapping;
  checkDisk(before, transmissions, disk, alone && transmissions[0]!.waiting === 0);
}

let plain: Promise<VolumeService> | null = null;
after(async () => (await plain)?.close());

function openPlain(image: string): Promise<VolumeService> {
  writeFileSync(image, content);
  return openVolumeService({
    stateDir,
    name: 'plain',
    image,
    mode: { kind: 'serve', readOnly: false },
    log: faults.log,
  });
}

campaign('a plain volume', { runs: 250, share: 0.25 }, attacks, async (plans) => {
  const image = join(folder, 'plain.img');
  plain ??= openPlain(image);
  const service = await plain;
  const before = readFileSync(image);
  const seen = await attackVolume(plans, service);
  checkAll(plans, seen, before, readFileSync(image));
  assert.equal(service.status().error, null);
});

/** What a client that behaves finds. */
async function readAll(device: VolumeService): Promise<Buffer> {
  const { path, listener } = await serveSocket(folder, 'read', device.guest, faults);
  const client = await NbdClient.connect(`nbd+unix:///?socket=${path}`);
  try {
    const disk = Buffer.alloc(DISK_BYTES);
    await inTime('reading all', client.read(0, DISK_BYTES, disk));
    return disk;
  } finally {
    await client.close();
    await listener.close();
  }
}

let proxies = 0;

campaign(
  'a proxy',
  { runs: 30, share: 0.15 },
  fc.tuple(attacks, fc.boolean()),
  async ([plans, background]) => {
    const name = `proxy${++proxies}`;
    const origin = new MemoryDevice(DISK_BYTES);
    content.copy(origin.data);
    const source = await serveSocket(folder, 'source', origin, faults);
    const service = await openVolumeService({
      stateDir,
      name,
      image: join(folder, `${name}.img`),
      mode: {
        kind: 'proxy',
        sourceUri: `nbd+unix:///?socket=${source.path}`,
        ...{ standby: false, background, rateBytesPerSecond: null, sourceTimeoutMs: null },
      },
      log: faults.log,
    });
    try {
      const seen = await attackVolume(plans, service);
      checkAll(plans, seen, content, await readAll(service));
      assert.ok(origin.data.equals(content), 'the source was written to');
    } finally {
      await inTime('closing the proxy', service.close());
      await source.listener.close();
      rmSync(join(stateDir, name), { recursive: true, force: true });
      rmSync(join(folder, `${name}.img`), { force: true });
    }
  },
);
