/** What the command prints: a load's result, and a comparison's. */

import { HIT_P99_US_MAX, VOLUMES_GROWTH_BAR } from './bars.js';
import { HITS_OURS, HITS_PEER } from './hits.js';
import type { Latency, LoadOptions, LoadResult } from './load.js';
import type { HitsResult, Report, VolumesResult } from './report.js';
import { medianOf } from './statistics.js';
import {
  formatCount,
  formatMicros,
  formatRateSpread,
  METRICS,
  type Metric,
  metricRows,
  rateRows,
  textTable,
} from './table.js';
import { VOLUMES_OURS } from './volumes.js';

function plural(count: number, what: string): string {
  return `${count} ${what}${count === 1 ? '' : 's'}`;
}

export function loadText(options: LoadOptions, result: LoadResult): string {
  const seconds = result.elapsedNs / 1e9;
  const row = (name: string, { count, mean, p50, p99, p999, max }: Latency, bytes: number): string[] => [
    name,
    formatCount(count / seconds),
    bytes === 0 ? '' : `${formatCount((count * bytes) / seconds / 2 ** 20)} MiB/s`,
    ...[mean, p50, p99, p999, max].map((ns) => formatMicros(ns / 1000)),
  ];
  const kinds: [string, Latency, number][] = [
    ['reads', result.readNs, options.blockBytes],
    ['writes', result.writeNs, options.blockBytes],
    ['flushes', result.flushNs, 0],
  ];
  const rows = kinds.filter(([, { count }]) => count > 0).map((kind) => row(...kind));
  const operations = result.reads + result.writes;
  const cpuUs = operations === 0 ? 0 : result.cpuNs / 1000 / operations;
  const lines = [
    `${plural(operations, 'operation')} of ${options.blockBytes} bytes in ${seconds.toFixed(2)} s: ${options.order}, ` +
      `depth ${options.depth}, ${plural(options.connections, 'connection')}`,
    textTable([['', 'a second', '', 'mean', 'p50', 'p99', 'p99.9', 'max'], ...rows]),
    `the load's own CPU: ${formatMicros(cpuUs)} an operation, ${Math.round((result.cpuNs / result.elapsedNs) * 100)} % of a core`,
  ];
  if (options.verify)
    lines.push(`verified: ${plural(result.verifiedReads, 'read')}, and every block that was written`);
  return lines.join('\n');
}

export function hitsRows(hits: HitsResult): string[][] {
  const rows = Object.entries(hits.samples).map(([name, samples]) => [
    name,
    formatRateSpread(samples.map(({ hitsPerSecond }) => hitsPerSecond)),
    formatMicros(medianOf(samples.map(({ p50Us }) => p50Us))),
    formatMicros(medianOf(samples.map(({ p99Us }) => p99Us))),
    formatRateSpread(samples.map(({ missesPerSecond }) => missesPerSecond)),
  ]);
  return [['hits at depth 1', 'hits a second', 'p50', 'p99', 'misses a second'], ...rows];
}

/** Whether the bars for hits beside misses hold: one sentence. */
export function hitsVerdict(hits: HitsResult): string {
  const [own, peer] = [hits.samples[HITS_OURS] ?? [], hits.samples[HITS_PEER] ?? []];
  if (own.length === 0 || peer.length === 0) return 'Nothing to compare.';
  const p99Us = medianOf(own.map((sample) => sample.p99Us));
  const ratio =
    medianOf(own.map(({ hitsPerSecond }) => hitsPerSecond)) /
    medianOf(peer.map(({ hitsPerSecond }) => hitsPerSecond));
  const quick = p99Us <= HIT_P99_US_MAX ? 'ok' : 'MISSED';
  const many = ratio >= 1 ? 'ok' : 'MISSED';
  return (
    `p99 ${formatMicros(p99Us)}, at most ${formatMicros(HIT_P99_US_MAX)}: ${quick}; ` +
    `rate to ${HITS_PEER} ${ratio.toFixed(2)}, at least 1.00: ${many}.`
  );
}

export function volumesRows(volumes: VolumesResult): string[][] {
  const rows = Object.entries(volumes.samples).map(([name, samples]) => {
    const one = samples.map(({ onePerSecond }) => onePerSecond);
    const both = samples.map(({ bothPerSecond }) => bothPerSecond);
    return [name, formatRateSpread(one), formatRateSpread(both), (medianOf(both) / medianOf(one)).toFixed(2)];
  });
  return [['4 KiB random reads, depth 16', 'one volume', 'two volumes, in all', 'ratio'], ...rows];
}

/** Whether the bar for two busy volumes holds: one sentence. */
export function volumesVerdict(volumes: VolumesResult): string {
  const own = volumes.samples[VOLUMES_OURS] ?? [];
  if (own.length === 0) return 'Nothing to judge.';
  const growth =
    medianOf(own.map((sample) => sample.bothPerSecond)) / medianOf(own.map((sample) => sample.onePerSecond));
  return `Two volumes to one ${growth.toFixed(2)}, more than ${VOLUMES_GROWTH_BAR.toFixed(2)}: ${growth > VOLUMES_GROWTH_BAR ? 'ok' : 'MISSED'}.`;
}

export function comparisonText(report: Report): string {
  const parts: string[] = [];
  if (report.cells.length > 0) {
    parts.push(textTable(rateRows(report, report.cells)));
    for (const metric of Object.keys(METRICS) as Metric[])
      parts.push(textTable(metricRows(report, report.cells, metric)));
  }
  if (report.hits !== undefined)
    parts.push(`${textTable(hitsRows(report.hits))}\n${hitsVerdict(report.hits)}`);
  if (report.volumes !== undefined)
    parts.push(`${textTable(volumesRows(report.volumes))}\n${volumesVerdict(report.volumes)}`);
  const { cpu, cores, kernel, node } = report.machine;
  parts.push(
    `${cpu}, ${plural(cores, 'core')}, Linux ${kernel}, Node.js ${node}. "*": the load was the limit.`,
  );
  if (report.leftOut.length > 0) parts.push(`Left out: ${report.leftOut.join('; ')}.`);
  return parts.join('\n\n');
}
