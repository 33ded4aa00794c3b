/** Transaction logs as tests read them: taken apart, and shown a line a record. */
import fs, { readFileSync } from 'node:fs';
import { syncBuiltinESMExports } from 'node:module';
import { decodeRecord, type LogRecord, recordBytes } from '../../src/nbd/codec/transaction-log.js';
import { Command } from '../../src/nbd/constants.js';

export interface PlacedRecord {
  record: LogRecord;
  /** Bytes from the log's start: where it begins, and where the next one does. */
  at: number;
  end: number;
  /** Of a WRITE in a log with data. */
  payload: Buffer | null;
}

/** Whole records; fails where something else stands. What a kill left of the last one is left out. */
export function recordsOf(log: Buffer): PlacedRecord[] {
  const records: PlacedRecord[] = [];
  let withData = false;
  for (let at = 0; at < log.length; ) {
    const record = decodeRecord(log, at);
    if (record === 'foreign') throw new Error(`no record at ${at}: ${log.toString('hex', at, at + 32)}`);
    if (record === 'cut') break;
    if (record.kind === 'switch') withData = record.withData;
    const end = at + recordBytes(record, withData);
    if (end > log.length) break;
    const isWrite = withData && record.kind === 'request' && record.command === Command.WRITE;
    records.push({ record, at, end, payload: isWrite ? log.subarray(end - record.length, end) : null });
    at = end;
  }
  return records;
}

/** As nbd-trdump shows it. */
export function handleOf({ hi, lo }: { hi: number; lo: number }): string {
  return [hi, lo].map((half) => half.toString(16).padStart(8, '0')).join('');
}

const NAMES = new Map<number, string>(Object.entries(Command).map(([name, command]) => [command, name]));

/** "> 1.2 WRITE 4096+512 1" (handle, command, offset + length, flags if any), "< 1.2 0" (errno), "data on". */
export function shownLog(path: string): string[] {
  return recordsOf(readFileSync(path)).map(({ record }) => shown(record));
}

function shown(record: LogRecord): string {
  if (record.kind === 'switch') return `data ${record.withData ? 'on' : 'off'}`;
  if (record.kind === 'chunk') return 'chunk';
  const { hi, lo } = record;
  if (record.kind === 'reply') return `< ${hi}.${lo} ${record.errno}`;
  const { command, offset, length, flags } = record;
  const name = NAMES.get(command) ?? command;
  return `> ${hi}.${lo} ${name} ${offset}+${length}${flags === 0 ? '' : ` ${flags}`}`;
}

type Writev = (fd: number, buffers: Buffer[], done: (error: Error | null, count: number) => void) => void;

export const realWritev = fs.writev as unknown as Writev;

/** From now on logs of this process are written by `fake`. */
export function fakeWritev(fake: Writev): void {
  (fs as { writev: unknown }).writev = fake;
  syncBuiltinESMExports();
}

export function restoreWritev(): void {
  fakeWritev(realWritev);
}
