/** First accesses: what is recorded, in which order, and for how long. */
import assert from 'node:assert/strict';
import { describe, mock, test } from 'node:test';
import { GuestDevice, LinkDevice } from '../../../src/volume/faces.js';
import { FirstAccess, RECORD_MS_MIN, TRIVIAL_REGIONS } from '../../../src/volume/first-access.js';
import { Heat, REGION_BYTES } from '../../../src/volume/heat.js';
import type { Volume } from '../../../src/volume/volume.js';
import { HeldSource, Io, patterned } from '../../support/volume.js';
import { proxiedVolume, volumeIn } from '../../support/volumes.js';

const REGIONS = 1000;

function recorder(regions = REGIONS): { heat: Heat; record: FirstAccess } {
  const heat = new Heat(regions * REGION_BYTES);
  const record = new FirstAccess(heat);
  record.follow('standby');
  record.follow('relocating');
  return { heat, record };
}

const told = (record: FirstAccess): number[] => [...record.told.byRank()];
const read = (heat: Heat, ...regions: number[]): void => {
  for (const region of regions) heat.read(region * REGION_BYTES, 4096);
};
const range = (first: number, end: number): number[] =>
  Array.from({ length: end - first }, (_, index) => first + index);

describe('a recorder of first accesses', () => {
  test('reads that wait in their order, those that do not as the looks find them', () => {
    const { heat, record } = recorder();
    record.readWaits(7 * REGION_BYTES, 512);
    read(heat, 900, 5);
    record.readWaits(3 * REGION_BYTES - 512, 1024);
    record.look();
    record.readWaits(7 * REGION_BYTES, 512);
    read(heat, 4, 7, 5);
    record.look();
    assert.deepEqual(told(record), [7, 2, 3, 5, 900, 4]);
  });

  test('what the move before had in order is found in that order', () => {
    const { heat, record } = recorder();
    record.inherit([900, 4, 5]);
    read(heat, 3, 4, 5, 2, 900);
    record.look();
    assert.deepEqual([...record.own.byRank()], [900, 4, 5, 2, 3]);
  });

  test('of writes only the edges that lie within a block, of those that wait', () => {
    const { heat, record } = recorder();
    heat.written(REGION_BYTES, 4096);
    record.writeWaits(2 * REGION_BYTES, 5 * REGION_BYTES);
    record.writeWaits(20 * REGION_BYTES + 512, 3 * REGION_BYTES - 512);
    record.writeWaits(30 * REGION_BYTES, 3 * REGION_BYTES - 512);
    record.look();
    assert.deepEqual(told(record), [20, 32]);
  });

  test('it is recorded while the volume relocates, and at least for a while behind the takeover', () => {
    const now = mock.method(performance, 'now', () => 5_000);
    try {
      const heat = new Heat(REGIONS * REGION_BYTES);
      const record = new FirstAccess(heat);
      const at = (ms: number, region: number): void => {
        now.mock.mockImplementation(() => ms);
        record.readWaits(region * REGION_BYTES, 1);
        read(heat, region + 100);
        record.look();
      };
      record.follow('standby');
      at(6_000, 1);
      record.follow('relocating');
      at(6_500, 2);
      record.follow('plain');
      at(7_000, 3);
      at(6_000 + RECORD_MS_MIN, 4);
      at(7_000 + RECORD_MS_MIN, 5);
      // What was read at the standby is found by the first look.
      assert.deepEqual(told(record), [2, 101, 102, 3, 103, 4, 104]);
      assert.equal(record.recording, false);
      record.follow('sealed');
      assert.equal(record.told.size, 7);
    } finally {
      mock.restoreAll();
    }
  });

  test('a long relocation is recorded to its end; a volume that leaves is not, but for its last second', () => {
    const { heat, record } = recorder();
    const now = mock.method(performance, 'now', () => 10 * RECORD_MS_MIN);
    try {
      read(heat, 1);
      record.look();
      assert.equal(record.recording, true);
      read(heat, 2);
      record.follow('plain');
      record.look();
      assert.equal(record.recording, false);
    } finally {
      now.mock.restore();
    }
    const other = recorder();
    other.record.follow('plain');
    read(other.heat, 3);
    other.record.follow('sealed');
    read(other.heat, 4);
    other.record.look();
    other.record.readWaits(0, 1);
    assert.deepEqual([told(record), told(other.record)], [[1, 2], [3]]);
  });

  test('a takeover begins it anew, a restart goes on with it', () => {
    const { record } = recorder();
    record.readWaits(0, 1);
    record.follow('standby');
    record.readWaits(5 * REGION_BYTES, 1);
    record.follow('relocating');
    record.readWaits(REGION_BYTES, 1);
    assert.deepEqual(told(record), [1]);
    const again = new FirstAccess(new Heat(REGIONS * REGION_BYTES));
    again.follow('relocating');
    again.restore([4, 2], [9]);
    again.readWaits(0, 1);
    assert.deepEqual([[...again.own.byRank()], [...again.earlier.byRank()]], [[4, 2, 0], [9]]);
  });

  test('the record of the move before counts until this one says something', () => {
    const { record } = recorder();
    record.inherit(range(500, 900));
    for (let region = 0; region < TRIVIAL_REGIONS; region++) {
      assert.deepEqual(told(record), range(500, 900), `${region} regions`);
      record.readWaits(region * REGION_BYTES, 1);
    }
    assert.deepEqual(told(record), range(0, TRIVIAL_REGIONS));
    const short = recorder();
    short.record.inherit([5, 6]);
    short.record.readWaits(0, 1);
    assert.deepEqual(told(short.record), [5, 6]);
    short.record.readWaits(REGION_BYTES, 1);
    assert.deepEqual(told(short.record), [0, 1]);
  });

  test('16 TiB: many looks find what one has no time for, and what is not read is not looked for', () => {
    const regions = (16 * 2 ** 40) / REGION_BYTES;
    const { heat, record } = recorder(regions);
    const some = range(0, 2000).map((index) => index * 33_001);
    read(heat, ...some);
    for (let looks = 0; record.own.size < some.length; looks++) {
      assert.ok(looks < 5000, `${record.own.size} regions after ${looks} looks`);
      record.look();
    }
    assert.deepEqual(told(record), some);
    const { changes } = record;
    for (let look = 0; look < 10_000; look++) record.look(); // which are over at once, once all was looked at
    assert.equal(record.changes, changes);
  });
});

