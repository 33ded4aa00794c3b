import assert from 'node:assert/strict';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { type Logger, pino } from 'pino';
import { BlockferryError } from '../../../src/errors.js';
import { type ListenAddress, parseListenAddress } from '../../../src/nbd/address.js';
import { Option, OptionReply } from '../../../src/nbd/constants.js';
import { Listener, type ListenerParameters } from '../../../src/nbd/server/listener.js';
import { startSession } from '../../../src/nbd/server/session.js';
import {
  clientFlags,
  directory,
  entry,
  GREETING_BYTES,
  infoData,
  option,
  readReplies,
} from '../../support/handshake.js';
import { type IdleSession, idleSessions } from '../../support/idle-session.js';
import { eventually, RawClient, within } from '../../support/raw-client.js';

/** INFO_EXPORT and ACK: the answer to a GO that asks for nothing more. */
const GO_ANSWER_BYTES = 20 + 12 + 20;

let folder: string;
let log: Logger;
let lines: { level: number; kind?: string; msg: string }[];
let cleanups: (() => unknown)[];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-listener-'));
  lines = [];
  log = pino({}, { write: (line: string) => lines.push(JSON.parse(line)) });
  cleanups = [() => rmSync(folder, { recursive: true })];
});

afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
});

interface Served {
  listener: Listener;
  sessions: IdleSession[];
  exports: ReturnType<typeof directory>;
  connect(): Promise<RawClient>;
}

async function serve(address: string, changes: Partial<ListenerParameters> = {}): Promise<Served> {
  const { start, sessions } = idleSessions();
  const exports = directory(entry('disk'));
  const listener = await Listener.open({
    addresses: [parseListenAddress(address)],
    exports,
    startSession: start,
    log,
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 100,
    ...changes,
  });
  cleanups.push(() => listener.close());
  return { listener, sessions, exports, connect: () => connectTo(listener.addresses()[0]!) };
}

async function connectTo(uri: string): Promise<RawClient> {
  const url = new URL(uri);
  const path = url.searchParams.get('socket');
  const client = await RawClient.connect(
    path !== null ? { path } : { host: url.hostname.replace(/^\[|\]$/g, ''), port: Number(url.port) },
  );
  cleanups.push(() => client.close());
  return client;
}

/** Past GO. */
async function enter(served: Served): Promise<{ client: RawClient; session: IdleSession }> {
  const client = await served.connect();
  const before = served.sessions.length;
  client.send(clientFlags(), option(Option.GO, infoData('disk')));
  await client.receive(GREETING_BYTES + GO_ANSWER_BYTES);
  assert.equal(served.sessions.length, before + 1);
  return { client, session: served.sessions[before]! };
}

async function assertServes(served: Served): Promise<void> {
  const { client } = await enter(served);
  client.close();
}

function refusal(pattern: RegExp): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof BlockferryError);
    assert.equal(error.code, 'address');
    assert.match(error.message, pattern);
    assert.ok(!error.message.includes('\n'));
    return true;
  };
}

/** The socket a killed server leaves behind. */
async function leaveStaleSocket(path: string): Promise<void> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(`${path}.before`, resolve));
  renameSync(`${path}.before`, path);
  await new Promise((resolve) => server.close(resolve));
}

