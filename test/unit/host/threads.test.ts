/** Volumes on data threads: which one, what crosses, and how connections come there. */

import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readlinkSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import pino from 'pino';
import type { HeldVolume } from '../../../src/host/held-volume.js';
import { listenWith } from '../../../src/host/listen.js';
import { type ExportListener, ExportTable } from '../../../src/host/parts.js';
import { DataThreads } from '../../../src/host/threads/data-threads.js';
import type { RemoteVolume } from '../../../src/host/threads/remote-volume.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { compressionPool } from '../../../src/nbd/compression/pool.js';
import { Command, Option } from '../../../src/nbd/constants.js';
import type { ServerTlsSettings } from '../../../src/nbd/tls.js';
import { formatNbdUri, parseNbdUri } from '../../../src/nbd/uri.js';
import { hashBlocks } from '../../../src/volume/block-hash.js';
import { encodeRequest } from '../../fakes/raw-client.js';
import { clientFlags, GREETING_BYTES, option } from '../../support/handshake.js';
import { makePki, type Pki } from '../../support/pki.js';
import { RawClient } from '../../support/raw-client.js';
import { ReadingClient } from '../../support/reading-client.js';
import { failsWith, patterned, until } from '../../support/volume.js';

const SIZE = 8 << 20;
const BLOCK = 4096;
/** EXPORT_NAME's answer without zeroes. */
const ANSWER_BYTES = 10;
const REPLY_HEADER_BYTES = 16;

let folder: string;
let threads: DataThreads;
let open: { close(): Promise<void> }[];
let lines: string[];
const content = patterned(SIZE);

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'bft-'));
  threads = new DataThreads({ threadsMax: 2 });
  open = [];
  lines = [];
});
afterEach(async () => {
  for (const one of open.reverse()) await one.close();
  await threads.close();
  rmSync(folder, { recursive: true, force: true });
});

const log = pino({ level: 'info', base: null }, { write: (line) => void lines.push(line) });

async function hold(name: string): Promise<HeldVolume> {
  const image = join(folder, `${name}.img`);
  writeFileSync(image, content);
  const held = await threads.hold({
    stateDir: join(folder, 'state'),
    name,
    image,
    mode: { kind: 'serve', readOnly: false },
    guest: { addresses: [`unix:${join(folder, `${name}.sock`)}`], policy: {}, settings: {} },
    log,
  });
  open.push(held);
  return held;
}

/** A shared port for the link faces of volumes. */
async function share(
  address: string,
  volumes: HeldVolume[],
  tls?: ServerTlsSettings,
): Promise<ExportListener> {
  const table = new ExportTable();
  for (const held of volumes) table.add(held.name, () => held.linkDescription, held.link, {}, held.hashes);
  const settings = { compression: true, ...(tls === undefined ? {} : { tls }) };
  const listener = await listenWith(threads.startSession)([address], table, log, settings);
  open.push(listener);
  return listener;
}

function threadOf(held: HeldVolume): string {
  return (held as RemoteVolume).thread.name;
}

describe('data threads', () => {
  test('a volume goes where the fewest are, and a thread is started for it only when all have some', async () => {
    const a = await hold('a');
    assert.deepEqual(threads.loads, [1]);
    const [b, c, d] = await Promise.all([hold('b'), hold('c'), hold('d')]);
    assert.deepEqual(threads.loads, [2, 2]);
    for (const held of [b, c, d].filter((one) => threadOf(one) === threadOf(a))) await held.close();
    assert.deepEqual(threads.loads.sort(), [1, 2]);
    const e = await hold('e');
    assert.equal(threadOf(e), threadOf(a));
  });

  test('what keeps a volume from being opened comes back as what it is, and leaves nothing there', async () => {
    const order = {
      stateDir: join(folder, 'state'),
      name: 'lost',
      image: join(folder, 'lost.img'),
      mode: { kind: 'serve', readOnly: false },
      guest: { addresses: [], policy: {}, settings: {} },
      log,
    } as const;
    await assert.rejects(threads.hold(order), failsWith('image-missing', /lost\.img/));
    const a = await hold('a');
    const twin = { ...order, name: 'twin', image: a.image };
    await assert.rejects(threads.hold(twin), failsWith('image-in-use'));
    const taken = { ...twin, image: join(folder, 'twin.img') };
    writeFileSync(taken.image, content);
    const guest = { ...taken.guest, addresses: [`unix:${join(folder, 'a.sock')}`] };
    await assert.rejects(threads.hold({ ...taken, guest }), failsWith('address', /another server/));
    assert.deepEqual(
      threads.loads.reduce((sum, load) => sum + load, 0),
      1,
    );
    await (await threads.hold({ ...taken, name: 'twin' })).close();
  });

  test('a volume is asked and told over there, and refuses as here', async () => {
    const a = await hold('a');
    const { status, settled } = await a.look(true);
    assert.deepEqual([status.phase, status.clients, settled], ['plain', 0, true]);
    assert.match(status.uri.join(), /a\.sock/);
    await assert.rejects(a.takeover(), failsWith('phase', /not standby/));
    await assert.rejects(a.pause(), failsWith('phase'));
    const before = a.linkDescription;
    await a.seal(status.generation + 1);
    await a.unseal({ volumeId: a.id, generation: status.generation + 1 });
    assert.notEqual(a.linkDescription, before, 'the new generation is known before the answer');
    await a.close();
    await assert.rejects(a.look(), failsWith('closed'));
  });

  test('its log is ours, line by line', async () => {
    const a = await hold('a');
    const client = await RawClient.connect({ path: join(folder, 'a.sock') });
    await client.receive(GREETING_BYTES);
    client.send(clientFlags(), Buffer.alloc(16));
    await until(() => lines.some((line) => line.includes('was cut off')), 'the line');
    client.close();
    for (const line of lines) JSON.parse(line);
    assert.equal((await a.look()).status.clients, 0);
  });
});

