/** The window on simulated links: full use of them, and no queue in front of the guest, also after minutes. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  LinkWindow,
  PIECE_BYTES_MAX,
  PIECE_BYTES_MIN,
  WINDOW_BYTES_MAX,
} from '../../../src/relocation/window.js';

interface Sent {
  at: number;
  began: number;
  bytes: number;
  wire: number;
  mark: number;
  full: boolean;
}

interface Line {
  mbPerSecond: (ms: number) => number;
  rttMs: (ms: number) => number;
  /** Bytes on the wire for one of the piece that begins there. */
  ratio?: (offset: number) => number;
}

/** Copies for `seconds` over a link, and tells its use and the queue in the last third. Time and bandwidth may change with time. */
function copy(link: Line, seconds: number, busy = false) {
  let received = 0;
  const window = new LinkWindow(() => received);
  const sent: Sent[] = [];
  let now = 0;
  let inFlight = 0;
  let free = 0;
  let most = 0;
  let offset = 0;
  const last = { fromMs: (seconds * 1000 * 2) / 3, bytes: 0, queueMs: 0, answers: 0, queues: [] as number[] };
  while (now < seconds * 1000) {
    const piece = window.pieceBytes;
    while (inFlight === 0 || inFlight + piece <= window.bytes(busy)) {
      inFlight += piece;
      const full = inFlight + piece > window.bytes(busy);
      const rtt = link.rttMs(now);
      const wire = piece * (link.ratio?.(offset) ?? 1);
      offset += piece;
      free = Math.max(now + rtt / 2, free) + wire / (link.mbPerSecond(now) * 1000);
      sent.push({ at: free + rtt / 2, began: now, bytes: piece, wire, mark: window.sent(), full });
    }
    most = Math.max(most, inFlight);
    const answer = sent.shift()!;
    now = Math.max(now, answer.at);
    inFlight -= answer.bytes;
    received += answer.wire;
    const latency = now - answer.began;
    window.answered(answer.bytes, latency, answer.mark, answer.full, now);
    if (now > last.fromMs) {
      const queue = latency - link.rttMs(now) - answer.wire / (link.mbPerSecond(now) * 1000);
      last.bytes += answer.wire;
      last.answers++;
      last.queueMs += queue;
      last.queues.push(queue);
    }
  }
  last.queues.sort((a, b) => a - b);
  return {
    mbPerSecond: last.bytes / 1000 / (now - last.fromMs),
    queueMs: last.queueMs / last.answers,
    queueP99Ms: last.queues[Math.floor(last.queues.length * 0.99)]!,
    piece: window.pieceBytes,
    most,
  };
}

const always = (value: number) => () => value;

for (const [mb, rtt, seconds] of [
  [10, 1, 120],
  [10, 20, 120],
  [12, 100, 120],
  [12.5, 40, 120],
  [100, 0.2, 60],
  [125, 20, 60],
  [1000, 0.1, 6],
] as const) {
  test(`${mb} MB/s with a round trip of ${rtt} ms are used while the guest is idle`, () => {
    const { mbPerSecond, queueMs, most } = copy({ mbPerSecond: always(mb), rttMs: always(rtt) }, seconds);
    assert.ok(mbPerSecond > 0.95 * mb, `${mbPerSecond.toFixed(1)} MB/s`);
    const spareMs = 0.25 * rtt + (2 * PIECE_BYTES_MAX) / 1000 / mb;
    assert.ok(queueMs < spareMs + 1 || mb >= 100, `a queue of ${queueMs.toFixed(0)} ms`);
    assert.ok(most <= WINDOW_BYTES_MAX);
  });

  test(`${mb} MB/s with a round trip of ${rtt} ms are used without a queue while the guest waits`, () => {
    const { mbPerSecond, queueP99Ms } = copy({ mbPerSecond: always(mb), rttMs: always(rtt) }, seconds, true);
    assert.ok(mbPerSecond > 0.85 * mb, `${mbPerSecond.toFixed(1)} MB/s`);
    assert.ok(queueP99Ms < 15 || mb >= 100, `a queue of ${queueP99Ms.toFixed(0)} ms`);
  });
}

/** Like a disk of files: stretches of a few MiB, each of which compresses in its own way, with some that hardly do. */
const files = (offset: number): number => {
  const stretch = Math.floor(offset / (3 << 20));
  const other = Math.floor(offset / (1 << 19));
  return [0.15, 0.4, 0.45, 0.2, 0.95, 0.3][(stretch * 7 + stretch) % 6]! * (0.7 + ((other * 5) % 7) / 10);
};

