/** Sizes and rates as people write and read them. Suffixes are powers of two, as in qemu-img and dd. */

import { BlockferryError } from '../errors.js';
import { type Compression, isLevel, LEVEL_MAX, LEVEL_MIN } from '../nbd/codec/frames.js';

const COUNT_MAX = 65_536;
const FACTOR: Record<string, number> = { '': 1, K: 2 ** 10, M: 2 ** 20, G: 2 ** 30, T: 2 ** 40 };
const SIZE = /^(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?$/i;

/** Bytes of `text` ("4096", "64K", "1.5G"). A whole number of bytes, at most Number.MAX_SAFE_INTEGER. Fails with 'usage'. */
export function parseSize(text: string): number {
  const match = SIZE.exec(text.trim());
  if (!match)
    throw new BlockferryError('usage', `"${text}" is no size: write bytes or a number with K, M, G or T`);
  const bytes = Math.round(Number(match[1]) * FACTOR[match[2].toUpperCase()]);
  if (!Number.isSafeInteger(bytes)) throw new BlockferryError('usage', `"${text}" is too large a size`);
  return bytes;
}

/** Bytes per second of `text`: a size with or without "/s"; "0", "none" and "unlimited" are null, no limit. */
export function parseRate(text: string): number | null {
  const bare = text.trim().replace(/\s*\/s$/i, '');
  if (/^(none|unlimited)$/i.test(bare)) return null;
  const bytes = parseSize(bare);
  return bytes === 0 ? null : bytes;
}

/** A byte range "OFFSET:LENGTH" or "OFFSET-END" (END excluded), each a size; "all" is the whole of `size` bytes. */
export function parseRange(text: string, size: number): { offset: number; length: number } {
  if (text === 'all') return { offset: 0, length: size };
  const match = /^([^:-]+)([:-])([^:-]+)$/.exec(text);
  if (!match)
    throw new BlockferryError('usage', `"${text}" is no range: write OFFSET:LENGTH, OFFSET-END or all`);
  const offset = parseSize(match[1]);
  const length = match[2] === ':' ? parseSize(match[3]) : parseSize(match[3]) - offset;
  if (length < 1 || offset + length > size) {
    throw new BlockferryError(
      'usage',
      `range ${text} is empty or reaches past the end of the volume at ${size} bytes`,
    );
  }
  return { offset, length };
}

/** A whole number from 1 to 65536. */
export function parseCount(text: string): number {
  const count = Number(text);
  if (!/^\d+$/.test(text) || count < 1 || count > COUNT_MAX)
    throw new BlockferryError('usage', `"${text}" is no number from 1 to ${COUNT_MAX}`);
  return count;
}

/** Seconds, a decimal number > 0, as milliseconds. */
export function parseSeconds(text: string): number {
  const seconds = Number(text);
  if (!/^\d+(\.\d+)?$/.test(text) || seconds <= 0 || seconds > 86_400) {
    throw new BlockferryError('usage', `"${text}" is no time: write seconds, more than 0 and at most 86400`);
  }
  return Math.max(1, Math.round(seconds * 1000));
}

/** A parser of whole numbers in `min..max`. It fails with 'usage'. */
export function wholeNumber(min: number, max: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d{1,16}$/.test(text) || value < min || value > max)
      throw new BlockferryError('usage', `"${text}" is no whole number in ${min}..${max}`);
    return value;
  };
}

/** `bytes` with three significant digits at most: "4 KiB", "1.5 GiB", "999 B". */
export function formatSize(bytes: number): string {
  const names = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB'];
  let value = bytes;
  let index = 0;
  while (value >= 1024 && index < names.length - 1) {
    value /= 1024;
    index += 1;
  }
  const digits = index === 0 || value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${names[index]}`;
}

export function formatRate(bytesPerSecond: number): string {
  return `${formatSize(bytesPerSecond)}/s`;
}

/** A time left, which is an estimate in whole seconds: "5 s", "3 min 20 s". */
export function formatLeft(seconds: number): string {
  return seconds < 60 ? `${seconds} s` : formatDuration(seconds * 1000);
}

/** "850 ms", "4.2 s", "3 min 20 s", "2 h 05 min". */
export function formatDuration(ms: number): string {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 59_950) return `${(ms / 1000).toFixed(1)} s`;
  const seconds = Math.round(ms / 1000);
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(seconds % 60).padStart(2, '0')} s`;
  const minutes = Math.round(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, '0')} min`;
}

/** off, auto, or a level of zstd. */
export function parseCompression(text: string): Compression {
  if (text === 'off' || text === 'auto') return text;
  if (/^-?\d{1,2}$/.test(text) && isLevel(Number(text))) return Number(text);
  throw new BlockferryError(
    'usage',
    `'${text}' is not off, auto or a level from ${LEVEL_MIN} to ${LEVEL_MAX} (not 0)`,
  );
}
