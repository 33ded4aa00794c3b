/** The window on simulated links: full use of them, and no queue in front of the guest, also after minutes. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { DelayWindow, WINDOW_BYTES_MAX, WINDOW_BYTES_MIN } from '../../../src/relocation/window.js';

const BULK = 256 << 10;

interface Sent {
  at: number;
  began: number;
  full: boolean;
}

/** Copies for `seconds` over a link, and tells its use and the queue in the last third. Time and bandwidth may change with time. */
function copy(link: { mbPerSecond: (ms: number) => number; rttMs: (ms: number) => number }, seconds: number) {
  const window = new DelayWindow();
  const sent: Sent[] = [];
  let now = 0;
  let inFlight = 0;
  let free = 0;
  let most = 0;
  const last = { fromMs: (seconds * 1000 * 2) / 3, bytes: 0, queueMs: 0, answers: 0, queueMsMax: 0 };
  while (now < seconds * 1000) {
    while (inFlight === 0 || inFlight + BULK <= window.bytes) {
      inFlight += BULK;
      const full = inFlight + BULK > window.bytes;
      const rtt = link.rttMs(now);
      free = Math.max(now + rtt / 2, free) + BULK / (link.mbPerSecond(now) * 1000);
      sent.push({ at: free + rtt / 2, began: now, full });
    }
    most = Math.max(most, inFlight);
    const answer = sent.shift()!;
    now = answer.at;
    inFlight -= BULK;
    const latency = now - answer.began;
    window.answered(BULK, latency, answer.full, now);
    if (now > last.fromMs) {
      const queue = latency - link.rttMs(now) - BULK / (link.mbPerSecond(now) * 1000);
      last.bytes += BULK;
      last.answers++;
      last.queueMs += queue;
      last.queueMsMax = Math.max(last.queueMsMax, queue);
    }
  }
  return {
    mbPerSecond: last.bytes / 1000 / (now - last.fromMs),
    queueMs: last.queueMs / last.answers,
    queueMsMax: last.queueMsMax,
    most,
  };
}

const always = (value: number) => () => value;

for (const [mb, rtt, seconds] of [
  [10, 1, 120],
  [10, 20, 120],
  [12, 100, 120],
  [100, 0.2, 60],
  [100, 20, 60],
  [1000, 0.1, 6],
] as const) {
  test(`${mb} MB/s with a round trip of ${rtt} ms are used, without a lasting queue`, () => {
    const { mbPerSecond, queueMs, most } = copy({ mbPerSecond: always(mb), rttMs: always(rtt) }, seconds);
    assert.ok(mbPerSecond > 0.9 * mb, `${mbPerSecond.toFixed(1)} MB/s`);
    const alone = rtt + BULK / 1000 / mb;
    assert.ok(queueMs < 0.6 * alone + 25, `a queue of ${queueMs.toFixed(0)} ms`);
    assert.ok(most <= WINDOW_BYTES_MAX);
  });
}

test('a slow link has one request in flight most of the time', () => {
  const { mbPerSecond, queueMs } = copy({ mbPerSecond: always(1), rttMs: always(20) }, 120);
  assert.ok(mbPerSecond > 0.85, `${mbPerSecond.toFixed(2)} MB/s`);
  assert.ok(queueMs < 200, `a queue of ${queueMs.toFixed(0)} ms`);
});

test('a route that became longer, and one that became shorter, are found out', () => {
  const longer = copy({ mbPerSecond: always(40), rttMs: (ms) => (ms < 30_000 ? 5 : 120) }, 120);
  assert.ok(longer.mbPerSecond > 30, `${longer.mbPerSecond.toFixed(1)} MB/s`);
  const shorter = copy({ mbPerSecond: always(40), rttMs: (ms) => (ms < 30_000 ? 120 : 5) }, 120);
  assert.ok(shorter.mbPerSecond > 36, `${shorter.mbPerSecond.toFixed(1)} MB/s`);
  assert.ok(shorter.queueMs < 30, `a queue of ${shorter.queueMs.toFixed(0)} ms`);
});

test('a link that becomes ten times as slow loses its queue again', () => {
  const { mbPerSecond, queueMs } = copy(
    { mbPerSecond: (ms) => (ms < 30_000 ? 100 : 10), rttMs: always(10) },
    120,
  );
  assert.ok(mbPerSecond > 9, `${mbPerSecond.toFixed(1)} MB/s`);
  assert.ok(queueMs < 50, `a queue of ${queueMs.toFixed(0)} ms`);
});

test('while the floor is measured anew only one request may be in flight', () => {
  const window = new DelayWindow();
  window.answered(BULK, 10, false, 10);
  window.answered(BULK, 20, false, 20_000);
  assert.equal(window.bytes, WINDOW_BYTES_MIN);
  window.answered(BULK, 500, false, 20_100);
  assert.equal(window.bytes, WINDOW_BYTES_MIN, 'one that was sent before tells nothing');
  window.answered(BULK, 15, false, 20_200);
  assert.ok(window.bytes > WINDOW_BYTES_MIN);
});
