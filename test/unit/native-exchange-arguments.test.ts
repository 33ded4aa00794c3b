/** `exchange` holds its arguments against what they are to be before it does anything. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import * as native from '../../src/native/index.js';
import { Command } from '../../src/nbd/constants.js';
import { Ending } from '../../src/nbd/server/exchange.js';
import { exchanged, FIELDS, type Field, type Given, jobOf, requestIn } from './native-exchange-fixtures.js';
import { patterned } from './native-fixtures.js';

const SIZE = 20 * 4096 + 100;

describe('wrong arguments of exchange throw, and do nothing', () => {
  const { path, fd, content } = patterned(SIZE);
  const input = requestIn('simple', { command: Command.WRITE, cookie: 1, payload: Buffer.alloc(10) });
  const output = Buffer.alloc(64);
  const given: Given = { image: fd, imageBytes: SIZE, input, output };
  const exchange = native.exchange as (...args: unknown[]) => unknown;

  function refused(args: unknown[], code: string): void {
    assert.throws(() => exchange(...args), { code });
    assert.ok(readFileSync(path).equals(content));
  }

  test('their types, and a job of another length', () => {
    const job = jobOf(given);
    const detached = jobOf(given);
    structuredClone(detached, { transfer: [detached.buffer] });
    const jobs: unknown[] = [
      detached,
      new Float64Array(FIELDS.length - 1),
      new Float64Array(FIELDS.length + 1),
      new Float32Array(job),
      new BigInt64Array(FIELDS.length),
      new Uint8Array(job.buffer),
      [...job],
      {},
      null,
      undefined,
    ];
    for (const wrong of jobs) refused([wrong, input, output, null], 'ERR_INVALID_ARG_TYPE');
    const arrays: unknown[] = [new Uint16Array(32), new DataView(new ArrayBuffer(64)), 'text', [], undefined];
    for (const wrong of arrays) {
      refused([job, wrong, output, null], 'ERR_INVALID_ARG_TYPE');
      refused([job, input, wrong, null], 'ERR_INVALID_ARG_TYPE');
      refused([job, input, output, wrong], 'ERR_INVALID_ARG_TYPE');
    }
    refused([job, null, output, null], 'ERR_INVALID_ARG_TYPE');
    refused([job, input, null, null], 'ERR_INVALID_ARG_TYPE');
    refused([], 'ERR_INVALID_ARG_TYPE');
    assert.deepEqual(job, jobOf(given));
  });

  const beyond: [Field, ...number[]][] = [
    ['socket', -2, 2 ** 31],
    ['image', -1, 2 ** 31],
    ['imageBytes', -1, 2 ** 53],
    ['access', -1, 8],
    ['form', -1, 3],
    ['readBytesMax', -1, 2 ** 32],
    ['writeBytesMax', -1, 2 ** 32],
    ['repliesMax', 0, -1],
    ['receiveBytesMax', 0, -1],
    ['pollUs', -2, 2 ** 32],
    ['turnUs', -1, 2 ** 32],
    ['at', -1, input.length + 1],
    ['end', -1, input.length + 1],
    ['outFrom', -1, 1],
    ['outTo', -1, output.length + 1],
  ];
  for (const [field, ...values] of beyond) {
    test(`${field} out of its range`, () => {
      for (const value of [...values, 0.5, Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])
        refused([jobOf({ ...given, [field]: value }), input, output, null], 'ERR_OUT_OF_RANGE');
    });
  }

  test('a range that ends before it begins, and arrays that are gone', () => {
    refused([jobOf({ ...given, at: 5, end: 4 }), input, output, null], 'ERR_OUT_OF_RANGE');
    refused([jobOf({ ...given, outFrom: 5, outTo: 4 }), input, output, null], 'ERR_OUT_OF_RANGE');
    const detached = new Uint8Array(64);
    structuredClone(detached, { transfer: [detached.buffer] });
    refused([jobOf(given), detached, output, null], 'ERR_OUT_OF_RANGE');
    refused([jobOf({ ...given, outTo: 1 }), input, detached, null], 'ERR_OUT_OF_RANGE');
    const done = exchanged({ ...given, present: detached });
    assert.equal(done.ending, Ending.OTHER, 'a map that is gone has no blocks');
  });
});