/** Descriptors of this process, all its threads', that are sockets. */
function openSockets(): number {
  const links = readdirSync('/proc/self/fd').map((fd) => {
    try {
      return readlinkSync(join('/proc/self/fd', fd));
    } catch {
      return ''; // closed meanwhile
    }
  });
  return links.filter((link) => link.startsWith('socket:')).length;
}

/** Chooses an export and sends READs in pieces of any size, some of them while the handshake is answered. */
async function pipelined(client: RawClient, name: string, cuts: readonly number[]): Promise<void> {
  await client.receive(GREETING_BYTES);
  const count = 8;
  const reads = Array.from({ length: count }, (_, index) =>
    encodeRequest({ command: Command.READ, cookie: index, offset: index * BLOCK, length: BLOCK }),
  );
  const bytes = Buffer.concat([clientFlags(), option(Option.EXPORT_NAME, Buffer.from(name)), ...reads]);
  let from = 0;
  for (const cut of [...cuts, bytes.length]) {
    client.send(bytes.subarray(from, cut));
    from = cut;
    await new Promise((resolve) => setImmediate(resolve));
  }
  await client.receive(ANSWER_BYTES);
  for (let index = 0; index < count; index++) {
    const reply = await client.receive(REPLY_HEADER_BYTES + BLOCK);
    const cookie = Number(reply.readBigUInt64BE(8));
    assert.ok(
      reply.subarray(REPLY_HEADER_BYTES).equals(content.subarray(cookie * BLOCK, (cookie + 1) * BLOCK)),
    );
  }
}

