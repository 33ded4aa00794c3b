/** A real machine moves between two hosts that only a slow line joins; at the end the line is cut. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
import { moveVerified } from '../lab/verified-move.js';
import { labMissing } from '../lab/vm.js';
import { wanMissing } from '../lab/wan.js';

const MIB = 1 << 20;
const SLOTS = 2048; // 8 MiB of records
const skip = (await wanMissing()) ?? (await labMissing()) ?? false;

test('a machine moves with its disk over a WAN, and every record is right', { skip }, async (t) => {
  const { move, verdict, wan } = await moveVerified({
    mode: 'raw',
    diskBytes: 16 * MIB,
    slots: SLOTS,
    dirtyMiB: 4,
    dirtyMiBPerSecond: 2,
    memoryMiB: 96,
    bandwidth: null,
    wan: { rttMs: 20, rateBitsPerSecond: 300e6 },
    workHeartbeats: 30,
    say: () => {},
    detail: () => {},
  });
  assert.equal(move.outcome, 'moved');
  assert.equal(verdict.slots, SLOTS);
  assert.ok(verdict.records > 0 && verdict.checked > 0, JSON.stringify(verdict));
  // Memory and disk went over the line and by no other way, and came once.
  const fetched = move.demandBytes + move.backgroundBytes;
  assert.ok(fetched > 0 && fetched <= 16 * MIB, JSON.stringify(move));
  assert.ok(move.ramBytes !== null && wan!.bytes.aToB > fetched + move.ramBytes, JSON.stringify([move, wan]));
  t.diagnostic(`${wan!.bytes.aToB} bytes over the line, of them ${move.ramBytes} of memory`);
});
