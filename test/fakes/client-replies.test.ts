/** The client against servers that break the protocol: the connection ends, and no byte counts as read that did not come. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { BlockferryError } from '../../src/errors.js';
import { answering, connected, failure, LENGTH, OFFSET, STATUS } from './against.js';
import { BAD_READ_REPLIES, BAD_STATUS_REPLIES } from './bad-replies.js';
import { dataChunk, statusChunk } from './fake-server.js';

describe('a server that breaks the protocol in its answer to READ', () => {
  const data = (length: number) => Buffer.alloc(length, 0xd1);
  for (const [what, answer, why, wish] of BAD_READ_REPLIES) {
    it(what, () =>
      connected(wish ?? {}, answering(answer), async (client) => {
        const read = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH));
        const other = client.flush();
        await assert.rejects(read, (error) => {
          failure('closed', why)(error);
          return failure('protocol', why)((error as BlockferryError).cause);
        });
        await assert.rejects(other, failure('closed', why));
        assert.ok(failure('protocol', why)(await client.closed));
        assert.equal(client.inFlight, 0);
        await assert.rejects(client.read(0, 1, Buffer.alloc(1)), failure('closed', why));
      }),
    );
  }

  it('a second answer to the same request', () =>
    connected(
      {},
      answering(({ cookie }) => {
        const answer = dataChunk(cookie, OFFSET, data(LENGTH), true);
        return [answer, answer];
      }),
      async (client) => {
        const buffer = Buffer.alloc(LENGTH);
        await client.read(OFFSET, LENGTH, buffer);
        assert.deepEqual(buffer, data(LENGTH));
        assert.ok(failure('protocol', /cookie/)(await client.closed));
      },
    ));

  it('bytes that nobody asked for', () =>
    connected(
      {},
      async (peer) => {
        await peer.request();
        peer.send(Buffer.alloc(16));
      },
      async (client) => {
        await assert.rejects(client.flush(), failure('closed', /magic/));
        assert.ok(failure('protocol', /magic/)(await client.closed));
      },
    ));
});

describe('a server that breaks the protocol in its answer to WRITE or BLOCK_STATUS', () => {
  it('data for a WRITE', () =>
    connected(
      {},
      async (peer) => {
        const { cookie, length } = await peer.request();
        await peer.read(length);
        peer.send(dataChunk(cookie, 0, Buffer.alloc(10), true));
      },
      async (client) => {
        await assert.rejects(client.write(0, Buffer.alloc(10), 0, 10), failure('closed', /type 1/));
      },
    ));

  for (const [what, answer, why, wish] of BAD_STATUS_REPLIES) {
    it(what, () =>
      connected(wish ?? STATUS, answering(answer), async (client) => {
        const status = client.blockStatus('base:allocation', OFFSET, LENGTH);
        await assert.rejects(status, failure('closed', why));
        assert.ok(failure('protocol', why)(await client.closed));
      }),
    );
  }

  for (const extents of [
    [[LENGTH + 1, 0]],
    [
      [1, 0],
      [1, 1],
    ],
  ] as [number, number][][]) {
    it(`${extents.length} extents of ${extents[0]?.[0]} bytes where one was asked for`, () =>
      connected(
        STATUS,
        answering(({ cookie }) => [statusChunk(cookie, 5, extents, true)]),
        async (client) => {
          const status = client.blockStatus('base:allocation', OFFSET, LENGTH, { one: true });
          await assert.rejects(status, failure('closed', /one|asked/));
        },
      ));
  }
});
