/**
 * Pre-copy: `node dist/bench/pre-copy.js [--only CASE]... [--rounds N] [--save]`. Needs root, e2fsprogs and what `wanMissing` (test/lab/wan.ts)
 * names. Two `blockferry host` daemons in network namespaces of their own, joined by a line; volumes move by the coordinator's own steps, without a
 * machine. `--save` replaces the cases that ran in bench/results/pre-copy.json.
 *
 *     hot boot, hot build   a guest's reads over 10 ms from the switch on: `--switch hot`, linear post-copy, `--switch now`; 20 ms, 100 Mbit/s
 *     home                  bytes over the line when a volume returns after 1 % of it changed, by the changed blocks compressed by zstd's level 3
 *     takeover lan, wan     seal and takeover of 100 GiB with pre-copy, less those without: loopback; 20 ms, 1 Gbit/s
 */

import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { machineFactsHere } from '../src/bench/facts.js';
import { runLoad } from '../src/bench/load.js';
import { medianOf } from '../src/bench/statistics.js';
import { textTable } from '../src/bench/table.js';
import { DEFAULT_TIMING, perform, type StepContext } from '../src/migration/perform.js';
import { type MovePlan, PRE_COPY_MS_MAX, type Switch } from '../src/migration/plan.js';
import { Rounds } from '../src/migration/rounds.js';
import type { StepName, VolumeFacts } from '../src/migration/steps.js';
import { packageRoot } from '../src/native/index.js';
import { NbdClient } from '../src/nbd/client/client.js';
import { DaemonProcess, LabHost } from '../test/lab/hosts.js';
import { WanLab, wanMissing } from '../test/lab/wan.js';
import { compressedBytes, fileSystem, filesIn } from './file-system.js';
import { type Access, bootTrace, buildTrace, type FileBlocks, type Random, randomFrom } from './traces.js';

const MEMORY = '/dev/shm';
const MIB = 1 << 20;
const GIB = 1 << 30;
const BLOCK_BYTES = 4096;
const VOLUME = 'disk';
const WAN = { rttMs: 20, rateBitsPerSecond: 100e6, queueMs: 100 };
/** For what is not measured. */
const FAST = 1e9;
const SLOW_MS = 10;
const POLL_MS = 20;
const WAIT_MS = 120_000;
const RESULTS = join(packageRoot(), 'bench/results/pre-copy.json');

const { values } = parseArgs({
  options: {
    only: { type: 'string', multiple: true, default: [] },
    rounds: { type: 'string', default: '3' },
    save: { type: 'boolean', default: false },
  },
});
const rounds = Number(values.rounds);

type Samples = Record<string, number[]>;

function add(samples: Samples, name: string, value: number): void {
  samples[name] ??= [];
  samples[name].push(value);
}

/** Two hosts, and the volume on the first. */
class Pair {
  private constructor(
    readonly folder: string,
    readonly a: LabHost,
    readonly b: LabHost,
  ) {}

  /** State and images that arrive are below `folder`; without a lab the hosts meet on loopback. */
  static async with<T>(
    lab: WanLab | null,
    parent: string,
    image: string,
    use: (pair: Pair) => Promise<T>,
  ): Promise<T> {
    const folder = mkdtempSync(join(parent, 'bf-pre-copy-'));
    const hosts: LabHost[] = [];
    try {
      for (const [name, network, volumes] of [
        ['a', lab?.a, [{ name: VOLUME, image }]],
        ['b', lab?.b, []],
      ] as const) {
        const place = network === undefined ? { more: { link: '127.0.0.1:0' } } : { network };
        hosts.push(await LabHost.start({ folder, name, volumes: [...volumes], ...place }));
      }
      return await use(new Pair(folder, hosts[0]!, hosts[1]!));
    } finally {
      for (const host of hosts.reverse()) await host.stop();
      rmSync(folder, { recursive: true, force: true });
    }
  }
}

/** A move of the volume by the coordinator's steps. */
class Move {
  private constructor(
    readonly from: LabHost,
    readonly to: LabHost,
    private readonly context: StepContext,
  ) {}

