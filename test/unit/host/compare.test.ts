import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { compareDisks } from '../../../src/host/compare.js';

const SIZE = 20 * (1 << 20) + 4096 + 7;

let folder: string;
let first: string;
let second: string;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-compare-'));
  first = join(folder, 'a.img');
  second = join(folder, 'b.img');
});
after(() => rmSync(folder, { recursive: true, force: true }));

function write(path: string, at: number[]): void {
  const bytes = Buffer.alloc(SIZE, 0x5a);
  for (const offset of at) bytes[offset] ^= 1;
  writeFileSync(path, bytes);
}

describe('comparison of two disks', () => {
  test('finds them identical, and tells how far it is', async () => {
    write(first, []);
    write(second, []);
    let done = 0;
    const result = await compareDisks(first, second, (doneBytes, sizeBytes) => {
      assert.ok(doneBytes > done && sizeBytes === SIZE);
      done = doneBytes;
    });
    assert.deepEqual(result, { kind: 'same', sizeBytes: SIZE });
    assert.equal(done, SIZE);
  });

  test('finds the first of several differences, wherever it is', async () => {
    for (const offset of [0, 1, 4095, 4096, (1 << 20) - 1, 1 << 20, 12_345_678, SIZE - 1]) {
      write(second, [offset, Math.min(SIZE - 1, offset + 3_000_000), SIZE - 1]);
      assert.deepEqual(await compareDisks(first, second), { kind: 'content', offset });
    }
  });

  test('tells sizes apart, and what cannot be opened', async () => {
    write(second, []);
    truncateSync(second, SIZE - 1);
    assert.deepEqual(await compareDisks(first, second), { kind: 'size', a: SIZE, b: SIZE - 1 });
    await assert.rejects(compareDisks(first, join(folder, 'none')), { code: 'image-missing' });
    await assert.rejects(compareDisks(first, folder), { code: 'image-io' });
    await assert.rejects(compareDisks(`nbd+unix:///x?socket=${folder}/none.sock`, first), {
      code: 'source-unreachable',
    });
  });
});
