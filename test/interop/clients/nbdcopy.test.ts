// nbdcopy both ways, sparse and dense, through the real commands.

import assert from 'node:assert/strict';
import { readFileSync, statSync, writeFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { needs, tool } from '../tools.js';
import { assertSame, HOLE, pattern, SIZE, STATES, TRANSPORTS, withDisk } from './disks.js';

const MIB = 1 << 20;
const WIDE = ['--connections=4', '--requests=64', '--request-size=131072'];

function allocatedBytes(path: string): number {
  return statSync(path).blocks * 512;
}

for (const state of STATES) {
  describe(`nbdcopy and a disk: ${state}`, needs('nbdcopy'), () => {
    test('out of it, over unix and TCP, sparse', () =>
      withDisk(state, async (disk) => {
        for (const transport of TRANSPORTS) {
          const to = disk.path(`copy-${transport}`);
          await tool('nbdcopy', ...WIDE, disk.uri(transport), to);
          assertSame(readFileSync(to), disk.content);
        }
        const sparse = disk.path('sparse');
        await tool('nbdcopy', '--sparse=4096', disk.unix, sparse);
        assertSame(readFileSync(sparse), disk.content);
        await tool('nbdcopy', '--synchronous', disk.unix, disk.path('synchronous'));
        assertSame(readFileSync(disk.path('synchronous')), disk.content);
        assert.ok(allocatedBytes(sparse) <= SIZE - (HOLE.to - HOLE.from) + MIB, 'the copy is sparse');
        if (state === 'serve') return;
        await disk.handedOff();
        assertSame(readFileSync(disk.image), disk.content);
      }));

    test('into it: what was there is gone, the source of a proxy keeps it', () =>
      withDisk(state === 'handed off' ? 'on demand' : state, async (disk) => {
        const from = disk.path('new.img');
        const content = pattern(SIZE, 99);
        content.fill(0, 2 * MIB, 5 * MIB);
        writeFileSync(from, content);
        await tool('nbdcopy', '--flush', ...WIDE, from, disk.uri('TCP'));
        await tool('nbdcopy', '--connections=2', disk.unix, disk.path('back'));
        assertSame(readFileSync(disk.path('back')), content);
        if (state !== 'serve') await disk.handedOff();
        assertSame(readFileSync(disk.image), content);
      }));
  });
}

test('from one proxy into another', needs('nbdcopy'), () =>
  withDisk('relocating', (from) =>
    withDisk('on demand', async (to) => {
      await tool('nbdcopy', '--flush', ...WIDE, from.unix, to.uri('TCP'));
      await to.handedOff();
      assertSame(readFileSync(to.image), from.content);
    }),
  ),
);
