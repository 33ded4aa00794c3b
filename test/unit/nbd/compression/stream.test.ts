/** The stream between two ends in memory and over sockets: content, order, bounds, ends, and peers that break the rules. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { type Duplex, duplexPair, type Readable } from 'node:stream';
import { after, test } from 'node:test';
import binding from 'zstd-napi/binding.js';
import { BlockferryError } from '../../../../src/errors.js';
import {
  FRAME_BYTES_MAX,
  FRAME_HEADER_BYTES,
  FrameKind,
  writeFrameHeader,
} from '../../../../src/nbd/codec/frames.js';
import { CompressionPool, POOL_THREADS_MAX } from '../../../../src/nbd/compression/pool.js';
import {
  CONTENT_BYTES,
  CompressedStream,
  UNREAD_BYTES_MAX,
  UNSENT_CONTENT_BYTES_MAX,
} from '../../../../src/nbd/compression/stream.js';

const pool = new CompressionPool();
after(() => pool.end());

const TEXT = Buffer.from('the quick brown fox jumps over the lazy dog, and again; ');
const MIB = 1 << 20;

function pair(level: 'auto' | number = 1): { a: CompressedStream; b: CompressedStream; below: Duplex[] } {
  const below = duplexPair();
  const [a, b] = below.map((end) => new CompressedStream(end, level, { pool }));
  return { a: a!, b: b!, below };
}

async function readAll(stream: Readable): Promise<Buffer> {
  const chunks: Buffer[] = [];
  stream.on('data', (chunk: Buffer) => chunks.push(chunk)); // an iterator would destroy it at the end
  await once(stream, 'end');
  return Buffer.concat(chunks);
}

/** A stream whose peer is the test. */
function alone(): { stream: CompressedStream; peer: Duplex } {
  const [end, peer] = duplexPair();
  return { stream: new CompressedStream(end, 1, { pool }), peer };
}

function zstdFrame(content: Buffer, contentBytes = content.length): Buffer {
  const output = Buffer.alloc(binding.compressBound(content.length));
  const payload = output.subarray(0, binding.compress(output, content, 1));
  const header = Buffer.alloc(FRAME_HEADER_BYTES);
  writeFrameHeader(header, 0, FrameKind.ZSTD, payload.length, contentBytes);
  return Buffer.concat([header, payload]);
}

test('content of any kind and length arrives as it was written, both ways, and each end ends', async () => {
  const { a, b } = pair();
  const pieces = [1, 17, 4000, 9000, CONTENT_BYTES, 3 * MIB + 5, 12].flatMap((length) => [
    randomBytes(length),
    Buffer.alloc(length, TEXT),
  ]);
  const whole = Buffer.concat(pieces);
  const received = [readAll(a), readAll(b)];
  for (const piece of pieces) {
    a.write(piece);
    b.write(piece);
    if (piece.length < MIB) await new Promise(setImmediate); // a turn of its own
  }
  a.end();
  b.end();
  for (const bytes of await Promise.all(received)) assert.ok(bytes.equals(whole));
  assert.ok(a.wireBytesSent < whole.length * 0.6, `${a.wireBytesSent} of ${whole.length}`);
  assert.equal(a.wireBytesSent, b.wireBytesReceived);
  assert.ok(pool.threads <= POOL_THREADS_MAX);
});

test('what does not shrink costs the headers and no more', async () => {
  const { a, b } = pair();
  const bytes = randomBytes(8 * MIB);
  a.end(bytes);
  assert.ok((await readAll(b)).equals(bytes));
  assert.ok(a.wireBytesSent <= bytes.length + 64 * FRAME_HEADER_BYTES);
  b.destroy();
});

test("the writer's memory is free when write returns", async () => {
  const { a, b } = pair();
  const memory = Buffer.alloc(64 << 10, TEXT);
  const expected = Buffer.from(memory);
  a.write(memory);
  assert.equal(a.writableLength, 0);
  memory.fill(0);
  a.end();
  assert.ok((await readAll(b)).equals(expected));
  b.destroy();
});

test('a small message leaves at the end of its turn, raw', async () => {
  const { stream, peer } = alone();
  stream.write('hello');
  const [bytes] = (await once(peer, 'data')) as [Buffer];
  assert.equal(bytes.subarray(FRAME_HEADER_BYTES).toString(), 'hello');
  stream.destroy();
});

