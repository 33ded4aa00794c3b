import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { afterEach, describe, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { B, StoreFixture } from '../../support/store.js';
import { Io, patterned } from '../../support/volume.js';

let it: StoreFixture;
afterEach(() => it.close());
const zeros = Buffer.alloc(B);

describe('trims', () => {
  test('only whole blocks, and the cut one at the very end, become zeros', async () => {
    const size = 6 * B + 100;
    it = await StoreFixture.of(size);
    it.source.deliver(0, 7);
    const wanted = Buffer.from(it.source.content);
    const trims: [number, number, number, number][] = [
      [10, B, 0, 0],
      [B - 1, 2, 0, 0],
      [10, 2 * B, B, 2 * B],
      [3 * B, B, 3 * B, 4 * B],
      [6 * B, 99, 0, 0],
      [5 * B + 1, B + 99, 6 * B, size],
    ];
    for (const [offset, length, from, to] of trims) {
      const trim = new Io(offset, length);
      it.store.trim(trim);
      assert.equal(await trim.done, Errno.OK);
      wanted.fill(0, from, to);
      assert.ok(it.onDisk(0, size).equals(wanted), `trim ${offset} ${length}`);
    }
  });

  test('missing blocks need no source: they are zeros then', async () => {
    it = await StoreFixture.of(4 * B);
    const trim = new Io(B + 1, 3 * B - 1);
    it.store.trim(trim);
    assert.equal(await trim.done, Errno.OK);
    it.source.deliver(0, 4);
    it.holds(1, it.sourceBlock(1));
    it.holds(2, zeros);
    it.holds(3, zeros);
  });

  test('an image that knows no holes: nothing happens, present or missing', async () => {
    it = await StoreFixture.of(4 * B);
    it.source.deliver(0, 1);
    const { calls } = it.hold('punch');
    const trim = new Io(0, 2 * B);
    it.store.trim(trim);
    await calls[0]!.release(false);
    assert.equal(trim.errno, Errno.OK);
    it.holds(0, it.sourceBlock(0));
    assert.equal(it.presence.has(1), false);
  });
});

describe('fills', () => {
  test('of another epoch, or twice, or of present blocks, change nothing', async () => {
    it = await StoreFixture.of(4 * B);
    it.source.deliver(0, 2, 0);
    it.source.deliver(0, 2, 2);
    assert.equal(it.presence.present, 0);
    it.source.deliver(0, 2);
    assert.equal(it.store.writeNow(0, B, patterned(B, 4), 0), Errno.OK);
    it.source.deliver(0, 2);
    it.holds(0, patterned(B, 4));
    assert.equal(it.presence.present, 2);
  });

  test('the last one is told, once', async () => {
    it = await StoreFixture.of(3 * B + 1);
    let told = 0;
    it.store.onComplete = () => told++;
    it.source.deliver(0, 3);
    assert.equal(told, 0);
    it.source.deliver(2, 4);
    it.source.deliver(0, 4);
    assert.equal(it.store.writeNow(0, B, zeros, 0), Errno.OK);
    assert.equal(told, 1);
  });

  test('of zeros: only missing blocks, whatever the image holds there', async () => {
    const size = 8 * B + 10;
    it = await StoreFixture.of(size);
    writeFileSync(it.image.path, patterned(4 * B, 6), { flag: 'r+' }); // left from before a retreat
    it.source.deliver(1, 2);
    assert.equal(it.store.writeNow(6 * B, B, patterned(B, 3), 0), Errno.OK);
    const read = new Io(0, size);
    it.store.read(read);
    assert.equal(await it.store.fillZeroes(1, 0, 9), Errno.OK);
    const wanted = Buffer.alloc(size);
    it.sourceBlock(1).copy(wanted, B);
    patterned(B, 3).copy(wanted, 6 * B);
    assert.equal(await read.done, Errno.OK);
    assert.ok(read.payload.equals(wanted));
    assert.ok(it.presence.complete);
  });

  test('of zeros, while the bits are dropped: nothing of them stays', async () => {
    it = await StoreFixture.of(4 * B);
    writeFileSync(it.image.path, patterned(4 * B, 6), { flag: 'r+' });
    const { calls } = it.hold('zero');
    const filled = it.store.fillZeroes(1, 0, 4);
    it.presence.drop(2);
    it.store.epoch = 2;
    const [read, write] = [new Io(0, B), Io.write(B, patterned(B, 2))];
    it.store.read(read);
    it.store.write(write);
    it.source.deliver(0, 4);
    assert.equal(it.presence.present, 0, 'the blocks are locked');
    it.source.demands = [];
    await calls[0]!.release();
    assert.equal(await filled, Errno.OK);
    assert.deepEqual(it.source.demands, [[0, 1]], 'who waits asks again');
    assert.equal(write.errno, Errno.OK);
    assert.equal(it.presence.present, 1);
    it.source.deliver(0, 4);
    assert.ok(read.payload.equals(it.sourceBlock(0)));
    it.holds(1, patterned(B, 2));
  });

  test('of zeros, while the guest writes: the write waits and lands on top', async () => {
    it = await StoreFixture.of(4 * B);
    writeFileSync(it.image.path, patterned(4 * B, 6), { flag: 'r+' });
    const { calls } = it.hold('zero');
    const filled = it.store.fillZeroes(1, 0, 4);
    assert.equal(it.store.writeNow(B, B, patterned(B, 2), 0), LATER);
    const [whole, part] = [Io.write(B, patterned(B, 2)), Io.write(2 * B + 9, patterned(9, 3))];
    it.store.write(whole);
    it.store.write(part);
    await calls[0]!.release();
    assert.deepEqual([await filled, whole.errno, part.errno], [Errno.OK, Errno.OK, Errno.OK]);
    it.holds(1, patterned(B, 2));
    const mixed = Buffer.alloc(B);
    patterned(9, 3).copy(mixed, 9);
    it.holds(2, mixed);
    it.holds(3, zeros);
  });

  test('of zeros that fail: missing still', async () => {
    it = await StoreFixture.of(4 * B);
    writeFileSync(it.image.path, patterned(4 * B, 6), { flag: 'r+' });
    const { calls } = it.hold('zero');
    const filled = it.store.fillZeroes(1, 0, 4);
    await calls[0]!.release(-28);
    assert.equal(await filled, Errno.ENOSPC);
    assert.equal(it.presence.present, 0);
  });
});

describe('fills by a thread', () => {
  test('are here when the thread says so, and not before', async () => {
    it = await StoreFixture.of(6 * B + 10);
    const { calls } = it.hold('writeLater');
    const reads = [new Io(0, B), new Io(6 * B, 10)];
    for (const read of reads) it.store.read(read);
    const filled = it.source.deliverLater(0, 7);
    assert.equal(it.presence.present, 0);
    assert.equal(reads[0]!.errno, undefined);
    await calls[0]!.release();
    assert.equal(await filled, Errno.OK);
    assert.deepEqual(
      reads.map(({ errno }) => errno),
      [Errno.OK, Errno.OK],
    );
    for (let block = 0; block < 6; block++) it.holds(block, it.sourceBlock(block));
    assert.equal(it.presence.complete, true);
    assert.equal(calls.length, 1);
  });

  test('a write into what is being filled waits, and wins; one elsewhere does not wait', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('writeLater');
    const filled = it.source.deliverLater(2, 6);
    const inside = Io.write(3 * B + 5, patterned(B, 7));
    const outside = Io.write(6 * B, patterned(B, 8));
    it.store.write(inside);
    it.store.write(outside);
    assert.deepEqual([inside.errno, outside.errno], [undefined, Errno.OK]);
    assert.equal(it.store.direct().writes, false);
    await calls[0]!.release();
    assert.equal(await filled, Errno.OK);
    assert.equal(inside.errno, Errno.OK);
    const wanted = Buffer.from(it.source.content.subarray(2 * B, 6 * B));
    patterned(B, 7).copy(wanted, B + 5);
    assert.ok(it.onDisk(2 * B, 4 * B).equals(wanted));
  });

  test('what the guest wrote before stays, and what it has in hand is left alone', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls: zeroing } = it.hold('zero');
    const own = patterned(B, 3);
    it.store.write(Io.write(1 * B, own));
    const zero = new Io(4 * B, B);
    it.store.zero(zero);
    const { calls } = it.hold('writeLater');
    const filled = it.source.deliverLater(0, 8);
    for (let call = 0; call < 3; call++) {
      assert.equal(calls.length, call + 1); // [0, 1), [2, 4), [5, 8)
      await calls[call]!.release();
    }
    assert.equal(await filled, Errno.OK);
    it.holds(1, own);
    assert.equal(it.presence.has(4), false);
    await zeroing[0]!.release();
    it.holds(4, zeros);
    assert.equal(calls.length, 3);
  });

  test('whose epoch ends meanwhile count for nothing', async () => {
    it = await StoreFixture.of(4 * B);
    const { calls } = it.hold('writeLater');
    const filled = it.source.deliverLater(0, 2);
    it.store.epoch++;
    await calls[0]!.release();
    assert.equal(await filled, Errno.OK);
    assert.equal(it.presence.present, 0);
    assert.equal(await it.source.deliverLater(2, 4, it.store.epoch - 1), Errno.OK);
    assert.equal(calls.length, 1);
  });

  test('that fail are not here', async () => {
    it = await StoreFixture.of(4 * B);
    const { calls } = it.hold('writeLater');
    const filled = it.source.deliverLater(0, 4);
    await calls[0]!.release(-28);
    assert.equal(await filled, Errno.ENOSPC);
    assert.equal(it.presence.present, 0);
  });
});
