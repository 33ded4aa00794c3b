// Xen Orchestra's client, which reads: EXPORT_NAME, simple replies, no block status of its own (it asks nbdinfo).
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import NbdClient, { NbdStdioClient } from '@vates/nbd-client';
import MultiNbdClient from '@vates/nbd-client/multi.mjs';
import { NbdDisk } from '@vates/nbd-client/NbdDisk.mjs';
import { BLOCKFERRY } from '../../lab/hosts.js';
import { needs } from '../tools.js';
import { assertSame, type Disk, HOLE, SIZE, STATES, withDisk } from './disks.js';

const BLOCK = 64 << 10;
const BLOCKS = Math.ceil(SIZE / BLOCK);

function where(disk: Disk): { address: string; port: number; exportname: string } {
  return { address: '127.0.0.1', port: Number(new URL(disk.uri('TCP')).port), exportname: 'disk' };
}

/** Its DISC is on the way when it says that it is disconnected. */
async function gone(disk: Disk): Promise<void> {
  const deadline = performance.now() + 10_000;
  while ((await disk.status()).clients > 0)
    assert.ok(performance.now() < deadline, 'the client is still there');
}

describe('@vates/nbd-client', () => {
  for (const state of STATES) {
    test(`reads a disk, many blocks at once and the short last one: ${state}`, () =>
      withDisk(state, async (disk) => {
        const client = new NbdClient(where(disk));
        await client.connect();
        assert.equal(client.exportSize, BigInt(SIZE));
        const reads = Array.from({ length: BLOCKS }, (_, index) => client.readBlock(index, BLOCK));
        assertSame(Buffer.concat(await Promise.all(reads)), disk.content);
        await client.disconnect();
        await gone(disk);
      }));
  }

  test('the default export', () =>
    withDisk('serve', async (disk) => {
      const { address, port } = where(disk);
      const client = new NbdClient({ address, port });
      await client.connect();
      assertSame(await client.readBlock(3, 1000), disk.content.subarray(3000, 4000));
      await client.disconnect();
    }));

  test('what lies behind the end fails it, and it comes back by itself', () =>
    withDisk('serve', async (disk) => {
      const client = new NbdClient(where(disk), { waitBeforeReconnect: 1, readBlockRetries: 1 });
      await client.connect();
      await assert.rejects(client.readBlock(BLOCKS + 1, BLOCK));
      await client.reconnect();
      assertSame(await client.readBlock(0, BLOCK), disk.content.subarray(0, BLOCK));
      await client.disconnect();
    }));

  test('several connections, blocks in order', () =>
    withDisk('on demand', async (disk) => {
      const client = new MultiNbdClient(where(disk), { nbdConcurrency: 4, readAhead: 16 });
      await client.connect();
      assert.equal((await disk.status()).clients, 4);
      function* all() {
        for (let index = 0; index < BLOCKS; index++) yield { index, size: BLOCK };
      }
      const blocks: Buffer[] = [];
      for await (const block of client.readBlocks(all)) blocks.push(block);
      assertSame(Buffer.concat(blocks), disk.content);
      await client.disconnect();
    }));

  test('the map of a disk, and a backup of its data alone', needs('nbdinfo'), () =>
    withDisk('serve', async (disk) => {
      const client = new NbdClient(where(disk));
      await client.connect();
      const map = await client.getMap();
      assert.equal(
        map.reduce((sum, { length }) => sum + length, 0),
        SIZE,
      );
      assert.ok(
        map.some(
          ({ offset, length, type }) => type === 3 && offset === HOLE.from && length === HOLE.to - HOLE.from,
        ),
      );
      await client.disconnect();

      const backup = new NbdDisk(where(disk), BLOCK);
      await backup.init();
      assert.equal(backup.getVirtualSize(), SIZE);
      assert.equal(backup.hasBlock(HOLE.from / BLOCK), false);
      const copy = Buffer.alloc(BLOCKS * BLOCK);
      for (const index of backup.getBlockIndexes())
        (await backup.readBlock(index)).data.copy(copy, index * BLOCK);
      assertSame(copy.subarray(0, SIZE), disk.content);
      await backup.close();
    }),
  );

  test('a daemon of its own, over pipes', () =>
    withDisk('serve', async (disk) => {
      const args = [
        'serve',
        disk.image,
        '--read-only',
        '--listen',
        'stdio',
        '--state-dir',
        disk.path('other'),
      ];
      // The image is in use by the disk's daemon, as a writer.
      const refused = new NbdStdioClient({ command: BLOCKFERRY, args }, { messageTimeout: 10_000 });
      await assert.rejects(refused.connect());
      assert.equal(await disk.daemon.stop(), 0);
      const client = new NbdStdioClient({ command: BLOCKFERRY, args });
      await client.connect();
      const reads = [0, 5, BLOCKS - 1].map((index) => client.readBlock(index, BLOCK));
      const [first, middle, last] = await Promise.all(reads);
      assertSame(first!, disk.content.subarray(0, BLOCK));
      assertSame(middle!, disk.content.subarray(5 * BLOCK, 6 * BLOCK));
      assertSame(last!, disk.content.subarray((BLOCKS - 1) * BLOCK));
      await client.disconnect();
    }));
});
