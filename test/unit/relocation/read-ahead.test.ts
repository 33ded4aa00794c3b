/** Read-ahead and neighbours, of a proxy over a source: what is fetched in front of the guest, and when it no longer is. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import type { BlockDevice } from '../../../src/nbd/device.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  KIB,
  Lab,
  MIB,
  quiet,
  readAt,
  until,
  writeAt,
} from '../../lab/ferry.js';
import { changed } from '../../support/direct-session.js';

const SIZE = 16 * MIB;
const STEP = 64 * KIB;

async function streaming(t: Parameters<typeof lab>[0]) {
  const { source, proxy, guest } = await lab(t, { readAhead: true });
  await readAt(guest, 0, STEP);
  await readAt(guest, STEP, STEP);
  await until(() => proxy.status.presentBytes > 3 * STEP, 'something is fetched ahead');
  return { source, proxy, guest };
}

async function lab(
  t: ConstructorParameters<typeof Lab>[0],
  options: { readAhead?: boolean; order?: 'hot' | 'linear'; background?: boolean },
) {
  const ferries = new Lab(t);
  const source = await ferries.source(SIZE);
  const proxy = await ferries.proxy(source, options);
  return { source, proxy, guest: await proxy.guest() };
}

test('a guest that reads in order finds the next blocks here, each of which crossed once', async (t) => {
  const { source, proxy, guest } = await lab(t, { readAhead: true });
  for (let at = 0; at < SIZE; at += STEP)
    assertBlocks(await readAt(guest, at, STEP), source.device.data.subarray(at, at + STEP), `at ${at}`);
  assert.equal(source.readBytes, SIZE);
  const { traffic, demand } = proxy.status;
  assert.equal(traffic.demandBytes + traffic.backgroundBytes, SIZE);
  assert.ok(traffic.backgroundBytes > SIZE / 2, `${traffic.backgroundBytes} bytes ahead`);
  assert.ok(demand.reads < SIZE / STEP / 2, `${demand.reads} demand fetches`);
});

test('likewise one that reads backward', async (t) => {
  const { source, proxy, guest } = await lab(t, { readAhead: true });
  for (let at = SIZE - STEP; at >= 0; at -= STEP)
    assertBlocks(await readAt(guest, at, STEP), source.device.data.subarray(at, at + STEP), `at ${at}`);
  assert.equal(source.readBytes, SIZE);
  assert.ok(proxy.status.traffic.backgroundBytes > SIZE / 2);
});

test('without it only what is read comes, and reads here and there bring nothing else', async (t) => {
  const off = await lab(t, {});
  for (let at = 0; at < MIB; at += STEP) await readAt(off.guest, at, STEP);
  await quiet();
  assert.equal(off.source.readBytes, MIB);
  const random = await lab(t, { readAhead: true });
  for (const at of [5, 1, 12, 9, 3]) await readAt(random.guest, at * MIB, STEP);
  await quiet();
  assert.equal(random.source.readBytes, 5 * STEP);
});

test('a paused copy does not stop it', async (t) => {
  const { proxy, guest } = await lab(t, { readAhead: true, background: true });
  proxy.service.pause();
  await quiet();
  const before = proxy.status.presentBytes;
  await readAt(guest, 8 * MIB, STEP);
  await readAt(guest, 8 * MIB + STEP, STEP);
  await until(
    () => proxy.status.presentBytes > before + 3 * STEP || proxy.status.phase === 'plain',
    'it is ahead',
  );
});

test('a guest that writes in front of itself is never overwritten', async (t) => {
  const { source, proxy, guest } = await streaming(t);
  source.hold();
  const own = Buffer.alloc(STEP, 0x5a);
  let at = 2 * STEP;
  while (proxy.status.presentBytes > at) at += STEP; // the first that is not here
  const next = at + STEP;
  const waits = readAt(guest, at, STEP);
  await until(() => source.held > 0, 'the source is asked');
  await writeAt(guest, next, own);
  source.release();
  await waits;
  await until(() => source.held === 0, 'all is answered');
  await quiet();
  assertBlocks(await readAt(guest, next, STEP), own);
});

test('a bad block in front of a stream fails nobody who does not read it', async (t) => {
  const { source, guest } = await lab(t, { readAhead: true });
  const bad = MIB / BLOCK;
  source.failBlocks([bad]);
  for (let at = 0; at < MIB; at += STEP) await readAt(guest, at, STEP);
  assert.equal(await errnoOfRequest(readAt(guest, MIB, STEP)), Errno.EIO);
  assertBlocks(
    await readAt(guest, MIB + BLOCK, STEP),
    source.device.data.subarray(MIB + BLOCK, MIB + BLOCK + STEP),
  );
});

test('order hot: what is near a read that waited comes before the rest; a bad block holds up nothing', async (t) => {
  const ferries = new Lab(t);
  const source = await ferries.source(SIZE);
  source.hold();
  const proxy = await ferries.proxy(source, { background: true, order: 'hot' });
  const guest = await proxy.guest();
  await until(() => source.held > 0, 'the copy began');
  proxy.service.pause();
  source.release();
  await until(() => proxy.status.presentBytes > 0, 'what was in flight arrives');
  await quiet();
  assert.ok(proxy.status.presentBytes < SIZE / 2);
  source.failBlocks([(13 * MIB) / BLOCK + 3]);
  await readAt(guest, 13 * MIB, BLOCK);
  const before = source.reads.length;
  proxy.service.resume();
  await until(() => source.reads.length > before, 'it goes on');
  assert.equal(source.reads[before]!.offset, 13 * MIB + BLOCK);
  await until(() => proxy.status.presentBytes === SIZE - BLOCK, 'all others come');
  source.failBlocks([]);
  await proxy.service.handedOff();
});

test('order hot: what the machine used at the source comes first, by what the source tells', async (t) => {
  const ferries = new Lab(t);
  const old = await ferries.source(SIZE);
  // At the source: a proxy that handed off, so that its blocks are here, and whose guest read at 9 MiB and wrote at 3 MiB.
  const before = await ferries.proxy(old, { background: true });
  await before.service.handedOff();
  const user = await before.guest();
  for (let n = 0; n < 20; n++) await readAt(user, 9 * MIB, BLOCK);
  for (let n = 0; n < 20; n++) await writeAt(user, 3 * MIB, Buffer.alloc(BLOCK, n));
  const seen: number[] = [];
  const { link } = before.service;
  const readNow: BlockDevice['readNow'] = (offset, ...rest) => {
    seen.push(offset);
    return link.readNow(offset, ...rest);
  };
  const server = await ferries.source(SIZE);
  server.device.contexts = [...link.contexts];
  server.deviceOf = () => changed(link, { direct: undefined, readNow, readOnly: server.device.readOnly });
  const proxy = await ferries.proxy(server, { background: true, order: 'hot' });
  await proxy.service.handedOff();
  const regions = [...new Set(seen.map((offset) => Math.floor(offset / (256 * KIB))))];
  assert.deepEqual(regions.slice(0, 3), [36, 12, 0]);
  assertBlocks(await readAt(await proxy.guest(), 3 * MIB, BLOCK), Buffer.alloc(BLOCK, 19));
});
