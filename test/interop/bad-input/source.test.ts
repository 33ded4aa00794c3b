// A source that is not there, goes away, hangs, or is another disk.
import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { ControlClient } from '../../../src/host/control/client.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { assertSame, pattern } from '../clients/disks.js';
import { eventually, inFolder, refused } from './refusals.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;

interface Place {
  folder: string;
  content: Buffer;
  sourceUri: string;
  image: string;
  control: ControlClient;
  startSource(name?: string): Promise<DaemonProcess>;
  startProxy(...more: string[]): Promise<DaemonProcess>;
}

async function inPlace(scenario: (place: Place) => Promise<void>): Promise<void> {
  await inFolder(async (folder) => {
    const content = pattern(SIZE, 8);
    writeFileSync(join(folder, 'source.img'), content);
    const state = join(folder, 'state');
    const log = ['--log-level', 'error'];
    const socket = join(folder, 'source');
    const started: DaemonProcess[] = [];
    const start = async (words: string[]): Promise<DaemonProcess> => {
      const daemon = await DaemonProcess.start(words);
      started.push(daemon);
      return daemon;
    };
    const control = new ControlClient(join(state, 'control', 'disk.sock'));
    const sourceUri = `nbd+unix:///?socket=${socket}`;
    const image = join(folder, 'disk.img');
    const place: Place = {
      folder,
      content,
      sourceUri,
      image,
      control,
      startSource: (name = 'source.img') =>
        start([
          'serve',
          join(folder, name),
          '--state-dir',
          join(folder, 's'),
          '--listen',
          `unix:${socket}`,
          ...log,
        ]),
      startProxy: (...more) =>
        start([
          ...['proxy', sourceUri, image, '--name', 'disk', '--state-dir', state],
          ...['--listen', `unix:${join(folder, 'disk')}`, ...log, ...more],
        ]),
    };
    try {
      await scenario(place);
    } finally {
      control.close();
      for (const daemon of started) {
        daemon.kill();
        await daemon.exited;
      }
    }
  });
}

async function read(client: NbdClient, offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length);
  await client.read(offset, length, buffer);
  return buffer;
}

async function linkState(control: ControlClient): Promise<string | undefined> {
  const view = await control.volume('disk');
  return view.phase === 'unavailable' ? view.error : view.source?.state;
}

