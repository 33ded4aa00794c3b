import assert from 'node:assert/strict';
import { afterEach, describe, test } from 'node:test';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { B, StoreFixture } from '../../support/store.js';
import { Io, patterned, turns } from '../../support/volume.js';

let it: StoreFixture;
afterEach(() => it.close());
const zeros = Buffer.alloc(B);

/** What a read of the range answers now; undefined if it waits. */
function readNow(offset: number, length: number): Buffer | undefined {
  const request = new Io(offset, length);
  it.store.read(request);
  if (request.errno !== undefined) assert.equal(request.errno, Errno.OK);
  return request.errno === undefined ? undefined : request.payload;
}

describe('reads', () => {
  test('a miss waits for just the missing blocks, a hit does not wait for it', async () => {
    it = await StoreFixture.of(10 * B);
    it.source.deliver(2, 4);
    const miss = new Io(2 * B + 5, 4 * B);
    assert.equal(it.store.readNow(miss.offset, miss.length, miss.buffer, miss.at), LATER);
    it.store.read(miss);
    assert.deepEqual(it.source.demands, [[4, 7]]);
    assert.ok(readNow(2 * B, 2 * B)?.equals(it.source.content.subarray(2 * B, 4 * B)));
    it.source.deliver(4, 7);
    assert.equal(miss.errno, Errno.OK);
    assert.ok(miss.payload.equals(it.source.content.subarray(2 * B + 5, 6 * B + 5)));
  });

  test('one arrival serves all who wait for it, in order, and nobody else', async () => {
    it = await StoreFixture.of(10 * B);
    const reads = [new Io(0, B), new Io(5, 10), new Io(B, B), new Io(B - 1, 2)];
    for (const read of reads) it.store.read(read);
    it.source.deliver(0, 1);
    assert.deepEqual(
      reads.map((read) => read.errno),
      [0, 0, undefined, undefined],
    );
    assert.ok(reads[0]!.answered < reads[1]!.answered);
    it.source.deliver(1, 2);
    assert.deepEqual(
      reads.map((read) => read.errno),
      [0, 0, 0, 0],
    );
    assert.ok(reads[3]!.payload.equals(it.source.content.subarray(B - 1, B + 1)));
  });

  test('what the disk has to bring is waited for', async () => {
    it = await StoreFixture.of(4 * B);
    it.source.deliver(0, 4);
    it.image.readNow = () => -11;
    const readLater = it.image.readLater.bind(it.image);
    const begin: (() => void)[] = [];
    it.image.readLater = (...read) => begin.push(() => readLater(...read));
    const read = new Io(B, B);
    it.store.read(read);
    assert.equal(read.errno, undefined);
    let idle = false;
    void it.store.idle().then(() => {
      idle = true;
    });
    await turns(1);
    assert.equal(idle, false);
    begin[0]!();
    assert.equal(await read.done, Errno.OK);
    assert.ok(read.payload.equals(it.sourceBlock(1)));
    await turns(1);
    assert.equal(idle, true);
  });

  test('blocks that will not come: who waits for them gets the error, others go on waiting', async () => {
    it = await StoreFixture.of(10 * B);
    const [read, write, other] = [new Io(B, B), Io.write(B + 1, patterned(10)), new Io(3 * B, B)];
    it.store.read(read);
    it.store.write(write);
    it.store.read(other);
    it.store.giveUp(1, 2, Errno.EIO);
    assert.deepEqual([read.errno, write.errno, other.errno], [Errno.EIO, Errno.EIO, undefined]);
    assert.equal(it.presence.has(1), false);
  });

  test('no source: an error at once', async () => {
    it = await StoreFixture.of(4 * B);
    it.store.supplier = null;
    const [read, write] = [new Io(0, B), Io.write(1, patterned(1))];
    it.store.read(read);
    it.store.write(write);
    assert.deepEqual([read.errno, write.errno], [Errno.EIO, Errno.EIO]);
  });

  test('nothing is kept: reads pass through, also parked ones once that is so, and fills are dropped', async () => {
    it = await StoreFixture.of(4 * B);
    const parked = new Io(0, B);
    it.store.read(parked);
    it.store.keeps = false;
    it.store.retryParked();
    const read = new Io(B, 2 * B);
    it.store.read(read);
    assert.deepEqual(it.source.through, [parked, read]);
    assert.equal(it.source.deliver(0, 4), Errno.OK);
    assert.equal(it.presence.present, 0);
    assert.ok(it.onDisk(0, 4 * B).equals(Buffer.alloc(4 * B)));
  });

  test('an abandoned read is completed and asks for nothing', async () => {
    it = await StoreFixture.of(4 * B);
    const read = new Io(0, 2 * B);
    it.store.read(read);
    read.abandoned = true;
    it.source.demands = [];
    it.source.deliver(0, 1);
    assert.notEqual(read.errno, undefined);
    assert.deepEqual(it.source.demands, []);
  });
});