  static async plan(from: LabHost, to: LabHost, when: Switch): Promise<Move> {
    const volume = await from.client.volume(VOLUME);
    if (volume.phase === 'unavailable' || volume.linkUri === null) throw new Error('the volume cannot move');
    const home = (await to.client.volume(VOLUME).catch(() => null))?.home ?? null;
    const { id: volumeId, size, generation, linkUri: sourceUri } = volume;
    const since = home !== null && home === volume.tracking?.since ? home : null;
    const plan: MovePlan = {
      ...{ id: `move-${from.name}-${generation}`, vm: VOLUME, from: from.control, to: to.control },
      ...{ switch: when, preCopyMsMax: PRE_COPY_MS_MAX, compression: null, bandwidthBytesPerSecond: null },
      ...{ deleteSourceImages: false, createdAt: new Date().toISOString() },
      definition: { name: VOLUME, disks: [] } as unknown as MovePlan['definition'],
      volumes: [
        { name: VOLUME, volumeId, size, generation, nextGeneration: generation + 1, sourceUri, since },
      ],
    };
    const facts: VolumeFacts = { source: 'plain', destination: 'absent', proof: null };
    return new Move(from, to, {
      ...{ plan, from: from.client, to: to.client, timing: { ...DEFAULT_TIMING, pollMs: POLL_MS } },
      ...{ signal: new AbortController().signal, incomingUri: undefined, progress: () => undefined },
      facts: {
        ...{ claimed: true, source: 'running', departed: false, destination: 'absent', arrived: false },
        ...{ copiedAhead: false, volumes: [facts] },
      },
    });
  }

  /** Milliseconds it took. */
  async step(...names: StepName[]): Promise<number> {
    const began = performance.now();
    for (const name of names) await perform(name, this.context);
    return performance.now() - began;
  }

  async refresh(): Promise<void> {
    await new Rounds(this.context).refresh();
  }

  /** All is at the destination that is to come before the takeover. */
  async caughtUp(): Promise<void> {
    for (const deadline = performance.now() + WAIT_MS; performance.now() < deadline; await delay(POLL_MS)) {
      const view = await this.to.client.volume(VOLUME);
      if (view.phase !== 'unavailable' && view.preCopy?.caughtUp === true) return;
    }
    throw new Error('the standby does not catch up');
  }

  /** The guest runs at the destination, and what is left comes there. */
  async finish(): Promise<void> {
    const guest = await NbdClient.connect(await guestUri(this.to));
    const block = await guest.read(0, BLOCK_BYTES);
    await guest.write(0, block);
    await guest.close();
    await this.step('wait-handoff', 'retire');
  }
}

async function guestUri({ client }: LabHost): Promise<string> {
  const view = await client.volume(VOLUME);
  if (view.phase === 'unavailable') throw new Error(view.error);
  return view.uri[0]!;
}

// hot

/** Reads' milliseconds. */
async function play(uri: string, trace: readonly Access[]): Promise<number[]> {
  const guest = await NbdClient.connect(uri);
  const buffer = Buffer.alloc(MIB, 'object code ');
  const reads: number[] = [];
  for (const { kind, offset, length, thinkMs } of trace) {
    if (thinkMs > 0) await delay(thinkMs);
    const began = performance.now();
    if (kind === 'write') await guest.write(offset, buffer, 0, length);
    else {
      await guest.read(offset, length, buffer);
      reads.push(performance.now() - began);
    }
  }
  await guest.close();
  return reads;
}

function report(samples: Samples, mode: string, reads: number[]): void {
  reads.sort((x, y) => x - y);
  const at = (share: number): number => reads[Math.min(reads.length - 1, Math.floor(share * reads.length))]!;
  add(samples, `${mode}: reads over ${SLOW_MS} ms`, reads.filter((ms) => ms > SLOW_MS).length);
  for (const [name, share] of Object.entries({ p50: 0.5, p99: 0.99, max: 1 }))
    add(samples, `${mode}: ${name} ms`, at(share));
}

/** A system of programs, libraries and headers, half of the image. */
function system(path: string, folder: string): Record<'programs' | 'headers' | 'objects', FileBlocks[]> {
  const objects = join(folder, 'objects');
  mkdirSync(objects);
  for (let i = 0; i < 150; i++) writeFileSync(join(objects, `${i}.o`), Buffer.alloc(64 << 10, `object ${i}`));
  fileSystem(path, GIB, folder, [
    { from: '/usr/bin', to: 'bin', bytesMax: 150 * MIB },
    { from: '/usr/include', to: 'include', bytesMax: 100 * MIB, deep: true },
    { from: '/usr/lib/x86_64-linux-gnu', to: 'lib', bytesMax: 252 * MIB },
    { from: objects, to: 'objects', bytesMax: 10 * MIB },
  ]);
  const of = (name: string): FileBlocks[] => [...filesIn(path, folder, name).values()];
  return { programs: [...of('bin'), ...of('lib')], headers: of('include'), objects: of('objects') };
}

