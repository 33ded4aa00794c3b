/** Writes that the kernel holds up: they leave the volume's thread, and are as right there as on it. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { afterEach, beforeEach, describe, mock, test } from 'node:test';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { GuestDevice } from '../../../src/volume/faces.js';
import type { Volume } from '../../../src/volume/volume.js';
import { B, type HeldCall, StoreFixture } from '../../support/store.js';
import { Io, patterned, turns, until } from '../../support/volume.js';
import { plainVolume, SIZE } from '../../support/volumes.js';

let it: StoreFixture;
const opened: StoreFixture[] = [];
let nowMs = 0;
beforeEach(() => {
  mock.method(performance, 'now', () => nowMs);
});
afterEach(() => {
  mock.restoreAll();
  for (const fixture of opened.splice(0)) fixture.close();
});

async function storeOf(blocks: number): Promise<void> {
  it = await StoreFixture.of(blocks * B);
  opened.push(it);
}

/** The next write on the volume's thread takes `ms`. */
function nextTakes(ms: number): void {
  const real = it.image.write.bind(it.image);
  it.image.write = (...args) => {
    it.image.write = real;
    nowMs += ms;
    return real(...args);
  };
}

/** A store behind a write that was held up; `calls` are the writes that it has given to a thread. */
async function slowStore(blocks: number): Promise<HeldCall[]> {
  await storeOf(blocks);
  const { calls } = it.hold('writeLater');
  it.store.directWriteHeldUp();
  return calls;
}

const errnos = (...requests: Io[]): (number | undefined)[] => requests.map(({ errno }) => errno);

describe('a write that was held up', () => {
  test('is answered as ever; those behind it go to a thread', async () => {
    await storeOf(8);
    const { calls } = it.hold('writeLater');
    nextTakes(4);
    assert.equal(it.store.writeNow(0, B, patterned(B), 0), Errno.OK);
    assert.equal(it.store.direct().writes, true);
    nextTakes(5);
    assert.equal(it.store.writeNow(B, B, patterned(B, 2), 0), Errno.OK);
    it.holds(1, patterned(B, 2));
    assert.equal(it.store.writeNow(2 * B, B, patterned(B, 3), 0), LATER);
    assert.deepEqual([it.store.direct().writes, it.store.direct().reads], [false, true]);
    const write = Io.write(2 * B, patterned(B, 3));
    it.store.write(write);
    assert.deepEqual([calls.length, write.errno, write.changes.length], [1, undefined, 0]);
    assert.equal(it.presence.has(2), false);
    await calls[0]!.release();
    assert.equal(write.errno, Errno.OK);
    assert.deepEqual(write.changes[0]!.slice(0, 2), [2 * B, B]);
    it.holds(2, patterned(B, 3));
  });

  test('behind 32 quick ones in turn they are made on the volume’s thread again', async () => {
    const calls = await slowStore(4);
    for (let i = 0; i < 40; i++) {
      const write = Io.write(0, patterned(B, i));
      it.store.write(write);
      nowMs += i === 7 ? 2 : 0; // that one was not
      await calls[i]!.release();
      assert.equal(write.errno, Errno.OK);
    }
    assert.equal(calls.length, 40);
    const write = Io.write(0, patterned(B, 99));
    it.store.write(write);
    assert.deepEqual([calls.length, write.errno], [40, Errno.OK]);
    it.holds(0, patterned(B, 99));
    assert.equal(it.store.direct().writes, true);
  });
});