test('the writer of a peer that does not read waits, within bounds', async () => {
  const { stream, peer } = alone();
  let written = 0;
  while (stream.write(randomBytes(CONTENT_BYTES)) && written < 64 * MIB) written += CONTENT_BYTES;
  assert.ok(written <= UNSENT_CONTENT_BYTES_MAX + MIB, `${written} bytes were taken`);
  const drained = once(stream, 'drain');
  peer.resume();
  await drained;
  stream.destroy();
});

test('the sender of a reader that does not read waits, within bounds', async () => {
  const { a, b } = pair();
  const half = CONTENT_BYTES / 2;
  const chunk = Buffer.concat([randomBytes(half), Buffer.alloc(half)]);
  const total = 128 * chunk.length;
  let taken = 0;
  const send = (): void => {
    while (taken < total && !a.destroyed) {
      taken += chunk.length;
      if (!a.write(chunk)) return;
    }
  };
  a.on('drain', send);
  send();
  await new Promise<void>((resolve) => {
    let before = -1;
    const look = setInterval(() => {
      if (taken === before) {
        clearInterval(look);
        resolve();
      }
      before = taken;
    }, 200);
  });
  assert.ok(taken < UNREAD_BYTES_MAX + UNSENT_CONTENT_BYTES_MAX + 4 * MIB, `${taken} bytes are held`);
  let read = 0;
  b.on('data', (bytes: Buffer) => {
    read += bytes.length;
    if (read === total) b.destroy();
  });
  await once(b, 'close');
  assert.equal(read, total);
  a.destroy();
});

for (const [what, bytes] of [
  ['garbage', Buffer.alloc(64, 'no frame at all ')],
  ['garbage behind a frame', Buffer.concat([zstdFrame(Buffer.alloc(9000)), Buffer.alloc(20, 'x')])],
  [
    'a zstd frame of garbage',
    Buffer.concat([zstdFrame(randomBytes(10), 500).subarray(0, 16), Buffer.alloc(30)]),
  ],
  ['a bomb: more content than announced', zstdFrame(Buffer.alloc(64 * MIB), 9000)],
  ['a bomb: more content than a frame may have', zstdFrame(Buffer.alloc(64 * MIB), FRAME_BYTES_MAX)],
  ['less content than announced', zstdFrame(Buffer.alloc(9000), 9001)],
] as const)
  test(`${what} ends the connection`, async () => {
    const { stream, peer } = alone();
    stream.resume();
    peer.write(bytes);
    const [error] = await once(stream, 'error');
    assert.ok(error instanceof BlockferryError && error.code === 'protocol', String(error));
    if (!stream.closed) await once(stream, 'close');
  });

test('an end in the middle of a frame ends the connection', async () => {
  const { stream, peer } = alone();
  stream.resume();
  peer.end(zstdFrame(Buffer.alloc(9000)).subarray(0, 15));
  const [error] = await once(stream, 'error');
  assert.ok(error instanceof BlockferryError && error.code === 'protocol');
});

test('one side may end and still be answered', async () => {
  const { a, b } = pair();
  a.end('question');
  assert.equal((await readAll(b)).toString(), 'question');
  b.end('answer');
  assert.equal((await readAll(a)).toString(), 'answer');
});

test('a transport that breaks takes the stream with it', async () => {
  const { a, b, below } = pair();
  const failed = once(a, 'error');
  below[0]!.destroy(new Error('cut'));
  assert.equal(((await failed)[0] as Error).message, 'cut');
  b.destroy();
});

test('a worker that dies ends the connections that it worked for, and the next has another', async () => {
  const own = new CompressionPool();
  const [end, peer] = duplexPair();
  const stream = new CompressedStream(end, 19, { pool: own });
  peer.resume();
  stream.write(Buffer.alloc(CONTENT_BYTES, TEXT));
  stream.end();
  const failed = once(stream, 'error');
  await new Promise(setImmediate);
  void own.end();
  const [error] = await failed;
  assert.ok(error instanceof BlockferryError && error.code === 'closed');
  const [left, right] = duplexPair();
  const [again, other] = [
    new CompressedStream(left, 1, { pool: own }),
    new CompressedStream(right, 1, { pool: own }),
  ];
  again.end(Buffer.alloc(CONTENT_BYTES, TEXT));
  assert.equal((await readAll(other)).length, CONTENT_BYTES);
  other.destroy();
  await own.end();
});
