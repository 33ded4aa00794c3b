/**
 * Load on an NBD server, by the program of native/load: one thread, no copies, so that it is not what is measured. This file starts it
 * and reads its result.
 */

import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { BlockferryError } from '../errors.js';
import { packageRoot } from '../native/index.js';
import { parseNbdUri } from '../nbd/uri.js';

export interface LoadOptions {
  /** 1..256. */
  connections: number;
  /** Requests under way on each connection, 1..1024. */
  depth: number;
  /** Of each request, 1..32 MiB. */
  blockBytes: number;
  /** 'shuffled': each block once a lap, in random order. 'sequential': each connection goes through a part of its own. */
  order: 'random' | 'shuffled' | 'sequential';
  /** 0..100; the rest are writes. */
  readPercent: number;
  /** FLUSH after so many writes of a connection; 0: never. */
  flushEvery: number;
  /** Nothing counts before; none with `count` or `lap`. */
  warmupMs: number;
  /** 0: `count` or `lap` alone ends it. */
  durationMs: number;
  /** Operations; 0: no limit. */
  count: number;
  /** The offsets follow from it. */
  seed: number;
  /** The range that is loaded; length 0: to the end of the export. */
  offset: number;
  length: number;
  /** From the start of one block to the next; 0: blockBytes. */
  strideBytes: number;
  /** Ends when each block was done once; not with order 'random'. */
  lap: boolean;
  /** Checks what is read against what was written; at the end every block that was written is read back. */
  verify: boolean;
  structured: boolean;
  /** Fails when the server says nothing for so long. */
  timeoutMs: number;
}

export const LOAD_DEFAULTS: Readonly<LoadOptions> = {
  connections: 1,
  depth: 16,
  blockBytes: 4096,
  order: 'random',
  readPercent: 100,
  flushEvery: 0,
  warmupMs: 0,
  durationMs: 1000,
  count: 0,
  seed: 1,
  offset: 0,
  length: 0,
  strideBytes: 0,
  lap: false,
  verify: false,
  structured: false,
  timeoutMs: 30_000,
};

const latency = z.object({
  count: z.number(),
  mean: z.number(),
  p50: z.number(),
  p99: z.number(),
  p999: z.number(),
  max: z.number(),
});

/** What the program prints. Times in nanoseconds; quantiles are at most 1.6 % too high. */
const loadResult = z.object({
  exportBytes: z.number(),
  multiConn: z.boolean(),
  structured: z.boolean(),
  /** Of what was measured, as are the counts and latencies that follow. */
  elapsedNs: z.number(),
  /** Of the program itself, user and system. */
  cpuNs: z.number(),
  reads: z.number(),
  writes: z.number(),
  flushes: z.number(),
  /** Of reads and writes. */
  bytes: z.number(),
  /** Of reads and writes. */
  latencyNs: latency,
  readNs: latency,
  writeNs: latency,
  flushNs: latency,
  /** Of everything it did, measured or not; without what was read back at the end of a verification. */
  totalReads: z.number(),
  totalWrites: z.number(),
  totalFlushes: z.number(),
  /** Reads that were found right, with those at the end. */
  verifiedReads: z.number(),
});

export type Latency = z.infer<typeof latency>;
export type LoadResult = z.infer<typeof loadResult>;

export interface LoadHooks {
  /** Called when the load is over and its connections are still open. */
  whileConnected?: () => void;
  /** Ends the load, which then fails. */
  signal?: AbortSignal;
}

/** Of one line that it says when it fails. */
const STDERR_KEPT = 2000;

/** Path of the program. Throws 'not-found' if it was not built. */
export function loadProgram(): string {
  const root = packageRoot();
  const path = join(root, 'native/build/Release/blockferry-load');
  if (!existsSync(path))
    throw new BlockferryError(
      'not-found',
      `the load generator ${path} is missing; build it: cd '${root}' && npm run install`,
    );
  return path;
}

/** The words of the program. Throws 'address' or 'usage' for what it cannot do. */
export function loadWords(uri: string, options: LoadOptions): string[] {
  const { address, exportName, tls } = parseNbdUri(uri);
  if (tls !== undefined)
    throw new BlockferryError(
      'usage',
      'the load does not speak TLS: measure without, or load the server with fio or nbdcopy',
    );
  if (options.warmupMs > 0 && (options.count > 0 || options.lap))
    throw new BlockferryError('usage', 'a load by count or lap has no warm-up: everything counts');
  const values: Record<string, string | number> = {
    ...(address.kind === 'unix' ? { unix: address.path } : { host: address.host, port: address.port }),
    export: exportName,
    connections: options.connections,
    depth: options.depth,
    block: options.blockBytes,
    order: options.order,
    reads: options.readPercent,
    'flush-every': options.flushEvery,
    'warmup-ms': options.warmupMs,
    'duration-ms': options.durationMs,
    count: options.count,
    seed: options.seed,
    offset: options.offset,
    length: options.length,
    stride: options.strideBytes,
    'timeout-ms': options.timeoutMs,
    lap: Number(options.lap),
    verify: Number(options.verify),
    structured: Number(options.structured),
    hold: 1,
  };
  return Object.entries(values).flatMap(([name, value]) => [`--${name}`, String(value)]);
}

/** Loads the export at `uri`. Throws 'bench' with the server's failure, or what could not be done. */
export function runLoad(
  uri: string,
  options: Partial<LoadOptions>,
  hooks: LoadHooks = {},
): Promise<LoadResult> {
  const words = loadWords(uri, { ...LOAD_DEFAULTS, ...options });
  const child = spawn(loadProgram(), words, {
    stdio: ['pipe', 'pipe', 'pipe'],
    ...(hooks.signal === undefined ? {} : { signal: hooks.signal, killSignal: 'SIGKILL' }),
  });
  return new Promise((resolve, reject) => {
    let stdout = '';
    let stderr = '';
    child.stdin.on('error', () => undefined);
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      stdout += text;
      if (!stdout.endsWith('\n')) return;
      hooks.whileConnected?.();
      child.stdin.end();
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      stderr = (stderr + text).slice(-STDERR_KEPT);
    });
    child.once('error', (cause) =>
      reject(new BlockferryError('bench', `the load was ended: ${cause.message}`, { cause })),
    );
    child.once('close', (code, signal) => {
      if (code === 0) return resolve(loadResult.parse(JSON.parse(stdout)));
      const why = stderr.trim() || `the load generator ended with ${signal ?? `code ${code}`}`;
      reject(new BlockferryError(code === 2 ? 'usage' : 'bench', why));
    });
  });
}
