import assert from 'node:assert/strict';
import { once } from 'node:events';
import { afterEach, describe, it } from 'node:test';
import pino from 'pino';
import {
  ChunkType,
  Command,
  CommandFlag,
  Errno,
  IN_FLIGHT_BYTES_MAX,
  IN_FLIGHT_BYTES_TOTAL_MAX,
  IN_FLIGHT_REQUESTS_MAX,
  PAYLOAD_BYTES_MAX,
} from '../../../src/nbd/constants.js';
import {
  FLUSH_TIMEOUT_MS,
  type Session,
  type SessionParameters,
  startSession,
} from '../../../src/nbd/server/session.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import {
  connectedPair,
  encodeRequest,
  RawClient,
  type RawRequest,
  tcpPair,
  until,
} from '../../fakes/raw-client.js';

const SIZE = 1 << 20;
const { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const { FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO } = CommandFlag;

interface Rig {
  device: MemoryDevice;
  session: Session;
  client: RawClient;
}

const rigs: Rig[] = [];

function rig(
  options: Partial<SessionParameters> & {
    device?: MemoryDevice;
    transport?: 'descriptor' | 'events';
  } = {},
): Rig & { device: MemoryDevice } {
  const device = options.device ?? new MemoryDevice(SIZE);
  const structured = options.structured ?? false;
  const [server, socket] = connectedPair(options.transport ?? 'descriptor');
  const session = startSession(server, {
    device,
    structured,
    contexts: options.contexts ?? [],
    rest: options.rest ?? Buffer.alloc(0),
    log: options.log ?? pino({ level: 'silent' }),
  });
  const made = { device, session, client: new RawClient(socket, structured) };
  rigs.push(made);
  return made;
}

const BASE = [{ id: 1, name: 'base:allocation' }];

afterEach(async () => {
  for (const { session, client, device } of rigs.splice(0)) {
    client.socket.destroy();
    session.destroy();
    device.manner = () => 'now';
    device.completeHeld();
    await session.closed;
    assert.equal(device.released, 1, 'released exactly once');
    assert.equal(session.inFlight, 0);
  }
});

function pattern(length: number, seed = 1): Buffer {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i < length; i++) bytes[i] = (i * 7 + (i >> 8) * 13 + seed) & 0xff;
  return bytes;
}

