/**
 * Holds a disk against its transaction log. nbd-trplay makes of the disk as it was at the start what the log says it became; nbd-trdump
 * says what was answered.
 *
 * After a kill the log must have all that was acknowledged, and the image must be what the log makes of the start. Only where a change
 * was under way that nobody acknowledged may a sector hold what that change wrote: it may have reached the image and not yet the log, or
 * the log in part.
 */
import assert from 'node:assert/strict';
import { copyFileSync, readFileSync, rmSync } from 'node:fs';
import { Command } from '../../../src/nbd/constants.js';
import { attempt, tool } from '../../interop/tools.js';
import { handleOf, type PlacedRecord, recordsOf } from '../../support/transaction-log.js';
import type { RecordedGuest, SentChange } from './recorded.js';

const SECTOR_BYTES = 512;

export interface Evidence {
  /** The disk as it was when the log began; left as it is. */
  start: string;
  /** The disk now. */
  image: string;
  log: string;
  guest: Pick<RecordedGuest, 'changes' | 'reads' | 'flushes'>;
}

/** Fails with what is wrong. Returns how many records the log has. */
export async function checkAgainstLog({ start, image, log, guest }: Evidence): Promise<number> {
  const records = recordsOf(readFileSync(log));
  await checkDump(log, records);
  const answered = answeredRequests(records);
  checkAcknowledged(answered, guest);
  const played = `${start}.played`;
  copyFileSync(start, played);
  try {
    await playBack(log, played);
    checkImage(readFileSync(played), readFileSync(image), guest.changes);
  } finally {
    rmSync(played, { force: true });
  }
  return records.length;
}

/** nbd-trplay writes the log's changes to `image`. */
export async function playBack(log: string, image: string, ...words: string[]): Promise<void> {
  const said = await tool('nbd-trplay', '-i', image, '-l', log, ...words);
  assert.match(said, /End of transaction log/, said.slice(-300));
}

/** What nbd-trdump makes of the log, a line a record. */
export async function dump(log: string): Promise<string[]> {
  const { code, stdout, stderr } = await attempt(['sh', '-c', 'exec nbd-trdump < "$1"', 'sh', log]);
  assert.equal(code, 0, stderr);
  return stdout.split('\n').filter((line) => line !== '');
}

async function checkDump(log: string, records: readonly PlacedRecord[]): Promise<void> {
  const lines = await dump(log);
  const strange = lines.find((line) => !/^([<>] H=|TRACE_OPTION )/.test(line));
  assert.equal(strange, undefined, 'nbd-trdump knows every record');
  const expected = records.flatMap(({ record }) => {
    if (record.kind === 'reply') return `< H=${handleOf(record)} E=0x${hex(record.errno, 8)}`;
    if (record.kind !== 'request') return [];
    const { flags, command, offset, length } = record;
    return `> H=${handleOf(record)} C=0x${hex(flags * 0x1_0000 + command, 8)} O=${hex(offset, 16)} L=${hex(length, 8)}`;
  });
  const found = lines.filter((line) => /^[<>]/.test(line)).map((line) => line.replace(/ \([^)]*\)/, ''));
  // The header of a last record whose payload was cut is still shown.
  assert.ok(found.length - expected.length <= 1, `nbd-trdump shows ${found.length} records`);
  assert.deepEqual(found.slice(0, expected.length), expected);
}

const hex = (value: number, digits: number): string => value.toString(16).padStart(digits, '0');

/** Requests that were answered with success. Every answer is the only one to a request before it. */
function answeredRequests(records: readonly PlacedRecord[]): PlacedRecord[] {
  const open = new Map<string, PlacedRecord>();
  const answered: PlacedRecord[] = [];
  for (const placed of records) {
    const { record } = placed;
    if (record.kind !== 'request' && record.kind !== 'reply') continue;
    const handle = handleOf(record);
    if (record.kind === 'request') {
      assert.ok(!open.has(handle), `handle ${handle} is used twice at a time`);
      open.set(handle, placed);
    } else {
      const request = open.get(handle);
      assert.ok(request !== undefined, `handle ${handle} is answered, and was not asked`);
      open.delete(handle);
      if (record.errno === 0) answered.push(request);
    }
  }
  return answered;
}

const COMMANDS = { write: Command.WRITE, zero: Command.WRITE_ZEROES, trim: Command.TRIM };

function checkAcknowledged(answered: readonly PlacedRecord[], guest: Evidence['guest']): void {
  const known = new Map<string, number>();
  const count = (key: string, more: number): number => {
    const sum = (known.get(key) ?? 0) + more;
    known.set(key, sum);
    return sum;
  };
  for (const { record, payload } of answered) {
    if (record.kind !== 'request') continue;
    const { command, offset, length } = record;
    const ranged = command !== Command.FLUSH && command !== Command.READ;
    count(ranged ? key(command, offset, length, payload) : `${command}`, 1);
  }
  for (const { kind, offset, length, content, acknowledged } of guest.changes) {
    if (!acknowledged) continue;
    const left = count(key(COMMANDS[kind], offset, length, content), -1);
    assert.ok(left >= 0, `a ${kind} of ${length} bytes at ${offset} was acknowledged, and the log lacks it`);
  }
  assert.ok(count(`${Command.FLUSH}`, -guest.flushes) >= 0, 'the log lacks a FLUSH');
  assert.ok(count(`${Command.READ}`, -guest.reads) >= 0, 'the log lacks a READ');
}

/** No two writes begin with the same bytes. */
function key(command: number, offset: number, length: number, content: Buffer | null): string {
  return `${command} ${offset} ${length} ${content === null ? '' : content.toString('hex', 0, 16)}`;
}

function checkImage(played: Buffer, image: Buffer, changes: readonly SentChange[]): void {
  assert.equal(image.length, played.length);
  const open = changes.filter(({ acknowledged }) => !acknowledged);
  for (let at = 0; at < image.length; at += SECTOR_BYTES) {
    const sector = image.subarray(at, at + SECTOR_BYTES);
    if (sector.equals(played.subarray(at, at + SECTOR_BYTES))) continue;
    const explained = open.some(
      ({ offset, length, content }) =>
        offset <= at &&
        at < offset + length &&
        sector.equals(content?.subarray(at - offset, at - offset + SECTOR_BYTES) ?? ZEROS),
    );
    assert.ok(explained, `the sector at ${at} is neither what the log makes of it nor what was under way`);
  }
}

const ZEROS = Buffer.alloc(SECTOR_BYTES);