async function hot(work: 'boot' | 'build'): Promise<Samples> {
  const samples: Samples = {};
  const folder = mkdtempSync(join(MEMORY, 'bf-pre-copy-'));
  const lab = await WanLab.create(WAN);
  try {
    const original = join(folder, 'original.img');
    const { programs, headers, objects } = system(original, folder);
    const trace = (seed: number): Access[] =>
      work === 'boot' ? bootTrace(programs, seed) : buildTrace(headers, objects, seed);
    const reads = trace(2).filter(({ kind }) => kind === 'read');
    add(samples, 'reads of a run', reads.length);
    add(samples, 'MiB that a run reads', reads.reduce((sum, { length }) => sum + length, 0) / MIB);
    for (let round = 0; round < rounds; round++) {
      for (const mode of ['hot', 'linear', 'now'] as const) {
        console.error(`round ${round + 1} of ${rounds}: ${work}, ${mode}`);
        const image = join(folder, 'source.img');
        copyFileSync(original, image);
        await Pair.with(lab, MEMORY, image, async ({ a, b, folder: place }) => {
          await play(await guestUri(a), trace(2 + 2 * round));
          const move = await Move.plan(a, b, mode === 'linear' ? 'now' : mode);
          const again = trace(3 + 2 * round);
          if (mode === 'linear') {
            const view = await a.client.volume(VOLUME);
            if (view.phase === 'unavailable') throw new Error(view.error);
            const [socket, disk] = [join(place, 'p.sock'), join(place, 'p.img')];
            const state = ['--name', VOLUME, '--state-dir', join(place, 'p')];
            const words = ['proxy', view.linkUri!, disk, '--listen', `unix:${socket}`, '--order', 'linear'];
            const proxy = await DaemonProcess.start([...words, ...state], lab.b);
            report(samples, mode, await play(`nbd+unix:///${VOLUME}?socket=${socket}`, again));
            await proxy.stop();
            return;
          }
          await move.step('create-volumes');
          if (mode === 'hot') {
            add(samples, 'hot: seconds before the switch', (await move.step('pre-copy')) / 1000);
            const view = await b.client.volume(VOLUME);
            if (view.phase === 'unavailable') throw new Error(view.error);
            add(samples, 'hot: MiB copied before the switch', view.traffic.backgroundBytes / MIB);
          }
          await move.step('seal', 'takeover');
          report(samples, mode, await play(await guestUri(b), again));
        });
      }
    }
  } finally {
    await lab.close();
    rmSync(folder, { recursive: true, force: true });
  }
  return samples;
}

// home

async function home(runBlocks: number): Promise<Samples> {
  const samples: Samples = {};
  const size = 512 * MIB;
  const folder = mkdtempSync(join(MEMORY, 'bf-pre-copy-'));
  const lab = await WanLab.create(WAN);
  const over = async (): Promise<[number, number]> => {
    const { aToB, bToA } = await lab.stats();
    return [bToA.delivered.bytes, aToB.delivered.bytes];
  };
  try {
    const original = join(folder, 'original.img');
    fileSystem(original, size, folder);
    const content = readFileSync(original);
    const full = [...Array(size / BLOCK_BYTES).keys()].filter(
      (block) => content.readBigUInt64LE(block * BLOCK_BYTES + 2048) !== 0n,
    );
    for (let round = 0; round < rounds; round++) {
      console.error(`round ${round + 1} of ${rounds}: home, runs of ${runBlocks} blocks`);
      const image = join(folder, 'source.img');
      copyFileSync(original, image);
      await Pair.with(lab, MEMORY, image, async ({ a, b }) => {
        await lab.set({ rateBitsPerSecond: FAST });
        const there = await Move.plan(a, b, 'now');
        await there.step('create-volumes', 'seal', 'takeover');
        await there.finish();
        await lab.set(WAN);
        const changed = await changeOnePercent(
          await guestUri(b),
          content,
          full,
          randomFrom(round + 1),
          runBlocks,
        );
        const back = await Move.plan(b, a, 'all');
        const before = await over();
        await back.step('create-volumes', 'pre-copy', 'seal', 'takeover');
        await back.finish();
        const [forth, requests] = (await over()).map((bytes, way) => bytes - before[way]!);
        const copy = readFileSync(await a.imageOf(VOLUME));
        if (!copy.equals(readFileSync(join(b.folder, 'images', `${VOLUME}.img`))))
          throw new Error('the copy differs');
        const least = compressedBytes(changed);
        add(samples, 'changed blocks, compressed, bytes', least);
        add(samples, 'to it, bytes', forth!);
        add(samples, 'requests, bytes', requests!);
        add(samples, 'both ways by the compressed bytes', (forth! + requests!) / least);
      });
    }
  } finally {
    await lab.close();
    rmSync(folder, { recursive: true, force: true });
  }
  return samples;
}

