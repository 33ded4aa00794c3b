/** The policy, fed with numbers. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { CompressionPolicy, STEPS, WINDOW_FRAMES } from '../../../../src/nbd/compression/policy.js';

function window(policy: CompressionPolicy, elapsedMs: number, blockedMs: number, waitingMs: number): void {
  for (let i = 0; i < WINDOW_FRAMES; i++) policy.left(elapsedMs, blockedMs, waitingMs);
}
const highest = STEPS[STEPS.length - 1];

test('a slow link makes the level rise to the highest, a fast one sends everything raw', () => {
  const slow = new CompressionPolicy('auto');
  for (let i = 0; i < 10; i++) window(slow, 10, 9, 0);
  assert.equal(slow.level, highest);
  const fast = new CompressionPolicy('auto');
  for (let i = 0; i < 10; i++) window(fast, 1, 0, 0.9);
  assert.equal(fast.next(), null);
});

test('a link that becomes slow is compressed again', () => {
  const policy = new CompressionPolicy('auto');
  for (let i = 0; i < 10; i++) window(policy, 1, 0, 0.9);
  for (let i = 0; i < 40; i++) window(policy, 10, 9, 0);
  assert.equal(policy.level, highest);
});

test('raw is left now and then, less and less often while that does not pay', () => {
  const policy = new CompressionPolicy('auto');
  let compressed = 0;
  for (let i = 0; i < 400; i++) {
    if (policy.level === null) window(policy, 1, 0, 0);
    else {
      compressed++;
      window(policy, 1, 0, 0.9);
    }
  }
  assert.ok(compressed >= 5 && compressed <= 15, `${compressed} windows`);
});

test('a slow link that never blocks the socket stays compressed', () => {
  const policy = new CompressionPolicy('auto');
  for (let i = 0; i < 100; i++) window(policy, 6, 0, 2);
  assert.notEqual(policy.level, null);
});

test('a connection with little to do changes nothing', () => {
  const policy = new CompressionPolicy('auto');
  const before = policy.level;
  for (let i = 0; i < 10; i++) {
    window(policy, 100, 5, 0);
    window(policy, 100, 0, 5);
    window(policy, 10, 4, 4);
  }
  assert.equal(policy.level, before);
});

test('a step up that is always taken back is tried less and less often', () => {
  const policy = new CompressionPolicy('auto');
  let ups = 0;
  for (let i = 0; i < 400; i++) {
    // The link is the narrow place up to level 1, the processor beyond it.
    const before = policy.level;
    if ((policy.level ?? -9) <= 1) window(policy, 10, 9, 0);
    else window(policy, 10, 0, 9);
    if ((policy.level ?? -9) > (before ?? -9)) ups++;
  }
  assert.ok(ups <= 10, `${ups} steps up`);
});

test('what does not shrink is sent raw, and tried again now and then', () => {
  for (const level of ['auto', 19] as const) {
    const policy = new CompressionPolicy(level);
    let tries = 0;
    for (let i = 0; i < 1000; i++) {
      if (policy.next() === null) continue;
      tries++;
      policy.compressed(1000, 990);
    }
    assert.ok(tries >= 3 && tries <= 12, `${tries} tries`);
    while (policy.next() === null);
    policy.compressed(1000, 300);
    for (let i = 0; i < 100; i++) assert.notEqual(policy.next(), null);
  }
});

test('a fixed level stays', () => {
  const policy = new CompressionPolicy(-3);
  for (let i = 0; i < 10; i++) window(policy, 1, 0, 0.9);
  assert.equal(policy.next(), -3);
});
