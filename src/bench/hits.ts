/**
 * Hits beside misses: one client reads at depth 1 what is local, another one at depth 16 what is still at a slow source. A proxy that
 * queues hits behind misses shows the source's delay in the hits' latency. Ours beside nbdkit's cow filter, with cow-on-read.
 */

import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import type { NbdAddress } from '../nbd/uri.js';
import type { CompareOptions, Tell } from './compare.js';
import { IMAGE_UNIT_BYTES, makeImage, withImageFolder } from './images.js';
import { runLoad } from './load.js';
import { addressIn, ourLine, ourWords, type Place, type RunningServer, running } from './program.js';
import type { HitsResult } from './report.js';
import { nbdkit } from './servers.js';

export const HITS_DELAY_MS = 20;
const HIT_BYTES = 32 << 20;
const MISS_DEPTH = 16;
/** One block is read of each of these: nbdkit's filter fetches 64 KiB for it, and what it fetched would be hits. */
const MISS_STRIDE_BYTES = 64 << 10;
/** Over what comes at depth / delay: a proxy that reads ahead has no use for it, but may be a little faster. */
const MISS_MARGIN = 1.25;
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
  const missBytes = missBytesIn(durationMs);
  const bytes = HIT_BYTES + rounds * missBytes;
  return withImageFolder('cache', disk, bytes * 2, async (folder) => {
    const started: RunningServer[] = [];
    try {
      return await hitsIn(folder, { rounds, durationMs, bytes, missBytes }, started, leftOut, tell);
    } finally {
      for (const server of started.reverse()) await server.stop();
    }
  });
}

interface HitsPlan {
  rounds: number;
  durationMs: number;
  /** Of the image. */
  bytes: number;
  missBytes: number;
}

async function hitsIn(
  folder: string,
  { rounds, durationMs, bytes, missBytes }: HitsPlan,
  started: RunningServer[],
  leftOut: string[],
  tell: Tell,
): Promise<HitsResult | null> {
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
      samples[name].push(await measure(server.uri, round, durationMs, missBytes));
    }
  }
  return {
    measuredAt: new Date().toISOString(),
    seconds: durationMs / 1000,
    delayMs: HITS_DELAY_MS,
    samples,
  };
}

/** Of the part of the image that is missed in one round: in each it is another one, so that nothing is read twice. A multiple of 4 MiB. */
function missBytesIn(durationMs: number): number {
  const blocks = ((WARMUP_MS + durationMs + MARGIN_MS) / HITS_DELAY_MS) * MISS_DEPTH * MISS_MARGIN;
  return Math.ceil((blocks * MISS_STRIDE_BYTES) / IMAGE_UNIT_BYTES) * IMAGE_UNIT_BYTES;
}

async function measure(
  uri: string,
  round: number,
  durationMs: number,
  missBytes: number,
): Promise<HitsSample> {
  const missing = runLoad(uri, {
    depth: MISS_DEPTH,
    order: 'shuffled',
    offset: HIT_BYTES + round * missBytes,
    length: missBytes,
    strideBytes: MISS_STRIDE_BYTES,
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

/** An image behind a delay of each read; null without nbdkit. */
async function delayedSource(folder: string, image: string, delayMs: number): Promise<RunningServer | null> {
  if (nbdkit.version() === null) return null;
  const address: NbdAddress = { kind: 'unix', path: join(folder, 'delayed.sock') };
  const words = ['nbdkit', '-f', '-U', address.path, '--filter=delay', 'file', image, `rdelay=${delayMs}ms`];
  return running(words, address, { folder, image, original: image, transport: 'unix' });
}

/** Our proxy, which fetches only what is read. */
async function proxyOverSource(folder: string, source: RunningServer): Promise<RunningServer> {
  const image = join(folder, 'disk.img');
  const place: Place = { folder, image, original: image, transport: 'unix' };
  const address = await addressIn(place);
  const words = ourWords(place, address, 'proxy', source.uri, image, '--no-background');
  return { ...(await running(words, address, place)), commandLine: ourLine(words, place) };
}

/** nbdkit's, whose overlay is a temporary file. */
async function cowOverSource(folder: string, source: RunningServer): Promise<RunningServer> {
  const place: Place = { folder, image: '', original: '', transport: 'unix' };
  const address: NbdAddress = { kind: 'unix', path: join(folder, 'nbd.sock') };
  const words = ['nbdkit', '-f', '-U', address.path, '--filter=cow', '-t', '64', 'nbd', source.uri];
  return running([...words, 'cow-on-read=true', 'shared=1'], address, place);
}
