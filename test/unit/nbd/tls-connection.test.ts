/** Our server and clients made by hand over real sockets: what TLS lets through, and what it does not. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import tls from 'node:tls';
import { pino } from 'pino';
import { BlockferryError, type ErrorCode } from '../../../src/errors.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { Command, IN_FLIGHT_REQUESTS_MAX, Option, OptionReply } from '../../../src/nbd/constants.js';
import { Listener } from '../../../src/nbd/server/listener.js';
import { startSession } from '../../../src/nbd/server/session.js';
import type { ServerTlsSettings } from '../../../src/nbd/tls.js';
import type { MemoryDevice } from '../../fakes/memory-device.js';
import { encodeRequest, RawClient as SessionClient, until } from '../../fakes/raw-client.js';
import { diskOf } from '../../support/disk.js';
import { clientFlags, GREETING_BYTES, infoData, option, readReplies } from '../../support/handshake.js';
import { makePki, type Pki } from '../../support/pki.js';
import { RawClient, within } from '../../support/raw-client.js';

const SIZE = 8 << 20;
const ACK_BYTES = 20;
/** INFO_EXPORT and ACK. */
const GO_ANSWER_BYTES = 20 + 12 + 20;

let pki: Pki;
before(() => {
  pki = makePki();
});
after(() => pki.remove());

let folder: string;
let lines: { level: number; kind?: string; msg: string }[];
let cleanups: (() => unknown)[];
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-tls-'));
  lines = [];
  cleanups = [() => rmSync(folder, { recursive: true })];
});
afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
});

interface Served {
  listener: Listener;
  device: MemoryDevice;
  path: string;
  port: number;
  /** Of the unix socket, with more parameters. */
  uri(more: string, user?: string): string;
}

