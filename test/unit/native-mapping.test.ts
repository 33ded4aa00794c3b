/** Shared mappings: their memory goes once, whoever ends them, and never under somebody who still sees it. */
import assert from 'node:assert/strict';
import { closeSync, fstatSync, openSync, readFileSync, readSync } from 'node:fs';
import { describe, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import * as native from '../../src/native/index.js';
import { child, loader, opened, patterned } from './native-fixtures.js';

describe('mapShared', () => {
  test('shows the file, and the file shows it', () => {
    const { fd, content } = patterned(10_000);
    const view = native.mapShared(fd, 9_000);
    assert.equal(view.length, 9_000);
    assert.ok(Buffer.from(view).equals(content.subarray(0, 9_000)));
    view[8_999] = 99;
    const buffer = Buffer.alloc(2);
    readSync(fd, buffer, 0, 2, 8_998);
    assert.deepEqual([...buffer], [content[8_998], 99]);
    native.pwrite(fd, Buffer.from([42]), 0, 1, 5);
    assert.equal(view[5], 42);
    assert.equal(native.setRange(view, 0, 8), 8 - native.countOnes(content.subarray(0, 1), 0, 8));
    assert.equal(native.pread(fd, view, 0, 4, 4, false), 4);
    native.unmap(view);
  });

  test('is over at once with unmap, for all views, and only once', () => {
    const { path, fd } = patterned(8192);
    const inode = String(fstatSync(fd).ino);
    const mapped = (): boolean =>
      readFileSync('/proc/self/maps', 'utf8')
        .split('\n')
        .some((line) => line.endsWith(path) && line.includes(inode));
    const view = native.mapShared(fd, 8192);
    const part = view.subarray(10, 20);
    assert.ok(mapped());
    native.unmap(part);
    assert.ok(!mapped());
    assert.equal(view.length, 0);
    assert.equal(view[0], undefined);
    assert.equal(part.length, 0);

    // Another mapping may get the same address: neither the second call nor the collector may touch it.
    const next = native.mapShared(fd, 8192);
    native.unmap(view);
    native.unmap(part);
    assert.ok(mapped());
    assert.equal(next[1], 2);
    native.unmap(next);
    assert.throws(() => native.countOnes(next, 0, 1), RangeError);
  });

  test('survives its descriptor, and the thread it was made on', async () => {
    const { path } = patterned(4096);
    const fd = openSync(path, 'r+');
    const view = native.mapShared(fd, 4096);
    closeSync(fd);
    assert.equal(view[3], 4);
    native.unmap(view);
    const text = `
      const { workerData } = require('node:worker_threads');
      import(workerData.loader).then((native) => {
        const fd = require('node:fs').openSync(workerData.path, 'r+');
        native.unmap(native.mapShared(fd, 4096));
        native.mapShared(fd, 4096)[0] = 77;
      });`;
    const worker = new Worker(text, { eval: true, workerData: { loader, path } });
    const code = await new Promise((resolve, reject) => worker.once('exit', resolve).once('error', reject));
    assert.equal(code, 0);
    assert.equal(readFileSync(path)[0], 77);
    assert.ok(!readFileSync('/proc/self/maps', 'utf8').includes(path));
  });

  test('is collected with its last view; what was unmapped before is not unmapped again', () => {
    const { path } = patterned(64 * 1024);
    const { status, stderr, stdout } = child(
      `
      import { openSync, readFileSync } from 'node:fs';
      import { setImmediate as turn } from 'node:timers/promises';
      const path = ${JSON.stringify(path)};
      const fd = openSync(path, 'r+');
      const count = () => readFileSync('/proc/self/maps', 'utf8').split(path).length - 1;
      const settle = async (wanted) => {
        const deadline = Date.now() + 10_000;
        while (count() !== wanted && Date.now() < deadline) { gc(); await turn(); }
        return count();
      };
      (() => { for (let i = 0; i < 20; i++) native.mapShared(fd, 65536)[i] = 200; })();
      console.log(await settle(0));
      (() => { for (let i = 0; i < 20; i++) native.unmap(native.mapShared(fd, 65536)); })();
      // These take the addresses the others left behind.
      const kept = Array.from({ length: 20 }, () => native.mapShared(fd, 65536));
      for (let i = 0; i < 20; i++) { gc(); await turn(); }
      console.log(count(), kept.every((view) => view[0] === 200));
      const part = kept.pop().subarray(5, 6);
      kept.length = 0;
      console.log(await settle(1), part[0]);`,
      '--expose-gc',
    );
    assert.equal(status, 0, stderr);
    assert.equal(stdout, '0\n20 true\n1 200\n');
  });

  test('refuses what would end in a signal, and what is no mapping', async () => {
    const { path, fd } = patterned(4096);
    assert.throws(() => native.mapShared(fd, 4097), { code: 'EOVERFLOW', syscall: 'mmap' });
    assert.throws(() => native.mapShared(fd, 0), { code: 'EINVAL' });
    assert.throws(() => native.mapShared(opened(path, 'r'), 4096), { code: 'EACCES' });
    assert.throws(() => native.mapShared(fd, 2 ** 31 + 1), RangeError);
    assert.throws(() => native.unmap(new Uint8Array(4)), {
      name: 'TypeError',
      code: 'ERR_INVALID_ARG_VALUE',
    });
    assert.throws(() => native.unmap(null as unknown as Uint8Array), TypeError);
    const view = native.mapShared(fd, 4096);
    // The pool's thread must not be left with memory that unmap takes away.
    assert.throws(() => native.readAsync(fd, view, 0, 1, 0), TypeError);
    assert.throws(() => native.writeAsync(fd, view.subarray(1), 0, 1, 0), TypeError);
    // Other threads cannot have it. (Node 20 makes a copy, later ones throw.)
    try {
      structuredClone(view, { transfer: [view.buffer as ArrayBuffer] })[0] = 66;
    } catch (error) {
      assert.equal((error as Error).name, 'DataCloneError');
    }
    assert.equal(view.length, 4096);
    assert.equal(view[0], 1);
    native.unmap(view);
  });
});
