/** `exchange` and a dirty map: which bits a WRITE sets, and that they are set before the image changes. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { Command, type ReplyForm } from '../../src/nbd/constants.js';
import { Ending } from '../../src/nbd/server/exchange.js';
import { exchanged, FORMS, type Given, jobOf, replyIn, requestIn } from './native-exchange-fixtures.js';
import { opened, patterned } from './native-fixtures.js';

const { READ, WRITE } = Command;
const BLOCK = 4096;
/** The last block is cut short. */
const SIZE = 20 * BLOCK + 100;
const MAP_BYTES = 3;

const bitsOf = (map: Uint8Array): number[] =>
  Array.from({ length: map.length * 8 }, (_, bit) => bit).filter(
    (bit) => (map[bit >> 3]! & (1 << (bit & 7))) !== 0,
  );

function write(form: ReplyForm, offset: number, length: number): Buffer {
  return requestIn(form, { command: WRITE, cookie: 7, offset, payload: Buffer.alloc(length, 0xab) });
}

for (const form of FORMS) {
  describe(`exchange in ${form} form under a dirty map`, () => {
    const given = (image: number, dirty: Uint8Array | null, ...requests: Buffer[]): Given => ({
      image,
      imageBytes: SIZE,
      form: FORMS.indexOf(form),
      input: Buffer.concat(requests),
      dirty,
    });

    test('a WRITE sets the bit of each block it touches, and no other', () => {
      const cases: [offset: number, length: number, bits: number[]][] = [
        [0, 1, [0]],
        [BLOCK - 1, 1, [0]],
        [BLOCK - 1, 2, [0, 1]],
        [BLOCK, BLOCK, [1]],
        [7 * BLOCK + 5, 2 * BLOCK, [7, 8, 9]],
        [SIZE - 1, 1, [20]],
        [0, SIZE, Array.from({ length: 21 }, (_, block) => block)],
      ];
      for (const [offset, length, bits] of cases) {
        const { fd } = patterned(SIZE);
        const dirty = new Uint8Array(MAP_BYTES);
        const done = exchanged(given(fd, dirty, write(form, offset, length)));
        assert.equal(done.ending, Ending.IDLE);
        assert.ok(done.answers.equals(replyIn(form, { command: WRITE, cookie: 7, offset })));
        assert.deepEqual(bitsOf(dirty), bits, `${length} bytes at ${offset}`);
      }
    });

    test('READs set none, and bits that are set stay', () => {
      const { fd } = patterned(SIZE);
      const dirty = new Uint8Array(MAP_BYTES);
      dirty[1] = 0x10;
      const read = requestIn(form, { command: READ, cookie: 1, offset: 0, length: SIZE });
      assert.equal(exchanged(given(fd, dirty, read, write(form, 0, 1), read)).ending, Ending.IDLE);
      assert.deepEqual(bitsOf(dirty), [0, 12]);
    });

    test('a map too short for a WRITE: it is left to the session, and nothing is changed', () => {
      for (const [bytes, offset] of [
        [MAP_BYTES - 1, 16 * BLOCK],
        [MAP_BYTES - 1, 15 * BLOCK + 1],
        [0, 0],
      ] as const) {
        const { path, fd, content } = patterned(SIZE);
        const dirty = new Uint8Array(bytes);
        const done = exchanged(given(fd, dirty, write(form, offset, BLOCK)));
        assert.deepEqual([done.ending, done.at, done.outTo], [Ending.OTHER, 0, 0]);
        assert.ok(readFileSync(path).equals(content));
        assert.deepEqual(dirty, new Uint8Array(bytes));
      }
      const { fd } = patterned(SIZE);
      const dirty = new Uint8Array(MAP_BYTES - 1);
      const read = requestIn(form, { command: READ, cookie: 1, offset: 16 * BLOCK, length: BLOCK });
      const fits = write(form, 15 * BLOCK, BLOCK);
      assert.equal(exchanged(given(fd, dirty, read, fits)).ending, Ending.IDLE, 'a READ needs none');
      assert.deepEqual(bitsOf(dirty), [15]);
    });

    test('a WRITE that fails has told before: too much, never too little', () => {
      const { path } = patterned(SIZE);
      const dirty = new Uint8Array(MAP_BYTES);
      const done = exchanged(given(opened(path, 'r'), dirty, write(form, 3 * BLOCK, BLOCK)));
      assert.deepEqual([done.ending, done.at], [Ending.OTHER, 0]);
      assert.deepEqual(bitsOf(dirty), [3]);
    });

    test('a WRITE to a missing block, and one that has not come whole, tell nothing', () => {
      const { fd } = patterned(SIZE);
      const dirty = new Uint8Array(MAP_BYTES);
      const present = new Uint8Array(MAP_BYTES).fill(0xff);
      present[0] = 0xfe;
      const missing = exchanged({ ...given(fd, dirty, write(form, 0, BLOCK)), present });
      assert.equal(missing.ending, Ending.OTHER);
      const cut = write(form, 5 * BLOCK, BLOCK);
      exchanged(given(fd, dirty, cut.subarray(0, cut.length - 1)));
      assert.deepEqual(bitsOf(dirty), []);
    });
  });
}

test('the dirty map is a Uint8Array, or there is none', () => {
  const { path, fd, content } = patterned(SIZE);
  const input = write('simple', 0, 10);
  const exchange = native.exchange as (...args: unknown[]) => unknown;
  const job = () => jobOf({ image: fd, imageBytes: SIZE, input });
  for (const wrong of [new Uint16Array(8), new DataView(new ArrayBuffer(8)), 'text', [], 7])
    assert.throws(() => exchange(job(), input, Buffer.alloc(64), null, null, wrong), {
      code: 'ERR_INVALID_ARG_TYPE',
    });
  assert.ok(readFileSync(path).equals(content));
  for (const none of [null, undefined])
    assert.equal(exchange(job(), input, Buffer.alloc(64), null, null, none), Ending.IDLE);
});
