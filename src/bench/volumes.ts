/**
 * Two volumes of one `blockferry host`, loaded one alone and both at once: whether a volume has to wait for the other. Beside it two
 * processes of nbdkit, which share nothing.
 */

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { stringify } from 'yaml';
import { BlockferryError } from '../errors.js';
import { ControlClient } from '../host/control/client.js';
import { packageRoot } from '../native/index.js';
import type { CompareOptions, Tell } from './compare.js';
import { makeImage, withImageFolder } from './images.js';
import { runLoad } from './load.js';
import { Program, type RunningServer } from './program.js';
import type { VolumesResult } from './report.js';
import { nbdkit } from './servers.js';

export const VOLUMES_OURS = 'blockferry host';
export const VOLUMES_PEER = 'nbdkit, two processes';

const VOLUMES = ['first', 'second'];
const DEPTH = 16;
const OPEN_TIMEOUT_MS = 10_000;
const POLL_MS = 20;

type VolumesSample = VolumesResult['samples'][string][number];

interface Pair {
  name: string;
  uris: string[];
  stop(): Promise<void>;
}

export function measureVolumes(
  { rounds, durationMs, warmupMs, imageBytes }: Omit<CompareOptions, 'cells' | 'servers' | 'tool'>,
  tell: Tell,
): Promise<VolumesResult> {
  return withImageFolder('tmpfs', undefined, imageBytes * VOLUMES.length * 2, async (folder) => {
    tell('two volumes: making images and starting servers');
    const pairs: Pair[] = [];
    try {
      pairs.push(await hostPair(await imagesIn(join(folder, 'a'), imageBytes), join(folder, 'a')));
      if (nbdkit.version() !== null)
        pairs.push(await nbdkitPair(await imagesIn(join(folder, 'b'), imageBytes), join(folder, 'b')));
      const samples = Object.fromEntries(pairs.map(({ name }): [string, VolumesSample[]] => [name, []]));
      const times = { durationMs, warmupMs };
      // A process that was never loaded is not what the first rate is about.
      for (const { uris } of pairs) await rateOf(uris, times);
      for (let round = 0; round < rounds; round++) {
        tell(`round ${round + 1} of ${rounds}: one volume and two`);
        for (let turn = 0; turn < pairs.length; turn++) {
          const { name, uris } = pairs[(turn + round) % pairs.length];
          const bothFirst = round % 2 === 1;
          const early = await rateOf(bothFirst ? uris : uris.slice(0, 1), times);
          const late = await rateOf(bothFirst ? uris.slice(0, 1) : uris, times);
          const [onePerSecond, bothPerSecond] = bothFirst ? [late, early] : [early, late];
          samples[name].push({ round, onePerSecond, bothPerSecond });
        }
      }
      return { measuredAt: new Date().toISOString(), seconds: durationMs / 1000, samples };
    } finally {
      for (const pair of pairs.reverse()) await pair.stop();
    }
  });
}

async function rateOf(
  uris: readonly string[],
  times: { durationMs: number; warmupMs: number },
): Promise<number> {
  const results = await Promise.all(uris.map((uri) => runLoad(uri, { depth: DEPTH, ...times })));
  return results.reduce((sum, { reads, elapsedNs }) => sum + reads / (elapsedNs / 1e9), 0);
}

async function imagesIn(folder: string, bytes: number): Promise<string[]> {
  mkdirSync(folder);
  const images = VOLUMES.map((name) => join(folder, `${name}.img`));
  for (const image of images) await makeImage(image, bytes);
  return images;
}

async function hostPair(images: readonly string[], folder: string): Promise<Pair> {
  const config = join(folder, 'host.yaml');
  const control = join(folder, 'c.sock');
  const volumes = VOLUMES.map((name, index) => ({ name, image: images[index] }));
  const [stateDir, run] = [join(folder, 'state'), join(folder, 'run')];
  writeFileSync(config, stringify({ name: 'bench', control, stateDir, run, images: folder, volumes }));
  const command = join(packageRoot(), 'bin/blockferry');
  const program = new Program([process.execPath, command, 'host', '--config', config, '--log-level', 'warn']);
  await program.listens({ kind: 'unix', path: control });
  const client = new ControlClient(control);
  try {
    const uris = await urisOf(client);
    return { name: VOLUMES_OURS, uris, stop: () => program.stop() };
  } catch (error) {
    await program.stop();
    throw error;
  } finally {
    client.close();
  }
}

/** The daemon answers before its volumes are open. */
async function urisOf(client: ControlClient): Promise<string[]> {
  const deadline = performance.now() + OPEN_TIMEOUT_MS;
  while (performance.now() < deadline) {
    const { volumes } = await client.status();
    const uris = volumes.map((volume) => {
      if (volume.phase === 'unavailable') throw new BlockferryError('bench', volume.error);
      return volume.uri[0];
    });
    if (uris.length === VOLUMES.length) return uris;
    await delay(POLL_MS);
  }
  throw new BlockferryError('bench', 'the host did not open its volumes');
}

async function nbdkitPair(images: readonly string[], folder: string): Promise<Pair> {
  const servers: RunningServer[] = [];
  const stop = async (): Promise<void> => {
    for (const server of servers) await server.stop();
  };
  try {
    for (const [index, image] of images.entries()) {
      const own = join(folder, VOLUMES[index]);
      mkdirSync(own);
      servers.push(await nbdkit.start({ folder: own, image, original: image, transport: 'unix' }));
    }
  } catch (error) {
    await stop();
    throw error;
  }
  return { name: VOLUMES_PEER, uris: servers.map(({ uri }) => uri), stop };
}
