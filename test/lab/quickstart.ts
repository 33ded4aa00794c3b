/**
 * What blockferry does, on this machine in one go: a guest works on host A's daemon, moves with its disk to host B's daemon while it
 * goes on working, and every record it ever wrote is verified. Fails loudly on a single bad record.
 */

import { parseArgs } from 'node:util';
import { formatDuration, formatSize } from '../../src/cli/units.js';
import type { MoveResult } from '../../src/migration/result.js';
import { buildGuest } from './guest.js';
import { LabHost, runBlockferry } from './hosts.js';
import { GuestMonitor, type GuestVerdict } from './monitor.js';
import { checkRawDisk, createExt4Disk, createRawDisk } from './records.js';
import { guestMachine, labMissing, testFolder } from './vm.js';

const MIB = 1 << 20;
const DISK_BYTES = 256 * MIB;
const SLOTS = 16_384; // 64 MiB of records
/** How long the guest works at each place before and after the move, in heartbeats of 10 ms. */
const WORK_HEARTBEATS = 200;

const say = (text: string): void => console.log(`\n== ${text}`);

function fail(why: string): never {
  throw new Error(why);
}

interface Outcome {
  move: MoveResult;
  gapMs: number;
  verdict: GuestVerdict;
}

async function run(
  mode: 'raw' | 'ext4',
  bandwidth: string,
  cleanUp: (() => Promise<unknown>)[],
): Promise<Outcome> {
  const missing = await labMissing();
  if (missing !== null) fail(missing);
  say(
    'building the test guest (a kernel package, busybox and a workload that writes numbered, checksummed records)',
  );
  const guest = await buildGuest();
  const folder = await testFolder();
  cleanUp.push(folder.remove);

  say(`starting host A with a ${formatSize(DISK_BYTES)} disk, and host B with nothing`);
  const image = `${folder.path}/disk.img`;
  if (mode === 'raw') await createRawDisk(image, DISK_BYTES, SLOTS);
  else await createExt4Disk(image, DISK_BYTES, SLOTS, 4);
  const workload = { mode, slots: SLOTS, rate: 500, dirty: 16, ...(mode === 'ext4' ? { files: 4 } : {}) };
  const vm = guestMachine({ name: 'vm1', guest, volume: 'disk', workload });
  const a = await LabHost.start({
    folder: folder.path,
    name: 'a',
    volumes: [{ name: 'disk', image }],
    vms: [vm],
  });
  cleanUp.push(() => a.stop());
  const b = await LabHost.start({ folder: folder.path, name: 'b' });
  cleanUp.push(() => b.stop());
  const monitor = new GuestMonitor();
  cleanUp.push(async () => monitor.close());

  say('booting the guest on host A; it writes, syncs and reads back');
  await a.client.startMachine('vm1');
  await monitor.attach('a', await a.serialPath('vm1', AbortSignal.abort()));
  await monitor.ready();
  await monitor.progress('a', { count: WORK_HEARTBEATS, records: 100 });
  console.log(`${monitor.last!.records} records written, ${monitor.last!.checked} read back and compared`);

  say(`blockferry migrate vm1 --from ${a.control} --to ${b.control} --bandwidth ${bandwidth}`);
  const move = await migrate(a, b, bandwidth, monitor);
  await monitor.progress('b', { count: WORK_HEARTBEATS, records: 100 });

  say('stopping the source daemon: the guest does not need it any more');
  const code = await a.stop();
  if (code !== 0) fail(`the source daemon ended with code ${code}: ${a.daemon.stderr}`);
  await monitor.progress('b', { count: WORK_HEARTBEATS, records: 100 });
  const gapMs = monitor.longestGapMs();

  say('verifying every record on host B');
  const verdict = await monitor.finish('b');
  await b.client.stopMachine('vm1', { mode: 'quit' });
  if (mode === 'raw') {
    const check = await checkRawDisk(await b.imageOf('disk'), SLOTS);
    if (check.bad > 0 || check.digest !== verdict.digest)
      fail(`the image on host B differs from what the guest wrote: ${JSON.stringify(check)}`);
  }
  if (monitor.complaints.length > 0)
    fail(`the guest complains: ${monitor.complaints.slice(0, 5).join(' | ')}`);
  return { move, gapMs, verdict };
}

async function migrate(
  a: LabHost,
  b: LabHost,
  bandwidth: string,
  monitor: GuestMonitor,
): Promise<MoveResult> {
  const over = new AbortController();
  const attached = b.serialPath('vm1', over.signal).then((path) => monitor.attach('b', path));
  attached.catch(() => undefined);
  const words = ['migrate', 'vm1', '--from', a.control, '--to', b.control, '--bandwidth', bandwidth];
  words.push('--state-dir', a.folder, '--json');
  const { code, stdout, stderr } = await runBlockferry(words, {
    onLine: (line) => console.log(`   ${line}`),
  });
  over.abort();
  if (code !== 0) fail(`migrate ended with code ${code}: ${stderr.trim().split('\n').at(-1)}`);
  await attached;
  return JSON.parse(stdout) as MoveResult;
}

function summary({ move, gapMs, verdict }: Outcome): string {
  const time = (ms: number | null): string => (ms === null ? 'unknown' : formatDuration(ms));
  const rows: [string, string][] = [
    ['downtime, as QEMU reports it', time(move.downtimeMs)],
    ['longest heartbeat gap', time(gapMs)],
    ['machine ran on host B after', time(move.switchedMs)],
    ['fetched on demand', formatSize(move.demandBytes)],
    ['fetched in the background', formatSize(move.backgroundBytes)],
    ['known to be zero, not sent', formatSize(move.zeroBytes)],
    ['switch to hand-off', time(move.handoffMs)],
    ['records written', String(verdict.records)],
    ['records verified', `${verdict.checked} while it worked, ${verdict.slots} at the end`],
    ['errors', String(verdict.bad + verdict.errors + verdict.ramErrors)],
  ];
  return rows.map(([what, value]) => `   ${what.padEnd(30)}${value}`).join('\n');
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      /** What the guest has on its disk: a file system, or records from the first byte on. */
      mode: { type: 'string', default: 'ext4' },
      /** For memory and for the disk, each: slow enough that there is something to see. */
      bandwidth: { type: 'string', default: '40M/s' },
    },
  });
  const { mode, bandwidth } = values;
  if (mode !== 'raw' && mode !== 'ext4') fail('--mode is raw or ext4');
  const cleanUp: (() => Promise<unknown>)[] = [];
  try {
    const outcome = await run(mode, bandwidth, cleanUp);
    say('summary');
    console.log(summary(outcome));
    const { bad, errors, ramErrors } = outcome.verdict;
    if (bad + errors + ramErrors > 0) fail(`${bad} bad records, ${errors} errors, ${ramErrors} RAM errors`);
    console.log('\nThe machine moved with its disk, and every record is right.');
  } finally {
    for (const step of cleanUp.reverse()) await step().catch((error) => console.error(error));
  }
}

main().catch((error) => {
  console.error(`\nFAILED: ${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
});
