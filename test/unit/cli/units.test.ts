import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  formatDuration,
  formatRate,
  formatSize,
  parseRange,
  parseRate,
  parseSeconds,
  parseSize,
  wholeNumber,
} from '../../../src/cli/units.js';

describe('units', () => {
  test('sizes are powers of two', () => {
    assert.equal(parseSize('4096'), 4096);
    assert.equal(parseSize('64K'), 64 << 10);
    assert.equal(parseSize('64k'), 64 << 10);
    assert.equal(parseSize('1.5G'), 1.5 * 2 ** 30);
    assert.equal(parseSize('2T'), 2 ** 41);
    assert.equal(parseSize('3MiB'), 3 << 20);
    assert.equal(parseSize(' 10M '), 10 << 20);
  });

  test('what is no size is refused', () => {
    for (const text of [
      '',
      'K',
      '-1',
      '1e9',
      '0x10',
      '1KK',
      '1 2',
      'ten',
      '1,5G',
      '99999999T',
      '1P',
      'NaN',
    ]) {
      assert.throws(() => parseSize(text), { code: 'usage' }, text);
    }
  });

  test('rates may end in /s, and be none', () => {
    assert.equal(parseRate('100M'), 100 << 20);
    assert.equal(parseRate('100M/s'), 100 << 20);
    assert.equal(parseRate('100M /S'), 100 << 20);
    assert.equal(parseRate('0'), null);
    assert.equal(parseRate('none'), null);
    assert.equal(parseRate('Unlimited'), null);
    assert.throws(() => parseRate('100M/min'), { code: 'usage' });
  });

  test('ranges', () => {
    assert.deepEqual(parseRange('all', 100), { offset: 0, length: 100 });
    assert.deepEqual(parseRange('1K:4K', 8192), { offset: 1024, length: 4096 });
    assert.deepEqual(parseRange('1K-4K', 8192), { offset: 1024, length: 3072 });
    for (const text of ['', '1', ':', '4K-1K', '0:0', '8K:1', '0:9K', '1:2:3', '-5:1']) {
      assert.throws(() => parseRange(text, 8192), { code: 'usage' }, text);
    }
  });

  test('seconds', () => {
    assert.equal(parseSeconds('2.5'), 2500);
    assert.equal(parseSeconds('0.0001'), 1, 'never 0 ms');
    for (const text of ['0', '-1', 'x', '1e3', '', '100000']) {
      assert.throws(() => parseSeconds(text), { code: 'usage' }, text);
    }
  });

  test('whole numbers in a range', () => {
    assert.equal(wholeNumber(0, 10)('0'), 0);
    assert.equal(wholeNumber(1, 2 ** 53 - 1)('9007199254740991'), Number.MAX_SAFE_INTEGER);
    for (const text of ['', '-1', '1.5', '11', '1e1', '0x1', ' 1']) {
      assert.throws(() => wholeNumber(0, 10)(text), { code: 'usage' }, text);
    }
  });

  test('formatting', () => {
    assert.equal(formatSize(0), '0 B');
    assert.equal(formatSize(1023), '1023 B');
    assert.equal(formatSize(4096), '4 KiB');
    assert.equal(formatSize(1536), '1.50 KiB');
    assert.equal(formatSize(20.4 * 2 ** 20), '20.4 MiB');
    assert.equal(formatSize(2 ** 60), '1024 PiB');
    assert.equal(formatRate(3 << 20), '3 MiB/s');
    assert.equal(formatDuration(12.4), '12 ms');
    assert.equal(formatDuration(4200), '4.2 s');
    assert.equal(formatDuration(59_999), '1 min 00 s');
    assert.equal(formatDuration(200_000), '3 min 20 s');
    assert.equal(formatDuration(7_500_000), '2 h 05 min');
  });
});
