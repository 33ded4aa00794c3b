/** Runs cases one after the other, each within its time, and gathers what came of them. */
import { type Case, Lab, NotOffered } from './case.js';
import { contextCases } from './cases/contexts.js';
import { dataCases } from './cases/data.js';
import { extendedCases } from './cases/extended.js';
import { extendedRequestCases } from './cases/extended-requests.js';
import { fastZeroCases } from './cases/fast-zero.js';
import { greetingCases } from './cases/greeting.js';
import { infoCases } from './cases/info.js';
import { libnbdCases } from './cases/libnbd.js';
import { limitCases } from './cases/limits.js';
import { optionCases } from './cases/options.js';
import { requestCases } from './cases/requests.js';
import { statusCases } from './cases/status.js';
import { tlsCases } from './cases/tls.js';
import { validityCases } from './cases/validity.js';
import type { Target } from './target.js';
import { within } from './wire.js';

const CASE_TIMEOUT_MS = 60_000;

export const CASES: readonly Case[] = [
  ...greetingCases,
  ...optionCases,
  ...infoCases,
  ...contextCases,
  ...tlsCases,
  ...extendedCases,
  ...extendedRequestCases,
  ...requestCases,
  ...validityCases,
  ...limitCases,
  ...dataCases,
  ...fastZeroCases,
  ...statusCases,
  ...libnbdCases,
];

export type Outcome = 'pass' | 'fail' | 'not offered';

export interface Result {
  clause: string;
  level: Case['level'];
  name: string;
  outcome: Outcome;
  /** fail: what went wrong; pass: what the server chose, where it may; not offered: what. Else empty. */
  detail: string;
}

export async function runCase(one: Case, target: Target): Promise<Result> {
  const lab = new Lab(target);
  const { clause, level, name } = one;
  try {
    const chosen = await within(one.run(lab), CASE_TIMEOUT_MS, 'the case to end');
    const detail = typeof chosen === 'string' ? chosen : '';
    return { clause, level, name, outcome: 'pass', detail };
  } catch (error) {
    const detail = String(error instanceof Error ? error.message : error)
      .replaceAll(/\s+/g, ' ')
      .trim();
    return { clause, level, name, outcome: error instanceof NotOffered ? 'not offered' : 'fail', detail };
  } finally {
    lab.close();
  }
}

export function countsOf(results: readonly Result[]): Record<Outcome, number> & { failedMusts: number } {
  const count = (outcome: Outcome) => results.filter((result) => result.outcome === outcome).length;
  return {
    pass: count('pass'),
    fail: count('fail'),
    'not offered': count('not offered'),
    failedMusts: results.filter(({ outcome, level }) => outcome === 'fail' && level === 'M').length,
  };
}
