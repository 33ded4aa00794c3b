/** `exchange` on a socket: what it receives and sends, and why it ends. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { Command } from '../../src/nbd/constants.js';
import { Ending } from '../../src/nbd/server/exchange.js';
import { type RawRequest, until } from '../fakes/raw-client.js';
import { turns } from '../support/volume.js';
import {
  asSocket,
  exchanged,
  type Given,
  type Outcome,
  otherWork,
  Pair,
  repeated,
  replyIn,
  requestIn,
  sentByThread,
} from './native-exchange-fixtures.js';
import { MIB, patterned } from './native-fixtures.js';

const { READ, WRITE, FLUSH } = Command;
const KIB = 1024;
const SIZE = 128 * KIB;

const read = (cookie: number, offset: number, length: number): RawRequest => ({
  command: READ,
  cookie,
  offset,
  length,
});
const write = (cookie: number, offset: number, length: number): RawRequest => ({
  command: WRITE,
  cookie,
  offset,
  payload: Buffer.alloc(length, cookie),
});
const bytesOf = (...requests: RawRequest[]): Buffer =>
  Buffer.concat(requests.map((request) => requestIn('simple', request)));

/** A pair and an image; what it is called with in all tests. */
class Rig {
  readonly pair = new Pair();
  readonly image = patterned(SIZE);
  readonly input: Buffer;

  constructor(inputBytes = 260 * KIB) {
    this.input = Buffer.alloc(inputBytes, 0xdd);
  }

  /** By default it does not wait. */
  call(given: Partial<Given> = {}): Outcome {
    const { fd } = this.image;
    const { input } = this;
    return exchanged({ image: fd, imageBytes: SIZE, socket: this.pair.server, pollUs: 0, input, ...given });
  }

  /** What these requests make of the image's content, and their answers. */
  answers(...requests: RawRequest[]): Buffer {
    const { content } = this.image;
    const replies = requests.map((request) => {
      const offset = Number(request.offset);
      if (request.command === READ)
        return replyIn(
          'simple',
          request,
          Buffer.from(content.subarray(offset, offset + Number(request.length))),
        );
      request.payload!.copy(content, offset);
      return replyIn('simple', request);
    });
    return Buffer.concat(replies);
  }

  holds(): void {
    assert.ok(readFileSync(this.image.path).equals(this.image.content));
  }
}

