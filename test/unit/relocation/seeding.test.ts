/** Blocks that a seed on this host has do not cross the link; whatever is wrong with hashes or seeds, the copy is right, and goes on. */
import assert from 'node:assert/strict';
import {
  closeSync,
  openSync,
  readdirSync,
  readFileSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import { useSeeds } from '../../../src/relocation/seeds.js';
import { HASH_BYTES } from '../../../src/volume/block-hash.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import {
  assertBlocks,
  BLOCK,
  type Ferry,
  Lab,
  log,
  MIB,
  type ProxyOptions,
  pattern,
  quiet,
  readAt,
  type Source,
  until,
} from '../../lab/ferry.js';

const SIZE = 4 * MIB + 300;
const folderOf = (lab: Lab): string => join(lab.dir, 'seeds');

/** A seed that is indexed. */
async function seed(lab: Lab, data: Buffer, name = 'seed.img'): Promise<string> {
  const path = join(lab.dir, name);
  writeFileSync(path, data);
  const seeds = useSeeds({ images: [path], folder: folderOf(lab) }, log);
  await seeds.built;
  seeds.release();
  return path;
}

/** A volume whose copy waits for `resume`, when its seeds and hashes are at hand. */
async function ready(
  lab: Lab,
  source: Source,
  seeds: readonly string[],
  options: ProxyOptions = {},
): Promise<Ferry> {
  const proxy = await lab.arrive(source, { seeds, ...options });
  proxy.service.pause();
  await proxy.service.takeover(2);
  await proxy.service.settle();
  const shared = useSeeds({ images: seeds, folder: folderOf(lab) }, log);
  lab.onClose(() => shared.release());
  await until(() => shared.usable && source.hashesOpened > 0, 'seeds and hashes are at hand');
  await quiet();
  return proxy;
}

async function finished(proxy: Ferry, source: Source): Promise<Ferry['status']['traffic']> {
  proxy.service.resume();
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
  return proxy.status.traffic;
}

function overwrite(path: string, offset: number, bytes: Buffer): void {
  const fd = openSync(path, 'r+');
  writeSync(fd, bytes, 0, bytes.length, offset);
  closeSync(fd);
}

test('what a seed has comes from it, wherever it lies there, and only the rest over the link', async (t) => {
  const lab = new Lab(t);
  const data = pattern(SIZE);
  const source = await lab.source(SIZE, { data });
  source.tellHashes();
  // Moved, and without the blocks 100 to 119. The volume's last block is cut, and so is the seed's.
  const image = Buffer.concat([
    data.subarray(0, 100 * BLOCK),
    Buffer.alloc(3 * BLOCK, 'x'),
    data.subarray(120 * BLOCK),
  ]);
  const proxy = await ready(lab, source, [await seed(lab, image)]);
  const traffic = await finished(proxy, source);
  assert.equal(traffic.seedBytes, SIZE - 20 * BLOCK);
  assert.equal(traffic.backgroundBytes, 20 * BLOCK);
  assert.equal(source.readBytes, 20 * BLOCK);
});

test('several seeds, and blocks of zeros, which need none', async (t) => {
  const lab = new Lab(t);
  const data = pattern(SIZE);
  data.fill(0, 200 * BLOCK, 300 * BLOCK);
  const source = await lab.source(SIZE, { data });
  source.tellHashes();
  const seeds = [
    await seed(lab, data.subarray(0, 200 * BLOCK), 'a.img'),
    await seed(lab, data.subarray(300 * BLOCK), 'b.img'),
    join(lab.dir, 'is-not-there.img'),
  ];
  const traffic = await finished(await ready(lab, source, seeds), source);
  assert.deepEqual(
    [traffic.seedBytes, traffic.zeroBytes, source.readBytes],
    [SIZE - 100 * BLOCK, 100 * BLOCK, 0],
  );
});

test('a seed that was written to, or cut, after it was indexed gives what it still has', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes();
  const path = await seed(lab, source.device.data);
  const proxy = await ready(lab, source, [path]);
  overwrite(path, 10 * BLOCK + 5, Buffer.from('!'));
  truncateSync(path, 512 * BLOCK + 100);
  const traffic = await finished(proxy, source);
  assert.equal(traffic.seedBytes, 511 * BLOCK);
});

test('a source that has no hashes is copied as ever', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes();
  source.hashes = null;
  const path = await seed(lab, source.device.data);
  const proxy = await lab.proxy(source, { seeds: [path], background: true });
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
  assert.equal(proxy.status.traffic.seedBytes, 0);
  assert.equal(source.readBytes, SIZE);
});

test("nobody asks a source for hashes that does not say it is a blockferry, or believes another volume's", async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes();
  const path = await seed(lab, source.device.data);
  source.description = 'a disk';
  const proxy = await lab.proxy(source, { seeds: [path], background: true });
  await proxy.service.handedOff();
  assert.equal(source.hashesOpened, 0);

  const other = await lab.source(SIZE);
  const hashes = other.tellHashes();
  const longer = new MemoryDevice(hashes.size + HASH_BYTES);
  hashes.data.copy(longer.data);
  other.hashes = longer;
  const mistaken = await ready(lab, other, [path]);
  assert.equal((await finished(mistaken, other)).seedBytes, 0);

  const third = await lab.source(SIZE);
  third.tellHashes();
  third.hashesDescription = third.description.replace(/generation .*/, 'generation 9');
  assert.equal((await finished(await ready(lab, third, [path]), third)).seedBytes, 0);
});

