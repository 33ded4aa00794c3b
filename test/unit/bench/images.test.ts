import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import {
  closeSync,
  existsSync,
  openSync,
  readFileSync,
  statfsSync,
  statSync,
  watch,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import {
  IMAGE_UNIT_BYTES,
  makeImage,
  type Placement,
  renewMemory,
  residentShare,
} from '../../../src/bench/images.js';
import { pread, pwrite } from '../../../src/native/index.js';
import { tempFolder } from '../../support/volume.js';

const SHM = '/dev/shm';
const TMPFS_MAGIC = 0x01021994;
const BYTES = 2 * IMAGE_UNIT_BYTES;
const NAMES = ['a', 'b', 'c'];

const noTmpfs = existsSync(SHM) ? false : `no tmpfs at ${SHM}`;
const noFincore = spawnSync('which', ['fincore']).status === 0 ? false : 'fincore is not installed';
const noDisk = statfsSync(tmpdir()).type === TMPFS_MAGIC ? `${tmpdir()} is on no disk` : noFincore;

async function images(parent: string): Promise<string[]> {
  const folder = tempFolder(parent);
  const paths = NAMES.map((name) => join(folder, name));
  for (const path of paths) await makeImage(path, BYTES);
  return paths;
}

/** The files of the folder in the order in which they are changed; one that is changed several times running is named once. */
async function changedIn(folder: string, change: () => Promise<void>): Promise<string> {
  const order: string[] = [];
  let ended = (): void => undefined;
  const end = new Promise<void>((resolve) => {
    ended = resolve;
  });
  const watcher = watch(folder, (_, name) => {
    if (name === 'end') ended();
    else if (name !== null && name !== order.at(-1)) order.push(name);
  });
  try {
    await change();
    writeFileSync(join(folder, 'end'), 'x');
    await end;
  } finally {
    watcher.close();
  }
  return order.join('');
}

describe('other memory for images', () => {
  const kept = async (placement: Placement, parent: string): Promise<void> => {
    const paths = await images(parent);
    const content = readFileSync(paths[0]);
    const before = statSync(paths[1]);
    // As a server has it, before and after.
    const fd = openSync(paths[1], 'r+');
    try {
      if (placement === 'tmpfs') pwrite(fd, Buffer.alloc(4096), 0, 4096, IMAGE_UNIT_BYTES - 2048);
      await renewMemory(paths, BYTES, placement, 1);
      const after = statSync(paths[1]);
      assert.deepEqual([after.ino, after.size, after.blocks], [before.ino, before.size, before.blocks]);
      const seen = Buffer.alloc(BYTES);
      assert.equal(pread(fd, seen, 0, BYTES, 0, false), BYTES);
      assert.ok(seen.equals(content));
      for (const path of paths) assert.ok(readFileSync(path).equals(content), path);
    } finally {
      closeSync(fd);
    }
  };

  test('on tmpfs they keep file and size, and have the content they were made with', { skip: noTmpfs }, () =>
    kept('tmpfs', SHM),
  );

  test('in the page cache of a disk they keep all of it, and are in memory again', {
    skip: noDisk,
  }, async () => {
    await kept('cache', tmpdir());
    const paths = await images(tmpdir());
    await renewMemory(paths, BYTES, 'cache', 0);
    for (const path of paths) assert.equal(await residentShare(path), 1, basename(path));
  });

  test('all give theirs back first; who is filled first goes round', { skip: noTmpfs }, async () => {
    const paths = await images(SHM);
    const order = (round: number): Promise<string> =>
      changedIn(dirname(paths[0]), () => renewMemory(paths, BYTES, 'tmpfs', round));
    // Given back, then two pieces of each; "c" once where it is the last to give and the first to take.
    assert.deepEqual(
      [await order(0), await order(1), await order(2), await order(3)],
      ['abc' + 'abc' + 'bca', 'abc' + 'bca' + 'cab', 'abc' + 'ab' + 'abc', 'abc' + 'abc' + 'bca'],
    );
  });

  test('cold ones are left alone', { skip: noTmpfs }, async () => {
    const paths = await images(SHM);
    assert.equal(await changedIn(dirname(paths[0]), () => renewMemory(paths, BYTES, 'cold', 1)), '');
  });
});
