// fio checks every block it wrote by its checksum, in each state of a disk and across a hand-off.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { needs, tool } from '../tools.js';
import { type Disk, STATES, TRANSPORTS, withDisk } from './disks.js';

const COMMON = [
  '--name=verify',
  '--ioengine=nbd',
  '--verify=crc32c',
  '--verify_fatal=1',
  '--verify_state_save=0',
];

function fio(uri: string, ...words: string[]): Promise<string> {
  return tool('fio', ...COMMON, `--uri=${uri}`, '--output-format=terse', ...words);
}

/** fio lays its state files down where it runs. */
function mixed(disk: Disk, transport: (typeof TRANSPORTS)[number]): Promise<string> {
  const shape = ['--rw=randrw', '--bsrange=512-200k', '--iodepth=32', '--size=16m', '--io_size=24m'];
  return fio(disk.uri(transport), ...shape);
}

describe('fio with verification', needs('fio'), () => {
  for (const state of STATES) {
    test(`random reads and writes, a disk: ${state}`, () =>
      withDisk(state, async (disk) => {
        for (const transport of TRANSPORTS) await mixed(disk, transport);
        const { clients, error } = await disk.status();
        assert.equal(error, null);
        assert.equal(clients, 0);
      }));
  }

  test('what was written before the hand-off is there after it', () =>
    withDisk('relocating', async (disk) => {
      const shape = [
        '--rw=randwrite',
        '--bs=4k',
        '--iodepth=16',
        '--size=12m',
        '--io_size=6m',
        '--randseed=5',
      ];
      await fio(disk.unix, ...shape, '--do_verify=0', '--end_fsync=1');
      assert.equal((await disk.status()).phase, 'relocating');
      await disk.handedOff();
      await fio(disk.uri('TCP'), ...shape, '--verify_only');
    }));

  test('while the disk is handed off', () =>
    withDisk('relocating', async (disk) => {
      const shape = ['--rw=randrw', '--bs=4k', '--iodepth=8', '--size=16m', '--io_size=64m'];
      const work = fio(disk.unix, ...shape);
      await disk.handedOff();
      await work;
      assert.equal((await disk.status()).phase, 'plain');
    }));
});
