/**
 * Answers that break the protocol, by name: what a server sends in answer to a READ or a BLOCK_STATUS of any range, and what is said
 * of it. `why` fits for every request of 4096 bytes at least.
 */

import { ChunkType, Errno } from '../../src/nbd/constants.js';
import { type Answer, TWO_CONTEXTS } from './against.js';
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

export type BadReply = readonly [name: string, answer: Answer, why: RegExp, wish?: FakeExport];

const data = (length: number) => Buffer.alloc(length, 0xd1);

export const BAD_READ_REPLIES: readonly BadReply[] = [
  ['a wrong magic', ({ cookie }) => [u32(0x12345678), u32(0), u64(cookie)], /magic 0x12345678/],
  ['a cookie of nobody', () => [simpleReply(0x1234n)], /cookie/],
  ['a cookie of this slot in another use', ({ cookie }) => [doneChunk(cookie + (1n << 32n))], /cookie/],
  ['a slot that was never used', ({ cookie }) => [doneChunk(cookie + 4000n)], /cookie/],
  ['a simple reply', ({ cookie, length }) => [simpleReply(cookie, 0, data(length))], /simple reply to READ/],
  ['a simple error', ({ cookie }) => [simpleReply(cookie, Errno.EIO)], /simple reply to READ/],
  [
    'a structured reply that was not agreed on',
    ({ cookie, offset, length }) => [dataChunk(cookie, offset, data(length), true)],
    /not agreed/,
    { structured: false },
  ],
  [
    'a byte twice',
    ({ cookie, offset, length }) => [
      dataChunk(cookie, offset, data(length - 1)),
      dataChunk(cookie, offset + length - 2, data(2), true),
    ],
    /twice/,
  ],
  [
    'all of it twice',
    ({ cookie, offset, length }) => [
      dataChunk(cookie, offset, data(length)),
      dataChunk(cookie, offset, data(length), true),
    ],
    /twice/,
  ],
  [
    'data over a hole',
    ({ cookie, offset, length }) => [
      holeChunk(cookie, offset, length),
      dataChunk(cookie, offset + 10, data(1), true),
    ],
    /twice/,
  ],
  [
    'an end before all came',
    ({ cookie, offset, length }) => [dataChunk(cookie, offset, data(length - 1), true)],
    /before all/,
  ],
  ['an end before anything came', ({ cookie }) => [doneChunk(cookie)], /before all/],
  [
    'a gap',
    ({ cookie, offset, length }) => [
      dataChunk(cookie, offset, data(1)),
      dataChunk(cookie, offset + 2, data(length - 2), true),
    ],
    /before all/,
  ],
  ['a hole of no bytes', ({ cookie, offset }) => [holeChunk(cookie, offset, 0)], /hole of no bytes/],
  ['a hole chunk too short', ({ cookie }) => [chunk(cookie, ChunkType.OFFSET_HOLE, data(11))], /type 2/],
  [
    'data before the request',
    ({ cookie, offset }) => [dataChunk(cookie, offset - 1, data(10))],
    /10 bytes at \d+ in the reply/,
  ],
  [
    'data behind the request',
    ({ cookie, offset, length }) => [dataChunk(cookie, offset + length - 9, data(10))],
    /in the reply to READ/,
  ],
  [
    'a hole behind the request',
    ({ cookie, offset, length }) => [holeChunk(cookie, offset, length + 1)],
    /in the reply to READ/,
  ],
  [
    'a hole of 4 GiB',
    ({ cookie, offset }) => [holeChunk(cookie, offset, 0xffffffff)],
    /in the reply to READ/,
  ],
  [
    'data at 2^64-1',
    ({ cookie }) => [
      chunk(cookie, ChunkType.OFFSET_DATA, Buffer.concat([u64(0xffffffffffffffffn), data(1)])),
    ],
    /in the reply to READ/,
  ],
  [
    'more data than asked',
    ({ cookie, offset, length }) => [
      chunk(cookie, ChunkType.OFFSET_DATA, u64(offset), { length: length + 9 }),
    ],
    /type 1/,
  ],
  [
    'a chunk of 4 GiB',
    ({ cookie, offset }) => [chunk(cookie, ChunkType.OFFSET_DATA, u64(offset), { length: 0xffffffff })],
    /type 1/,
  ],
  [
    'a data chunk without data',
    ({ cookie, offset }) => [chunk(cookie, ChunkType.OFFSET_DATA, u64(offset))],
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
  ['a block status', ({ cookie, length }) => [statusChunk(cookie, 5, [[length, 0]], true)], /type 5/],
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
    ({ cookie, offset, length }) => [
      chunk(cookie, ChunkType.ERROR_OFFSET, Buffer.concat([u32(5), u16(0), u64(offset + length)]), {
        done: true,
      }),
    ],
    /an error at/,
  ],
  [
    'a message that swallows the place of the error',
    ({ cookie, offset }) => [
      chunk(cookie, ChunkType.ERROR_OFFSET, Buffer.concat([u32(5), u16(1), u64(offset)]), { done: true }),
    ],
    /message of 1/,
  ],
];

/** Of the context 5, `base:allocation`. */
export const BAD_STATUS_REPLIES: readonly BadReply[] = [
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
    ({ cookie, length }) => [
      statusChunk(
        cookie,
        5,
        [
          [length, 0],
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
  ['data', ({ cookie, offset }) => [dataChunk(cookie, offset, Buffer.alloc(1), true)], /type 1/],
];
