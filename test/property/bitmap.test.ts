/** The bitmap calls against a plain array of bits: any map, any alignment, any range. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { clearRange, countOnes, nextOne, nextZero, setRange } from '../../src/native/index.js';

const RUNS = 3000;
const GUARD_BYTES = 9;

interface Case {
  bits: boolean[];
  from: number;
  to: number;
  shift: number;
}

/** Maps of long runs as well as of noise: both the word loop and its edges are met. */
const bitsOf: fc.Arbitrary<boolean[]> = fc.oneof(
  fc.array(fc.boolean(), { maxLength: 400 }),
  fc
    .array(fc.tuple(fc.boolean(), fc.integer({ min: 1, max: 300 })), { maxLength: 6 })
    .map((runs) => runs.flatMap(([bit, length]) => new Array<boolean>(length).fill(bit))),
);

const anyCase: fc.Arbitrary<Case> = fc
  .tuple(bitsOf, fc.nat(), fc.nat(), fc.integer({ min: 0, max: 8 }))
  .map(([bits, a, b, shift]) => {
    while (bits.length % 8 !== 0) bits.push(false);
    const [from, to] = [a % (bits.length + 1), b % (bits.length + 1)].sort((x, y) => x - y);
    return { bits, from, to, shift };
  });

/** The map between guard bytes, at an odd address. */
function packed({ bits, shift }: Case, guard: number): { all: Uint8Array; map: Uint8Array } {
  const all = new Uint8Array(GUARD_BYTES + shift + bits.length / 8 + GUARD_BYTES).fill(guard);
  const map = all.subarray(GUARD_BYTES + shift, all.length - GUARD_BYTES);
  map.fill(0);
  for (const [i, bit] of bits.entries()) if (bit) map[i >> 3] |= 1 << (i & 7);
  return { all, map };
}

function find(bits: boolean[], wanted: boolean, from: number, to: number): number {
  const index = bits.slice(from, to).indexOf(wanted);
  return index < 0 ? to : from + index;
}

test('reading: counts and searches', () => {
  fc.assert(
    fc.property(anyCase, fc.constantFrom(0, 0xff), (c, guard) => {
      const { all, map } = packed(c, guard);
      const before = Buffer.from(all);
      assert.equal(countOnes(map, c.from, c.to), c.bits.slice(c.from, c.to).filter(Boolean).length);
      assert.equal(nextZero(map, c.from, c.to), find(c.bits, false, c.from, c.to));
      assert.equal(nextOne(map, c.from, c.to), find(c.bits, true, c.from, c.to));
      assert.deepEqual(Buffer.from(all), before);
    }),
    { numRuns: RUNS },
  );
});

for (const [name, call, value] of [
  ['setRange', setRange, true],
  ['clearRange', clearRange, false],
] as const) {
  test(`${name}: changes the range, tells how many bits, touches nothing else`, () => {
    fc.assert(
      fc.property(anyCase, fc.constantFrom(0, 0xff), (c, guard) => {
        const { all, map } = packed(c, guard);
        const wanted = c.bits.map((bit, i) => (i >= c.from && i < c.to ? value : bit));
        const changed = wanted.filter((bit, i) => bit !== c.bits[i]).length;
        assert.equal(call(map, c.from, c.to), changed);
        assert.deepEqual(Buffer.from(all), Buffer.from(packed({ ...c, bits: wanted }, guard).all));
        assert.equal(call(map, c.from, c.to), 0);
      }),
      { numRuns: RUNS },
    );
  });
}

test('a life of a map: any sequence of calls agrees with a Set', () => {
  const bitCount = 520;
  const step = fc.tuple(fc.constantFrom('set', 'clear'), fc.nat(bitCount), fc.nat(bitCount));
  fc.assert(
    fc.property(fc.array(step, { maxLength: 40 }), (steps) => {
      const map = new Uint8Array(bitCount / 8);
      const model = new Set<number>();
      for (const [what, a, b] of steps) {
        const [from, to] = a < b ? [a, b] : [b, a];
        const sizeBefore = model.size;
        for (let i = from; i < to; i++) what === 'set' ? model.add(i) : model.delete(i);
        const changed = (what === 'set' ? setRange : clearRange)(map, from, to);
        assert.equal(changed, Math.abs(model.size - sizeBefore));
        assert.equal(countOnes(map, 0, bitCount), model.size);
      }
      const walked: number[] = [];
      for (let i = nextOne(map, 0, bitCount); i < bitCount; i = nextOne(map, i + 1, bitCount)) walked.push(i);
      assert.deepEqual(
        walked,
        [...model].sort((x, y) => x - y),
      );
    }),
    { numRuns: 300 },
  );
});
