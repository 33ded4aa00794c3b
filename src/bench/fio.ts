/** The same load by fio's nbd engine (libnbd), to check our own load against: more CPU for each operation, and its own idea of random. */

import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import type { Latency, LoadOptions } from './load.js';

const OUTPUT_BYTES_MAX = 16 << 20;

const run = promisify(execFile);

const direction = z.object({
  iops: z.number(),
  bw_bytes: z.number(),
  total_ios: z.number(),
  clat_ns: z.object({
    mean: z.number(),
    max: z.number(),
    N: z.number(),
    percentile: z.record(z.string(), z.number()).optional(),
  }),
});
const output = z.object({
  jobs: z
    .array(
      z.object({
        read: direction,
        write: direction,
        job_runtime: z.number(),
        usr_cpu: z.number(),
        sys_cpu: z.number(),
      }),
    )
    .min(1),
});

export interface FioResult {
  opsPerSecond: number;
  bytesPerSecond: number;
  latencyNs: Latency;
  totalOperations: number;
  cpuNs: number;
  elapsedNs: number;
}

export function fioWords(uri: string, load: LoadOptions): string[] {
  const base = load.order === 'sequential' ? '' : 'rand';
  const kind = load.readPercent === 100 ? 'read' : load.readPercent === 0 ? 'write' : 'rw';
  const words: Record<string, string | number> = {
    name: 'bench',
    ioengine: 'nbd',
    uri,
    rw: `${base}${kind}`,
    rwmixread: load.readPercent,
    bs: load.blockBytes,
    iodepth: load.depth,
    numjobs: load.connections,
    randseed: load.seed,
    ramp_time: `${load.warmupMs}ms`,
    runtime: `${load.durationMs}ms`,
    'output-format': 'json',
  };
  if (load.flushEvery > 0) words.fsync = load.flushEvery;
  // A lap reads each block once, which is what fio does unless it is told to go on until the time is over.
  const switches = load.lap ? [] : ['--time_based', '--norandommap'];
  return [
    ...Object.entries(words).map(([name, value]) => `--${name}=${value}`),
    ...switches,
    '--group_reporting',
  ];
}

/** Throws 'bench'. */
export async function runFio(uri: string, load: LoadOptions): Promise<FioResult> {
  const text = await run('fio', fioWords(uri, load), { maxBuffer: OUTPUT_BYTES_MAX }).then(
    ({ stdout }) => stdout,
    (cause: unknown) => {
      throw new BlockferryError('bench', `fio failed: ${messageOf(cause).split('\n').at(-1)}`, { cause });
    },
  );
  return parseFio(text);
}

/** Reads and writes together; quantiles are those of the kind there was more of. */
export function parseFio(text: string): FioResult {
  // Warnings come before the JSON.
  const [job] = output.parse(JSON.parse(text.slice(text.indexOf('{\n')))).jobs;
  const { read, write } = job;
  const main = read.clat_ns.N >= write.clat_ns.N ? read.clat_ns : write.clat_ns;
  const quantile = (name: string): number => main.percentile?.[name] ?? 0;
  const elapsedNs = job.job_runtime * 1e6;
  return {
    opsPerSecond: read.iops + write.iops,
    bytesPerSecond: read.bw_bytes + write.bw_bytes,
    latencyNs: {
      count: read.clat_ns.N + write.clat_ns.N,
      mean: main.mean,
      p50: quantile('50.000000'),
      p99: quantile('99.000000'),
      p999: quantile('99.900000'),
      max: Math.max(read.clat_ns.max, write.clat_ns.max),
    },
    totalOperations: read.total_ios + write.total_ios,
    cpuNs: ((job.usr_cpu + job.sys_cpu) / 100) * elapsedNs,
    elapsedNs,
  };
}