describe('writes', () => {
  test('whole blocks need no source, and a fill that comes later changes nothing', async () => {
    it = await StoreFixture.of(10 * B);
    const data = patterned(2 * B, 5);
    assert.equal(it.store.writeNow(3 * B, 2 * B, data, 0), Errno.OK);
    assert.deepEqual(it.source.demands, []);
    it.source.deliver(2, 6);
    it.holds(2, it.sourceBlock(2));
    it.holds(3, data.subarray(0, B));
    it.holds(4, data.subarray(B));
    it.holds(5, it.sourceBlock(5));
  });

  test('partly covered edges wait for their blocks, both asked for at once; the middle is not asked for', async () => {
    it = await StoreFixture.of(10 * B);
    const data = patterned(3 * B, 5);
    const write = Io.write(B + 100, data);
    it.store.write(write);
    assert.deepEqual(it.source.demands, [
      [1, 2],
      [4, 5],
    ]);
    it.source.deliver(4, 5);
    assert.equal(write.errno, undefined);
    assert.equal(it.presence.has(2), false);
    it.source.deliver(1, 2);
    assert.equal(write.errno, Errno.OK);
    const wanted = Buffer.from(it.source.content.subarray(B, 5 * B));
    data.copy(wanted, 100);
    assert.ok(it.onDisk(B, 4 * B).equals(wanted));
    assert.ok(it.presence.hasAll(1, 5));
  });

  test('partial writes to one block, one inside another, all land on the source data in their order', async () => {
    it = await StoreFixture.of(2 * B);
    const wanted = Buffer.from(it.sourceBlock(1));
    const writes = [
      [0, 100],
      [50, 100],
      [60, 10],
      [4000, 96],
    ].map(([at, length], i) => {
      const data = patterned(length!, i + 1);
      data.copy(wanted, at);
      return Io.write(B + at!, data);
    });
    for (const write of writes) it.store.write(write);
    it.source.deliver(1, 2);
    assert.deepEqual(
      writes.map((write) => write.errno),
      [0, 0, 0, 0],
    );
    it.holds(1, wanted);
  });

  test('a block written as a whole while partial writes and reads wait for it serves them', async () => {
    it = await StoreFixture.of(2 * B);
    const [read, part] = [new Io(0, B), Io.write(10, patterned(5, 9))];
    it.store.read(read);
    it.store.write(part);
    const whole = patterned(B, 3);
    assert.equal(it.store.writeNow(0, B, whole, 0), Errno.OK);
    assert.ok(read.payload.equals(whole));
    assert.equal(part.errno, Errno.OK);
    it.source.deliver(0, 1);
    patterned(5, 9).copy(whole, 10);
    it.holds(0, whole);
  });

  test('the last block of an image cut short: a write to its end covers it, one before does not', async () => {
    const size = 3 * B + 100;
    it = await StoreFixture.of(size);
    const partial = Io.write(3 * B, patterned(99, 2));
    it.store.write(partial);
    assert.equal(partial.errno, undefined);
    assert.equal(it.store.writeNow(3 * B, 100, patterned(100, 7), 0), Errno.OK);
    assert.equal(partial.errno, Errno.OK);
    const wanted = patterned(100, 7);
    patterned(99, 2).copy(wanted);
    it.holds(3, wanted);
    assert.equal(it.image.size, size);
    assert.ok(it.store.presentBytes < size);
    it.source.deliver(0, 4);
    assert.equal(it.store.presentBytes, size);
  });

  test('an abandoned write that waits is not applied', async () => {
    it = await StoreFixture.of(2 * B);
    const write = Io.write(10, patterned(10, 4));
    it.store.write(write);
    write.abandoned = true;
    it.source.deliver(0, 1);
    assert.equal(write.errno, Errno.EIO);
    it.holds(0, it.sourceBlock(0));
  });

  test('a write that the disk has no room for: ENOSPC, and its blocks are still missing', async () => {
    it = await StoreFixture.of(4 * B);
    const real = it.image.write.bind(it.image);
    it.image.write = () => -28;
    assert.equal(it.store.writeNow(0, B, zeros, 0), Errno.ENOSPC);
    assert.equal(it.source.deliver(1, 2), Errno.ENOSPC);
    assert.equal(it.presence.present, 0);
    it.image.write = real;
    assert.equal(it.source.deliver(0, 2), Errno.OK);
    assert.equal(it.presence.present, 2);
  });
});