const SIZE = 8 * REGION_BYTES;

function relocating(volume: Volume): { guest: GuestDevice; link: LinkDevice; source: HeldSource } {
  const source = new HeldSource(volume.store, patterned(SIZE, 77));
  return { guest: new GuestDevice(volume), link: new LinkDevice(volume), source };
}

async function sought(device: GuestDevice | LinkDevice): Promise<number[]> {
  const request = Io.status('blockferry:first-access', 0, SIZE);
  device.status(request);
  assert.equal(await request.done, 0);
  const ranks: number[] = [];
  for (const [length, rank] of request.extents)
    for (let at = 0; at < length; at += REGION_BYTES) ranks.push(rank);
  return ranks;
}

describe('first accesses of a volume', () => {
  test('the machine is recorded and the link is not; both are told', async () => {
    const volume = await proxiedVolume(undefined, { size: SIZE });
    await volume.takeover(5);
    const { guest, link, source } = relocating(volume);
    const ask = (device: GuestDevice | LinkDevice, io: Io): Promise<number> => {
      if (io.flags === 1) device.write(io);
      else device.read(io);
      source.deliverAll();
      return io.done;
    };
    await ask(link, new Io(REGION_BYTES, 512));
    await ask(guest, new Io(6 * REGION_BYTES, 512));
    await volume.settle();
    const write = Io.write(5 * REGION_BYTES + 512, Buffer.alloc(512));
    assert.notEqual(guest.writeNow(write.offset, 512, write.buffer, write.at), 0);
    guest.write(write);
    source.deliverAll();
    await write.done;
    source.deliver(0, 1);
    assert.equal(guest.readNow(0, 512, Buffer.alloc(512), 0), 0);
    volume.firstAccess.look();
    assert.deepEqual(await sought(guest), [3, 0, 0, 0, 0, 2, 1, 0]);
    assert.deepEqual(await sought(link), [3, 0, 0, 0, 0, 2, 1, 0]);
  });

  test('a volume that is merely served has none, and records none', async () => {
    for (const state of ['plain', 'standby'] as const) {
      const volume = await volumeIn(state);
      const guest = new GuestDevice(volume);
      guest.read(new Io(0, 512));
      volume.heat.read(0, 1);
      volume.firstAccess.look();
      assert.equal(volume.firstAccess.told.size, 0, state);
    }
  });
});