for (const transport of ['descriptor', 'events'] as const) {
  describe(`session by ${transport}: data`, () => {
    for (const structured of [false, true]) {
      it(`reads and writes what the device holds (${structured ? 'structured' : 'simple'})`, async () => {
        const { device, client } = rig({ structured, transport });
        const payload = pattern(5000);
        const written = await client.ask({ command: WRITE, cookie: 1, offset: 123, payload });
        assert.deepEqual([written.errno, written.simple], [0, true]);
        assert.deepEqual(device.data.subarray(123, 5123), payload);
        const read = await client.ask({ command: READ, cookie: 2, offset: 123, length: 5000 });
        assert.deepEqual(read.data, payload);
        assert.equal(read.simple, !structured);
        assert.deepEqual(read.chunks, structured ? [ChunkType.OFFSET_DATA] : []);
      });
    }

    for (const manner of ['now', 'sync', 'turn'] as const) {
      it(`reads of every size class, answered ${manner}`, async () => {
        const device = new MemoryDevice(4 << 20);
        pattern(4 << 20).copy(device.data);
        device.manner = () => manner;
        const { client } = rig({ structured: true, device, transport });
        const lengths = [1, 511, 4096, 4097, 65_536, 131_072, 131_073, 524_288, 524_289, 1 << 20, 3 << 20];
        client.send(
          ...lengths.map((length, i): RawRequest => ({ command: READ, cookie: i, offset: i * 3, length })),
        );
        await client.got(lengths.length);
        for (const [i, length] of lengths.entries()) {
          assert.ok((await client.reply(i)).data!.equals(device.data.subarray(i * 3, i * 3 + length)));
        }
      });

      it(`writes cut at every kind of boundary, answered ${manner}`, async () => {
        const { device, client } = rig({ transport });
        device.manner = () => manner;
        const request = (cookie: number) =>
          encodeRequest({ command: WRITE, cookie, offset: cookie * 100, payload: pattern(64, cookie) });
        // in the magic, in the header, before the payload, in it, before its last byte, behind it
        const cuts = [1, 4, 8, 27, 28, 29, 60, 91, 92];
        for (const [i, cut] of cuts.entries()) {
          const bytes = request(i);
          client.socket.write(bytes.subarray(0, cut));
          await new Promise((resolve) => setImmediate(resolve));
          client.socket.write(bytes.subarray(cut));
          assert.equal((await client.reply(i)).errno, 0);
          assert.deepEqual(device.data.subarray(i * 100, i * 100 + 64), pattern(64, i));
        }
        assert.equal(device.calls.length, cuts.length);
      });
    }

    it('takes a stream of requests byte by byte', async () => {
      const { device, client } = rig({ transport });
      const bytes = Buffer.concat([
        encodeRequest({ command: WRITE, cookie: 1, offset: 8, payload: pattern(9) }),
        client.encode({ command: READ, cookie: 2, offset: 8, length: 9 }),
        encodeRequest({ command: WRITE, cookie: 3, offset: SIZE, payload: pattern(5) }),
        client.encode({ command: READ, cookie: 4, offset: 8, length: 9 }),
      ]);
      for (const byte of bytes) {
        client.socket.write(Buffer.of(byte));
        await new Promise((resolve) => setImmediate(resolve));
      }
      await client.got(4);
      assert.deepEqual((await client.reply(4)).data, pattern(9));
      assert.equal((await client.reply(3)).errno, Errno.ENOSPC);
      assert.equal(device.calls.length, 3);
    });

    it('begins with the bytes that came with the handshake, and those the old socket had read', async () => {
      const device = new MemoryDevice(SIZE);
      const [server, socket] = connectedPair(transport);
      const client = new RawClient(socket, false);
      const requests = [0, 1, 2, 3].map((cookie) =>
        encodeRequest({ command: WRITE, cookie, offset: cookie * 16, payload: pattern(16, cookie) }),
      );
      socket.write(Buffer.concat(requests.slice(1)).subarray(10));
      await until(() => server.readableLength > 0);
      server.write(''); // something that is not flushed yet when the session starts
      const rest = Buffer.concat([requests[0]!, requests[1]!.subarray(0, 10)]);
      const session = startSession(server, {
        device,
        structured: false,
        contexts: [],
        rest,
        log: pino({ level: 'silent' }),
      });
      rigs.push({ device, session, client });
      await client.got(4);
      for (let i = 0; i < 4; i++) assert.deepEqual(device.data.subarray(i * 16, i * 16 + 16), pattern(16, i));
    });

    it('answers thousands of requests that arrive together', async () => {
      const { device, client } = rig({ transport, structured: true });
      pattern(SIZE).copy(device.data);
      const count = 9000;
      client.send(
        ...Array.from({ length: count }, (_, cookie) => ({
          command: READ,
          cookie,
          offset: (cookie * 4096) % SIZE,
          length: 4096,
        })),
      );
      const replies = await client.got(count);
      const seen = new Set(replies.map((reply) => reply.cookie));
      assert.equal(seen.size, count);
      for (const { cookie, data } of replies) {
        const offset = (cookie * 4096) % SIZE;
        assert.ok(data!.equals(device.data.subarray(offset, offset + 4096)));
      }
    });
  });

  describe(`session by ${transport}: life`, () => {
    it('DISC: finishes outstanding requests, sends their answers, closes', async () => {
      const { device, client, session } = rig({ transport });
      device.manner = () => 'held';
      client.send(
        { command: READ, cookie: 1, length: 10 },
        { command: WRITE, cookie: 2, payload: pattern(10) },
        { command: DISC, cookie: 3 },
      );
      await until(() => device.held.length === 2);
      assert.ok(!device.held[0]!.abandoned);
      device.completeHeld((held) => held.reverse());
      await client.ended;
      await session.closed;
      assert.equal(client.replies.length, 2);
      assert.deepEqual((await client.reply(1)).data, pattern(10));
      assert.equal((await client.reply(2)).errno, 0);
    });

    it('DISC and end: writes in flight are not abandoned', async () => {
      const { device, client, session } = rig({ transport });
      device.manner = () => 'held';
      client.send({ command: WRITE, cookie: 2, payload: pattern(10) }, { command: DISC, cookie: 3 });
      client.socket.end();
      await until(() => device.held.length === 1);
      assert.ok(!device.held[0]!.abandoned);
      device.completeHeld();
      await session.closed;
      assert.deepEqual(device.data.subarray(0, 10), pattern(10));
    });

    it('DISC and gone: what was to be read is abandoned, writes are not', async () => {
      const { device, client } = rig({ transport });
      device.manner = () => 'held';
      client.send(
        { command: READ, cookie: 1, length: 10 },
        { command: WRITE, cookie: 2, payload: pattern(10) },
        { command: READ, cookie: 3, length: 10 },
        { command: DISC, cookie: 4 },
      );
      await until(() => device.held.length === 3);
      const [first, write, second] = device.held.splice(0);
      client.socket.destroy();
      await once(client.socket, 'close');
      first!.complete(0); // and the answer finds nobody
      await until(() => device.released === 1);
      assert.deepEqual([write!.abandoned, second!.abandoned], [false, true]);
      write!.complete(0);
      second!.complete(5);
    });

    it('DISC and the end of the client’s side: reads go on, but not for ever', async (t) => {
      const { device, client } = rig({ transport });
      device.manner = () => 'held';
      client.send({ command: READ, cookie: 1, length: 10 }, { command: DISC, cookie: 2 });
      await until(() => device.held.length === 1);
      t.mock.timers.enable({ apis: ['setTimeout'] });
      client.socket.end();
      for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
      assert.equal(device.held[0]!.abandoned, false);
      t.mock.timers.tick(FLUSH_TIMEOUT_MS);
      t.mock.timers.reset();
      await until(() => device.held[0]!.abandoned && device.released === 1);
    });

    it('DISC: what follows is ignored', async () => {
      const { device, client, session } = rig({ transport });
      client.send({ command: DISC, cookie: 1 }, { command: WRITE, cookie: 2, payload: pattern(10) });
      await session.closed;
      await client.ended;
      assert.deepEqual([client.replies.length, device.calls.length], [0, 0]);
    });

    it('the client goes with requests in flight: abandoned, completed once, released once', async () => {
      const { device, client, session } = rig({ transport });
      device.manner = () => 'held';
      client.send(
        { command: READ, cookie: 1, length: 4096 },
        { command: WRITE, cookie: 2, payload: pattern(4096) },
        { command: FLUSH, cookie: 3 },
      );
      await until(() => device.held.length === 3);
      client.socket.destroy();
      await until(() => device.held.every((request) => request.abandoned));
      await until(() => device.released === 1);
      assert.equal(session.inFlight, 3);
      let closed = false;
      session.closed.then(() => {
        closed = true;
      });
      await new Promise((resolve) => setTimeout(resolve, 20));
      assert.ok(!closed, 'not closed while the device has requests');
      device.completeHeld();
      await session.closed;
    });

    it('the client ends within a request', async () => {
      const { device, client, session } = rig({ transport });
      client.socket.end(encodeRequest({ command: WRITE, cookie: 1, payload: pattern(100) }).subarray(0, 77));
      await session.closed;
      assert.equal(device.calls.length, 0);
    });

    it('answers that are there when the client ends its side still reach it', async () => {
      const { client, session } = rig({ transport });
      client.socket.end(client.encode({ command: READ, cookie: 1, length: 8 }));
      assert.equal((await client.reply(1)).errno, 0);
      await session.closed;
    });

    it('a request without the magic: disconnected, earlier answers sent', async () => {
      const { device, client, session } = rig({ transport });
      client.send(
        { command: READ, cookie: 1, length: 8 },
        { command: WRITE, cookie: 2, payload: pattern(8), magic: 0x12345678 },
      );
      await client.ended;
      await session.closed;
      assert.deepEqual([client.replies.length, device.calls.length], [1, 1]);
    });

    it('drain: requests in flight finish, later ones get ESHUTDOWN, then it closes', async () => {
      const { device, client, session } = rig({ transport, structured: true });
      device.manner = () => 'held';
      client.send({ command: WRITE, cookie: 1, payload: pattern(10) });
      await until(() => device.held.length === 1);
      const drained = session.drain();
      const late: RawRequest[] = [
        { command: READ, cookie: 2, length: 10 },
        { command: WRITE, cookie: 3, payload: pattern(10) },
        { command: FLUSH, cookie: 4 },
        { command: BLOCK_STATUS, cookie: 5, length: 10 },
      ];
      client.send(...late);
      for (const reply of await client.got(4)) assert.equal(reply.errno, Errno.ESHUTDOWN);
      device.completeHeld();
      await drained;
      await client.ended;
      assert.equal((await client.reply(1)).errno, 0);
      assert.equal(device.calls.length, 1);
    });

    it('drain: a write that never comes whole does not hold it up', async () => {
      const { client, session } = rig({ transport });
      const read = client.encode({ command: READ, cookie: 1, length: 8 });
      const write = encodeRequest({ command: WRITE, cookie: 2, payload: pattern(9) });
      client.socket.write(Buffer.concat([read, write.subarray(0, 30)]));
      await client.got(1);
      await session.drain();
      await client.ended;
    });

    it('drain: a client that does not close is left', async () => {
      const { client, session } = rig({ transport });
      client.socket.removeAllListeners('end');
      await client.ask({ command: FLUSH, cookie: 1 });
      await session.drain();
    });

    it('drain of an idle session, twice', async () => {
      const { client, session } = rig({ transport });
      await client.ask({ command: FLUSH, cookie: 1 });
      await Promise.all([session.drain(), session.drain()]);
      await client.ended;
    });

    it('destroy at once, before anything came', async () => {
      const { session, client, device } = rig({ transport });
      session.destroy();
      await session.closed;
      await client.ended;
      assert.equal(device.released, 1);
    });

    it('drain at once, before anything came', async () => {
      const { session, client } = rig({ transport });
      await session.drain();
      await client.ended;
    });
  });

  describe(`session by ${transport}: limits`, () => {
    it('a client that never reads: bytes in flight stay bounded, and all goes on when it reads', async () => {
      const device = new MemoryDevice(64 << 20);
      const { client } = rig({ device, transport });
      client.socket.pause();
      const count = 9000;
      const length = 1 << 20;
      const requests = Array.from({ length: count }, (_, cookie) =>
        encodeRequest({ command: READ, cookie, offset: cookie % 4096, length }),
      );
      client.socket.write(Buffer.concat(requests));
      await until(() => device.calls.length > 16);
      await settled(() => device.calls.length);
      const most = IN_FLIGHT_BYTES_MAX / length + 16;
      assert.ok(device.calls.length <= most, `${device.calls.length} reads were begun`);
      client.socket.removeAllListeners('data');
      let bytes = 0;
      client.socket.on('data', (chunk: Buffer) => {
        bytes += chunk.length;
        if (bytes > 400 << 20) client.socket.destroy();
      });
      client.socket.resume();
      await client.ended;
      assert.ok(device.calls.length > most);
    });

    it('a client that never reads its errors', async () => {
      const { client, session, device } = rig({ transport });
      client.socket.pause();
      const wrong = Buffer.concat(
        Array.from({ length: 4096 }, (_, cookie) => encodeRequest({ command: 99, cookie })),
      );
      for (let i = 0; i < 20; i++) client.socket.write(wrong);
      client.socket.write(encodeRequest({ command: FLUSH, cookie: 1 }));
      await until(() => device.calls.length === 1);
      assert.equal(session.inFlight, 0);
      client.socket.resume();
      await client.got(20 * 4096 + 1);
    });

    it('reads of 64 MiB, thousands pipelined: two at most are in memory', async () => {
      const device = new MemoryDevice(PAYLOAD_BYTES_MAX);
      const { client } = rig({ device, transport });
      client.socket.pause();
      client.socket.write(
        Buffer.concat(
          Array.from({ length: 9000 }, (_, cookie) =>
            encodeRequest({ command: READ, cookie, length: PAYLOAD_BYTES_MAX }),
          ),
        ),
      );
      await until(() => device.calls.length > 0);
      await settled(() => device.calls.length);
      assert.ok(device.calls.length <= 2, `${device.calls.length}`);
    });

    it('a client that hangs up while the session is stalled: what was not begun is never carried out', async () => {
      const { device, client, session } = rig({ transport });
      device.manner = () => 'held';
      const count = IN_FLIGHT_REQUESTS_MAX + 500;
      const requests = Array.from({ length: count }, (_, cookie) => ({
        command: WRITE,
        cookie,
        payload: pattern(16),
      }));
      client.send(...requests);
      await until(() => session.inFlight === IN_FLIGHT_REQUESTS_MAX);
      client.socket.destroy();
      await once(client.socket, 'close');
      // The client may have sent all of it again over a new connection by now, and newer writes behind it.
      device.manner = () => 'now';
      for (const request of device.held.splice(0)) request.complete(0);
      await session.closed;
      assert.equal(device.calls.length, IN_FLIGHT_REQUESTS_MAX);
    });

    it('a client that hangs up while the session is stalled and nothing is completed: noticed all the same', async () => {
      const { device, client } = rig({ transport });
      device.manner = () => 'held';
      client.send(
        ...Array.from({ length: IN_FLIGHT_REQUESTS_MAX + 500 }, (_, cookie) => ({
          command: READ,
          cookie,
          length: 16,
        })),
      );
      await until(() => device.held.length === IN_FLIGHT_REQUESTS_MAX);
      client.socket.destroy();
      await until(() => device.held.every(({ abandoned }) => abandoned));
      await until(() => device.released === 1);
    });

    it('a client that hung up before its requests are begun: not all of them are', async () => {
      const device = new MemoryDevice(4 << 20);
      const { client, session } = rig({ device, transport });
      const requests = Array.from({ length: 2000 }, (_, cookie) =>
        encodeRequest({ command: READ, cookie, length: 4 << 20 }),
      );
      client.socket.write(Buffer.concat(requests));
      client.socket.destroy(); // what is sent now fails at once
      await session.closed;
      assert.ok(device.calls.length <= IN_FLIGHT_BYTES_MAX / (4 << 20), `${device.calls.length} were begun`);
    });

    it('a client that closes its side behind long reads gets all of them', async () => {
      const device = new MemoryDevice(4 << 20);
      pattern(4 << 20).copy(device.data);
      const { client } = rig({ device, transport });
      const requests = Array.from({ length: 40 }, (_, cookie) =>
        client.encode({ command: READ, cookie, length: 1 << 20 }),
      );
      client.socket.end(Buffer.concat(requests));
      for (const { data } of await client.got(40)) assert.ok(data!.equals(device.data.subarray(0, 1 << 20)));
    });

    it('one who reads much lets another in between', async () => {
      const device = new MemoryDevice(1 << 20);
      const [greedy, modest] = [rig({ device, transport }), rig({ transport })];
      await greedy.client.ask({ command: FLUSH, cookie: 1 });
      await modest.client.ask({ command: FLUSH, cookie: 1 });
      const requests = Array.from({ length: 100 }, (_, cookie) =>
        greedy.client.encode({ command: READ, cookie: 2 + cookie, length: 1 << 20 }),
      );
      greedy.client.socket.write(Buffer.concat(requests));
      modest.client.send({ command: READ, cookie: 2, length: 16 });
      await until(() => modest.device.calls.length === 2);
      assert.ok(device.calls.length < 60, `${device.calls.length} reads of the other were first`);
      await greedy.client.got(101);
    });

    it('all sessions share one limit; beyond it each still has one request at a time', async () => {
      const device = new MemoryDevice(4 << 20);
      const length = 4 << 20;
      const sessions = Array.from({ length: 12 }, () => rig({ device, transport }));
      for (const { client } of sessions) {
        client.socket.pause();
        client.socket.write(
          Buffer.concat(
            Array.from({ length: 60 }, (_, cookie) => client.encode({ command: READ, cookie, length })),
          ),
        );
      }
      await settled(() => device.calls.length);
      const bytes = sessions.reduce((sum, { session }) => sum + session.inFlightBytes, 0);
      assert.ok(bytes <= IN_FLIGHT_BYTES_TOTAL_MAX + 12 * (length + 65_536), `${bytes >> 20} MiB`);
      assert.ok(sessions.every(({ session }) => session.inFlightBytes >= length));
      device.released = 0; // one device for all
      const late = sessions[11]!.client;
      late.socket.resume();
      assert.equal((await late.got(60)).length, 60);
      for (const { client, session } of rigs.splice(0)) {
        client.socket.destroy();
        await session.closed;
      }
    });

    it('requests held by the device: no more than the limit, the others follow', async () => {
      const { device, client, session } = rig({ transport });
      device.manner = () => 'held';
      const count = IN_FLIGHT_REQUESTS_MAX + 500;
      client.send(
        ...Array.from({ length: count }, (_, cookie) => ({
          command: WRITE,
          cookie,
          offset: cookie * 16,
          payload: pattern(16, cookie),
        })),
      );
      await until(() => device.held.length === IN_FLIGHT_REQUESTS_MAX);
      await settled(() => device.held.length);
      assert.equal(session.inFlight, IN_FLIGHT_REQUESTS_MAX);
      device.completeHeld();
      await until(() => device.held.length === 500);
      device.completeHeld();
      await client.got(count);
      for (let i = 0; i < count; i++) {
        assert.deepEqual(device.data.subarray(i * 16, i * 16 + 16), pattern(16, i));
      }
    });

    it('one slow request holds nobody back', async () => {
      const { device, client } = rig({ transport });
      device.manner = (call) => (call.offset === 4096 ? 'held' : 'now');
      client.send({ command: READ, cookie: 1, offset: 4096, length: 10 });
      for (let cookie = 2; cookie < 50; cookie++) {
        await client.ask({ command: READ, cookie, offset: 0, length: 4096 });
      }
      assert.equal(device.held.length, 1);
      device.completeHeld();
      await client.reply(1);
    });
  });
}

