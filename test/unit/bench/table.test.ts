import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { judge, judgeHandedOff } from '../../../src/bench/bars.js';
import { merged } from '../../../src/bench/report.js';
import {
  formatComparison,
  formatCount,
  formatMicros,
  formatRateSpread,
  markdownTable,
  metricRows,
  rateRows,
  textTable,
} from '../../../src/bench/table.js';
import { cellResult, reportOf, SERVERS, sample } from './results.js';

const NAME = 'read 4k random d16 c1 unix tmpfs';

describe('numbers', () => {
  test('counts have three digits that matter', () => {
    const shown = [0, 9.876, 512, 999.4, 999.5, 9870, 412_345, 999_499, 999_500, 1.234e6].map(formatCount);
    assert.deepEqual(shown, [
      '0.00',
      '9.88',
      '512',
      '999',
      '1.00k',
      '9.87k',
      '412k',
      '999k',
      '1.00M',
      '1.23M',
    ]);
  });

  test('times', () => {
    assert.deepEqual([1.5, 85.04, 850, 4213, 1.2e6].map(formatMicros), [
      '1.50 us',
      '85.0 us',
      '850 us',
      '4.21 ms',
      '1.20 s',
    ]);
  });

  test('a rate and its spread', () => {
    assert.equal(formatRateSpread([90_000, 100_000, 120_000]), '100k ±15 %');
    assert.equal(formatRateSpread([500]), '500');
  });
});

describe('tables', () => {
  const rows = [
    ['rate', 'a', 'bb'],
    ['x', '100', '2'],
  ];

  test('as text', () => {
    assert.equal(textTable(rows), 'rate    a  bb\nx     100   2');
  });

  test('as Markdown', () => {
    assert.equal(markdownTable(rows), '| rate | a | bb |\n| --- | ---: | ---: |\n| x | 100 | 2 |');
  });

  test('a row has every server, and how ours stands', () => {
    const cell = cellResult(NAME, {
      blockferry: [sample(300_000), sample(100_000), sample(200_000)],
      'nbdkit file': [sample(100_000, { clientBusy: 0.95 })],
    });
    const [head, row] = rateRows(reportOf(cell), [cell]);
    assert.deepEqual(head, [
      'operations a second',
      'blockferry',
      'nbdkit file',
      'to best peer',
      'its CPU/op',
      'proxy to serve',
    ]);
    assert.deepEqual(row, [NAME, '200k ±50 %', '100k *', '2.00 >= 1.50 ok', '1.00 <= 1.10 ok', '']);
    assert.deepEqual(metricRows(reportOf(cell), [cell], 'latency')[1], [
      NAME,
      '50.0 us / 400 us',
      '50.0 us / 400 us',
    ]);
    assert.deepEqual(metricRows(reportOf(cell), [cell], 'memory')[1].slice(1), ['64 MiB', '64 MiB']);
  });
});

describe('bars', () => {
  const judged = (own: number, peers: Record<string, number>) =>
    judge(
      cellResult(NAME, {
        blockferry: [sample(own)],
        ...Object.fromEntries(Object.entries(peers).map(([name, rate]) => [name, [sample(rate)]])),
      }),
      SERVERS,
    );

  test('the best peer of the cell is what counts', () => {
    const verdict = judged(140, { 'nbdkit file': 90, 'nbd-server': 100 })!;
    assert.equal(verdict.bestPeer, 'nbd-server');
    assert.deepEqual(verdict.rate, { ratio: 1.4, bar: 1.5, holds: false });
    assert.equal(formatComparison(verdict.rate, 'at least'), '1.40 < 1.50 MISSED');
  });

  test('medians are compared, not the best rounds', () => {
    const cell = cellResult(NAME, {
      blockferry: [sample(900), sample(100), sample(150)],
      'nbdkit file': [sample(100), sample(100), sample(700)],
    });
    assert.deepEqual(judge(cell, SERVERS)!.rate, { ratio: 1.5, bar: 1.5, holds: true });
  });

  test('CPU time is compared with the same peer', () => {
    const cell = cellResult(NAME, {
      blockferry: [sample(300, { serverCpuUs: 5 })],
      'nbdkit file': [sample(200, { serverCpuUs: 4 })],
      'nbd-server': [sample(100, { serverCpuUs: 50 })],
    });
    assert.deepEqual(judge(cell, SERVERS)!.cpu, { ratio: 1.25, bar: 1.1, holds: false });
  });

  test('without a peer, or without ours, nothing is judged', () => {
    assert.equal(judged(100, {}), null);
    assert.equal(judge(cellResult(NAME, { 'nbdkit file': [sample(1)] }), SERVERS), null);
  });

  test('a cell without a bar has a ratio', () => {
    const cell = cellResult('write 4k random d16 c1 flush32 unix cache', {
      blockferry: [sample(50)],
      'nbdkit file': [sample(100)],
    });
    const verdict = judge(cell, SERVERS)!;
    assert.deepEqual(verdict.rate, { ratio: 0.5, bar: null, holds: null });
    assert.equal(formatComparison(verdict.rate, 'at least'), '0.50');
  });

  test('a proxy whose blocks are all local against serve', () => {
    const cell = cellResult(NAME, {
      blockferry: [sample(100)],
      'blockferry proxy, handed off': [sample(94)],
    });
    assert.deepEqual(judgeHandedOff(cell), { ratio: 0.94, bar: 0.95, holds: false });
    assert.equal(judgeHandedOff(cellResult(NAME, { blockferry: [sample(1)] })), null);
  });
});

test('what is measured again replaces what was there', () => {
  const [first, second] = [cellResult('a', { blockferry: [sample(1)] }), cellResult('b', {})];
  const again = cellResult('a', { blockferry: [sample(2)] });
  const whole = merged(reportOf(first, second), { ...reportOf(again), servers: SERVERS.slice(0, 1) });
  assert.deepEqual(
    whole.cells.map(({ name, samples }) => [name, samples.blockferry?.[0].opsPerSecond]),
    [
      ['b', undefined],
      ['a', 2],
    ],
  );
  assert.equal(whole.servers.length, SERVERS.length);
});
