/** The set of blocks in flight against a Set, near the start and near the largest block number. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { InFlight } from '../../src/relocation/in-flight.js';

const SPAN = 200;

test('marks, unmarks and both searches agree with a Set', () => {
  const range = fc
    .tuple(fc.integer({ min: 0, max: SPAN - 1 }), fc.integer({ min: 1, max: 100 }))
    .map(([first, count]) => ({ first, end: Math.min(SPAN, first + count) }));
  const step = fc.record({ mark: fc.boolean(), range });
  fc.assert(
    fc.property(fc.constantFrom(0, 2 ** 31 - 100, 2 ** 32 - SPAN), fc.array(step), (base, steps) => {
      const set = new Set<number>();
      const inFlight = new InFlight();
      for (const { mark, range } of steps) {
        if (mark) inFlight.mark(base + range.first, base + range.end);
        else inFlight.unmark(base + range.first, base + range.end);
        for (let block = range.first; block < range.end; block++) {
          if (mark) set.add(block);
          else set.delete(block);
        }
        for (let from = 0; from < SPAN; from += 7) {
          let idle = from;
          while (set.has(idle)) idle++;
          assert.equal(inFlight.nextIdle(base + from), base + idle);
          let busy = from;
          while (busy < SPAN && !set.has(busy)) busy++;
          assert.equal(inFlight.nextBusy(base + from, base + SPAN), base + busy);
        }
      }
    }),
    { numRuns: 300 },
  );
});