describe('a write that a thread has under way', () => {
  test('those to its blocks wait and land in their order; others, and reads, do not wait', async () => {
    const calls = await slowStore(8);
    it.source.deliver(0, 8);
    const first = Io.write(2 * B, patterned(2 * B, 1));
    it.store.write(first);
    const later = [2, 3, 4].map((seed) => Io.write(3 * B + 10, patterned(100, seed)));
    const other = Io.write(5 * B, patterned(B, 5));
    for (const write of [...later, other]) it.store.write(write);
    assert.equal(calls.length, 2);
    const read = new Io(3 * B, B);
    it.store.read(read);
    assert.equal(read.errno, Errno.OK);
    await calls[1]!.release();
    await calls[0]!.release();
    assert.deepEqual(errnos(first, other, ...later), [0, 0, undefined, undefined, undefined]);
    for (let i = 0; i < 3; i++) {
      assert.equal(calls.length, 3 + i, 'one after the other');
      await calls[2 + i]!.release();
      assert.equal(later[i]!.errno, Errno.OK);
    }
    const wanted = patterned(2 * B, 1);
    patterned(100, 4).copy(wanted, B + 10);
    it.holds(2, wanted.subarray(0, B));
    it.holds(3, wanted.subarray(B));
    it.holds(5, patterned(B, 5));
  });

  test('a zero and a trim of its blocks wait for it', async () => {
    const calls = await slowStore(8);
    const [zeros, punches] = [it.hold('zero').calls, it.hold('punch').calls];
    const [write, zero, trim] = [Io.write(0, patterned(2 * B)), new Io(B, 2 * B), new Io(0, 8 * B)];
    it.store.write(write);
    it.store.zero(zero);
    it.store.trim(trim);
    assert.deepEqual([zeros.length, punches.length], [0, 0]);
    await calls[0]!.release();
    assert.deepEqual([zeros.length, punches.length], [1, 0]);
    await zeros[0]!.release();
    await punches[0]!.release();
    assert.deepEqual(errnos(write, zero, trim), [0, 0, 0]);
    it.holds(0, Buffer.alloc(B));
  });

  test('a fill skips its blocks: the guest’s write wins, and serves who waits for them', async () => {
    const calls = await slowStore(8);
    const write = Io.write(2 * B, patterned(2 * B, 9));
    it.store.write(write);
    const read = new Io(B, 4 * B);
    it.store.read(read);
    it.source.deliver(0, 8);
    assert.deepEqual([it.presence.present, it.presence.has(2), it.presence.has(3)], [6, false, false]);
    assert.equal(read.errno, undefined);
    await calls[0]!.release();
    assert.deepEqual(errnos(write, read), [0, 0]);
    assert.ok(it.onDisk(2 * B, 2 * B).equals(patterned(2 * B, 9)));
    assert.ok(read.payload.subarray(B, 3 * B).equals(patterned(2 * B, 9)));
    it.source.deliver(0, 8);
    assert.ok(it.onDisk(2 * B, 2 * B).equals(patterned(2 * B, 9)));
    assert.equal(it.presence.complete, true);
  });

  test('one that covers a missing block in part goes there when the block has come', async () => {
    const calls = await slowStore(8);
    const write = Io.write(B + 5, patterned(B, 9));
    it.store.write(write);
    assert.equal(calls.length, 0);
    it.source.deliverAll();
    assert.equal(calls.length, 1);
    await calls[0]!.release();
    assert.equal(write.errno, Errno.OK);
    const wanted = Buffer.from(it.source.content.subarray(B, 3 * B));
    patterned(B, 9).copy(wanted, 5);
    assert.ok(it.onDisk(B, 2 * B).equals(wanted));
  });

  test('it fails: its errno, nothing is told, its blocks are missing still and are asked for again', async () => {
    const calls = await slowStore(8);
    const [write, durable] = [Io.write(2 * B, patterned(B)), Io.write(4 * B, patterned(B), CommandFlag.FUA)];
    const syncs = it.hold('sync').calls;
    it.store.write(write);
    it.store.write(durable);
    const read = new Io(2 * B, B);
    it.store.read(read);
    it.source.deliver(0, 8);
    it.source.demands = [];
    await calls[0]!.release(-28);
    await calls[1]!.release(-5);
    await turns();
    assert.deepEqual(errnos(write, durable), [Errno.ENOSPC, Errno.EIO]);
    assert.deepEqual([write.changes.length, durable.changes.length, syncs.length], [0, 0, 0]);
    assert.deepEqual([it.presence.has(2), it.presence.has(4)], [false, false]);
    assert.deepEqual(it.source.demands, [[2, 3]]);
    it.source.deliver(2, 3);
    assert.ok(read.payload.equals(it.sourceBlock(2)));
    assert.equal(it.store.direct().writes, false, 'a write that failed says nothing of the others');
  });

  test('FUA: made durable behind it, and answered behind that', async () => {
    const calls = await slowStore(8);
    const syncs = it.hold('sync').calls;
    const write = Io.write(0, patterned(B), CommandFlag.FUA);
    it.store.write(write);
    await turns();
    assert.equal(syncs.length, 0);
    await calls[0]!.release();
    await until(() => syncs.length === 1, 'the sync');
    assert.deepEqual([write.errno, write.changes.length], [undefined, 1]);
    await syncs[0]!.release();
    assert.equal(await write.done, Errno.OK);
  });

  test('who wants the image to be left alone waits for it', async () => {
    const calls = await slowStore(8);
    it.store.write(Io.write(0, patterned(B)));
    const told: string[] = [];
    void it.store.unchanging().then(() => told.push('unchanging'));
    void it.store.idle().then(() => told.push('idle'));
    await turns();
    assert.deepEqual(told, []);
    await calls[0]!.release();
    assert.deepEqual(told, ['unchanging', 'idle']);
  });

  test('its session goes: it is made all the same, what waits for it is not', async () => {
    const calls = await slowStore(8);
    const [write, waiting] = [Io.write(0, patterned(B, 1)), Io.write(0, patterned(B, 2))];
    it.store.write(write);
    it.store.write(waiting);
    write.abandoned = waiting.abandoned = true;
    await calls[0]!.release();
    assert.deepEqual([...errnos(write, waiting), calls.length], [Errno.OK, Errno.EIO, 1]);
    it.holds(0, patterned(B, 1));
  });
});

describe('a volume whose writes are held up', () => {
  /** A write under way, one that waits for it, and how to end it. */
  async function held(volume: Volume): Promise<{ writes: Io[]; release: () => void }> {
    const guest = new GuestDevice(volume);
    guest.directWriteHeldUp();
    const { image } = volume.store;
    const real = image.writeLater.bind(image);
    let release = (): void => {};
    const released = new Promise<void>((resolve) => {
      release = resolve;
    });
    image.writeLater = async (...args) => {
      await released;
      return real(...args);
    };
    const writes = [Io.write(0, patterned(B, 7)), Io.write(10, patterned(B, 8))];
    for (const write of writes) guest.write(write);
    return { writes, release };
  }

  test('is sealed, or closed, behind the one under way; what waited for it is refused', async () => {
    for (const [ends, errno] of [
      [(volume: Volume) => volume.seal(2), Errno.EPERM],
      [(volume: Volume) => volume.close(), Errno.ESHUTDOWN],
    ] as const) {
      const volume = await plainVolume();
      const { writes, release } = await held(volume);
      let over = false;
      const ended = ends(volume).then(() => {
        over = true;
      });
      await turns(20);
      assert.deepEqual([over, ...errnos(...writes)], [false, undefined, undefined]);
      release();
      await ended;
      assert.deepEqual(errnos(...writes), [Errno.OK, errno]);
      const wanted = patterned(SIZE);
      patterned(B, 7).copy(wanted);
      assert.ok(readFileSync(volume.store.image.path).equals(wanted));
    }
  });
});
