/**
 * What the WAN lab is worth on this machine: `node dist/test/lab/wan-proof.js` measures settings with ping and iperf3, from inside
 * the hosts, and prints a table of what was set and what was found.
 */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import type { LinkStats } from './wan/link.js';
import { runTool } from './wan/namespace.js';
import { WanLab, type WanOptions, wanMissing, words } from './wan.js';

const SETTINGS: WanOptions[] = [
  { rateBitsPerSecond: 100e6, rttMs: 20, queueMs: 50 },
  { rateBitsPerSecond: 100e6, rttMs: 40, queueMs: 50 },
  { rateBitsPerSecond: 100e6, rttMs: 20, queueMs: 50, lossPercent: 1 },
  { rateBitsPerSecond: 100e6, rttMs: 20, queueMs: 50, lossPercent: 1, congestionControl: 'bbr' },
  { rateBitsPerSecond: 1e9, rttMs: 1, queueMs: 5 },
  { rateBitsPerSecond: 1e9, rttMs: 20, queueMs: 20 },
  { rateBitsPerSecond: 1e9, rttMs: 20, queueMs: 20, offload: false },
  { rateBitsPerSecond: 10e9, rttMs: 5, queueMs: 5 },
];
const PINGS = 300;
const PING_INTERVAL_S = 0.01;
const SECONDS = 5;
/** Not counted: the start of the connections. */
const START_SECONDS = 2;

interface RoundTrips {
  median: number;
  p99: number;
  least: number;
}

interface Load {
  megabitsPerSecond: number;
  retransmits: number;
  roundTrips: RoundTrips;
}

function start(command: readonly string[]): ChildProcess {
  return spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...command], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
}

async function output(command: readonly string[]): Promise<string> {
  const child = start(command);
  let text = '';
  child.stdout!.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
  });
  const [code] = await once(child, 'close');
  if (code !== 0) throw new Error(`${command.join(' ')}: code ${code}: ${text}`);
  return text;
}

async function ping(lab: WanLab, count: number): Promise<RoundTrips> {
  const options = ['-n', '-i', String(PING_INTERVAL_S), '-c', String(count)];
  const text = await output(words(lab.a, ['ping', ...options, lab.b.address]));
  const times = [...text.matchAll(/time=([\d.]+) ms/g)]
    .map((match) => Number(match[1]))
    .sort((x, y) => x - y);
  const at = (share: number) => times[Math.min(times.length - 1, Math.floor(times.length * share))]!;
  return { least: at(0), median: at(0.5), p99: at(0.99) };
}

/** TCP from A to B, with pings beside it once it has started. */
async function load(lab: WanLab, connections: number): Promise<Load> {
  const options = ['-J', '-P', String(connections), '-t', String(SECONDS), '-O', String(START_SECONDS)];
  const running = output(words(lab.a, ['iperf3', '-c', lab.b.address, ...options]));
  const [report, roundTrips] = await Promise.all([
    running,
    new Promise((resolve) => setTimeout(resolve, START_SECONDS * 1000)).then(() => ping(lab, PINGS)),
  ]);
  const { sum_received: received, sum_sent: sent } = JSON.parse(report).end;
  const megabitsPerSecond = received.bits_per_second / 1e6;
  return { megabitsPerSecond, retransmits: sent.retransmits, roundTrips };
}

async function measure(lab: WanLab): Promise<string[]> {
  const server = start(words(lab.b, ['iperf3', '-s', '--forceflush']));
  const ended = once(server, 'close');
  try {
    for await (const line of createInterface({ input: server.stdout! })) {
      if (line.includes('listening')) break;
    }
    server.stdout!.resume();
    const idle = await ping(lab, PINGS);
    const one = await load(lab, 1);
    const four = await load(lab, 4);
    return row(lab, idle, [one, four], await lab.stats());
  } finally {
    server.kill('SIGKILL');
    await ended;
  }
}

function row(lab: WanLab, idle: RoundTrips, loads: readonly Load[], { aToB, bToA }: LinkStats): string[] {
  const { rateBitsPerSecond, rttMs, queueMs, lossPercent } = lab.settings;
  const share = (load: Load) => {
    const percent = (load.megabitsPerSecond * 1e8) / rateBitsPerSecond;
    return `${load.megabitsPerSecond.toFixed(1)} (${percent.toFixed(1)} %)`;
  };
  const taken = aToB.read.packets + bToA.read.packets;
  const percent = (packets: number) => `${((packets * 100) / taken).toFixed(2)} %`;
  const late = (aToB.lateSumNs + bToA.lateSumNs) / (aToB.delivered.packets + bToA.delivered.packets);
  return [
    `${rateBitsPerSecond / 1e6} Mbit/s, ${rttMs} ms, queue ${queueMs} ms${lossPercent > 0 ? `, loss ${lossPercent} %` : ''}`,
    `${lab.congestionControl}${lab.offload ? ', offload' : ''}`,
    `${idle.least.toFixed(2)} / ${idle.median.toFixed(2)} / ${idle.p99.toFixed(2)}`,
    ...loads.map(share),
    loads
      .map((load) => `${load.roundTrips.median.toFixed(1)} / ${load.roundTrips.p99.toFixed(1)}`)
      .join('; '),
    `${(aToB.queueMaxNs / 1e6).toFixed(1)}`,
    `${percent(aToB.lost.packets + bToA.lost.packets)}, ${percent(aToB.dropped.packets + bToA.dropped.packets)}`,
    `${(late / 1e3).toFixed(0)} us`,
  ];
}

const HEAD = [
  'set',
  'TCP',
  'round trip, ms: least / median / p99',
  '1 connection, Mbit/s',
  '4 connections, Mbit/s',
  'round trip under load, median / p99: 1; 4',
  'longest in the queue, ms',
  'lost, dropped',
  'late, mean',
];

async function main(): Promise<void> {
  const missing = await wanMissing();
  if (missing !== null) throw new Error(missing);
  await runTool('iperf3', ['--version']);
  await runTool('ping', ['-V']);
  const line = (cells: readonly string[]) => console.log(`| ${cells.join(' | ')} |`);
  line(HEAD);
  line(HEAD.map(() => '---'));
  for (const settings of SETTINGS) {
    const lab = await WanLab.create(settings);
    try {
      line(await measure(lab));
    } finally {
      await lab.close();
    }
  }
}

main().catch((error) => {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
});
