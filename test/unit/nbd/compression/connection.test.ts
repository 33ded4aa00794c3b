/** Server and client over real sockets, compressed, with TLS and without, and with peers that break the rules. */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, test } from 'node:test';
import { pino } from 'pino';
import { BlockferryError } from '../../../../src/errors.js';
import { NbdClient } from '../../../../src/nbd/client/client.js';
import type { NbdClientOptions } from '../../../../src/nbd/client/options.js';
import { encodeCompressionRequest } from '../../../../src/nbd/codec/frames.js';
import { compressionPool } from '../../../../src/nbd/compression/pool.js';
import { Option, OptionReply } from '../../../../src/nbd/constants.js';
import { Listener, type ListenerParameters } from '../../../../src/nbd/server/listener.js';
import { startSession } from '../../../../src/nbd/server/session.js';
import { greeting, optionReply, startFakeServer } from '../../../fakes/fake-server.js';
import type { MemoryDevice } from '../../../fakes/memory-device.js';
import { diskOf } from '../../../support/disk.js';
import { clientFlags, GREETING_BYTES, option } from '../../../support/handshake.js';
import { makePki, type Pki } from '../../../support/pki.js';
import { RawClient } from '../../../support/raw-client.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;
const ACK_BYTES = 20;

let pki: Pki;
before(() => {
  pki = makePki();
});
after(async () => {
  pki.remove();
  await compressionPool().end();
});

let folder: string;
let path: string;
let lines: { kind?: string; msg: string }[];
let device: MemoryDevice;
let listener: Listener;
let clients: NbdClient[];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-compression-'));
  path = join(folder, 's');
  lines = [];
  clients = [];
});
afterEach(async () => {
  for (const client of clients) client.destroy();
  await listener.close();
  rmSync(folder, { recursive: true });
});

async function serve(more: Partial<ListenerParameters> = {}): Promise<void> {
  const disk = diskOf(SIZE);
  device = disk.device;
  device.data.fill('compressible ', 0, SIZE / 2);
  listener = await Listener.open({
    addresses: [{ kind: 'unix', path }],
    exports: disk.exports,
    startSession,
    log: pino({ level: 'debug' }, { write: (line: string) => lines.push(JSON.parse(line)) }),
    compression: true,
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 1000,
    ...more,
  });
}

async function connect(
  options: NbdClientOptions,
  uri = `nbd+unix:///disk?socket=${path}`,
): Promise<NbdClient> {
  const client = await NbdClient.connect(uri, options);
  clients.push(client);
  return client;
}

async function exchange(client: NbdClient): Promise<void> {
  const reads = await Promise.all(Array.from({ length: 8 }, (_, i) => client.read(i * MIB, MIB)));
  assert.ok(Buffer.concat(reads).equals(device.data));
  const written = Buffer.alloc(MIB + 512, 'what is written ');
  await client.write(4096, written);
  assert.ok(device.data.subarray(4096, 4096 + written.length).equals(written));
  assert.ok((await client.read(4608, 700)).equals(device.data.subarray(4608, 5308)));
  await client.flush();
}

for (const level of ['auto', 3, -5] as const)
  test(`reads and writes over a connection with compression ${level}`, async () => {
    await serve();
    const client = await connect({ compression: level });
    assert.ok(client.compressed && client.info.extended);
    await exchange(client);
    if (level !== 'auto')
      assert.ok(client.wireBytesReceived < 0.7 * SIZE, `${client.wireBytesReceived} bytes`);
    await client.close();
    assert.equal(await client.closed, null);
  });

test('with TLS, over TLS', async () => {
  await serve({ tls: { mode: 'required', certificates: pki.good, verifyPeer: true } });
  const uri = `nbds+unix:///disk?socket=${path}&tls-certificates=${pki.good}`;
  const client = await connect({ compression: 3 }, uri);
  assert.ok(client.compressed);
  await exchange(client);
  assert.ok(client.wireBytesReceived < 0.7 * SIZE, `${client.wireBytesReceived} bytes`);
  await client.close();
  assert.equal(await client.closed, null);
});

test('who does not ask is served as ever, and who asks a server that has it off as well', async () => {
  await serve();
  const plain = await connect({});
  assert.ok(!plain.compressed);
  await exchange(plain);
  await listener.close();
  await serve({ compression: false });
  const asking = await connect({ compression: 'auto' });
  assert.ok(!asking.compressed);
  await exchange(asking);
});

test('many requests at once, of every length, are answered right', async () => {
  await serve();
  const client = await connect({ compression: 1 });
  const lengths = Array.from({ length: 400 }, (_, i) => 1 + ((i * 7919) % 70_000));
  await Promise.all(
    lengths.map(async (length, i) => {
      const offset = (i * 104_729) % (SIZE - length);
      assert.ok((await client.read(offset, length)).equals(device.data.subarray(offset, offset + length)));
    }),
  );
});

async function compressedByHand(): Promise<RawClient> {
  const client = await RawClient.connect({ path });
  await client.receive(GREETING_BYTES);
  client.send(clientFlags());
  client.send(option(Option.COMPRESSION, encodeCompressionRequest('auto')));
  await client.receive(ACK_BYTES);
  return client;
}

test('a client that speaks no frames then is hung up on, told of, and harms nobody', async () => {
  await serve();
  const client = await compressedByHand();
  client.send(option(Option.LIST));
  await client.receiveAll();
  assert.ok(
    lines.some(({ kind }) => kind === 'protocol'),
    JSON.stringify(lines),
  );
  await exchange(await connect({ compression: 1 }));
  await client.close();
});

test('a server that speaks no frames then fails the client with protocol', async () => {
  const server = await startFakeServer(async (peer) => {
    peer.send(greeting());
    await peer.read(4);
    await peer.read(20);
    peer.send(optionReply(Option.COMPRESSION, OptionReply.ACK));
    peer.send(Buffer.alloc(100, 'no frame'));
  });
  await serve();
  await assert.rejects(
    connect({ compression: 'auto' }, server.uri),
    (error) => error instanceof BlockferryError && error.code === 'protocol',
  );
  await server.stop();
});

test('a client that is cut off leaves no device behind', async () => {
  await serve();
  const client = await connect({ compression: 1 });
  await client.read(0, MIB);
  client.destroy();
  await listener.close();
  assert.equal(device.released, 1);
});
