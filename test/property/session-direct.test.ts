/**
 * A session that carries requests out around JavaScript (native/src/exchange.h) does what one does that asks its device for each: the same
 * answers, and the same disk in the end; on an image, and on a volume whose blocks come late.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { ImageDevice } from '../../src/library/image-device.js';
import { Command, CommandFlag, type ReplyForm } from '../../src/nbd/constants.js';
import type { BlockDevice, IoRequest } from '../../src/nbd/device.js';
import { BLOCK_BYTES, blocksOf } from '../../src/volume/blocks.js';
import { GuestDevice } from '../../src/volume/faces.js';
import type { RawClient, RawRequest, Reply } from '../fakes/raw-client.js';
import { served, type Transport, withoutDirect } from '../support/direct-session.js';
import { HeldSource, patterned, sparseFile, tempFolder } from '../support/volume.js';
import { proxiedVolume } from '../support/volumes.js';

/** The last block is cut short. */
const SIZE = (512 << 10) + 300;
const BLOCKS = blocksOf(SIZE);
const { READ, WRITE, FLUSH, TRIM, WRITE_ZEROES } = Command;
const { FUA, DF, NO_HOLE } = CommandFlag;
/** One in memory, one on a disk: they are read in different ways. */
const PARENTS = ['/dev/shm', undefined].filter((parent) => parent === undefined || existsSync(parent));

const offset = fc.oneof(
  fc.nat(SIZE).map(BigInt),
  fc.nat(BLOCKS - 1).map((block) => BigInt(block * BLOCK_BYTES)),
  fc.constantFrom(0n, BigInt(SIZE), BigInt(SIZE - 1), 2n ** 53n, 2n ** 64n - 512n),
);
const length = fc.oneof(
  fc.nat(300),
  fc.nat(9000),
  fc.constantFrom(4096, 8192, 65_535, 65_536, 131_072),
  fc.constantFrom(0, 131_073, 262_144, 300_001, SIZE),
);
const operation = fc.record({
  command: fc.constantFrom(READ, READ, READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM, WRITE_ZEROES, 12),
  flags: fc.constantFrom(0, 0, 0, 0, 0, FUA, DF, NO_HOLE, 0x1000),
  offset,
  length,
  seed: fc.nat(255),
});
type Operation = typeof operation extends fc.Arbitrary<infer T> ? T : never;

interface Batch {
  operations: Operation[];
  /** Where its bytes are cut, and how many turns pass there. */
  cuts: [at: number, turns: number][];
  /** A write is said to have been held up. */
  slow: boolean;
}
const batches = fc.array(
  fc.record<Batch>({
    operations: fc.array(operation, { maxLength: 30 }),
    cuts: fc.array(fc.tuple(fc.nat(2_000_000), fc.nat(3)), { maxLength: 8 }),
    slow: fc.integer({ min: 0, max: 5 }).map((one) => one === 0),
  }),
  { maxLength: 6 },
);
const forms = fc.constantFrom<ReplyForm>('simple', 'structured', 'extended');
const transports = fc.constantFrom<Transport>('descriptor', 'descriptor', 'descriptor', 'events');

/** Of requests in flight together, no two may touch the same bytes if one changes them: their order is free. */
function compatible(operations: readonly Operation[]): Operation[] {
  const kept: Operation[] = [];
  for (const one of operations) {
    const clash = kept.some(
      (other) =>
        one.offset < other.offset + BigInt(other.length) &&
        other.offset < one.offset + BigInt(one.length) &&
        (one.command !== READ || other.command !== READ),
    );
    if (!clash) kept.push(one);
  }
  return kept;
}

function requestOf(
  { command, flags, offset: at, length: bytes, seed }: Operation,
  cookie: number,
): RawRequest {
  const about = command === WRITE ? { payload: patterned(bytes, seed) } : { length: bytes };
  return { command, flags, offset: at, cookie, ...about };
}

async function sendCut(client: RawClient, requests: Buffer, cuts: Batch['cuts']): Promise<void> {
  const sorted = cuts.map(([at, turns]) => [at % (requests.length + 1), turns] as const);
  sorted.sort(([a], [b]) => a - b);
  let from = 0;
  for (const [to, turns] of [...sorted, [requests.length, 0] as const]) {
    if (to > from) client.socket.write(requests.subarray(from, to));
    from = to;
    for (let turn = 0; turn < turns; turn++) await new Promise((resolve) => setImmediate(resolve));
  }
}

