// No room at the destination: the daemon lives, the guest's writes are told, its reads go on, and so does all else once there is room.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { ControlClient } from '../../../src/host/control/client.js';
import { playBack } from '../../lab/crash/transactions.js';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { recordsOf } from '../../support/transaction-log.js';
import { assertSame, pattern } from '../clients/disks.js';
import { needs, needsLibnbd, PYTHON, tool } from '../tools.js';
import { assertRefusal, eventually, inFolder } from './refusals.js';

const MIB = 1 << 20;
const SIZE = 16 * MIB;
const ROOM = 6 * MIB;

function needsMounts(): { skip: string | false } {
  const absent = needsLibnbd();
  if (absent.skip !== false) return absent;
  return { skip: process.getuid?.() !== 0 && 'mounting a small tmpfs needs root' };
}

/** Calls `scenario` with a folder that has room for so many bytes. */
async function withLittleRoom(parent: string, scenario: (folder: string) => Promise<void>): Promise<void> {
  const folder = join(parent, 'small');
  mkdirSync(folder);
  const mounted = spawnSync('mount', [
    '-t',
    'tmpfs',
    '-o',
    `size=${ROOM},mode=700`,
    'blockferry-test',
    folder,
  ]);
  assert.equal(mounted.status, 0, String(mounted.stderr));
  try {
    await scenario(folder);
  } finally {
    spawnSync('umount', ['-l', folder]);
  }
}

const GUEST = `
import nbd, sys
h = nbd.NBD()
h.connect_uri(sys.argv[1])
size = h.get_size()
def errno_of(call, *args):
    try: call(*args)
    except nbd.Error as e: return e.errno
    return 'OK'
`;

function guest(uri: string, script: string): Promise<string> {
  return tool(PYTHON, '-c', `${GUEST}${script}\nh.shutdown()`, uri).then((text) => text.trim());
}

describe('no room at the destination', needsMounts(), () => {
  for (const stateToo of [false, true]) {
    test(`for the image${stateToo ? ' and for the state' : ''}`, () =>
      inFolder((folder) =>
        withLittleRoom(folder, async (small) => {
          const content = pattern(SIZE, 5);
          writeFileSync(join(folder, 'source.img'), content);
          const log = ['--log-level', 'error'];
          const at = (name: string): string[] => ['--listen', `unix:${join(folder, name)}`];
          const source = await DaemonProcess.start([
            ...[
              'serve',
              join(folder, 'source.img'),
              '--read-only',
              '--state-dir',
              join(folder, 's'),
              ...at('src'),
              ...log,
            ],
          ]);
          const state = join(stateToo ? small : folder, 'state');
          const image = join(small, 'disk.img');
          const daemon = await DaemonProcess.start([
            ...['proxy', source.uris[0], image, '--name', 'disk', '--state-dir', state, ...at('dst'), ...log],
          ]);
          try {
            const control = new ControlClient(join(state, 'control', 'disk.sock'));
            const shown = await eventually(async () => {
              const view = await control.volume('disk');
              return view.phase === 'relocating' && view.error !== null && view;
            }, 'the daemon to run out of room');
            assert.match(shown.error!, /no room .*free some space/);
            assert.notEqual(shown.background.state, 'running');
            const told = await runBlockferry(['status', '--state-dir', state]);
            assert.match(told.stdout, /^ {2}disk +relocating .*no room/m);

            const [uri] = daemon.uris;
            const read = `for at in range(0, size, 1 << 20): sys.stdout.write(bytes(h.pread(1 << 20, at)).hex())`;
            assertSame(Buffer.from(await guest(uri, read), 'hex'), content);
            const answers = await guest(
              uri,
              `print(errno_of(h.pwrite, b'n' * 65536, size - 131072), errno_of(h.pwrite, b'o' * 100, size - 100),
      errno_of(h.flush), errno_of(h.pwrite, b'y' * 4096, 8192), errno_of(h.flush), bytes(h.pread(4096, 8192)) == b'y' * 4096)`,
            );
            assert.equal(answers, 'ENOSPC ENOSPC OK OK OK True');
            content.fill('y', 8192, 8192 + 4096);
            assertSame(Buffer.from(await guest(uri, read), 'hex'), content);

            const grown = spawnSync('mount', ['-o', 'remount,size=64m', small]);
            assert.equal(grown.status, 0, String(grown.stderr));
            assert.equal(
              await guest(uri, `print(errno_of(h.pwrite, b'z' * 65536, size - 131072), errno_of(h.flush))`),
              'OK OK',
            );
            content.fill('z', SIZE - 131_072, SIZE - 65_536);
            assert.equal((await control.waitHandoff('disk', 20_000)).done, true, 'all goes on');
            control.close();
            assert.equal(await daemon.stop(), 0, daemon.stderr);
            assertSame(readFileSync(image), content);
          } finally {
            daemon.kill();
            assert.equal(await source.stop(), 0);
          }
        }),
      ));
  }

  test('for the maps of a new volume: refused, and no image is left', () =>
    inFolder((folder) =>
      withLittleRoom(folder, async (small) => {
        const big = join(folder, 'big.img');
        await tool('truncate', '-s', '400G', big); // whose map has 12.5 MiB
        const source = await DaemonProcess.start([
          ...[
            'serve',
            big,
            '--read-only',
            '--state-dir',
            join(folder, 's'),
            '--listen',
            `unix:${join(folder, 'src')}`,
          ],
        ]);
        try {
          const image = join(folder, 'disk.img');
          const words = ['proxy', source.uris[0], image, '--state-dir', join(small, 'state')];
          const { code, stderr, stdout } = await runBlockferry([
            ...words,
            '--listen',
            `unix:${join(folder, 'dst')}`,
          ]);
          assert.equal(code, 1, stderr);
          assert.match(stderr, /^blockferry: no room for the presence map .*: free some space\n$/);
          assert.equal(stdout, '');
          assert.equal(existsSync(image), false);
        } finally {
          assert.equal(await source.stop(), 0);
        }
      }),
    ));
});

