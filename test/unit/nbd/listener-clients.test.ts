// Which clients a listener serves, and how many, over real sockets. Every way in which a connection ends gives its place back.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import { connect as connectTls } from 'node:tls';
import { pino } from 'pino';
import { parseListenAddress } from '../../../src/nbd/address.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { Command, Errno, Option, OptionReply } from '../../../src/nbd/constants.js';
import { parseAccessRule } from '../../../src/nbd/server/access.js';
import type { ExportEntry } from '../../../src/nbd/server/exports.js';
import { Listener, type ListenerParameters } from '../../../src/nbd/server/listener.js';
import { startSession } from '../../../src/nbd/server/session.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import { encodeRequest } from '../../fakes/raw-client.js';
import {
  clientFlags,
  directory,
  GREETING_BYTES,
  infoData,
  option,
  readReplies,
} from '../../support/handshake.js';
import { makePki, type Pki } from '../../support/pki.js';
import { eventually, RawClient, within } from '../../support/raw-client.js';

/** INFO_EXPORT and ACK. */
const GO_ANSWER_BYTES = 20 + 12 + 20;
const ACK_BYTES = 20;
const SIZE = 1 << 20;

let folder: string;
let lines: { level: number; kind?: string; peer?: string; export?: string; client?: string; msg: string }[];
let cleanups: (() => unknown)[];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-clients-'));
  lines = [];
  cleanups = [() => rmSync(folder, { recursive: true })];
});
afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
});

/** An export whose device counts how often it was opened. */
class Disk implements ExportEntry {
  readonly device = new MemoryDevice(SIZE);
  opened = 0;
  readonly name: string;
  readonly description = '';
  readonly size = SIZE;
  readonly readOnly = false;
  readonly contexts = [];
  readonly preferredBlock = 4096;
  readonly multiConn = true;
  connectionsMax?: number;
  tlsOnly?: boolean;
  access?: ExportEntry['access'] & {};

  constructor(name: string, rules?: string[]) {
    this.name = name;
    if (rules !== undefined) this.access = rules.map(parseAccessRule);
  }

  open(): MemoryDevice {
    this.opened++;
    return this.device;
  }
}

interface Served {
  listener: Listener;
  /** Of the unix socket. */
  path: string;
  /** By how it begins, e.g. 'nbd://127'. */
  uri(start: string, name?: string): string;
}

async function serve(
  disks: ExportEntry[],
  changes: Partial<ListenerParameters> = {},
  hosts = ['127.0.0.1:0'],
): Promise<Served> {
  const path = join(folder, 's');
  const listener = await Listener.open({
    addresses: [`unix:${path}`, ...hosts].map(parseListenAddress),
    exports: directory(...disks),
    startSession,
    log: pino({}, { write: (line: string) => lines.push(JSON.parse(line)) }),
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 1000,
    ...changes,
  });
  cleanups.push(() => listener.close());
  const uri = (start: string, name = 'disk') => {
    const found = listener.addresses(name).find((known) => known.startsWith(start));
    assert.ok(found, `${start} among ${listener.addresses(name)}`);
    return found;
  };
  return { listener, path, uri };
}

async function raw({ path }: Served): Promise<RawClient> {
  const client = await RawClient.connect({ path });
  cleanups.push(() => client.close());
  return client;
}

/** Past GO, in transmission. */
async function enter(served: Served, name = 'disk'): Promise<RawClient> {
  const client = await raw(served);
  client.send(clientFlags(), option(Option.GO, infoData(name)));
  await client.receive(GREETING_BYTES + GO_ANSWER_BYTES);
  return client;
}

/** The refusal of a GO; the client is left in the handshake. */
async function refusedAt(client: RawClient, name = 'disk'): Promise<{ type: number; message: string }> {
  client.send(option(Option.GO, infoData(name)));
  const header = await client.receive(20);
  const data = await client.receive(header.readUInt32BE(16));
  const [reply] = readReplies(Buffer.concat([header, data]));
  return { type: reply!.type, message: data.toString() };
}

async function greeted(served: Served): Promise<RawClient> {
  const client = await raw(served);
  await client.receive(GREETING_BYTES);
  client.send(clientFlags());
  return client;
}