// They wait more than they work.
describe('a source', { concurrency: 3 }, () => {
  test('that is down when a proxy is new: refused, and nothing is made', () =>
    inFolder(async (folder) => {
      const image = join(folder, 'disk.img');
      const rest = ['--state-dir', join(folder, 'state'), '--listen', `unix:${join(folder, 'd')}`];
      const nobody = /cannot connect to .*: there is no such socket, start the server first/;
      await refused(['proxy', `nbd+unix:///?socket=${join(folder, 'none')}`, image, ...rest], 1, nobody);
      const server = net.createServer();
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
      const { port } = server.address() as net.AddressInfo;
      await new Promise((resolve) => server.close(resolve));
      await refused(
        ['proxy', `nbd://127.0.0.1:${port}`, image, ...rest],
        1,
        /nobody listens there, start the server first/,
      );
      assert.equal(existsSync(image), false);
      assert.equal(existsSync(join(folder, 'state', 'disk.img')), false);
    }));

  test('that is no NBD server, or hangs up', () =>
    inFolder(async (folder) => {
      for (const [name, answer] of [
        [
          'http',
          'HTTP/1.1 400 Bad Request\r\nServer: nobody\r\nConnection: close\r\nContent-Length: 0\r\n\r\n',
        ],
        ['bye', ''],
      ]) {
        const path = join(folder, name);
        const server = net.createServer((socket) => {
          socket.on('error', () => undefined);
          socket.end(answer);
        });
        await new Promise<void>((resolve) => server.listen(path, resolve));
        const words = [
          'proxy',
          `nbd+unix:///?socket=${path}`,
          join(folder, 'disk.img'),
          '--state-dir',
          join(folder, 'st'),
        ];
        await refused([...words, '--listen', `unix:${join(folder, 'd')}`], 1, /cannot connect to .*: /);
        await new Promise((resolve) => server.close(resolve));
      }
      assert.equal(existsSync(join(folder, 'disk.img')), false);
    }));

  test('that is down when a proxy goes on: hits are served, the rest comes when it is back', () =>
    inPlace(async ({ content, control, image, startSource, startProxy }) => {
      const source = await startSource();
      const first = await startProxy('--no-background');
      await control.prefetch('disk', 0, MIB);
      assert.equal(await first.stop(), 0);
      assert.equal(await source.stop(), 0);

      const proxy = await startProxy();
      const client = await NbdClient.connect(proxy.uris[0]);
      assertSame(await read(client, 0, MIB), content.subarray(0, MIB));
      await client.write(100, Buffer.from('while it is away'), 0, 16);
      content.write('while it is away', 100);
      assert.notEqual(await linkState(control), 'connected');
      const told = await runBlockferry(['status', 'disk', '--control', control.address]);
      assert.match(told.stdout, /^local +12\.5 % \(source (connecting|lost): .*no such socket/m);
      const late = read(client, 3 * MIB, 5000);
      assertSame(await read(client, 4096, 8192), content.subarray(4096, 4096 + 8192));

      const back = await startSource();
      assertSame(await late, content.subarray(3 * MIB, 3 * MIB + 5000));
      assert.equal((await control.waitHandoff('disk', 15_000)).done, true);
      await client.close();
      assert.deepEqual([await proxy.stop(), await back.stop()], [0, 0]);
      assertSame(readFileSync(image), content);
    }));

  test('that does not come back: reads fail after --source-timeout, hits go on, an orderly end is possible', () =>
    inPlace(async ({ content, control, startSource, startProxy }) => {
      const source = await startSource();
      const proxy = await startProxy('--no-background', '--source-timeout', '0.5');
      const client = await NbdClient.connect(proxy.uris[0]);
      assertSame(await read(client, 0, 4096), content.subarray(0, 4096));
      source.kill();
      await source.exited;
      await eventually(async () => (await linkState(control)) === 'lost', 'the loss to be seen');
      await assert.rejects(read(client, MIB, 4096), /EIO/);
      assertSame(await read(client, 0, 4096), content.subarray(0, 4096));
      await client.close();
      assert.equal(await proxy.stop(), 0);
    }));

  test('that hangs: a proxy with waiting reads ends in order', () =>
    inPlace(async ({ content, startSource, startProxy }) => {
      const source = await startSource();
      const proxy = await startProxy('--no-background');
      const client = await NbdClient.connect(proxy.uris[0]);
      assertSame(await read(client, 0, 4096), content.subarray(0, 4096));
      source.child.kill('SIGSTOP');
      const waiting = read(client, 2 * MIB, 4096).then(
        () => 'read',
        () => 'failed',
      );
      const began = performance.now();
      assert.equal(await proxy.stop(), 0);
      assert.equal(await waiting, 'failed');
      assert.ok(performance.now() - began < 20_000);
    }));

  test('that is another disk now: nothing is read from it, hits go on, status says why', () =>
    inPlace(async ({ folder, content, control, startSource, startProxy }) => {
      const source = await startSource();
      const proxy = await startProxy('--no-background', '--source-timeout', '0.5');
      const client = await NbdClient.connect(proxy.uris[0]);
      assertSame(await read(client, 0, 4096), content.subarray(0, 4096));
      assert.equal(await source.stop(), 0);
      for (const [name, bytes, why] of [
        ['longer.img', SIZE + MIB, /its size is 9437184 bytes, not 8388608/],
        ['twin.img', SIZE, /it was 'blockferry volume .*' and is 'blockferry volume/],
      ] as const) {
        writeFileSync(join(folder, name), pattern(bytes, 77));
        const other = await startSource(name);
        await eventually(async () => (await linkState(control)) === 'mismatch', 'the mismatch to be seen');
        const told = await runBlockferry(['status', 'disk', '--control', control.address]);
        assert.match(told.stdout, why);
        await assert.rejects(read(client, MIB, 4096), /EIO/);
        assertSame(await read(client, 0, 4096), content.subarray(0, 4096));
        assert.equal(await other.stop(), 0);
        await eventually(async () => (await linkState(control)) !== 'mismatch', 'it to be gone');
      }
      await client.close();
      assert.equal(await proxy.stop(), 0);
    }));
});
