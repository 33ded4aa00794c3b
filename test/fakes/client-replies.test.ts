/** The client against servers that break the protocol: the connection ends, and no byte counts as read that did not come. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { BlockferryError } from '../../src/errors.js';
import { ChunkType, Errno } from '../../src/nbd/constants.js';
import {
  type Answer,
  answering,
  connected,
  failure,
  LENGTH,
  OFFSET,
  STATUS,
  TWO_CONTEXTS,
} from './against.js';
import {
  chunk,
  dataChunk,
  doneChunk,
  errorChunk,
  type FakeExport,
  holeChunk,
  simpleReply,
  statusChunk,
  u16,
  u32,
  u64,
} from './fake-server.js';

describe('a server that breaks the protocol in its answer to READ', () => {
  const data = (length: number) => Buffer.alloc(length, 0xd1);
  const cases: [string, Answer, RegExp, FakeExport?][] = [
    ['a wrong magic', ({ cookie }) => [u32(0x12345678), u32(0), u64(cookie)], /magic 0x12345678/],
    ['a cookie of nobody', () => [simpleReply(0x1234n)], /cookie/],
    ['a cookie of this slot in another use', ({ cookie }) => [doneChunk(cookie + (1n << 32n))], /cookie/],
    ['a slot that was never used', ({ cookie }) => [doneChunk(cookie + 4000n)], /cookie/],
    ['a simple reply', ({ cookie }) => [simpleReply(cookie, 0, data(LENGTH))], /simple reply to READ/],
    ['a simple error', ({ cookie }) => [simpleReply(cookie, Errno.EIO)], /simple reply to READ/],
    [
      'a structured reply that was not agreed on',
      ({ cookie }) => [dataChunk(cookie, OFFSET, data(LENGTH), true)],
      /not agreed/,
      { structured: false },
    ],
    [
      'a byte twice',
      ({ cookie }) => [
        dataChunk(cookie, OFFSET, data(4097)),
        dataChunk(cookie, OFFSET + 4096, data(4096), true),
      ],
      /twice/,
    ],
    [
      'all of it twice',
      ({ cookie }) => [
        dataChunk(cookie, OFFSET, data(LENGTH)),
        dataChunk(cookie, OFFSET, data(LENGTH), true),
      ],
      /twice/,
    ],
    [
      'data over a hole',
      ({ cookie }) => [holeChunk(cookie, OFFSET, LENGTH), dataChunk(cookie, OFFSET + 10, data(1), true)],
      /twice/,
    ],
    [
      'an end before all came',
      ({ cookie }) => [dataChunk(cookie, OFFSET, data(LENGTH - 1), true)],
      /before all/,
    ],
    ['an end before anything came', ({ cookie }) => [doneChunk(cookie)], /before all/],
    [
      'a gap',
      ({ cookie }) => [
        dataChunk(cookie, OFFSET, data(1)),
        dataChunk(cookie, OFFSET + 2, data(LENGTH - 2), true),
      ],
      /before all/,
    ],
    ['a hole of no bytes', ({ cookie }) => [holeChunk(cookie, OFFSET, 0)], /hole of no bytes/],
    ['a hole chunk too short', ({ cookie }) => [chunk(cookie, ChunkType.OFFSET_HOLE, data(11))], /type 2/],
    [
      'data before the request',
      ({ cookie }) => [dataChunk(cookie, OFFSET - 1, data(10))],
      /10 bytes at 4095/,
    ],
    [
      'data behind the request',
      ({ cookie }) => [dataChunk(cookie, OFFSET + LENGTH - 9, data(10))],
      /in the reply to READ/,
    ],
    [
      'a hole behind the request',
      ({ cookie }) => [holeChunk(cookie, OFFSET, LENGTH + 1)],
      /in the reply to READ/,
    ],
    ['a hole of 4 GiB', ({ cookie }) => [holeChunk(cookie, OFFSET, 0xffffffff)], /in the reply to READ/],
    [
      'data at 2^64-1',
      ({ cookie }) => [
        chunk(cookie, ChunkType.OFFSET_DATA, Buffer.concat([u64(0xffffffffffffffffn), data(1)])),
      ],
      /in the reply to READ/,
    ],
    [
      'more data than asked',
      ({ cookie }) => [chunk(cookie, ChunkType.OFFSET_DATA, u64(OFFSET), { length: LENGTH + 9 })],
      /type 1/,
    ],
    [
      'a chunk of 4 GiB',
      ({ cookie }) => [chunk(cookie, ChunkType.OFFSET_DATA, u64(OFFSET), { length: 0xffffffff })],
      /type 1/,
    ],
    [
      'a data chunk without data',
      ({ cookie }) => [chunk(cookie, ChunkType.OFFSET_DATA, u64(OFFSET))],
      /type 1 and 8/,
    ],
    [
      'an empty chunk with data',
      ({ cookie }) => [chunk(cookie, ChunkType.NONE, data(1), { done: true })],
      /empty chunk/,
    ],
    [
      'an empty chunk that is not the last',
      ({ cookie }) => [chunk(cookie, ChunkType.NONE, data(0))],
      /empty chunk/,
    ],
    ['a chunk of unknown type', ({ cookie }) => [chunk(cookie, 77, data(4), { done: true })], /type 77/],
    ['a block status', ({ cookie }) => [statusChunk(cookie, 5, [[LENGTH, 0]], true)], /type 5/],
    ['an error of 0', ({ cookie }) => [errorChunk(cookie, 0)], /without an error/],
    [
      'an error chunk too short',
      ({ cookie }) => [chunk(cookie, ChunkType.ERROR, data(5), { done: true })],
      /type 32769/,
    ],
    [
      'an error message longer than its chunk',
      ({ cookie }) => [
        chunk(cookie, ChunkType.ERROR, Buffer.concat([u32(5), u16(3), data(2)]), { done: true }),
      ],
      /message of 3/,
    ],
    [
      'an error message of 4097 bytes',
      ({ cookie }) => [errorChunk(cookie, 5, 'x'.repeat(4097))],
      /message of 4097/,
    ],
    [
      'an error chunk without end',
      ({ cookie }) => [chunk(cookie, ChunkType.ERROR, Buffer.alloc(0), { length: 0x7fffffff })],
      /type 32769/,
    ],
    [
      'an error at a place outside the request',
      ({ cookie }) => [
        chunk(cookie, ChunkType.ERROR_OFFSET, Buffer.concat([u32(5), u16(0), u64(OFFSET + LENGTH)]), {
          done: true,
        }),
      ],
      /an error at/,
    ],
    [
      'a message that swallows the place of the error',
      ({ cookie }) => [
        chunk(cookie, ChunkType.ERROR_OFFSET, Buffer.concat([u32(5), u16(1), u64(OFFSET)]), { done: true }),
      ],
      /message of 1/,
    ],
  ];
  for (const [what, answer, why, wish] of cases) {
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

  const cases: [string, Answer, RegExp, FakeExport?][] = [
    ['no status', ({ cookie }) => [doneChunk(cookie)], /before all contexts/],
    ['a simple success', ({ cookie }) => [simpleReply(cookie)], /without the block status/],
    ['an unknown context', ({ cookie }) => [statusChunk(cookie, 4, [[4096, 0]], true)], /unknown context 4/],
    [
      'a context twice',
      ({ cookie }) => [statusChunk(cookie, 5, [[4096, 0]]), statusChunk(cookie, 5, [[4096, 0]], true)],
      /twice/,
    ],
    [
      'one context of two',
      ({ cookie }) => [statusChunk(cookie, 5, [[4096, 0]], true)],
      /before all contexts/,
      TWO_CONTEXTS,
    ],
    ['an extent of no bytes', ({ cookie }) => [statusChunk(cookie, 5, [[0, 0]], true)], /extent of no bytes/],
    [
      'extents beyond the request',
      ({ cookie }) => [
        statusChunk(
          cookie,
          5,
          [
            [LENGTH, 0],
            [1, 1],
          ],
          true,
        ),
      ],
      /beyond/,
    ],
    ['no extent', ({ cookie }) => [statusChunk(cookie, 5, [], true)], /type 5 and 4/],
    [
      'half an extent',
      ({ cookie }) => [chunk(cookie, ChunkType.BLOCK_STATUS, Buffer.alloc(16))],
      /type 5 and 16/,
    ],
    [
      'a million extents and one',
      ({ cookie }) => [chunk(cookie, ChunkType.BLOCK_STATUS, u32(5), { length: 4 + 8 * (2 ** 20 + 1) })],
      /type 5/,
    ],
    ['data', ({ cookie }) => [dataChunk(cookie, OFFSET, Buffer.alloc(1), true)], /type 1/],
  ];
  for (const [what, answer, why, wish] of cases) {
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