/** What a client may do there. */
async function gradeAt(uri: string, tls?: object): Promise<'none' | 'read' | 'write'> {
  let client: NbdClient;
  try {
    client = await NbdClient.connect(uri, tls === undefined ? {} : { tls });
  } catch (error) {
    assert.equal((error as { code?: string }).code, 'not-found', `${uri}: ${error}`);
    return 'none';
  }
  try {
    await client.read(0, 4096, Buffer.alloc(4096));
    const { readOnly } = client.info;
    const written = client.write(0, Buffer.alloc(512, 1), 0, 512);
    if (readOnly) await assert.rejects(written);
    else await written;
    return readOnly ? 'read' : 'write';
  } finally {
    await client.close();
  }
}

describe('access by address', () => {
  test('IPv4, IPv6 and unix sockets', async (context) => {
    const disk = new Disk('disk', ['write:address=127.0.0.0/8', 'read:address=::1']);
    let served: Served;
    try {
      served = await serve([disk], {}, ['127.0.0.1:0', '[::1]:0']);
    } catch (error) {
      context.skip(`no IPv6 loopback here: ${error}`);
      return;
    }
    assert.equal(await gradeAt(served.uri('nbd://127')), 'write');
    assert.equal(await gradeAt(served.uri('nbd://[')), 'read');
    assert.equal(disk.opened, 2);
    assert.equal(await gradeAt(served.uri('nbd+unix')), 'none');
    assert.equal(disk.opened, 2, 'who may not see it does not open it');
  });

  test('IPv4 at a socket of IPv6', async (context) => {
    let served: Served;
    try {
      served = await serve([new Disk('disk', ['read:address=127.0.0.1'])], {}, ['[::ffff:127.0.0.1]:0']);
    } catch (error) {
      context.skip(`no IPv6 here: ${error}`);
      return;
    }
    assert.equal(await gradeAt(served.uri('nbd://[')), 'read');
  });

  test('unix sockets only', async () => {
    const served = await serve([new Disk('disk', ['write:unix'])]);
    assert.equal(await gradeAt(served.uri('nbd+unix')), 'write');
    assert.equal(await gradeAt(served.uri('nbd://127')), 'none');
  });

  test('each export has its own rules, and LIST shows what a client may see', async () => {
    const disks = [
      new Disk('open'),
      new Disk('local', ['write:unix']),
      new Disk('remote', ['read:address=127.0.0.1']),
    ];
    const served = await serve(disks);
    const names = async (start: string) => (await NbdClient.list(served.uri(start))).map(({ name }) => name);
    assert.deepEqual(await names('nbd+unix'), ['open', 'local']);
    assert.deepEqual(await names('nbd://127'), ['open', 'remote']);
    assert.equal(
      disks.reduce((sum, { opened }) => sum + opened, 0),
      0,
    );
  });

  test('a reader that writes all the same gets EPERM, and the device hears nothing of it', async () => {
    const disk = new Disk('disk', ['read']);
    const client = await enter(await serve([disk]));
    const { WRITE, TRIM, WRITE_ZEROES, READ } = Command;
    client.send(
      encodeRequest({ cookie: 1, command: WRITE, payload: Buffer.alloc(4096, 1) }),
      encodeRequest({ cookie: 2, command: TRIM, length: 4096 }),
      encodeRequest({ cookie: 3, command: WRITE_ZEROES, length: 4096 }),
    );
    const replies = await client.receive(3 * 16);
    assert.deepEqual(
      [0, 16, 32].map((at) => replies.readUInt32BE(at + 4)),
      [Errno.EPERM, Errno.EPERM, Errno.EPERM],
    );
    client.send(encodeRequest({ cookie: 4, command: READ, length: 4096 }));
    assert.equal((await client.receive(16 + 4096)).readUInt32BE(4), Errno.OK);
    assert.deepEqual(
      disk.device.calls.map(({ kind }) => kind),
      ['read'],
    );
  });

  test('whom the rules keep out is logged once, with its address', async () => {
    const served = await serve([new Disk('disk', ['write:unix'])]);
    for (let count = 0; count < 3; count++) await gradeAt(served.uri('nbd://127'));
    const found = lines.filter(({ kind }) => kind === 'access');
    assert.equal(found.length, 1);
    assert.match(found[0]!.peer!, /^127\.0\.0\.1 port \d+$/);
    assert.equal(found[0]!.export, 'disk');
  });
});

