/** The order in which a machine read at one destination is the order of its next move, and of one from the same template. */
import assert from 'node:assert/strict';
import { copyFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import type { BlockDevice } from '../../../src/nbd/device.js';
import { REGION_BYTES } from '../../../src/volume/heat.js';
import {
  BLOCK,
  type Ferry,
  Lab,
  MIB,
  type ProxyOptions,
  readAt,
  type Source,
  until,
} from '../../lab/ferry.js';
import { changed } from '../../support/direct-session.js';
import { Io } from '../../support/volume.js';

const SIZE = 16 * MIB;
/** What the machine reads, in this order. */
const READ = [36, 12, 63, 1, 50, 12];
const ORDER = [36, 12, 63, 1, 50];

/** One connection: what is asked for arrives in its order. */
const ONE = { multiConn: false };

/** A proxy that handed off, whose machine has read. */
async function moved(lab: Lab, options: ProxyOptions = {}): Promise<Ferry> {
  const source = await lab.source(SIZE);
  const proxy = await lab.proxy(source, options);
  const guest = await proxy.guest();
  for (const region of READ) await readAt(guest, region * REGION_BYTES, BLOCK);
  await proxy.service.prefetch(0, SIZE);
  await proxy.service.handedOff();
  return proxy;
}

/** What a proxy's link gives is another one's source; `seen`: the regions that are read of it, in the order of their first read. */
async function behind(lab: Lab, proxy: Ferry): Promise<{ source: Source; seen: Set<number> }> {
  const { link } = proxy.service;
  const seen = new Set<number>();
  const readNow: BlockDevice['readNow'] = (offset, length, ...rest) => {
    const last = Math.floor((offset + length - 1) / REGION_BYTES);
    for (let region = Math.floor(offset / REGION_BYTES); region <= last; region++) seen.add(region);
    return link.readNow(offset, length, ...rest);
  };
  const source = await lab.source(SIZE, ONE);
  source.device.contexts = [...link.contexts];
  const { readOnly } = source.device;
  source.deviceOf = () => changed(link, { direct: undefined, readNow, readOnly, ...ONE });
  return { source, seen };
}

/** By rank. */
async function recordOf(proxy: Ferry): Promise<number[]> {
  const request = Io.status('blockferry:first-access', 0, proxy.status.size);
  proxy.service.link.status(request);
  assert.equal(await request.done, 0);
  const regions: number[] = [];
  let at = 0;
  for (const [length, rank] of request.extents) {
    if (rank > 0) regions[rank - 1] = at / REGION_BYTES;
    at += length;
  }
  return regions;
}

async function copied(lab: Lab, source: Source, options: ProxyOptions): Promise<Ferry> {
  const proxy = await lab.proxy(source, { background: true, order: 'hot', ...options });
  await proxy.service.handedOff();
  return proxy;
}

const lab = (t: TestContext): Lab => new Lab(t);

for (const order of ['hot', 'recorded'] as const)
  test(`order ${order}: the next move brings first what the machine read first, in its order`, async (t) => {
    const ferries = lab(t);
    const first = await moved(ferries);
    assert.deepEqual(await recordOf(first), ORDER);
    const { source, seen } = await behind(ferries, first);
    const second = await copied(ferries, source, { order });
    assert.deepEqual([...seen].slice(0, 5), ORDER);
    assert.equal(seen.size, SIZE / REGION_BYTES);
    // Nobody read there: the record is still that of the move before, also after a restart, and for the move after.
    assert.deepEqual(await recordOf(second), ORDER);
    const restarted = await second.restart();
    assert.deepEqual(await recordOf(restarted), ORDER);
    const third = await behind(ferries, restarted);
    await copied(ferries, third.source, { order });
    assert.deepEqual([...third.seen].slice(0, 5), ORDER);
  });

test('order linear knows nothing of it', async (t) => {
  const ferries = lab(t);
  const { source, seen } = await behind(ferries, await moved(ferries));
  const second = await copied(ferries, source, { order: 'linear' });
  assert.deepEqual(
    [...seen],
    [...seen].sort((a, b) => a - b),
  );
  assert.deepEqual(await recordOf(second), []);
});

test('the record comes before what was read often since', async (t) => {
  const ferries = lab(t);
  const first = await (await moved(ferries)).restart(); // a restart behind the hand-off ends the record
  const guest = await first.guest();
  for (let times = 0; times < 50; times++) await readAt(guest, 40 * REGION_BYTES, BLOCK);
  const { source, seen } = await behind(ferries, first);
  await copied(ferries, source, {});
  assert.deepEqual([...seen].slice(0, 6), [...ORDER, 40]);
});

test('what the machine reads at the second place is the record of the third', async (t) => {
  const ferries = lab(t);
  const { source } = await behind(ferries, await moved(ferries));
  const second = await ferries.proxy(source, { background: true, order: 'hot', rateBytesPerSecond: 1 });
  const guest = await second.guest();
  const later = [7, 3, 20, 21, 22, 2];
  for (const region of later) await readAt(guest, region * REGION_BYTES, BLOCK);
  second.service.setRate(null);
  await second.service.handedOff();
  const record = await recordOf(second);
  assert.deepEqual(record.slice(0, later.length), later);
});

test('a record in a file is replayed where the source tells none, of a volume of any size', async (t) => {
  const ferries = lab(t);
  const first = await moved(ferries);
  await first.close();
  const file = join(ferries.dir, 'template.first-access');
  copyFileSync(join(ferries.dir, 'state', first.name, 'first-access'), file);
  for (const size of [SIZE, SIZE - 3 * MIB]) {
    const source = await ferries.source(size, ONE);
    const proxy = await copied(ferries, source, { orderFrom: file });
    const regions = [...new Set(source.reads.map(({ offset }) => Math.floor(offset / REGION_BYTES)))];
    const order = ORDER.filter((region) => region * REGION_BYTES < size);
    assert.deepEqual(regions.slice(0, order.length), order);
    assert.deepEqual(await recordOf(proxy), order);
  }
});

test('the source’s own record counts more than the file, and a file that is none holds up nothing', async (t) => {
  const ferries = lab(t);
  const file = join(ferries.dir, 'none');
  writeFileSync(file, 'no record');
  const { source, seen } = await behind(ferries, await moved(ferries));
  await copied(ferries, source, { orderFrom: file });
  assert.deepEqual([...seen].slice(0, 5), ORDER);
  for (const orderFrom of [file, join(ferries.dir, 'nothing')]) {
    const silent = await ferries.source(SIZE);
    await copied(ferries, silent, { orderFrom });
    assert.equal(silent.readBytes, SIZE);
  }
});

test('a retreat during the question, and a second takeover: it is asked anew', async (t) => {
  const ferries = lab(t);
  const { source, seen } = await behind(ferries, await moved(ferries));
  const proxy = await ferries.arrive(source);
  await proxy.service.takeover(2);
  await proxy.service.retreat();
  await proxy.service.takeover(3);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assert.deepEqual(await recordOf(proxy), ORDER);
  await until(() => seen.size === SIZE / REGION_BYTES, 'all came');
});