describe('listening', () => {
  test('TCP, port chosen by the system, with its NBD URI', async () => {
    const served = await serve('127.0.0.1:0');
    const [uri] = served.listener.addresses('disk');
    assert.match(uri!, /^nbd:\/\/127\.0\.0\.1:[1-9][0-9]*\/disk$/);
    await assertServes(served);
  });

  test('IPv6', async (context) => {
    let served: Served;
    try {
      served = await serve('[::1]:0');
    } catch (error) {
      context.skip(`no IPv6 loopback here: ${error}`);
      return;
    }
    assert.match(served.listener.addresses()[0]!, /^nbd:\/\/\[::1\]:[0-9]+\/$/);
    await assertServes(served);
  });

  test('a unix socket, removed at close', async () => {
    const path = join(folder, 'a b.sock');
    const served = await serve(`unix:${path}`);
    assert.deepEqual(served.listener.addresses('disk'), [
      `nbd+unix:///disk?socket=${path.replace(' ', '%20')}`,
    ]);
    await assertServes(served);
    await served.listener.close();
    assert.equal(existsSync(path), false);
  });

  test('several addresses at once', async () => {
    const addresses: ListenAddress[] = [
      { kind: 'unix', path: join(folder, 's') },
      { kind: 'tcp', host: '127.0.0.1', port: 0 },
    ];
    const { listener } = await serve('stdio', { addresses });
    assert.equal(listener.addresses().length, 2);
    for (const uri of listener.addresses()) await (await connectTo(uri)).receive(GREETING_BYTES);
  });

  test('one address that cannot be had: none is kept', async () => {
    const path = join(folder, 's');
    const taken = await serve('127.0.0.1:0');
    const port = Number(new URL(taken.listener.addresses()[0]!).port);
    const addresses: ListenAddress[] = [
      { kind: 'unix', path },
      { kind: 'tcp', host: '127.0.0.1', port },
    ];
    await assert.rejects(serve('stdio', { addresses }), refusal(/127\.0\.0\.1:\d+: the port is taken/));
    assert.equal(existsSync(path), false);
    await assertServes(taken);
  });

  test('a stale unix socket is replaced', async () => {
    const path = join(folder, 's');
    await leaveStaleSocket(path);
    assert.ok(existsSync(path));
    await assertServes(await serve(`unix:${path}`));
  });

  test('a live unix socket is refused and goes on', async () => {
    const path = join(folder, 's');
    const first = await serve(`unix:${path}`);
    await assert.rejects(serve(`unix:${path}`), refusal(/another server is listening there/));
    await assertServes(first);
  });

  test('a regular file at the path is never deleted', async () => {
    const path = join(folder, 'precious');
    writeFileSync(path, 'data');
    await assert.rejects(serve(`unix:${path}`), refusal(/a file that is no socket/));
    assert.equal(readFileSync(path, 'utf8'), 'data');
  });

  test('nor is a folder or a link, even one to a stale socket', async () => {
    const path = join(folder, 'folder');
    mkdirSync(path);
    await assert.rejects(serve(`unix:${path}`), refusal(/a file that is no socket/));
    await leaveStaleSocket(join(folder, 's'));
    symlinkSync(join(folder, 's'), join(folder, 'link'));
    await assert.rejects(serve(`unix:${join(folder, 'link')}`), refusal(/a file that is no socket/));
    assert.ok(existsSync(path) && existsSync(join(folder, 's')));
  });

  test('a folder that does not exist, an unknown host, a descriptor that is none', async () => {
    await assert.rejects(serve(`unix:${join(folder, 'no/s')}`), refusal(/the folder does not exist/));
    await assert.rejects(serve('no-such-host.invalid:0'), refusal(/the host name is not known/));
    await assert.rejects(serve('fd:9999'), refusal(/descriptor 9999 is no listening socket/));
  });
});

