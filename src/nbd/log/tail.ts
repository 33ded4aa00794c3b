/** Where the whole records of a transaction log end: a daemon that was killed may have left a part of one behind them. */
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
      if (record === 'foreign') return null;
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
