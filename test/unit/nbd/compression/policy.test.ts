/** The policy, beside simulated links, threads and data. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { CompressionPolicy, STEPS, WINDOW_FRAMES } from '../../../../src/nbd/compression/policy.js';

const FRAME = 1 << 19;
const THREADS = 1;
/** Bytes a millisecond of one thread, and what is left of a byte, as zstd has them for what a system's disk holds. */
const SPEED: Record<number, number> = { [-5]: 430e3, 1: 350e3, 3: 230e3, 6: 87e3, 9: 60e3 };
const RATIO: Record<number, number> = { [-5]: 0.48, 1: 0.34, 3: 0.3, 6: 0.285, 9: 0.282 };

interface World {
  /** Bytes a millisecond: of the link, and of all else that there is to do. */
  link: number;
  rest: number;
  /** Of a thread's time, what is ours. */
  spare: number;
}

/** Sends frames until `ms` have passed. Returns the content sent by level, and how often the level changed. */
function send(policy: CompressionPolicy, { link, rest, spare }: World, ms: number) {
  const content = new Map<number | null, number>();
  let changes = 0;
  let now = 0;
  while (now < ms) {
    const before = policy.level;
    const level = policy.next();
    let tookMs = FRAME / Math.min(rest, level === null ? link : link / RATIO[level]!);
    if (level !== null) {
      const workMs = FRAME / (SPEED[level]! * spare);
      policy.compressed(level, FRAME, FRAME * RATIO[level]!, workMs);
      tookMs = Math.max(tookMs, workMs / THREADS);
    }
    policy.left(FRAME, tookMs);
    now += tookMs;
    content.set(level, (content.get(level) ?? 0) + FRAME);
    if (policy.level !== before) changes++;
  }
  const sum = [...content.values()].reduce((a, b) => a + b, 0);
  return { rate: sum / now, changes, share: (level: number | null) => (content.get(level) ?? 0) / sum };
}

const auto = (): CompressionPolicy => new CompressionPolicy('auto', THREADS);
const world = (link: number, rest = 1e6, spare = 1): World => ({ link, rest, spare });

test('a slow link has the highest level', () => {
  const policy = auto();
  send(policy, world(1_000), 60_000);
  assert.equal(policy.level, STEPS.at(-1));
});

test('100 Mbit/s have a level that fills the line, and stays', () => {
  const policy = auto();
  send(policy, world(6_250), 5_000); // one of two connections
  const { rate, changes } = send(policy, world(6_250), 60_000);
  assert.ok((policy.level ?? 0) >= 6, `level ${policy.level}`);
  assert.ok(changes <= 2, `${changes} changes`);
  assert.ok(rate > 0.99 * (6_250 / RATIO[6]!), `${rate} bytes/ms`);
});

test('no link is slowed, and one that compression makes faster is', () => {
  for (const link of [1e3, 12.5e3, 125e3, 300e3, 600e3, 1.25e6, 5e6]) {
    for (const rest of [400e3, 1e6]) {
      const policy = auto();
      send(policy, world(link, rest), 5_000);
      const { rate } = send(policy, world(link, rest), 20_000);
      const raw = Math.min(link, rest);
      assert.ok(rate > 0.95 * raw, `link ${link}, rest ${rest}: ${rate} bytes/ms`);
      if (link <= 125e3) assert.ok(rate > 1.8 * raw, `link ${link}, rest ${rest}: ${rate} bytes/ms`);
    }
  }
});

test('what is faster without compression is sent raw, and seldom tried', () => {
  const policy = auto();
  send(policy, world(5e6), 5_000);
  const { share } = send(policy, world(5e6), 60_000);
  assert.ok(share(null) > 0.95, `${share(null)} of it raw`);
});

test('a link that becomes slow is compressed again', () => {
  const policy = auto();
  send(policy, world(5e6), 5_000);
  assert.equal(policy.level, null);
  send(policy, world(6_250), 5_000);
  assert.ok((policy.level ?? 0) >= 6, `level ${policy.level}`);
});

test('threads that others use as well compress less, and more when they are free again', () => {
  const policy = auto();
  send(policy, world(6_250), 5_000);
  const before = policy.level!;
  send(policy, world(6_250, 1e6, 0.1), 20_000);
  assert.ok((policy.level ?? 0) < before, `level ${policy.level}`);
  send(policy, world(6_250), 60_000);
  assert.equal(policy.level, before);
});

test('what does not shrink is sent raw, and tried again now and then', () => {
  for (const level of ['auto', 19] as const) {
    const policy = new CompressionPolicy(level, THREADS);
    let tries = 0;
    for (let i = 0; i < 1000; i++) {
      const tried = policy.next();
      if (tried !== null) {
        tries++;
        policy.compressed(tried, 1000, 990, 1);
      }
      policy.left(1000, 1);
    }
    assert.ok(tries >= 3 && tries <= 16, `${tries} tries`);
    while (policy.next() === null);
    policy.compressed(3, 1000, 300, 1);
    for (let i = 0; i < 100; i++) assert.notEqual(policy.next(), null);
  }
});

test('a fixed level stays', () => {
  const policy = new CompressionPolicy(-3, THREADS);
  for (let i = 0; i < 10 * WINDOW_FRAMES; i++) {
    policy.compressed(-3, FRAME, FRAME / 2, 100);
    policy.left(FRAME, 1);
  }
  assert.equal(policy.next(), -3);
});
