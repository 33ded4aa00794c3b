// Clients that reconnect by themselves, and a daemon that dies under them: what was acknowledged is there afterwards.
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import VatesClient from '@vates/nbd-client';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { DaemonProcess } from '../../lab/hosts.js';
import { startPeer } from '../servers.js';
import { needs } from '../tools.js';
import { assertSame, makeImage } from './disks.js';

const MIB = 1 << 20;
const ANSWER_TIMEOUT_MS = 30_000;

let folder: string;
let image: string;
let content: Buffer;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-reconnect-'));
  image = join(folder, 'disk.img');
  content = makeImage(image);
});
after(() => rmSync(folder, { recursive: true }));

const socket = () => join(folder, 'nbd.sock');

/** TCP on a port that the system chose, or the same one again. */
function serve(port = '0'): Promise<DaemonProcess> {
  const listen = ['--listen', `unix:${socket()}`, '--listen', `127.0.0.1:${port}`];
  return DaemonProcess.start([
    'serve',
    image,
    '--name',
    'disk',
    ...listen,
    '--state-dir',
    join(folder, 'state'),
  ]);
}

const portOf = (daemon: DaemonProcess): string => new URL(daemon.uris[1]!).port;

async function killed(daemon: DaemonProcess): Promise<void> {
  daemon.kill();
  await daemon.exited;
}

/** qemu-io that is told its commands one by one. */
class QemuIo {
  readonly #child;
  readonly #ended: Promise<unknown>;
  #said = '';

  constructor(options: string) {
    const words = ['--pdeathsig', 'KILL', '--', 'qemu-io', '--image-opts', options];
    this.#child = spawn('setpriv', words, { stdio: ['pipe', 'pipe', 'pipe'] });
    this.#ended = once(this.#child, 'close');
    for (const stream of [this.#child.stdout, this.#child.stderr])
      stream.setEncoding('utf8').on('data', (text: string) => {
        this.#said += text;
        this.#child.emit('said');
      });
  }

  /** Asks, and waits until it has answered; its answers end with the time they took. */
  async ask(command: string): Promise<string> {
    this.send(command);
    return this.answer();
  }

  send(command: string): void {
    this.#said = '';
    this.#child.stdin.write(`${command}\n`);
  }

  async answer(): Promise<string> {
    const timeout = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
    while (!/ops\/sec\)|fail|error/i.test(this.#said)) await once(this.#child, 'said', { signal: timeout });
    return this.#said;
  }

  async end(): Promise<void> {
    this.#child.stdin.end('quit\n');
    await this.#ended;
  }
}

describe('the daemon is killed and comes back', needs('setpriv'), () => {
  test(
    'qemu with reconnect-delay: a request in between waits, writes are there',
    needs('qemu-io'),
    async () => {
      let daemon = await serve();
      const where = `server.type=unix,server.path=${socket()}`;
      const io = new QemuIo(
        `driver=raw,file.driver=nbd,file.export=disk,file.reconnect-delay=60,${where.replaceAll('server', 'file.server')}`,
      );
      try {
        assert.match(await io.ask('write -P 7 1M 64k'), /wrote 65536\/65536/);
        await killed(daemon);
        io.send('write -P 8 2M 64k');
        daemon = await serve();
        assert.match(await io.answer(), /wrote 65536\/65536/);
        assert.match(await io.ask('read -P 7 1M 64k'), /read 65536\/65536/);
        assert.match(await io.ask('read -P 8 2M 64k'), /read 65536\/65536/);
        content.fill(7, MIB, MIB + 65_536).fill(8, 2 * MIB, 2 * MIB + 65_536);
      } finally {
        await io.end();
        await daemon.stop();
      }
      assertSame(readFileSync(image), content);
    },
  );

  test("nbdkit's retry filter and nbd plugin", needs('nbdkit'), async () => {
    let daemon = await serve();
    const retry = [
      '--filter=retry',
      'nbd',
      `socket=${socket()}`,
      'export=disk',
      'retries=60',
      'retry-delay=1',
      'retry-exponential=no',
    ];
    const nbdkit = await startPeer((_, path) => ['nbdkit', '-f', '-U', path, ...retry]);
    try {
      const client = await NbdClient.connect(nbdkit.uri);
      await client.write(3 * MIB, Buffer.alloc(65_536, 9));
      await killed(daemon);
      const write = client.write(4 * MIB, Buffer.alloc(65_536, 10), { fua: true });
      daemon = await serve();
      await write;
      content.fill(9, 3 * MIB, 3 * MIB + 65_536).fill(10, 4 * MIB, 4 * MIB + 65_536);
      assertSame(await client.read(2 * MIB, 4 * MIB), content.subarray(2 * MIB, 6 * MIB));
      await client.close();
    } finally {
      await nbdkit.stop();
      await daemon.stop();
    }
    assertSame(readFileSync(image), content);
  });

  test('@vates/nbd-client: a block is asked for again', async () => {
    let daemon = await serve();
    const where = { address: '127.0.0.1', port: Number(portOf(daemon)), exportname: 'disk' };
    const client = new VatesClient(where, {
      waitBeforeReconnect: 50,
      reconnectRetry: 100,
      messageTimeout: 5000,
    });
    try {
      await client.connect();
      assertSame(await client.readBlock(0), content.subarray(0, 65_536));
      await killed(daemon);
      daemon = await serve(portOf(daemon));
      const blocks = await Promise.all([1, 2, 3].map((index) => client.readBlock(index)));
      assertSame(Buffer.concat(blocks), content.subarray(65_536, 4 * 65_536));
      await client.disconnect();
    } finally {
      await daemon.stop();
    }
  });
});