describe('exchange on a socket', () => {
  test('receives what has come, carries it out, answers, and is idle', () => {
    const rig = new Rig();
    const requests = [read(1, 10, 5000), write(2, 7, 300), read(3, 0, 400)];
    rig.pair.send(bytesOf(...requests));
    const done = rig.call();
    assert.deepEqual([done.ending, done.at, done.end, done.outFrom, done.outTo], [Ending.IDLE, 0, 0, 0, 0]);
    assert.equal(done.receivedBytes, bytesOf(...requests).length);
    assert.ok(rig.pair.received().equals(rig.answers(...requests)));
    rig.holds();
    assert.equal(rig.call().ending, Ending.IDLE);
  });

  test('carries out what it is given and receives nothing, if it is not to', () => {
    const rig = new Rig();
    const given = bytesOf(read(1, 0, 10), read(2, 0, 10));
    given.copy(rig.input, 100);
    rig.pair.send(bytesOf(read(3, 0, 10)));
    const end = 100 + given.length;
    const done = rig.call({ at: 100, end: end - 1, pollUs: -1 });
    assert.deepEqual([done.ending, done.at, done.end], [Ending.IDLE, end - 28, end - 1]);
    assert.equal(done.receivedBytes, 0);
    assert.ok(rig.input.subarray(100, end).equals(given), 'what is left stays where it is');
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 10))));
    assert.ok(rig.call().receivedBytes === 28);
  });

  test('a request that came in parts goes on at the start of the input', () => {
    const rig = new Rig();
    const requests = [read(1, 0, 10), write(2, 50, 40), read(3, 60, 20)];
    const bytes = bytesOf(...requests);
    let [end, answered] = [0, Buffer.alloc(0)];
    // in the first header, behind it, in the next one, before and in its payload, in the last header
    for (const [from, to] of [
      [0, 3],
      [3, 28],
      [28, 40],
      [40, 56],
      [56, 70],
      [70, 97],
      [97, 124],
    ] as const) {
      rig.pair.send(bytes.subarray(from, to));
      const done = rig.call({ at: 0, end });
      answered = Buffer.concat([answered, rig.pair.received()]);
      assert.deepEqual([done.ending, done.at], [Ending.IDLE, 0]);
      end = done.end;
      assert.ok(
        rig.input.subarray(0, end).equals(bytes.subarray(to - end, to)),
        `${end} bytes of it are left`,
      );
    }
    assert.equal(end, 0);
    assert.ok(answered.equals(rig.answers(...requests)));
    rig.holds();
  });

  test('long WRITEs follow one another through an input that holds two and a half', async (t) => {
    const rig = new Rig(100 * KIB);
    const requests = Array.from({ length: 60 }, (_, i) => write(i + 1, i * 1000, 40 * KIB));
    sentByThread(t, rig.pair.client, bytesOf(...requests));
    let done = rig.call();
    let answers = 0;
    repeated(() => {
      done = rig.call({ at: done.at, end: done.end });
      assert.ok(done.ending === Ending.IDLE || done.ending === Ending.TURN);
      answers += rig.pair.received().length;
      return answers === 60 * 16;
    });
    rig.answers(...requests);
    rig.holds();
  });

  test('receives no more at first than it is told, then all', () => {
    for (const [receiveBytesMax, end] of [
      [1, 56],
      [27, 56],
      [28, 28],
      [29, 29],
    ] as const) {
      const rig = new Rig();
      rig.pair.send(bytesOf({ command: FLUSH, cookie: 1 }, read(2, 0, 10)));
      const done = rig.call({ receiveBytesMax });
      assert.deepEqual(
        [done.ending, done.at, done.end],
        [Ending.OTHER, 0, end],
        `${receiveBytesMax} at first`,
      );
    }
  });

  test('sends when there are enough answers, then when there are twice as many', () => {
    const rig = new Rig();
    const requests = [1, 2, 3, 4, 5].map((cookie) => read(cookie, cookie * 100, 100));
    rig.pair.send(bytesOf(...requests));
    const output = Buffer.alloc(5 * 116);
    const done = rig.call({ repliesMax: 1, output });
    assert.deepEqual([done.ending, done.outFrom, done.outTo], [Ending.IDLE, 0, 0]);
    assert.ok(rig.pair.received().equals(rig.answers(...requests)));
    // One, two, two: each batch lies where the one before did.
    assert.ok(output.subarray(0, 232).equals(rig.answers(requests[3]!, requests[4]!)));
    assert.ok(output.subarray(232).every((byte) => byte === 0));
  });

  test('sends when the output is full, and uses it again', () => {
    const rig = new Rig();
    const requests = Array.from({ length: 40 }, (_, i) => (i % 3 === 2 ? write(i, i, 99) : read(i, i, 100)));
    rig.pair.send(bytesOf(...requests));
    const done = rig.call({ output: Buffer.alloc(2 * 116 + 15) });
    assert.equal(done.ending, Ending.IDLE);
    assert.ok(rig.pair.received().equals(rig.answers(...requests)));
    rig.holds();
  });

  test('a reply that no output holds is the session’s, behind those before it', () => {
    const rig = new Rig();
    rig.pair.send(bytesOf(read(1, 0, 100), read(2, 0, 101), read(3, 0, 100)));
    const done = rig.call({ output: Buffer.alloc(116) });
    assert.deepEqual([done.ending, done.at, done.end, done.outTo], [Ending.OTHER, 28, 84, 0]);
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 100))));
  });

  test('a request that no input holds is the session’s', () => {
    const rig = new Rig(100);
    rig.pair.send(bytesOf(read(1, 0, 10), write(2, 0, 73), read(3, 0, 10)));
    const done = rig.call();
    assert.deepEqual([done.ending, done.at, done.end], [Ending.OTHER, 0, 100]);
    assert.ok(rig.input.equals(bytesOf(write(2, 0, 73)).subarray(0, 100)));
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 10))));
    rig.holds();
  });

  test('stops before what is not its own, with all that came', () => {
    const rig = new Rig();
    const flush: RawRequest = { command: FLUSH, cookie: 2 };
    rig.pair.send(bytesOf(read(1, 0, 10), flush, read(3, 0, 10)));
    const done = rig.call();
    assert.deepEqual([done.ending, done.at, done.end], [Ending.OTHER, 28, 84]);
    assert.ok(rig.input.subarray(28, 84).equals(bytesOf(flush, read(3, 0, 10))));
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 10))));
  });
});