describe('access by name', () => {
  let pki: Pki;
  before(() => {
    pki = makePki();
  });
  after(() => pki.remove());

  test('of a certificate', async () => {
    const disks = [
      new Disk('mine', ['write:certificate=tester']),
      new Disk('other', ['write:certificate=somebody else']),
      new Disk('any', ['read:certificate=*']),
      new Disk('key', ['write:psk=tester']),
      new Disk('both', ['write:certificate=tester,address=127.0.0.1', 'read:certificate=tester']),
    ];
    const tls = { mode: 'allowed', certificates: pki.good, verifyPeer: true } as const;
    const served = await serve(disks, { tls });
    const grades = async (start: string, settings?: object) =>
      Object.fromEntries(
        await Promise.all(
          disks.map(async ({ name }) => [name, await gradeAt(served.uri(start, name), settings)]),
        ),
      );
    const client = { certificates: pki.good };
    const remote = { mine: 'write', other: 'none', any: 'read', key: 'none', both: 'write' };
    assert.deepEqual(await grades('nbds://', { ...client, hostname: 'localhost' }), remote);
    assert.deepEqual(await grades('nbds+unix', client), { ...remote, both: 'read' });
    const plain = { mine: 'none', other: 'none', any: 'none', key: 'none', both: 'none' };
    assert.deepEqual(await grades('nbd://'), plain);
    assert.deepEqual(await grades('nbd+unix'), plain);
    assert.equal(lines.find(({ kind }) => kind === 'access')?.level, 40);
  });

  test('of a certificate nobody asked for: it proves nothing', async () => {
    const tls = { mode: 'required', certificates: pki.good } as const;
    const served = await serve([new Disk('disk', ['write:certificate=tester'])], { tls });
    assert.equal(await gradeAt(served.uri('nbds+unix'), { certificates: pki.good }), 'none');
  });

  test('of a key', async () => {
    const tls = { mode: 'allowed', pskFile: pki.keys } as const;
    const served = await serve([new Disk('disk', ['write:psk=alice', 'none:psk=bob', 'read:psk=*'])], {
      tls,
    });
    const as = (username: string) => gradeAt(served.uri('nbds+unix'), { pskFile: pki.keys, username });
    assert.equal(await as('alice'), 'write');
    assert.equal(await as('bob'), 'none');
    assert.equal(await gradeAt(served.uri('nbd+unix')), 'none');
    assert.equal(lines.find(({ kind }) => kind === 'access')?.client, 'bob');
  });

  test('an export for TLS only says so, to those whom TLS could help', async () => {
    const disk = new Disk('disk', ['none:address=127.0.0.1', 'write:psk=alice']);
    disk.tlsOnly = true;
    const served = await serve([disk], { tls: { mode: 'allowed', pskFile: pki.keys } });
    assert.equal((await refusedAt(await greeted(served))).type, OptionReply.ERR_TLS_REQD);
    assert.equal(await gradeAt(served.uri('nbd://127')), 'none');
  });

  test('clients that stop within TLS, or behind it, give way as all others', async () => {
    const tls = { mode: 'required', certificates: pki.good } as const;
    const served = await serve([new Disk('disk')], { tls, handshakesMax: 3, handshakeTimeoutMs: 60_000 });
    const asked = async () => {
      const client = await greeted(served);
      client.send(option(Option.STARTTLS));
      await client.receive(ACK_BYTES);
      return client;
    };
    const first = await asked();
    for (let count = 0; count < 5; count++) await asked();
    await first.receiveAll();
    let cutOff = 0;
    for (let count = 0; count < 5; count++) {
      const { socket } = await asked();
      socket.removeAllListeners('data');
      const secured = connectTls({ socket, rejectUnauthorized: false });
      cleanups.push(() => secured.destroy());
      secured.on('error', () => {});
      secured.once('close', () => cutOff++);
      secured.once('end', () => secured.destroy());
      await within(once(secured, 'secureConnect'), 'TLS');
      secured.resume();
    }
    assert.equal(await gradeAt(served.uri('nbds+unix'), { certificates: pki.good }), 'write');
    await eventually(() => cutOff === 3, 'two of five to be left');
    assert.deepEqual(new Set(lines.map(({ kind }) => kind)), new Set(['handshakes-max']));
  });

  test('places are given back by handshakes of TLS that fail', async () => {
    const tls = { mode: 'required', pskFile: pki.keys } as const;
    const served = await serve([new Disk('disk')], { tls, handshakesMax: 2, connectionsMax: 1 });
    for (let count = 0; count < 5; count++) {
      const settings = { pskFile: pki.wrongKeys, username: 'alice' };
      await assert.rejects(NbdClient.connect(served.uri('nbds+unix'), { tls: settings }), { code: 'tls' });
    }
    const alice = { pskFile: pki.keys, username: 'alice' };
    for (let count = 0; count < 3; count++) {
      await eventually(() => served.listener.connections('disk') === 0, 'the place');
      assert.equal(await gradeAt(served.uri('nbds+unix'), alice), 'write');
    }
    assert.equal(
      lines.some(({ kind }) => kind === 'handshakes-max' || kind === 'connections-max'),
      false,
    );
  });
});

