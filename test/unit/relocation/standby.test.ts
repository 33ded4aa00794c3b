/** Standby, takeover, retreat and hand-off, as the guest and the source see them. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
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
  type Source,
  until,
  writeAt,
} from '../../lab/ferry.js';

const OLD = pattern(MIB, 1);
const NEW = pattern(MIB, 2);

function becomes(source: Source, content: Buffer): void {
  content.copy(source.device.data);
}

function code(wanted: string) {
  return (error: unknown): boolean => error instanceof BlockferryError && error.code === wanted;
}

for (const kind of ['with a coordinator', 'alone'] as const) {
  test(`standby ${kind}: reads pass through and are not kept`, async (t) => {
    const lab = new Lab(t);
    const source = await lab.source(MIB);
    const proxy = await (kind === 'alone' ? lab.proxy(source, { standby: true }) : lab.arrive(source));
    const guest = await proxy.guest();
    assert.equal(guest.info.readOnly, false);
    assertBlocks(await readAt(guest, 0, MIB), OLD);
    assertBlocks(await readAt(guest, 12345, 777), OLD.subarray(12345, 12345 + 777));
    becomes(source, NEW);
    assertBlocks(await readAt(guest, 0, MIB), NEW);
    await guest.cache(0, MIB);
    await assert.rejects(proxy.service.prefetch(0, MIB), code('phase'));
    await quiet();
    const { phase, presentBytes } = proxy.status;
    assert.deepEqual([phase, presentBytes], ['standby', 0]);
    assert.ok(readFileSync(proxy.image).equals(Buffer.alloc(MIB)), 'the image is untouched');
    becomes(source, OLD);
    await proxy.service.takeover();
    assertBlocks(await readAt(guest, 0, MIB), OLD);
  });
}

test('a standby with a coordinator refuses every change', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  for (const change of [
    () => writeAt(guest, 0, Buffer.alloc(BLOCK)),
    () => writeAt(guest, 5, Buffer.alloc(1)),
    () => guest.write(0, Buffer.alloc(BLOCK), 0, BLOCK, { fua: true }),
    () => guest.zero(0, BLOCK),
    () => guest.trim(0, BLOCK),
  ])
    assert.equal(await errnoOfRequest(change()), Errno.EPERM);
  await guest.flush();
  assert.deepEqual([proxy.status.phase, proxy.status.generation], ['standby', 1]);
});

test('a standby without a coordinator takes over at the first write, once', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source, { standby: true });
  const guests = [await proxy.guest(), await proxy.guest()];
  await readAt(guests[0]!, 0, MIB);
  const { generation } = proxy.status;
  becomes(source, NEW);
  const expected = Buffer.from(NEW);
  const writes = Array.from({ length: 20 }, (_, i) => {
    expected.fill(i + 1, i * 3 * BLOCK + 9, i * 3 * BLOCK + 9 + 100);
    return writeAt(guests[i % 2]!, i * 3 * BLOCK + 9, Buffer.alloc(100, i + 1));
  });
  await Promise.all(writes);
  assert.deepEqual([proxy.status.phase, proxy.status.generation], ['relocating', generation + 1]);
  assertBlocks(await readAt(guests[0]!, 0, MIB), expected);
});

test('a read that was under way at the takeover is answered, and not kept', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  source.hold();
  const read = readAt(guest, 0, BLOCK);
  await until(() => source.held === 1, 'it is at the source');
  await proxy.service.takeover(2);
  source.device.manner = () => 'now';
  source.device.completeHeld();
  assertBlocks(await read, OLD.subarray(0, BLOCK));
  becomes(source, NEW);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assertBlocks(await readAt(guest, 0, BLOCK), NEW.subarray(0, BLOCK));
});

test('takeover can be repeated, and a stale generation cannot take over', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  assert.deepEqual(await proxy.service.takeover(5), { generation: 5 });
  assert.deepEqual(await proxy.service.takeover(5), { generation: 5 });
  await assert.rejects(proxy.service.takeover(6), code('phase'));
  const proof = await proxy.service.retreat();
  assert.equal(proof.generation, 5);
  await assert.rejects(proxy.service.takeover(5), code('generation'));
  assert.deepEqual(await proxy.service.takeover(6), { generation: 6 });
});

test('after a retreat nothing fetched before is ever shown again', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  await proxy.service.takeover(2);
  await proxy.service.prefetch(0, MIB / 2);
  assertBlocks(await readAt(guest, 0, MIB), OLD);
  await proxy.service.retreat();
  const { phase, presentBytes, handoffAt } = proxy.status;
  assert.deepEqual([phase, presentBytes, handoffAt], ['standby', 0, null]);
  becomes(source, NEW);
  assertBlocks(await readAt(guest, 0, MIB), NEW);
  await proxy.service.takeover(3);
  assertBlocks(await readAt(guest, 0, MIB), NEW);
  await writeAt(guest, 0, Buffer.alloc(1, 0x41));
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), Buffer.from(NEW).fill(0x41, 0, 1));
});

test('zeros of the source replace what an abandoned takeover left in the image', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  await proxy.service.takeover(2);
  await until(() => proxy.status.presentBytes === MIB, 'all is here');
  await proxy.service.retreat();
  source.device.data.fill(0, 0, MIB / 2);
  source.tellZeroes();
  const { readBytes } = source;
  await proxy.service.takeover(3);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assert.equal(source.readBytes - readBytes, MIB / 2);
  assertBlocks(readFileSync(proxy.image), source.device.data);
});

test('data that was on its way at a retreat is dropped, also if a new takeover came before it', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  source.hold();
  await proxy.service.takeover(2);
  await until(() => source.held === 4, 'the copy has all of it in flight');
  const read = readAt(guest, 0, BLOCK);
  await quiet();
  await proxy.service.retreat();
  await until(() => source.held === 5, 'the read passes through now');
  await proxy.service.takeover(3);
  const second = readAt(guest, BLOCK, BLOCK);
  await quiet();
  source.device.completeHeld(); // what was sent before the second takeover, with the content of then
  assertBlocks(await read, OLD.subarray(0, BLOCK));
  await until(() => source.held > 0, 'the blocks are asked for again');
  becomes(source, NEW);
  assert.equal(await isSettled(second), false);
  assert.equal(proxy.status.presentBytes, 0);
  source.release();
  assertBlocks(await second, NEW.subarray(BLOCK, 2 * BLOCK));
  await proxy.service.settle();
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), NEW);
});

test('an error that was on its way at a retreat fails nobody who asks since', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  source.hold();
  await proxy.service.takeover(2);
  await until(() => source.held === 4, 'the copy has all of it in flight');
  await proxy.service.retreat();
  await proxy.service.takeover(3);
  const read = readAt(guest, 5 * BLOCK, BLOCK);
  await quiet();
  source.device.failure = ({ kind }) => (kind === 'read' ? Errno.EIO : 0);
  source.device.completeHeld();
  source.failBlocks([]);
  source.release();
  assertBlocks(await read, OLD.subarray(5 * BLOCK, 6 * BLOCK));
});

test('who waits for a prefetch at a retreat is told', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  source.hold();
  await proxy.service.takeover(2);
  const prefetch = proxy.service.prefetch(0, MIB);
  const refused = assert.rejects(prefetch, code('phase'));
  await proxy.service.retreat();
  source.release();
  await refused;
});

test('a guest’s write forbids the retreat', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  source.hold();
  await proxy.service.takeover(2);
  await writeAt(guest, 0, Buffer.alloc(BLOCK));
  await assert.rejects(proxy.service.retreat(), code('phase'));
  assert.equal(proxy.status.phase, 'relocating');
  source.release();
});

test('the hand-off waits until the machine is known to run here; then guests stay, and the source is let go', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  await proxy.service.takeover(2);
  await until(() => proxy.status.presentBytes === MIB, 'all is here');
  await quiet();
  const { phase, handoffAt } = proxy.status;
  assert.deepEqual([phase, handoffAt], ['relocating', null]);
  assert.ok(source.connections > 0);
  const over = proxy.service.handedOff();
  assert.equal(await isSettled(over), false);
  await proxy.service.settle();
  await over;
  await until(() => source.connections === 0, 'no connection is left at the source');
  assert.equal(proxy.status.phase, 'plain');
  await source.stop();
  await writeAt(guest, 0, Buffer.alloc(3, 0x42));
  await guest.flush();
  assertBlocks(await readAt(guest, 0, MIB), Buffer.from(OLD).fill(0x42, 0, 3));
  assert.equal(source.accepted, 4, 'one to ask, three to copy, none since');
});

test('the guest’s own writes complete the volume: a fetch still held does not hold up the hand-off', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  source.hold();
  const proxy = await lab.proxy(source, { background: true });
  const guest = await proxy.guest();
  await until(() => source.held === 4, 'all is in flight');
  await writeAt(guest, 0, NEW);
  await proxy.service.handedOff();
  source.release();
  await quiet();
  assertBlocks(readFileSync(proxy.image), NEW);
});

test('cancel leaves nothing, and closes the link', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.arrive(source);
  const guest = await proxy.guest();
  source.hold();
  const failed = assert.rejects(readAt(guest, 0, BLOCK));
  await until(() => source.held === 1, 'a read is at the source');
  const proof = await proxy.service.cancel();
  assert.equal(proof.generation, 2);
  await failed;
  source.release();
  await until(() => source.connections === 0, 'no connection is left at the source');
  assert.throws(() => readFileSync(proxy.image), { code: 'ENOENT' });
});
