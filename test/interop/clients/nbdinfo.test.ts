// nbdinfo and the other tools that ask what there is, against the real commands.
import assert from 'node:assert/strict';
import { statSync } from 'node:fs';
import { describe, test } from 'node:test';
import { attempt, needs, tool } from '../tools.js';
import { HOLE, SIZE, STATES, TRANSPORTS, withDisk } from './disks.js';

interface Extent {
  offset: number;
  length: number;
  type: number;
  description: string;
}

const BLOCK = 4096;
const MIB = 1 << 20;

async function map(uri: string, context = 'base:allocation'): Promise<Extent[]> {
  const extents: Extent[] = JSON.parse(await tool('nbdinfo', '--json', `--map=${context}`, uri));
  let at = 0;
  for (const extent of extents) {
    assert.equal(extent.offset, at);
    at += extent.length;
  }
  assert.equal(at, SIZE);
  return extents;
}

/** Types of the extents that [from, to) touches. */
function typesIn(extents: Extent[], from: number, to: number): number[] {
  const touched = extents.filter(({ offset, length }) => offset < to && offset + length > from);
  return [...new Set(touched.map(({ type }) => type))];
}

for (const state of STATES) {
  describe(`nbdinfo and a disk: ${state}`, needs('nbdinfo'), () => {
    test('size, list and JSON, over unix and TCP', () =>
      withDisk(state, async (disk) => {
        for (const transport of TRANSPORTS) {
          const uri = disk.uri(transport);
          assert.equal((await tool('nbdinfo', '--size', uri)).trim(), String(SIZE));
          const list = JSON.parse(await tool('nbdinfo', '--list', '--json', uri));
          assert.deepEqual(
            list.exports.map((entry: { 'export-name': string }) => entry['export-name']),
            ['disk'],
          );
          const { exports, structured } = JSON.parse(await tool('nbdinfo', '--json', uri));
          assert.equal(structured, true);
          const { contexts, description, uri: _uri, content: _content, ...facts } = exports[0];
          assert.deepEqual(contexts, [
            'base:allocation',
            'qemu:allocation-depth',
            'blockferry:heat',
            'blockferry:first-access',
            'qemu:dirty-bitmap:blockferry',
            'blockferry:dirty',
            'blockferry:changed',
          ]);
          assert.match(description, /^blockferry volume [0-9a-f-]{36} generation 1$/);
          assert.deepEqual(facts, {
            'export-name': 'disk',
            is_rotational: false,
            is_read_only: false,
            can_cache: true,
            can_df: true,
            can_fast_zero: true,
            can_flush: true,
            can_fua: true,
            can_multi_conn: true,
            can_trim: true,
            can_zero: true,
            block_size_minimum: 1,
            block_size_preferred: 4096,
            block_size_maximum: 64 * MIB,
            'export-size': SIZE,
            'export-size-str': facts['export-size-str'],
          });
          const unnamed = transport === 'unix' ? uri.replace('/disk?', '/?') : uri.replace(/disk$/, '');
          assert.equal((await tool('nbdinfo', '--size', unnamed)).trim(), String(SIZE), 'the default export');
        }
      }));
  });
}

