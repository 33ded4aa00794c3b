import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  copyFileSync,
  existsSync,
  fstatSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import * as native from '../../src/native/index.js';

const { ERRNO } = native;
const MIB = 1 << 20;
const loader = fileURLToPath(new URL('../../src/native/index.js', import.meta.url));

const folders: string[] = [];
const descriptors: number[] = [];
after(() => {
  for (const fd of descriptors) closeSync(fd);
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

function folderIn(parent = tmpdir()): string {
  const folder = mkdtempSync(join(parent, 'blockferry-native-'));
  folders.push(folder);
  return folder;
}

function opened(path: string, flags: string): number {
  const fd = openSync(path, flags);
  descriptors.push(fd);
  return fd;
}

/** A new file of `bytes` bytes 1, 2, 3, ..., 250, 1, ... (never 0). */
function patterned(bytes: number, parent?: string): { path: string; fd: number; content: Buffer } {
  const path = join(folderIn(parent), 'image');
  const content = Buffer.from(Uint8Array.from({ length: bytes }, (_, i) => (i % 250) + 1));
  writeFileSync(path, content);
  return { path, fd: opened(path, 'r+'), content };
}

/** Runs a module's text in a child process; the addon's loader is `native` there. */
function child(
  script: string,
  ...flags: string[]
): { status: number | null; stdout: string; stderr: string } {
  const text = `import * as native from ${JSON.stringify(loader)};\n${script}`;
  return spawnSync(
    'setpriv',
    ['--pdeathsig', 'KILL', '--', process.execPath, ...flags, '--input-type=module', '-e', text],
    {
      encoding: 'utf8',
      timeout: 60_000,
    },
  );
}

function sparse(bytes: number, parent?: string): number {
  const fd = opened(join(folderIn(parent), 'sparse'), 'w+');
  ftruncateSync(fd, bytes);
  return fd;
}

describe('pread and pwrite', () => {
  test('read a part into a part of the buffer', () => {
    const { fd, content } = patterned(1000);
    const buffer = Buffer.alloc(100);
    assert.equal(native.pread(fd, buffer, 10, 50, 300, false), 50);
    assert.deepEqual(buffer, Buffer.concat([Buffer.alloc(10), content.subarray(300, 350), Buffer.alloc(40)]));
  });

  test('are short at the end of the file, and 0 behind it', () => {
    const { fd } = patterned(1000);
    const buffer = new Uint8Array(100);
    assert.equal(native.pread(fd, buffer, 0, 100, 960, false), 40);
    assert.equal(native.pread(fd, buffer, 0, 100, 1000, false), 0);
    assert.equal(native.pread(fd, buffer, 0, 100, 2 ** 50, false), 0);
    assert.equal(native.pread(fd, buffer, 100, 0, 0, false), 0);
  });

  test('write all and answer the length', () => {
    const { path, fd, content } = patterned(1000);
    assert.equal(native.pwrite(fd, Buffer.from('xxhelloxx'), 2, 5, 400), 5);
    content.write('hello', 400);
    assert.deepEqual(readFileSync(path), content);
    assert.equal(native.pwrite(fd, Buffer.alloc(0), 0, 0, 0), 0);
  });

  test('respect views: an offset into a larger ArrayBuffer, and shared memory', () => {
    const { fd, content } = patterned(64);
    const whole = new Uint8Array(32);
    assert.equal(native.pread(fd, whole.subarray(8, 24), 4, 12, 1, false), 12);
    assert.deepEqual(
      [...whole],
      [...new Array(12).fill(0), ...content.subarray(1, 13), ...new Array(8).fill(0)],
    );
    const shared = new Uint8Array(new SharedArrayBuffer(16));
    assert.equal(native.pread(fd, shared, 0, 16, 0, false), 16);
    assert.deepEqual([...shared], [...content.subarray(0, 16)]);
  });

  test('address beyond 4 GiB and beyond 8 TiB', () => {
    for (const offset of [2 ** 32 + 5, 2 ** 43 + 3]) {
      const fd = sparse(0);
      assert.equal(native.pwrite(fd, Buffer.from('far'), 0, 3, offset), 3);
      const buffer = Buffer.alloc(3);
      assert.equal(native.pread(fd, buffer, 0, 3, offset, false), 3);
      assert.equal(buffer.toString(), 'far');
      assert.equal(native.seekEnd(fd), offset + 3);
    }
  });

  test('answer the kernel’s errors as -errno', () => {
    const { path } = patterned(10);
    const buffer = Buffer.alloc(10);
    assert.equal(native.pread(2 ** 31 - 1, buffer, 0, 10, 0, false), -ERRNO.EBADF);
    assert.equal(native.pwrite(opened(path, 'r'), buffer, 0, 10, 0), -ERRNO.EBADF);
    assert.equal(native.pread(opened(dirname(path), 'r'), buffer, 0, 10, 0, false), -ERRNO.EISDIR);
    if (existsSync('/dev/full'))
      assert.equal(native.pwrite(opened('/dev/full', 'w'), buffer, 0, 10, 0), -ERRNO.ENOSPC);
  });

  test('nowait reads what is cached, and says EAGAIN for what is not', async () => {
    const { path, fd, content } = patterned(4 * MIB);
    const buffer = Buffer.alloc(4096);
    const warm = native.pread(fd, buffer, 0, 4096, 8192, true);
    if (warm === -ERRNO.EOPNOTSUPP) return; // tmpfs of older kernels
    assert.equal(warm, 4096);
    assert.deepEqual(buffer, content.subarray(8192, 12288));

    assert.equal(await native.fdatasync(fd), 0);
    spawnSync('dd', [`if=${path}`, 'iflag=nocache', 'count=0', 'status=none']);
    const cold = native.pread(fd, buffer, 0, 4096, 3 * MIB, true);
    // Whether the pages really went is up to the file system (tmpfs keeps them).
    assert.ok(cold === -ERRNO.EAGAIN || cold === 4096, `answered ${cold}`);
    assert.equal(await native.readAsync(fd, buffer, 0, 4096, 3 * MIB), 4096);
    assert.deepEqual(buffer, content.subarray(3 * MIB, 3 * MIB + 4096));
    assert.equal(native.pread(fd, buffer, 0, 4096, 3 * MIB, true), 4096);
  });
});

describe('readAsync and writeAsync', () => {
  test('read until the length or the end, and write all', async () => {
    const { path, fd, content } = patterned(3 * MIB);
    const buffer = Buffer.alloc(4 * MIB);
    assert.equal(await native.readAsync(fd, buffer, 7, 2 * MIB, 11), 2 * MIB);
    assert.ok(buffer.subarray(7, 7 + 2 * MIB).equals(content.subarray(11, 11 + 2 * MIB)));
    assert.equal(await native.readAsync(fd, buffer, 0, 4 * MIB, 2 * MIB), MIB);
    assert.equal(await native.writeAsync(fd, buffer, 0, MIB, 0), MIB);
    assert.ok(
      readFileSync(path)
        .subarray(0, MIB)
        .equals(content.subarray(2 * MIB)),
    );
  });

  test('many at once, each into its own part', async () => {
    const { fd, content } = patterned(256 * 512);
    const buffer = Buffer.alloc(256 * 512);
    const reads = Array.from({ length: 256 }, (_, i) => native.readAsync(fd, buffer, i * 512, 512, i * 512));
    assert.ok((await Promise.all(reads)).every((result) => result === 512));
    assert.ok(buffer.equals(content));
  });

  test('answer errors, and keep memory that nobody else holds', async () => {
    const { fd } = patterned(MIB);
    assert.equal(await native.readAsync(2 ** 31 - 1, Buffer.alloc(8), 0, 8, 0), -ERRNO.EBADF);
    const { status, stderr } = child(
      `
      import { openSync } from 'node:fs';
      const fd = openSync('/dev/zero', 'r');
      const reads = [];
      for (let i = 0; i < 64; i++) reads.push(native.readAsync(fd, new Uint8Array(1 << 20), 0, 1 << 20, 0));
      gc();
      const wrong = (await Promise.all(reads)).filter((result) => result !== 1 << 20);
      process.exit(wrong.length);`,
      '--expose-gc',
    );
    assert.equal(status, 0, stderr);
    assert.equal(native.pread(fd, Buffer.alloc(1), 0, 1, 0, false), 1);
  });

  test('a thread that ends with reads under way takes nothing down', async () => {
    const text = `
      const { workerData } = require('node:worker_threads');
      import(workerData).then((native) => {
        const fd = require('node:fs').openSync('/dev/zero', 'r');
        for (let i = 0; i < 32; i++) native.readAsync(fd, new Uint8Array(4 << 20), 0, 4 << 20, 0);
        process.exit(0);
      });`;
    const worker = new Worker(text, { eval: true, workerData: loader });
    const code = await new Promise((resolve, reject) => worker.once('exit', resolve).once('error', reject));
    assert.equal(code, 0);
  });
});

/** Both kinds of file system at hand: one that zeroes ranges itself (ext4), one that does not (tmpfs). */
const places = [tmpdir(), '/dev/shm'].filter((path) => existsSync(path));

for (const place of places) {
  describe(`holes and zeros in ${place}`, () => {
    const from = 4096 + 100;
    const length = 5 * MIB + 33;

    test('punchHole: zeros, no space, same size', async () => {
      const { path, fd, content } = patterned(8 * MIB, place);
      const before = fstatSync(fd).blocks;
      const result = await native.punchHole(fd, from, length);
      if (result === -ERRNO.EOPNOTSUPP) return;
      assert.equal(result, 0);
      content.fill(0, from, from + length);
      assert.ok(readFileSync(path).equals(content));
      assert.ok(fstatSync(fd).blocks < before);
      assert.equal(await native.punchHole(fd, 7 * MIB, 4 * MIB), 0);
      assert.equal(native.seekEnd(fd), 8 * MIB);
      assert.equal(await native.punchHole(fd, 0, 0), 0);
    });

    for (const keepHole of [false, true]) {
      test(`zeroRange, keepHole ${keepHole}: zeros, and its neighbours untouched`, async () => {
        const { path, fd, content } = patterned(8 * MIB, place);
        assert.equal(await native.zeroRange(fd, from, length, keepHole), 0);
        content.fill(0, from, from + length);
        assert.ok(readFileSync(path).equals(content));
        assert.equal(await native.zeroRange(fd, 0, 0, keepHole), 0);
      });

      test(`zeroRange, keepHole ${keepHole}: of a range that was a hole`, async () => {
        const fd = sparse(8 * MIB, place);
        assert.equal(await native.zeroRange(fd, MIB, 4 * MIB, keepHole), 0);
        const allocated = fstatSync(fd).blocks * 512;
        if (keepHole) assert.ok(allocated < MIB, `${allocated} bytes allocated`);
        else assert.ok(allocated >= 4 * MIB, `${allocated} bytes allocated`);
        assert.equal(native.seekEnd(fd), 8 * MIB);
      });
    }

    test('allocate: space, data kept, the file grown', async () => {
      const fd = sparse(MIB, place);
      assert.equal(writeSync(fd, 'kept', 100), 4);
      assert.equal(await native.allocate(fd, 0, 3 * MIB), 0);
      assert.ok(fstatSync(fd).blocks * 512 >= 3 * MIB);
      assert.equal(native.seekEnd(fd), 3 * MIB);
      const buffer = Buffer.alloc(4);
      assert.equal(native.pread(fd, buffer, 0, 4, 100, false), 4);
      assert.equal(buffer.toString(), 'kept');
    });

    test('seekData and seekHole walk the extents', () => {
      const fd = sparse(8 * MIB, place);
      native.pwrite(fd, Buffer.alloc(MIB, 1), 0, MIB, 2 * MIB);
      assert.equal(native.seekData(fd, 0), 2 * MIB);
      assert.equal(native.seekData(fd, 2 * MIB + 5), 2 * MIB + 5);
      assert.equal(native.seekHole(fd, 0), 0);
      assert.equal(native.seekHole(fd, 2 * MIB), 3 * MIB);
      assert.equal(native.seekData(fd, 3 * MIB), -ERRNO.ENXIO);
      assert.equal(native.seekHole(fd, 8 * MIB), -ERRNO.ENXIO);
      native.pwrite(fd, Buffer.from([1]), 0, 1, 8 * MIB - 1);
      assert.equal(native.seekHole(fd, 8 * MIB - 1), 8 * MIB);
    });

    test('fdatasync', async () => {
      assert.equal(await native.fdatasync(patterned(10, place).fd), 0);
    });
  });
}

test('the asynchronous ones answer errors as -errno', async () => {
  const bad = 2 ** 31 - 1;
  const readOnly = opened(patterned(8192).path, 'r');
  for (const fd of [bad, readOnly]) {
    assert.equal(await native.punchHole(fd, 0, 4096), -ERRNO.EBADF);
    assert.equal(await native.zeroRange(fd, 0, 4096, true), -ERRNO.EBADF);
    assert.equal(await native.zeroRange(fd, 0, 4096, false), -ERRNO.EBADF);
    assert.equal(await native.allocate(fd, 0, 4096), -ERRNO.EBADF);
  }
  assert.equal(await native.fdatasync(bad), -ERRNO.EBADF);
  assert.equal(native.seekData(bad, 0), -ERRNO.EBADF);
  assert.equal(native.seekEnd(bad), -ERRNO.EBADF);
});

describe('block devices', () => {
  /** A loop device over `path` that goes with its last descriptor, or why there is none. */
  function loop(path: string, sector: number): { fd: number } | { skip: string } {
    const made = spawnSync('losetup', ['--find', '--show', '--sector-size', String(sector), path], {
      encoding: 'utf8',
    });
    if (made.status !== 0) return { skip: `no loop device: ${made.error?.message ?? made.stderr.trim()}` };
    const device = made.stdout.trim();
    try {
      return { fd: opened(device, 'r+') };
    } finally {
      spawnSync('losetup', ['--detach', device]);
    }
  }

  for (const place of places) {
    for (const sector of [512, 4096]) {
      test(`over a file in ${place}, sectors of ${sector}`, async (t) => {
        const { path, content } = patterned(8 * MIB, place);
        const made = loop(path, sector);
        if ('skip' in made) return t.skip(made.skip);
        const { fd } = made;
        assert.equal(native.seekEnd(fd), 8 * MIB);
        assert.equal(native.seekData(fd, 5000), 5000);
        assert.equal(native.seekHole(fd, 5000), 8 * MIB);
        assert.equal(native.seekData(fd, 8 * MIB), -ERRNO.ENXIO);
        assert.equal(native.seekHole(fd, 8 * MIB), -ERRNO.ENXIO);
        assert.equal(await native.allocate(fd, MIB, 7 * MIB), 0);
        assert.equal(await native.allocate(fd, MIB, 8 * MIB), -ERRNO.ENOSPC);

        const same = (): boolean => {
          const now = Buffer.alloc(8 * MIB);
          assert.equal(native.pread(fd, now, 0, 8 * MIB, 0, false), 8 * MIB);
          return now.equals(content);
        };
        const ranges: [number, number][] = [
          [MIB, 64 * 1024], // whole blocks
          [2 * MIB + 512, 64 * 1024], // edges inside a block
          [3 * MIB + 100, 50], // inside one block
          [4 * MIB - 1, 4097],
        ];
        for (const [offset, length] of ranges) {
          for (const keepHole of [true, false]) {
            content.fill(7, offset, offset + length);
            assert.equal(native.pwrite(fd, content, offset, length, offset), length);
            assert.equal(await native.zeroRange(fd, offset, length, keepHole), 0);
            content.fill(0, offset, offset + length);
            assert.ok(same(), `${offset} + ${length}, keepHole ${keepHole}`);
          }
        }
        // Dirty pages, which a device that cannot punch must not cost us.
        content.fill(9, 6 * MIB, 8 * MIB);
        assert.equal(native.pwrite(fd, content, 6 * MIB, 2 * MIB, 6 * MIB), 2 * MIB);
        const punched = await native.punchHole(fd, 6 * MIB + 512, MIB);
        assert.ok(punched === 0 || punched === -ERRNO.EOPNOTSUPP, `answered ${punched}`);
        if (punched === 0) content.fill(0, 6 * MIB + 512, 7 * MIB + 512);
        assert.ok(same());
        assert.equal(await native.fdatasync(fd), 0);
      });
    }
  }
});

describe('lockFile', () => {
  test('keeps other descriptions out, in this process too, until it is closed', () => {
    const { path, fd } = patterned(10);
    const other = openSync(path, 'r+');
    assert.equal(native.lockFile(fd, true), true);
    assert.equal(native.lockFile(fd, true), true);
    assert.equal(native.lockFile(other, true), false);
    assert.equal(native.lockFile(other, false), false);
    closeSync(openSync(path, 'r+')); // would drop a POSIX lock
    assert.equal(native.lockFile(other, true), false);
    assert.equal(native.lockFile(fd, false), true);
    assert.equal(native.lockFile(other, false), true);
    assert.equal(native.lockFile(fd, true), false);
    closeSync(other);
    assert.equal(native.lockFile(fd, true), true);
  });

  test('is kept by a duplicate, and known to other processes', () => {
    const { path } = patterned(10);
    const first = openSync(path, 'r+');
    assert.equal(native.lockFile(first, true), true);
    const second = native.dup(first);
    native.closeFd(first);
    const asks = `
      import { openSync } from 'node:fs';
      console.log(native.lockFile(openSync(${JSON.stringify(path)}, 'r+'), true));`;
    assert.equal(child(asks).stdout, 'false\n');
    native.closeFd(second);
    assert.equal(child(asks).stdout, 'true\n');
  });

  test('throws what is not about somebody else', () => {
    const readOnly = opened(patterned(10).path, 'r');
    assert.throws(() => native.lockFile(readOnly, true), {
      code: 'EBADF',
      syscall: 'fcntl',
      errno: -ERRNO.EBADF,
    });
    assert.equal(native.lockFile(readOnly, false), true);
  });
});

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

describe('descriptors', () => {
  test('dup shares the description and is not inherited', () => {
    const { fd } = patterned(10);
    const copy = native.dup(fd);
    assert.notEqual(copy, fd);
    assert.equal(fstatSync(copy).ino, fstatSync(fd).ino);
    assert.match(readFileSync(`/proc/self/fdinfo/${copy}`, 'utf8'), /^flags:\s+02\d*$/m);
    native.closeFd(copy);
    assert.throws(() => native.closeFd(copy), { code: 'EBADF', syscall: 'close' });
    assert.throws(() => native.dup(copy), { code: 'EBADF', syscall: 'fcntl' });
  });

  test('socketPair is connected both ways', () => {
    const [a, b] = native.socketPair();
    const buffer = Buffer.alloc(10);
    writeSync(a, 'ping');
    assert.equal(readSync(b, buffer), 4);
    writeSync(b, 'pong!');
    assert.equal(readSync(a, buffer), 5);
    assert.equal(buffer.toString('latin1', 0, 5), 'pong!');
    native.closeFd(a);
    assert.equal(readSync(b, buffer), 0);
    native.closeFd(b);
  });
});

describe('bitmaps', () => {
  test('32 MiB: counted and searched whole', () => {
    const map = new Uint8Array(32 * MIB);
    const bits = map.length * 8;
    assert.equal(native.nextOne(map, 0, bits), bits);
    assert.equal(native.setRange(map, 3, bits - 3), bits - 6);
    assert.equal(native.countOnes(map, 0, bits), bits - 6);
    assert.equal(native.nextZero(map, 3, bits), bits - 3);
    assert.equal(native.clearRange(map, 1000, 1001), 1);
    assert.equal(native.nextZero(map, 3, bits), 1000);
    assert.equal(native.clearRange(map, 0, bits), bits - 7);
    assert.equal(native.nextOne(map, 0, bits), bits);
  });

  test('empty maps and empty ranges', () => {
    const none = new Uint8Array(0);
    assert.equal(native.countOnes(none, 0, 0), 0);
    assert.equal(native.nextZero(none, 0, 0), 0);
    assert.equal(native.setRange(none, 0, 0), 0);
    const map = new Uint8Array([0xff, 0xff]);
    for (const at of [0, 5, 8, 16]) {
      assert.equal(native.countOnes(map, at, at), 0);
      assert.equal(native.nextOne(map, at, at), at);
      assert.equal(native.clearRange(map, at, at), 0);
    }
  });
});

describe('wrong arguments throw, and do nothing', () => {
  type Loose = (...args: unknown[]) => unknown;
  const { fd } = patterned(4096);
  const buffer = new Uint8Array(16);
  const good: Record<string, unknown[]> = {
    pread: [fd, buffer, 0, 16, 0, false],
    pwrite: [fd, buffer, 0, 0, 0],
    readAsync: [fd, buffer, 0, 16, 0],
    writeAsync: [fd, buffer, 0, 0, 0],
    punchHole: [fd, 0, 0],
    zeroRange: [fd, 0, 0, true],
    allocate: [fd, 0, 0],
    fdatasync: [fd],
    seekData: [fd, 0],
    seekHole: [fd, 0],
    seekEnd: [fd],
    lockFile: [fd, false],
    mapShared: [fd, 16],
    unmap: [native.mapShared(fd, 16)],
    dup: [fd],
    closeFd: [openSync('/dev/null', 'r')],
    countOnes: [buffer, 0, 128],
    nextZero: [buffer, 0, 128],
    nextOne: [buffer, 0, 128],
    setRange: [buffer, 0, 0],
    clearRange: [buffer, 0, 0],
  };
  const wrongNumbers = [-1, 0.5, Number.NaN, Number.POSITIVE_INFINITY, 2 ** 53, -(2 ** 40)];
  const wrongTypes = [undefined, null, '0', 1n, {}, [], Symbol('x'), () => 0];
  const wrongArrays = [
    new Uint16Array(8),
    new Int8Array(8),
    new Uint8ClampedArray(8),
    new DataView(new ArrayBuffer(8)),
  ];

  function refused(name: string, args: unknown[], kinds: string[]): void {
    const call = (native as unknown as Record<string, Loose>)[name];
    try {
      call(...args);
    } catch (error) {
      assert.ok(error instanceof TypeError || error instanceof RangeError, `${name}: ${error}`);
      assert.ok(kinds.includes((error as NodeJS.ErrnoException).code ?? ''), `${name}: ${error}`);
      return;
    }
    assert.fail(`${name} took ${args.map(String).join(', ')}`);
  }

  for (const [name, args] of Object.entries(good)) {
    test(name, async () => {
      for (const [i, value] of args.entries()) {
        const with_ = (wrong: unknown): unknown[] => args.with(i, wrong);
        for (const wrong of wrongTypes) refused(name, with_(wrong), ['ERR_INVALID_ARG_TYPE']);
        if (typeof value === 'number') {
          for (const wrong of wrongNumbers) refused(name, with_(wrong), ['ERR_OUT_OF_RANGE']);
        }
        if (value instanceof Uint8Array) {
          for (const wrong of wrongArrays) refused(name, with_(wrong), ['ERR_INVALID_ARG_TYPE']);
        }
        refused(name, args.slice(0, i), ['ERR_INVALID_ARG_TYPE', 'ERR_OUT_OF_RANGE']);
      }
      const result = await (native as unknown as Record<string, Loose>)[name](...args);
      assert.ok(typeof result !== 'number' || result >= 0, `${name} answered ${String(result)}`);
    });
  }

  test('at and length are held against the array, detached ones too', () => {
    const detached = new Uint8Array(16);
    structuredClone(detached, { transfer: [detached.buffer] });
    const wrong: [Uint8Array, number, number][] = [
      [buffer, 0, 17],
      [buffer, 1, 16],
      [buffer, 17, 0],
      [buffer, 2 ** 52, 2 ** 52],
      [buffer, 16, 1],
      [detached, 0, 1],
      [detached, 1, 0],
    ];
    for (const [array, at, length] of wrong) {
      refused('pread', [fd, array, at, length, 0, false], ['ERR_OUT_OF_RANGE']);
      refused('pwrite', [fd, array, at, length, 0], ['ERR_OUT_OF_RANGE']);
      refused('readAsync', [fd, array, at, length, 0], ['ERR_OUT_OF_RANGE']);
      refused('writeAsync', [fd, array, at, length, 0], ['ERR_OUT_OF_RANGE']);
    }
    assert.equal(native.pread(fd, detached, 0, 0, 0, false), 0);
    for (const name of ['countOnes', 'nextZero', 'nextOne', 'setRange', 'clearRange']) {
      for (const [from, to] of [
        [0, 129],
        [5, 4],
        [129, 129],
      ]) {
        refused(name, [buffer, from, to], ['ERR_OUT_OF_RANGE']);
      }
      refused(name, [detached, 0, 1], ['ERR_OUT_OF_RANGE']);
    }
  });
});

describe('the loader', () => {
  /** A package of nothing but the loader and what it imports. */
  function bare(): string {
    const root = folderIn();
    const dist = dirname(dirname(dirname(loader)));
    for (const file of ['src/native/index.js', 'src/errors.js', 'src/nbd/constants.js']) {
      const copy = join(root, 'dist', file);
      mkdirSync(dirname(copy), { recursive: true });
      copyFileSync(join(dist, file), copy);
    }
    writeFileSync(join(root, 'package.json'), '{"type":"module"}');
    return root;
  }

  test('says what is missing and how to build it', async () => {
    const root = bare();
    await assert.rejects(
      import(join(root, 'dist/src/native/index.js')),
      (error: Error & { code?: string }) => {
        assert.equal(error.name, 'BlockferryError');
        assert.equal(error.code, 'not-found');
        assert.ok(
          error.message.includes(`${root}/native/build/Release/blockferry.node is missing`),
          error.message,
        );
        assert.ok(error.message.includes(`cd '${root}' && npm run install`), error.message);
        return true;
      },
    );
  });

  test('says so when the addon is damaged', async () => {
    const root = bare();
    mkdirSync(join(root, 'native/build/Release'), { recursive: true });
    writeFileSync(join(root, 'native/build/Release/blockferry.node'), 'not an addon');
    await assert.rejects(import(join(root, 'dist/src/native/index.js')), {
      code: 'not-found',
      message: /cannot be loaded.*npm run install/,
    });
  });
});
