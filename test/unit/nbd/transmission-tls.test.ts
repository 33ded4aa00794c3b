/**
 * The transmission phase over TLS beside the same in clear text, through a real listener: hold, back-pressure, drain and abort. One
 * implementation serves both, but what it reads from and writes to differs.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import type net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, beforeEach, describe, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import tls from 'node:tls';
import { pino } from 'pino';
import {
  Command,
  Errno,
  IN_FLIGHT_BYTES_MAX,
  IN_FLIGHT_REQUESTS_MAX,
  Option,
  UNSENT_BYTES_MAX,
} from '../../../src/nbd/constants.js';
import { Listener } from '../../../src/nbd/server/listener.js';
import { type Session, startSession } from '../../../src/nbd/server/session.js';
import type { MemoryDevice } from '../../fakes/memory-device.js';
import { RawClient as SessionClient, until } from '../../fakes/raw-client.js';
import { diskOf } from '../../support/disk.js';
import { clientFlags, GREETING_BYTES, infoData, option } from '../../support/handshake.js';
import { makePki, type Pki } from '../../support/pki.js';
import { RawClient, within } from '../../support/raw-client.js';

const SIZE = 8 << 20;
const ACK_BYTES = 20;
const GO_ANSWER_BYTES = 20 + 12 + 20;
const { READ, WRITE, FLUSH, DISC } = Command;

let pki: Pki;
before(() => {
  pki = makePki();
});
after(() => pki.remove());

let folder: string;
let device: MemoryDevice;
let listener: Listener;
let sessions: Session[];
let clients: net.Socket[];
let errors: string[];
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-tls-'));
  sessions = [];
  clients = [];
  errors = [];
  const disk = diskOf(SIZE);
  device = disk.device;
  listener = await Listener.open({
    addresses: [{ kind: 'unix', path: join(folder, 's') }],
    exports: disk.exports,
    startSession: (socket, parameters) => {
      const session = startSession(socket, parameters);
      sessions.push(session);
      return session;
    },
    log: pino({ level: 'error' }, { write: (line: string) => errors.push(line) }),
    tls: { mode: 'allowed', certificates: pki.good, verifyPeer: true },
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 5000,
  });
});
afterEach(async () => {
  for (const client of clients) client.destroy();
  device.manner = () => 'now';
  device.completeHeld();
  await listener.close();
  for (const session of sessions) {
    await within(session.closed, 'the session to be over');
    assert.deepEqual([session.inFlight, session.inFlightBytes], [0, 0], 'all memory is given back');
  }
  assert.equal(device.released, sessions.length);
  assert.deepEqual(errors, []);
  rmSync(folder, { recursive: true });
});

/** Past GO. Who reads it now must do so at once. */
async function entered(over: 'clear text' | 'TLS', version?: 'TLSv1.2'): Promise<net.Socket> {
  const raw = await RawClient.connect({ path: join(folder, 's') });
  await raw.receive(GREETING_BYTES);
  raw.send(clientFlags());
  let socket: net.Socket = raw.socket;
  if (over === 'TLS') {
    raw.send(option(Option.STARTTLS));
    await raw.receive(ACK_BYTES);
    const file = (name: string): Buffer => readFileSync(join(pki.good, name));
    socket.removeAllListeners('data');
    socket = tls.connect({
      socket,
      ca: file('ca-cert.pem'),
      cert: file('client-cert.pem'),
      key: file('client-key.pem'),
      servername: 'localhost',
      ...(version === undefined ? {} : { maxVersion: version }),
    });
    await within(once(socket, 'secureConnect'), 'TLS');
    socket.on('error', () => {});
    clients.push(socket);
    socket.write(option(Option.GO, infoData('disk')));
    while (socket.read(GO_ANSWER_BYTES) === null) await within(once(socket, 'readable'), 'the answer to GO');
    socket.removeAllListeners('readable');
    await delay(0); // Node takes note of that on the next tick only, and would undo a pause
    return socket;
  }
  clients.push(socket);
  raw.send(option(Option.GO, infoData('disk')));
  await raw.receive(GO_ANSWER_BYTES);
  socket.removeAllListeners('data');
  return socket;
}

async function connected(over: 'clear text' | 'TLS'): Promise<SessionClient> {
  return new SessionClient(await entered(over), false);
}

/** Waits until `count` has not changed for a while. */
async function settled(count: () => number): Promise<void> {
  for (let last = -1; last !== count(); ) {
    last = count();
    await delay(60);
  }
}

const contentAt = (offset: number, length: number): Buffer => device.data.subarray(offset, offset + length);

