/** Made-up results: what was measured matters less than what is said of it. */

import type { CellResult, Report, Sample } from '../../../src/bench/report.js';

export function sample(opsPerSecond: number, more: Partial<Sample> = {}): Sample {
  return {
    round: 0,
    opsPerSecond,
    bytesPerSecond: opsPerSecond * 4096,
    p50Us: 50,
    p99Us: 400,
    p999Us: 900,
    maxUs: 2000,
    serverCpuUs: 4,
    clientCpuUs: 1,
    clientBusy: 0.5,
    peakBytes: 64 << 20,
    ...more,
  };
}

export function cellResult(name: string, samples: Record<string, Sample[]>): CellResult {
  return {
    name,
    measuredAt: '2026-01-02T03:04:05.000Z',
    ourVersion: '0.1.0',
    tool: 'load',
    rounds: 7,
    seconds: 1,
    imageBytes: 256 << 20,
    samples,
  };
}

export const SERVERS = ['blockferry', 'blockferry proxy, handed off', 'nbdkit file', 'nbd-server'].map(
  (name) => ({
    name,
    ours: name.startsWith('blockferry'),
    version: '1.2',
    commandLine: `${name} DIR/disk.img`,
  }),
);

export function reportOf(...cells: CellResult[]): Report {
  return {
    version: 1,
    machine: {
      cpu: 'A CPU',
      cores: 2,
      memoryBytes: 2 ** 34,
      kernel: '6.1',
      system: 'Debian',
      node: '20.19.0',
    },
    servers: SERVERS,
    leftOut: [],
    cells,
  };
}
