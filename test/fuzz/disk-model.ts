/** What a disk may hold after the requests of one or several connections, and what their READs may have found. */
import assert from 'node:assert/strict';
import { judge, type Request, type Transmission } from './transmission.js';
import { CMD, FLAG } from './wire.js';

/** A zeroing that is no faster than writing, where only a fast one is wanted. */
const ENOTSUP = 95;

interface Change {
  from: number;
  to: number;
  /** The bytes at `from`; null: TRIM, which may leave zeroes or what was there. */
  bytes: Buffer | null;
  /** It was answered, with success: it happened. Otherwise it may have. */
  certain: boolean;
}

/**
 * Checks the answers of `transmissions`, and `disk`, against the disk as it was before. `inOrder`: each request of the only connection was
 * carried out before the next one. Otherwise requests that touch the same bytes may have happened in any order.
 */
export function checkDisk(
  before: Buffer,
  transmissions: readonly Transmission[],
  disk: Buffer,
  inOrder: boolean,
): void {
  for (const transmission of transmissions) checkErrors(transmission);
  if (inOrder) checkInOrder(before, transmissions[0], disk);
  else checkInAnyOrder(before, transmissions, disk);
}

/** Valid requests succeed and others do not. */
function checkErrors({ answers, terms }: Transmission): void {
  for (const { request, errno } of answers) {
    const verdict = judge(request, terms);
    const { command, flags, offset, length } = request;
    const what = `command ${command}, flags ${flags}, ${length} bytes at ${offset}`;
    if (verdict === 'invalid') assert.notEqual(errno, 0, `accepted: ${what}`);
    const tooSlow = errno === ENOTSUP && (flags & FLAG.FAST_ZERO) !== 0;
    if (verdict === 'valid' && !tooSlow) assert.equal(errno, 0, `refused with ${errno}: ${what}`);
  }
}

function changeOf(request: Request, certain: boolean): Change | null {
  const { command, offset, length, payload } = request;
  if (command !== CMD.WRITE && command !== CMD.ZERO && command !== CMD.TRIM) return null;
  const from = Number(offset);
  const to = from + Number(length);
  const bytes = command === CMD.WRITE ? payload : command === CMD.ZERO ? Buffer.alloc(to - from) : null;
  return { from, to, bytes, certain };
}

function checkInOrder(before: Buffer, transmission: Transmission | undefined, disk: Buffer): void {
  const model = Buffer.from(before);
  /** 1: may also be zero, a TRIM said so. */
  const trimmed = Buffer.alloc(model.length);
  const answers = [...(transmission?.answers ?? [])].sort((a, b) => a.request.index - b.request.index);
  for (const { request, errno, data } of answers) {
    if (errno !== 0) continue;
    if (data !== null)
      compare(
        data,
        model,
        Number(request.offset),
        (at) => trimmed[at] === 1 && data[at - Number(request.offset)] === 0,
      );
    const change = changeOf(request, true);
    if (change === null) continue;
    trimmed.fill(change.bytes === null ? 1 : 0, change.from, change.to);
    change.bytes?.copy(model, change.from);
  }
  compare(disk, model, 0, (at) => trimmed[at] === 1 && disk[at] === 0);
}

function checkInAnyOrder(before: Buffer, transmissions: readonly Transmission[], disk: Buffer): void {
  const changes = transmissions.flatMap((transmission) => {
    const answered = new Map(transmission.answers.map(({ request, errno }) => [request, errno]));
    return transmission.requests.flatMap((request) => {
      const errno = answered.get(request);
      if (errno !== undefined && errno !== 0) return [];
      if (errno === undefined && judge(request, transmission.terms) === 'invalid') return [];
      return changeOf(request, errno === 0) ?? [];
    });
  });
  const model = Buffer.from(before);
  for (const { bytes, from, certain } of changes) if (certain) bytes?.copy(model, from);
  /** Some change left the byte at `at` so. */
  const written = (at: number, value: number): boolean =>
    changes.some(
      ({ from, to, bytes }) => at >= from && at < to && (bytes === null ? 0 : bytes[at - from]) === value,
    );
  const overwritten = (at: number): boolean =>
    changes.some(({ from, to, bytes, certain }) => certain && bytes !== null && at >= from && at < to);
  for (const { answers } of transmissions) {
    for (const { request, data } of answers) {
      const offset = Number(request.offset);
      if (data !== null)
        compare(
          data,
          model,
          offset,
          (at) => data[at - offset] === before[at] || written(at, data[at - offset]!),
        );
    }
  }
  compare(disk, model, 0, (at) => written(at, disk[at]!) || (disk[at] === before[at] && !overwritten(at)));
}

/** `actual` is what is at `offset` of `model`, but for bytes of which `mayDiffer` is true. */
function compare(actual: Buffer, model: Buffer, offset: number, mayDiffer: (at: number) => boolean): void {
  if (model.compare(actual, 0, actual.length, offset, offset + actual.length) === 0) return;
  for (let at = offset; at < offset + actual.length; at++) {
    const byte = actual[at - offset];
    if (byte !== model[at] && !mayDiffer(at)) assert.fail(`at ${at} there is ${byte}, not ${model[at]}`);
  }
}
