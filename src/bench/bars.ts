/** What must hold, and whether it does: the rates of ours by the best peer's of the same run, medians of all rounds. */

import { CELLS, type Cell } from './cells.js';
import type { CellResult, Sample, ServerFacts } from './report.js';
import { medianOf } from './statistics.js';

/** CPU time for each operation by that of the best peer, at most. */
export const CPU_BAR = 1.1;
/** A proxy whose blocks are all local by `serve`, at least. */
export const HANDED_OFF_BAR = 0.95;
/** Slowest hit in a hundred while another client misses, microseconds. */
export const HIT_P99_US_MAX = 1000;

/** What two busy volumes of one host do in all, by what one does: more. How much more is there depends on the cores the loads leave. */
export const VOLUMES_GROWTH_BAR = 1;

const RANDOM_BARS: Record<Cell['work'], Record<number, number>> = {
  read: { 1: 1.1, 16: 1.5, 64: 2.2 },
  write: { 1: 1.1, 16: 1.2, 64: 1.5 },
  mixed: { 1: 1.1, 16: 1.2, 64: 1.5 },
};

/** The rate of ours by the best peer's that a cell must reach; null: it is measured without one. */
export function barOf(cell: Cell): number | null {
  if (cell.flushEvery > 0) return null;
  if (cell.placement === 'cold') return cell.depth === 16 ? 1 : null;
  if (cell.sequential) return 1;
  return RANDOM_BARS[cell.work][cell.depth] ?? null;
}

export interface Comparison {
  ratio: number;
  bar: number | null;
  /** Null without a bar. */
  holds: boolean | null;
}

export interface Verdict {
  /** Server of ours that is judged. */
  ours: string;
  /** The peer with the highest rate. */
  bestPeer: string;
  rate: Comparison;
  /** CPU time for each operation by the same peer's. */
  cpu: Comparison;
}

const MAIN = 'blockferry';
export const HANDED_OFF = 'blockferry proxy, handed off';

function medians(samples: readonly Sample[]): { rate: number; cpu: number } {
  return {
    rate: medianOf(samples.map(({ opsPerSecond }) => opsPerSecond)),
    cpu: medianOf(samples.map(({ serverCpuUs }) => serverCpuUs)),
  };
}

/** The server against the best peer; null without one of them. */
export function judge(result: CellResult, servers: readonly ServerFacts[]): Verdict | null {
  const own = result.samples[MAIN];
  const peers = servers
    .filter(({ name, ours }) => !ours && (result.samples[name]?.length ?? 0) > 0)
    .map(({ name }) => ({ name, ...medians(result.samples[name]) }));
  if (own === undefined || own.length === 0 || peers.length === 0) return null;
  const best = peers.reduce((a, b) => (b.rate > a.rate ? b : a));
  const { rate, cpu } = medians(own);
  const cell = CELLS.find(({ name }) => name === result.name);
  const bar = cell === undefined ? null : barOf(cell);
  const cpuBar = bar === null ? null : CPU_BAR;
  return {
    ours: MAIN,
    bestPeer: best.name,
    rate: compared(rate / best.rate, bar, (ratio, least) => ratio >= least),
    // Less than a tick of CPU time at all: nothing to compare.
    cpu: compared(best.cpu === 0 ? 1 : cpu / best.cpu, cpuBar, (ratio, most) => ratio <= most),
  };
}

/** A proxy whose blocks are all local against `serve`; null without one of them. */
export function judgeHandedOff(result: CellResult): Comparison | null {
  const [proxy, serve] = [result.samples[HANDED_OFF], result.samples[MAIN]];
  if (proxy === undefined || proxy.length === 0 || serve === undefined || serve.length === 0) return null;
  const ratio = medians(proxy).rate / medians(serve).rate;
  return compared(ratio, HANDED_OFF_BAR, (value, least) => value >= least);
}

/** A ratio counts as it is shown, with two digits behind the point. */
function compared(
  exact: number,
  bar: number | null,
  passes: (ratio: number, bar: number) => boolean,
): Comparison {
  const ratio = Math.round(exact * 100) / 100;
  return { ratio, bar, holds: bar === null ? null : passes(ratio, bar) };
}