/** Everything of a reply that does not depend on how zeros are found. */
type Answer = [cookie: number, errno: number, data: string | null, simple: boolean, message: string];

function answerOf({ cookie, errno, data, simple, message }: Reply): Answer {
  return [cookie, errno, errno === 0 && data ? data.toString('latin1') : null, simple, message];
}

interface Subject {
  device: BlockDevice;
  /** What the disk holds, when the session is over. */
  content(): Promise<Buffer>;
  /** What was counted, if it is. */
  heat?: Uint8Array;
}

interface Result {
  answers: Answer[];
  content: Buffer;
}

async function resultOf(
  { device, content }: Subject,
  form: ReplyForm,
  transport: Transport,
  history: readonly Batch[],
): Promise<Result> {
  const { session, client } = served(device, form, transport);
  const answers: Answer[] = [];
  let cookie = 0;
  for (const { operations, cuts, slow } of history) {
    if (slow) device.directWriteHeldUp?.();
    const requests = compatible(operations).map((one) => client.encode(requestOf(one, ++cookie)));
    client.replies.length = 0;
    await sendCut(client, Buffer.concat(requests), cuts);
    const replies = await client.got(requests.length);
    answers.push(...replies.map(answerOf).sort(([a], [b]) => a - b));
  }
  assert.equal(session.inFlight, 0);
  client.socket.end();
  await session.closed;
  return { answers, content: await content() };
}

async function same(one: Subject, other: Subject, ...rest: [ReplyForm, Transport, Batch[]]): Promise<void> {
  const direct = await resultOf(one, ...rest);
  const asked = await resultOf({ ...other, device: withoutDirect(other.device) }, ...rest);
  assert.deepEqual(direct.answers, asked.answers);
  assert.ok(direct.content.equals(asked.content));
  assert.deepEqual(one.heat, other.heat);
}

function imageIn(folder: string, content: Buffer): Subject {
  const path = sparseFile(content.length, folder);
  writeFileSync(path, content, { flag: 'r+' });
  const device = new ImageDevice(path, false);
  return {
    device,
    async content() {
      await device.close();
      return readFileSync(path);
    },
  };
}

/** What is demanded comes some turns later. */
class LateSource extends HeldSource {
  override demand(first: number, end: number): void {
    setImmediate(() => assert.equal(this.deliver(first, end), 0));
  }

  override readThrough(request: IoRequest): void {
    super.readThrough(request);
    setImmediate(() => this.answerThrough());
  }
}

/** A volume that has taken over, with these blocks here already. */
async function volumeIn(folder: string, content: Buffer, here: readonly number[]): Promise<Subject> {
  const volume = await proxiedVolume(folder, { size: content.length });
  const { store } = volume;
  const source = new LateSource(store, content);
  await volume.takeover();
  volume.heatFile.stop(); // nothing decays
  for (const block of here) assert.equal(source.deliver(block, block + 1), 0);
  return {
    device: new GuestDevice(volume),
    heat: volume.heat.bytes,
    async content() {
      assert.equal(source.deliver(0, store.blocks), 0);
      assert.ok(store.presence === null || store.presence.complete);
      const bytes = readFileSync(store.image.path);
      await volume.close();
      return bytes;
    },
  };
}

describe('session: with and without direct access', () => {
  it('does the same on an image', async () => {
    const folders = PARENTS.map((parent) => tempFolder(parent));
    const content = patterned(SIZE).fill(0, 100_000, 300_000);
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...folders), forms, transports, batches, async (folder, ...rest) => {
        await same(imageIn(folder, content), imageIn(folder, content), ...rest);
      }),
      { numRuns: 60 },
    );
  });

  it('does the same on a volume whose blocks are still coming', async () => {
    const content = patterned(SIZE);
    const blocks = fc.array(fc.nat(BLOCKS - 1), { maxLength: 100 });
    await fc.assert(
      fc.asyncProperty(
        fc.constantFrom(...PARENTS),
        blocks,
        forms,
        transports,
        batches,
        async (parent, here, ...rest) => {
          const [one, other] = [tempFolder(parent), tempFolder(parent)];
          await same(await volumeIn(one, content, here), await volumeIn(other, content, here), ...rest);
        },
      ),
      { numRuns: 30 },
    );
  });
});
