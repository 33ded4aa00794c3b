/** Reads that wait for the disk: on the system's queue and without one, more than it holds, and of an image that was cut. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import * as native from '../../../src/native/index.js';
import { type ColdReader, ColdReads } from '../../../src/volume/cold-reads.js';

const PIECE = 512;
const PIECES = 1500;
const folder = mkdtempSync(join(tmpdir(), 'blockferry-cold-'));
after(() => rmSync(folder, { recursive: true, force: true }));

const RESOLVING: ColdReader<(result: number) => void> = {
  coldReadEnded: (resolve, result) => resolve(result),
};

for (const [name, open] of [
  ['on the queue', native.openReader],
  ['without a queue', () => -native.ERRNO.ENOSYS],
] as const) {
  describe(`cold reads ${name}`, () => {
    const reads = new ColdReads(open as typeof native.openReader);
    const read = (fd: number, buffer: Buffer, at: number, length: number, offset: number): Promise<number> =>
      new Promise((resolve) => reads.read(RESOLVING, resolve, fd, buffer, at, length, offset));

    test('more at a time than there are places, twice', async () => {
      const path = join(folder, name.replaceAll(' ', '-'));
      const content = randomBytes(PIECE * PIECES);
      writeFileSync(path, content);
      const fd = openSync(path, 'r');
      for (let round = 0; round < 2; round++) {
        const buffer = Buffer.alloc(content.length);
        const results = await Promise.all(
          Array.from({ length: PIECES }, (_, i) => read(fd, buffer, i * PIECE, PIECE, i * PIECE)),
        );
        assert.ok(results.every((result) => result === 0));
        assert.ok(buffer.equals(content));
      }
      closeSync(fd);
    });

    test('what is cut off is an I/O error, a closed descriptor its own; others go on', async () => {
      const fd = openSync(join(folder, 'cut'), 'w+');
      ftruncateSync(fd, 5000);
      const buffer = Buffer.alloc(100_000, 1);
      assert.deepEqual(
        await Promise.all([
          read(fd, buffer, 0, 4096, 0),
          read(fd, buffer, 4096, 4096, 4096),
          read(fd, buffer, 8192, 90_000, 0),
          read(1 << 20, buffer, 0, 1, 0),
        ]),
        [0, -native.ERRNO.EIO, -native.ERRNO.EIO, -native.ERRNO.EBADF],
      );
      assert.ok(buffer.subarray(0, 4096).every((byte) => byte === 0));
      closeSync(fd);
    });
  });
}
