// --transaction-log, read by nbd-trdump and nbd-trplay: what clients did is in it, and played back it gives the disk bit for bit.
import assert from 'node:assert/strict';
import { copyFileSync, existsSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { stringify } from 'yaml';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { Random, SEED } from '../../lab/crash/random.js';
import { RecordedGuest } from '../../lab/crash/recorded.js';
import { dump, playBack } from '../../lab/crash/transactions.js';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { inFolder, refused } from '../bad-input/refusals.js';
import { needs, PYTHON, tool } from '../tools.js';
import { assertSame, type Disk, pattern, SIZE, withDisk } from './disks.js';

const MIB = 1 << 20;
const TOOLS = ['nbd-trdump', 'nbd-trplay'];

/** A served disk with a log; when `work` is done and the daemon stopped, `check` is given the paths. */
async function recorded(
  options: { data: boolean; content: Buffer },
  work: (uri: string) => Promise<void>,
  check: (log: string, image: string, start: string) => Promise<void>,
): Promise<void> {
  await inFolder(async (folder) => {
    const [image, start, log] = ['disk.img', 'start.img', 'disk.log'].map((name) => join(folder, name));
    writeFileSync(image, options.content);
    copyFileSync(image, start);
    const daemon = await DaemonProcess.start([
      ...['serve', image, '--state-dir', join(folder, 'state'), '--listen', `unix:${join(folder, 's')}`],
      ...['--transaction-log', log, ...(options.data ? ['--transaction-log-data'] : [])],
    ]);
    try {
      await work(daemon.uris[0]);
      assert.equal(await daemon.stop(), 0, daemon.stderr);
      await check(log, image, start);
    } finally {
      daemon.kill();
    }
  });
}

/** "> WRITE FUA 0 1000", "< 0" of what nbd-trdump shows, the numbers hexadecimal. */
async function shown(log: string): Promise<string[]> {
  const lines = await dump(log);
  return lines.map((line) =>
    line
      .replace(/^> H=\w+ C=\w+ \( *NBD_CMD_(\w+)\+ *(\w+)\) O=0*(\w+) L=0*(\w+)$/, '> $1 $2 $3 $4')
      .replace(/^< H=\w+ E=0x0*(\w+)$/, '< $1'),
  );
}

const SWITCHED = /^TRACE_OPTION /;

describe('nbd-trdump', needs(...TOOLS, 'qemu-io'), () => {
  const script = [
    ...['-c', 'write -P 7 1M 64k', '-c', 'read -P 7 1M 64k', '-c', 'discard 1M 4k'],
    ...['-c', 'write -z -u 1088k 8k', '-c', 'write -f -P 9 0 512', '-c', 'flush'],
  ];

  for (const data of [true, false]) {
    test(`shows what qemu-io did${data ? ', also in a log with data' : ''}`, () =>
      recorded(
        { data, content: Buffer.alloc(4 * MIB) },
        async (uri) => {
          await tool('qemu-io', '-f', 'raw', ...script, uri);
        },
        async (log) => {
          const [first, second, ...lines] = await shown(log);
          assert.match(first, SWITCHED);
          assert.equal(second, `TRACE_OPTION DATALOG set to ${data ? 1 : 0}.`);
          const at = lines.findIndex((line) => line.startsWith('> WRITE'));
          const work = lines.slice(at).filter((line) => !line.startsWith('> BLOCK_STATUS'));
          assert.match(work[0], /^> WRITE (FUA|NONE) 100000 10000$/);
          assert.deepEqual(work.slice(1, 6), [
            '< 0',
            '> READ NONE 100000 10000',
            '< 0',
            '> TRIM NONE 100000 1000',
            '< 0',
          ]);
          assert.match(work[6], /^> WRITE_ZEROES (FUA|NONE) 110000 2000$/);
          assert.deepEqual(work.slice(7, 9), ['< 0', '> WRITE FUA 0 200']);
          assert.ok(work.includes('> FLUSH NONE 0 0'));
          assert.equal(work.at(-1), '> DISC NONE 0 0');
          assert.equal(statSync(log).size > 64 << 10, data, 'what was written is there only when asked for');
        },
      ));
  }

  test('shows what was refused', () =>
    recorded(
      { data: false, content: Buffer.alloc(MIB) },
      async (uri) => {
        const probe = `
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
for call in (lambda: h.pread(512, ${MIB}), lambda: h.pwrite(b'x' * 512, ${MIB} - 100), lambda: h.trim(512, ${2 * MIB})):
    try: call()
    except nbd.Error: pass
h.shutdown()`;
        await tool(PYTHON, '-c', probe, uri);
      },
      async (log) => {
        assert.deepEqual((await shown(log)).slice(2), [
          ...['> READ NONE 100000 200', '< 16', '> WRITE NONE fff9c 200', '< 1c'],
          ...['> TRIM NONE 200000 200', '< 16', '> DISC NONE 0 0'],
        ]);
      },
    ));
});

describe('nbd-trplay makes the same disk', needs(...TOOLS), () => {
  const random = new Random(SEED);

  test('of changes that overlap on three connections', () =>
    recorded(
      { data: true, content: pattern(MIB, 3) },
      async (uri) => {
        const guest = await RecordedGuest.attach(uri, MIB, random.fork());
        guest.onAnswer = () => {
          if (guest.changes.length >= 3000) guest.stop();
        };
        await guest.work();
        await guest.disconnect();
      },
      async (log, image, start) => {
        await playBack(log, start);
        assertSame(readFileSync(start), readFileSync(image));
      },
    ));

  test('of requests at any byte, with a block size of one', () =>
    recorded(
      { data: true, content: pattern(64 << 10, 3) },
      async (uri) => {
        const client = await NbdClient.connect(uri);
        const size = 64 << 10;
        await Promise.all(
          Array.from({ length: 300 }, async (_, index) => {
            const offset = random.below(size - 1);
            const length = random.between(1, Math.min(size - offset, 12_000));
            if (index % 3 === 0) await client.trim(offset, length);
            else if (index % 3 === 1) await client.zero(offset, length);
            else await client.write(offset, pattern(length, index), 0, length);
          }),
        );
        await client.close();
      },
      async (log, image, start) => {
        await playBack(log, start, '-b', '1');
        assertSame(readFileSync(start), readFileSync(image));
      },
    ));

  for (const state of ['serve', 'relocating', 'handed off'] as const) {
    test(`of fio's load on four connections and of nbdcopy, a disk: ${state}`, needs('fio', 'nbdcopy'), () =>
      inFolder(async (folder) => {
        const log = join(folder, 'disk.log');
        const start = join(folder, 'start.img');
        const image = join(folder, 'image.img');
        const work = async (disk: Disk): Promise<void> => {
          writeFileSync(start, disk.content);
          const shape = ['--rw=randrw', '--bsrange=512-200k', '--iodepth=16', '--size=16m', '--io_size=6m'];
          await tool(
            ...[
              'fio',
              '--name=load',
              '--ioengine=nbd',
              `--uri=${disk.unix}`,
              '--numjobs=4',
              '--group_reporting',
            ],
            ...shape,
          );
          const from = join(folder, 'new.img');
          const content = pattern(4 * MIB, 99);
          content.fill(0, MIB, 3 * MIB);
          writeFileSync(from, content);
          // Only the beginning: nbdcopy wants a target that is large enough, no more.
          await tool('nbdcopy', '--flush', '--connections=4', from, disk.uri('TCP'));
          if (state !== 'serve') await disk.handedOff();
          copyFileSync(disk.image, image);
        };
        await withDisk(state, work, ['--transaction-log', log, '--transaction-log-data']);
        assert.equal(statSync(start).size, SIZE);
        await playBack(log, start);
        assertSame(readFileSync(start), readFileSync(image));
      }),
    );
  }

  test('of several runs that went on with one log', () =>
    inFolder(async (folder) => {
      const [image, start, log] = ['disk.img', 'start.img', 'disk.log'].map((name) => join(folder, name));
      writeFileSync(image, pattern(MIB, 3));
      copyFileSync(image, start);
      for (let run = 0; run < 3; run++) {
        const daemon = await DaemonProcess.start([
          ...['serve', image, '--state-dir', join(folder, 'state'), '--listen', `unix:${join(folder, 's')}`],
          ...['--transaction-log', log, '--transaction-log-data'],
        ]);
        const client = await NbdClient.connect(daemon.uris[0]);
        await client.write(run * 4096, pattern(8192, 50 + run), 0, 8192);
        await client.close();
        assert.equal(await daemon.stop(), 0, daemon.stderr);
      }
      await playBack(log, start);
      assertSame(readFileSync(start), readFileSync(image));
    }));

  test('of a volume of a host', () =>
    inFolder(async (folder) => {
      const [image, start] = ['disk.img', 'start.img'].map((name) => join(folder, name));
      writeFileSync(image, pattern(MIB, 3));
      copyFileSync(image, start);
      const other = join(folder, 'other.img');
      writeFileSync(other, pattern(MIB, 4));
      const config = {
        ...{ name: 'lab', stateDir: 'state', run: 'run' },
        volumes: [
          { name: 'disk', image: 'disk.img', transactionLog: { file: 'disk.log', data: true } },
          { name: 'other', image: 'other.img' },
        ],
      };
      writeFileSync(join(folder, 'host.yaml'), stringify(config));
      const daemon = await DaemonProcess.start(['host', '--config', join(folder, 'host.yaml')]);
      for (const uri of daemon.uris.slice(0, 2)) {
        const client = await NbdClient.connect(uri);
        await client.write(512, pattern(8192, 50), 0, 8192);
        await client.close();
      }
      assert.equal(await daemon.stop(), 0, daemon.stderr);
      await playBack(join(folder, 'disk.log'), start);
      assertSame(readFileSync(start), readFileSync(image));
      assert.equal(
        (await dump(join(folder, 'disk.log'))).filter((line) => / NBD_CMD_WRITE\+/.test(line)).length,
        1,
      );
    }));
});

describe('a log that cannot be had', () => {
  const at = (folder: string): string[] => [
    ...['--state-dir', join(folder, 'state'), '--listen', `unix:${join(folder, 's')}`],
  ];

  test('is refused at the start, and nothing is changed', () =>
    inFolder(async (folder) => {
      const image = join(folder, 'disk.img');
      writeFileSync(image, pattern(MIB, 3));
      const letter = join(folder, 'letter');
      writeFileSync(letter, 'dear reader');
      const serve = ['serve', image, ...at(folder)];
      await refused(
        [...serve, '--transaction-log', letter],
        1,
        /holds something else than a transaction log/,
      );
      assert.equal(readFileSync(letter, 'utf8'), 'dear reader');
      await refused([...serve, '--transaction-log', image], 1, /disk\.img holds something else/);
      assertSame(readFileSync(image), pattern(MIB, 3));
      await refused([...serve, '--transaction-log', folder], 1, /cannot open the transaction log/);
      await refused([...serve, '--transaction-log-data'], 2, /--transaction-log FILE/);
      assert.deepEqual(readdirSync(folder).sort(), ['disk.img', 'letter', 'state']);
      assert.equal(existsSync(join(folder, 'state', 'disk')), false);
    }));

  test('by a second daemon, while the first has it', () =>
    inFolder(async (folder) => {
      const log = ['--transaction-log', join(folder, 'log')];
      const [one, two] = ['one.img', 'two.img'].map((name) => join(folder, name));
      for (const image of [one, two]) writeFileSync(image, pattern(MIB, 3));
      const daemon = await DaemonProcess.start(['serve', one, ...at(folder), ...log]);
      const words = [
        'serve',
        two,
        '--state-dir',
        join(folder, 'state'),
        '--listen',
        `unix:${join(folder, 't')}`,
      ];
      await refused([...words, ...log], 1, /is in use/);
      assert.equal(await daemon.stop(), 0);
    }));

  test('shows in --help', async () => {
    for (const command of ['serve', 'proxy']) {
      const { stdout } = await runBlockferry([command, '--help']);
      assert.match(stdout, /--transaction-log <file>/);
      assert.match(stdout, /--transaction-log-data/);
    }
  });
});
