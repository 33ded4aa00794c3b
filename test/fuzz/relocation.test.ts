/**
 * Sources that send anything, behind a proxy and its guest: what is kept of them, and what the guest reads, was sent whole, and with a
 * source that behaves again all is well.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before } from 'node:test';
import fc from 'fast-check';
import { BlockferryError } from '../../src/errors.js';
import { openVolumeService } from '../../src/host/open.js';
import type { VolumeService } from '../../src/host/service.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { MemoryDevice } from '../fakes/memory-device.js';
import { inTime } from './attack.js';
import { campaign, LONG } from './campaign.js';
import { readAgain } from './client-model.js';
import { type Harm, harm, harmful, type Record, replyHarm } from './hostile.js';
import { type Relay, startRelay } from './relay.js';
import { loadSeeds } from './seeds.js';
import { Faults, serveSocket } from './target.js';
import { DISK_BYTES } from './wire.js';

const BLOCK = 4096;
const foreign = loadSeeds('client').flatMap(({ server }) => server);
const folder = mkdtempSync(join(tmpdir(), 'blockferry-fuzz-'));
const faults = new Faults();
const TIMING = {
  backoffMsMin: 2,
  backoffMsMax: 10,
  spareBackoffMs: 20,
  connectTimeoutMs: 60,
  requestTimeoutMs: 60,
  retryAfterErrorMs: 20,
};

interface Plan {
  /** What happens on each connection to the source, the first of which only asks what it is. Later ones are not harmed. */
  harms: Harm[][];
  background: boolean;
  /** Ranges the guest reads, and writes: blocks. */
  steps: { write: boolean; from: number; blocks: number }[];
}

const plan: fc.Arbitrary<Plan> = fc.record({
  harms: fc
    .tuple(
      // A source that falls silent while it is asked what it is takes ten seconds.
      fc.oneof(
        { weight: 15, arbitrary: fc.constant<Harm[]>([]) },
        { weight: LONG ? 1 : 0, arbitrary: fc.array(harm, { maxLength: 2 }) },
      ),
      fc.array(fc.array(replyHarm, { maxLength: 4 }), { minLength: 1, maxLength: 4 }),
    )
    .map(([first, others]) => [first, ...others]),
  background: fc.boolean(),
  steps: fc.array(
    fc.record({ write: fc.boolean(), from: fc.nat(15), blocks: fc.integer({ min: 1, max: 8 }) }),
    { minLength: 1, maxLength: 8 },
  ),
});

const device = new MemoryDevice(DISK_BYTES);
for (let block = 0; block < DISK_BYTES / BLOCK; block++)
  device.data.fill(block + 1, block * BLOCK, (block + 1) * BLOCK);
device.data.fill(0, 8 * BLOCK, 10 * BLOCK);
device.contexts = ['base:allocation'];
device.extents = (_context, { offset, length }) => {
  const extents: [number, number][] = [];
  for (let at = offset; at < offset + length; ) {
    const past = Math.min(offset + length, at - (at % BLOCK) + BLOCK);
    extents.push([past - at, device.data[at] === 0 ? 3 : 0]);
    at = past;
  }
  return extents;
};

let passing: () => ReturnType<typeof harmful>;
let relay: Relay;
let stop: () => Promise<void>;
before(async () => {
  const { path, listener } = await serveSocket(folder, 'honest', device, faults);
  relay = await startRelay(join(folder, 'source.sock'), path, () => passing());
  stop = async () => {
    await relay.stop();
    await listener.close();
  };
});
after(async () => {
  await stop();
  rmSync(folder, { recursive: true, force: true });
});

/** What may be at each place: told by the source, in whole answers, or written by the guest. */
class Plausible {
  readonly #values: Set<number>[] = Array.from({ length: DISK_BYTES }, () => new Set<number>());

  add(from: number, bytes: Uint8Array): void {
    for (let at = 0; at < bytes.length && from + at < DISK_BYTES; at++)
      this.#values[from + at]!.add(bytes[at]!);
  }

  /** All that one connection brought. */
  learn(record: Record): void {
    const conversation = readAgain(record);
    assert.equal(
      conversation.clientBreach,
      null,
      `our link broke the protocol: ${conversation.clientBreach}`,
    );
    for (const { request, data, status } of conversation.transmission?.answers ?? []) {
      const from = Number(request.offset);
      if (data !== null) this.add(from, data);
      for (const extents of status.values()) {
        let at = request.offset;
        for (const [length, flags] of extents) {
          const end = at + length < BigInt(DISK_BYTES) ? at + length : BigInt(DISK_BYTES);
          if ((flags & 2n) !== 0n && at < end) this.add(Number(at), Buffer.alloc(Number(end - at)));
          at += length;
        }
      }
    }
  }

