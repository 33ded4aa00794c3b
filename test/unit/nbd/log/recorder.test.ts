// What sessions leave in a transaction log, and when their answers leave.
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, describe, test } from 'node:test';
import pino from 'pino';
import { Command, CommandFlag, Errno } from '../../../../src/nbd/constants.js';
import type { IoRequest } from '../../../../src/nbd/device.js';
import { Recorder } from '../../../../src/nbd/log/recorder.js';
import { BUFFERED_BYTES_MAX, TransactionLog } from '../../../../src/nbd/log/transaction-log.js';
import { Request } from '../../../../src/nbd/server/request.js';
import { type Session, startSession } from '../../../../src/nbd/server/session.js';
import { SlabPool } from '../../../../src/nbd/server/slab.js';
import { MemoryDevice } from '../../../fakes/memory-device.js';
import { connectedPair, RawClient, until } from '../../../fakes/raw-client.js';
import {
  fakeWritev,
  realWritev,
  recordsOf,
  restoreWritev,
  shownLog,
} from '../../../support/transaction-log.js';

const { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const { FUA, NO_HOLE } = CommandFlag;
const SIZE = 1 << 20;
const silent = pino({ level: 'silent' });

const folder = mkdtempSync(join(tmpdir(), 'blockferry-log-'));
after(() => rmSync(folder, { recursive: true }));
let count = 0;

class LoggedDevice extends MemoryDevice {
  transactionLog: TransactionLog;

  constructor(options: { data?: boolean; size?: number; readOnly?: boolean } = {}) {
    super(options.size ?? SIZE, options);
    const path = join(folder, `log-${count++}`);
    this.transactionLog = TransactionLog.open({ path, data: options.data ?? true }, silent);
  }
}

const devices: LoggedDevice[] = [];
const sessions: { session: Session; client: RawClient }[] = [];

function logged(options: ConstructorParameters<typeof LoggedDevice>[0] = {}): LoggedDevice {
  const device = new LoggedDevice(options);
  devices.push(device);
  return device;
}

function connect(device: LoggedDevice, structured = true): RawClient {
  const [server, socket] = connectedPair('descriptor');
  const contexts = structured ? device.contexts.map((name, index) => ({ id: index + 1, name })) : [];
  const session = startSession(server, { device, structured, contexts, rest: Buffer.alloc(0), log: silent });
  const client = new RawClient(socket, structured);
  sessions.push({ session, client });
  return client;
}

/** Ends everything and gives the log's lines behind the switch. */
async function lines(device: LoggedDevice): Promise<string[]> {
  await device.transactionLog.close();
  return shownLog(device.transactionLog.path).slice(1);
}

afterEach(async () => {
  restoreWritev();
  for (const { client, session } of sessions.splice(0)) {
    client.socket.destroy();
    for (const device of devices) device.completeHeld();
    await session.closed;
  }
  for (const device of devices.splice(0)) await device.transactionLog.close();
});

describe('requests', () => {
  for (const manner of ['now', 'turn'] as const) {
    test(`with data: what changed, so that it can be played back (answered ${manner})`, async () => {
      const device = logged();
      device.manner = () => manner;
      const client = connect(device);
      const payload = Buffer.alloc(1000, 7);
      await client.ask({ command: WRITE, cookie: 101, offset: 512, payload });
      await client.ask({ command: READ, cookie: 102, offset: 512, length: 1000 });
      await client.ask({ command: READ, cookie: 103, offset: 0, length: SIZE });
      await client.ask({
        command: WRITE,
        flags: FUA,
        cookie: 104,
        offset: 0,
        payload: payload.subarray(0, 1),
      });
      await client.ask({ command: TRIM, cookie: 105, offset: 4096, length: 4096 });
      await client.ask({ command: WRITE_ZEROES, flags: NO_HOLE, cookie: 106, offset: 0, length: 10 });
      await client.ask({ command: BLOCK_STATUS, cookie: 107, offset: 0, length: 512 });
      await client.ask({ command: CACHE, cookie: 108, offset: 0, length: 512 });
      await client.ask({ command: FLUSH, cookie: 109, offset: 0, length: 0 });
      client.send({ command: DISC, cookie: 110 });
      await sessions[0]!.session.closed;
      const expected = ['WRITE 512+1000', 'READ 512+1000', `READ 0+${SIZE}`, 'WRITE 0+1 1', 'TRIM 4096+4096'];
      const more = ['WRITE_ZEROES 0+10 2', 'FLUSH 0+0'];
      const shown = (await lines(device)).map((line) => line.replace(/^(.) 1\.\d+/, '$1'));
      assert.deepEqual(
        shown,
        [...expected, ...more].flatMap((line) => [`> ${line}`, '< 0']).concat('> DISC 0+0'),
      );
      const payloads = recordsOf(readFileSync(device.transactionLog.path)).flatMap((it) => it.payload ?? []);
      assert.deepEqual(payloads, [payload, payload.subarray(0, 1)]);
    });

    test(`with data: what failed changes nothing (answered ${manner})`, async () => {
      const device = logged();
      device.manner = () => manner;
      device.failure = ({ kind }) => (kind === 'flush' ? Errno.ENOSPC : Errno.EIO);
      const client = connect(device);
      const payload = Buffer.alloc(512, 7);
      await client.ask({ command: WRITE, cookie: 1, offset: 512, payload });
      await client.ask({ command: WRITE_ZEROES, cookie: 2, offset: 512, length: 512 });
      await client.ask({ command: READ, cookie: 3, offset: 512, length: 512 });
      await client.ask({ command: FLUSH, cookie: 4, offset: 0, length: 0 });
      await client.ask({ command: WRITE, cookie: 5, offset: SIZE, payload });
      await client.ask({ command: TRIM, cookie: 6, offset: SIZE, length: 512 });
      await client.ask({ command: 77, cookie: 7, offset: 0, length: 512 });
      const shown = (await lines(device)).map((line) => line.replace(/^(.) 1\.\d+/, '$1'));
      assert.deepEqual(shown, [
        ...['> WRITE 512+0', '< 5', '> WRITE_ZEROES 512+0', '< 5', '> READ 512+512', '< 5'],
        ...['> FLUSH 0+0', '< 28', `> WRITE ${SIZE}+0`, '< 28', `> TRIM ${SIZE}+0`, '< 22'],
      ]);
    });

    test(`headers only: everything, as it was sent (answered ${manner})`, async () => {
      const device = logged({ data: false });
      device.manner = () => manner;
      const client = connect(device);
      const payload = Buffer.alloc(512, 7);
      await client.ask({ command: WRITE, cookie: 1, offset: 512, payload });
      await client.ask({ command: WRITE, cookie: 2, offset: SIZE, payload });
      await client.ask({ command: TRIM, cookie: 3, offset: SIZE - 4, length: 512 });
      await client.ask({ command: BLOCK_STATUS, cookie: 4, offset: 0, length: 512 });
      await client.ask({ command: CACHE, cookie: 5, offset: 0, length: 512 });
      await client.ask({ command: READ, cookie: 6, offset: 0, length: 0 });
      await client.ask({ command: 77, cookie: 7, offset: 3, length: 5 });
      assert.deepEqual(await lines(device), [
        ...['> 1.1 WRITE 512+512', '< 1.1 0', `> 1.2 WRITE ${SIZE}+512`, '< 1.2 28'],
        ...[`> 1.3 TRIM ${SIZE - 4}+512`, '< 1.3 22', '> 1.4 BLOCK_STATUS 0+512', '< 1.4 0'],
        ...['> 1.5 CACHE 0+512', '< 1.5 0', '> 1.6 READ 0+0', '< 1.6 0', '> 1.7 77 3+5', '< 1.7 22'],
      ]);
    });
  }

  test('those of several connections are told apart, whatever cookies they use', async () => {
    const device = logged();
    const [first, second] = [connect(device), connect(device, false)];
    for (const client of [first, second, first]) {
      client.send({ command: READ, cookie: 5, offset: 0, length: 512 });
      await client.got(client.replies.length + 1);
    }
    assert.deepEqual(await lines(device), [
      ...['> 1.1 READ 0+512', '< 1.1 0', '> 2.1 READ 0+512', '< 2.1 0', '> 1.2 READ 0+512', '< 1.2 0'],
    ]);
  });

  test('a READ is there when it begins, a change when it took effect, wherever that is in its time', async () => {
    const device = logged();
    device.manner = () => 'held';
    const client = connect(device);
    const payloads = [Buffer.alloc(512, 1), Buffer.alloc(512, 2)];
    client.send({ command: READ, cookie: 1, offset: 0, length: 512 });
    for (const [index, payload] of payloads.entries())
      client.send({ command: WRITE, flags: FUA, cookie: 2 + index, offset: 0, payload });
    client.send({ command: TRIM, cookie: 4, offset: 100, length: 5000 });
    await until(() => device.held.length === 4);
    const [, one, two, trim] = device.held as [IoRequest, IoRequest, IoRequest, IoRequest];
    two.changed(0, 512);
    one.changed(0, 512);
    trim.changed(4096, 0);
    device.completeHeld((held) => [...held].reverse());
    await client.got(4);
    assert.deepEqual(await lines(device), [
      ...['> 1.1 READ 0+512', '> 1.3 WRITE 0+512 1', '> 1.2 WRITE 0+512 1', '> 1.4 TRIM 4096+0'],
      ...['< 1.4 0', '< 1.3 0', '< 1.2 0', '< 1.1 0'],
    ]);
    const written = recordsOf(readFileSync(device.transactionLog.path)).flatMap((it) => it.payload ?? []);
    assert.deepEqual(written, [payloads[1], payloads[0]]);
  });

  test('of a client that is gone: what it changed is there, and no answer', async () => {
    const device = logged();
    device.manner = () => 'held';
    const client = connect(device);
    client.send({ command: WRITE, cookie: 1, offset: 0, payload: Buffer.alloc(512, 1) });
    client.send({ command: WRITE_ZEROES, cookie: 2, offset: 0, length: 512 });
    await until(() => device.held.length === 2);
    device.held[1]!.changed(0, 512);
    client.socket.destroy();
    await until(() => device.held[0]!.abandoned);
    device.failure = () => Errno.EIO;
    device.completeHeld();
    await sessions[0]!.session.closed;
    assert.deepEqual(await lines(device), ['> 1.2 WRITE_ZEROES 0+512', '> 1.1 WRITE 0+0']);
  });

  test('longer than 32 bits: in pieces that nbd-trplay takes', async () => {
    for (const data of [true, false]) {
      const device = logged({ data });
      const recorder = new Recorder(device.transactionLog, () => undefined);
      const owner = {
        pool: new SlabPool(),
        extended: false,
        abandoned: false,
        silent: false,
        changed() {},
        completed() {},
        completedTwice() {},
      };
      const request = new Request(owner);
      const head = {
        command: WRITE_ZEROES,
        flags: 0x20,
        cookieHi: 0,
        cookieLo: 1,
        offset: 4096,
        length: 2 ** 33,
      };
      request.begin(head as Parameters<Request['begin']>[0], null);
      request.number = recorder.begin(head);
      recorder.changed(request, head.offset, head.length);
      recorder.completed(request, Errno.OK, true);
      recorder.answered({ command: TRIM, flags: 0, offset: 0, length: 2 ** 60 }, Errno.EINVAL);
      const piece = 2 ** 31;
      assert.deepEqual(await lines(device), [
        ...[0, 1, 2].map((index) => `> 1.1 WRITE_ZEROES ${4096 + index * piece}+${piece}`),
        `> 1.1 WRITE_ZEROES ${4096 + 3 * piece}+${piece}`,
        ...['< 1.1 0', `> 1.2 TRIM 0+${data ? 0 : 2 ** 32 - 1}`, '< 1.2 22'],
      ]);
    }
  });
});

describe('answers', () => {
  test('leave when their records are written, those of other connections do not wait for them', async () => {
    const held: (() => void)[] = [];
    fakeWritev((...args) => held.push(() => realWritev(...args)));
    const device = logged();
    const [first, second] = [connect(device), connect(device)];
    first.send({ command: WRITE, cookie: 1, offset: 0, payload: Buffer.alloc(512, 1) });
    await until(() => held.length === 1);
    second.send({ command: READ, cookie: 1, offset: 0, length: 512 });
    await until(() => device.calls.length === 2);
    assert.deepEqual([first.replies.length, second.replies.length], [0, 0]);
    held.shift()!();
    await first.got(1);
    await until(() => held.length === 1);
    assert.equal(second.replies.length, 0);
    held.shift()!();
    assert.equal((await second.reply(1)).errno, 0);
  });

  test('leave without them once the log has failed', async () => {
    fakeWritev((_fd, _buffers, done) => setImmediate(done, new Error('EIO: i/o error, writev'), 0));
    const device = logged();
    const client = connect(device);
    for (let cookie = 0; cookie < 3; cookie++)
      await client.ask({ command: WRITE, cookie, offset: 0, payload: Buffer.alloc(512, 1) });
    assert.match(device.transactionLog.failure!.message, /EIO/);
    assert.deepEqual(await lines(device), []);
  });

  test('a log that the disk does not take stops the clients, and lets them go on', async () => {
    const held: (() => void)[] = [];
    fakeWritev((...args) => held.push(() => realWritev(...args)));
    const device = logged({ size: 1 << 20 });
    const client = connect(device);
    const payload = Buffer.alloc(1 << 20, 1);
    const many = (2 * BUFFERED_BYTES_MAX) / payload.length;
    for (let cookie = 0; cookie < many; cookie++) client.send({ command: WRITE, cookie, offset: 0, payload });
    await until(() => device.transactionLog.full);
    // The loop turns: nothing more is taken, however often.
    for (let turn = 0; turn < 50; turn++) await new Promise((resolve) => setImmediate(resolve));
    const taken = device.calls.length;
    assert.ok(taken > 16 && taken <= BUFFERED_BYTES_MAX / payload.length + 1, `${taken} writes taken`);
    const release = setInterval(() => held.shift()?.(), 1);
    await client.got(many);
    clearInterval(release);
    assert.equal(device.calls.length, many);
    for (const go of held.splice(0)) go();
    assert.equal((await lines(device)).length, 2 * many);
  });
});
