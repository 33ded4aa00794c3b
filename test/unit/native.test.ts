/** The addon's calls one by one (holes and mappings have files of their own), its arguments, its loader. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  copyFileSync,
  existsSync,
  fstatSync,
  mkdirSync,
  openSync,
  readFileSync,
  readSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import { Worker } from 'node:worker_threads';
import * as native from '../../src/native/index.js';
import { child, folderIn, loader, MIB, opened, patterned, sparse } from './native-fixtures.js';

const { ERRNO } = native;

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

  test('orInto sets what is set in the other, and nothing else, at any length', () => {
    for (const bytes of [0, 1, 7, 8, 9, 16, 4099]) {
      const map = Uint8Array.from({ length: bytes }, (_, i) => (i * 37) & 0xff);
      const other = Uint8Array.from({ length: bytes }, (_, i) => (i % 3 === 0 ? (i * 91) & 0xff : 0));
      const [mine, more] = [map.slice(), other.slice()];
      native.orInto(map, other);
      for (let i = 0; i < bytes; i++) assert.equal(map[i], mine[i]! | more[i]!, `byte ${i} of ${bytes}`);
      assert.deepEqual(other, more);
    }
    // Beside 8-byte borders of its memory, and nothing around it.
    const around = new Uint8Array(32);
    native.orInto(around.subarray(3, 22), new Uint8Array(19).fill(0xff));
    assert.deepEqual(
      [...around],
      [...new Array(3).fill(0), ...new Array(19).fill(0xff), ...new Array(10).fill(0)],
    );
  });

  test('orInto of maps that are not of one length throws, and does nothing', () => {
    const map = new Uint8Array(16);
    for (const length of [0, 15, 17])
      assert.throws(() => native.orInto(map, new Uint8Array(length).fill(0xff)), {
        code: 'ERR_OUT_OF_RANGE',
      });
    assert.deepEqual(map, new Uint8Array(16));
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
    zeroFast: [fd, 0, 0, true],
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
    orInto: [buffer, buffer],
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

/** Which addon is loaded is said from outside: test/fuzz/sanitizers.ts. */
const told = process.env.BLOCKFERRY_ADDON !== undefined;

describe('the loader', { skip: told && 'BLOCKFERRY_ADDON names the addon' }, () => {
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