/** Waits until `count` has not changed for 50 ms. */
async function settled(count: () => number): Promise<void> {
  for (let last = -1; last !== count(); ) {
    last = count();
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

describe('session over TCP', () => {
  it('serves and closes', async () => {
    const device = new MemoryDevice(SIZE);
    const [server, socket] = await tcpPair();
    const session = startSession(server, {
      device,
      structured: true,
      contexts: [],
      rest: Buffer.alloc(0),
      log: pino({ level: 'silent' }),
    });
    const client = new RawClient(socket, true);
    rigs.push({ device, session, client });
    for (let cookie = 0; cookie < 20; cookie++) {
      const payload = pattern(70_000, cookie);
      assert.equal((await client.ask({ command: WRITE, cookie, payload })).errno, 0);
      client.replies.length = 0;
      const reply = await client.ask({ command: READ, cookie, length: payload.length });
      assert.ok(reply.data!.equals(payload));
      client.replies.length = 0;
    }
    client.send({ command: DISC, cookie: 1 });
    await session.closed;
    await client.ended;
  });
});

describe('session over TCP, reset', () => {
  it('abandons what is in flight', async () => {
    const device = new MemoryDevice(SIZE);
    device.manner = () => 'held';
    const [server, socket] = await tcpPair();
    const session = startSession(server, {
      device,
      structured: false,
      contexts: [],
      rest: Buffer.alloc(0),
      log: pino({ level: 'silent' }),
    });
    const client = new RawClient(socket, false);
    rigs.push({ device, session, client });
    client.send({ command: READ, cookie: 1, length: 8 }, { command: WRITE, cookie: 2, payload: pattern(8) });
    await until(() => device.held.length === 2);
    socket.resetAndDestroy();
    await until(() => device.held.every((request) => request.abandoned));
    device.completeHeld();
    await session.closed;
  });
});

// Clauses: doc/proto.md «Size constraints», «Request types», «Error values», «Command flags»
describe('session: what is refused, by clause', () => {
  const over = PAYLOAD_BYTES_MAX + 1;
  const past = { offset: SIZE - 10, length: 11 };
  const huge = { offset: 0xffff_ffff_ffff_fff0n, length: 0x20 };
  const rows: [clause: string, request: Omit<RawRequest, 'cookie'>, errno: number][] = [
    ['READ past the end', { command: READ, ...past }, Errno.EINVAL],
    ['READ whose offset + length wraps in 64 bits', { command: READ, ...huge }, Errno.EINVAL],
    ['READ at 2^53 and more', { command: READ, offset: 2n ** 53n, length: 1 }, Errno.EINVAL],
    ['TRIM past the end', { command: TRIM, ...past }, Errno.EINVAL],
    ['CACHE past the end', { command: CACHE, ...past }, Errno.EINVAL],
    ['BLOCK_STATUS past the end', { command: BLOCK_STATUS, ...past }, Errno.EINVAL],
    ['WRITE past the end', { command: WRITE, offset: SIZE - 10, payload: Buffer.alloc(11) }, Errno.ENOSPC],
    [
      'WRITE whose offset + length wraps',
      { command: WRITE, offset: huge.offset, payload: Buffer.alloc(32) },
      Errno.ENOSPC,
    ],
    ['WRITE_ZEROES past the end', { command: WRITE_ZEROES, ...past }, Errno.ENOSPC],
    ['WRITE_ZEROES of 4 GiB - 1', { command: WRITE_ZEROES, length: 0xffffffff }, Errno.ENOSPC],
    ['READ over the maximum payload', { command: READ, length: over }, Errno.EINVAL],
    ['WRITE over the maximum payload', { command: WRITE, payload: Buffer.alloc(over) }, Errno.EINVAL],
    ['unknown command', { command: 8, length: 1 }, Errno.EINVAL],
    ['unknown command 65,535', { command: 65_535 }, Errno.EINVAL],
    ['unknown flag on READ', { command: READ, flags: 0x8000, length: 1 }, Errno.EINVAL],
    ['unknown flag on FLUSH', { command: FLUSH, flags: 0x20 }, Errno.EINVAL],
    ['DF on WRITE', { command: WRITE, flags: DF, payload: Buffer.alloc(5) }, Errno.EINVAL],
    ['NO_HOLE on READ', { command: READ, flags: NO_HOLE, length: 1 }, Errno.EINVAL],
    ['REQ_ONE on READ', { command: READ, flags: REQ_ONE, length: 1 }, Errno.EINVAL],
    ['NO_HOLE on TRIM', { command: TRIM, flags: NO_HOLE, length: 1 }, Errno.EINVAL],
    ['DF on CACHE', { command: CACHE, flags: DF, length: 1 }, Errno.EINVAL],
    ['FAST_ZERO, not advertised', { command: WRITE_ZEROES, flags: FAST_ZERO, length: 1 }, Errno.EINVAL],
    ['BLOCK_STATUS of length 0', { command: BLOCK_STATUS, length: 0 }, Errno.EINVAL],
  ];
  const changing: typeof rows = [
    ['WRITE to a read-only export', { command: WRITE, payload: Buffer.alloc(9) }, Errno.EPERM],
    ['TRIM of a read-only export', { command: TRIM, length: 1 }, Errno.EPERM],
    ['WRITE_ZEROES on a read-only export', { command: WRITE_ZEROES, length: 1 }, Errno.EPERM],
  ];

  async function refuse(request: Omit<RawRequest, 'cookie'>, errno: number, readOnly = false): Promise<void> {
    for (const structured of [true, false]) {
      const { device, client } = rig({
        structured,
        contexts: structured ? BASE : [],
        device: new MemoryDevice(SIZE, { readOnly }),
      });
      const reply = await client.ask({ ...request, cookie: 0xabcdef });
      assert.equal(reply.errno, errno);
      assert.equal(reply.simple, !structured);
      assert.equal(reply.message.length > 0, structured);
      // The connection lives, and is where it should be in the stream.
      const next = await client.ask({ command: READ, cookie: 2, length: 16 });
      assert.deepEqual([next.errno, next.data], [0, Buffer.alloc(16)]);
      assert.equal(device.calls.length, 1, 'only the second request reached the device');
    }
  }

  for (const [clause, request, errno] of rows) it(clause, () => refuse(request, errno));
  for (const [clause, request, errno] of changing) it(clause, () => refuse(request, errno, true));

  it('DF on READ without structured replies', async () => {
    const { client } = rig({ structured: false });
    const reply = await client.ask({ command: READ, flags: DF, cookie: 1, length: 1 });
    assert.equal(reply.errno, Errno.EINVAL);
  });

  it('BLOCK_STATUS without structured replies or without a selected context', async () => {
    for (const structured of [false, true]) {
      const { client } = rig({ structured });
      const reply = await client.ask({ command: BLOCK_STATUS, cookie: 1, length: 512 });
      assert.equal(reply.errno, Errno.EINVAL);
    }
  });

  it('READ of a read-only export', async () => {
    const { client } = rig({ device: new MemoryDevice(SIZE, { readOnly: true }) });
    assert.equal((await client.ask({ command: READ, cookie: 1, length: 1 })).errno, 0);
    assert.equal((await client.ask({ command: FLUSH, cookie: 2 })).errno, 0);
    assert.equal((await client.ask({ command: CACHE, cookie: 3, length: 1 })).errno, 0);
  });
});

describe('session: what is accepted, by clause', () => {
  it('FUA on every command', async () => {
    const { device, client } = rig({ structured: true, contexts: BASE });
    const requests: RawRequest[] = [
      { command: READ, cookie: 1, length: 8 },
      { command: WRITE, cookie: 2, payload: pattern(8) },
      { command: FLUSH, cookie: 3 },
      { command: TRIM, cookie: 4, length: 8 },
      { command: CACHE, cookie: 5, length: 8 },
      { command: WRITE_ZEROES, cookie: 6, length: 8, offset: 64 },
      { command: BLOCK_STATUS, cookie: 7, length: 8 },
    ];
    client.send(...requests.map((request) => ({ ...request, flags: FUA })));
    for (const reply of await client.got(requests.length)) assert.equal(reply.errno, 0);
    const write = device.calls.find((call) => call.kind === 'write')!;
    assert.equal(write.flags, FUA, 'a FUA write is never writeNow');
    assert.equal(device.calls.find((call) => call.kind === 'trim')!.flags, FUA);
    assert.equal(device.calls.find((call) => call.kind === 'zero')!.flags, FUA);
  });

  it('FUA on writes whose payload comes in parts', async () => {
    const { device, client } = rig();
    const bytes = encodeRequest({ command: WRITE, flags: FUA, cookie: 1, payload: pattern(300_000) });
    client.socket.write(bytes.subarray(0, 100_000));
    await new Promise((resolve) => setImmediate(resolve));
    client.socket.write(bytes.subarray(100_000));
    assert.equal((await client.reply(1)).errno, 0);
    assert.deepEqual(
      device.calls.map((call) => call.flags),
      [FUA],
    );
    assert.ok(device.data.subarray(0, 300_000).equals(pattern(300_000)));
  });

  it('NO_HOLE on WRITE_ZEROES, DF on a structured READ, REQ_ONE on BLOCK_STATUS', async () => {
    const { device, client } = rig({ structured: true, contexts: BASE });
    client.send(
      { command: WRITE_ZEROES, flags: NO_HOLE, cookie: 1, length: 8 },
      { command: READ, flags: DF, cookie: 2, length: 8 },
      { command: BLOCK_STATUS, flags: REQ_ONE, cookie: 3, length: 8 },
    );
    for (const reply of await client.got(3)) assert.equal(reply.errno, 0);
    assert.equal(device.calls[0]!.flags, NO_HOLE);
  });

  it('length 0: success without the device; at the very end too; bounds still count', async () => {
    const { device, client } = rig({ structured: true });
    let cookie = 0;
    for (const offset of [0, SIZE]) {
      for (const command of [READ, WRITE, TRIM, CACHE, WRITE_ZEROES]) {
        const reply = await client.ask({ command, cookie: ++cookie, offset, length: 0 });
        assert.equal(reply.errno, 0);
        if (command === READ) assert.deepEqual(reply.chunks, [ChunkType.NONE]);
      }
    }
    assert.equal((await client.ask({ command: READ, cookie: 90, offset: SIZE + 1, length: 0 })).errno, 22);
    assert.equal((await client.ask({ command: WRITE, cookie: 91, offset: SIZE + 1, length: 0 })).errno, 28);
    assert.equal(device.calls.length, 0);
  });

  it('FLUSH whose offset and length should have been 0', async () => {
    const { device, client } = rig();
    assert.equal((await client.ask({ command: FLUSH, cookie: 1, offset: 7, length: 9 })).errno, 0);
    assert.deepEqual(device.calls, [{ kind: 'flush', offset: 0, length: 0, flags: 0 }]);
  });

  it('reads up to the last byte, and the largest payload', async () => {
    const device = new MemoryDevice(PAYLOAD_BYTES_MAX);
    const { client } = rig({ device });
    const payload = Buffer.alloc(PAYLOAD_BYTES_MAX, 0x5a);
    assert.equal((await client.ask({ command: WRITE, cookie: 1, payload })).errno, 0);
    const all = await client.ask({ command: READ, cookie: 2, length: PAYLOAD_BYTES_MAX });
    assert.ok(all.data!.equals(payload));
    const last = await client.ask({ command: READ, cookie: 3, offset: PAYLOAD_BYTES_MAX - 1, length: 1 });
    assert.deepEqual(last.data, Buffer.of(0x5a));
  });
});

describe('session: device answers', () => {
  it('out of order, each exactly once', async () => {
    const { device, client } = rig({ structured: true });
    pattern(SIZE).copy(device.data);
    device.manner = () => 'held';
    const cookies = Array.from({ length: 200 }, (_, cookie) => cookie);
    client.send(...cookies.map((cookie) => ({ command: READ, cookie, offset: cookie * 8, length: 8 })));
    await until(() => device.held.length === 200);
    device.completeHeld((held) => held.reverse());
    const replies = await client.got(200);
    assert.deepEqual(
      replies.map((reply) => reply.cookie),
      cookies.reverse(),
    );
    for (const { cookie, data } of replies) {
      assert.deepEqual(data, device.data.subarray(cookie * 8, cookie * 8 + 8));
    }
  });

  it('errors, now or later, reach the client; those the protocol does not know as EIO', async () => {
    for (const structured of [false, true]) {
      for (const manner of ['now', 'sync', 'turn'] as const) {
        for (const [answer, errno] of [
          [Errno.ENOSPC, Errno.ENOSPC],
          [Errno.EPERM, Errno.EPERM],
          [9999, Errno.EIO],
          [-5, Errno.EIO],
        ] as const) {
          const { device, client } = rig({ structured });
          device.manner = () => manner;
          device.failure = () => answer;
          client.send(
            { command: READ, cookie: 1, length: 8 },
            { command: READ, cookie: 2, length: 300_000 },
            { command: WRITE, cookie: 3, payload: pattern(8) },
            { command: FLUSH, cookie: 4 },
            { command: TRIM, cookie: 5, length: 1 },
          );
          for (const reply of await client.got(5)) {
            assert.equal(reply.errno, errno);
            assert.equal(reply.simple, !structured);
          }
        }
      }
    }
  });

  it('an exception is EIO, logged once, and the session lives', async () => {
    const lines: string[] = [];
    const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(line) });
    for (const manner of ['now', 'sync'] as const) {
      lines.length = 0;
      const { device, client } = rig({ log });
      device.manner = () => manner;
      device.failure = () => new Error('a bug');
      client.send(
        { command: READ, cookie: 1, length: 8 },
        { command: READ, cookie: 2, length: 200_000 },
        { command: WRITE, cookie: 3, payload: pattern(8) },
        { command: FLUSH, cookie: 4 },
      );
      for (const reply of await client.got(4)) assert.equal(reply.errno, Errno.EIO);
      device.failure = () => 0;
      assert.equal((await client.ask({ command: READ, cookie: 5, length: 8 })).errno, 0);
      assert.equal(lines.filter((line) => line.includes('misbehaved')).length, 1);
    }
  });

  it('requests completed while another is read do not spoil its data', async () => {
    const { device, client } = rig();
    pattern(SIZE).copy(device.data);
    device.manner = ({ kind }) => (kind === 'read' ? 'now' : 'held');
    client.send({ command: FLUSH, cookie: 1 }, { command: FLUSH, cookie: 2 });
    await until(() => device.held.length === 2);
    device.failure = ({ kind }) => {
      if (kind === 'read') device.completeHeld();
      return 0;
    };
    const read = await client.ask({ command: READ, cookie: 3, offset: 50, length: 64 });
    assert.deepEqual(read.data, pattern(SIZE).subarray(50, 114));
    await client.got(3);
  });

  it('a second completion changes nothing', async () => {
    const { device, client } = rig();
    device.manner = () => 'held';
    client.send({ command: FLUSH, cookie: 1 });
    await until(() => device.held.length === 1);
    const request = device.held[0]!;
    device.completeHeld();
    request.complete(5);
    assert.equal((await client.reply(1)).errno, 0);
    device.manner = () => 'now';
    await client.ask({ command: READ, cookie: 2, length: 1 });
    assert.equal(client.replies.length, 2);
  });
});

