/** Results as people read them: on a terminal and in Markdown. */

import { type Comparison, judge, judgeHandedOff } from './bars.js';
import type { CellResult, Report, Sample } from './report.js';
import { medianOf, spreadOf, spreadPercent } from './statistics.js';

/** Columns padded to one width; the first is words, the others are numbers and stand to the right. */
export function textTable(rows: readonly (readonly string[])[]): string {
  const widths = rows[0].map((_, column) => Math.max(...rows.map((row) => row[column].length)));
  return rows
    .map((row) =>
      row
        .map((cell, column) => (column === 0 ? cell.padEnd(widths[0]) : cell.padStart(widths[column])))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

export function markdownTable(rows: readonly (readonly string[])[]): string {
  const line = (row: readonly string[]): string => `| ${row.join(' | ')} |`;
  const [head, ...rest] = rows;
  return [line(head), line(head.map((_, column) => (column === 0 ? '---' : '---:'))), ...rest.map(line)].join(
    '\n',
  );
}

/** Three digits that matter: "1.23M", "412k", "9.87k", "512". */
export function formatCount(value: number): string {
  if (value >= 999_500) return `${threeDigits(value / 1e6)}M`;
  if (value >= 999.5) return `${threeDigits(value / 1e3)}k`;
  return threeDigits(value);
}

function threeDigits(value: number): string {
  return value.toFixed(value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);
}

/** "850 us", "4.21 ms", "1.20 s". */
export function formatMicros(us: number): string {
  if (us < 999.5) return `${threeDigits(us)} us`;
  return us < 999_500 ? `${threeDigits(us / 1000)} ms` : `${threeDigits(us / 1e6)} s`;
}

/** "1.62 >= 1.50 ok", "1.31 < 1.50 MISSED", "1.10" without a bar. */
export function formatComparison({ ratio, bar, holds }: Comparison, kind: 'at least' | 'at most'): string {
  const value = ratio.toFixed(2);
  if (bar === null) return value;
  const passed = kind === 'at least' ? '>=' : '<=';
  const failed = kind === 'at least' ? '<' : '>';
  return `${value} ${holds ? passed : failed} ${bar.toFixed(2)} ${holds ? 'ok' : 'MISSED'}`;
}

/** "247k ±9 %": median of the rates; half of what lies between the least and the greatest. */
export function formatRateSpread(values: readonly number[]): string {
  const spread = spreadOf(values);
  const percent = spreadPercent(spread);
  return `${formatCount(spread.median)}${percent === 0 ? '' : ` ±${Math.ceil(percent / 2)} %`}`;
}

/** A load that used more of its core than this was the limit itself. */
const CLIENT_BUSY_MAX = 0.9;

function isClientBound(result: CellResult, server: string): boolean {
  return medianOf(result.samples[server].map(({ clientBusy }) => clientBusy)) > CLIENT_BUSY_MAX;
}

/** One row a cell: the rate of each server, and how ours stands. A "*": the load was the limit. */
export function rateRows(report: Report, cells: readonly CellResult[]): string[][] {
  const names = serversIn(report, cells);
  const rows = cells.map((cell) => {
    const verdict = judge(cell, report.servers);
    const proxy = judgeHandedOff(cell);
    return [
      cell.name,
      ...names.map((name) => rateOf(cell, name)),
      verdict === null ? '' : formatComparison(verdict.rate, 'at least'),
      verdict === null ? '' : formatComparison(verdict.cpu, 'at most'),
      proxy === null ? '' : formatComparison(proxy, 'at least'),
    ];
  });
  return [['operations a second', ...names, 'to best peer', 'its CPU/op', 'proxy to serve'], ...rows];
}

function rateOf(cell: CellResult, name: string): string {
  const samples = cell.samples[name] ?? [];
  if (samples.length === 0) return '-';
  return `${formatRateSpread(samples.map(({ opsPerSecond }) => opsPerSecond))}${isClientBound(cell, name) ? ' *' : ''}`;
}

/** What is said of each server in a cell, beside its rate. */
export type Metric = 'latency' | 'cpu' | 'memory';

export const METRICS: Record<Metric, { title: string; show: (samples: readonly Sample[]) => string }> = {
  latency: {
    title: 'latency, p50 / p99',
    show: (samples) =>
      `${formatMicros(medianOf(samples.map(({ p50Us }) => p50Us)))} / ${formatMicros(medianOf(samples.map(({ p99Us }) => p99Us)))}`,
  },
  cpu: {
    title: 'CPU an operation, server + load',
    show: (samples) =>
      `${formatMicros(medianOf(samples.map(({ serverCpuUs }) => serverCpuUs)))} + ${formatMicros(medianOf(samples.map(({ clientCpuUs }) => clientCpuUs)))}`,
  },
  memory: {
    title: 'peak memory of the server',
    show: (samples) => `${Math.round(Math.max(...samples.map(({ peakBytes }) => peakBytes)) / 2 ** 20)} MiB`,
  },
};

/** One row a cell: a metric of each server. */
export function metricRows(report: Report, cells: readonly CellResult[], metric: Metric): string[][] {
  const names = serversIn(report, cells);
  const rows = cells.map((cell) => [
    cell.name,
    ...names.map((name) => {
      const samples = cell.samples[name] ?? [];
      return samples.length === 0 ? '-' : METRICS[metric].show(samples);
    }),
  ]);
  return [[METRICS[metric].title, ...names], ...rows];
}

function serversIn(report: Report, cells: readonly CellResult[]): string[] {
  return report.servers.map(({ name }) => name).filter((name) => cells.some((cell) => name in cell.samples));
}