describe('clients in transmission', () => {
  test('beyond those there may be in all, GO is refused with the reason, and the handshake goes on', async () => {
    const [disk, data] = [new Disk('disk'), new Disk('data')];
    const served = await serve([disk, data], { connectionsMax: 2 });
    const first = await enter(served);
    await enter(served, 'data');
    const third = await greeted(served);
    for (const name of ['disk', 'data']) {
      const { type, message } = await refusedAt(third, name);
      assert.equal(type, OptionReply.ERR_POLICY);
      assert.match(message, /has all 2 connections it may have/);
    }
    assert.equal((await refusedAt(third, 'nothing')).type, OptionReply.ERR_UNKNOWN);
    assert.deepEqual([disk.opened, data.opened], [1, 1]);
    assert.deepEqual(
      lines.map(({ kind }) => kind),
      ['connections-max'],
    );
    first.close();
    await eventually(() => served.listener.connections('disk') === 0, 'the place');
    third.send(option(Option.GO, infoData('disk')));
    await third.receive(GO_ANSWER_BYTES);
    assert.equal(disk.opened, 2);
  });

  test('beyond those of an export, others are served', async () => {
    const disk = new Disk('disk');
    disk.connectionsMax = 1;
    const served = await serve([disk, new Disk('data')]);
    await enter(served);
    const second = await greeted(served);
    assert.match((await refusedAt(second)).message, /export "disk" has all 1 connections/);
    second.send(option(Option.GO, infoData('data')));
    await second.receive(GO_ANSWER_BYTES);
  });

  test('EXPORT_NAME beyond them ends the connection', async () => {
    const disk = new Disk('disk');
    const served = await serve([disk], { connectionsMax: 1 });
    await enter(served);
    const second = await greeted(served);
    second.send(option(Option.EXPORT_NAME, Buffer.from('disk')));
    assert.equal((await second.receiveAll()).length, 0);
    assert.equal(disk.opened, 1);
  });

  const ways: Record<string, (client: RawClient) => unknown> = {
    'says DISC and closes': (client) => {
      client.send(encodeRequest({ cookie: 1, command: Command.DISC }));
      client.socket.end();
    },
    'says DISC and never closes its side': (client) =>
      client.send(encodeRequest({ cookie: 1, command: Command.DISC })),
    'ends its side': (client) => client.socket.end(),
    closes: (client) => client.close(),
    'sends garbage': (client) => client.send(Buffer.alloc(64, 0x55)),
    'closes within a request': (client) => {
      client.send(encodeRequest({ cookie: 1, command: Command.WRITE, length: 4096 }));
      client.socket.end();
    },
    'closes with a read under way': (client) => {
      client.send(encodeRequest({ cookie: 1, command: Command.READ, length: 1 << 20 }));
      client.close();
    },
  };
  for (const [way, leave] of Object.entries(ways))
    test(`a client that ${way} gives its place back`, async () => {
      const disk = new Disk('disk');
      disk.connectionsMax = 1;
      const served = await serve([disk]);
      for (let count = 0; count < 2; count++) {
        await leave(await enter(served));
        await eventually(() => served.listener.connections('disk') === 0, 'the place');
      }
      assert.deepEqual([disk.opened, disk.device.released], [2, 2]);
    });

  test('a client that resets TCP gives its place back', async () => {
    const disk = new Disk('disk');
    disk.connectionsMax = 1;
    const served = await serve([disk]);
    const port = Number(new URL(served.uri('nbd://127')).port);
    for (let count = 0; count < 3; count++) {
      const client = await RawClient.connect({ host: '127.0.0.1', port });
      client.send(clientFlags(), option(Option.GO, infoData('disk')));
      await client.receive(GREETING_BYTES + GO_ANSWER_BYTES);
      client.socket.resetAndDestroy();
      await eventually(() => served.listener.connections('disk') === 0, 'the place');
    }
  });

  test('a session that cannot begin, and an export that cannot be opened, take none', async () => {
    const disk = new Disk('disk');
    const served = await serve([disk], {
      connectionsMax: 1,
      startSession: (socket, parameters) => {
        if (disk.opened <= 2) throw new Error('no');
        return startSession(socket, parameters);
      },
    });
    for (let count = 0; count < 2; count++) {
      const client = await greeted(served);
      client.send(option(Option.GO, infoData('disk')));
      await client.receiveAll();
    }
    await enter(served);
    assert.equal(disk.device.released, 2);
  });

  test('a client that is gone counts until its requests are over: many of them cannot pile up', async () => {
    const disk = new Disk('disk');
    disk.connectionsMax = 1;
    disk.device.manner = () => 'held';
    const served = await serve([disk]);
    const first = await enter(served);
    first.send(encodeRequest({ cookie: 1, command: Command.READ, length: 4096 }));
    await eventually(() => disk.device.held.length === 1, 'the read');
    first.close();
    const second = await greeted(served);
    assert.equal((await refusedAt(second)).type, OptionReply.ERR_POLICY);
    disk.device.held[0]!.complete(0);
    await eventually(() => served.listener.connections('disk') === 0, 'the place');
    second.send(option(Option.GO, infoData('disk')));
    await second.receive(GO_ANSWER_BYTES);
  });
});

