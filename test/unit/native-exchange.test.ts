/** `exchange` without a socket: which requests it carries out, what it answers, and what it leaves alone. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { Command, CommandFlag, type ReplyForm } from '../../src/nbd/constants.js';
import { Ending } from '../../src/nbd/server/exchange.js';
import type { RawRequest } from '../fakes/raw-client.js';
import { ACCESS, exchanged, FORMS, type Given, replyIn, requestIn } from './native-exchange-fixtures.js';
import { MIB, opened, patterned, sparse } from './native-fixtures.js';

const { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const { FUA, NO_HOLE, DF, PAYLOAD_LEN } = CommandFlag;
const BLOCK = 4096;
/** The last block is cut short. */
const SIZE = 20 * BLOCK + 100;

/** A payload that is not what `patterned` puts there. */
const payload = (length: number, seed = 1): Buffer =>
  Buffer.from(Uint8Array.from({ length }, (_, i) => (i * 7 + seed) & 0xff));

/** Map of `blocks` blocks of which those of `missing` are not here. */
function mapOf(blocks: number, ...missing: number[]): Uint8Array {
  const map = new Uint8Array(Math.ceil(blocks / 8)).fill(0xff);
  for (const block of missing) map[block >> 3]! &= ~(1 << (block & 7));
  return map;
}

