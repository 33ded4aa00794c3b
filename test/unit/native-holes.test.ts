/** Holes, zeros and space, on files and on block devices. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, fstatSync, readFileSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { MIB, opened, patterned, sparse } from './native-fixtures.js';

const { ERRNO } = native;

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

    for (const keepHole of [false, true])
      test(`zeroFast, keepHole ${keepHole}: zeros, or -EOPNOTSUPP and nothing changed`, async () => {
        const { path, fd, content } = patterned(8 * MIB, place);
        const result = await native.zeroFast(fd, from, length, keepHole);
        assert.ok(result === 0 || result === -ERRNO.EOPNOTSUPP, `answered ${result}`);
        if (result === 0) content.fill(0, from, from + length);
        assert.ok(readFileSync(path).equals(content));
        assert.equal(await native.zeroFast(fd, 0, 0, keepHole), 0);
      });

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
        for (const keepHole of [true, false]) {
          content.fill(6, MIB, 3 * MIB);
          assert.equal(native.pwrite(fd, content, MIB, 2 * MIB, MIB), 2 * MIB);
          const zeroed = await native.zeroFast(fd, MIB + 512, MIB, keepHole);
          assert.ok(zeroed === 0 || zeroed === -ERRNO.EOPNOTSUPP, `answered ${zeroed}`);
          if (zeroed === 0) content.fill(0, MIB + 512, 2 * MIB + 512);
          assert.ok(same(), `zeroFast, keepHole ${keepHole}`);
        }
        assert.equal(await native.fdatasync(fd), 0);
      });
    }
  }
});