describe('clients in the handshake', () => {
  test('many that say nothing do not keep others out', async () => {
    const served = await serve([new Disk('disk')], { handshakesMax: 8, handshakeTimeoutMs: 60_000 });
    const slow = await Promise.all(Array.from({ length: 40 }, () => raw(served)));
    const client = await enter(served);
    client.send(encodeRequest({ cookie: 1, command: Command.READ, length: 512 }));
    await client.receive(16 + 512);
    // The oldest were cut off, the last ones are still there.
    await slow[0]!.receiveAll();
    await slow[39]!.receive(GREETING_BYTES);
    assert.deepEqual(
      lines.map(({ kind }) => kind),
      ['handshakes-max'],
    );
  });

  test('nor does one address keep another out that is slow for good reason', async () => {
    const served = await serve([new Disk('disk')], { handshakesMax: 4 });
    const port = Number(new URL(served.uri('nbd://127')).port);
    const far = await RawClient.connect({ host: '127.0.0.1', port });
    cleanups.push(() => far.close());
    await far.receive(GREETING_BYTES);
    for (let count = 0; count < 20; count++) await greeted(served);
    far.send(clientFlags(), option(Option.GO, infoData('disk')));
    await far.receive(GO_ANSWER_BYTES);
  });

  test('those in transmission are never disturbed, and take no place in the handshake', async () => {
    const served = await serve([new Disk('disk')], { handshakesMax: 2 });
    const clients = [];
    for (let count = 0; count < 6; count++) clients.push(await enter(served));
    for (let count = 0; count < 6; count++) await greeted(served);
    for (const client of clients) {
      client.send(encodeRequest({ cookie: 1, command: Command.READ, length: 512 }));
      await client.receive(16 + 512);
    }
    assert.equal(served.listener.connections('disk'), 6);
  });

  test('a client that was refused EXPORT_NAME or says ABORT and stays is the first to go', async () => {
    const served = await serve([new Disk('disk')], { handshakesMax: 2, handshakeTimeoutMs: 60_000 });
    for (let count = 0; count < 4; count++) {
      const client = await greeted(served);
      client.send(option(Option.ABORT));
      await client.receive(ACK_BYTES); // it does not close its side
    }
    await enter(served);
  });

  test('those cut off for newer ones do not hold up the end', async () => {
    const served = await serve([new Disk('disk')], { handshakesMax: 1, handshakeDrainTimeoutMs: 60_000 });
    for (let count = 0; count < 5; count++) await raw(served);
    const last = await greeted(served);
    last.close();
    await within(served.listener.close(), 'close');
  });
});
