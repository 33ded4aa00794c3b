/** The client with extended headers: what it sends to a server that keeps to them, and servers that do not. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { ChunkType, Command, CommandFlag, Errno, TransmissionFlag } from '../../src/nbd/constants.js';
import { type Answer, answering, connected, failure, LENGTH, OFFSET } from './against.js';
import {
  ALL_FLAGS,
  dataChunk,
  extendedChunk,
  type FakeExport,
  type FakePeer,
  type FakeRequest,
  simpleReply,
  u16,
  u32,
  u64,
} from './fake-server.js';

const { NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR } = ChunkType;
const EXTENDED: FakeExport = { extended: true };
const HUGE: FakeExport = { extended: true, size: 2n ** 43n };
const STATUS: FakeExport = { ...HUGE, contexts: [[5, 'base:allocation']] };
const TWO: FakeExport = {
  ...HUGE,
  contexts: [
    [5, 'base:allocation'],
    [6, 'x:y'],
  ],
};

const data = (length: number) => Buffer.alloc(length, 0xd1);
const nothing = Buffer.alloc(0);
const content = (offset: number | bigint, bytes: Buffer) => Buffer.concat([u64(offset), bytes]);
const hole = (offset: number, length: number) => Buffer.concat([u64(offset), u32(length)]);
const statusOf = (
  context: number,
  extents: readonly (readonly [number | bigint, number | bigint])[],
  count = extents.length,
) =>
  Buffer.concat([
    u32(context),
    u32(count),
    ...extents.map(([length, status]) => Buffer.concat([u64(length), u64(status)])),
  ]);

/** Answers every request with success, and keeps what was asked. */
const agreeing = (seen: FakeRequest[]) => async (peer: FakePeer) => {
  for (;;) {
    const request = await peer.request();
    seen.push(request);
    if ((request.flags & CommandFlag.PAYLOAD_LEN) !== 0) await peer.read(request.length);
    peer.send(extendedChunk(request, NONE, nothing));
  }
};

describe('a client with extended headers', () => {
  it('asks about more than 4 GiB in one request', async () => {
    const seen: FakeRequest[] = [];
    await connected(HUGE, agreeing(seen), async (client) => {
      assert.ok(client.info.extended && client.info.structured);
      await client.trim(0, 2 ** 43);
      await client.zero(4096, 2 ** 43 - 4096);
      await client.cache(2 ** 42, 2 ** 33 + 1);
      await assert.rejects(client.trim(1, 2 ** 43), failure('bounds'));
    });
    assert.deepEqual(
      seen.map(({ command, offset, length }) => [command, offset, length]),
      [
        [Command.TRIM, 0, 2 ** 43],
        [Command.WRITE_ZEROES, 4096, 2 ** 43 - 4096],
        [Command.CACHE, 2 ** 42, 2 ** 33 + 1],
      ],
    );
  });

  it('says PAYLOAD_LEN with a WRITE, and with nothing else', async () => {
    const seen: FakeRequest[] = [];
    await connected(EXTENDED, agreeing(seen), async (client) => {
      await client.write(OFFSET, data(LENGTH), 0, LENGTH, { fua: true });
      await client.flush();
      await client.trim(0, 512);
    });
    assert.deepEqual(
      seen.map(({ flags }) => flags),
      [CommandFlag.PAYLOAD_LEN | CommandFlag.FUA, 0, 0],
    );
  });

  it('reads data and holes', () =>
    connected(
      EXTENDED,
      answering((request) => [
        extendedChunk(request, OFFSET_HOLE, hole(OFFSET, 4096), { done: false }),
        extendedChunk(request, OFFSET_DATA, content(OFFSET + 4096, data(4096))),
      ]),
      async (client) => {
        const buffer = Buffer.alloc(LENGTH, 9);
        await client.read(OFFSET, LENGTH, buffer);
        assert.deepEqual(buffer, Buffer.concat([Buffer.alloc(4096), data(4096)]));
      },
    ));

  it('takes extents of any length, cut at the end of the export', () =>
    connected(
      STATUS,
      answering((request) => [
        extendedChunk(
          request,
          BLOCK_STATUS_EXT,
          statusOf(5, [
            [2 ** 40, 0],
            [0xffffffffffffffffn, 3],
          ]),
        ),
      ]),
      async (client) => {
        assert.deepEqual(await client.blockStatus('base:allocation', 0, 2 ** 43), [
          { length: 2 ** 40, flags: 0 },
          { length: 2 ** 43 - 2 ** 40, flags: 3 },
        ]);
      },
    ));

  it('takes a status of more than 32 bits, of a context that may have it', () =>
    connected(
      TWO,
      answering((request) => [
        extendedChunk(request, BLOCK_STATUS_EXT, statusOf(5, [[4096, 1]]), { done: false }),
        extendedChunk(request, BLOCK_STATUS_EXT, statusOf(6, [[4096, 2n ** 40n]])),
      ]),
      async (client) => {
        assert.deepEqual(await client.blockStatus('x:y', 0, 4096), [{ length: 4096, flags: 2 ** 40 }]);
      },
    ));

  it('asks for one context of several where the server filters', async () => {
    const payloads: Buffer[] = [];
    await connected(
      { ...TWO, flags: ALL_FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD },
      async (peer) => {
        const request = await peer.request();
        assert.equal(request.flags, CommandFlag.PAYLOAD_LEN | CommandFlag.REQ_ONE);
        payloads.push(await peer.read(request.length));
        peer.send(extendedChunk(request, BLOCK_STATUS_EXT, statusOf(6, [[4096, 7]])));
      },
      async (client) => {
        const extents = await client.blockStatus('x:y', OFFSET, 2 ** 41, { one: true });
        assert.deepEqual(extents, [{ length: 4096, flags: 7 }]);
      },
    );
    assert.deepEqual(payloads, [Buffer.concat([u64(2 ** 41), u32(6)])]);
  });

  it('is told errors', () =>
    connected(
      EXTENDED,
      answering((request) => [
        extendedChunk(request, ERROR, Buffer.concat([u32(Errno.ENOSPC), u16(2), data(2)])),
      ]),
      async (client) => {
        await assert.rejects(
          client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH)),
          failure('source-io', /ENOSPC/),
        );
        assert.equal(client.inFlight, 0);
      },
    ));

  it('can be told to do without', () =>
    connected(
      { ...EXTENDED, extendedHeaders: false },
      answering(({ cookie }) => [simpleReply(cookie)]),
      async (client) => {
        assert.ok(!client.info.extended && client.info.structured);
        await client.flush();
        await assert.rejects(client.trim(0, 2 ** 33), failure('bounds'));
      },
    ));

  it('without them nothing is longer than 4 GiB', () =>
    connected(
      { size: 2n ** 43n },
      async () => {},
      async (client) => {
        await assert.rejects(client.trim(0, 2 ** 32), failure('bounds', /split it/));
        await assert.rejects(client.cache(0, 2 ** 43), failure('bounds', /split it/));
      },
    ));
});

