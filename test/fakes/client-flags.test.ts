/** Command flags of the client: what it says, what it holds the server to, and what it never says. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { NbdReplyError } from '../../src/nbd/client/client.js';
import { CommandFlag, Errno, TransmissionFlag } from '../../src/nbd/constants.js';
import { type Answer, answering, connected, failure, LENGTH, OFFSET } from './against.js';
import { ALL_FLAGS, dataChunk, type FakeExport, simpleReply } from './fake-server.js';

const data = (length: number) => Buffer.alloc(length, 0xd1);

describe('DF and FAST_ZERO on the client side', () => {
  const WHOLE: FakeExport = { flags: ALL_FLAGS | TransmissionFlag.SEND_DF };
  const pieces: Answer = ({ cookie }) => [
    dataChunk(cookie, OFFSET, data(4096)),
    dataChunk(cookie, OFFSET + 4096, data(4096), true),
  ];

  it('DF is said, and one piece is what it takes', () =>
    connected(
      WHOLE,
      answering(({ cookie, flags }) => {
        assert.equal(flags, CommandFlag.DF);
        return [dataChunk(cookie, OFFSET, data(LENGTH), true)];
      }),
      async (client) => {
        const buffer = Buffer.alloc(LENGTH);
        await client.read(OFFSET, LENGTH, buffer, 0, { dontFragment: true });
        assert.deepEqual(buffer, data(LENGTH));
      },
    ));

  it('several pieces despite DF end the connection; without DF they are fine', async () => {
    await connected(WHOLE, answering(pieces), async (client) => {
      const read = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH), 0, { dontFragment: true });
      await assert.rejects(read, failure('closed', /was to be whole/));
    });
    await connected(WHOLE, answering(pieces), (client) => client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH)));
  });

  it('DF that is not offered is never sent', () =>
    connected(
      {},
      async () => {},
      async (client) => {
        const read = client.read(OFFSET, LENGTH, Buffer.alloc(LENGTH), 0, { dontFragment: true });
        await assert.rejects(read, failure('usage', /DF/));
      },
    ));

  it('FAST_ZERO is said where it is offered, and ENOTSUP can be told', () =>
    connected(
      { flags: ALL_FLAGS | TransmissionFlag.SEND_FAST_ZERO },
      answering(({ cookie, flags }) => {
        assert.equal(flags, CommandFlag.FAST_ZERO | CommandFlag.NO_HOLE);
        return [simpleReply(cookie, Errno.ENOTSUP)];
      }),
      async (client) => {
        await assert.rejects(client.zero(0, 512, { fast: true, noHole: true }), (error: Error) => {
          return error.cause instanceof NbdReplyError && error.cause.errno === Errno.ENOTSUP;
        });
      },
    ));

  it('FAST_ZERO that is not offered is never sent', () =>
    connected(
      {},
      async () => {},
      async (client) => {
        await assert.rejects(client.zero(0, 512, { fast: true }), failure('usage', /FAST_ZERO/));
      },
    ));
});