describe('a zero under way', () => {
  test('a fill skips its blocks, whoever reads them waits and gets zeros', async () => {
    it = await StoreFixture.of(10 * B);
    const { calls } = it.hold('zero');
    const zero = new Io(3 * B, 2 * B);
    it.store.zero(zero);
    const read = new Io(2 * B, 4 * B);
    it.store.read(read);
    it.source.deliver(0, 10);
    assert.equal(read.errno, undefined);
    assert.deepEqual([it.presence.present, it.presence.has(3), it.presence.has(4)], [8, false, false]);
    await calls[0]!.release();
    assert.equal(zero.errno, Errno.OK);
    assert.equal(read.errno, Errno.OK);
    assert.ok(read.payload.subarray(B, 3 * B).equals(Buffer.alloc(2 * B)));
    it.holds(3, zeros);
  });

  test('it fails: its blocks are missing still, and are asked for again', async () => {
    it = await StoreFixture.of(10 * B);
    const { calls } = it.hold('zero');
    const zero = new Io(3 * B, 2 * B);
    it.store.zero(zero);
    const read = new Io(3 * B, B);
    it.store.read(read);
    it.source.deliver(0, 10);
    it.source.demands = [];
    await calls[0]!.release(-28);
    assert.equal(zero.errno, Errno.ENOSPC);
    assert.deepEqual(it.source.demands, [[3, 4]]);
    it.source.deliver(3, 5);
    assert.ok(read.payload.equals(it.sourceBlock(3)));
  });

  test('writes to its blocks wait and land in their order; others do not wait', async () => {
    it = await StoreFixture.of(10 * B);
    const { calls } = it.hold('zero');
    const zero = new Io(3 * B, 2 * B);
    it.store.zero(zero);
    const writes = [1, 2, 3].map((seed) => Io.write(4 * B, patterned(B, seed)));
    assert.equal(it.store.writeNow(4 * B, B, patterned(B), 0), LATER);
    for (const write of writes) it.store.write(write);
    assert.equal(it.store.writeNow(5 * B, B, patterned(B, 8), 0), Errno.OK);
    await calls[0]!.release();
    assert.deepEqual(
      [zero, ...writes].map((request) => request.errno),
      [0, 0, 0, 0],
    );
    it.holds(3, zeros);
    it.holds(4, patterned(B, 3));
  });

  test('a second zero and a trim of its blocks wait for it', async () => {
    it = await StoreFixture.of(10 * B);
    const { calls } = it.hold('zero');
    const punches = it.hold('punch').calls;
    const [one, two, trim] = [new Io(0, 2 * B), new Io(B, 2 * B), new Io(0, 10 * B)];
    it.store.zero(one);
    it.store.zero(two);
    it.store.trim(trim);
    assert.equal(calls.length + punches.length, 1);
    await calls[0]!.release();
    assert.deepEqual([calls.length, punches.length], [2, 0]);
    await calls[1]!.release();
    assert.equal(punches.length, 1);
    await punches[0]!.release();
    assert.deepEqual([one.errno, two.errno, trim.errno], [0, 0, 0]);
  });

  test('its partly covered edges wait for their blocks', async () => {
    it = await StoreFixture.of(10 * B);
    const zero = new Io(B + 10, 2 * B);
    it.store.zero(zero);
    assert.equal(it.presence.present, 0);
    it.source.deliverAll();
    assert.equal(await zero.done, Errno.OK);
    const wanted = Buffer.from(it.source.content.subarray(B, 4 * B)).fill(0, 10, 2 * B + 10);
    assert.ok(it.onDisk(B, 3 * B).equals(wanted));
    assert.ok(it.presence.hasAll(1, 4));
  });

  test('NO_HOLE keeps the space', async () => {
    it = await StoreFixture.of(64 * B);
    const [hole, full] = [new Io(0, 8 * B), new Io(8 * B, 8 * B, CommandFlag.NO_HOLE)];
    it.store.zero(hole);
    it.store.zero(full);
    assert.deepEqual([await hole.done, await full.done], [0, 0]);
    assert.ok(it.presence.hasAll(0, 16));
    assert.ok(it.image.isHole(0, 8 * B));
  });
});