async function serve(settings: ServerTlsSettings, handshakeTimeoutMs = 5000): Promise<Served> {
  const { device, exports } = diskOf(SIZE);
  const path = join(folder, 's');
  const listener = await Listener.open({
    addresses: [
      { kind: 'unix', path },
      { kind: 'tcp', host: '127.0.0.1', port: 0 },
    ],
    exports,
    startSession,
    log: pino({ level: 'debug' }, { write: (line: string) => lines.push(JSON.parse(line)) }),
    tls: settings,
    handshakeTimeoutMs,
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 1000,
  });
  cleanups.push(() => listener.close());
  const tcp = listener.addresses('disk').find((uri) => uri.startsWith('nbds://'))!;
  return {
    listener,
    device,
    path,
    port: Number(/:(\d+)\//.exec(tcp)![1]),
    uri: (more, user = '') => `nbds+unix://${user}/disk?socket=${path}&${more}`,
  };
}

const x509 = (): ServerTlsSettings => ({ mode: 'required', certificates: pki.good, verifyPeer: true });
const psk = (): ServerTlsSettings => ({ mode: 'required', pskFile: pki.keys });

/** Past greeting and flags, in clear text. */
async function greeted({ path }: Served): Promise<RawClient> {
  const client = await RawClient.connect({ path });
  cleanups.push(() => client.close());
  await client.receive(GREETING_BYTES);
  client.send(clientFlags());
  return client;
}

async function upgrade(client: RawClient, changes: tls.ConnectionOptions = {}): Promise<tls.TLSSocket> {
  const file = (name: string) => readFileSync(join(pki.good, name));
  client.socket.removeAllListeners('data');
  const socket = tls.connect({
    socket: client.socket,
    ca: file('ca-cert.pem'),
    cert: file('client-cert.pem'),
    key: file('client-key.pem'),
    servername: 'localhost',
    ...changes,
  });
  cleanups.push(() => socket.destroy());
  await within(once(socket, 'secureConnect'), 'TLS');
  return socket;
}

async function receive(socket: tls.TLSSocket, length: number): Promise<Buffer> {
  const enough = (): Buffer | null => socket.read(length) as Buffer | null;
  for (let bytes = enough(); ; bytes = enough()) {
    if (bytes !== null) return bytes;
    await within(once(socket, 'readable'), `${length} bytes`);
  }
}

/** A client past STARTTLS, without GO. */
async function secured(served: Served): Promise<tls.TLSSocket> {
  const client = await greeted(served);
  client.send(option(Option.STARTTLS));
  await client.receive(ACK_BYTES);
  return upgrade(client);
}

async function refused(uri: string, why: RegExp, code: ErrorCode = 'tls'): Promise<void> {
  await assert.rejects(NbdClient.connect(uri), (error) => {
    assert.ok(error instanceof BlockferryError, String(error));
    assert.match(error.message, why);
    assert.equal(error.code, code);
    assert.ok(!error.message.includes('\n'));
    return true;
  });
}

/** It still serves those who may. */
async function alive(served: Served, parameters: string, user = ''): Promise<void> {
  const client = await NbdClient.connect(served.uri(parameters, user));
  const buffer = Buffer.alloc(4096);
  await client.read(4096, 4096, buffer);
  assert.ok(buffer.equals(served.device.data.subarray(4096, 8192)));
  await client.close();
}

for (const kind of ['x509', 'psk'] as const) {
  describe(`our client and our server, ${kind}`, () => {
    const settings = () => (kind === 'x509' ? x509() : psk());
    const parameters = () => (kind === 'x509' ? `tls-certificates=${pki.good}` : `tls-psk-file=${pki.keys}`);
    const user = kind === 'psk' ? 'alice@' : '';

    test('read and write requests of all sizes, many at once', async () => {
      const served = await serve(settings());
      const client = await NbdClient.connect(served.uri(parameters(), user));
      assert.equal(client.info.structured, true);
      const into = Buffer.alloc(SIZE);
      const lengths = [1, 511, 4096, 65_537, 1 << 20, 3 << 20];
      await Promise.all(lengths.map((length, i) => client.read(i * 17, length, into.subarray(0, length))));
      const pieces = Array.from({ length: 128 }, (_, i) => i * (SIZE / 128));
      await Promise.all(pieces.map((at) => client.read(at, SIZE / 128, into, at)));
      assert.ok(into.equals(served.device.data));
      const payload = Buffer.alloc(2 << 20, 7);
      await client.write(12345, payload, 0, payload.length, { fua: true });
      assert.ok(served.device.data.subarray(12345, 12345 + payload.length).equals(payload));
      await client.flush();
      await client.close();
      await until(() => served.listener.connections('disk') === 0);
    });

    test('over TCP, and several at the same time', async () => {
      const served = await serve(settings());
      const uri = `nbds://${user}localhost:${served.port}/disk?${parameters()}`;
      const clients = await Promise.all(Array.from({ length: 6 }, () => NbdClient.connect(uri)));
      assert.equal(served.listener.connections('disk'), 6);
      await Promise.all(clients.map((client) => client.close()));
      assert.deepEqual(
        (await NbdClient.list(uri)).map(({ name }) => name),
        ['disk'],
      );
    });

    test('a shutdown drains the session as without TLS', async () => {
      const served = await serve(settings());
      served.device.manner = () => 'held';
      const client = await NbdClient.connect(served.uri(parameters(), user));
      const reading = client.read(0, 4096, Buffer.alloc(4096));
      await until(() => served.device.held.length === 1);
      const closing = served.listener.close();
      served.device.completeHeld();
      await reading;
      await client.close();
      await closing;
    });
  });
}

describe('who is refused', () => {
  test('a client without TLS, where it is required', async () => {
    const served = await serve(x509());
    await refused(`nbd+unix:///disk?socket=${served.path}`, /demands TLS: use nbds/, 'source-unreachable');
    await alive(served, `tls-certificates=${pki.good}`);
  });
  test('a client without a certificate', async () => {
    const served = await serve(x509());
    await refused(served.uri(`tls-certificates=${pki.anonymous}`), /wants a certificate of ours/);
    await until(() => /it has no certificate/.test(JSON.stringify(lines)));
    await alive(served, `tls-certificates=${pki.good}`);
  });
  test('a client with a certificate of another authority', async () => {
    const served = await serve(x509());
    await refused(
      served.uri(`tls-certificates=${pki.stranger}&tls-verify-peer=false`),
      /hung up .*perhaps it does not accept our credentials/,
      'closed',
    );
    await until(() => /signed by no authority we trust/.test(JSON.stringify(lines)));
    await alive(served, `tls-certificates=${pki.good}`);
  });
  test('a server of another authority', async () => {
    const served = await serve({ ...x509(), certificates: pki.stranger });
    await refused(served.uri(`tls-certificates=${pki.good}`), /signed by no authority we trust/);
  });
  test('a server of another name, over TCP; a unix socket has none, unless one is expected', async () => {
    const served = await serve({ ...x509(), certificates: pki.elsewhere });
    const uri = `nbds://localhost:${served.port}/disk?tls-certificates=${pki.good}`;
    await refused(uri, /not in the cert's altnames: DNS:elsewhere\.example/);
    await refused(served.uri(`tls-certificates=${pki.good}&tls-hostname=localhost`), /altnames/);
    await alive(served, `tls-certificates=${pki.good}&tls-hostname=elsewhere.example`);
    await alive(served, `tls-certificates=${pki.good}`);
  });
  test('a wrong key, and a name without one', async () => {
    const served = await serve(psk());
    await refused(served.uri(`tls-psk-file=${pki.wrongKeys}`, 'alice@'), /does not accept our key/);
    await refused(served.uri(`tls-psk-file=${pki.wrongKeys}`, 'carol@'), /does not accept our/);
    await until(() => /the keys \(PSK\) differ/.test(JSON.stringify(lines)));
    await until(() => /no key of \\+"carol/.test(JSON.stringify(lines)));
    await alive(served, `tls-psk-file=${pki.keys}`, 'bob@');
  });
  test('certificates where keys are wanted, and the other way round', async () => {
    await refused((await serve(psk())).uri(`tls-certificates=${pki.good}`), /TLS failed/);
    await cleanups.pop()!();
    await refused(
      (await serve(x509())).uri(`tls-psk-file=${pki.keys}`, 'bob@'),
      /no authority we trust|cipher/,
    );
  });
  test('TLS 1.1', async () => {
    const client = await greeted(await serve(x509()));
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    const old = { minVersion: 'TLSv1', maxVersion: 'TLSv1.1', ciphers: 'DEFAULT@SECLEVEL=0' } as const;
    await assert.rejects(upgrade(client, old), { code: /PROTOCOL_VERSION|UNSUPPORTED|ECONNRESET/ });
    await until(() => lines.some(({ msg }) => /no TLS version from 1\.2 on/.test(msg)));
  });
  test('TLS 1.2 and 1.3 are not', async () => {
    const served = await serve(x509());
    for (const version of ['TLSv1.2', 'TLSv1.3'] as const) {
      const client = await greeted(served);
      client.send(option(Option.STARTTLS));
      await client.receive(ACK_BYTES);
      const socket = await upgrade(client, { minVersion: version, maxVersion: version });
      assert.equal(socket.getProtocol(), version);
      socket.write(option(Option.LIST));
      assert.equal((await receive(socket, ACK_BYTES)).length, ACK_BYTES);
    }
  });
});

describe('STARTTLS on the wire', () => {
  test('clear text behind it in the same packet is never obeyed', async () => {
    const served = await serve({ ...x509(), mode: 'allowed' });
    const client = await greeted(served);
    client.send(option(Option.STARTTLS), option(Option.STRUCTURED_REPLY), option(Option.LIST));
    assert.equal(readReplies(await client.receive(ACK_BYTES))[0]!.option, Option.STARTTLS);
    const socket = await upgrade(client);
    socket.write(option(Option.GO, infoData('disk')));
    // The first thing said in TLS is the answer to GO, and no structured replies are agreed on.
    const [info, ack] = readReplies(await receive(socket, GO_ANSWER_BYTES));
    assert.deepEqual([info!.option, ack!.type], [Option.GO, OptionReply.ACK]);
    assert.equal(info!.data.readUInt16BE(10) & (1 << 7), 0, 'no DF, as without structured replies');
    socket.write(encodeRequest({ command: Command.READ, cookie: 5, offset: 0, length: 16 }));
    const reply = await receive(socket, 32);
    assert.equal(reply.readUInt32BE(0), 0x67446698, 'a simple reply');
  });
  test('what was agreed on before it is forgotten', async () => {
    const served = await serve({ ...x509(), mode: 'allowed' });
    const client = await greeted(served);
    client.send(option(Option.STRUCTURED_REPLY));
    await client.receive(ACK_BYTES);
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    const socket = await upgrade(client);
    socket.write(option(Option.GO, infoData('disk')));
    const [info] = readReplies(await receive(socket, GO_ANSWER_BYTES));
    assert.equal(info!.data.readUInt16BE(10) & (1 << 7), 0);
  });
  test('clear text instead of TLS ends the connection, and no other', async () => {
    const served = await serve({ ...x509(), mode: 'allowed' });
    const other = await secured(served);
    const client = await greeted(served);
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    client.send(option(Option.LIST));
    const rest = await client.receiveAll();
    assert.ok(!rest.includes('disk'), 'nothing is said in clear text any more');
    await until(() => lines.some(({ msg }) => /what came was no TLS/.test(msg)));
    other.write(option(Option.ABORT));
    assert.equal(readReplies(await receive(other, ACK_BYTES))[0]!.type, OptionReply.ACK);
  });
  test('a client that never begins with TLS is cut off in time', async () => {
    const client = await greeted(await serve(x509(), 200));
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    await client.receiveAll();
  });
  test('a client that hangs up in the middle of TLS', async () => {
    const served = await serve(x509(), 200);
    const client = await greeted(served);
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    client.send(Buffer.of(0x16, 3, 1));
    client.close();
    await alive(served, `tls-certificates=${pki.good}`);
  });
  test('a second one is refused, and haggling goes on', async () => {
    const socket = await secured(await serve(x509()));
    for (const [number, type] of [
      [Option.STARTTLS, OptionReply.ERR_INVALID],
      [Option.STRUCTURED_REPLY, OptionReply.ACK],
    ] as const) {
      socket.write(option(number));
      const head = await receive(socket, ACK_BYTES);
      assert.equal(head.readUInt32BE(12), type);
      const message = head.readUInt32BE(16);
      if (message > 0) await receive(socket, message);
    }
  });
});

describe('a session over TLS', () => {
  test('a client that hangs up while it is stalled: what was not begun is never carried out', async () => {
    const served = await serve(x509());
    const { device } = served;
    const socket = await secured(served);
    socket.write(option(Option.GO, infoData('disk')));
    await receive(socket, GO_ANSWER_BYTES);
    socket.removeAllListeners('readable');
    const client = new SessionClient(socket as net.Socket, false);
    device.manner = () => 'held';
    const payload = Buffer.alloc(16, 1);
    const count = IN_FLIGHT_REQUESTS_MAX + 500;
    client.send(
      ...Array.from({ length: count }, (_, cookie) => ({ command: Command.WRITE, cookie, payload })),
    );
    await until(() => device.held.length === IN_FLIGHT_REQUESTS_MAX);
    socket.destroy();
    await within(once(socket, 'close'), 'the client to be gone');
    device.manner = () => 'now';
    for (const request of device.held.splice(0)) request.complete(0);
    await until(() => device.released === 1);
    assert.equal(device.calls.length, IN_FLIGHT_REQUESTS_MAX);
  });
  test('requests held by the device: no more than the limit, the others follow', async () => {
    const served = await serve(x509());
    const { device } = served;
    const socket = await secured(served);
    socket.write(option(Option.GO, infoData('disk')));
    await receive(socket, GO_ANSWER_BYTES);
    const client = new SessionClient(socket as net.Socket, false);
    device.manner = () => 'held';
    const count = IN_FLIGHT_REQUESTS_MAX + 500;
    const payload = Buffer.alloc(16, 1);
    client.send(
      ...Array.from({ length: count }, (_, cookie) => ({ command: Command.WRITE, cookie, payload })),
    );
    await until(() => device.held.length === IN_FLIGHT_REQUESTS_MAX);
    device.completeHeld();
    await until(() => device.held.length === 500);
    device.completeHeld();
    await client.got(count);
  });
  test('the log knows the client by its certificate or key', async () => {
    const served = await serve(x509());
    served.device.failure = () => {
      throw new Error('image is gone');
    };
    const client = await NbdClient.connect(served.uri(`tls-certificates=${pki.good}`));
    await assert.rejects(client.read(0, 512, Buffer.alloc(512)));
    await client.close();
    await until(() => lines.some((line) => (line as { client?: string }).client === 'tester'));
  });
});

/** Hands on what comes, and behind the given number of bytes of one direction cuts both off, or turns one bit over. */
async function cutter(
  to: string,
  from: 'client' | 'server',
  bytes: number,
  harm: 'cut' | 'flip',
): Promise<string> {
  const path = join(folder, `${harm}-${from}-${bytes}`);
  const relay = net.createServer((client) => {
    const server = net.connect(to);
    let left = bytes;
    for (const [name, source, sink] of [
      ['client', client, server],
      ['server', server, client],
    ] as const) {
      source.on('error', () => {});
      source.on('close', () => sink.destroy());
      source.on('data', (chunk: Buffer) => {
        if (harm === 'flip') {
          if (name === from && left >= 0 && left < chunk.length) chunk[left]! ^= 1;
          if (name === from) left -= chunk.length;
          sink.write(chunk);
          return;
        }
        const kept = name === from ? chunk.subarray(0, left) : chunk;
        if (name === from) left -= kept.length;
        if (kept.length > 0) sink.write(kept);
        if (left === 0) for (const socket of [client, server]) socket.destroySoon();
      });
    }
  });
  relay.listen(path);
  await once(relay, 'listening');
  cleanups.push(() => new Promise((resolve) => relay.close(resolve)));
  return path;
}

/** Said in clear text: flags and STARTTLS; the greeting and the ACK. */
const CLEAR_BYTES = { client: 4 + 16, server: GREETING_BYTES + ACK_BYTES };

describe('a connection harmed at any byte', () => {
  for (const [kind, from, harm] of [
    ['x509', 'client', 'cut'],
    ['x509', 'server', 'cut'],
    ['psk', 'client', 'cut'],
    ['psk', 'server', 'cut'],
    ['x509', 'client', 'flip'],
    ['x509', 'server', 'flip'],
  ] as const)
    test(`${kind}, ${harm} in what the ${from} says: both sides live, the request fails`, async () => {
      const served = await serve(kind === 'x509' ? x509() : psk(), 500);
      const parameters = kind === 'x509' ? `tls-certificates=${pki.good}` : `tls-psk-file=${pki.keys}`;
      const user = kind === 'psk' ? 'alice@' : '';
      // A flipped bit before TLS may do no harm.
      const first = harm === 'cut' ? 1 : CLEAR_BYTES[from];
      for (let bytes = first; bytes < 4000; bytes += 1 + ((bytes * 7) >> 5)) {
        const path = await cutter(served.path, from, bytes, harm);
        const uri = `nbds+unix://${user}/disk?socket=${path}&${parameters}`;
        const reading = async (): Promise<void> => {
          const client = await NbdClient.connect(uri, { handshakeTimeoutMs: 500 });
          const into = Buffer.alloc(1 << 20);
          await Promise.all(Array.from({ length: 400 }, () => client.read(0, 16384, into)));
        };
        await assert.rejects(reading(), (error) => error instanceof BlockferryError);
      }
      await alive(served, parameters, user);
      await until(() => served.listener.connections('disk') === 0);
    });
});

test('a listener whose credentials are of no use does not listen', async () => {
  await assert.rejects(serve({ ...x509(), certificates: pki.expired }), { code: 'tls', message: /expired/ });
  await assert.rejects(once(net.connect({ path: join(folder, 's') }), 'connect'), { code: 'ENOENT' });
});

test('URIs are told with TLS where it is on, first', async () => {
  const required = await serve({ ...x509(), hostname: 'disks.example' });
  assert.deepEqual(required.listener.addresses('disk'), [
    `nbds+unix:///disk?socket=${required.path}&tls-hostname=disks.example`,
    `nbds://127.0.0.1:${required.port}/disk?tls-hostname=disks.example`,
  ]);
  await cleanups.pop()!();
  const allowed = await serve({ ...x509(), mode: 'allowed' });
  assert.deepEqual(allowed.listener.addresses('disk'), [
    `nbds+unix:///disk?socket=${allowed.path}`,
    `nbds://127.0.0.1:${allowed.port}/disk`,
    `nbd+unix:///disk?socket=${allowed.path}`,
    `nbd://127.0.0.1:${allowed.port}/disk`,
  ]);
});
