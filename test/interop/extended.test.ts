// Extended headers between real programs: a sparse disk of 8 TiB, and single requests about more than 32 bits of it.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { NbdClient } from '../../src/nbd/client/client.js';
import { Allocation, BASE_ALLOCATION, TransmissionFlag } from '../../src/nbd/constants.js';
import { DaemonProcess } from '../lab/hosts.js';
import { startPeer } from './servers.js';
import { needs, tool } from './tools.js';

const TIB = 2 ** 40;
const SIZE = 8 * TIB;
const MIB = 1 << 20;
const HOLE = Allocation.HOLE | Allocation.ZERO;

let folder: string;
let daemon: DaemonProcess;
let uri: string;

function hugeImage(path: string): string {
  writeFileSync(path, '');
  truncateSync(path, SIZE);
  return path;
}

const image = (): string => join(folder, 'huge.img');

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-extended-'));
  const words = ['serve', hugeImage(image()), '--name', 'huge', '--state-dir', join(folder, 'state')];
  daemon = await DaemonProcess.start([...words, '--listen', `unix:${join(folder, 'sock')}`]);
  uri = daemon.uris[0]!;
});

after(async () => {
  assert.equal(await daemon.stop(), 0);
  rmSync(folder, { recursive: true });
});

/** What qemu-io says when it traces its requests and the chunks it gets. */
function traced(...commands: string[]): Promise<string> {
  const traces = ['nbd_send_request', 'nbd_receive_reply_chunk_header', 'nbd_send_option_request'];
  const words = [
    ...traces.flatMap((name) => ['--trace', name]),
    ...commands.flatMap((command) => ['-c', command]),
  ];
  return tool('sh', '-c', 'exec qemu-io -f raw "$@" 2>&1', 'qemu-io', ...words, uri);
}

/** Requests in such a trace: their names, and lengths in bytes. */
function requestsIn(said: string): [name: string, length: number][] {
  const found = said.matchAll(/Sending request to server: .*\.len = (\d+),.*\((.*)\)/g);
  return [...found].map(([, length, name]) => [name!, Number(length)]);
}

/** `skip` with a reason where one of QEMU's programs is absent, or from before 8.2, which brought extended headers. */
function needsQemu(...programs: string[]): { skip: string | false } {
  const { skip } = needs(...programs);
  if (skip !== false) return { skip };
  const said = spawnSync(programs[0]!, ['--version'], { encoding: 'utf8' }).stdout;
  const [, major, minor] = /(\d+)\.(\d+)/.exec(said) ?? [];
  const old = Number(major) * 100 + Number(minor) < 802;
  return { skip: old && `${programs[0]} has no extended headers before 8.2` };
}

describe('qemu as a client', needsQemu('qemu-io', 'qemu-img'), () => {
  test('zeroes 7 TiB in one request, quickly, and reads a hole', async () => {
    const said = await traced('write -P 1 5T 1M', 'write -z -u -n 0 7T', 'read -P 0 5T 1M');
    assert.match(said, /option request 11 \(extended headers\)/);
    assert.deepEqual(requestsIn(said).slice(0, 3), [
      ['write', MIB],
      ['write zeroes', 7 * TIB],
      ['read', MIB],
    ]);
    assert.match(said, /chunk header: .*\(hole\)/);
    assert.match(said, /wrote 7696581394432\/7696581394432 bytes/);
    assert.doesNotMatch(said, /fail|error/i);
  });

  test('asks for the status of 8 TiB in one request', async () => {
    await traced('write -P 3 6T 1M');
    const said = await traced('map');
    assert.ok(requestsIn(said).some(([name, length]) => name === 'block status' && length === SIZE));
    assert.match(said, /chunk header: .*block status \(64-bit\)/);
    const mapped = JSON.parse(await tool('qemu-img', 'map', '--output=json', '-f', 'raw', uri)) as {
      start: number;
      length: number;
      data: boolean;
    }[];
    assert.deepEqual(
      mapped.map(({ start, length, data }) => [start, length, data]),
      [
        [0, 6 * TIB, false],
        [6 * TIB, MIB, true],
        [6 * TIB + MIB, SIZE - 6 * TIB - MIB, false],
      ],
    );
    await traced('write -z -u 6T 1M');
  });

  test('writes, FUA, discards and 32 MiB at once', async () => {
    const said = await traced(
      'write -P 7 3T 32M',
      'write -f -P 8 3T 512',
      'read -P 8 3T 512',
      `read -P 7 ${3 * TIB + 512} ${32 * MIB - 512}`,
      'discard 3T 1G',
      'read -P 0 3T 32M',
    );
    assert.doesNotMatch(said, /fail|error/i);
    assert.equal(statSync(image()).blocks, 0, 'nothing is left of it');
  });
});

