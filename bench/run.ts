/**
 * The comparison with other servers: `node dist/bench/run.js --help`. With --save what it found is stored in bench/results/servers.json, in
 * place of what was there of the same cells, and docs/benchmarks.md is written from that file. Why a bar is missed stands in
 * bench/results/reasons.json: a list of {"only": FILTER, "reason": TEXT}.
 */

import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { Command } from 'commander';
import { z } from 'zod';
import { EVERYTHING, QUICK } from '../src/bench/cells.js';
import { machineFactsHere } from '../src/bench/facts.js';
import { merged, type Report, report as storedReport } from '../src/bench/report.js';
import { runComparison } from '../src/bench/run.js';
import { comparisonText } from '../src/bench/text.js';
import { type ComparisonWords, comparisonFlags, comparisonOptions } from '../src/cli/bench.js';
import { BlockferryError, messageOf } from '../src/errors.js';
import { packageRoot } from '../src/native/index.js';
import { benchmarksPage } from './page.js';

const RESULTS = join(packageRoot(), 'bench/results/servers.json');
const REASONS = join(packageRoot(), 'bench/results/reasons.json');
const PAGE = join(packageRoot(), 'docs/benchmarks.md');

const DIGITS = 4;

const reasons = z.array(z.object({ only: z.string(), reason: z.string() }));

interface Words extends ComparisonWords {
  quick: boolean;
  save: boolean;
  render: boolean;
}

function stored(): Report | null {
  return existsSync(RESULTS) ? storedReport.parse(JSON.parse(readFileSync(RESULTS, 'utf8'))) : null;
}

function render(report: Report): void {
  const known = existsSync(REASONS) ? reasons.parse(JSON.parse(readFileSync(REASONS, 'utf8'))) : [];
  writeFileSync(PAGE, benchmarksPage(report, known));
}

/** JSON with a line for each cell, so that a change shows which cells it is about; four digits of each figure are more than they are worth. */
function lineByCell({ cells, ...rest }: Report): string {
  const short = (_: string, value: unknown): unknown =>
    typeof value === 'number' && !Number.isInteger(value) ? Number(value.toPrecision(DIGITS)) : value;
  const lines = cells.map((cell) => JSON.stringify(cell, short));
  const head = JSON.stringify(rest, short).slice(0, -1);
  return `${head},"cells":[\n${lines.join(',\n')}\n]}\n`;
}

function save(found: Report): void {
  const before = stored();
  const whole = before === null ? found : merged(before, found);
  mkdirSync(dirname(RESULTS), { recursive: true });
  writeFileSync(RESULTS, lineByCell(whole));
  render(whole);
}

/** Figures of several machines in one file would be compared. */
function checkMachine(found: Report['machine']): void {
  const before = stored();
  if (before !== null && !isDeepStrictEqual(before.machine, found))
    throw new BlockferryError(
      'bench',
      `${RESULTS} is of another machine: remove it, and everything is measured anew`,
    );
}

async function main(words: Words): Promise<void> {
  if (words.render) {
    const before = stored();
    if (before === null)
      throw new BlockferryError('not-found', `there is no ${RESULTS}: measure with --save`);
    return render(before);
  }
  if (words.save) checkMachine(machineFactsHere());
  const wanted = words.quick ? { ...words, only: [...QUICK, ...words.only] } : words;
  const report = await runComparison(comparisonOptions(wanted, [EVERYTHING]), (line) =>
    process.stderr.write(`${line}\n`),
  );
  if (words.save) save(report);
  process.stdout.write(`${comparisonText(report)}\n`);
}

const command = new Command('run')
  .description('compare NBD servers on this machine')
  .option('--quick', 'measure a few cells', false)
  .option('--save', 'store the result and write docs/benchmarks.md', false)
  .option('--render', 'measure nothing: write docs/benchmarks.md from what is stored', false);
for (const flag of comparisonFlags('all')) command.addOption(flag);
try {
  await main(command.parse().opts<Words>());
} catch (error) {
  process.stderr.write(`${messageOf(error)}\n`);
  process.exitCode = 1;
}
