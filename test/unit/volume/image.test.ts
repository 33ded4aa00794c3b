import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { ERRNO } from '../../../src/native/index.js';
import { Errno } from '../../../src/nbd/constants.js';
import { errnoOfSystem, Image, WOULD_WAIT } from '../../../src/volume/image.js';
import { failsWith, patterned, sparseFile, tempFolder } from '../../support/volume.js';

const MIB = 1 << 20;
const SHM = '/dev/shm';
const noTmpfs = existsSync(SHM) ? false : `no tmpfs at ${SHM}`;
const has = (tool: string): boolean => spawnSync('which', [tool]).status === 0;
const noQemuImg = has('qemu-img') ? false : 'qemu-img is not installed';

function imageWith(content: Buffer, parent?: string): string {
  const path = join(tempFolder(parent), 'image');
  writeFileSync(path, content);
  return path;
}

describe('Image.open refuses', () => {
  test('what is not there', () => {
    assert.throws(() => Image.open(join(tempFolder(), 'no')), failsWith('image-missing', /create it/));
    assert.throws(() => Image.open(join(tempFolder(), 'no', 'no')), failsWith('image-missing'));
  });

  test('a folder, a device that is no disk', () => {
    for (const readOnly of [false, true]) {
      assert.throws(() => Image.open(tempFolder(), { readOnly }), failsWith('image-io'));
      assert.throws(() => Image.open('/dev/null', { readOnly }), failsWith('image-io', /neither/));
    }
  });

  test('a named pipe, without waiting for its other end', () => {
    const path = join(tempFolder(), 'pipe');
    assert.equal(spawnSync('mkfifo', [path]).status, 0);
    for (const readOnly of [false, true])
      assert.throws(() => Image.open(path, { readOnly }), failsWith('image-io', /neither/));
  });

  test('an empty file', () => {
    assert.throws(() => Image.open(imageWith(Buffer.alloc(0))), failsWith('image-io', /truncate/));
  });

  test('an image that we have open already, by whatever name; two readers may', () => {
    const path = sparseFile(MIB);
    const link = `${path}.link`;
    symlinkSync(path, link);
    const image = Image.open(path);
    assert.equal(image.path, path);
    for (const name of [path, link]) {
      assert.throws(() => Image.open(name), failsWith('image-in-use', /in use/));
      assert.throws(() => Image.open(name, { readOnly: true }), failsWith('image-in-use'));
    }
    image.close();
    const readers = [Image.open(link, { readOnly: true }), Image.open(path, { readOnly: true })];
    assert.equal(readers[0]!.path, path);
    assert.throws(() => Image.open(path), failsWith('image-in-use'));
    for (const reader of readers) reader.close();
    Image.open(path).close();
  });

  test('an image that another process has open, until it dies', async () => {
    const path = sparseFile(MIB);
    const module = fileURLToPath(new URL('../../../src/volume/image.js', import.meta.url));
    const script = `const { Image } = await import(${JSON.stringify(module)});
      globalThis.image = Image.open(${JSON.stringify(path)}); console.log('open'); setInterval(() => {}, 1000);`;
    const argv = ['--pdeathsig', 'KILL', '--', process.execPath, '--input-type=module', '-e', script];
    const holder = spawn('setpriv', argv, { stdio: ['ignore', 'pipe', 'inherit'] });
    await new Promise((resolve) => holder.stdout.once('data', resolve));
    assert.throws(() => Image.open(path), failsWith('image-in-use'));
    holder.kill('SIGKILL');
    await new Promise((resolve) => holder.once('exit', resolve));
    Image.open(path).close();
  });

  test('an image that QEMU writes; and QEMU refuses one of ours', { skip: noQemuImg }, async () => {
    const path = sparseFile(MIB);
    const image = Image.open(path);
    const refused = spawnSync('qemu-io', ['-f', 'raw', '-c', 'write 0 4k', path], { encoding: 'utf8' });
    assert.notEqual(refused.status, 0);
    assert.match(refused.stderr, /lock/);
    image.close();
    const qemu = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'qemu-io', '-f', 'raw', path], {
      stdio: ['pipe', 'pipe', 'inherit'],
    });
    qemu.stdin.write('write 0 4k\n');
    await new Promise((resolve) =>
      qemu.stdout.on('data', (text) => /wrote/.test(String(text)) && resolve(0)),
    );
    assert.throws(() => Image.open(path), failsWith('image-in-use'));
    qemu.stdin.end('quit\n');
    await new Promise((resolve) => qemu.once('exit', resolve));
    Image.open(path).close();
  });
});

describe('Image.create', () => {
  test('makes a sparse file that only the user may read, and locks it', async () => {
    const path = join(tempFolder(), 'new.img');
    const image = await Image.create(path, 10 * MIB + 5);
    assert.equal(image.size, 10 * MIB + 5);
    assert.equal(statSync(path).mode & 0o077, 0);
    assert.ok(statSync(path).blocks * 512 < MIB);
    assert.ok(image.isHole(0, image.size));
    assert.throws(() => Image.open(path), failsWith('image-in-use'));
    image.close();
  });

  test('never touches what is there, and says what it cannot do', async () => {
    const path = imageWith(Buffer.from('mine'));
    await assert.rejects(Image.create(path, MIB), failsWith('exists'));
    assert.equal(readFileSync(path, 'utf8'), 'mine');
    await assert.rejects(Image.create(join(tempFolder(), 'no', 'x'), MIB), failsWith('image-io'));
  });

  test('a size that the file system refuses leaves no file', async (t) => {
    const path = join(tempFolder(), 'huge.img');
    const made = await Image.create(path, 2 ** 52).catch((error: unknown) => error);
    if (made instanceof Image) {
      made.close();
      return t.skip('the file system takes files of any size');
    }
    failsWith('image-io', /huge\.img/)(made);
    assert.ok(!existsSync(path));
  });
});

