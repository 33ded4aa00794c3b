/**
 * A proxy over a WAN, beside what else keeps what it reads: `node dist/bench/wan.js [--only CASE]... [--rounds N] [--seconds S] [--save]`. Needs root
 * and what `wanMissing` (test/lab/wan.ts) names. Source and proxy are in network namespaces of their own, joined by a line with a
 * set round trip and rate; the load reaches the proxy by a unix socket. The source is nbdkit's for all.
 *
 *     sequential    cold reads of 256 KiB in order, at depth 8 and 1: 20 ms, 1 Gbit/s
 *     random        cold reads of 4 KiB at depth 32 while all blocks are copied: 20 ms, 1 Gbit/s
 *     demand        4 KiB reads at depth 1 that have to wait, while the copy fills a line of 40 ms, 100 Mbit/s; and that copy alone
 *     relocate      a file system of this machine's programs, half full, from `blockferry serve`: 20 ms, 100 Mbit/s; beside what its blocks
 *                   that are not zero take there, compressed in pieces of 1 MiB by zstd's level 3
 *     seeded        the same, cloned from a template that is at the destination as well, and changed by 3 %: with `--seed` and without
 *     copy          a whole image without a line, beside nbdcopy
 */

import { type ChildProcess, execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import {
  copyFileSync,
  cpSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { parseArgs } from 'node:util';
import { machineFactsHere } from '../src/bench/facts.js';
import { makeImage } from '../src/bench/images.js';
import { runLoad } from '../src/bench/load.js';
import { ourWords, Program } from '../src/bench/program.js';
import { medianOf } from '../src/bench/statistics.js';
import { textTable } from '../src/bench/table.js';
import type { ServedVolume, VolumeView } from '../src/host/control/api.js';
import { ControlClient } from '../src/host/control/client.js';
import { controlSocketPath } from '../src/host/state-dir.js';
import { packageRoot } from '../src/native/index.js';
import { words as inside, type WanHost, WanLab, wanMissing } from '../test/lab/wan.js';
import { compressedBytes, fileSystem } from './file-system.js';

const MEMORY = '/dev/shm';
const MIB = 1 << 20;
const PORT = 10809;
const START_TIMEOUT_MS = 10_000;
const POLL_MS = 20;
const HANDOFF_TIMEOUT_MS = 60_000;

const { values } = parseArgs({
  options: {
    only: { type: 'string', multiple: true, default: [] },
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '8' },
    save: { type: 'boolean', default: false },
  },
});
const rounds = Number(values.rounds);
const durationMs = Number(values.seconds) * 1000;

interface Place {
  folder: string;
  /** Where it runs; null: beside us. */
  host: WanHost | null;
  /** NBD URI of the source, as seen from there. */
  source: string;
  bytes: number;
}

interface Proxy {
  uri: string;
  /** Where its control socket is; null: it has none. */
  control: string | null;
  stop(): Promise<void>;
}

const at = (host: WanHost | null, words: readonly string[]): string[] =>
  host === null ? [...words] : inside(host, words);

/** Starts a server at a unix socket. */
async function started(place: Place, words: readonly string[], socket: string): Promise<Program> {
  const program = new Program(at(place.host, words));
  await program.listens({ kind: 'unix', path: socket });
  return program;
}

const OURS = 'blockferry proxy';

const PROXIES: { name: string; start(place: Place, copies: boolean, more?: string[]): Promise<Proxy> }[] = [
  {
    name: OURS,
    async start(place, copies, options = []) {
      const { folder } = place;
      const socket = join(folder, 'p.sock');
      const image = join(folder, 'disk.img');
      const spot = { folder, image, original: image, transport: 'unix' as const };
      const more = [...options, ...(copies ? [] : ['--no-background'])];
      const words = ourWords(spot, { kind: 'unix', path: socket }, 'proxy', place.source, image, ...more);
      const program = await started(place, words, socket);
      return {
        uri: `nbd+unix:///disk?socket=${socket}`,
        control: controlSocketPath(join(folder, 'state'), 'disk'),
        stop: () => program.stop(),
      };
    },
  },
  {
    name: 'nbdkit cow-on-read',
    async start(place) {
      const socket = join(place.folder, 'p.sock');
      const words = ['nbdkit', '-f', '-U', socket, '--filter=cow', '-t', '64', 'nbd', place.source];
      const program = await started(place, [...words, 'cow-on-read=true', 'shared=1'], socket);
      return { uri: `nbd+unix:///?socket=${socket}`, control: null, stop: () => program.stop() };
    },
  },
  {
    name: 'QEMU copy-on-read',
    async start(place) {
      const { folder, source } = place;
      const socket = join(folder, 'p.sock');
      const overlay = join(folder, 'overlay.qcow2');
      execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', overlay, String(place.bytes)]);
      const { hostname, port, searchParams } = new URL(source);
      const path = searchParams.get('socket');
      const server =
        path === null
          ? `server.type=inet,server.host=${hostname},server.port=${port}`
          : `server.type=unix,server.path=${path}`;
      const words = [
        'qemu-storage-daemon',
        ...['--blockdev', `driver=nbd,node-name=src,${server},read-only=on`],
        ...['--blockdev', `driver=file,node-name=f0,filename=${overlay},discard=unmap`],
        ...['--blockdev', 'driver=qcow2,node-name=ov,file=f0,backing=src'],
        ...['--blockdev', 'driver=copy-on-read,node-name=cor,file=ov'],
        ...['--nbd-server', `addr.type=unix,addr.path=${socket},max-connections=0`],
        ...['--export', 'type=nbd,id=e0,node-name=cor,name=,writable=on'],
      ];
      const program = await started(place, words, socket);
      return { uri: `nbd+unix:///?socket=${socket}`, control: null, stop: () => program.stop() };
    },
  },
];

/** Waits until an export can be opened from there. */
async function reachable(host: WanHost | null, uri: string): Promise<void> {
  const deadline = performance.now() + START_TIMEOUT_MS;
  for (;;) {
    const words = at(host, ['nbdinfo', '--size', uri]);
    const child = spawn(words[0]!, words.slice(1), { stdio: 'ignore' });
    const [code] = (await once(child, 'close')) as [number];
    if (code === 0) return;
    if (performance.now() > deadline) throw new Error('the source does not start');
    await delay(POLL_MS);
  }
}

/** nbdkit, anew for each proxy: some versions do not survive a client that is killed. */
async function withSource<T>(
  host: WanHost | null,
  image: string,
  folder: string,
  use: (uri: string) => Promise<T>,
): Promise<T> {
  const socket = join(folder, 'source.sock');
  const where = host === null ? ['-U', socket] : ['-i', host.address, '-p', String(PORT)];
  const program = new Program(at(host, ['nbdkit', '-f', '-t', '64', ...where, 'file', image]));
  const uri = host === null ? `nbd+unix:///?socket=${socket}` : `nbd://${host.address}:${PORT}/`;
  try {
    await reachable(host, uri);
    return await use(uri);
  } finally {
    await program.stop();
  }
}

interface Bench {
  folder: string;
  image: string;
  bytes: number;
}

let turns = 0;

/** Starts a proxy over its own source, and stops both. */
async function withProxy<T>(
  bench: Bench,
  lab: WanLab | null,
  proxy: (typeof PROXIES)[number],
  copies: boolean,
  use: (running: Proxy) => Promise<T>,
): Promise<T> {
  const folder = join(bench.folder, String(turns++));
  mkdirSync(folder);
  try {
    return await withSource(lab?.a ?? null, bench.image, folder, async (source) => {
      const running = await proxy.start({ folder, host: lab?.b ?? null, source, bytes: bench.bytes }, copies);
      try {
        return await use(running);
      } finally {
        await running.stop();
      }
    });
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

type Samples = Record<string, number[]>;

function add(samples: Samples, name: string, value: number): void {
  samples[name] ??= [];
  samples[name].push(value);
}

const tell = (text: string): void => console.error(text);

async function sequential(bench: Bench, depth: number): Promise<Samples> {
  const samples: Samples = {};
  const rate = 1e9;
  const lab = await WanLab.create({ rttMs: 20, rateBitsPerSecond: rate });
  try {
    for (let round = 0; round < rounds; round++) {
      for (const proxy of rotated(PROXIES, round)) {
        tell(`round ${round + 1} of ${rounds}: sequential, depth ${depth}: ${proxy.name}`);
        const mib = await withProxy(bench, lab, proxy, false, async ({ uri }) => {
          const { reads, elapsedNs } = await runLoad(uri, {
            ...{ blockBytes: 256 << 10, depth, order: 'sequential', lap: true, durationMs },
          });
          return (reads * 256) / 1024 / (elapsedNs / 1e9);
        });
        add(samples, `${proxy.name}, MiB/s`, mib);
        add(samples, `${proxy.name}, % of the line`, (mib * MIB * 8 * 100) / rate);
      }
    }
  } finally {
    await lab.close();
  }
  return samples;
}

async function random(bench: Bench): Promise<Samples> {
  const samples: Samples = {};
  const lab = await WanLab.create({ rttMs: 20, rateBitsPerSecond: 1e9 });
  try {
    for (let round = 0; round < rounds; round++) {
      for (const proxy of rotated(PROXIES, round)) {
        tell(`round ${round + 1} of ${rounds}: random: ${proxy.name}`);
        const result = await withProxy(bench, lab, proxy, true, ({ uri }) =>
          runLoad(uri, { depth: 32, durationMs }),
        );
        add(samples, `${proxy.name}, reads/s`, result.reads / (result.elapsedNs / 1e9));
        add(samples, `${proxy.name}, p99 ms`, result.latencyNs.p99 / 1e6);
      }
    }
  } finally {
    await lab.close();
  }
  return samples;
}

async function demand(bench: Bench): Promise<Samples> {
  const samples: Samples = {};
  const [rttMs, rate] = [40, 100e6];
  const lab = await WanLab.create({ rttMs, rateBitsPerSecond: rate, queueMs: 200 });
  const share = (bytes: number, ms: number): number => (bytes * 8 * 100) / (rate * (ms / 1000));
  try {
    for (let round = 0; round < rounds; round++) {
      tell(`round ${round + 1} of ${rounds}: demand`);
      await withProxy(bench, lab, PROXIES[0]!, true, async ({ uri }) => {
        await delay(2_000);
        const idle = await bytesOver(lab, () => delay(durationMs));
        add(samples, 'idle guest: % of the line', share(idle.bytes, idle.ms));
        let p99 = 0;
        // Each block once, so that all of them have to wait but for those that the copy brought.
        const busy = await bytesOver(lab, async () => {
          const half = bench.bytes / 2;
          const load = {
            depth: 1,
            order: 'shuffled' as const,
            lap: true,
            durationMs,
            offset: half,
            length: half,
            strideBytes: 1 << 20,
          };
          p99 = (await runLoad(uri, load)).latencyNs.p99 / 1e6;
        });
        add(samples, 'busy guest: p99 ms', p99);
        add(samples, 'busy guest: % of the line', share(busy.bytes, busy.ms));
      });
    }
  } finally {
    await lab.close();
  }
  return samples;
}

async function bytesOver(lab: WanLab, work: () => Promise<unknown>): Promise<{ bytes: number; ms: number }> {
  const before = await lab.stats();
  await work();
  const after = await lab.stats();
  return {
    bytes: after.aToB.delivered.bytes - before.aToB.delivered.bytes,
    ms: (after.atNs - before.atNs) / 1e6,
  };
}

/** A whole image over the line, from `serve` to `proxy`; `ms`: from the start of the proxy's process to the hand-off. `prepare` is given the proxy's state folder before its start. */
async function relocated(
  bench: Bench,
  lab: WanLab,
  image: string,
  options: string[],
  prepare: (stateDir: string) => void = () => {},
  keep: (stateDir: string) => void = () => {},
): Promise<{ ms: number; bytes: number; traffic: ServedVolume['traffic'] }> {
  const folder = join(bench.folder, String(turns++));
  mkdirSync(folder);
  const at = { folder, image, original: image, transport: 'unix' as const };
  const address = { kind: 'tcp' as const, host: lab.a.address, port: PORT };
  const source = new Program(inside(lab.a, ourWords(at, address, 'serve', image, '--read-only')));
  const uri = `nbd://${lab.a.address}:${PORT}/disk`;
  await reachable(lab.b, uri);
  const place = { folder: join(folder, 'b'), host: lab.b, source: uri, bytes: lstatSync(image).size };
  const stateDir = join(place.folder, 'state');
  mkdirSync(place.folder);
  prepare(stateDir);
  let view: VolumeView | null = null;
  let ms = 0;
  const { bytes } = await bytesOver(lab, async () => {
    const began = performance.now();
    const proxy = await PROXIES[0]!.start(place, true, options);
    const client = new ControlClient(proxy.control!);
    const { done, volume } = await client.waitHandoff('disk', HANDOFF_TIMEOUT_MS);
    ms = performance.now() - began;
    client.close();
    if (!done) throw new Error('the proxy did not hand off');
    view = volume;
    await proxy.stop();
  });
  await source.stop();
  if (!readFileSync(image).equals(readFileSync(join(place.folder, 'disk.img'))))
    throw new Error('the copy differs');
  keep(stateDir);
  rmSync(folder, { recursive: true });
  return { ms, bytes, traffic: (view as unknown as ServedVolume).traffic };
}

/** A disk cloned from a template that is at the destination as well; since then files that are about 3 % of its data came to it. */
async function seeded(bench: Bench): Promise<Samples> {
  const samples: Samples = {};
  const template = join(bench.folder, 'template.img');
  const image = join(bench.folder, 'clone.img');
  fileSystem(template, 512 * MIB, bench.folder);
  copyFileSync(template, image);
  const file = join(bench.folder, 'file');
  for (let number = 0; number < 8; number++) {
    writeFileSync(file, randomBytes(MIB));
    execFileSync('debugfs', ['-w', '-R', `write ${file} new${number}`, image], { stdio: 'ignore' });
  }
  const indexes = join(bench.folder, 'indexes');
  const lab = await WanLab.create({ rttMs: 20, rateBitsPerSecond: 100e6, queueMs: 100 });
  const seed = ['--seed', template];
  try {
    for (let round = 0; round < rounds; round++) {
      for (const [name, options] of [
        ['no seed', []],
        ['seed, not indexed yet', seed],
        ['seed, indexed', seed],
      ] as const) {
        tell(`round ${round + 1} of ${rounds}: ${name}`);
        const fromIndexed = (stateDir: string): void => {
          if (name === 'seed, indexed') cpSync(indexes, join(stateDir, '.seeds'), { recursive: true });
        };
        const keep = (stateDir: string): void => {
          if (name === 'seed, not indexed yet')
            cpSync(join(stateDir, '.seeds'), indexes, { recursive: true });
        };
        const { ms, bytes, traffic } = await relocated(bench, lab, image, [...options], fromIndexed, keep);
        add(samples, `${name}: seconds, start and end of the proxy included`, ms / 1000);
        add(samples, `${name}: MiB over the line`, bytes / MIB);
        add(samples, `${name}: MiB of blocks from the source`, traffic.fromSourceBytes / MIB);
        add(samples, `${name}: MiB from the seed`, traffic.seedBytes / MIB);
      }
    }
  } finally {
    await lab.close();
  }
  return samples;
}

async function relocate(bench: Bench): Promise<Samples> {
  const samples: Samples = {};
  const rate = 100e6;
  const image = join(bench.folder, 'ext4.img');
  fileSystem(image, 512 * MIB, bench.folder);
  const leastMs = (compressedBytes(readFileSync(image)) * 8000) / rate;
  const lab = await WanLab.create({ rttMs: 20, rateBitsPerSecond: rate, queueMs: 100 });
  try {
    for (let round = 0; round < rounds; round++) {
      for (const compression of ['auto', '3', 'off']) {
        tell(`round ${round + 1} of ${rounds}: relocate, compression ${compression}`);
        const { ms } = await relocated(bench, lab, image, ['--compression', compression]);
        add(samples, `${compression}: seconds`, ms / 1000);
        add(samples, `${compression}: by the compressed bytes' time`, ms / leastMs);
      }
    }
  } finally {
    await lab.close();
  }
  return samples;
}

async function copy(bench: Bench): Promise<Samples> {
  const samples: Samples = {};
  const mibOf = (ms: number): number => bench.bytes / MIB / (ms / 1000);
  for (let round = 0; round < rounds; round++) {
    tell(`round ${round + 1} of ${rounds}: copy`);
    await withProxy(bench, null, PROXIES[0]!, true, async ({ control }) => {
      const client = new ControlClient(control!);
      const began = performance.now();
      const { done } = await client.waitHandoff('disk', HANDOFF_TIMEOUT_MS);
      if (!done) throw new Error('the proxy did not hand off');
      add(samples, `${OURS}, MiB/s`, mibOf(performance.now() - began));
      client.close();
    });
    const folder = join(bench.folder, String(turns++));
    mkdirSync(folder);
    await withSource(null, bench.image, folder, async (source) => {
      const began = performance.now();
      const child: ChildProcess = spawn('nbdcopy', [source, join(folder, 'copy.img')], { stdio: 'inherit' });
      await once(child, 'close');
      add(samples, 'nbdcopy, MiB/s', mibOf(performance.now() - began));
    });
    rmSync(folder, { recursive: true });
  }
  return samples;
}

function rotated<T>(list: readonly T[], by: number): T[] {
  return list.map((_, index) => list[(index + by) % list.length]!);
}

const CASES: Record<string, (bench: Bench) => Promise<Samples>> = {
  'sequential d8': (bench) => sequential(bench, 8),
  'sequential d1': (bench) => sequential(bench, 1),
  random,
  demand,
  relocate,
  seeded,
  copy,
};

async function main(): Promise<void> {
  const missing = await wanMissing();
  if (missing !== null) throw new Error(missing);
  const folder = mkdtempSync(join(MEMORY, 'bf-wan-'));
  const results: Record<string, Samples> = {};
  try {
    const bench = { folder, image: join(folder, 'original.img'), bytes: 1 << 30 };
    await makeImage(bench.image, bench.bytes);
    for (const [name, run] of Object.entries(CASES)) {
      if (values.only.length > 0 && !values.only.some((part) => name.includes(part))) continue;
      results[name] = await run(bench);
      const rows = Object.entries(results[name]).map(([what, all]) => [
        what,
        medianOf(all).toFixed(1),
        `${Math.min(...all).toFixed(1)} to ${Math.max(...all).toFixed(1)}`,
      ]);
      console.log(`${textTable([[name, 'median', 'of'], ...rows])}\n`);
    }
    if (values.save) {
      const report = {
        machine: machineFactsHere(),
        measuredAt: new Date().toISOString(),
        rounds,
        seconds: durationMs / 1000,
        results,
      };
      writeFileSync(join(packageRoot(), 'bench/results/wan.json'), `${JSON.stringify(report, null, 1)}\n`);
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

await main();
