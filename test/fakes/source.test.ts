/** Sources that break the protocol or lie: nothing of theirs is ever kept, and the proxy goes on with the next connection. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { Command, Errno } from '../../src/nbd/constants.js';
import {
  assertBlocks,
  BLOCK,
  errnoOfRequest,
  KIB,
  Lab,
  pattern,
  quiet,
  readAt,
  until,
} from '../lab/ferry.js';
import {
  chunk,
  dataChunk,
  doneChunk,
  errorChunk,
  type FakePeer,
  type FakeRequest,
  holeChunk,
  simpleReply,
  startFakeServer,
  u64,
} from './fake-server.js';

const SIZE = 256 * KIB;
const DATA = pattern(SIZE);
const LIE = Buffer.alloc(SIZE, 0xbd);

type Answer = (peer: FakePeer, request: FakeRequest) => void;

const honest: Answer = (peer, { cookie, offset, length }) =>
  peer.send(dataChunk(cookie, offset, DATA.subarray(offset, offset + length), true));

/** Serves DATA; READs are answered by `answer`, until `reformed`. */
async function liar(lab: Lab, answer: Answer) {
  const state = { reformed: false, connections: 0, reads: 0 };
  const server = await startFakeServer(async (peer) => {
    state.connections++;
    await peer.handshake({ size: BigInt(SIZE) });
    for (;;) {
      const request = await peer.request();
      if (request.command === Command.DISC) {
        peer.hangUp();
        return;
      }
      state.reads++;
      (state.reformed ? honest : answer)(peer, request);
    }
  });
  lab.onClose(() => server.stop());
  return { uri: server.uri, state };
}

const breaches: [string, Answer][] = [
  [
    'hangs up in the middle of the data',
    (peer, { cookie, offset, length }) => {
      const whole = dataChunk(cookie, offset, LIE.subarray(0, length), true);
      peer.send(whole.subarray(0, whole.length - 100));
      peer.hangUp();
    },
  ],
  [
    'says that it is done before the last byte',
    (peer, { cookie, offset, length }) =>
      peer.send(dataChunk(cookie, offset, LIE.subarray(0, length - 512)), doneChunk(cookie)),
  ],
  [
    'sends the data of another place',
    (peer, { cookie, offset, length }) =>
      peer.send(dataChunk(cookie, offset + BLOCK, LIE.subarray(0, length), true)),
  ],
  [
    'sends more than was asked for',
    (peer, { cookie, offset, length }) =>
      peer.send(dataChunk(cookie, offset, Buffer.alloc(length + 1), true)),
  ],
  [
    'sends a hole of another length',
    (peer, { cookie, offset, length }) => peer.send(holeChunk(cookie, offset, length + BLOCK, true)),
  ],
  ['answers a request nobody made', (peer, { cookie }) => peer.send(doneChunk(cookie + 77n))],
  [
    'answers with a simple reply despite structured ones',
    (peer, { cookie, length }) => peer.send(simpleReply(cookie, 0, LIE.subarray(0, length))),
  ],
  ['sends rubbish', (peer) => peer.send(Buffer.alloc(300, 0x55))],
  [
    'sends data in a chunk of an unknown type',
    (peer, { cookie, offset }) => peer.send(chunk(cookie, 77, u64(offset), { done: true })),
  ],
  ['hangs up', (peer) => peer.hangUp()],
];

for (const [what, answer] of breaches) {
  test(`a source that ${what}: nothing is kept, the request is sent again`, async (t) => {
    const lab = new Lab(t);
    const { uri, state } = await liar(lab, answer);
    const proxy = await lab.proxy(uri);
    const guest = await proxy.guest();
    const read = readAt(guest, 0, 16 * BLOCK);
    await until(() => state.connections >= 5, 'it was tried again');
    assert.equal(proxy.status.presentBytes, 0);
    assert.ok(readFileSync(proxy.image).equals(Buffer.alloc(SIZE)), 'nothing was written');
    state.reformed = true;
    assertBlocks(await read, DATA.subarray(0, 16 * BLOCK));
    await proxy.service.prefetch(0, SIZE);
    assertBlocks(readFileSync(proxy.image), DATA);
  });
}

for (const [what, answer] of [
  ['before any data', (peer, { cookie }) => peer.send(errorChunk(cookie, Errno.EIO))],
  [
    'behind most of the data',
    (peer, { cookie, offset, length }) =>
      peer.send(dataChunk(cookie, offset, LIE.subarray(0, length - 512)), errorChunk(cookie, Errno.EIO)),
  ],
  [
    'behind all of the data',
    (peer, { cookie, offset, length }) =>
      peer.send(dataChunk(cookie, offset, LIE.subarray(0, length)), errorChunk(cookie, Errno.ENOMEM)),
  ],
] as [string, Answer][]) {
  test(`a source that fails ${what}: EIO, nothing is kept`, async (t) => {
    const lab = new Lab(t);
    const { uri, state } = await liar(lab, answer);
    const proxy = await lab.proxy(uri);
    const guest = await proxy.guest();
    assert.equal(await errnoOfRequest(readAt(guest, 0, BLOCK)), Errno.EIO);
    await quiet();
    assert.equal(proxy.status.presentBytes, 0);
    assert.ok(readFileSync(proxy.image).equals(Buffer.alloc(SIZE)), 'nothing was written');
    assert.equal(state.connections, 2, 'one to ask what it is, one for all the rest');
    state.reformed = true;
    assertBlocks(await readAt(guest, 0, BLOCK), DATA.subarray(0, BLOCK));
  });
}
