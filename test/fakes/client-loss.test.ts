/** The client against servers that go away or hang, and against those that are only unusual. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../../src/errors.js';
import { NbdReplyError } from '../../src/nbd/client/client.js';
import { Command, Errno } from '../../src/nbd/constants.js';
import { answering, connected, failure, LENGTH, OFFSET, TWO_CONTEXTS } from './against.js';
import {
  chunk,
  dataChunk,
  doneChunk,
  errorChunk,
  holeChunk,
  simpleReply,
  statusChunk,
  u16,
  u32,
} from './fake-server.js';

describe('a server that goes away', () => {
  const data = Buffer.alloc(LENGTH, 1);
  const whole = (cookie: bigint) => dataChunk(cookie, OFFSET, data, true);
  for (const [what, bytes] of [
    ['before its answer', 0],
    ['within the header', 7],
    ['behind the header', 20],
    ['within the offset', 24],
    ['within the data', 5000],
    ['before the last byte', 28 + LENGTH - 1],
  ] as const) {
    it(`${what}`, () =>
      connected(
        {},
        async (peer) => {
          const { cookie } = await peer.request();
          peer.send(whole(cookie).subarray(0, bytes));
          peer.hangUp();
        },
        async (client) => {
          await assert.rejects(
            client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH)),
            failure('closed', /hung up|reset/i),
          );
          assert.ok(failure('closed')(await client.closed));
        },
      ));
  }

  it('behind all data, but before the end of the reply', () =>
    connected(
      {},
      async (peer) => {
        const { cookie } = await peer.request();
        peer.send(dataChunk(cookie, OFFSET, data));
        peer.hangUp();
      },
      async (client) => {
        await assert.rejects(client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH)), failure('closed'));
      },
    ));

  it('while idle', () =>
    connected(
      {},
      async (peer) => peer.hangUp(),
      async (client) => {
        assert.ok(failure('closed', /hung up/)(await client.closed));
        await assert.rejects(client.flush(), failure('closed', /hung up/));
        await client.close();
      },
    ));

  it('saying ESHUTDOWN: what is in flight is still answered, then it is let go', async () => {
    const seen: number[] = [];
    await connected(
      {},
      async (peer) => {
        const first = await peer.request();
        const second = await peer.request();
        peer.send(errorChunk(first.cookie, Errno.ESHUTDOWN, 'going down'), whole(second.cookie));
        seen.push((await peer.request()).command);
        peer.hangUp();
      },
      async (client) => {
        const flush = client.flush();
        const read = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH));
        await assert.rejects(flush, failure('source-io', /ESHUTDOWN \(108\): 'going down'/));
        await read;
        await assert.rejects(client.flush(), failure('closed', /shutting down/));
        assert.ok(failure('closed', /shutting down/)(await client.closed));
      },
    );
    assert.deepEqual(seen, [Command.DISC]);
  });

  it('without a word: a request times out', () =>
    connected(
      { requestTimeoutMs: 50 },
      async () => {},
      async (client) => {
        const read = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH));
        await assert.rejects(
          read,
          failure('closed', /did not answer READ of 8192 bytes at 4096 within 50 ms/),
        );
        assert.ok(failure('timeout')(await client.closed));
      },
    ));

  it('but slowly: what still comes is waited for, longer than a request may be silent', () =>
    connected(
      { requestTimeoutMs: 150 },
      async (peer) => {
        const { cookie, offset } = await peer.request();
        for (let at = 0; at < LENGTH; at += LENGTH / 16) {
          peer.send(dataChunk(cookie, offset + at, Buffer.alloc(LENGTH / 16, at / 512)));
          await delay(30);
        }
        peer.send(doneChunk(cookie));
      },
      async (client) => {
        const buffer = Buffer.alloc(LENGTH);
        const began = performance.now();
        await client.read(OFFSET, LENGTH, buffer);
        assert.ok(performance.now() - began > 300);
        assert.equal(buffer[LENGTH - 1], 15);
      },
    ));

  it('but so slowly that it amounts to nothing: as silent as without a word', () =>
    connected(
      { requestTimeoutMs: 100 },
      async (peer) => {
        const { cookie, offset } = await peer.request();
        for (let at = 0; at < LENGTH; at++) {
          peer.send(dataChunk(cookie, offset + at, Buffer.of(1)));
          await delay(20);
          if (peer.socket.destroyed) return;
        }
      },
      async (client) => {
        await assert.rejects(
          client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH)),
          failure('closed', /did not answer READ .* within 100 ms/),
        );
      },
    ));

  it('but forgets one request: it times out in the end, though others are answered', () =>
    connected(
      { requestTimeoutMs: 100 },
      async (peer) => {
        await peer.request();
        for (;;) {
          const { cookie } = await peer.request();
          peer.send(doneChunk(cookie));
        }
      },
      async (client) => {
        const forgotten = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH));
        let over = false;
        void client.closed.then(() => {
          over = true;
        });
        const others = (async () => {
          while (!over) await client.flush().catch(() => undefined);
        })();
        await assert.rejects(forgotten, failure('closed', /did not answer READ .* within 1000 ms/));
        await others;
      },
    ));

  it('reading nothing any more: destroy ends the writes under way', () =>
    connected(
      {},
      async (peer) => {
        peer.socket.pause();
        await peer.gone;
      },
      async (client) => {
        const payload = Buffer.alloc(1 << 20);
        const writes = Array.from({ length: 8 }, () => client.write(0, payload, 0, payload.length));
        await new Promise((resolve) => setImmediate(resolve));
        client.destroy(new BlockferryError('migration', 'enough'));
        for (const write of writes) {
          await assert.rejects(write, (error) => failure('migration')((error as BlockferryError).cause));
        }
        assert.ok(failure('migration')(await client.closed));
      },
    ));
});

describe('a server that is only unusual', () => {
  it('answers out of order, in interleaved chunks, and reports errors', () =>
    connected(
      {},
      async (peer) => {
        const [a, b, c] = [await peer.request(), await peer.request(), await peer.request()];
        peer.send(
          dataChunk(b.cookie, OFFSET + 4096, Buffer.alloc(4096, 0xb2)),
          dataChunk(a.cookie, 2, Buffer.from('c')),
          errorChunk(c.cookie, Errno.ENOSPC, 'full\nup', false),
          holeChunk(b.cookie, OFFSET, 4096),
          dataChunk(a.cookie, 0, Buffer.from('ab')),
          doneChunk(b.cookie),
          doneChunk(c.cookie),
          chunk(a.cookie, 0x8000 | 99, Buffer.concat([u32(Errno.EIO), u16(2), Buffer.from('hm????')]), {
            done: true,
          }),
        );
      },
      async (client) => {
        const buffer = Buffer.alloc(LENGTH + 2, 0xff);
        const a = client.read(0, 3, Buffer.alloc(3));
        const b = client.read(OFFSET, LENGTH, buffer, 1);
        const c = client.zero(0, 4096);
        await b;
        assert.deepEqual(
          buffer,
          Buffer.concat([
            u16(0xff00).subarray(0, 1),
            Buffer.alloc(4096),
            Buffer.alloc(4096, 0xb2),
            Buffer.from([0xff]),
          ]),
        );
        await assert.rejects(c, (error) => {
          failure('source-io', /WRITE_ZEROES of 4096 bytes at 0 with ENOSPC \(28\): 'full up'/)(error);
          const { cause } = error as BlockferryError;
          return cause instanceof NbdReplyError && cause.errno === Errno.ENOSPC;
        });
        await assert.rejects(a, failure('source-io', /EIO \(5\): 'hm'/));
        assert.equal(client.inFlight, 0);
      },
    ));

  it('has an export of no bytes', () =>
    connected(
      { size: 0n },
      async () => {},
      async (client) => {
        assert.equal(client.info.size, 0);
        await client.read(0, 0, Buffer.alloc(0));
        await assert.rejects(client.read(0, 1, Buffer.alloc(1)), failure('bounds'));
      },
    ));

  it('has large blocks: unaligned and oversized requests are refused here', () =>
    connected(
      { size: 1n << 30n, blockSize: [4096, 4096, 65536] },
      answering(({ cookie, offset, length }) => [holeChunk(cookie, offset, length, true)]),
      async (client) => {
        assert.equal(client.payloadBytesMax, 65536);
        const buffer = Buffer.alloc(131072);
        await assert.rejects(client.read(512, 4096, buffer), failure('bounds', /not aligned/));
        await assert.rejects(client.read(4096, 512, buffer), failure('bounds', /not aligned/));
        await assert.rejects(client.read(0, 65536 + 4096, buffer), failure('bounds', /split it/));
        await assert.rejects(client.trim(512, 4096), failure('bounds', /not aligned/));
        await client.read(4096, 65536, buffer);
      },
    ));

  it('speaks simple replies only', () =>
    connected(
      { structured: false, contexts: [[1, 'base:allocation']] },
      async (peer) => {
        const a = await peer.request();
        const b = await peer.request();
        peer.send(simpleReply(b.cookie, Errno.EIO), simpleReply(a.cookie, 0, Buffer.from('abc')));
      },
      async (client) => {
        assert.equal(client.info.structured, false);
        const buffer = Buffer.alloc(3);
        const a = client.read(0, 3, buffer);
        await assert.rejects(client.read(0, 3, Buffer.alloc(3)), failure('source-io', /EIO/));
        await a;
        assert.equal(buffer.toString(), 'abc');
        await assert.rejects(client.blockStatus('base:allocation', 0, 1), failure('usage'));
      },
    ));

  it('reports extents beyond the request, never beyond the export', () =>
    connected(
      { ...TWO_CONTEXTS, size: 65536n },
      async (peer) => {
        const { cookie } = await peer.request();
        peer.send(
          statusChunk(cookie, 6, [[1, 9]]),
          statusChunk(cookie, 5, [
            [100, 0],
            [200, 0],
            [0xffffffff, 3],
          ]),
          doneChunk(cookie),
        );
      },
      async (client) => {
        assert.deepEqual(await client.blockStatus('base:allocation', OFFSET, LENGTH), [
          { length: 300, flags: 0 },
          { length: 65536 - OFFSET - 300, flags: 3 },
        ]);
      },
    ));

  it('offers nothing but READ', () =>
    connected(
      { flags: 1 | 2 },
      async () => {},
      async (client) => {
        const byte = Buffer.alloc(1);
        await assert.rejects(client.write(0, byte, 0, 1), failure('read-only'));
        await assert.rejects(client.flush(), failure('usage', /FLUSH/));
        await assert.rejects(client.cache(0, 1), failure('usage', /CACHE/));
        await assert.rejects(client.read(0, 2, byte), failure('bounds', /buffer of 1/));
        await assert.rejects(client.read(-1, 1, byte), failure('bounds'));
        await assert.rejects(client.read(0.5, 1, byte), failure('bounds'));
        await assert.rejects(client.read((1 << 20) - 1, 2, Buffer.alloc(2)), failure('bounds'));
      },
    ));

  it('hangs up when told DISC, which comes when all is answered', () =>
    connected(
      {},
      async (peer) => {
        const { cookie } = await peer.request();
        peer.send(doneChunk(cookie));
        assert.equal((await peer.request()).command, Command.DISC);
        peer.hangUp();
      },
      async (client) => {
        const flush = client.flush();
        const closed = client.close();
        await assert.rejects(client.flush(), failure('closed', /being closed/));
        await flush;
        await closed;
        assert.equal(await client.closed, null);
        await client.close();
      },
    ));
});