describe('no room for the transaction log', needsMounts(), () => {
  test('the log ends at a whole record and says so, the disk is served on', { ...needs('nbd-trplay') }, () =>
    inFolder((folder) =>
      withLittleRoom(folder, async (small) => {
        const content = pattern(SIZE, 5);
        const [image, start, log] = [
          join(folder, 'disk.img'),
          join(folder, 'start.img'),
          join(small, 'disk.log'),
        ];
        for (const path of [image, start]) writeFileSync(path, content);
        const state = join(folder, 'state');
        const words = [
          ...[
            'serve',
            image,
            '--name',
            'disk',
            '--state-dir',
            state,
            '--listen',
            `unix:${join(folder, 's')}`,
          ],
          ...['--transaction-log', log, '--transaction-log-data'],
        ];
        const daemon = await DaemonProcess.start(words);
        try {
          const answers = await guest(
            daemon.uris[0],
            `print(*[errno_of(h.pwrite, bytes([65 + i]) * (1 << 20), i << 20) for i in range(16)], errno_of(h.flush))`,
          );
          assert.equal(answers, Array(17).fill('OK').join(' '));
          for (let mib = 0; mib < 16; mib++) content.fill(65 + mib, mib * MIB, (mib + 1) * MIB);
          assertSame(readFileSync(image), content);
          const told = await runBlockferry(['status', '--state-dir', state]);
          assert.match(told.stdout, /^ {2}disk +plain .*transaction log .* has ended, .*ENOSPC/m);
          assert.equal(daemon.stderr.match(/transaction log .* has ended/g)?.length, 1, daemon.stderr);
          assert.equal(await daemon.stop(), 0, daemon.stderr);
          const records = recordsOf(readFileSync(log));
          assert.equal(records.at(-1)!.end, statSync(log).size);
          await playBack(log, start);
          const written = records.filter(({ payload }) => payload !== null).length;
          assert.ok(written >= 3 && written <= 5, `${written} writes`);
          const played = readFileSync(start);
          assertSame(played.subarray(0, written * MIB), content.subarray(0, written * MIB));

          // There is no room even to begin: that fails the start.
          writeFileSync(join(small, 'rest'), Buffer.alloc(ROOM - statSync(log).size - 4096 * 4));
          spawnSync('sh', ['-c', 'cat /dev/zero > "$1"', 'sh', join(small, 'more')]);
          const failed = await runBlockferry(words.with(words.indexOf(log), join(small, 'new.log')));
          assertRefusal(failed, 1, /cannot write the transaction log .*ENOSPC/, 'a full disk');
        } finally {
          daemon.kill();
        }
      }),
    ),
  );
});