describe('nbdinfo --map', needs('nbdinfo'), () => {
  test('a served image: its holes, and all of it local', () =>
    withDisk('serve', async (disk) => {
      const extents = await map(disk.unix);
      assert.deepEqual(typesIn(extents, HOLE.from, HOLE.to), [3]);
      assert.deepEqual(typesIn(extents, 0, HOLE.from), [0]);
      assert.deepEqual(
        (await map(disk.unix, 'qemu:allocation-depth')).map(({ type }) => type),
        [1],
      );
      const totals = await tool('nbdinfo', '--map', '--totals', disk.unix);
      assert.match(totals, new RegExp(`^\\s*${HOLE.to - HOLE.from} .* hole,zero`, 'm'));
    }));

  test('heat: what was read and written, and how often about', { ...needs('qemu-io') }, () =>
    withDisk('serve', async (disk) => {
      const region = 256 << 10;
      const commands = [`write ${MIB} 4k`, `read ${2 * MIB} 4k`, `read ${MIB} 4k`];
      await tool('qemu-io', '-f', 'raw', ...commands.flatMap((one) => ['-c', one]), disk.unix);
      const warm = (await map(disk.unix, 'blockferry:heat')).filter(({ offset }) => offset >= MIB);
      assert.deepEqual(
        warm.slice(0, 4).map(({ offset, length, type }) => [offset, length, type]),
        [
          [MIB, region, (1 << 16) | 1],
          [MIB + region, MIB - region, 0],
          [2 * MIB, region, 1],
          [2 * MIB + region, SIZE - 2 * MIB - region, 0],
        ],
      );
    }),
  );

  test('depth 1 is what is local, 2 what is still at the source', () =>
    withDisk('on demand', async (disk) => {
      assert.deepEqual(
        (await map(disk.unix, 'qemu:allocation-depth')).map(({ type }) => type),
        [2],
      );
      await disk.control.prefetch('disk', MIB, MIB);
      const uri = disk.uri('TCP');
      const extents = await map(uri, 'qemu:allocation-depth');
      const local = extents.filter(({ type }) => type === 1);
      assert.deepEqual(
        local.map(({ offset, length }) => [offset, length]),
        [[MIB, MIB]],
      );
      assert.deepEqual(
        extents.map(({ description }) => description),
        ['backing depth 2', 'local', 'backing depth 2'],
      );
      assert.equal((await disk.status()).presentBytes, MIB);
    }));

  test(
    'what is read becomes local, block by block, and the map asks nothing of the source',
    { ...needs('qemu-io') },
    () =>
      withDisk('on demand', async (disk) => {
        await tool('qemu-io', '-r', '-f', 'raw', '-c', `read ${3 * MIB + 100} 8000`, disk.unix);
        const before = await disk.status();
        const extents = await map(disk.unix, 'qemu:allocation-depth');
        const local = extents.filter(({ type }) => type === 1);
        assert.deepEqual(
          local.map(({ offset, length }) => [offset, length]),
          [[3 * MIB, 2 * BLOCK]],
        );
        await map(disk.unix);
        assert.equal((await disk.status()).traffic.fromSourceBytes, before.traffic.fromSourceBytes);
      }),
  );

  test('after the hand-off all is local, and the holes of the source are holes here', () =>
    withDisk('handed off', async (disk) => {
      assert.deepEqual(
        (await map(disk.unix, 'qemu:allocation-depth')).map(({ type }) => type),
        [1],
      );
      assert.deepEqual(typesIn(await map(disk.unix), HOLE.from, HOLE.to), [3]);
      assert.ok(statSync(disk.image).blocks * 512 <= SIZE - (HOLE.to - HOLE.from) + MIB);
    }));
});

test('a read-only disk says so', needs('nbdinfo'), () =>
  withDisk(
    'serve',
    async (disk) => {
      const { exports } = JSON.parse(await tool('nbdinfo', '--json', disk.unix));
      assert.equal(exports[0].is_read_only, true);
      await tool('nbdinfo', '--is', 'read-only', disk.unix);
      assert.notEqual((await attempt(['nbdinfo', '--can', 'write', disk.unix])).code, 0);
    },
    ['--read-only'],
  ),
);

test('nbd-client -l', needs('nbd-client'), () =>
  withDisk('relocating', async (disk) => {
    const port = new URL(disk.uri('TCP')).port;
    const { stdout, stderr } = await attempt(['nbd-client', '-l', '127.0.0.1', port]);
    assert.match(stdout, /^disk/m, stderr);
    const unix = await attempt(['nbd-client', '-l', '-u', disk.path('disk.sock')]);
    assert.match(unix.stdout, /^disk/m, unix.stderr);
  }),
);

test('qemu-nbd --list', needs('qemu-nbd'), () =>
  withDisk('relocating', async (disk) => {
    const listed = await tool('qemu-nbd', '--list', '-k', disk.path('disk.sock'));
    assert.match(listed, /exports available: 1/);
    assert.match(listed, /export: 'disk'/);
    assert.match(listed, new RegExp(`size: +${SIZE}`));
    assert.match(listed, /qemu:allocation-depth/);
  }),
);