for (const [where, parent, skip] of [
  ['on disk', undefined, false],
  ['on tmpfs', SHM, noTmpfs],
] as const) {
  describe(`Image ${where}`, { skip }, () => {
    const size = 64 * 1024 + 100;

    test('reads and writes at any offset, to the last byte', async () => {
      const content = patterned(size);
      const image = Image.open(imageWith(content, parent));
      const data = patterned(5000, 2);
      assert.equal(image.write(data, 100, 4800, size - 4800), 0);
      data.copy(content, size - 4800, 100, 4900);
      const buffer = Buffer.alloc(size + 10);
      assert.equal(image.readNow(buffer, 10, size, 0), 0);
      assert.ok(buffer.subarray(10).equals(content));
      buffer.fill(0);
      assert.equal(await image.read(buffer, 10, size, 0), 0);
      assert.ok(buffer.subarray(10).equals(content));
      assert.equal(await image.sync(), 0);
      image.close();
    });

    test('zeroes and punches just the range; stretches and holes are told', async () => {
      const content = patterned(size);
      const image = Image.open(imageWith(content, parent));
      assert.equal(await image.zero(4000, 10_000, true), 0);
      content.fill(0, 4000, 14_000);
      const punched = await image.punch(32_768, 16_384);
      if (punched === 0) content.fill(0, 32_768, 49_152);
      const buffer = Buffer.alloc(size);
      assert.equal(await image.read(buffer, 0, size, 0), 0);
      assert.ok(buffer.equals(content));
      let at = 0;
      while (at < size) {
        const { hole, end } = image.stretch(at, size);
        assert.ok(end > at && end <= size);
        if (hole) assert.ok(content.subarray(at, end).equals(Buffer.alloc(end - at)));
        assert.equal(image.isHole(at, end), hole);
        at = end;
      }
      image.close();
    });

    test('zeroes without writing, or says at once that it cannot, and changes nothing', async () => {
      const content = patterned(size);
      const image = Image.open(imageWith(content, parent));
      for (const keepHole of [true, false]) {
        assert.ok(image.mayZeroFast(keepHole));
        const done = await image.zeroFast(4000, 10_000, keepHole);
        if (done === false) assert.ok(!image.mayZeroFast(keepHole), 'it is not tried again');
        else {
          assert.equal(done, 0);
          content.fill(0, 4000, 14_000);
        }
        const buffer = Buffer.alloc(size);
        assert.equal(await image.read(buffer, 0, size, 0), 0);
        assert.ok(buffer.equals(content));
      }
      image.close();
    });

    test('tells how far a hole reaches', () => {
      const path = join(tempFolder(parent), 'sparse');
      writeFileSync(path, '');
      truncateSync(path, 8 * MIB);
      const image = Image.open(path);
      assert.equal(image.holeFrom(5, 8 * MIB), 8 * MIB - 5);
      assert.equal(image.write(Buffer.alloc(4096, 1), 0, 4096, 4 * MIB), 0);
      assert.equal(image.holeFrom(0, 8 * MIB), 4 * MIB);
      assert.equal(image.holeFrom(MIB, 2 * MIB), MIB);
      assert.equal(image.holeFrom(4 * MIB, 8 * MIB), 0);
      assert.equal(image.holeFrom(4 * MIB + 4095, 8 * MIB), 0);
      image.close();
    });

    test('an image that was cut meanwhile: an I/O error, no crash and no endless wait', async () => {
      const path = imageWith(patterned(size), parent);
      const image = Image.open(path);
      truncateSync(path, 8192);
      const buffer = Buffer.alloc(8192);
      assert.ok([WOULD_WAIT, -ERRNO.EIO].includes(image.readNow(buffer, 0, 8192, 4096)));
      assert.equal(await image.read(buffer, 0, 8192, 4096), -ERRNO.EIO);
      assert.equal(await image.read(buffer, 0, 4096, 16_384), -ERRNO.EIO);
      image.close();
    });
  });
}

test('a read-only image refuses writes', () => {
  const image = Image.open(sparseFile(MIB), { readOnly: true });
  assert.ok(image.readOnly);
  assert.ok(image.write(Buffer.alloc(512), 0, 512, 0) < 0);
  image.close();
});

test("the kernel's errors as NBD knows them", () => {
  assert.equal(errnoOfSystem(-ERRNO.ENOSPC), Errno.ENOSPC);
  assert.equal(errnoOfSystem(-ERRNO.EDQUOT), Errno.ENOSPC);
  assert.equal(errnoOfSystem(-ERRNO.EROFS), Errno.EPERM);
  assert.equal(errnoOfSystem(-ERRNO.EIO), Errno.EIO);
  assert.equal(errnoOfSystem(-ERRNO.EBADF), Errno.EIO);
});

test('a folder in the way of the image', () => {
  const path = join(tempFolder(), 'folder');
  mkdirSync(path);
  assert.throws(() => Image.open(path), failsWith('image-io'));
});