for (const form of FORMS) {
  describe(`exchange in ${form} form`, () => {
    const formNumber = FORMS.indexOf(form);
    const given = (image: number, ...requests: Buffer[]): Given => ({
      image,
      imageBytes: SIZE,
      form: formNumber,
      input: Buffer.concat(requests),
    });
    const read = (cookie: number, offset: number, length: number, flags = 0): RawRequest => ({
      command: READ,
      cookie,
      offset,
      length,
      flags,
    });

    test('carries out READs and WRITEs in their order and answers each as the session would', () => {
      const { path, fd, content } = patterned(SIZE);
      const requests: RawRequest[] = [
        read(0x0102030405060, 0, BLOCK),
        { command: WRITE, cookie: 2 ** 53 - 1, offset: 100, payload: payload(5000) },
        read(0, 1, 3, form === 'simple' ? 0 : DF),
        read(3, 99, 6000),
        { command: WRITE, cookie: 4, offset: SIZE - 1, payload: payload(1) },
        { command: WRITE, cookie: 4, offset: 100, payload: payload(1, 9) },
        read(5, SIZE - 1, 1),
        read(6, 0, SIZE),
      ];
      const { input, ...rest } = given(fd, ...requests.map((request) => requestIn(form, request)));
      const replies = requests.map((request) => {
        const [offset, length] = [Number(request.offset), Number(request.length)];
        if (request.command === READ)
          return replyIn(form, request, Buffer.from(content.subarray(offset, offset + length)));
        request.payload!.copy(content, offset);
        return replyIn(form, request);
      });
      const before = Buffer.from(input);
      const done = exchanged({ ...rest, input });
      assert.equal(done.ending, Ending.IDLE);
      assert.deepEqual([done.at, done.end, done.outFrom], [input.length, input.length, 0]);
      assert.ok(done.answers.equals(Buffer.concat(replies)));
      assert.ok(readFileSync(path).equals(content));
      assert.ok(input.equals(before), 'the input is not moved unless it receives');
    });

    test('begins at `at` and answers behind `outTo`', () => {
      const { fd, content } = patterned(SIZE);
      const request = requestIn(form, read(7, 5, 50));
      const input = Buffer.concat([Buffer.from('before'), request, Buffer.from('behind')]);
      const output = Buffer.alloc(300, 0xee);
      const end = 6 + request.length;
      const done = exchanged({ ...given(fd), input, output, at: 6, end, outFrom: 10, outTo: 20 });
      assert.deepEqual([done.ending, done.at, done.end, done.outFrom], [Ending.IDLE, end, end, 10]);
      const reply = replyIn(form, read(7, 5, 50), content.subarray(5, 55));
      assert.deepEqual(
        output,
        Buffer.concat([Buffer.alloc(20, 0xee), reply, Buffer.alloc(280 - reply.length, 0xee)]),
      );
    });

    test('leaves what has not come whole: a header, a payload', () => {
      const { path, fd, content } = patterned(SIZE);
      const first = requestIn(form, read(1, 0, 10));
      const write = requestIn(form, { command: WRITE, cookie: 2, offset: 0, payload: payload(100) });
      const headBytes = write.length - 100;
      for (const come of [1, 4, headBytes - 1, headBytes, headBytes + 1, write.length - 1]) {
        const done = exchanged(given(fd, first, write.subarray(0, come)));
        assert.deepEqual([done.ending, done.at], [Ending.IDLE, first.length], `${come} bytes of it`);
        assert.ok(done.answers.equals(replyIn(form, read(1, 0, 10), content.subarray(0, 10))));
      }
      assert.ok(readFileSync(path).equals(content));
    });

    test('stops where the output is full, however few replies are to be sent together', () => {
      const { fd, content } = patterned(SIZE);
      const requests = [read(1, 0, 100), read(2, 100, 100), read(3, 200, 100)];
      const bytes = requests.map((request) => requestIn(form, request));
      const replies = requests.map((request, i) =>
        replyIn(form, request, content.subarray(i * 100, i * 100 + 100)),
      );
      const two = replies[0]!.length + replies[1]!.length;
      const output = Buffer.alloc(two + replies[2]!.length - 1);
      const done = exchanged({ ...given(fd, ...bytes), output, repliesMax: 1 });
      assert.deepEqual([done.ending, done.at], [Ending.UNSENT, bytes[0]!.length + bytes[1]!.length]);
      assert.ok(done.answers.equals(Buffer.concat(replies.slice(0, 2))));
      const write = requestIn(form, { command: WRITE, cookie: 4, offset: 0, payload: payload(9) });
      const full = exchanged({ ...given(fd, write), output: Buffer.alloc(15) });
      assert.deepEqual([full.ending, full.at, full.outTo], [Ending.UNSENT, 0, 0]);
      assert.equal(
        readFileSync(`/proc/self/fd/${fd}`)[0],
        content[0],
        'not written without room for its reply',
      );
    });

    describe('stops before, and leaves alone', () => {
      for (const [name, request, more = {}] of othersIn(form)) {
        test(name, () => {
          const { path, fd, content } = patterned(SIZE);
          const good = requestIn(form, read(1, 0, 10));
          const input = Buffer.concat([good, request, good]);
          const before = Buffer.from(input);
          const output = Buffer.alloc(1 << 17, 0xee);
          const done = exchanged({
            ...given(fd),
            input,
            output,
            readBytesMax: 8192,
            writeBytesMax: 8192,
            ...more,
          });
          const blind = more.access === ACCESS.WRITES || more.present?.length === 0;
          const reply = replyIn(form, read(1, 0, 10), content.subarray(0, 10));
          assert.deepEqual(
            [done.ending, done.at, done.end],
            [Ending.OTHER, blind ? 0 : good.length, input.length],
          );
          assert.ok(done.answers.equals(blind ? Buffer.alloc(0) : reply));
          assert.ok(output.subarray(done.outTo).every((byte) => byte === 0xee));
          assert.ok(input.equals(before));
          assert.ok(readFileSync(path).equals(content));
        });
      }
    });

    test('takes what touches only blocks that are here', () => {
      const { path, fd, content } = patterned(SIZE);
      const blocks = Math.ceil(SIZE / BLOCK);
      const present = mapOf(blocks, 3, 7, 8, 16);
      const between: [number, number][] = [
        [0, 3 * BLOCK],
        [4 * BLOCK, 3 * BLOCK],
        [9 * BLOCK, 7 * BLOCK],
        [17 * BLOCK, SIZE - 17 * BLOCK],
        [SIZE - 1, 1],
      ];
      for (const [offset, length] of between) {
        const request = read(1, offset, length);
        const done = exchanged({ ...given(fd, requestIn(form, request)), present });
        assert.equal(done.ending, Ending.IDLE);
        assert.ok(done.answers.equals(replyIn(form, request, content.subarray(offset, offset + length))));
        for (const [from, bytes] of [
          [offset - 1, length + 1],
          [offset, length + 1],
        ] as const) {
          if (from < 0 || from + bytes > SIZE || (from === SIZE - 2 && bytes === 2)) continue;
          const wrong = exchanged({ ...given(fd, requestIn(form, read(1, from, bytes))), present });
          assert.deepEqual([wrong.ending, wrong.at, wrong.outTo], [Ending.OTHER, 0, 0], `${from} ${bytes}`);
        }
        const write = { command: WRITE, cookie: 2, offset, payload: payload(length) };
        write.payload.copy(content, offset);
        assert.equal(exchanged({ ...given(fd, requestIn(form, write)), present }).ending, Ending.IDLE);
      }
      assert.ok(readFileSync(path).equals(content));
    });
  });
}

