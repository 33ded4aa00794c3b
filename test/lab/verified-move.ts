/**
 * One move from start to verdict: a guest works on host A's daemon, moves with its disk to host B's daemon while it goes on working, and
 * every record it ever wrote is verified. Fails on a single bad record. The hosts share this machine's network, or are those of a WAN lab.
 */

import { formatSize } from '../../src/cli/units.js';
import type { MoveResult } from '../../src/migration/result.js';
import { buildGuest } from './guest.js';
import { LabHost, runBlockferry } from './hosts.js';
import { GuestMonitor, type GuestVerdict } from './monitor.js';
import { checkRawDisk, createExt4Disk, createRawDisk } from './records.js';
import { guestMachine, labMissing, testFolder } from './vm.js';
import { WanLab, type WanOptions, wanMissing } from './wan.js';

export interface VerifiedMoveOptions {
  mode: 'raw' | 'ext4';
  diskBytes: number;
  slots: number;
  /** RAM the guest rewrites all the time, MiB, and at which rate; over a slow line it must not be as fast as that. */
  dirtyMiB: number;
  dirtyMiBPerSecond?: number;
  memoryMiB?: number;
  /** `--bandwidth` of the command, for memory and for the disk, each; null: none. */
  bandwidth: string | null;
  /** `--switch` of the command; absent: its default. */
  switch?: string | undefined;
  wan: WanOptions | null;
  /** How long the guest works before the move, and at the destination before and after the source is gone, in heartbeats of 10 ms. */
  workHeartbeats: number;
  /** The guest is watched at the destination for so long, from its first heartbeat there. */
  watchMs?: number;
  say(text: string): void;
  detail(text: string): void;
}

export interface VerifiedMove {
  move: MoveResult;
  gapMs: number;
  verdict: GuestVerdict;
  /** Null without a WAN lab. */
  wan: WanOutcome | null;
}

export interface WanOutcome {
  /** Over the line from A to B and back, IP packets with their headers, from the start of the command to its end. */
  bytes: { aToB: number; bToA: number };
  /** Records the guest wrote in a second before the move; at B, in the first 5 s, and from 10 s on. Null: not watched so long. */
  recordsPerSecond: { before: number | null; first5s: number | null; from10s: number | null };
}

interface Hosts {
  a: LabHost;
  b: LabHost;
  lab: WanLab | null;
  monitor: GuestMonitor;
}

function fail(why: string): never {
  throw new Error(why);
}

/** What was made goes by itself, in reverse order, whatever happened. */
export async function moveVerified(options: VerifiedMoveOptions): Promise<VerifiedMove> {
  const cleanUp: (() => Promise<unknown>)[] = [];
  try {
    return await run(options, cleanUp);
  } finally {
    for (const step of cleanUp.reverse()) await step().catch((error) => console.error(error));
  }
}

async function run(options: VerifiedMoveOptions, cleanUp: (() => Promise<unknown>)[]): Promise<VerifiedMove> {
  const { mode, slots, workHeartbeats, say, detail } = options;
  const hosts = await prepare(options, cleanUp);
  const { a, b, lab, monitor } = hosts;

  say('booting the guest on host A; it writes, syncs and reads back');
  await a.client.startMachine('vm1');
  await monitor.attach('a', await a.serialPath('vm1', AbortSignal.abort()));
  await monitor.ready();
  const readyAtMs = performance.now();
  await monitor.progress('a', { count: workHeartbeats, records: 100 });
  detail(`${monitor.last!.records} records written, ${monitor.last!.checked} read back and compared`);

  const startedAtMs = performance.now();
  const { move, bytes } = await migrate(hosts, options);
  await monitor.progress('b', { count: workHeartbeats, records: 100 });
  const arrivedAtMs = monitor.heartbeats.find((beat) => beat.host === 'b')!.atMs;
  while (monitor.last!.atMs < arrivedAtMs + (options.watchMs ?? 0)) await monitor.progress('b');
  const { before, first5s, from10s } = {
    before: recordRate(monitor, readyAtMs, startedAtMs),
    first5s: recordRate(monitor, arrivedAtMs, arrivedAtMs + 5_000),
    from10s: recordRate(monitor, arrivedAtMs + 10_000, monitor.last!.atMs),
  };

  say('stopping the source daemon: the guest does not need it any more');
  const code = await a.stop();
  if (code !== 0) fail(`the source daemon ended with code ${code}: ${a.daemon.stderr}`);
  if (lab !== null) {
    say('cutting the line between the hosts: nor does it need that');
    await lab.cut();
  }
  await monitor.progress('b', { count: workHeartbeats, records: 100 });
  const gapMs = monitor.longestGapMs();

  say('verifying every record on host B');
  const verdict = await monitor.finish('b');
  await b.client.stopMachine('vm1', { mode: 'quit' });
  if (mode === 'raw') {
    const check = await checkRawDisk(await b.imageOf('disk'), slots);
    if (check.bad > 0 || check.digest !== verdict.digest)
      fail(`the image on host B differs from what the guest wrote: ${JSON.stringify(check)}`);
  }
  if (monitor.complaints.length > 0)
    fail(`the guest complains: ${monitor.complaints.slice(0, 5).join(' | ')}`);
  const { bad, errors, ramErrors } = verdict;
  if (bad + errors + ramErrors > 0) fail(`${bad} bad records, ${errors} errors, ${ramErrors} RAM errors`);
  const wan = bytes === null ? null : { bytes, recordsPerSecond: { before, first5s, from10s } };
  return { move, gapMs, verdict, wan };
}