describe('a server that breaks the protocol of extended headers', () => {
  type Case = [string, Answer, RegExp];
  const moved = ({ cookie, offset }: FakeRequest, by: bigint) => ({
    cookie,
    offset: BigInt.asUintN(64, BigInt(offset) + by),
  });
  const reads: Case[] = [
    ['a wrong magic', () => [Buffer.alloc(32, 1)], /magic 0x1010101/],
    ['a simple reply', ({ cookie }) => [simpleReply(cookie, 0, data(LENGTH))], /magic 0x67446698 despite/],
    [
      'a simple error',
      ({ cookie }) => [simpleReply(cookie, Errno.EIO), nothing, Buffer.alloc(16)],
      /0x67446698/,
    ],
    [
      'a structured reply',
      ({ cookie }) => [dataChunk(cookie, OFFSET, data(LENGTH), true)],
      /0x668e33ef despite/,
    ],
    ['a cookie of nobody', ({ offset }) => [extendedChunk({ cookie: 77n, offset }, NONE, nothing)], /cookie/],
    ...[-1n, 1n, 1n << 32n, 1n << 52n, 1n << 63n, -1n << 62n].map(
      (by): Case => [
        `another offset, by ${by}`,
        (request) => [extendedChunk(moved(request, by), OFFSET_DATA, content(OFFSET, data(LENGTH)))],
        /another offset/,
      ],
    ),
    ['a length of 4 GiB', (to) => [extendedChunk(to, OFFSET_DATA, nothing, { length: 2n ** 32n })], /type 1/],
    [
      'a length of 2^64 - 1',
      (to) => [extendedChunk(to, OFFSET_DATA, nothing, { length: 2n ** 64n - 1n })],
      /type 1/,
    ],
    [
      'a length of 2^32 + what was asked',
      (to) => [extendedChunk(to, OFFSET_DATA, nothing, { length: 2n ** 32n + BigInt(LENGTH) + 8n })],
      /type 1/,
    ],
    [
      'a hole of 2^32 + 12 bytes',
      (to) => [extendedChunk(to, OFFSET_HOLE, nothing, { length: 2n ** 32n + 12n })],
      /type 2/,
    ],
    [
      'an error of 2^40 bytes',
      (to) => [extendedChunk(to, ERROR, nothing, { length: 2n ** 40n })],
      /type 32769/,
    ],
    [
      'data at 2^63',
      (to) => [extendedChunk(to, OFFSET_DATA, content(2n ** 63n, data(9)))],
      /in the reply to READ/,
    ],
    [
      'an end before all came',
      (to) => [extendedChunk(to, OFFSET_DATA, content(OFFSET, data(9)))],
      /before all/,
    ],
    [
      'an empty chunk that is not the last',
      (to) => [extendedChunk(to, NONE, nothing, { done: false })],
      /empty chunk/,
    ],
    ['a block status', (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[1, 0]]))], /type 6/],
  ];
  for (const [what, answer, why] of reads)
    it(`${what}, to a READ`, () =>
      connected(EXTENDED, answering(answer), async (client) => {
        const buffer = Buffer.alloc(LENGTH + 2, 0x33);
        await assert.rejects(client.read(OFFSET, LENGTH, buffer, 1), failure('closed', why));
        assert.ok(failure('protocol', why)(await client.closed));
        assert.deepEqual([buffer[0], buffer[LENGTH + 1]], [0x33, 0x33]);
        assert.equal(client.inFlight, 0);
      }));

  const statuses: Case[] = [
    [
      'compact descriptors',
      (to) => [extendedChunk(to, BLOCK_STATUS, Buffer.concat([u32(5), u32(4096), u32(0)]))],
      /type 5/,
    ],
    ['no descriptor', (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, []))], /type 6 and 8/],
    ['half a descriptor', (to) => [extendedChunk(to, BLOCK_STATUS_EXT, Buffer.alloc(20))], /type 6 and 20/],
    [
      'a count that is too small',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[1, 0]], 0))],
      /count of 0/,
    ],
    [
      'a count that is too large',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[1, 0]], 2 ** 32 - 1))],
      /count of 4294967295/,
    ],
    [
      'a count that wraps to the right one',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[1, 0]], 2 ** 28 + 1))],
      /count/,
    ],
    [
      'a million descriptors and one',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, nothing, { length: 8n + 16n * (2n ** 20n + 1n) })],
      /type 6/,
    ],
    [
      '2^60 descriptors',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, nothing, { length: 2n ** 64n - 8n })],
      /type 6/,
    ],
    [
      'a descriptor of no bytes',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[0, 0]]))],
      /extent of no bytes/,
    ],
    [
      'a status of 33 bits in base:',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[1, 2n ** 32n]]))],
      /beyond 32 bits/,
    ],
    [
      'descriptors beyond the request',
      (to) => [
        extendedChunk(
          to,
          BLOCK_STATUS_EXT,
          statusOf(5, [
            [2n ** 63n, 0],
            [1, 1],
          ]),
        ),
      ],
      /beyond what/,
    ],
    [
      'an unknown context',
      (to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(6, [[1, 0]]))],
      /unknown context 6/,
    ],
    ['nothing', (to) => [extendedChunk(to, NONE, nothing)], /before all contexts/],
    [
      'success without status',
      ({ cookie }) => [simpleReply(cookie), Buffer.alloc(16)],
      /despite extended headers/,
    ],
  ];
  for (const [what, answer, why] of statuses)
    it(`${what}, to a BLOCK_STATUS`, () =>
      connected(STATUS, answering(answer), async (client) => {
        await assert.rejects(client.blockStatus('base:allocation', 0, 2 ** 41), failure('closed', why));
        assert.ok(failure('protocol', why)(await client.closed));
      }));

  it('a descriptor longer than what was asked for, with REQ_ONE', () =>
    connected(
      STATUS,
      answering((to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(5, [[2n ** 41n + 1n, 0]]))]),
      async (client) => {
        const status = client.blockStatus('base:allocation', 0, 2 ** 41, { one: true });
        await assert.rejects(status, failure('closed', /longer than what was asked/));
      },
    ));

  it('a status of 54 bits', () =>
    connected(
      TWO,
      answering((to) => [extendedChunk(to, BLOCK_STATUS_EXT, statusOf(6, [[1, 2n ** 53n]]))]),
      async (client) => {
        await assert.rejects(client.blockStatus('x:y', 0, 4096), failure('closed', /beyond 53 bits/));
      },
    ));

  it('another context than the one it was to filter for', () =>
    connected(
      { ...TWO, flags: ALL_FLAGS | TransmissionFlag.BLOCK_STATUS_PAYLOAD },
      async (peer) => {
        const request = await peer.request();
        peer.send(extendedChunk(request, BLOCK_STATUS_EXT, statusOf(5, [[4096, 7]])));
      },
      async (client) => {
        await assert.rejects(client.blockStatus('x:y', 0, 4096), failure('closed', /not asked for/));
      },
    ));

  it('another offset in the answer to FLUSH', () =>
    connected(
      EXTENDED,
      answering(({ cookie }) => [extendedChunk({ cookie, offset: 1 }, NONE, nothing)]),
      async (client) => {
        await assert.rejects(client.flush(), failure('closed', /another offset/));
      },
    ));
});
