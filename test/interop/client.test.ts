/** The client against nbdkit, qemu-nbd and nbd-server. */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { open, readFile, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { join } from 'node:path';
import { after, before, describe, it } from 'node:test';
import { BlockferryError } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { Allocation, BASE_ALLOCATION, TransmissionFlag } from '../../src/nbd/constants.js';
import { lacking } from '../lab/programs.js';
import { type PeerServer, startNbdServer, startPeer } from './servers.js';

const MIB = 1 << 20;
const IMAGE_BYTES = 32 * MIB;
const BLOCK = 4096;

interface Kind {
  readonly program: string;
  readonly exportName: string;
  readonly structured: boolean;
  readonly status: boolean;
  start(image: (directory: string) => Promise<string>): Promise<PeerServer>;
}

const KINDS: Kind[] = [
  {
    program: 'nbdkit',
    exportName: '',
    structured: true,
    status: true,
    start: (image) =>
      startPeer(async (directory, socket) => ['nbdkit', '-f', '-U', socket, 'file', await image(directory)]),
  },
  {
    program: 'qemu-nbd',
    exportName: 'disk one',
    structured: true,
    status: true,
    start: (image) =>
      startPeer(async (directory, socket) => [
        ...[
          'qemu-nbd',
          '-f',
          'raw',
          '-k',
          socket,
          '-x',
          'disk one',
          '-D',
          'a disk',
          '-t',
          '-e',
          '8',
          '--discard=unmap',
        ],
        await image(directory),
      ]),
  },
  {
    program: 'nbd-server',
    exportName: 'disk',
    structured: false,
    status: false,
    start: (image) => startNbdServer(image, ['disk', 'other']),
  },
];

/** Data in the first and the last quarter, a hole between them. */
function initialContent(): Buffer {
  const content = Buffer.alloc(IMAGE_BYTES);
  randomBytes(IMAGE_BYTES / 4).copy(content);
  randomBytes(IMAGE_BYTES / 4).copy(content, (3 * IMAGE_BYTES) / 4);
  return content;
}

for (const kind of KINDS) {
  describe(`client and ${kind.program}`, { skip: lacking('setpriv', kind.program) }, () => {
    const content = initialContent();
    let server: PeerServer;
    let uri: string;
    let image: string;

    before(async () => {
      server = await kind.start(async (directory) => {
        image = join(directory, 'disk.img');
        await writeFile(image, content.subarray(0, IMAGE_BYTES / 4));
        const file = await open(image, 'r+');
        await file.write(content, (3 * IMAGE_BYTES) / 4, IMAGE_BYTES / 4, (3 * IMAGE_BYTES) / 4);
        await file.close();
        return image;
      });
      uri = server.uriOf(kind.exportName);
    });
    after(() => server?.stop());

    async function withClient(scenario: (client: NbdClient) => Promise<void>): Promise<void> {
      const client = await NbdClient.connect(uri, { contexts: [BASE_ALLOCATION] });
      try {
        await scenario(client);
        await client.close();
        assert.equal(await client.closed, null);
      } finally {
        client.destroy();
      }
    }

    it('learns what the export is', () =>
      withClient(async ({ info }) => {
        assert.equal(info.size, IMAGE_BYTES);
        assert.equal(info.exportName, kind.exportName);
        assert.equal(info.readOnly, false);
        assert.equal(info.structured, kind.structured);
        assert.equal(info.contexts.has(BASE_ALLOCATION), kind.status);
        if (kind.program === 'qemu-nbd') {
          assert.equal(info.description, 'a disk');
          assert.equal(info.blockSize?.maximum, 32 * MIB);
        }
      }));

    it('lists exports', async () => {
      const names = (await NbdClient.list(server.uri)).map((entry) => entry.name);
      assert.ok(names.includes(kind.exportName), JSON.stringify(names));
    });

    it('says so when there is no such export', {
      skip: kind.program === 'nbdkit' && 'it has every export',
    }, async () => {
      await assert.rejects(
        NbdClient.connect(server.uriOf('no such thing')),
        (error) => error instanceof BlockferryError && error.code === 'not-found',
      );
    });

    it('reads the whole image, in requests of all sizes', () =>
      withClient(async (client) => {
        const read = Buffer.alloc(IMAGE_BYTES, 0xff);
        const lengths = [512, 4096, 65536, 3 * 4096, MIB, 4 * MIB];
        const reads: Promise<void>[] = [];
        for (let at = 0, i = 0; at < IMAGE_BYTES; i++) {
          const length = Math.min(lengths[i % lengths.length] as number, IMAGE_BYTES - at);
          reads.push(client.read(at, length, read, at));
          at += length;
        }
        assert.equal(client.inFlight, reads.length);
        await Promise.all(reads);
        assert.equal(client.inFlight, 0);
        assert.ok(read.equals(content));
      }));

    it('reads at random, 64 requests in flight', () =>
      withClient(async (client) => {
        const worker = async (seed: number) => {
          const buffer = Buffer.alloc(BLOCK);
          let state = seed;
          for (let i = 0; i < 200; i++) {
            state = (Math.imul(state, 1103515245) + 12345) >>> 0;
            const offset = (state % (IMAGE_BYTES / BLOCK)) * BLOCK;
            await client.read(offset, BLOCK, buffer);
            assert.ok(buffer.equals(content.subarray(offset, offset + BLOCK)), `block at ${offset}`);
          }
        };
        await Promise.all(Array.from({ length: 64 }, (_, i) => worker(i + 1)));
      }));

    it('reads 32 MiB in one request', () =>
      withClient(async (client) => {
        const read = Buffer.alloc(IMAGE_BYTES, 0xff);
        await client.read(0, IMAGE_BYTES, read);
        assert.ok(read.equals(content));
      }));

    it('tells data from holes', { skip: !kind.status && 'it has no block status' }, () =>
      withClient(async (client) => {
        let at = 0;
        let holes = 0;
        while (at < IMAGE_BYTES) {
          for (const { length, flags } of await client.blockStatus(BASE_ALLOCATION, at, IMAGE_BYTES - at)) {
            if ((flags & Allocation.ZERO) !== 0) {
              assert.ok(content.subarray(at, at + length).every((byte) => byte === 0));
              holes += length;
            }
            at += length;
          }
        }
        assert.equal(at, IMAGE_BYTES);
        assert.equal(holes, IMAGE_BYTES / 2);
        const one = await client.blockStatus(BASE_ALLOCATION, 0, MIB, { one: true });
        assert.deepEqual(one, [{ length: MIB, flags: 0 }]);
      }),
    );

    it('writes, zeroes, trims and flushes', () =>
      withClient(async (client) => {
        const pieces = [512, 4096, 100 * 4096, 3 * MIB, 65536];
        const data = randomBytes(8 * MIB);
        const writes: Promise<void>[] = [];
        let at = MIB;
        for (let i = 0; i < 40; i++) {
          const length = pieces[i % pieces.length] as number;
          const from = (i * 7 * 512) % (data.length - length);
          if (at + length > IMAGE_BYTES) break;
          const fua = i % 3 === 0 && (client.info.flags & TransmissionFlag.SEND_FUA) !== 0;
          writes.push(client.write(at, data, from, length, { fua }));
          data.copy(content, at, from, from + length);
          at += length;
        }
        await Promise.all(writes);
        if ((client.info.flags & TransmissionFlag.SEND_WRITE_ZEROES) !== 0) {
          await client.zero(2 * MIB, 65536 + 512);
          await client.zero(3 * MIB, 65536, { noHole: true });
          content.fill(0, 2 * MIB, 2 * MIB + 65536 + 512);
          content.fill(0, 3 * MIB, 3 * MIB + 65536);
        }
        await client.flush();
        assert.ok((await readFile(image)).equals(content));
        if ((client.info.flags & TransmissionFlag.SEND_TRIM) !== 0) await client.trim(4 * MIB, MIB);
        if ((client.info.flags & TransmissionFlag.SEND_CACHE) !== 0) await client.cache(0, MIB);
        const read = Buffer.alloc(IMAGE_BYTES);
        await client.read(0, IMAGE_BYTES, read);
        // What was trimmed may read as anything.
        for (const bytes of [read, content]) bytes.fill(0, 4 * MIB, 5 * MIB);
        assert.ok(read.equals(content));
        await client.write(4 * MIB, content, 4 * MIB, MIB);
        await client.flush();
      }));

    it('mixes reads and writes of one connection', () =>
      withClient(async (client) => {
        const worker = async (index: number) => {
          const [out, back] = [Buffer.alloc(BLOCK, index + 1), Buffer.alloc(BLOCK)];
          for (let i = 0; i < 50; i++) {
            const offset = 8 * MIB + (index * 50 + i) * BLOCK;
            out.writeUInt32BE(i);
            await client.write(offset, out, 0, BLOCK);
            await client.read(offset, BLOCK, back);
            assert.ok(back.equals(out));
          }
        };
        await Promise.all(Array.from({ length: 32 }, (_, i) => worker(i)));
      }));

    it('notices that the server was killed', async () => {
      const client = await NbdClient.connect(uri);
      const reads = Promise.allSettled(
        Array.from({ length: 64 }, () => client.read(0, MIB, Buffer.allocUnsafe(MIB))),
      );
      await server.stop();
      const reason = await client.closed;
      assert.ok(reason instanceof BlockferryError && reason.code === 'closed');
      for (const result of await reads) {
        if (result.status === 'rejected') assert.equal((result.reason as BlockferryError).code, 'closed');
      }
      assert.equal(client.inFlight, 0);
      await assert.rejects(
        NbdClient.connect(uri),
        (error) => error instanceof BlockferryError && error.code === 'source-unreachable',
      );
    });
  });
}

describe('client and nbdkit with odd plugins', { skip: lacking('setpriv', 'nbdkit') }, () => {
  async function against(words: string[], scenario: (client: NbdClient) => Promise<void>): Promise<void> {
    const server = await startPeer((_, socket) => ['nbdkit', '-f', '-U', socket, ...words]);
    try {
      const client = await NbdClient.connect(server.uri, { contexts: [BASE_ALLOCATION] });
      await scenario(client);
      await client.close();
    } finally {
      await server.stop();
    }
  }

  it('errors of the server come with their errno, the connection goes on', () =>
    against(
      ['--filter=error', 'memory', '1M', 'error-pread=EIO', 'error-pread-rate=100%'],
      async (client) => {
        const failed = client.read(0, 4096, Buffer.alloc(4096));
        await assert.rejects(
          failed,
          (error) => error instanceof BlockferryError && /EIO \(5\)/.test(error.message),
        );
        await client.flush();
      },
    ));

  it('a delaying server is no slower for many requests than for one', () =>
    against(['--filter=delay', 'memory', '1M', 'rdelay=200ms'], async (client) => {
      const start = performance.now();
      const buffer = Buffer.alloc(64 << 10);
      await Promise.all(Array.from({ length: 16 }, (_, i) => client.read(i * 4096, 4096, buffer, i * 4096)));
      assert.ok(performance.now() - start < 16 * 200);
    }));

  it('a read-only export', () =>
    against(['-r', 'pattern', '1M'], async (client) => {
      assert.equal(client.info.readOnly, true);
      const buffer = Buffer.alloc(4096);
      await client.read(8192, 4096, buffer);
      assert.equal(buffer.readBigUInt64BE(8), 8200n);
      await assert.rejects(
        client.write(0, buffer, 0, 4096),
        (error) => error instanceof BlockferryError && error.code === 'read-only',
      );
    }));

  it('a server without structured replies, or without any option', async () => {
    await against(['--no-sr', 'pattern', '1M'], async (client) => {
      assert.equal(client.info.structured, false);
      const buffer = Buffer.alloc(4096);
      await client.read(4096, 4096, buffer);
      assert.equal(buffer.readBigUInt64BE(0), 4096n);
    });
    await against(['--mask-handshake=0', 'pattern', '1M'], async (client) => {
      assert.equal(client.info.size, MIB);
      assert.equal(client.info.structured, false);
      const buffer = Buffer.alloc(8);
      await client.read(800, 8, buffer);
      assert.equal(buffer.readBigUInt64BE(0), 800n);
    });
  });

  it('minimum block sizes are honoured', () =>
    against(
      [
        '--filter=blocksize-policy',
        'memory',
        '1M',
        'blocksize-minimum=4096',
        'blocksize-preferred=64K',
        'blocksize-maximum=128K',
      ],
      async (client) => {
        assert.deepEqual(client.info.blockSize, { minimum: 4096, preferred: 65536, maximum: 131072 });
        const buffer = Buffer.alloc(MIB);
        await client.read(4096, 131072, buffer);
        for (const length of [512, 135168]) {
          await assert.rejects(
            client.read(0, length, buffer),
            (error) => error instanceof BlockferryError && error.code === 'bounds',
          );
        }
      },
    ));

  it('TCP', async () => {
    // nbdkit cannot be told to pick a free port: one listens here, and each client gets an nbdkit on stdio.
    const listener = net.createServer((socket) => {
      const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', 'nbdkit', '-s', 'pattern', '1M'], {
        stdio: ['pipe', 'pipe', 'ignore'],
      });
      socket.pipe(child.stdin);
      child.stdout.pipe(socket);
      child.stdin.on('error', () => {});
      socket.on('error', () => {});
      socket.once('close', () => child.kill('SIGKILL'));
    });
    await new Promise<void>((resolve) => listener.listen(0, '127.0.0.1', resolve));
    try {
      const { port } = listener.address() as { port: number };
      const client = await NbdClient.connect(`nbd://127.0.0.1:${port}/x`);
      const buffer = Buffer.alloc(MIB);
      await client.read(0, MIB, buffer);
      assert.equal(buffer.readBigUInt64BE(MIB - 8), BigInt(MIB - 8));
      await client.close();
      assert.equal(await client.closed, null);
    } finally {
      await new Promise((resolve) => listener.close(resolve));
    }
  });
});
