/**
 * How long a property is tried: a fixed number of runs, or for BLOCKFERRY_FUZZ_SECONDS in all (bin/fuzz). BLOCKFERRY_SEED repeats a run.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import fc from 'fast-check';

const SECONDS = Number(process.env.BLOCKFERRY_FUZZ_SECONDS ?? 0);
/** Runs of a short campaign, as a share: the sanitized one in bin/check makes fewer. */
const SHARE = Number(process.env.BLOCKFERRY_FUZZ_SHARE ?? 1);
const SEED = process.env.BLOCKFERRY_SEED;
/** There is time for what takes seconds. */
export const LONG = SECONDS > 0;
const ROUND_RUNS = 500;
/** What may be left over after a campaign: caches of ours and of Node's. */
const LEFT_BYTES_MAX = 160 << 20;

export interface Campaign {
  /** Runs in bin/check. */
  runs: number;
  /** Part of the time of a long campaign, all of them 1. */
  share: number;
}

/** A test that tries `property` with many `plans`. */
export function campaign<T>(
  name: string,
  { runs, share }: Campaign,
  plans: fc.Arbitrary<T>,
  property: (plan: T) => Promise<void>,
): void {
  test(name, async (t) => {
    const first = SEED === undefined ? Math.floor(Math.random() * 2 ** 31) : Number(SEED);
    const deadline = performance.now() + SECONDS * share * 1000;
    const before = usedBytes();
    let done = 0;
    const round = async (seed: number, numRuns: number): Promise<void> => {
      const counted = fc.asyncProperty(plans, async (plan) => {
        await property(plan);
        done++;
      });
      const result = await fc.check(counted, { seed, numRuns, endOnFailure: false });
      if (!result.failed) return;
      const why = result.errorInstance instanceof Error ? result.errorInstance.stack : result.errorInstance;
      assert.fail(`BLOCKFERRY_SEED=${seed}: ${why}\n${fc.defaultReportMessage(result)}`);
    };
    if (SECONDS === 0) await round(first, Math.max(1, Math.round(runs * SHARE)));
    else for (let seed = first; performance.now() < deadline; seed++) await round(seed, ROUND_RUNS);
    const left = usedBytes() - before;
    assert.ok(left < LEFT_BYTES_MAX, `${left >> 20} MiB are left over after ${done} runs`);
    t.diagnostic(`${done} runs from BLOCKFERRY_SEED=${first}, ${left >> 20} MiB left over`);
  });
}

/** Memory in use after a collection. */
function usedBytes(): number {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}
