/**
 * Hits beside misses: one client reads at depth 1 what is local, another one at depth 16 what is still at a slow source. A proxy that
 * queues hits behind misses shows the source's delay in the hits' latency. Ours beside nbdkit's cow filter, with cow-on-read.
 */

import { mkdirSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { CompareOptions, Tell } from './compare.js';
import { imageFolder, makeImage } from './images.js';
import { runLoad } from './load.js';
import type { HitsResult } from './report.js';
import { cowOverSource, delayedSource, proxyOverSource, type RunningServer } from './servers.js';

export const HITS_DELAY_MS = 20;
const HIT_BYTES = 32 << 20;
/** Of each round, so that nothing is read twice: many more blocks than come over the source in that time. */
const MISS_BYTES = 64 << 20;
const MISS_DEPTH = 16;
const WARMUP_MS = 300;
/** The misses go on while the hits end. */
const MARGIN_MS = 500;

export const HITS_OURS = 'blockferry proxy';
export const HITS_PEER = 'nbdkit cow-on-read';

type HitsSample = HitsResult['samples'][string][number];

/** Null, with a reason in `leftOut`, without nbdkit: it is the source. */
export async function measureHits(
  { rounds, durationMs, folder: disk }: Pick<CompareOptions, 'rounds' | 'durationMs' | 'folder'>,
  leftOut: string[],
  tell: Tell,
): Promise<HitsResult | null> {
  const bytes = HIT_BYTES + rounds * MISS_BYTES;
  const folder = await imageFolder('cache', disk, bytes * 2);
  const started: RunningServer[] = [];
  try {
    tell(`hits beside misses: a source with a delay of ${HITS_DELAY_MS} ms`);
    const original = join(folder, 'original.img');
    await makeImage(original, bytes);
    const source = await delayedSource(folder, original, HITS_DELAY_MS);
    if (source === null) {
      leftOut.push('hits beside misses: nbdkit is not installed, which is their slow source');
      return null;
    }
    started.push(source);
    const contestants = [
      { name: HITS_OURS, start: proxyOverSource },
      { name: HITS_PEER, start: cowOverSource },
    ];
    const samples: Record<string, HitsSample[]> = {};
    const servers: { name: string; server: RunningServer }[] = [];
    for (const [index, { name, start }] of contestants.entries()) {
      const own = join(folder, String(index));
      mkdirSync(own);
      const server = await start(own, source);
      started.push(server);
      servers.push({ name, server });
      samples[name] = [];
      // What is to be hit is read once.
      await runLoad(server.uri, {
        blockBytes: 1 << 20,
        order: 'sequential',
        length: HIT_BYTES,
        lap: true,
        durationMs: 0,
      });
    }
    for (let round = 0; round < rounds; round++) {
      tell(`round ${round + 1} of ${rounds}: hits beside misses`);
      for (let turn = 0; turn < servers.length; turn++) {
        const { name, server } = servers[(turn + round) % servers.length];
        samples[name].push(await measure(server.uri, round, durationMs));
      }
    }
    return {
      measuredAt: new Date().toISOString(),
      seconds: durationMs / 1000,
      delayMs: HITS_DELAY_MS,
      samples,
    };
  } finally {
    for (const server of started.reverse()) await server.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}

async function measure(uri: string, round: number, durationMs: number): Promise<HitsSample> {
  const missing = runLoad(uri, {
    depth: MISS_DEPTH,
    order: 'shuffled',
    offset: HIT_BYTES + round * MISS_BYTES,
    length: MISS_BYTES,
    durationMs: WARMUP_MS + durationMs + MARGIN_MS,
  });
  const hitting = runLoad(uri, {
    depth: 1,
    length: HIT_BYTES,
    warmupMs: WARMUP_MS,
    durationMs,
    seed: round + 1,
  });
  const [misses, hits] = await Promise.all([missing, hitting]);
  return {
    round,
    hitsPerSecond: hits.reads / (hits.elapsedNs / 1e9),
    p50Us: hits.latencyNs.p50 / 1000,
    p99Us: hits.latencyNs.p99 / 1000,
    maxUs: hits.latencyNs.max / 1000,
    missesPerSecond: misses.reads / (misses.elapsedNs / 1e9),
  };
}