for (const transport of ['unix', 'tcp'] as const) {
  describe(`a connection to a shared port (${transport})`, () => {
    const addressOf = (): string => (transport === 'unix' ? `unix:${join(folder, 'l.sock')}` : '127.0.0.1:0');
    const connect = (listener: ExportListener): Promise<RawClient> => {
      if (transport === 'unix') return RawClient.connect({ path: join(folder, 'l.sock') });
      const port = Number(/:(\d+)\//.exec(listener.addresses('a')[0] ?? '')?.[1]);
      return RawClient.connect({ host: '127.0.0.1', port });
    };

    test('is served on the volume’s thread, and not a byte behind the handshake is lost', async () => {
      const volumes = [await hold('a'), await hold('b')];
      const listener = await share(addressOf(), volumes);
      const before = openSockets();
      const handshake = 4 + 16 + 1;
      for (let cut = 1; cut < handshake + 28 * 3; cut += 5) {
        const client = await connect(listener);
        await pipelined(client, cut % 2 === 0 ? 'a' : 'b', [cut, Math.max(cut, handshake + 40)]);
        client.close();
      }
      await until(() => listener.connections('a') + listener.connections('b') === 0, 'the ends');
      await until(() => openSockets() === before, 'the last descriptor');
    });

    test('that sends its farewell at once gets all its answers first', async () => {
      const listener = await share(addressOf(), [await hold('a')]);
      const client = await connect(listener);
      await client.receive(GREETING_BYTES);
      client.send(
        clientFlags(),
        option(Option.EXPORT_NAME, Buffer.from('a')),
        encodeRequest({ command: Command.READ, cookie: 1, offset: 0, length: 4 << 20 }),
        encodeRequest({ command: Command.DISC, cookie: 2 }),
      );
      client.socket.end();
      const all = await client.receiveAll();
      assert.equal(all.length, ANSWER_BYTES + REPLY_HEADER_BYTES + (4 << 20));
      assert.ok(all.subarray(ANSWER_BYTES + REPLY_HEADER_BYTES).equals(content.subarray(0, 4 << 20)));
      client.close();
      await until(() => listener.connections('a') === 0, 'the end of the session');
    });

    test('that was told what is not true any more is ended', async () => {
      const a = await hold('a');
      const listener = await share(addressOf(), [a]);
      const { linkDescription } = a;
      (a as RemoteVolume).linkDescription = 'blockferry volume x generation 0';
      const client = await connect(listener);
      await client.receive(GREETING_BYTES);
      client.send(clientFlags(), option(Option.EXPORT_NAME, Buffer.from('a')));
      assert.equal((await client.receiveAll()).length, ANSWER_BYTES);
      client.close();
      (a as RemoteVolume).linkDescription = linkDescription;
    });

    test('is drained when the port closes', async () => {
      const listener = await share(addressOf(), [await hold('a')]);
      const client = await connect(listener);
      await pipelined(client, 'a', []);
      assert.equal(listener.connections('a'), 1);
      const closing = listener.close();
      assert.equal((await client.receiveAll()).length, 0);
      client.socket.end();
      await closing;
      client.close();
    });
  });
}

for (const address of ['unix', '127.0.0.1:0'])
  test(`hashes are another face of the volume, served on its thread (${address})`, async () => {
    const [a, b] = [await hold('a'), await hold('b')];
    const listener = await share(address === 'unix' ? `unix:${join(folder, 'h.sock')}` : address, [a, b]);
    const uri = parseNbdUri(listener.addresses('a')[0]!);
    const client = await NbdClient.connect(formatNbdUri({ ...uri, exportName: 'a/sha256' }));
    assert.equal(client.info.description, a.linkDescription);
    assert.ok(client.info.readOnly);
    const hashes = await client.read(0, client.info.size);
    assert.deepEqual(hashes, Buffer.from(hashBlocks(content)));
    assert.equal(listener.connections('a'), 0, 'nobody is a client of the volume');
    await client.close();
  });

describe('a connection behind TLS', () => {
  let pki: Pki;
  before(() => {
    pki = makePki();
  });
  after(() => pki.remove());

  async function shared(): Promise<{ listener: ExportListener; uri: string }> {
    const tls = { mode: 'required', certificates: pki.good } as const;
    const listener = await share('127.0.0.1:0', [await hold('a')], tls);
    const [uri] = listener.addresses('a');
    return { listener, uri: `${uri}?tls-certificates=${pki.good}` };
  }

  test('reads through a pair of sockets what is there, and ends in order', async () => {
    const { listener, uri } = await shared();
    const client = await NbdClient.connect(uri);
    const buffer = Buffer.alloc(SIZE);
    const pieces = Array.from({ length: 8 }, (_, index) => index << 20);
    await Promise.all(pieces.map((at) => client.read(at, 1 << 20, buffer, at)));
    assert.ok(buffer.equals(content));
    assert.equal(listener.connections('a'), 1);
    const companion = await NbdClient.connect(uri.replace('/a?', '/a/sha256?'));
    assert.deepEqual(await companion.read(0, companion.info.size), Buffer.from(hashBlocks(content)));
    await companion.close();
    await client.close();
    await until(() => listener.connections('a') === 0, 'the end of the session');
  });

  test('that is lost ends over there, and one that is cut off here ends', async () => {
    const { listener, uri } = await shared();
    const before = openSockets();
    const lost = await NbdClient.connect(uri);
    lost.destroy();
    await until(() => listener.connections('a') === 0, 'the end of the lost one');
    await until(() => openSockets() === before, 'the last descriptor');
    const client = await NbdClient.connect(uri);
    const closing = listener.close();
    assert.notEqual(await client.closed, null);
    await closing;
  });
});

describe('a compressed connection', () => {
  after(() => compressionPool().end());

  test('stays here with its frames, is served over there, and leaves nothing behind', async () => {
    const listener = await share('127.0.0.1:0', [await hold('a')]);
    const [uri] = listener.addresses('a');
    const before = openSockets();
    for (const orderly of [true, false]) {
      const client = await NbdClient.connect(uri!, { compression: 3 });
      assert.ok(client.compressed);
      const buffer = Buffer.alloc(SIZE);
      const pieces = Array.from({ length: 8 }, (_, index) => index << 20);
      await Promise.all(pieces.map((at) => client.read(at, 1 << 20, buffer, at)));
      assert.ok(buffer.equals(content));
      if (orderly) await client.close();
      else client.destroy();
      await until(() => listener.connections('a') === 0, 'the end of the session');
      await until(() => openSockets() === before, 'the last descriptor');
    }
    const client = await NbdClient.connect(uri!, { compression: 'auto' });
    const closing = listener.close();
    assert.notEqual(await client.closed, null);
    await closing;
  });
});

/** Keeps this thread from everything else. */
function busy(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end);
}

test('a control thread that is busy does not keep a guest, nor a link that was handed over, from its answers', async () => {
  const a = await hold('a');
  const listener = await share(`unix:${join(folder, 'l.sock')}`, [a]);
  const clients = [
    new ReadingClient((await a.look()).status.uri[0] ?? ''),
    new ReadingClient(listener.addresses('a')[0] ?? ''),
  ];
  await until(() => clients.every(({ answers }) => answers > 0), 'the first answers');
  const before = clients.map(({ answers }) => answers);
  busy(500);
  const during = clients.map(({ answers }, index) => answers - before[index]!);
  await Promise.all(clients.map((client) => client.stop()));
  // One may have been on its way when it began.
  assert.ok(
    during.every((count) => count > 10),
    `${during} answers in the meantime`,
  );
});
