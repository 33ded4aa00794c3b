/** The background copy: order, limits, hints, zeros and failures. */
import assert from 'node:assert/strict';
import { readFileSync, statSync } from 'node:fs';
import { mock, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { Errno } from '../../../src/nbd/constants.js';
import { WINDOW_BYTES_MAX } from '../../../src/relocation/window.js';
import { Image } from '../../../src/volume/image.js';
import {
  assertBlocks,
  BLOCK,
  isSettled,
  KIB,
  Lab,
  MIB,
  pattern,
  quiet,
  readAt,
  type Source,
  until,
  writeAt,
} from '../../lab/ferry.js';

type ZeroParameters = Parameters<Image['zero']>;

const BULK = 256 * KIB;

function heldBytes(source: Source): number {
  return source.device.held.reduce((sum, { length }) => sum + length, 0);
}

test('brings every block once, in ascending order, and hands off', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB);
  const proxy = await lab.proxy(source, { background: true });
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
  assert.equal(source.readBytes, 8 * MIB);
  // How long a piece is follows the rate, which a busy machine lowers.
  const reads = source.reads.map(({ offset, length }) => [offset, offset + length] as const);
  reads.sort((a, b) => a[0] - b[0]);
  assert.deepEqual(
    reads.map(([from]) => from),
    [0, ...reads.slice(0, -1).map(([, to]) => to)],
  );
  assert.deepEqual(source.reads[0], { kind: 'read', offset: 0, length: BULK, flags: 0 });
  const { phase, presentBytes, background, traffic } = proxy.status;
  assert.deepEqual([phase, presentBytes, background.state], ['plain', 8 * MIB, 'done']);
  assert.deepEqual([traffic.backgroundBytes, traffic.demandBytes, traffic.zeroBytes], [8 * MIB, 0, 0]);
});

test('never says that all is here before the last block is, nor when it was handed off (xNBD fault 6)', async (t) => {
  const lab = new Lab(t);
  const size = 2 * MIB + 100;
  const source = await lab.source(size);
  const last = Math.floor(size / BLOCK);
  source.hold(({ offset, length }) => offset + length > last * BLOCK);
  const proxy = await lab.proxy(source, { background: true });
  const seen = new Set<number>();
  await until(() => {
    seen.add(proxy.status.presentBytes);
    return proxy.status.presentBytes >= 7 * BULK && source.held === 1;
  }, 'all but the last fetch');
  const { phase, presentBytes, handoffAt, background } = proxy.status;
  assert.ok(presentBytes < size);
  assert.deepEqual([phase, handoffAt, background.state], ['relocating', null, 'running']);
  source.release();
  await proxy.service.handedOff();
  assert.equal(proxy.status.presentBytes, size);
  assert.match(proxy.status.handoffAt!, /^\d{4}-\d\d-\d\dT.*Z$/);
});

test('bytes in flight stay within the window, whatever the source does', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(64 * MIB);
  source.hold();
  const proxy = await lab.proxy(source, { background: true });
  await until(() => source.held > 0, 'the copy began');
  await quiet();
  assert.ok(heldBytes(source) <= MIB, `${heldBytes(source)} bytes at the start`);
  let most = 0;
  while (proxy.status.phase === 'relocating') {
    most = Math.max(most, heldBytes(source));
    source.device.completeHeld();
    await quiet(2);
  }
  source.release();
  assert.ok(most <= WINDOW_BYTES_MAX, `${most} bytes`);
  assert.ok(most > MIB, 'the window opens');
});

test('while the guest waits for its own reads, the copy keeps to a quarter', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(64 * MIB);
  source.hold(({ length }) => length === BLOCK);
  const proxy = await lab.proxy(source, { background: false });
  const guest = await proxy.guest();
  const waits = readAt(guest, 60 * MIB, BLOCK);
  await until(() => source.held === 1, 'the guest waits');
  source.hold();
  void proxy.service.prefetch(0, 32 * MIB).catch(() => undefined);
  await until(() => source.held > 1, 'the copy began');
  await quiet();
  assert.equal(heldBytes(source), BLOCK + BULK);
  source.release();
  await waits;
});

test('keeps to a rate, which may be changed while it copies', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(64 * MIB);
  const proxy = await lab.proxy(source, { background: true, rateBytesPerSecond: 2 * MIB });
  assert.equal(proxy.status.background.rateLimitBytesPerSecond, 2 * MIB);
  await until(() => source.readBytes > 0, 'the copy began');
  const from = source.readBytes;
  const began = performance.now();
  await delay(2200);
  const rate = (source.readBytes - from) / ((performance.now() - began) / 1000);
  assert.ok(rate < 3 * MIB, `${(rate / MIB).toFixed(2)} MiB/s`);
  assert.ok(rate > 0.7 * MIB, `${(rate / MIB).toFixed(2)} MiB/s`);
  const shown = proxy.status.background.rateBytesPerSecond;
  assert.ok(shown > 0.4 * MIB && shown < 4 * MIB, `shows ${(shown / MIB).toFixed(2)} MiB/s`);
  proxy.service.setRate(null);
  await proxy.service.handedOff();
});