for (const over of ['clear text', 'TLS'] as const) {
  describe(`transmission in ${over}`, () => {
    test('a client that does not read: work and memory are bounded, and the server stops reading', async () => {
      const client = await connected(over);
      client.socket.pause();
      const length = 256 << 10;
      const round = (first: number) =>
        Buffer.concat(
          Array.from({ length: 20_000 }, (_, i) =>
            client.encode({ command: READ, cookie: first + i, offset: 0, length }),
          ),
        );
      // More than all buffers on the way hold.
      for (let i = 0; i < 8; i++) client.socket.write(round(i * 20_000));
      await settled(() => device.calls.length);
      assert.ok(device.calls.length <= IN_FLIGHT_BYTES_MAX / length + 8, `${device.calls.length} were begun`);
      assert.ok(sessions[0]!.inFlightBytes <= IN_FLIGHT_BYTES_MAX + (1 << 20));
      assert.ok(client.socket.writableLength > 0, 'not all requests were taken');
      const before = process.memoryUsage();
      await delay(100);
      const now = process.memoryUsage();
      assert.ok(now.external + now.arrayBuffers - before.external - before.arrayBuffers < 32 << 20);
    });

    test('a slow reader gets all of it, whole and right', async () => {
      const client = await connected(over);
      client.socket.pause();
      const length = 64 << 10;
      const count = 3000; // 188 MiB: stalls
      for (let cookie = 0; cookie < count; cookie++)
        client.socket.write(
          client.encode({ command: READ, cookie, offset: (cookie * 4096) % (SIZE - length), length }),
        );
      await settled(() => device.calls.length);
      assert.ok(device.calls.length < count, 'it is stalled');
      const seen = new Set<number>();
      client.socket.on('data', () => {
        client.socket.pause();
        for (const { cookie, data } of client.replies.splice(0)) {
          seen.add(cookie);
          assert.ok(data!.equals(contentAt((cookie * 4096) % (SIZE - length), length)));
        }
        setImmediate(() => client.socket.resume());
      });
      client.socket.resume();
      await until(() => seen.size === count, 30_000);
      assert.equal(client.grammarError, null);
      await until(() => sessions[0]!.inFlightBytes === 0);
    });

    test('requests the device holds: reading stops, and goes on when they are done', async () => {
      const client = await connected(over);
      device.manner = () => 'held';
      const count = 3 * IN_FLIGHT_REQUESTS_MAX;
      const payload = Buffer.alloc(4096, 7);
      client.send(...Array.from({ length: count }, (_, cookie) => ({ command: WRITE, cookie, payload })));
      await until(() => device.held.length === IN_FLIGHT_REQUESTS_MAX);
      await settled(() => device.held.length);
      assert.equal(sessions[0]!.inFlight, IN_FLIGHT_REQUESTS_MAX);
      device.manner = () => 'turn';
      device.completeHeld();
      const replies = await client.got(count);
      assert.equal(new Set(replies.map(({ cookie }) => cookie)).size, count);
    });

    test('a drain: what is in flight is answered, what comes is ESHUTDOWN, then the server closes', async () => {
      const client = await connected(over);
      device.manner = ({ offset }) => (offset === 4096 ? 'held' : 'now');
      client.send({ command: READ, cookie: 1, offset: 4096, length: 4096 });
      await until(() => device.held.length === 1);
      const closing = listener.close();
      const { calls } = device;
      const begun = calls.length;
      client.send(
        { command: READ, cookie: 2, length: 4096 },
        { command: WRITE, cookie: 3, payload: Buffer.alloc(100_000) },
        { command: FLUSH, cookie: 4 },
      );
      for (const { cookie, errno } of await client.got(3))
        assert.equal(errno, Errno.ESHUTDOWN, `cookie ${cookie}`);
      assert.equal(calls.length, begun);
      device.completeHeld();
      const first = await client.reply(1);
      assert.ok(first.data!.equals(contentAt(4096, 4096)));
      await within(client.ended, 'the end');
      await closing;
    });

    test('a drain while the client does not read: it gets its answers when it does', async () => {
      const client = await connected(over);
      client.socket.pause();
      const length = 1 << 20;
      for (let cookie = 0; cookie < 20; cookie++)
        client.socket.write(client.encode({ command: READ, cookie, length }));
      await until(() => device.calls.length === 20);
      const closing = listener.close();
      client.send({ command: READ, cookie: 20, length });
      await delay(50);
      client.socket.resume();
      const replies = await client.got(21);
      for (const { cookie, errno, data } of replies)
        if (cookie < 20) assert.ok(data!.equals(contentAt(0, length)));
        else assert.equal(errno, Errno.ESHUTDOWN);
      await within(client.ended, 'the end');
      await closing;
    });

    test('DISC behind requests in flight: all are answered, then the server closes', async () => {
      const client = await connected(over);
      device.manner = () => 'held';
      client.send(...Array.from({ length: 50 }, (_, cookie) => ({ command: READ, cookie, length: 4096 })), {
        command: DISC,
        cookie: 99,
      });
      await until(() => device.held.length === 50);
      device.completeHeld((held) => held.reverse());
      await client.got(50);
      await within(client.ended, 'the end');
    });

    for (const how of ['goes', 'ends its side'] as const) {
      test(`a client that ${how} in the middle of a WRITE: nothing of it is written`, async () => {
        const client = await connected(over);
        const bytes = client.encode({ command: WRITE, cookie: 1, payload: Buffer.alloc(4 << 20, 0x66) });
        client.socket.write(bytes.subarray(0, 3 << 20));
        await until(() => (sessions[0]?.inFlightBytes ?? 0) > 4 << 20);
        if (how === 'goes') client.socket.destroy();
        else client.socket.end();
        await within(sessions[0]!.closed, 'the session to be over');
        assert.equal(device.calls.length, 0);
        assert.equal(sessions[0]!.inFlightBytes, 0);
      });
    }

    test('a client that goes in the middle of its answers: the session is over, its memory given back', async () => {
      const client = await connected(over);
      client.socket.pause();
      for (let cookie = 0; cookie < 200; cookie++)
        client.socket.write(client.encode({ command: READ, cookie, length: 1 << 20 }));
      await settled(() => device.calls.length);
      assert.ok(sessions[0]!.inFlightBytes > UNSENT_BYTES_MAX);
      client.socket.destroy();
      await within(sessions[0]!.closed, 'the session to be over');
      assert.equal(sessions[0]!.inFlightBytes, 0);
    });

    test('cut off by the server in the middle of everything', async () => {
      const client = await connected(over);
      device.manner = ({ kind }) => (kind === 'write' ? 'held' : 'now');
      client.socket.pause();
      for (let cookie = 0; cookie < 100; cookie++)
        client.socket.write(
          client.encode({ command: WRITE, cookie, offset: 0, payload: Buffer.alloc(65_536) }),
        );
      for (let cookie = 100; cookie < 200; cookie++)
        client.socket.write(client.encode({ command: READ, cookie, length: 1 << 20 }));
      await until(() => device.held.length === 100);
      sessions[0]!.destroy();
      await until(() => device.held.every(({ abandoned }) => abandoned));
      device.completeHeld();
      await within(sessions[0]!.closed, 'the session to be over');
    });

    test('many clients at once, of which half never read', async () => {
      const all = await Promise.all(Array.from({ length: 10 }, () => connected(over)));
      for (const [i, client] of all.entries()) {
        if (i % 2 === 0) client.socket.pause();
        for (let cookie = 0; cookie < 100; cookie++)
          client.socket.write(client.encode({ command: READ, cookie, offset: i * 4096, length: 256 << 10 }));
      }
      for (const [i, client] of all.entries()) {
        if (i % 2 === 0) continue;
        for (const { data } of await client.got(100)) assert.ok(data!.equals(contentAt(i * 4096, 256 << 10)));
      }
    });
  });
}