describe('connections', () => {
  test('the session gets device, agreement and the bytes that came early', async () => {
    const served = await serve('127.0.0.1:0');
    const client = await served.connect();
    const early = Buffer.from('early bytes, ');
    client.send(clientFlags(), option(Option.STRUCTURED_REPLY), option(Option.GO, infoData('disk')), early);
    await client.receive(GREETING_BYTES + 20 + GO_ANSWER_BYTES);
    client.send(Buffer.from('late bytes'));
    const [session] = served.sessions;
    await eventually(() => session!.received.toString() === 'early bytes, late bytes', 'all bytes');
    assert.equal(session!.parameters.structured, true);
    assert.equal(session!.parameters.device.size, 1 << 20);
  });

  test('bytes that come one at a time make no difference', async () => {
    const served = await serve('127.0.0.1:0');
    const client = await served.connect();
    for (const byte of Buffer.concat([clientFlags(), option(Option.GO, infoData('disk'))]))
      client.send(Buffer.from([byte]));
    await client.receive(GREETING_BYTES + GO_ANSWER_BYTES);
    await eventually(() => served.listener.connections('disk') === 1, 'the session');
  });

  test('are counted per export while in transmission', async () => {
    const served = await serve('127.0.0.1:0');
    const haggling = await served.connect();
    await haggling.receive(GREETING_BYTES);
    assert.equal(served.listener.connections('disk'), 0);
    const first = await enter(served);
    await enter(served);
    assert.equal(served.listener.connections('disk'), 2);
    assert.equal(served.listener.connections('other'), 0);
    first.client.close();
    await eventually(() => served.listener.connections('disk') === 1, 'the first to be gone');
  });

  test('ABORT is acknowledged, then the connection closed', async () => {
    const served = await serve('127.0.0.1:0');
    const client = await served.connect();
    client.send(clientFlags(), option(Option.ABORT));
    const replies = readReplies((await client.receiveAll()).subarray(GREETING_BYTES));
    assert.deepEqual(
      replies.map((reply) => reply.type),
      [OptionReply.ACK],
    );
    assert.equal(lines.length, 0);
  });

  test('a client that leaves in the middle, or sends ABORT and closes, is no trouble', async () => {
    const served = await serve('127.0.0.1:0');
    const leaving = await served.connect();
    leaving.send(clientFlags(), option(Option.LIST).subarray(0, 7));
    leaving.socket.end();
    await leaving.receiveAll();
    const aborting = await served.connect();
    aborting.send(clientFlags(), option(Option.ABORT));
    aborting.close();
    await assertServes(served);
  });

  test('garbage ends its own connection only, and is logged once', async () => {
    const served = await serve('127.0.0.1:0');
    const good = await enter(served);
    for (let count = 0; count < 5; count++) {
      const bad = await served.connect();
      bad.send(clientFlags(), Buffer.from('GET / HTTP/1.1\r\nHost: x\r\n\r\n'));
      await bad.receiveAll();
      const worse = await served.connect();
      worse.send(Buffer.alloc(1 << 20, 0xff));
      await worse.receiveAll();
    }
    const kinds = lines
      .map((line) => line.kind)
      .filter((kind) => kind !== undefined && !kind.startsWith('socket-'));
    assert.deepEqual(kinds.sort(), ['client-flags', 'option-magic']);
    good.client.send(Buffer.from('x'));
    await eventually(() => good.session.received.length === 1, 'the good client to be heard');
    await assertServes(served);
  });

  test('a handshake has a deadline', async () => {
    const served = await serve('127.0.0.1:0', { handshakeTimeoutMs: 50 });
    const slow = await served.connect();
    slow.send(clientFlags(), option(Option.LIST).subarray(0, 9));
    await slow.receiveAll();
    assert.deepEqual(
      lines.map((line) => line.kind),
      ['timeout'],
    );
  });

  test('a session has no such deadline', async () => {
    const served = await serve('127.0.0.1:0', { handshakeTimeoutMs: 50 });
    const { session } = await enter(served);
    const slow = await served.connect();
    await slow.receiveAll(); // its deadline is later than that of the session's handshake
    assert.equal(session.socket.destroyed, false);
    assert.equal(served.listener.connections('disk'), 1);
  });

  test('a client that does not read its answers is not listened to meanwhile', async () => {
    const entries = Array.from({ length: 200 }, (_, index) =>
      entry(`d${index}`, { description: 'x'.repeat(4000) }),
    );
    let lists = 0;
    const exports = directory(...entries);
    const served = await serve(`unix:${join(folder, 's')}`, {
      exports: {
        ...exports,
        list() {
          lists++;
          return entries;
        },
      },
    });
    const client = await served.connect();
    client.socket.pause();
    client.send(clientFlags(), option(Option.LIST));
    await eventually(() => lists === 1, 'the first list');
    client.send(option(Option.LIST), option(Option.GO, infoData('d7')));
    // Another client gets all its answers meanwhile: it is not the server that is slow.
    for (let count = 0; count < 10; count++) await (await served.connect()).receive(GREETING_BYTES);
    assert.equal(lists, 1);
    client.socket.resume();
    const listed = 200 * (20 + 4 + 4000) + 10 * 2 + 90 * 3 + 100 * 4;
    await client.receive(GREETING_BYTES + 2 * (listed + 20) + GO_ANSWER_BYTES);
    assert.equal(served.listener.connections('d7'), 1);
    assert.equal(lists, 2);
  });

  test('an export that cannot be opened is logged with its reason', async () => {
    const broken = entry('disk', {
      open() {
        throw new Error('image is gone');
      },
    });
    const served = await serve('127.0.0.1:0', { exports: directory(broken) });
    const client = await served.connect();
    client.send(clientFlags(), option(Option.GO, infoData('disk')), option(Option.ABORT));
    const replies = readReplies((await client.receiveAll()).subarray(GREETING_BYTES));
    assert.deepEqual(
      replies.map((reply) => reply.type),
      [OptionReply.ERR_UNKNOWN, OptionReply.ACK],
    );
    assert.ok(JSON.stringify(lines).includes('image is gone'));
  });

  test('a fault of ours in the handshake or the session costs one connection', async () => {
    const served = await serve('127.0.0.1:0', {
      exports: {
        ...directory(entry('disk')),
        list() {
          throw new Error('a bug');
        },
      },
      startSession: (socket) => {
        socket.resume();
        return { closed: Promise.reject(new Error('another bug')), drain: async () => {}, destroy() {} };
      },
    });
    const listing = await served.connect();
    listing.send(clientFlags(), option(Option.LIST));
    await listing.receiveAll();
    const going = await served.connect();
    going.send(clientFlags(), option(Option.GO, infoData('disk')));
    await going.receiveAll();
    assert.equal(lines.length, 2);
    await (await served.connect()).receive(GREETING_BYTES);
  });

  test('a session that cannot start releases the device and closes the connection', async () => {
    const disk = entry('disk');
    const served = await serve('127.0.0.1:0', {
      exports: directory(disk),
      startSession: () => {
        throw new Error('no');
      },
    });
    const client = await served.connect();
    client.send(clientFlags(), option(Option.GO, infoData('disk')));
    await client.receiveAll();
    assert.equal(disk.opened[0]!.released, 1);
    assert.equal(lines.length, 1);
    await (await served.connect()).receive(GREETING_BYTES);
  });
});