test('pauses and goes on at run time; demand is served meanwhile', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(32 * MIB);
  source.hold();
  const proxy = await lab.proxy(source, { background: true });
  const guest = await proxy.guest();
  await until(() => source.held > 0, 'the copy began');
  proxy.service.pause();
  source.release();
  await until(() => proxy.status.presentBytes > 0, 'what was in flight arrives');
  await quiet();
  const { presentBytes } = proxy.status;
  assert.equal(proxy.status.background.state, 'paused');
  assertBlocks(await readAt(guest, 31 * MIB, BLOCK), source.device.data.subarray(31 * MIB, 31 * MIB + BLOCK));
  await quiet();
  assert.equal(proxy.status.presentBytes, presentBytes + BLOCK);
  proxy.service.resume();
  await proxy.service.handedOff();
});

test('off: only what is asked for comes, and prefetch brings just its range, once', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  await writeAt(guest, MIB, Buffer.alloc(BLOCK, 1));
  await proxy.service.prefetch(MIB - 10, 20);
  assert.equal(proxy.status.presentBytes, 2 * BLOCK);
  await proxy.service.prefetch(MIB, 2 * MIB);
  assert.equal(proxy.status.presentBytes, 2 * MIB + BLOCK);
  await proxy.service.prefetch(MIB, 2 * MIB);
  assert.equal(source.readBytes, 2 * MIB);
  await proxy.service.prefetch(7 * MIB, 100 * MIB);
  assert.equal(proxy.status.presentBytes, 3 * MIB + BLOCK);
  await assert.rejects(proxy.service.prefetch(8 * MIB, 1), /outside/);
  await assert.rejects(proxy.service.prefetch(0, 0), /outside/);
  assert.deepEqual([proxy.status.phase, proxy.status.background.state], ['relocating', 'off']);
  assert.equal((await readAt(guest, MIB, 1))[0], 1);
});

test('prefetch waits for blocks that a guest already waits for, and for a source that is away', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.hold();
  const read = readAt(guest, 0, 64 * KIB);
  await until(() => source.held === 1, 'the guest waits');
  const prefetch = proxy.service.prefetch(0, MIB);
  await until(() => source.held > 1, 'the rest is asked for');
  source.device.completeHeld((held) => held.filter(({ offset }) => offset > 0));
  await quiet();
  assert.equal(await isSettled(prefetch), false);
  await source.stop();
  await quiet();
  assert.equal(await isSettled(prefetch), false);
  source.release();
  await source.start();
  await prefetch;
  await read;
  assert.equal(proxy.status.presentBytes, MIB);
});

test('CACHE is a hint: answered at once, followed by the range', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(4 * MIB);
  const proxy = await lab.proxy(source);
  const guest = await proxy.guest();
  source.hold();
  await guest.cache(MIB, MIB);
  await until(() => source.held > 0, 'it is fetched');
  source.release();
  await until(() => proxy.status.presentBytes === MIB, 'it is here');
  assert.equal(source.reads[0]!.offset, MIB);
});

test('runs of zeros cost no data, and leave the image sparse', async (t) => {
  const lab = new Lab(t);
  const data = Buffer.alloc(32 * MIB);
  for (const at of [0, 5 * MIB, 5 * MIB + BULK, 30 * MIB]) pattern(100 * KIB).copy(data, at);
  const source = await lab.source(data.length, { data });
  source.tellZeroes();
  const proxy = await lab.proxy(source, { background: true });
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), data);
  assert.equal(source.readBytes, 4 * 100 * KIB);
  assert.equal(proxy.status.traffic.zeroBytes, 32 * MIB - 4 * 100 * KIB);
  assert.ok(statSync(proxy.image).blocks * 512 < MIB);
});

test('without base:allocation everything is read', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB, { data: Buffer.alloc(8 * MIB) });
  source.tellZeroes();
  source.device.contexts = [];
  const proxy = await lab.proxy(source, { background: true });
  await proxy.service.handedOff();
  assert.equal(source.readBytes, 8 * MIB);
});

for (const { grain, zeroBlocks } of [
  { grain: 100, zeroBlocks: 2 },
  { grain: 512, zeroBlocks: 130 },
]) {
  test(`zeros that are no whole blocks are read, whatever runs of ${grain} bytes the source tells`, async (t) => {
    const lab = new Lab(t);
    const size = 4 * MIB + 300;
    const data = pattern(size);
    data.fill(0, 100, 3 * BLOCK + 100); // whole blocks: 1 and 2
    for (let block = 256; block < 512; block += 2) data.fill(0, block * BLOCK, (block + 1) * BLOCK);
    data.fill(0, 4 * MIB); // the tail
    const source = await lab.source(size, { data });
    source.tellZeroes(grain);
    const proxy = await lab.proxy(source, { background: true });
    await proxy.service.handedOff();
    assertBlocks(readFileSync(proxy.image), data);
    const tail = grain === 512 ? 300 : 0;
    assert.equal(source.readBytes, size - tail - zeroBlocks * BLOCK);
  });
}