/** Runs of blocks anywhere get the content of other files; answers what was written, by its place. */
async function changeOnePercent(
  uri: string,
  content: Buffer,
  full: readonly number[],
  random: Random,
  runBlocks: number,
): Promise<Buffer> {
  const guest = await NbdClient.connect(uri);
  const written = new Map<number, Buffer>();
  const runBytes = runBlocks * BLOCK_BYTES;
  while (written.size * BLOCK_BYTES < content.length / 100) {
    const to = random(content.length / runBytes) * runBytes;
    const from = Math.min(full[random(full.length)]! * BLOCK_BYTES, content.length - runBytes);
    await guest.write(to, content, from, runBytes);
    for (let at = 0; at < runBytes; at += BLOCK_BYTES)
      written.set(to + at, content.subarray(from + at, from + at + BLOCK_BYTES));
  }
  await guest.flush();
  await guest.close();
  return Buffer.concat([...written.keys()].sort((x, y) => x - y).map((at) => written.get(at)!));
}

// takeover

/** Percent of the blocks, at random. A coordinator begins a round each second while the memory is on its way: so long is the last one. */
const CHANGES = [
  { before: 0, left: 2 },
  { before: 2, left: 0.1 },
] as const;

async function takeover(far: boolean): Promise<Samples> {
  const samples: Samples = {};
  const size = 100 * GIB;
  const lab = far ? await WanLab.create({ rttMs: 20, rateBitsPerSecond: 1e9 }) : null;
  const image = join(mkdtempSync(join(MEMORY, 'bf-pre-copy-')), 'source.img');
  try {
    for (let round = 0; round < rounds; round++) {
      for (const { before, left } of CHANGES) {
        const name = `${before} % in rounds before, ${left} % in the last`;
        const ms: number[] = [];
        for (const when of ['now', 'all'] as const) {
          console.error(`round ${round + 1} of ${rounds}: takeover, ${name}, ${when}`);
          writeFileSync(image, '');
          truncateSync(image, size);
          await Pair.with(lab, tmpdir(), image, async ({ a, b }) => {
            const change = async (percent: number): Promise<void> => {
              const count = Math.round(((size / BLOCK_BYTES) * percent) / 100);
              if (count === 0) return;
              await runLoad(await guestUri(a), {
                order: 'random',
                readPercent: 0,
                depth: 64,
                count,
                durationMs: 0,
              });
            };
            const move = await Move.plan(a, b, when);
            await move.step('create-volumes');
            if (when === 'all') await move.caughtUp();
            await change(before);
            if (when === 'all') await move.refresh();
            await change(left);
            const sealMs = await move.step('seal');
            const takeoverMs = await move.step('takeover');
            add(samples, `${name}, ${when}: seal ms`, sealMs);
            add(samples, `${name}, ${when}: takeover ms`, takeoverMs);
            ms.push(sealMs + takeoverMs);
          });
          rmSync(image);
        }
        add(samples, `${name}: ms that pre-copy adds`, ms[1]! - ms[0]!);
      }
    }
  } finally {
    await lab?.close();
    rmSync(join(image, '..'), { recursive: true, force: true });
  }
  return samples;
}

const CASES: Record<string, () => Promise<Samples>> = {
  'hot boot': () => hot('boot'),
  'hot build': () => hot('build'),
  'home, runs of 16 blocks': () => home(16),
  'home, single blocks': () => home(1),
  'takeover lan': () => takeover(false),
  'takeover wan': () => takeover(true),
};

async function main(): Promise<void> {
  const missing = await wanMissing();
  if (missing !== null) throw new Error(missing);
  for (const [name, run] of Object.entries(CASES)) {
    if (values.only.length > 0 && !values.only.some((part) => name.includes(part))) continue;
    const samples = await run();
    const rows = Object.entries(samples).map(([what, all]) => [
      what,
      medianOf(all).toFixed(2),
      `${Math.min(...all).toFixed(2)} to ${Math.max(...all).toFixed(2)}`,
    ]);
    console.log(`${textTable([[name, 'median', 'of'], ...rows])}\n`);
    if (values.save) save(name, samples);
  }
}

function save(name: string, samples: Samples): void {
  let results: Record<string, unknown> = {};
  try {
    results = JSON.parse(readFileSync(RESULTS, 'utf8'));
  } catch {
    // the first
  }
  results[name] = { measuredAt: new Date().toISOString(), machine: machineFactsHere(), rounds, samples };
  writeFileSync(RESULTS, `${JSON.stringify(results, null, 1)}\n`);
}

await main();