async function prepare(options: VerifiedMoveOptions, cleanUp: (() => Promise<unknown>)[]): Promise<Hosts> {
  const { mode, diskBytes, slots, dirtyMiB, dirtyMiBPerSecond, memoryMiB, say } = options;
  const missing = (await labMissing()) ?? (options.wan === null ? null : await wanMissing());
  if (missing !== null) fail(missing);
  say(
    'building the test guest (a kernel package, busybox and a workload that writes numbered, checksummed records)',
  );
  const guest = await buildGuest();
  const folder = await testFolder();
  cleanUp.push(folder.remove);
  let lab: WanLab | null = null;
  if (options.wan !== null) {
    const { rttMs, rateBitsPerSecond } = options.wan;
    say(`making a WAN: two network namespaces, ${rateBitsPerSecond / 1e6} Mbit/s and ${rttMs} ms round trip`);
    lab = await WanLab.create(options.wan);
    cleanUp.push(() => lab!.close());
  }

  say(`starting host A with a ${formatSize(diskBytes)} disk, and host B with nothing`);
  const image = `${folder.path}/disk.img`;
  if (mode === 'raw') await createRawDisk(image, diskBytes, slots);
  else await createExt4Disk(image, diskBytes, slots, 4);
  const workload = {
    mode,
    slots,
    rate: 500,
    dirty: dirtyMiB,
    ...(dirtyMiBPerSecond === undefined ? {} : { dirtyrate: dirtyMiBPerSecond }),
    ...(mode === 'ext4' ? { files: 4 } : {}),
  };
  const memory = memoryMiB === undefined ? {} : { memoryMiB };
  const vm = guestMachine({ name: 'vm1', guest, volume: 'disk', workload, ...memory });
  const a = await LabHost.start({
    folder: folder.path,
    name: 'a',
    ...(lab === null ? {} : { network: lab.a }),
    volumes: [{ name: 'disk', image }],
    vms: [vm],
  });
  cleanUp.push(() => a.stop());
  const b = await LabHost.start({
    folder: folder.path,
    name: 'b',
    ...(lab === null ? {} : { network: lab.b }),
  });
  cleanUp.push(() => b.stop());
  const monitor = new GuestMonitor();
  cleanUp.push(async () => monitor.close());
  return { a, b, lab, monitor };
}

async function migrate(
  { a, b, lab, monitor }: Hosts,
  { bandwidth, switch: when, say, detail }: VerifiedMoveOptions,
): Promise<{ move: MoveResult; bytes: WanOutcome['bytes'] | null }> {
  const over = new AbortController();
  const attached = b.serialPath('vm1', over.signal).then((path) => monitor.attach('b', path));
  attached.catch(() => undefined);
  const words = ['migrate', 'vm1', '--from', a.control, '--to', b.control];
  if (bandwidth !== null) words.push('--bandwidth', bandwidth);
  if (when !== undefined) words.push('--switch', when);
  say(`blockferry ${words.join(' ')}`);
  words.push('--state-dir', a.folder, '--json');
  const before = await lab?.stats();
  const { code, stdout, stderr } = await runBlockferry(words, { onLine: (line) => detail(`   ${line}`) });
  over.abort();
  if (code !== 0) fail(`migrate ended with code ${code}: ${stderr.trim().split('\n').at(-1)}`);
  await attached;
  const after = await lab?.stats();
  const way = (name: 'aToB' | 'bToA') => after![name].delivered.bytes - before![name].delivered.bytes;
  const bytes = after === undefined ? null : { aToB: way('aToB'), bToA: way('bToA') };
  return { move: JSON.parse(stdout) as MoveResult, bytes };
}

/** Records a second, by the heartbeats between two moments; null if there are not two. */
function recordRate(monitor: GuestMonitor, fromMs: number, toMs: number): number | null {
  const beats = monitor.heartbeats.filter(({ atMs }) => atMs >= fromMs && atMs <= toMs);
  const [first, last] = [beats[0], beats.at(-1)];
  if (first === undefined || last === undefined || first === last) return null;
  return ((last.records - first.records) * 1000) / (last.atMs - first.atMs);
}
