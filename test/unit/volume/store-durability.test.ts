/** What an answered flush means, who may write, and what is told of the blocks. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, describe, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { CommandFlag, Errno } from '../../../src/nbd/constants.js';
import { LATER } from '../../../src/nbd/device.js';
import { BlockStore, OPEN } from '../../../src/volume/store.js';
import { B, StoreFixture } from '../../support/store.js';
import { failsWith, Io, patterned, turns, until } from '../../support/volume.js';

let it: StoreFixture;
afterEach(() => it.close());

function flush(): Io {
  const request = new Io(0, 0);
  it.store.flush(request);
  return request;
}

describe('durability', () => {
  test('a flush is answered behind the sync of the image; those who ask meanwhile share the next one', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('sync');
    const first = flush();
    await until(() => calls.length === 1, 'the first sync');
    it.store.writeNow(0, B, patterned(B), 0);
    const later = [flush(), flush(), flush()];
    await calls[0]!.release();
    await first.done;
    assert.equal(later[0]!.errno, undefined, 'the sync under way began before the write was answered');
    await until(() => calls.length === 2, 'the second sync');
    await calls[1]!.release();
    assert.deepEqual(await Promise.all(later.map((request) => request.done)), [0, 0, 0]);
    await turns();
    assert.equal(calls.length, 2);
  });

  test('presence is on disk when the flush is answered, and not before the image is synced', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('sync');
    it.store.writeNow(3 * B, B, patterned(B), 0);
    const map = (): Buffer =>
      readFileSync(join((it.presence as unknown as { folder: string }).folder, 'presence.map')).subarray(
        16384,
      );
    const request = flush();
    await until(() => calls.length === 1, 'the sync');
    await turns(20);
    assert.ok(map().equals(Buffer.alloc(8192)));
    assert.equal(request.errno, undefined);
    await calls[0]!.release();
    assert.equal(await request.done, 0);
    assert.equal(map()[4096 + 64], 1 << 3);
  });

  test('after one failed sync no flush and no FUA succeeds again, though the disk says it is well; reads and writes go on', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('sync');
    it.store.writeNow(0, B, patterned(B), 0);
    const failed = flush();
    await until(() => calls.length === 1, 'the sync');
    await calls[0]!.release(-5);
    assert.equal(await failed.done, Errno.EIO);
    failsWith('image-io', /could not be made durable; check/)(it.store.failure);
    it.image.sync = async () => 0;
    const fua = Io.write(0, patterned(B, 2), CommandFlag.FUA);
    it.store.write(fua);
    const trim = new Io(B, B, CommandFlag.FUA);
    it.store.trim(trim);
    const zero = new Io(2 * B, B, CommandFlag.FUA);
    it.store.zero(zero);
    const answers = await Promise.all([flush().done, fua.done, trim.done, zero.done]);
    assert.deepEqual(answers, [Errno.EIO, Errno.EIO, Errno.EIO, Errno.EIO]);
    assert.equal(it.store.writeNow(0, B, patterned(B, 3), 0), Errno.OK);
    const read = new Io(0, B);
    it.store.read(read);
    assert.ok(read.payload.equals(patterned(B, 3)));
  });

  test('FUA is answered behind a sync, for writes, zeroes and trims; without it nothing is synced', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('sync');
    const plain = Io.write(0, patterned(B));
    it.store.write(plain);
    assert.equal(plain.errno, Errno.OK);
    const requests = [
      Io.write(B, patterned(B), CommandFlag.FUA),
      new Io(2 * B, B, CommandFlag.FUA),
      new Io(3 * B, B, CommandFlag.FUA),
    ];
    it.store.write(requests[0]!);
    await until(() => calls.length === 1, 'the sync');
    it.store.zero(requests[1]!);
    it.store.trim(requests[2]!);
    await until(() => it.presence.hasAll(2, 4), 'both on their thread');
    assert.deepEqual(
      requests.map((request) => request.errno),
      [undefined, undefined, undefined],
    );
    await calls[0]!.release();
    assert.equal(await requests[0]!.done, Errno.OK);
    await until(() => calls.length === 2, 'the sync behind zero and trim');
    assert.equal(requests[1]!.errno, undefined);
    await calls[1]!.release();
    assert.deepEqual(await Promise.all(requests.map((request) => request.done)), [0, 0, 0]);
  });

  test('a refused FUA write is refused without a sync', async () => {
    it = await StoreFixture.of(8 * B);
    const { calls } = it.hold('sync');
    it.store.setGate({ kind: 'refused', errno: Errno.EPERM });
    const write = Io.write(0, patterned(B), CommandFlag.FUA);
    it.store.write(write);
    assert.equal(write.errno, Errno.EPERM);
    await turns();
    assert.equal(calls.length, 0);
  });
});

describe('the gate', () => {
  test('refused: every change, with its errno, and nothing is written', async () => {
    it = await StoreFixture.of(4 * B);
    it.store.setGate({ kind: 'refused', errno: Errno.ESHUTDOWN });
    assert.equal(it.store.writeNow(0, B, patterned(B), 0), Errno.ESHUTDOWN);
    const changes = [Io.write(0, patterned(B)), new Io(0, B), new Io(0, B), new Io(1, 5)];
    it.store.write(changes[0]!);
    it.store.zero(changes[1]!);
    it.store.trim(changes[2]!);
    it.store.trim(changes[3]!);
    assert.deepEqual(
      changes.map((request) => request.errno),
      new Array(4).fill(Errno.ESHUTDOWN),
    );
    assert.equal(it.presence.present, 0);
  });

  test('closed while changes wait for a block or a lock: they meet it too', async () => {
    it = await StoreFixture.of(4 * B);
    const { calls } = it.hold('zero');
    const [part, zero, locked] = [Io.write(1, patterned(5)), new Io(2 * B, B), Io.write(2 * B, patterned(B))];
    it.store.write(part);
    it.store.zero(zero);
    it.store.write(locked);
    it.store.setGate({ kind: 'refused', errno: Errno.EPERM });
    it.source.deliver(0, 1);
    await calls[0]!.release();
    assert.deepEqual([part.errno, zero.errno, locked.errno], [Errno.EPERM, Errno.OK, Errno.EPERM]);
    it.holds(0, it.sourceBlock(0));
    it.holds(2, Buffer.alloc(B));
  });

  test('ask: once for all who come, who go on in their order when it was answered', async () => {
    it = await StoreFixture.of(4 * B);
    let asked = 0;
    let answer = (): void => {};
    it.store.setGate({
      kind: 'ask',
      ask: () => {
        asked++;
        return new Promise((resolve) => {
          answer = resolve;
        });
      },
    });
    assert.equal(it.store.writeNow(0, B, patterned(B), 0), LATER);
    const writes = [1, 2, 3].map((seed) => Io.write(0, patterned(B, seed)));
    const zero = new Io(B, B);
    for (const write of writes) it.store.write(write);
    it.store.zero(zero);
    await turns();
    assert.deepEqual([asked, writes[0]!.errno], [1, undefined]);
    it.store.setGate(OPEN);
    answer();
    assert.equal(await zero.done, Errno.OK);
    assert.deepEqual(
      writes.map((write) => write.errno),
      [0, 0, 0],
    );
    it.holds(0, patterned(B, 3));
  });

  test('ask that fails: all who wait get the error, and the next one asks anew', async () => {
    it = await StoreFixture.of(4 * B);
    let asked = 0;
    const ask = (): Promise<void> => {
      asked++;
      return Promise.reject(new BlockferryError('phase', 'no'));
    };
    it.store.setGate({ kind: 'ask', ask });
    const writes = [Io.write(0, patterned(B)), Io.write(B, patterned(B))];
    for (const write of writes) it.store.write(write);
    assert.deepEqual(await Promise.all(writes.map((write) => write.done)), [Errno.EPERM, Errno.EPERM]);
    const again = Io.write(0, patterned(B));
    it.store.write(again);
    assert.equal(await again.done, Errno.EPERM);
    assert.equal(asked, 2);
    assert.equal(it.presence.present, 0);
  });

  test('a client that goes away while it is asked writes nothing', async () => {
    it = await StoreFixture.of(4 * B);
    it.store.setGate({
      kind: 'ask',
      ask: async () => {
        it.store.setGate(OPEN);
      },
    });
    const write = Io.write(0, patterned(B));
    it.store.write(write);
    write.abandoned = true;
    assert.equal(await write.done, Errno.EIO);
    assert.equal(it.presence.present, 0);
  });
});

describe('status', () => {
  const ask = (context: string, offset: number, length: number, extentsMax?: number): [number, number][] => {
    const request = Io.status(context, offset, length, extentsMax);
    it.store.status(request);
    assert.equal(request.errno, Errno.OK);
    return request.extents;
  };

  /** 64 KiB pieces, as some file systems keep no smaller holes: source, data, hole, source, and a cut last block. */
  async function mixed(): Promise<number> {
    const size = 64 * B + 100;
    it = await StoreFixture.of(size);
    it.source.deliver(16, 32);
    assert.equal(await it.store.fillZeroes(1, 32, 48), Errno.OK);
    it.source.deliver(64, 65);
    return size;
  }

  test('qemu:allocation-depth: 1 here, 2 at the source', async () => {
    const size = await mixed();
    assert.deepEqual(ask('qemu:allocation-depth', 0, size), [
      [16 * B, 2],
      [32 * B, 1],
      [16 * B, 2],
      [100, 1],
    ]);
    assert.deepEqual(ask('qemu:allocation-depth', 16 * B - 7, 20), [
      [7, 2],
      [13, 1],
    ]);
  });

  test('base:allocation: holes that are here are holes, what is not here is data', async () => {
    const size = await mixed();
    const merged: [number, number][] = [];
    for (const [length, status] of ask('base:allocation', 0, size)) {
      const last = merged.at(-1);
      if (last?.[1] === status) last[0] += length;
      else merged.push([length, status]);
    }
    assert.deepEqual(merged, [
      [32 * B, 0],
      [16 * B, 3],
      [16 * B + 100, 0],
    ]);
    assert.deepEqual(ask('base:allocation', 40 * B + 1, 10), [[10, 3]]);
  });

  test('never more extents than asked for, at least one, none beyond the range', async () => {
    const size = await mixed();
    for (const context of ['base:allocation', 'qemu:allocation-depth']) {
      assert.deepEqual(ask(context, 0, size, 1), [[16 * B, context === 'base:allocation' ? 0 : 2]]);
      for (const offset of [0, 1, 17 * B + 3, 32 * B - 1, 64 * B, size - 1]) {
        for (const length of [1, B, size].map((length) => Math.min(length, size - offset))) {
          const extents = ask(context, offset, length);
          assert.equal(
            extents.reduce((sum, [bytes]) => sum + bytes, 0),
            length,
          );
        }
      }
    }
  });

  test('a plain volume: depth 1 all over', async () => {
    it = await StoreFixture.of(4 * B);
    const plain = new BlockStore(it.image, null, 1);
    const request = Io.status('qemu:allocation-depth', 0, 4 * B);
    plain.status(request);
    assert.deepEqual(request.extents, [[4 * B, 1]]);
    assert.equal(plain.presentBytes, 4 * B);
  });
});

test('CACHE prefetches where fetched blocks are kept', async () => {
  it = await StoreFixture.of(8 * B);
  const requests = [new Io(B + 1, B), new Io(0, B)];
  it.store.cache(requests[0]!);
  it.store.keeps = false;
  it.store.cache(requests[1]!);
  assert.deepEqual(it.source.prefetches, [[1, 3]]);
  assert.deepEqual(
    requests.map((request) => request.errno),
    [0, 0],
  );
});

test('steps run serially do not meet a commit half way', async () => {
  it = await StoreFixture.of(8 * B);
  const { calls } = it.hold('sync');
  const order: string[] = [];
  const first = it.store.commit().then(() => order.push('commit'));
  const step = it.store.serially(async () => order.push('step'));
  const failing = it.store.serially(() => Promise.reject(new Error('one step')));
  await until(() => calls.length === 1, 'the first sync');
  const second = it.store.commit().then(() => order.push('commit'));
  await turns();
  assert.deepEqual(order, []);
  await calls[0]!.release();
  await assert.rejects(failing, /one step/);
  await until(() => calls.length === 2, 'the second sync');
  await calls[1]!.release();
  await Promise.all([first, step, second]);
  assert.deepEqual(order, ['commit', 'step', 'commit']);
});
