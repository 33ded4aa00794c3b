import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { benchmarksPage } from '../../../bench/page.js';
import { cellResult, reportOf, sample } from './results.js';

const READ = cellResult('read 4k random d16 c1 unix tmpfs', {
  blockferry: [sample(200)],
  'nbdkit file': [sample(100)],
});
const WRITE = cellResult('write 4k random d16 c1 tcp cache', {
  blockferry: [sample(100)],
  'nbdkit file': [sample(100)],
});

describe('docs/benchmarks.md', () => {
  test('has the machine, the servers and their command lines', () => {
    const page = benchmarksPage(reportOf(READ), []);
    assert.match(page, /^A CPU, 2 cores, 16 GiB; Debian, Linux 6\.1; Node\.js 20\.19\.0\.$/m);
    assert.match(page, /^Images get other memory before each round: /m);
    assert.match(page, /^\| nbdkit file \| 1\.2 \| `nbdkit file DIR\/disk\.img` \|$/m);
  });

  test('each place has its tables', () => {
    const page = benchmarksPage(reportOf(READ, WRITE), []);
    assert.match(page, /^## Image on tmpfs, unix socket$/m);
    assert.match(page, /^## Image on a disk, in the page cache, TCP on loopback$/m);
    assert.match(page, /^\| read 4k random d16 c1 unix tmpfs \| 200 \| 100 \| 2\.00 >= 1\.50 ok \|/m);
  });

  test('a bar that is missed is named, with its reason where there is one', () => {
    const page = benchmarksPage(reportOf(READ, WRITE), []);
    assert.match(page, /^3 of 4 bars hold\.$/m);
    const missed = '\\| write 4k random d16 c1 tcp cache \\| rate to nbdkit file: 1\\.00 < 1\\.20';
    assert.match(page, new RegExp(`^${missed} \\| not examined yet \\|$`, 'm'));
    const reasons = [
      { only: 'write unix', reason: 'another' },
      { only: 'write 4k', reason: 'a copy too many' },
    ];
    const explained = benchmarksPage(reportOf(READ, WRITE), reasons);
    assert.match(explained, new RegExp(`^${missed} \\| a copy too many \\|$`, 'm'));
  });

  test('few rounds are called so', () => {
    assert.match(benchmarksPage(reportOf({ ...READ, rounds: 2 }), []), /^Fewer than 7 rounds/m);
    assert.doesNotMatch(benchmarksPage(reportOf(READ), []), /Fewer than/);
  });
});
