/** FAST_ZERO, long changes, and what the store knows to be zero. */
import assert from 'node:assert/strict';
import { afterEach, beforeEach, describe, mock, test } from 'node:test';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { PIECE_BYTES_MIN } from '../../../src/volume/pieces.js';
import { OPEN } from '../../../src/volume/store.js';
import { B, StoreFixture } from '../../support/store.js';
import { Io } from '../../support/volume.js';

const { FAST_ZERO, NO_HOLE } = CommandFlag;

let it: StoreFixture;
afterEach(() => it.close());

describe('FAST_ZERO', () => {
  test('whole blocks need no source and no data: zeros, and here', async () => {
    it = await StoreFixture.of(10 * B);
    it.source.deliver(0, 2);
    const zero = new Io(0, 10 * B, FAST_ZERO);
    it.store.zero(zero);
    assert.equal(await zero.done, Errno.OK);
    assert.deepEqual(it.source.demands, []);
    for (let block = 0; block < 10; block++) it.holds(block, Buffer.alloc(B));
  });

  test('an image that cannot: ENOTSUP, nothing changed, and at once the next time', async () => {
    it = await StoreFixture.of(10 * B);
    it.source.deliver(0, 2);
    let tries = 0;
    let may = true;
    it.image.mayZeroFast = () => may;
    it.image.zeroFast = async () => {
      tries++;
      may = false;
      return false;
    };
    const first = new Io(0, 4 * B, FAST_ZERO);
    it.store.zero(first);
    const behind = new Io(0, B);
    it.store.write(behind);
    assert.equal(await first.done, Errno.ENOTSUP);
    assert.equal(await behind.done, Errno.OK, 'the lock is gone');
    assert.ok(!it.presence.has(2));
    const second = new Io(0, 4 * B, FAST_ZERO);
    it.store.zero(second);
    assert.equal(second.errno, Errno.ENOTSUP, 'without a thread');
    assert.equal(tries, 1);
    const plain = new Io(0, 4 * B);
    it.store.zero(plain);
    assert.equal(await plain.done, Errno.OK);
  });

  test('NO_HOLE is asked for apart', async () => {
    it = await StoreFixture.of(4 * B);
    const asked: boolean[] = [];
    it.image.mayZeroFast = (keepHole) => {
      asked.push(keepHole);
      return false;
    };
    for (const flags of [FAST_ZERO, FAST_ZERO | NO_HOLE]) {
      const zero = new Io(0, B, flags);
      it.store.zero(zero);
      assert.equal(zero.errno, Errno.ENOTSUP);
    }
    assert.deepEqual(asked, [true, false]);
  });

  test('an edge that only the source has: ENOTSUP at once, and the source is not asked', async () => {
    it = await StoreFixture.of(10 * B);
    const zero = new Io(B + 1, 3 * B, FAST_ZERO);
    it.store.zero(zero);
    assert.equal(zero.errno, Errno.ENOTSUP);
    assert.deepEqual(it.source.demands, []);
    it.source.deliver(1, 5);
    const again = new Io(B + 1, 3 * B, FAST_ZERO);
    it.store.zero(again);
    assert.equal(await again.done, Errno.OK);
    const expected = Buffer.from(it.source.content.subarray(B, 5 * B)).fill(0, 1, 3 * B + 1);
    assert.ok(it.onDisk(B, 4 * B).equals(expected));
  });

  test('who may not write hears EPERM', async () => {
    it = await StoreFixture.of(4 * B);
    it.store.setGate({ kind: 'refused', errno: Errno.EPERM });
    const zero = new Io(1, 2, FAST_ZERO);
    it.store.zero(zero);
    assert.equal(zero.errno, Errno.EPERM);
  });
});

describe('a zero or trim of many pieces', () => {
  const SIZE = PIECE_BYTES_MIN + 16 * B;

  for (const kind of ['zero', 'trim'] as const) {
    const method = kind === 'zero' ? 'zero' : 'punch';

    test(`${kind}: nothing comes in between`, async () => {
      it = await StoreFixture.of(SIZE);
      const change = new Io(0, SIZE);
      const { calls } = it.hold(method);
      it.store[kind](change);
      const write = new Io(SIZE - B, B);
      it.store.write(write);
      for (let piece = 0; change.errno === undefined; piece++) {
        assert.equal(write.errno, undefined);
        while (calls[piece] === undefined) await new Promise((resolve) => setImmediate(resolve));
        await calls[piece]!.release();
      }
      assert.equal(change.errno, Errno.OK);
      assert.ok(calls.length > 1);
      assert.equal(await write.done, Errno.OK);
      assert.equal(it.presence.present, SIZE / B);
    });

    test(`${kind}: a request that was abandoned stops, and lets the next one go`, async () => {
      it = await StoreFixture.of(SIZE);
      const change = new Io(0, SIZE);
      const { calls } = it.hold(method);
      it.store[kind](change);
      change.abandoned = true;
      await calls[0]!.release();
      await change.done;
      assert.equal(calls.length, 1);
      assert.ok(!it.presence.has(0));
    });

    test(`${kind}: whoever closes the gate does not wait for the whole`, async () => {
      it = await StoreFixture.of(SIZE);
      const change = new Io(0, SIZE);
      const { calls } = it.hold(method);
      it.store[kind](change);
      it.store.setGate({ kind: 'refused', errno: Errno.EPERM });
      const idle = it.store.idle();
      await calls[0]!.release();
      await idle;
      assert.equal(change.errno, Errno.EPERM);
      it.store.setGate(OPEN);
    });
  }
});

describe('zeroesNow', () => {
  // Questions that take long would become rare: here none does, however busy the machine is.
  beforeEach(() => mock.method(performance, 'now', () => 0));
  afterEach(() => mock.restoreAll());

  test('holes of the image, where all is here', async () => {
    it = await StoreFixture.of(64 * B);
    assert.equal(it.store.zeroesNow(0, 64 * B), 0, 'missing blocks are unknown, whatever the image holds');
    assert.equal(await it.store.fillZeroes(1, 0, 32), Errno.OK);
    it.source.deliver(32, 64);
    assert.equal(it.store.zeroesNow(0, 64 * B), 32 * B);
    assert.equal(it.store.zeroesNow(B, 4 * B), 4 * B);
    assert.equal(it.store.zeroesNow(32 * B, B), 0);
  });

  test('a write is seen at once', async () => {
    it = await StoreFixture.of(64 * B);
    await it.store.fillZeroes(1, 0, 64);
    for (let block = 63; block >= 0; block--) {
      assert.equal(it.store.writeNow(block * B + 7, 1, Buffer.from([1]), 0), Errno.OK);
      assert.equal(it.store.zeroesNow(0, 64 * B), block * B);
    }
  });

  test('nothing while a thread has the image in hand', async () => {
    it = await StoreFixture.of(64 * B);
    await it.store.fillZeroes(1, 0, 64);
    const { calls } = it.hold('zero');
    const zero = new Io(0, B);
    it.store.zero(zero);
    assert.equal(it.store.zeroesNow(32 * B, 16 * B), 0);
    await calls[0]!.release();
    await zero.done;
    assert.equal(it.store.zeroesNow(32 * B, 16 * B), 16 * B);
  });
});
