/** docs/benchmarks.md, from what was measured and nothing else. */

import { HANDED_OFF, judge, judgeHandedOff } from '../src/bench/bars.js';
import type { CellResult, Report } from '../src/bench/report.js';
import { METRICS, type Metric, markdownTable, metricRows, rateRows } from '../src/bench/table.js';
import { hitsRows, hitsVerdict, volumesRows, volumesVerdict } from '../src/bench/text.js';

/** Why cells miss a bar, as profiling showed. `only` is a filter like that of the command. */
export interface Reason {
  only: string;
  reason: string;
}

const UNEXAMINED = 'not examined yet';
/** Fewer say little. */
const ROUNDS_MIN = 7;

interface Miss {
  cell: string;
  what: string;
}

function missesOf(report: Report): { misses: Miss[]; bars: number } {
  const misses: Miss[] = [];
  let bars = 0;
  for (const cell of report.cells) {
    const verdict = judge(cell, report.servers);
    const judged = [
      { what: `rate to ${verdict?.bestPeer}`, sign: '<', comparison: verdict?.rate },
      { what: `CPU an operation to ${verdict?.bestPeer}`, sign: '>', comparison: verdict?.cpu },
      { what: `${HANDED_OFF}, to serve`, sign: '<', comparison: judgeHandedOff(cell) },
    ];
    for (const { what, sign, comparison } of judged) {
      if (comparison?.bar === null || comparison?.bar === undefined) continue;
      bars++;
      if (comparison.holds === true) continue;
      misses.push({
        cell: cell.name,
        what: `${what}: ${comparison.ratio.toFixed(2)} ${sign} ${comparison.bar.toFixed(2)}`,
      });
    }
  }
  return { misses, bars };
}

function reasonFor(cell: string, reasons: readonly Reason[]): string {
  const words = new Set(cell.split(' '));
  const found = reasons.find(({ only }) => only.split(/\s+/).every((word) => words.has(word)));
  return found?.reason ?? UNEXAMINED;
}

function missedSection(report: Report, reasons: readonly Reason[]): string[] {
  const { misses, bars } = missesOf(report);
  if (bars === 0) return [];
  const lines = ['## Bars', '', `${bars - misses.length} of ${bars} bars hold.`, ''];
  if (misses.length === 0) return lines;
  const rows = misses.map(({ cell, what }) => [cell, what, reasonFor(cell, reasons)]);
  return [...lines, markdownTable([['missed', 'by', 'why'], ...rows]), ''];
}

/** "tmpfs, unix": what the last words of a cell's name say. */
function groupsOf(cells: readonly CellResult[]): Map<string, CellResult[]> {
  const groups = new Map<string, CellResult[]>();
  for (const cell of cells) {
    const [transport, placement] = cell.name.split(' ').slice(-2);
    const key = `${PLACES[placement] ?? placement}, ${transport === 'tcp' ? 'TCP on loopback' : 'unix socket'}`;
    groups.set(key, [...(groups.get(key) ?? []), cell]);
  }
  return groups;
}

const PLACES: Record<string, string> = {
  cache: 'Image on a disk, in the page cache',
  tmpfs: 'Image on tmpfs',
  cold: 'Image on a disk, not in the page cache',
};

function groupSection(report: Report, title: string, cells: readonly CellResult[]): string[] {
  const tables = [
    rateRows(report, cells),
    ...(Object.keys(METRICS) as Metric[]).map((metric) => metricRows(report, cells, metric)),
  ];
  return [`## ${title}`, '', ...tables.flatMap((rows) => [markdownTable(rows), ''])];
}

function range(values: readonly number[]): string {
  const [least, greatest] = [Math.min(...values), Math.max(...values)];
  return least === greatest ? String(least) : `${least} to ${greatest}`;
}

function head(report: Report): string[] {
  const { cpu, cores, memoryBytes, kernel, system, node } = report.machine;
  const { cells } = report;
  const days = cells.map(({ measuredAt }) => measuredAt.slice(0, 10)).sort();
  const lines = [
    '# Benchmarks',
    '',
    'Written by `node dist/bench/run.js --save`, which measures all of this again; `--only "read 4k d16 unix"` measures a part and replaces it',
    'here. Not edited by hand: it follows from `bench/results/servers.json`, which has every sample.',
    '',
    `${cpu}, ${cores} cores, ${Math.round(memoryBytes / 2 ** 30)} GiB; ${system}, Linux ${kernel}; Node.js ${node}.`,
  ];
  if (cells.length === 0) return [...lines, ''];
  const versions = [...new Set(cells.map(({ ourVersion }) => ourVersion))].join(', ');
  const rounds = cells.map((cell) => cell.rounds);
  lines.push(
    `Measured ${days[0] === days.at(-1) ? days[0] : `${days[0]} to ${days.at(-1)}`}: medians of ${range(rounds)} rounds of ` +
      `${range(cells.map(({ seconds }) => seconds))} s, servers in turn within each round; ± half the way from the least to the greatest.`,
    `blockferry ${versions}.`,
    'The load runs on the same machine: compare within a row. "*": the load was the limit. The best peer is the one with the highest rate.',
    'Images get other memory before each round: on a virtual machine not all of it is equally fast, and a server could win or lose by luck.',
  );
  if (Math.min(...rounds) < ROUNDS_MIN)
    lines.push(`Fewer than ${ROUNDS_MIN} rounds: a first look, no proof.`);
  return [...lines, ''];
}

/** The page; `reasons` for bars that are missed. */
export function benchmarksPage(report: Report, reasons: readonly Reason[]): string {
  const servers = report.servers.map(({ name, version, commandLine }) => [
    name,
    version,
    `\`${commandLine}\``,
  ]);
  const lines = [
    ...head(report),
    ...(servers.length === 0 ? [] : [markdownTable([['server', 'version', 'command line'], ...servers]), '']),
    ...(report.leftOut.length === 0 ? [] : [`Left out: ${report.leftOut.join('; ')}.`, '']),
    ...missedSection(report, reasons),
  ];
  for (const [title, cells] of groupsOf(report.cells)) lines.push(...groupSection(report, title, cells));
  const { hits, volumes } = report;
  if (hits !== undefined)
    lines.push(
      '## Hits beside misses',
      '',
      `One client reads local blocks at depth 1 while another one reads, at depth 16, blocks that are still at a source with a delay of ${hits.delayMs} ms.`,
      '',
      markdownTable(hitsRows(hits)),
      '',
      hitsVerdict(hits),
      '',
    );
  if (volumes !== undefined)
    lines.push(
      '## Two busy volumes',
      '',
      markdownTable(volumesRows(volumes)),
      '',
      volumesVerdict(volumes),
      '',
    );
  return lines.join('\n');
}