describe('session: BLOCK_STATUS', () => {
  const two = [
    { id: 7, name: 'base:allocation' },
    { id: 9, name: 'test:other' },
  ];

  it('one chunk a context, the last one with DONE, equal neighbours merged', async () => {
    for (const manner of ['sync', 'turn'] as const) {
      const { device, client } = rig({ structured: true, contexts: two });
      device.manner = () => manner;
      device.extents = (context) =>
        context === 'base:allocation'
          ? [
              [4096, 3],
              [4096, 3],
              [4096, 0],
              [100_000, 3],
            ]
          : [[65_536, 2]];
      const reply = await client.ask({ command: BLOCK_STATUS, cookie: 1, offset: 4096, length: 65_536 });
      assert.deepEqual(reply.chunks, [ChunkType.BLOCK_STATUS, ChunkType.BLOCK_STATUS]);
      assert.deepEqual(reply.status.get(7), [
        [8192, 3],
        [4096, 0],
        [65_536 - 12_288, 3],
      ]);
      assert.deepEqual(reply.status.get(9), [[65_536, 2]]);
    }
  });

  it('REQ_ONE: exactly one extent, within the request', async () => {
    const { device, client } = rig({ structured: true, contexts: two });
    device.extents = (_context, request) => {
      assert.equal(request.extentsMax, 1);
      return [
        [4096, 3],
        [4096, 3],
        [4096, 0],
      ];
    };
    const reply = await client.ask({ command: BLOCK_STATUS, flags: REQ_ONE, cookie: 1, length: 65_536 });
    assert.deepEqual(reply.status.get(7), [[8192, 3]]);
  });

  it('long lists are cut at the limit, and leave whole', async () => {
    const { device, client } = rig({ structured: true, contexts: BASE });
    for (const count of [500, 510, 511, 512, 513, 5000, 20_000]) {
      device.extents = () => Array.from({ length: count }, (_, i) => [16, i & 1]);
      const reply = await client.ask({ command: BLOCK_STATUS, cookie: count, length: SIZE });
      const extents = reply.status.get(1)!;
      assert.equal(extents.length, Math.min(count, 16_384));
      assert.ok(extents.every(([length, status], i) => length === 16 && status === (i & 1)));
    }
  });

  it('an error of one context is the answer; so is EIO where the device says nothing', async () => {
    const { device, client } = rig({ structured: true, contexts: two });
    let count = 0;
    device.failure = (call) => (call.kind === 'status' && ++count % 2 === 0 ? Errno.EINVAL : 0);
    const reply = await client.ask({ command: BLOCK_STATUS, cookie: 1, length: 4096 });
    assert.equal(reply.errno, Errno.EINVAL);
    device.failure = () => 0;
    device.extents = () => [];
    assert.equal((await client.ask({ command: BLOCK_STATUS, cookie: 2, length: 4096 })).errno, Errno.EIO);
  });
});