test('the guest’s write into a run of zeros that is being marked wins', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB, { data: Buffer.alloc(8 * MIB) });
  source.tellZeroes();
  source.device.manner = ({ kind }) => (kind === 'status' ? 'held' : 'now');
  const proxy = await lab.proxy(source, { background: true });
  const guest = await proxy.guest();
  await until(() => source.held > 0, 'the allocation is asked for');
  await writeAt(guest, MIB, Buffer.alloc(2 * BLOCK, 6));
  source.release();
  await proxy.service.handedOff();
  const expected = Buffer.alloc(8 * MIB).fill(6, MIB, MIB + 2 * BLOCK);
  assertBlocks(await readAt(guest, 0, 8 * MIB), expected);
});

test('blocks that the guest is zeroing on a thread are left to it, and the loop goes on turning', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(2 * MIB, { data: pattern(2 * MIB).fill(0, MIB) });
  source.tellZeroes();
  source.device.manner = ({ kind }) => (kind === 'status' ? 'held' : 'now');
  const proxy = await lab.proxy(source, { background: true });
  const guest = await proxy.guest();
  await until(() => source.held > 0, 'the allocation is asked for');
  let finish: (() => void) | undefined;
  const { zero } = Image.prototype;
  const held = mock.method(Image.prototype, 'zero', async function (this: Image, ...words: ZeroParameters) {
    await new Promise<void>((resolve) => {
      finish = resolve;
    });
    return zero.apply(this, words);
  });
  lab.onClose(() => held.mock.restore());
  const zeroed = guest.zero(MIB, MIB);
  await until(() => finish !== undefined, 'the guest’s zeroing is under way');
  source.release();
  await until(() => proxy.status.presentBytes === MIB, 'the rest is here');
  await quiet();
  finish!();
  await zeroed;
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
});

test('a source timeout does not make it forget that the source tells zeros', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB, { data: Buffer.alloc(8 * MIB) });
  source.tellZeroes();
  source.device.manner = ({ kind }) => (kind === 'status' ? 'held' : 'now');
  const proxy = await lab.proxy(source, { background: true, sourceTimeoutMs: 50 });
  await until(() => source.held > 0, 'the allocation is asked for');
  await source.stop();
  await until(() => proxy.status.error !== null, 'the copy gave up waiting');
  assert.match(proxy.status.error!, /out of reach/);
  assert.equal(proxy.status.background.state, 'waiting');
  source.device.manner = () => 'now';
  await source.start();
  await proxy.service.handedOff();
  assert.equal(source.readBytes, 0);
  assert.equal(proxy.status.error, null);
});

test('one bad block: the rest comes, and that one when the source can read it again', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(8 * MIB);
  source.failBlocks([100]);
  const proxy = await lab.proxy(source, { background: true });
  await until(() => proxy.status.presentBytes === 8 * MIB - BLOCK, 'all others are here');
  await until(() => proxy.status.background.state === 'waiting', 'the copy waits');
  assert.match(proxy.status.error!, /source has I\/O errors/);
  const reads = source.reads.length;
  await delay(200);
  assert.ok(source.reads.length - reads < 40, `${source.reads.length - reads} attempts`);
  source.failBlocks([]);
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
  assert.equal(proxy.status.error, null);
});

test('a source that fails everything is not hammered', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(64 * MIB);
  source.device.failure = ({ kind }) => (kind === 'read' ? Errno.EIO : 0);
  const proxy = await lab.proxy(source, { background: true, timing: { retryAfterErrorMs: 60_000 } });
  await until(() => proxy.status.background.state === 'waiting', 'the copy waits');
  let reads = 0;
  while (source.reads.length > reads) {
    reads = source.reads.length;
    await delay(100);
  }
  assert.ok(reads <= 8 * 127, `${reads} attempts`);
  source.failBlocks([]);
  proxy.service.resume();
  await proxy.service.handedOff();
});

test('a rate set while the copy waits after failures does not stop it for good', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(4 * MIB);
  source.device.failure = ({ kind }) => (kind === 'read' ? Errno.EIO : 0);
  const proxy = await lab.proxy(source, { background: true, timing: { retryAfterErrorMs: 200 } });
  await until(() => proxy.status.background.state === 'waiting', 'the copy waits');
  proxy.service.setRate(64 * MIB);
  source.failBlocks([]);
  await proxy.service.handedOff();
});
