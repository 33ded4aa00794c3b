/** A proxy that is stopped goes on where it was, in every phase, whether its source is there or not. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { openVolumeService } from '../../../src/host/open.js';
import { Errno } from '../../../src/nbd/constants.js';
import { describeVolume } from '../../../src/relocation/source-identity.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  isSettled,
  Lab,
  log,
  MIB,
  pattern,
  quiet,
  readAt,
  until,
  VOLUME_ID,
  writeAt,
} from '../../lab/ferry.js';

const DATA = pattern(MIB);

function code(wanted: string) {
  return (error: unknown): boolean => error instanceof BlockferryError && error.code === wanted;
}

test('standby: still standby, nothing kept, and takeover works', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.arrive(source);
  await readAt(await before.guest(), 0, MIB);
  const proxy = await before.restart();
  const guest = await proxy.guest();
  assert.deepEqual(
    [proxy.status.phase, proxy.status.generation, proxy.status.presentBytes],
    ['standby', 1, 0],
  );
  assert.equal(await errnoOfRequest(writeAt(guest, 0, Buffer.alloc(BLOCK))), Errno.EPERM);
  source.device.data.fill(7);
  await proxy.service.takeover(2);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assertBlocks(await readAt(guest, 0, MIB), Buffer.alloc(MIB, 7));
});

test('standby without a coordinator still takes over at the first write', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await (await lab.proxy(source, { standby: true })).restart();
  const guest = await proxy.guest();
  await writeAt(guest, 1, Buffer.alloc(1, 1));
  assert.equal(proxy.status.phase, 'relocating');
});

test('relocating, not yet settled: what was fetched is here, and a retreat still drops it', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.arrive(source);
  await before.service.takeover(2);
  await until(() => before.status.presentBytes === MIB, 'all is here');
  const proxy = await before.restart();
  assert.deepEqual([proxy.status.phase, proxy.status.presentBytes], ['relocating', MIB]);
  await quiet();
  assert.equal(proxy.status.handoffAt, null);
  source.device.data.fill(8);
  await proxy.service.retreat();
  const again = await proxy.restart();
  assert.deepEqual([again.status.phase, again.status.presentBytes], ['standby', 0]);
  await again.service.takeover(3);
  assertBlocks(await readAt(await again.guest(), 0, MIB), Buffer.alloc(MIB, 8));
});

test('relocating: what is here is not fetched again, writes survive, the rest follows', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.proxy(source);
  const guest = await before.guest();
  await readAt(guest, 0, 10 * BLOCK);
  await writeAt(guest, 20 * BLOCK, Buffer.alloc(BLOCK, 3));
  await writeAt(guest, 30 * BLOCK + 5, Buffer.alloc(9, 4));
  const proxy = await before.restart();
  assert.equal(proxy.status.presentBytes, 12 * BLOCK);
  await proxy.service.handedOff();
  const expected = Buffer.from(DATA)
    .fill(3, 20 * BLOCK, 21 * BLOCK)
    .fill(4, 30 * BLOCK + 5, 30 * BLOCK + 14);
  assertBlocks(await readAt(await proxy.guest(), 0, MIB), expected);
  const twice = [...source.readsPerBlock()].filter(([, times]) => times > 1);
  assert.deepEqual(twice, []);
});

test('all here and settled, but stopped before the hand-off: it is handed off at once', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  source.hold(({ offset }) => offset > 0);
  const before = await lab.arrive(source);
  await before.service.takeover(2);
  await before.service.settle();
  source.hold(() => true);
  const guest = await before.guest();
  await writeAt(guest, 0, Buffer.alloc(MIB - BLOCK, 5));
  await before.close();
  source.device.manner = () => 'now';
  const proxy = await before.restart();
  await proxy.service.handedOff();
  assert.equal(proxy.status.phase, 'plain');
});

test('plain, after its hand-off: no link, no source', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.proxy(source, { background: true });
  await before.service.handedOff();
  await source.stop();
  const { handoffAt } = before.status;
  const proxy = await before.restart();
  assert.deepEqual(
    [proxy.status.phase, proxy.status.source, proxy.status.handoffAt],
    ['plain', null, handoffAt],
  );
  await proxy.service.handedOff();
  assertBlocks(await readAt(await proxy.guest(), 0, MIB), DATA);
});

test('sealed after its hand-off: reads for the next destination only, unsealed with proof', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.proxy(source, { background: true });
  await before.service.handedOff();
  await before.service.seal(9);
  const proxy = await before.restart();
  const guest = await proxy.guest();
  assert.equal(proxy.status.phase, 'sealed');
  assert.equal(await errnoOfRequest(readAt(guest, 0, BLOCK)), Errno.EPERM);
  await proxy.service.unseal({ volumeId: proxy.service.id, generation: 9 });
  assertBlocks(await readAt(guest, 0, MIB), DATA);
});

test('a source that is down when the proxy starts: hits are served, misses wait until it is there', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const before = await lab.proxy(source);
  await readAt(await before.guest(), 0, 2 * BLOCK);
  await before.close();
  await source.stop();
  const proxy = await before.restart();
  const guest = await proxy.guest();
  const { source: seen, background } = proxy.status;
  assert.deepEqual([seen!.state, background.state], ['connecting', 'waiting']);
  const miss = readAt(guest, 0, MIB);
  assertBlocks(await readAt(guest, 0, 2 * BLOCK), DATA.subarray(0, 2 * BLOCK));
  await writeAt(guest, 5 * BLOCK, DATA.subarray(5 * BLOCK, 6 * BLOCK));
  await guest.flush();
  await until(() => proxy.status.source?.error != null, 'the status says why');
  assert.equal(await isSettled(miss), false);
  await source.start();
  assertBlocks(await miss, DATA);
  await proxy.service.handedOff();
});

test('the lost source comes back without an operator, again and again (xNBD fault 5)', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(4 * MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  for (let round = 0; round < 4; round++) {
    await source.stop();
    await until(() => proxy.status.source!.state === 'lost', 'the loss shows');
    const miss = readAt(guest, round * MIB, MIB);
    await quiet();
    assert.equal(await isSettled(miss), false);
    await source.start();
    assertBlocks(await miss, source.device.data.subarray(round * MIB, (round + 1) * MIB));
    assert.equal(proxy.status.source?.state ?? 'connected', 'connected');
  }
});

test('a proxy resumes only from the source it comes from, and reads from no other disk there', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const other = await lab.source(MIB);
  const before = await lab.proxy(source);
  await readAt(await before.guest(), 0, BLOCK);
  await before.close();
  const options = (sourceUri: string) => ({
    stateDir: join(lab.dir, 'state'),
    name: before.name,
    image: before.image,
    mode: {
      kind: 'proxy' as const,
      sourceUri,
      standby: false,
      background: true,
      rateBytesPerSecond: null,
      sourceTimeoutMs: null,
    },
    log,
  });
  await assert.rejects(openVolumeService(options(other.uri)), code('state-mismatch'));
  const { device } = source;
  source.device = new MemoryDevice(MIB + BLOCK);
  const proxy = await lab.proxy(source, {
    name: before.name,
    image: before.image,
    mode: options(source.uri).mode,
  });
  await until(() => proxy.status.source!.state === 'mismatch', 'the mismatch shows');
  assert.match(proxy.status.source!.error!, /size is/);
  assert.equal(source.reads.length, 0);
  source.device = device;
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), DATA);
});

test('a source that is not there is an error for a new proxy, and leaves nothing behind', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  await source.stop();
  await assert.rejects(lab.proxy(source, { name: 'new' }), code('source-unreachable'));
  await source.start();
  await lab.proxy(source, { name: 'new' });
});

test('a source of another size than the move announced is refused', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const announced = { ...source, uri: source.uri, device: { size: 2 * MIB } } as unknown as typeof source;
  await assert.rejects(lab.arrive(announced), code('source-mismatch'));
});

test('a source that is another volume than the move announced is refused', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  source.description = describeVolume('another', 1);
  await assert.rejects(lab.arrive(source), code('source-mismatch'));
  source.description = describeVolume(VOLUME_ID, 7);
  await lab.arrive(source);
});

test('closing a proxy whose source hangs takes no time, and its guests are told', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source, { background: true });
  source.hold();
  const guest = await proxy.guest();
  const failed = assert.rejects(readAt(guest, 0, MIB));
  await quiet();
  const began = performance.now();
  await proxy.service.close();
  await failed;
  assert.ok(performance.now() - began < 5000, 'it waits for nobody');
  await assert.rejects(proxy.service.handedOff(), code('closed'));
});