test('a source that lies about hashes gets what it says: its own blocks, or those of a seed it names', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  const hashes = source.tellHashes();
  const path = await seed(lab, source.device.data);
  hashes.data.fill(7, 0, 500 * HASH_BYTES);
  const traffic = await finished(await ready(lab, source, [path]), source);
  assert.equal(traffic.backgroundBytes, 500 * BLOCK);
});

test('hashes that fail are done without', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes().failure = () => Errno.EPERM;
  const path = await seed(lab, source.device.data);
  const traffic = await finished(await ready(lab, source, [path]), source);
  assert.deepEqual([traffic.seedBytes, traffic.backgroundBytes], [0, SIZE]);
});

test('a block that the source cannot read costs its run, and nothing else', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes().failure = ({ offset, length }) =>
    offset <= 70 * HASH_BYTES && offset + length > 70 * HASH_BYTES ? Errno.EIO : 0;
  const path = await seed(lab, source.device.data);
  const traffic = await finished(await ready(lab, source, [path]), source);
  assert.deepEqual([traffic.backgroundBytes, source.hashesOpened], [64 * BLOCK, 1]);
});

test('hashes that do not come hold up nobody: the guest not at all, the copy for a moment', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  const hashes = source.tellHashes();
  hashes.manner = () => 'held';
  const path = await seed(lab, source.device.data);
  const proxy = await ready(lab, source, [path]);
  proxy.service.resume();
  await until(() => hashes.held.length > 0, 'hashes were asked for');
  const guest = await proxy.guest();
  assertBlocks(await readAt(guest, 50 * BLOCK, BLOCK), source.device.data.subarray(50 * BLOCK, 51 * BLOCK));
  const traffic = await finished(proxy, source);
  assert.deepEqual([traffic.seedBytes, traffic.backgroundBytes + traffic.demandBytes], [0, SIZE]);
});

test('a connection for hashes that is cut is made again, and what was asked is fetched', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  const hashes = source.tellHashes();
  hashes.manner = () => 'held';
  const path = await seed(lab, source.device.data);
  const proxy = await ready(lab, source, [path]);
  proxy.service.resume();
  await until(() => hashes.held.length > 0, 'hashes were asked for');
  source.hold(); // the copy does not end before there are hashes again
  source.cut();
  hashes.manner = () => 'now';
  hashes.completeHeld();
  await until(() => source.hashesOpened > 1, 'a connection for hashes');
  source.release();
  const traffic = await finished(proxy, source);
  assert.equal(traffic.seedBytes + traffic.backgroundBytes, SIZE);
});

test('what the guest writes meanwhile stays', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  const hashes = source.tellHashes();
  hashes.manner = () => 'held';
  const path = await seed(lab, source.device.data);
  const proxy = await ready(lab, source, [path]);
  const guest = await proxy.guest();
  proxy.service.resume();
  await until(() => hashes.held.length > 0, 'hashes were asked for');
  const written = Buffer.alloc(3 * BLOCK, 'w');
  await guest.write(7 * BLOCK, written, 0, written.length);
  hashes.manner = () => 'now';
  hashes.completeHeld();
  await proxy.service.handedOff();
  const expected = Buffer.from(source.device.data);
  written.copy(expected, 7 * BLOCK);
  assertBlocks(readFileSync(proxy.image), expected);
  assert.ok(proxy.status.traffic.seedBytes > 0);
});

test('what was asked before a retreat counts for nothing after it', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  const hashes = source.tellHashes();
  const before = Buffer.from(source.device.data);
  const path = await seed(lab, before);
  const proxy = await lab.arrive(source, { seeds: [path] });
  proxy.service.pause();
  await proxy.service.takeover(2);
  await until(() => source.hashesOpened > 0, 'a connection for hashes');
  await quiet();
  hashes.manner = () => 'held';
  proxy.service.resume();
  await until(() => hashes.held.length > 0 || proxy.status.presentBytes === SIZE, 'hashes were asked for');
  await proxy.service.retreat();
  // The machine goes on at the source, and writes there.
  source.device.data.fill('n', 0, 600 * BLOCK);
  hashes.manner = () => 'now';
  hashes.completeHeld();
  source.tellHashes();
  await quiet();
  assert.equal(proxy.status.presentBytes, 0);
  await proxy.service.takeover(3);
  await proxy.service.settle();
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
});

test('a damaged index is made anew, a damaged table finds less', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes();
  const path = await seed(lab, source.device.data);
  const [name] = readdirSync(folderOf(lab));
  const index = join(folderOf(lab), name!);
  overwrite(index, 40, Buffer.from('??'));
  await seed(lab, source.device.data);
  // Entries that name other blocks: what is read there is not what was asked for.
  const bytes = readFileSync(index);
  for (let at = 4096; at + 12 <= 8192; at += 12) bytes[at + 8] = (bytes[at + 8]! + 1) & 0xff;
  writeFileSync(index, bytes);
  const traffic = await finished(await ready(lab, source, [path]), source);
  assert.ok(traffic.seedBytes > 0 && traffic.seedBytes < SIZE, `${traffic.seedBytes} bytes`);
  unlinkSync(index);
});

test('a thread of the seeds that ends leaves the copy as it would be without', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE);
  source.tellHashes();
  const proxy = await lab.proxy(source, { seeds: ['/proc/self/mem', lab.dir], background: true });
  await proxy.service.handedOff();
  assertBlocks(readFileSync(proxy.image), source.device.data);
});
