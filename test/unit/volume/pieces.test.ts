import assert from 'node:assert/strict';
import { test } from 'node:test';
import { inPieces, PIECE_BYTES_MAX, PIECE_BYTES_MIN } from '../../../src/volume/pieces.js';

const always = () => true;

test('a short range is one piece', async () => {
  const pieces: [number, number][] = [];
  const step = async (offset: number, length: number) => {
    pieces.push([offset, length]);
    return 0;
  };
  assert.equal(await inPieces(12_345, 99, step, () => assert.fail('nobody asks'), -1), 0);
  assert.deepEqual(pieces, [[12_345, 99]]);
});

test('8 TiB are covered once and in order, in growing pieces of whole blocks', async () => {
  const offset = 4097;
  const past = 2 ** 43 - 1;
  let at = offset;
  let count = 0;
  const done = await inPieces(
    offset,
    past - offset,
    async (from, length) => {
      assert.equal(from, at);
      assert.ok(length > 0 && length <= PIECE_BYTES_MAX);
      at += length;
      count++;
      assert.ok(at === past || at % PIECE_BYTES_MIN === 0);
      return 0;
    },
    always,
    -1,
  );
  assert.equal(done, 0);
  assert.equal(at, past);
  assert.ok(count < 3000, `${count} pieces`);
});

test('pieces that take long stay short', async () => {
  const lengths: number[] = [];
  const slow = async (_offset: number, length: number) => {
    lengths.push(length);
    const until = performance.now() + 3;
    while (performance.now() < until);
    return 0;
  };
  assert.equal(await inPieces(0, 8 * PIECE_BYTES_MIN, slow, always, -1), 0);
  assert.deepEqual(
    lengths,
    Array.from({ length: 8 }, () => PIECE_BYTES_MIN),
  );
});

test('an error ends it', async () => {
  let calls = 0;
  const failing = async () => (++calls === 3 ? -28 : 0);
  assert.equal(await inPieces(0, 2 ** 40, failing, always, -1), -28);
  assert.equal(calls, 3);
});

test('it is left between two pieces, never before the first', async () => {
  let calls = 0;
  const step = async () => {
    calls++;
    return 0;
  };
  assert.equal(await inPieces(0, 2 ** 40, step, () => calls < 2, -1), -1);
  assert.equal(calls, 2);
  calls = 0;
  assert.equal(await inPieces(0, 4096, step, () => false, -1), 0);
});
