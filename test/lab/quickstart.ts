/**
 * What blockferry does, on this machine in one go: a guest works on host A's daemon, moves with its disk to host B's daemon while it
 * goes on working, and every record it ever wrote is verified. Fails loudly on a single bad record.
 */

import { parseArgs } from 'node:util';
import { formatDuration, formatSize } from '../../src/cli/units.js';
import { moveVerified, type VerifiedMove } from './verified-move.js';

const MIB = 1 << 20;
const DISK_BYTES = 256 * MIB;
const SLOTS = 16_384; // 64 MiB of records
const DIRTY_MIB = 16;
/** For memory and for the disk, each: slow enough that there is something to see. Over a WAN the line is slow enough. */
const BANDWIDTH = '40M/s';
/** How long the guest works at each place before and after the move, in heartbeats of 10 ms. */
const WORK_HEARTBEATS = 200;
const WAN = { rttMs: 20, rateBitsPerSecond: 100e6, queueMs: 50 };
/** Long enough for a rate before, and one at the destination from 10 s on. */
const WAN_WORK_HEARTBEATS = 500;
const WAN_WATCH_MS = 20_000;

const say = (text: string): void => console.log(`\n== ${text}`);
const detail = (text: string): void => console.log(text);

function summary({ move, gapMs, verdict, wan }: VerifiedMove): string {
  const time = (ms: number | null): string => (ms === null ? 'unknown' : formatDuration(ms));
  const rate = (value: number | null): string => (value === null ? 'unknown' : value.toFixed(0));
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
  if (wan !== null) {
    const { before, first5s, from10s } = wan.recordsPerSecond;
    const { aToB, bToA } = wan.bytes;
    rows.push(
      ['records a second before', rate(before)],
      ['in the first 5 s on host B', rate(first5s)],
      ['from 10 s on', rate(from10s)],
      ['over the line', `${formatSize(aToB)} from A to B, ${formatSize(bToA)} back`],
      ['of that memory, says QEMU', move.ramBytes === null ? 'unknown' : formatSize(move.ramBytes)],
    );
  }
  return rows.map(([what, value]) => `   ${what.padEnd(30)}${value}`).join('\n');
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      /** What the guest has on its disk: a file system, or records from the first byte on. */
      mode: { type: 'string', default: 'ext4' },
      bandwidth: { type: 'string' },
      /** As `blockferry migrate` has it: now, hot or all. */
      switch: { type: 'string' },
      /** Between two network namespaces, over a line of 100 Mbit/s with a round trip of 20 ms. */
      wan: { type: 'boolean', default: false },
    },
  });
  const { mode, bandwidth, wan } = values;
  if (mode !== 'raw' && mode !== 'ext4') throw new Error('--mode is raw or ext4');
  const outcome = await moveVerified({
    mode,
    diskBytes: DISK_BYTES,
    slots: SLOTS,
    dirtyMiB: DIRTY_MIB,
    bandwidth: bandwidth ?? (wan ? null : BANDWIDTH),
    switch: values.switch,
    wan: wan ? WAN : null,
    workHeartbeats: wan ? WAN_WORK_HEARTBEATS : WORK_HEARTBEATS,
    watchMs: wan ? WAN_WATCH_MS : 0,
    say,
    detail,
  });
  say('summary');
  console.log(summary(outcome));
  console.log('\nThe machine moved with its disk, and every record is right.');
}

main().catch((error) => {
  console.error(`\nFAILED: ${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
});