interface Offered {
  readonly fastZero: boolean;
  readonly cacheMax: number;
}

async function huge(client: NbdClient, offered: Offered): Promise<void> {
  const { info } = client;
  assert.ok(info.extended && info.structured);
  assert.equal(info.size, SIZE);
  const status = () => client.blockStatus(BASE_ALLOCATION, 0, SIZE);
  assert.deepEqual(await status(), [{ length: SIZE, flags: HOLE }]);
  const data = Buffer.alloc(MIB, 0x77);
  await client.write(6 * TIB, data, 0, MIB);
  assert.deepEqual(await status(), [
    { length: 6 * TIB, flags: HOLE },
    { length: MIB, flags: 0 },
    { length: SIZE - 6 * TIB - MIB, flags: HOLE },
  ]);
  assert.deepEqual(await client.blockStatus(BASE_ALLOCATION, MIB, 5 * TIB, { one: true }), [
    { length: 5 * TIB, flags: HOLE },
  ]);
  const read = Buffer.alloc(2 * MIB, 1);
  await client.read(6 * TIB - MIB, 2 * MIB, read);
  assert.ok(read.equals(Buffer.concat([Buffer.alloc(MIB), data])));
  await client.cache(0, offered.cacheMax);
  assert.equal((info.flags & TransmissionFlag.SEND_FAST_ZERO) !== 0, offered.fastZero);
  await client.zero(0, SIZE, { fast: true });
  assert.deepEqual(await status(), [{ length: SIZE, flags: HOLE }]);
  await client.write(7 * TIB, data, 0, MIB, { fua: true });
  await client.trim(0, SIZE);
  await client.flush();
  assert.deepEqual(await status(), [{ length: SIZE, flags: HOLE }]);
}

async function withClient(
  to: string,
  contexts: string[],
  scenario: (client: NbdClient) => Promise<void>,
): Promise<void> {
  const client = await NbdClient.connect(to, { contexts });
  try {
    await scenario(client);
    await client.close();
    assert.equal(await client.closed, null);
  } finally {
    client.destroy();
  }
}

describe('our client', () => {
  for (const contexts of [[BASE_ALLOCATION], [BASE_ALLOCATION, 'qemu:allocation-depth']])
    test(`and our server, ${contexts.length} contexts`, () =>
      withClient(uri, contexts, async (client) => {
        const filters = (client.info.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) !== 0;
        assert.ok(filters, 'it is offered where contexts are selected');
        await huge(client, { fastZero: true, cacheMax: SIZE });
      }));

  test('and our server without them: the same, up to 4 GiB', async () => {
    const client = await NbdClient.connect(uri, { contexts: [BASE_ALLOCATION], extendedHeaders: false });
    try {
      assert.ok(!client.info.extended && client.info.structured);
      const length = 2 ** 32 - 4096;
      await client.zero(4096, length);
      assert.deepEqual(await client.blockStatus(BASE_ALLOCATION, 4096, length), [{ length, flags: HOLE }]);
      await assert.rejects(client.zero(0, 2 ** 32), /split it/);
      await client.close();
    } finally {
      client.destroy();
    }
  });

  test('and qemu-nbd', needsQemu('qemu-nbd'), async () => {
    const server = await startPeer((directory, socket) => {
      const words = ['qemu-nbd', '-f', 'raw', '-k', socket, '-t', '-A', '--discard=unmap'];
      return [...words, hugeImage(join(directory, 'huge.img'))];
    });
    try {
      const contexts = [BASE_ALLOCATION, 'qemu:allocation-depth'];
      await withClient(server.uri, contexts, async (client) => {
        assert.equal(client.info.contexts.size, 2);
        await huge(client, { fastZero: true, cacheMax: 32 * MIB });
        assert.deepEqual(await client.blockStatus('qemu:allocation-depth', 0, SIZE), [
          { length: SIZE, flags: 1 },
        ]);
      });
    } finally {
      await server.stop();
    }
  });
});