describe('transmission over TLS only', () => {
  test('a client that says goodbye in TLS while it still waits for answers', async () => {
    const client = await connected('TLS');
    client.send(...Array.from({ length: 20 }, (_, cookie) => ({ command: READ, cookie, length: 65_536 })));
    client.socket.end(); // close_notify
    const replies = await client.got(20);
    assert.ok(replies.every(({ data }) => data!.equals(contentAt(0, 65_536))));
    await within(sessions[0]!.closed, 'the session to be over');
  });

  test('damage on the wire ends the session, and no request of it is begun', async () => {
    const raw = await entered('TLS');
    const below = (raw as unknown as { _parent?: net.Socket })._parent;
    const client = new SessionClient(raw, false);
    await client.ask({ command: READ, cookie: 1, length: 16 });
    const begun = device.calls.length;
    assert.ok(below !== undefined);
    below.write(Buffer.alloc(600, 0x17));
    await within(client.ended, 'the end');
    assert.equal(device.calls.length, begun);
  });

  test('a client that wants to negotiate anew (TLS 1.2) is not followed, and harms nobody', async () => {
    const other = await connected('TLS');
    const socket = (await entered('TLS', 'TLSv1.2')) as tls.TLSSocket;
    socket.resume();
    for (let i = 0; i < 10 && !socket.destroyed; i++) socket.renegotiate({}, () => {});
    await delay(20);
    assert.equal((await other.ask({ command: READ, cookie: 1, length: 16 })).errno, 0);
  });
});