describe('close', () => {
  test('drains the sessions, and no new client is let in', async () => {
    const served = await serve('127.0.0.1:0');
    const { client, session } = await enter(served);
    await within(served.listener.close(), 'close');
    assert.equal(session.drained, true);
    assert.equal(session.destroyed, false);
    await client.receiveAll();
    await assert.rejects(served.connect());
  });

  test('cuts off a session whose requests do not finish', async () => {
    const served = await serve('127.0.0.1:0');
    const { session } = await enter(served);
    session.drains = false;
    await within(served.listener.close(), 'close');
    assert.equal(session.drained, true);
    assert.equal(session.destroyed, true);
  });

  test('tells clients in the handshake ERR_SHUTDOWN, then cuts them off', async () => {
    const served = await serve('127.0.0.1:0', { handshakeDrainTimeoutMs: 300 });
    const client = await served.connect();
    await client.receive(GREETING_BYTES);
    client.send(clientFlags());
    const closing = served.listener.close();
    client.send(option(Option.GO, infoData('disk')));
    const replies = readReplies(await client.receiveAll());
    assert.deepEqual(
      replies.map((reply) => reply.type),
      [OptionReply.ERR_SHUTDOWN],
    );
    await within(closing, 'close');
    assert.equal(served.sessions.length, 0);
  });

  test('twice is the same as once', async () => {
    const { listener } = await serve('127.0.0.1:0');
    assert.equal(listener.close(), listener.close());
    await listener.close();
  });
});

test('requests that are none are logged once, however many clients send them', async () => {
  const served = await serve(`unix:${join(folder, 's')}`, { startSession });
  for (let count = 0; count < 3; count++) {
    const client = await served.connect();
    client.send(clientFlags(), option(Option.GO, infoData('disk')), Buffer.alloc(28, 0x41));
    assert.equal((await client.receiveAll()).length, GREETING_BYTES + GO_ANSWER_BYTES);
  }
  assert.deepEqual(
    lines.filter(({ level }) => level >= 40).map(({ kind }) => kind),
    ['request-magic'],
  );
});