describe('exchange ends', () => {
  test('IDLE when nothing comes for the time it polls, or sleeps', async (t) => {
    const rig = new Rig();
    asSocket(t, new Pair()); // a loop with nothing to wait for does not wait either
    for (const given of [{ pollUs: 20 }, { pollUs: 0, sleeps: 1 }])
      await until(() => rig.call(given).ending === Ending.IDLE);
  });

  test('TURN when its time is up and the loop has other work, behind what it was given', async (t) => {
    const rig = new Rig();
    const input = bytesOf(read(1, 0, 10), read(2, 0, 10));
    rig.pair.send(bytesOf(read(3, 0, 10)));
    await otherWork(t);
    const done = rig.call({ input, end: input.length, turnUs: 0 });
    assert.deepEqual([done.ending, done.at, done.end, done.receivedBytes], [Ending.TURN, 0, 0, 0]);
    assert.equal(done.others, 0, 'our own socket has something as well');
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 10), read(2, 0, 10))));
    // Without other work its time is not up, but for its timers.
    await until(() => rig.call({ turnUs: 0 }).receivedBytes === 28);
  });

  test('TURN after a while of requests that never end, though nothing else is to be done', async (t) => {
    const rig = new Rig();
    native.sendBuffer(rig.pair.server, 32 * MIB); // nobody reads the answers
    const round = bytesOf(...Array.from({ length: 64 }, (_, i) => write(i, i * 1000, 1000)));
    const bytes = Buffer.alloc(400 * round.length, round);
    await once(sentByThread(t, rig.pair.client, bytes), 'online');
    await turns(20);
    let [done, received, most] = [rig.call({ turnUs: 100 }), 0, 0];
    repeated(() => {
      received += done.receivedBytes;
      most = Math.max(most, done.receivedBytes);
      const { at, end, ending } = done;
      if (ending !== Ending.UNSENT) done = rig.call({ at, end, sleeps: 1, turnUs: 100 });
      return ending === Ending.UNSENT || received === bytes.length;
    });
    if (done.ending === Ending.UNSENT) return t.skip('the socket may not take as much');
    assert.ok(most < bytes.length / 2, `${most} bytes in one call`);
  });

  test('TURN after megabytes of answers, though all that asks for them is there', (t) => {
    const rig = new Rig();
    native.sendBuffer(rig.pair.server, 32 * MIB);
    const requests = Array.from({ length: 60 }, (_, i) => read(i, i, 120 * KIB));
    const bytes = bytesOf(...requests);
    bytes.copy(rig.input);
    const first = rig.call({ end: bytes.length, pollUs: -1 });
    if (first.ending === Ending.UNSENT) return t.skip('the socket may not take as much');
    const answered = (first.at / 28) * (120 * KIB + 16);
    assert.deepEqual([first.ending, first.end, first.outTo], [Ending.TURN, bytes.length, 0]);
    assert.ok(answered > 4 * MIB && answered < 6 * MIB, `${answered} bytes`);
    const rest = rig.call({ at: first.at, end: bytes.length, pollUs: -1 });
    assert.deepEqual([rest.ending, rest.at], [Ending.IDLE, bytes.length]);
    assert.ok(rig.pair.received().equals(rig.answers(...requests)));
  });

  test('TURN when the loop has other work: a descriptor, or callbacks that are due', async (t) => {
    for (const given of [{ pollUs: 5_000_000 }, { pollUs: 0, sleeps: 1 }]) {
      const rig = new Rig();
      await otherWork(t);
      const work = rig.call(given);
      assert.deepEqual([work.ending, work.others], [Ending.TURN, 1]);
      const immediate = new Promise((resolve) => setImmediate(resolve));
      const due = rig.call(given);
      assert.deepEqual([due.ending, due.others], [Ending.TURN, 0]);
      await immediate;
    }
  });

  test('not for other work as long as something comes', async (t) => {
    const rig = new Rig();
    await otherWork(t);
    rig.pair.send(bytesOf(read(1, 0, 10)));
    const done = rig.call({ pollUs: 5_000_000 });
    assert.deepEqual([done.ending, done.receivedBytes], [Ending.TURN, 28]);
    assert.ok(rig.pair.received().equals(rig.answers(read(1, 0, 10))));
  });

  test('CLOSED when the client has ended its side, behind the answers', async (t) => {
    const rig = new Rig();
    const { socket, received } = asSocket(t, rig.pair);
    socket.end(bytesOf(read(1, 0, 10), write(2, 0, 10), read(3, 0, 10)).subarray(0, -1));
    await once(socket, 'finish');
    const done = rig.call();
    assert.deepEqual([done.ending, done.at, done.end], [Ending.CLOSED, 0, 27]);
    const answers = rig.answers(read(1, 0, 10), write(2, 0, 10));
    await until(() => received().length === answers.length);
    assert.ok(received().equals(answers));
    assert.equal(rig.call().ending, Ending.CLOSED);
  });

  test('CLOSED when the connection broke', () => {
    const rig = new Rig();
    native.send(rig.pair.server, Buffer.of(1), 0, 1, false); // never read: the end is a reset
    closeSync(rig.pair.takeClient());
    assert.equal(rig.call().ending, Ending.CLOSED);
  });

  test('UNSENT when the client is gone, without a signal', () => {
    const rig = new Rig();
    rig.pair.send(bytesOf(read(1, 0, 10), read(2, 0, 10)));
    closeSync(rig.pair.takeClient());
    const done = rig.call();
    assert.deepEqual([done.ending, done.at, done.end], [Ending.UNSENT, 56, 56]);
    assert.ok(done.answers.equals(rig.answers(read(1, 0, 10), read(2, 0, 10))));
  });

  test('UNSENT when the client does not read; nothing is lost or sent twice', async (t) => {
    const rig = new Rig();
    const requests = Array.from({ length: 64 }, (_, i) => read(i, i * 1000, 60_001));
    const bytes = bytesOf(...requests);
    bytes.copy(rig.input);
    const output = Buffer.alloc(512 * KIB);
    let done = rig.call({ end: bytes.length, repliesMax: 4, output });
    assert.equal(done.ending, Ending.UNSENT);
    assert.ok(done.at > 0 && done.at < bytes.length && done.at % 28 === 0);
    assert.ok(done.outFrom < done.outTo);
    const { received } = asSocket(t, rig.pair);
    const replyBytes = 60_017;
    const sent = (done.at / 28) * replyBytes - done.answers.length;
    await until(() => received().length === sent);
    while (done.at < bytes.length) {
      const { at, end, outFrom, outTo } = done;
      done = rig.call({ at, end, outFrom, outTo, repliesMax: 4, output });
      const all = (done.at / 28) * replyBytes - done.answers.length;
      await until(() => received().length === all);
    }
    const rest = done.answers;
    assert.ok(Buffer.concat([received(), rest]).equals(rig.answers(...requests)));
  });
});
