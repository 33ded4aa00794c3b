import assert from 'node:assert/strict';
import { test } from 'node:test';
import { HoleFinder } from '../../../src/volume/hole-finder.js';

/** An image whose first `dense` bytes are data, and who counts questions. */
function finderOf(dense: number, takesMs = 0) {
  let asked = 0;
  let nowMs = 0;
  const holeFrom = (offset: number, end: number): number => {
    asked++;
    nowMs += takesMs;
    return offset < dense ? 0 : end - offset;
  };
  const clock = { pass: (ms: number) => (nowMs += ms) };
  return { finder: new HoleFinder({ holeFrom }, () => nowMs), asked: () => asked, clock };
}

test('every hole is found where holes are', () => {
  const { finder, asked } = finderOf(0);
  for (let offset = 0; offset < 100; offset++) assert.equal(finder.holeFrom(offset, 200), 200 - offset);
  assert.equal(asked(), 100);
});

test('in a dense image questions become rare, and behind it holes are found again', () => {
  const { finder, asked } = finderOf(1000);
  for (let offset = 0; offset < 1000; offset++) assert.equal(finder.holeFrom(offset, 2000), 0);
  assert.ok(asked() < 70, `${asked()} questions`);
  let missed = 0;
  while (finder.holeFrom(1000 + missed, 2000) === 0) missed++;
  assert.ok(missed <= 16, `${missed} missed`);
  for (let offset = 1100; offset < 1200; offset++) assert.ok(finder.holeFrom(offset, 2000) > 0);
});

test('questions that take long are not repeated soon', () => {
  const { finder, asked, clock } = finderOf(0, 5);
  for (let again = 0; again < 100; again++) finder.holeFrom(0, 10);
  assert.equal(asked(), 2);
  clock.pass(4_900);
  assert.equal(finder.holeFrom(0, 10), 0);
  clock.pass(200);
  assert.equal(finder.holeFrom(0, 10), 10);
});