describe('changes, as they are told', () => {
  const told = (request: Io): number[][] => request.changes.map(([offset, length]) => [offset, length]);

  test('a write of its range, in the step that answers it; with FUA before the flush', async () => {
    it = await StoreFixture.of(4 * B);
    const write = Io.write(0, patterned(B));
    it.store.write(write);
    assert.deepEqual([told(write), write.errno], [[[0, B]], Errno.OK]);
    const durable = Io.write(B, patterned(2 * B), CommandFlag.FUA);
    it.store.write(durable);
    assert.deepEqual([told(durable), durable.errno], [[[B, 2 * B]], undefined]);
    assert.equal(await durable.done, Errno.OK);
  });

  test('a trim of the whole blocks that were given back, or of nothing', async () => {
    it = await StoreFixture.of(10 * B);
    const [trim, small] = [new Io(B - 1, 3 * B), new Io(5, B)];
    for (const request of [trim, small]) it.store.trim(request);
    assert.deepEqual([await trim.done, await small.done], [Errno.OK, Errno.OK]);
    assert.deepEqual([told(trim), told(small)], [[[B, 2 * B]], [[5, 0]]]);
    it.image.punch = () => Promise.resolve(false);
    const unable = new Io(B, 2 * B);
    it.store.trim(unable);
    assert.equal(await unable.done, Errno.OK);
    assert.deepEqual(told(unable), [[B, 0]]);
  });

  test('a zero when it is done, before who waits for its lock; nothing where it failed', async () => {
    it = await StoreFixture.of(10 * B);
    const { calls } = it.hold('zero');
    const [zero, write] = [new Io(0, 2 * B), Io.write(B, patterned(B))];
    it.store.zero(zero);
    it.store.write(write);
    assert.deepEqual(told(zero), []);
    await calls[0]!.release();
    assert.deepEqual([told(zero), told(write)], [[[0, 2 * B]], [[B, B]]]);
    assert.ok(zero.changes[0]![2] < write.changes[0]![2]);
    const failing = new Io(0, 2 * B);
    it.store.zero(failing);
    await calls[1]!.release(-28);
    assert.deepEqual([await failing.done, told(failing)], [Errno.ENOSPC, []]);
  });

  test('whoever waited for a block that a write brought is told after it', async () => {
    it = await StoreFixture.of(4 * B);
    const [part, whole] = [Io.write(5, patterned(10)), Io.write(0, patterned(B))];
    it.store.write(part);
    it.store.write(whole);
    assert.ok(whole.changes[0]![2] < part.changes[0]![2]);
  });
});
