/** Demand: one fetch for all who wait, edges of writes, and what must never be kept. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  isSettled,
  Lab,
  MIB,
  pattern,
  quiet,
  readAt,
  until,
  writeAt,
} from '../../lab/ferry.js';

test('one fetch serves all who wait for the same block', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guests = [await proxy.guest(), await proxy.guest()];
  source.hold();
  const reads = [0, 512, 0, 1024].flatMap((skip) =>
    guests.map((guest) => readAt(guest, 5 * BLOCK + skip, 512)),
  );
  await until(() => source.held === 1, 'a fetch arrives');
  await quiet();
  assert.equal(source.held, 1);
  source.release();
  for (const bytes of await Promise.all(reads)) assert.equal(bytes.length, 512);
  assert.deepEqual(
    source.reads.map(({ offset, length }) => [offset, length]),
    [[5 * BLOCK, BLOCK]],
  );
  await readAt(guests[0]!, 5 * BLOCK, BLOCK);
  assert.equal(source.reads.length, 1);
});

test('a READ over 64 separate missing runs fetches just those, pipelined (xNBD fault 3)', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  for (let block = 1; block < 128; block += 2) await writeAt(guest, block * BLOCK, Buffer.alloc(BLOCK, 7));
  source.hold();
  const read = readAt(guest, 0, 128 * BLOCK);
  await until(() => source.held === 64, 'all 64 fetches are in flight at once');
  source.release();
  const expected = Buffer.from(source.device.data.subarray(0, 128 * BLOCK));
  for (let block = 1; block < 128; block += 2) expected.fill(7, block * BLOCK, (block + 1) * BLOCK);
  assertBlocks(await read, expected);
  assert.equal(source.readBytes, 64 * BLOCK);
});

test('a READ over thousands of separate runs is fetched a part at a time, each block once', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  const expected = Buffer.from(source.device.data);
  for (let block = 1; block < 2048; block += 2) {
    await writeAt(guest, block * BLOCK, Buffer.alloc(BLOCK, 7));
    expected.fill(7, block * BLOCK, (block + 1) * BLOCK);
  }
  source.hold();
  const read = readAt(guest, 0, 8 * MIB);
  await until(() => source.held > 200, 'many are in flight');
  await quiet();
  assert.ok(source.held <= 256, `${source.held} in flight`);
  source.release();
  assertBlocks(await read, expected);
  assert.ok([...source.readsPerBlock().values()].every((times) => times === 1));
});

test('a write that covers blocks in part fetches its two edges, and only them', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.hold();
  const payload = Buffer.alloc(10 * BLOCK, 9);
  const write = writeAt(guest, 3 * BLOCK + 100, payload);
  await until(() => source.held === 2, 'both edges are asked for');
  assert.equal(await isSettled(write), false);
  source.release();
  await write;
  assert.deepEqual(
    source.reads.map(({ offset, length }) => [offset, length]),
    [
      [3 * BLOCK, BLOCK],
      [13 * BLOCK, BLOCK],
    ],
  );
  const expected = Buffer.from(source.device.data);
  payload.copy(expected, 3 * BLOCK + 100);
  assertBlocks(await readAt(guest, 0, MIB), expected);
});

test('a write inside one missing block, and one of a few bytes over a border', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  const expected = Buffer.from(source.device.data);
  for (const [offset, length] of [
    [BLOCK + 1, 1],
    [6 * BLOCK - 1, 2],
    [9 * BLOCK, 1],
    [11 * BLOCK - 1, 1],
  ] as const) {
    await writeAt(guest, offset, Buffer.alloc(length, 0x7f));
    expected.fill(0x7f, offset, offset + length);
  }
  assertBlocks(await readAt(guest, 0, MIB), expected);
});

test('a guest write while a fetch of the block is held wins', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const reader = await proxy.guest();
  const writer = await proxy.guest();
  source.hold();
  const read = readAt(reader, 0, 4 * BLOCK);
  await until(() => source.held === 1, 'the fetch is in flight');
  await writeAt(writer, BLOCK, Buffer.alloc(BLOCK, 1));
  await writer.zero(2 * BLOCK, BLOCK);
  source.release();
  const expected = Buffer.from(source.device.data.subarray(0, 4 * BLOCK));
  expected.fill(1, BLOCK, 2 * BLOCK).fill(0, 2 * BLOCK, 3 * BLOCK);
  await read;
  assertBlocks(await readAt(writer, 0, 4 * BLOCK), expected);
});

test('a full write lets go those who wait for the block, whatever becomes of the fetch', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const [reader, writer] = [await proxy.guest(), await proxy.guest()];
  source.hold();
  const read = readAt(reader, 0, BLOCK);
  const partial = writeAt(reader, 10, Buffer.alloc(5, 3));
  await until(() => source.held === 1, 'the fetch is in flight');
  await writeAt(writer, 0, Buffer.alloc(BLOCK, 2));
  assert.deepEqual(await read, Buffer.alloc(BLOCK, 2));
  await partial;
  source.device.failure = () => Errno.EIO;
  source.release();
  await quiet();
  const expected = Buffer.alloc(BLOCK, 2).fill(3, 10, 15);
  assert.deepEqual(await readAt(reader, 0, BLOCK), expected);
});

test('a failed fetch is an EIO for those who wait, is not kept, and is tried anew by the next read', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.failBlocks([3]);
  const results = [readAt(guest, 3 * BLOCK, BLOCK), readAt(guest, 3 * BLOCK + 1, 1)].map(errnoOfRequest);
  assert.deepEqual(await Promise.all(results), [Errno.EIO, Errno.EIO]);
  assert.equal(await errnoOfRequest(writeAt(guest, 3 * BLOCK + 1, Buffer.alloc(1))), Errno.EIO);
  assert.equal(proxy.status.presentBytes, 0);
  source.failBlocks([]);
  assertBlocks(await readAt(guest, 3 * BLOCK, BLOCK), pattern(MIB).subarray(3 * BLOCK, 4 * BLOCK));
  assert.equal(proxy.status.presentBytes, BLOCK);
});

test('one bad block at the source fails nobody who wants its neighbours', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.failBlocks([200]);
  source.hold(({ length }) => length > BLOCK);
  const wide = errnoOfRequest(readAt(guest, 0, MIB));
  await until(() => source.held === 1, 'the wide fetch is in flight');
  const neighbour = readAt(guest, 5 * BLOCK, BLOCK);
  await quiet();
  source.release();
  assert.equal(await wide, Errno.EIO);
  assertBlocks(await neighbour, pattern(MIB).subarray(5 * BLOCK, 6 * BLOCK));
  assertBlocks(await readAt(guest, 201 * BLOCK, 55 * BLOCK), pattern(MIB).subarray(201 * BLOCK));
});

for (const { what, standby } of [
  { what: 'in the volume', standby: false },
  { what: 'at the link, before a takeover', standby: true },
]) {
  test(`requests that wait ${what} for a lost source end with their client`, async (t) => {
    const lab = new Lab(t);
    const source = await lab.source(MIB);
    const proxy = await lab.proxy(source, { standby });
    const [leaves, stays] = [await proxy.guest(), await proxy.guest()];
    if (!standby) await readAt(stays, 0, BLOCK);
    await source.stop();
    await until(() => proxy.status.source?.state === 'lost', 'the loss is noticed');
    const waits = Array.from({ length: 50 }, (_, i) => readAt(leaves, (i + 1) * BLOCK, 1));
    if (!standby) waits.push(writeAt(leaves, 60 * BLOCK + 1, Buffer.of(1)).then(() => Buffer.alloc(0)));
    for (const wait of waits) wait.catch(() => undefined);
    const shared = readAt(stays, BLOCK, BLOCK);
    await quiet();
    assert.equal(proxy.connections, 2);
    leaves.destroy();
    await until(() => proxy.connections === 1, 'its place is given back');
    assert.equal(await isSettled(shared), false);
    await source.start();
    assertBlocks(await shared, source.device.data.subarray(BLOCK, 2 * BLOCK));
    await quiet();
    assert.ok(source.readBytes <= 3 * BLOCK, `${source.readBytes} bytes were fetched for nobody`);
    assertBlocks(await readAt(stays, 0, MIB), source.device.data);
  });
}

test('buffers of demand fetches are bounded, however many requests wait for a lost source', async (t) => {
  const lab = new Lab(t);
  const size = 256 * MIB;
  const source = await lab.source(size, { data: Buffer.alloc(0) });
  const proxy = await lab.proxy(source);
  const guests = [await proxy.guest(), await proxy.guest()];
  await readAt(guests[0]!, size - BLOCK, BLOCK);
  await source.stop();
  await until(() => proxy.status.source?.state === 'lost', 'the loss is noticed');
  const before = process.memoryUsage().arrayBuffers;
  const reads = guests.flatMap((guest, half) =>
    Array.from({ length: 100 }, (_, i) => readAt(guest, (half * 100 + i) * MIB, MIB)),
  );
  for (const read of reads) read.catch(() => undefined);
  const requested = reads.length * MIB; // once with the guests, once with the sessions
  const grown = (): number => process.memoryUsage().arrayBuffers - before;
  await until(() => grown() > 2 * requested, 'all are waiting');
  await quiet(50);
  assert.ok(grown() < 2 * requested + 100 * MIB, `${grown() >> 20} MiB`);
  await source.start();
  for (const bytes of await Promise.all(reads)) assert.equal(bytes.length, MIB);
});