type Other = [name: string, request: Buffer, more?: Partial<Given>];

/** What is not plainly a READ or WRITE that succeeds. */
function othersIn(form: ReplyForm): Other[] {
  const extended = form === 'extended';
  const make = (request: Omit<RawRequest, 'cookie'>, exactFlags = false) =>
    requestIn(form, { cookie: 2, ...request }, exactFlags);
  const read = (offset: number | bigint, length: number | bigint, flags = 0) =>
    make({ command: READ, offset, length, flags });
  const write = (offset: number | bigint, bytes: number, flags = 0, exactFlags = false) =>
    make({ command: WRITE, offset, payload: payload(bytes), flags }, exactFlags);
  const commands = { DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8: 8, 65535: 65_535 };
  const others: Other[] = [
    ['a wrong magic', make({ command: READ, length: 1, magic: 0x25609512 })],
    [
      'the magic of the other header',
      make({ command: READ, length: 1, magic: extended ? 0x25609513 : 0x21e41c71 }),
    ],
    ...Object.entries(commands).map(
      ([name, command]): Other => [`command ${name}`, make({ command, length: 16 })],
    ),
    ['FUA on READ', read(0, 16, FUA)],
    ['FUA on WRITE', write(0, 16, FUA)],
    ['NO_HOLE on READ', read(0, 16, NO_HOLE)],
    ['DF on WRITE', write(0, 16, DF)],
    ['an unknown flag on READ', read(0, 16, 0x8000)],
    ['an unknown flag on WRITE', write(0, 16, 0x100)],
    ['PAYLOAD_LEN on READ', read(0, 16, PAYLOAD_LEN)],
    ['READ of length 0', read(0, 0)],
    ['WRITE of length 0', write(0, 0)],
    ['READ at the end', read(SIZE, 1)],
    ['READ across the end', read(SIZE - 1, 2)],
    ['WRITE across the end', write(SIZE - 10, 11)],
    ['READ at 2^53', read(2n ** 53n, 1)],
    ['READ at 2^63', read(2n ** 63n, 1)],
    ['READ whose offset + length wraps to 0', read(2n ** 64n - 1n, 1)],
    ['READ whose offset + length wraps into the image', read(2n ** 64n - 16n, 32)],
    ['WRITE whose offset + length wraps into the image', write(2n ** 64n - 16n, 32)],
    ['a long READ', read(0, 8193)],
    ['a long WRITE', write(0, 8193)],
    ['READ of 4 GiB - 1', read(0, 0xffff_ffff), { readBytesMax: 0xffff_ffff }],
    ['WRITE to a read-only image', write(0, 16), { access: ACCESS.READS }],
    ['WRITE in a read-only session', write(0, 16), { writeBytesMax: 0 }],
    ['READ of an image that is not read inline', read(0, 16), { access: ACCESS.WRITES }],
    ['READ of a missing block', read(BLOCK, 1), { present: mapOf(21, 1) }],
    ['WRITE to a missing block', write(BLOCK, 16), { present: mapOf(21, 1) }],
    [
      'WRITE of a whole missing block, which makes it present',
      write(BLOCK, BLOCK),
      { present: mapOf(21, 1) },
    ],
    ['READ into a missing block', read(BLOCK - 1, 2), { present: mapOf(21, 1) }],
    ['READ behind the end of the map', read(16 * BLOCK, 1), { present: mapOf(16) }],
    ['READ across the end of the map', read(16 * BLOCK - 1, 2), { present: mapOf(16) }],
    ['WRITE behind the end of the map', write(20 * BLOCK, 1), { present: mapOf(16) }],
    ['READ under an empty map', read(0, 1), { present: new Uint8Array(0) }],
  ];
  if (form === 'simple') others.push(['DF on READ', read(0, 16, DF)]);
  if (!extended) others.push(['PAYLOAD_LEN on WRITE', write(0, 16, PAYLOAD_LEN)]);
  else
    others.push(
      ['READ of 4 GiB and 1', read(0, 2n ** 32n + 1n)],
      ['READ of 2^64 - 1', read(1, 2n ** 64n - 1n)],
      ['WRITE of 2^32 + 16', make({ command: WRITE, length: 2n ** 32n + 16n, payload: payload(16) })],
    );
  return others;
}

