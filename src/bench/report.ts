/** What a comparison found, as it is stored. */

import { z } from 'zod';

const sample = z.object({
  round: z.number(),
  /** Reads and writes, not flushes. */
  opsPerSecond: z.number(),
  bytesPerSecond: z.number(),
  /** Microseconds, of reads and writes. */
  p50Us: z.number(),
  p99Us: z.number(),
  p999Us: z.number(),
  maxUs: z.number(),
  /** CPU time for each operation, microseconds: user and system, of all threads and processes. */
  serverCpuUs: z.number(),
  clientCpuUs: z.number(),
  /** CPU time of the load by the time it took, 0..1: near 1 the load was the limit. */
  clientBusy: z.number(),
  /** Greatest resident memory of the server during the load. */
  peakBytes: z.number(),
});

const cellResult = z.object({
  name: z.string(),
  /** ISO 8601. */
  measuredAt: z.string(),
  /** Version of blockferry, with its commit. */
  ourVersion: z.string(),
  tool: z.enum(['load', 'fio']),
  rounds: z.number(),
  seconds: z.number(),
  imageBytes: z.number(),
  /** By the name of the server. */
  samples: z.record(z.string(), z.array(sample)),
});

const serverFacts = z.object({
  name: z.string(),
  ours: z.boolean(),
  version: z.string(),
  commandLine: z.string(),
});

const hitsResult = z.object({
  measuredAt: z.string(),
  seconds: z.number(),
  delayMs: z.number(),
  samples: z.record(
    z.string(),
    z.array(
      z.object({
        round: z.number(),
        hitsPerSecond: z.number(),
        p50Us: z.number(),
        p99Us: z.number(),
        maxUs: z.number(),
        missesPerSecond: z.number(),
      }),
    ),
  ),
});

/** Two volumes of one daemon, loaded one alone and both at once. */
const volumesResult = z.object({
  measuredAt: z.string(),
  seconds: z.number(),
  samples: z.record(
    z.string(),
    z.array(z.object({ round: z.number(), onePerSecond: z.number(), bothPerSecond: z.number() })),
  ),
});

export const machineFacts = z.object({
  cpu: z.string(),
  cores: z.number(),
  memoryBytes: z.number(),
  kernel: z.string(),
  system: z.string(),
  node: z.string(),
});

export const report = z.object({
  version: z.literal(1),
  machine: machineFacts,
  servers: z.array(serverFacts),
  /** Why a server is not there: "nbd-server: not installed". */
  leftOut: z.array(z.string()),
  cells: z.array(cellResult),
  /** Hits of one client while another one misses. */
  hits: hitsResult.optional(),
  volumes: volumesResult.optional(),
});

export type Sample = z.infer<typeof sample>;
export type CellResult = z.infer<typeof cellResult>;
export type ServerFacts = z.infer<typeof serverFacts>;
export type HitsResult = z.infer<typeof hitsResult>;
export type VolumesResult = z.infer<typeof volumesResult>;
export type MachineFacts = z.infer<typeof machineFacts>;
export type Report = z.infer<typeof report>;

/** `later`'s cells in place of those of the same name, and its servers in place of those of the same name. */
export function merged(earlier: Report, later: Report): Report {
  const names = new Set(later.cells.map(({ name }) => name));
  const servers = new Set(later.servers.map(({ name }) => name));
  const hits = later.hits ?? earlier.hits;
  const volumes = later.volumes ?? earlier.volumes;
  return {
    ...later,
    servers: [...earlier.servers.filter(({ name }) => !servers.has(name)), ...later.servers],
    cells: [...earlier.cells.filter(({ name }) => !names.has(name)), ...later.cells],
    ...(hits === undefined ? {} : { hits }),
    ...(volumes === undefined ? {} : { volumes }),
  };
}