for (const [mb, rtt] of [
  [1.25, 20],
  [12.5, 20],
  [12.5, 40],
  [62, 60],
] as const) {
  test(`a compressed link of ${mb} MB/s and ${rtt} ms is full while the guest is idle`, () => {
    const line = { mbPerSecond: always(mb), rttMs: always(rtt), ratio: files };
    const { mbPerSecond, queueMs } = copy(line, 60);
    assert.ok(mbPerSecond > 0.94 * mb, `${mbPerSecond.toFixed(2)} MB/s`);
    assert.ok(queueMs < 150, `a queue of ${queueMs.toFixed(0)} ms`);
  });

  test(`a compressed link of ${mb} MB/s and ${rtt} ms has next to no queue while the guest waits`, () => {
    const line = { mbPerSecond: always(mb), rttMs: always(rtt), ratio: () => 0.4 };
    const { mbPerSecond, queueP99Ms } = copy(line, 60, true);
    assert.ok(mbPerSecond > 0.85 * mb, `${mbPerSecond.toFixed(2)} MB/s`);
    assert.ok(queueP99Ms < 15 || mb < 10, `a queue of ${queueP99Ms.toFixed(0)} ms`);
  });
}

test('a slow link has short requests', () => {
  const { mbPerSecond, queueMs, piece } = copy({ mbPerSecond: always(1), rttMs: always(20) }, 120);
  assert.ok(mbPerSecond > 0.9, `${mbPerSecond.toFixed(2)} MB/s`);
  assert.equal(piece, PIECE_BYTES_MIN);
  assert.ok(queueMs < 50, `a queue of ${queueMs.toFixed(0)} ms`);
});

test('a route that became longer, and one that became shorter, are found out', () => {
  const longer = copy({ mbPerSecond: always(40), rttMs: (ms) => (ms < 30_000 ? 5 : 120) }, 120);
  assert.ok(longer.mbPerSecond > 36, `${longer.mbPerSecond.toFixed(1)} MB/s`);
  const shorter = copy({ mbPerSecond: always(40), rttMs: (ms) => (ms < 30_000 ? 120 : 5) }, 120);
  assert.ok(shorter.mbPerSecond > 38, `${shorter.mbPerSecond.toFixed(1)} MB/s`);
  assert.ok(shorter.queueMs < 30, `a queue of ${shorter.queueMs.toFixed(0)} ms`);
});

test('a link that becomes ten times as slow loses its queue again, one that becomes faster is used', () => {
  const slower = copy({ mbPerSecond: (ms) => (ms < 30_000 ? 100 : 10), rttMs: always(10) }, 120);
  assert.ok(slower.mbPerSecond > 9, `${slower.mbPerSecond.toFixed(1)} MB/s`);
  assert.ok(slower.queueMs < 60, `a queue of ${slower.queueMs.toFixed(0)} ms`);
  const faster = copy({ mbPerSecond: (ms) => (ms < 30_000 ? 10 : 100), rttMs: always(10) }, 120);
  assert.ok(faster.mbPerSecond > 90, `${faster.mbPerSecond.toFixed(1)} MB/s`);
});

test('while the round trip is measured anew only one request may be in flight', () => {
  const window = new LinkWindow(() => 0);
  window.answered(1 << 16, 10, window.sent(), false, 10);
  window.answered(1 << 16, 200, window.sent(), false, 20_000);
  assert.equal(window.bytes(false), window.pieceBytes);
  window.answered(1 << 16, 500, window.sent(), false, 20_100);
  assert.equal(window.bytes(false), window.pieceBytes, 'one that was sent before tells nothing');
  window.answered(1 << 16, 15, window.sent(), false, 20_200);
  assert.ok(window.bytes(false) > window.pieceBytes);
});

test('what a rate limit holds back does not make the link slow', () => {
  let received = 0;
  const window = new LinkWindow(() => received);
  let now = 0;
  for (let n = 0; n < 200; n++) {
    now += 5;
    received += 1 << 18;
    window.answered(1 << 18, 20, received - (1 << 20), true, now);
  }
  const before = window.bytes(false);
  for (let n = 0; n < 1000; n++) {
    now += 500;
    received += 1 << 18;
    window.answered(1 << 18, 25, received - (1 << 18), false, now);
  }
  assert.ok(window.bytes(false) >= before / 2, `${window.bytes(false)} after ${before}`);
});
