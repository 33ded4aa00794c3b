/**
 * Where the whole records of a transaction log end. A daemon that was killed may have left a part of one behind them, and some file
 * systems leave zeros where a machine crashed.
 */
import { readSync } from 'node:fs';
import { decodeRecord, recordBytes } from '../codec/transaction-log.js';

const WINDOW_BYTES = 1 << 20;

/**
 * Bytes of whole records from the start of the file, which has `sizeBytes`; null if it is no transaction log. Reads through all of it
 * but the payloads.
 */
export function wholeRecordsEnd(fd: number, sizeBytes: number): number | null {
  const window = Buffer.allocUnsafe(Math.min(WINDOW_BYTES, sizeBytes));
  let withData = false;
  for (let offset = 0; offset < sizeBytes; ) {
    const bytes = window.subarray(0, readSync(fd, window, 0, window.length, offset));
    let at = 0;
    for (;;) {
      const record = decodeRecord(bytes, at);
      if (record === 'foreign') {
        const whole = offset + at;
        return whole > 0 && onlyZeros(fd, whole, sizeBytes) ? whole : null;
      }
      if (record === 'cut') break;
      if (record.kind === 'switch') withData = record.withData;
      const size = recordBytes(record, withData);
      if (offset + at + size > sizeBytes) return offset + at;
      at += size;
      if (at >= bytes.length) break;
    }
    if (at === 0) return offset;
    offset += at;
  }
  return sizeBytes;
}

function onlyZeros(fd: number, from: number, sizeBytes: number): boolean {
  const window = Buffer.alloc(Math.min(WINDOW_BYTES, sizeBytes - from));
  for (let offset = from; offset < sizeBytes; ) {
    const count = readSync(fd, window, 0, window.length, offset);
    if (count === 0 || window.subarray(0, count).some((byte) => byte !== 0)) return false;
    offset += count;
  }
  return true;
}
