/** Reads on the kernel's queue, one by one and many; what ends the queue; the loop that waits for it, or does not. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import * as native from '../../src/native/index.js';
import { child, loader, patterned } from './native-fixtures.js';

const RESULTS = new Int32Array(128);
const arrived: [number, number][] = [];
let onArrival: () => void = () => {};
const reader = native.openReader(256, RESULTS, (count) => {
  for (let i = 0; i < count; i++) arrived.push([RESULTS[2 * i]!, RESULTS[2 * i + 1]!]);
  onArrival();
});
const here = typeof reader === 'number' ? `no io_uring here (${reader})` : false;

async function arrivals(count: number): Promise<[number, number][]> {
  while (arrived.length < count)
    await new Promise<void>((resolve) => {
      onArrival = resolve;
    });
  return arrived.splice(0).sort(([a], [b]) => a - b);
}

describe('a queue of reads', { skip: here }, () => {
  const queue = reader as native.Reader;

  test('reads a part into a part of the buffer; short at the end of the file, 0 behind it; errors', async () => {
    const { fd, content } = patterned(1000);
    const buffers = Array.from({ length: 4 }, () => Buffer.alloc(100));
    assert.equal(native.queueRead(queue, 0, fd, buffers[0]!, 10, 50, 300, false), 0);
    assert.equal(native.queueRead(queue, 1, fd, buffers[1]!, 0, 100, 960, true), 0);
    assert.equal(native.queueRead(queue, 2, fd, buffers[2]!, 0, 100, 1000, false), 0);
    assert.equal(native.queueRead(queue, 3, 1 << 20, buffers[3]!, 0, 100, 0, false), 0);
    assert.equal(native.beginReads(queue), 0);
    assert.deepEqual(await arrivals(4), [
      [0, 50],
      [1, 40],
      [2, 0],
      [3, -native.ERRNO.EBADF],
    ]);
    assert.deepEqual(
      buffers[0],
      Buffer.concat([Buffer.alloc(10), content.subarray(300, 350), Buffer.alloc(40)]),
    );
    assert.deepEqual(buffers[1]!.subarray(0, 40), content.subarray(960));
  });

  test('has a place for each of its entries, and no more, again and again', async () => {
    const { fd, content } = patterned(256 * 512);
    for (let round = 0; round < 3; round++) {
      const buffer = Buffer.alloc(256 * 512);
      for (let slot = 0; slot < 256; slot++)
        assert.equal(native.queueRead(queue, slot, fd, buffer, slot * 512, 512, slot * 512, false), 0);
      assert.equal(native.queueRead(queue, 256, fd, buffer, 0, 512, 0, false), -native.ERRNO.EAGAIN);
      assert.equal(native.beginReads(queue), 0);
      const all = await arrivals(256);
      assert.deepEqual(
        all,
        Array.from({ length: 256 }, (_, slot) => [slot, 512]),
      );
      assert.deepEqual(buffer, content);
    }
  });

  test('refuses what is wrong', () => {
    const buffer = Buffer.alloc(8);
    const wrong: (() => unknown)[] = [
      () => native.openReader(5000, RESULTS, () => {}),
      () => native.openReader(8, new Int32Array(8), () => {}),
      () => native.openReader(8, RESULTS, undefined as never),
      () => native.queueRead({} as never, 0, 0, buffer, 0, 8, 0, false),
      () => native.queueRead(queue, 0, 0, buffer, 1, 8, 0, false),
      () => native.queueRead(queue, -1, 0, buffer, 0, 8, 0, false),
      () => native.beginReads(undefined as never),
    ];
    for (const call of wrong)
      assert.throws(call, (error) => error instanceof Error && !/NAPI/.test(error.message));
  });

  test('a thread may end while it reads', async () => {
    const { path } = patterned(1 << 20);
    const code = `
      const { openSync } = require('node:fs');
      import(${JSON.stringify(loader)}).then((native) => {
        const queue = native.openReader(64, new Int32Array(128), () => {});
        const fd = openSync(${JSON.stringify(path)}, 'r');
        const buffer = Buffer.alloc(1 << 20);
        for (let i = 0; i < 64; i++) native.queueRead(queue, i, fd, buffer, i << 14, 1 << 14, i << 14, true);
        native.beginReads(queue);
        process.exit(0);
      });`;
    for (let i = 0; i < 5; i++) {
      const worker = new Worker(code, { eval: true });
      assert.equal(await new Promise((resolve) => worker.once('exit', resolve)), 0);
    }
  });

  test('a process waits for its reads, and for nothing else of a queue', () => {
    const { path } = patterned(4096);
    const { status, stdout } = child(`
      import { openSync } from 'node:fs';
      const results = new Int32Array(128);
      const queue = native.openReader(8, results, (count) => console.log(count, results[0], results[1]));
      const fd = openSync(${JSON.stringify(path)}, 'r');
      native.queueRead(queue, 5, fd, Buffer.alloc(4096), 0, 4096, 0, true);
      native.beginReads(queue);`);
    assert.equal(status, 0);
    assert.equal(String(stdout).trim(), '1 5 4096');
  });
});