describe('exchange and an image that does not do its part', () => {
  const read = requestIn('simple', { command: READ, cookie: 1, offset: 4000, length: 200 });
  const write = requestIn('simple', { command: WRITE, cookie: 2, offset: 0, payload: payload(10) });

  test('a WRITE that fails is not answered, and left to be done again', () => {
    const { path, content } = patterned(SIZE);
    const image = opened(path, 'r');
    const done = exchanged({ image, imageBytes: SIZE, input: Buffer.concat([read, write, read]) });
    assert.deepEqual([done.ending, done.at], [Ending.OTHER, read.length]);
    assert.ok(
      done.answers.equals(replyIn('simple', { command: READ, cookie: 1 }, content.subarray(4000, 4200))),
    );
    assert.ok(readFileSync(path).equals(content));
  });

  test('a READ that fails, or is cut short, likewise', () => {
    const { fd: image } = patterned(4100);
    for (const given of [
      { image, imageBytes: SIZE },
      { image: 2 ** 31 - 1, imageBytes: SIZE },
    ]) {
      const done = exchanged({ ...given, input: read });
      assert.deepEqual([done.ending, done.at, done.outTo], [Ending.OTHER, 0, 0]);
    }
  });

  test('a READ of what is not cached is COLD, until it is', async (t) => {
    const { path, fd: image, content } = patterned(4 * MIB);
    assert.equal(await native.fdatasync(image), 0);
    spawnSync('dd', [`if=${path}`, 'iflag=nocache', 'count=0', 'status=none']);
    // A question may begin a read ahead: it is asked far from the READ.
    if (native.pread(image, Buffer.alloc(4096), 0, 4096, 3 * MIB, true) !== -native.ERRNO.EAGAIN)
      return t.skip('this file system keeps what it has cached');
    const request = { command: READ, cookie: 1, offset: MIB, length: 4096 };
    const input = Buffer.concat([requestIn('simple', request), write]);
    const given = { image, imageBytes: 4 * MIB, input, access: ACCESS.READS | ACCESS.NOWAIT };
    const cold = exchanged(given);
    assert.deepEqual([cold.ending, cold.at, cold.outTo], [Ending.COLD, 0, 0]);
    assert.equal(await native.readAsync(image, Buffer.alloc(4096), 0, 4096, MIB), 4096);
    const warm = exchanged(given);
    assert.deepEqual([warm.ending, warm.at], [Ending.OTHER, 28]);
    assert.ok(warm.answers.equals(replyIn('simple', request, content.subarray(MIB, MIB + 4096))));
  });

  test('a WRITE that the kernel held up is answered, and the next request left to the session', () => {
    const bytes = 64 * MIB; // to allocate its pages alone takes longer
    const image = sparse(bytes);
    const [long, next] = [payload(1000), requestIn('simple', { command: READ, cookie: 2, length: 1 })];
    const held = Buffer.concat([long, Buffer.alloc(bytes - 1000, 5)]);
    const request = requestIn('simple', { command: WRITE, cookie: 1, offset: 0, payload: held });
    const input = Buffer.concat([request, next]);
    const done = exchanged({ image, imageBytes: bytes, writeBytesMax: bytes, input });
    assert.deepEqual([done.ending, done.at, done.end], [Ending.HELD_UP, request.length, input.length]);
    assert.ok(done.answers.equals(replyIn('simple', { command: WRITE, cookie: 1 })));
    const head = Buffer.alloc(1001);
    assert.equal(native.pread(image, head, 0, 1001, 0, false), 1001);
    assert.ok(head.equals(held.subarray(0, 1001)));
  });

  test('nowait where the file system does not know it is the session’s to find out', (t) => {
    const folder = '/dev/shm';
    const { fd: image } = patterned(SIZE, existsSync(folder) ? folder : undefined);
    if (native.pread(image, Buffer.alloc(8), 0, 8, 0, true) !== -native.ERRNO.EOPNOTSUPP)
      return t.skip('no such file system here');
    const done = exchanged({ image, imageBytes: SIZE, input: read, access: ACCESS.READS | ACCESS.NOWAIT });
    assert.deepEqual([done.ending, done.at, done.outTo], [Ending.OTHER, 0, 0]);
  });
});
