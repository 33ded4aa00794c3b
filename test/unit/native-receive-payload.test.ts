/** `receivePayload`: a payload that is on its way, or the part of it that comes in time. */
import assert from 'node:assert/strict';
import { closeSync } from 'node:fs';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { otherWork, Pair, repeated, sentByThread } from './native-exchange-fixtures.js';
import { MIB, patterned } from './native-fixtures.js';

describe('receivePayload', () => {
  const take = (fd: number, length: number, turnUs = 1_000_000): Buffer => {
    const buffer = Buffer.alloc(length + 20, 0xdd);
    const got = native.receivePayload(fd, buffer, 10, length, turnUs);
    assert.ok(buffer.subarray(0, 10).every((byte) => byte === 0xdd));
    assert.ok(buffer.subarray(10 + got).every((byte) => byte === 0xdd));
    return buffer.subarray(10, 10 + got);
  };

  test('takes what has come, and no more than it is to', () => {
    const pair = new Pair();
    pair.send(Buffer.from('the payload, and the next header'));
    assert.equal(take(pair.server, 11).toString(), 'the payload');
    assert.equal(take(pair.server, 0).toString(), '');
    assert.equal(take(pair.server, 100).toString(), ', and the next header');
  });

  test('is short when nothing comes, when its time is up, and when the loop has other work', async (t) => {
    const pair = new Pair();
    assert.equal(take(pair.server, 10).length, 0);
    pair.send(Buffer.from('abc'));
    assert.equal(take(pair.server, 10, 0).toString(), 'abc');
    await otherWork(t);
    pair.send(Buffer.from('def'));
    assert.equal(take(pair.server, 10).toString(), 'def');
  });

  test('is short at the end of the stream, and when the connection broke', () => {
    const ended = new Pair();
    ended.send(Buffer.from('abc'));
    closeSync(ended.takeClient());
    assert.equal(take(ended.server, 10).toString(), 'abc');
    assert.equal(take(ended.server, 10).length, 0);
    const broken = new Pair();
    native.send(broken.server, Buffer.of(1), 0, 1, false);
    closeSync(broken.takeClient());
    assert.equal(take(broken.server, 10).length, 0);
    assert.equal(native.receivePayload(2 ** 31 - 1, Buffer.alloc(8), 0, 8, 0), 0, 'no descriptor at all');
  });

  test('goes on with a payload that is longer than the socket holds', (t) => {
    const pair = new Pair();
    const { content } = patterned(5 * MIB + 1);
    sentByThread(t, pair.client, content);
    const buffer = Buffer.alloc(content.length + 1);
    let [done, most] = [0, 0];
    repeated(() => {
      const got = native.receivePayload(pair.server, buffer, done, content.length - done, 1_000_000);
      done += got;
      most = Math.max(most, got);
      return done === content.length;
    });
    assert.ok(most > MIB / 2, 'more than was there at any moment');
    assert.ok(buffer.subarray(0, done).equals(content));
  });

  test('wrong arguments throw, and nothing is received', () => {
    const pair = new Pair();
    pair.send(Buffer.from('abc'));
    const receive = native.receivePayload as (...args: unknown[]) => unknown;
    const good: unknown[] = [pair.server, new Uint8Array(8), 0, 8, 100];
    const wrongNumbers = [-1, 0.5, Number.NaN, 2 ** 53];
    for (const [i, value] of good.entries()) {
      for (const wrong of [undefined, null, '1', {}, 1n])
        assert.throws(() => receive(...good.with(i, wrong)), { code: 'ERR_INVALID_ARG_TYPE' });
      if (typeof value !== 'number') continue;
      for (const wrong of wrongNumbers)
        assert.throws(() => receive(...good.with(i, wrong)), { code: 'ERR_OUT_OF_RANGE' });
    }
    assert.throws(() => receive(pair.server, new Uint8Array(8), 1, 8, 0), { code: 'ERR_OUT_OF_RANGE' });
    assert.throws(() => receive(pair.server, new Uint8Array(8), 0, 8, 2 ** 32), { code: 'ERR_OUT_OF_RANGE' });
    assert.throws(() => receive(pair.server, new Uint16Array(8), 0, 8, 0), { code: 'ERR_INVALID_ARG_TYPE' });
    assert.equal(receive(...good), 3);
  });
});