  check(from: number, bytes: Uint8Array, what: string): void {
    for (let at = 0; at < bytes.length; at++)
      assert.ok(
        this.#values[from + at]!.has(bytes[at]!),
        `${what}: nobody sent the ${bytes[at]} at ${from + at}`,
      );
  }
}

let runs = 0;

async function run({ harms, background, steps }: Plan): Promise<void> {
  const records: Record[] = [];
  passing = () => {
    const record: Record = { client: [], server: [] };
    records.push(record);
    return harmful(harms[records.length - 1] ?? [], foreign, record);
  };
  const name = `disk${++runs}`;
  const image = join(folder, `${name}.img`);
  let service: VolumeService;
  try {
    service = await inTime('opening', open(name, image, background), 30_000);
  } catch (error) {
    assert.ok(error instanceof BlockferryError, String(error));
    assert.ok(harms[0]!.length > 0, error.message);
    return;
  } finally {
    assert.deepEqual(faults.told.splice(0), []);
  }
  const size = service.size;
  try {
    const sameSize = size === DISK_BYTES;
    if (!sameSize) assert.ok(harms[0]!.length > 0, `it opened as ${size} bytes`);
    const seen = sameSize ? await asGuest(service, steps) : [];
    const present = service.status().presentBytes;
    await inTime('closing', service.close());
    if (!sameSize) return;
    const plausible = new Plausible();
    for (const { write, from, bytes } of seen) if (write) plausible.add(from, bytes);
    for (const record of records) plausible.learn(record);
    for (const { write, from, bytes } of seen) if (!write) plausible.check(from, bytes, 'a read');
    assert.equal(present, DISK_BYTES);
    plausible.check(0, readFileSync(image), 'the image');
  } finally {
    await service.close();
    rmSync(join(folder, 'state', name), { recursive: true, force: true });
    rmSync(image, { force: true });
  }
  assert.deepEqual(faults.told, []);
}

function open(name: string, image: string, background: boolean): Promise<VolumeService> {
  return openVolumeService({
    stateDir: join(folder, 'state'),
    name,
    image,
    mode: {
      kind: 'proxy',
      sourceUri: `nbd+unix:///disk?socket=${relay.address}`,
      ...{ standby: false, background, rateBytesPerSecond: null, sourceTimeoutMs: null },
    },
    log: faults.log,
    timing: TIMING,
  });
}

interface Passed {
  write: boolean;
  from: number;
  bytes: Buffer;
}

/** The guest's steps, some of which may fail while the source does; then everything, which must not. */
async function asGuest(service: VolumeService, steps: Plan['steps']): Promise<Passed[]> {
  const { path, listener } = await serveSocket(folder, 'guest', service.guest, faults);
  const guest = await NbdClient.connect(`nbd+unix:///?socket=${path}`);
  try {
    const passed: Passed[] = [];
    const step = async ({ write, from, blocks }: Plan['steps'][number], index: number): Promise<void> => {
      const offset = from * BLOCK + (write ? 512 : 0);
      const bytes = Buffer.alloc(Math.min(blocks * BLOCK, DISK_BYTES - offset), 0x80 + index);
      passed.push({ write, from: offset, bytes });
      if (write) await guest.write(offset, bytes, 0, bytes.length);
      else await guest.read(offset, bytes.length, bytes);
    };
    const results = await inTime('the guest', Promise.allSettled(steps.map(step)), 30_000);
    const good = passed.filter(({ write }, index) => write || results[index]!.status === 'fulfilled');
    await inTime('the rest', readAll(guest, good), 30_000);
    return good;
  } finally {
    guest.destroy();
    await listener.close();
  }
}

/** The source recovers: an error is over when its connection is. */
async function readAll(guest: NbdClient, passed: Passed[]): Promise<void> {
  for (;;) {
    try {
      const bytes = Buffer.alloc(DISK_BYTES);
      await guest.read(0, DISK_BYTES, bytes);
      passed.push({ write: false, from: 0, bytes });
      return;
    } catch (error) {
      assert.equal((error as BlockferryError).code, 'source-io', String(error));
    }
  }
}

campaign('a proxy and its guest', { runs: 20, share: 0.15 }, plan, run);
