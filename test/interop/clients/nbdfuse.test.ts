// A disk of ours as a file: nbdfuse shows an export in a folder, and everything that works on files works on it.
import assert from 'node:assert/strict';
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, statSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { needs, tool } from '../tools.js';
import { assertSame, type Disk, SIZE, withDisk } from './disks.js';

const START_TIMEOUT_MS = 10_000;
const MIB = 1 << 20;

function needsFuse(): { skip: string | false } {
  const absent = needs('nbdfuse', 'umount', 'dd', 'cmp');
  if (absent.skip !== false) return absent;
  if (!existsSync('/dev/fuse')) return { skip: 'there is no /dev/fuse' };
  return { skip: process.getuid?.() !== 0 && 'mounting without fusermount3 needs root' };
}

/** Calls `scenario` with the path of a file that is the disk. */
async function mounted(disk: Disk, scenario: (file: string) => Promise<void>): Promise<void> {
  const folder = disk.path('mnt');
  mkdirSync(folder);
  const file = join(folder, 'disk');
  const fuse = spawn('setpriv', ['--pdeathsig', 'TERM', '--', 'nbdfuse', file, disk.unix], {
    stdio: 'ignore',
  });
  const ended = new Promise<void>((resolve) => fuse.once('exit', () => resolve()));
  try {
    const deadline = performance.now() + START_TIMEOUT_MS;
    while (!existsSync(file)) {
      assert.ok(performance.now() < deadline && fuse.exitCode === null, 'nbdfuse shows no file');
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    await scenario(file);
  } finally {
    spawnSync('umount', [folder]);
    fuse.kill('SIGTERM');
    await ended;
  }
}

describe('nbdfuse', needsFuse(), () => {
  for (const state of ['serve', 'on demand'] as const) {
    test(`file operations on a disk: ${state}`, () =>
      withDisk(state, async (disk) => {
        const wanted = Buffer.from(disk.content);
        await mounted(disk, async (file) => {
          assert.equal(statSync(file).size, SIZE);
          await tool(
            'dd',
            `if=${file}`,
            `of=${disk.path('part')}`,
            'bs=64k',
            'skip=16',
            'count=64',
            'status=none',
          );
          assertSame(readFileSync(disk.path('part')), wanted.subarray(MIB, 5 * MIB));
          const handle = await open(file, 'r+');
          for (const [at, text] of [
            [3, 'a few bytes'],
            [4095, 'over the edge of a block'],
            [SIZE - 7, 'the end'],
          ] as const) {
            await handle.write(text, at);
            wanted.write(text, at);
          }
          await handle.sync();
          await handle.close();
          await tool(
            'dd',
            'if=/dev/zero',
            `of=${file}`,
            'bs=1M',
            'count=2',
            'seek=9',
            'conv=notrunc,fsync',
            'status=none',
          );
          wanted.fill(0, 9 * MIB, 11 * MIB);
          assertSame(readFileSync(file), wanted);
        });
        await disk.handedOff();
        assertSame(readFileSync(disk.image), wanted);
      }));
  }
});
