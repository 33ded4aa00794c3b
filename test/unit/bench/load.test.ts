import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { fioWords, parseFio } from '../../../src/bench/fio.js';
import { LOAD_DEFAULTS, loadWords } from '../../../src/bench/load.js';

const URI = 'nbd+unix:///disk?socket=/run/a.sock';

function following(words: readonly string[], name: string): string | undefined {
  const at = words.indexOf(name);
  return at < 0 ? undefined : words[at + 1];
}

describe('words of the load generator', () => {
  test('where and what', () => {
    const words = loadWords(URI, { ...LOAD_DEFAULTS, depth: 64, readPercent: 70, verify: true });
    assert.equal(following(words, '--unix'), '/run/a.sock');
    assert.equal(following(words, '--export'), 'disk');
    assert.equal(following(words, '--depth'), '64');
    assert.equal(following(words, '--reads'), '70');
    assert.equal(following(words, '--verify'), '1');
    const tcp = loadWords('nbd://localhost:1234', LOAD_DEFAULTS);
    assert.deepEqual([following(tcp, '--host'), following(tcp, '--port')], ['localhost', '1234']);
  });

  test('what it cannot do is wrong usage', () => {
    assert.throws(() => loadWords('nbds://localhost', LOAD_DEFAULTS), { code: 'usage', message: /TLS/ });
    assert.throws(() => loadWords('http://localhost', LOAD_DEFAULTS), { code: 'address' });
    assert.throws(() => loadWords(URI, { ...LOAD_DEFAULTS, count: 5, warmupMs: 1 }), { code: 'usage' });
  });
});

describe('fio', () => {
  test('is given the same load', () => {
    const words = fioWords(URI, {
      ...LOAD_DEFAULTS,
      depth: 8,
      connections: 4,
      readPercent: 70,
      flushEvery: 32,
    });
    for (const word of [
      `--uri=${URI}`,
      '--rw=randrw',
      '--rwmixread=70',
      '--iodepth=8',
      '--numjobs=4',
      '--fsync=32',
    ])
      assert.ok(words.includes(word), word);
    assert.ok(fioWords(URI, { ...LOAD_DEFAULTS, order: 'sequential' }).includes('--rw=read'));
    assert.ok(!fioWords(URI, { ...LOAD_DEFAULTS, order: 'shuffled', lap: true }).includes('--time_based'));
  });

  test('its result is read, behind its warnings', () => {
    const direction = (iops: number, count: number) => ({
      iops,
      bw_bytes: iops * 4096,
      total_ios: count,
      clat_ns: { mean: 5, max: 9, N: count, percentile: { '50.000000': 4, '99.000000': 7, '99.900000': 8 } },
    });
    const job = {
      read: direction(70, 700),
      write: direction(30, 300),
      job_runtime: 10_000,
      usr_cpu: 20,
      sys_cpu: 5,
    };
    const result = parseFio(
      `fio: a warning {\n${JSON.stringify({ jobs: [job] }, null, 1)}\n`.replace('{\n{', '\n{'),
    );
    assert.equal(result.opsPerSecond, 100);
    assert.equal(result.totalOperations, 1000);
    assert.equal(result.latencyNs.p99, 7);
    assert.equal(result.cpuNs, 2.5e9);
  });
});
