/**
 * What a request must be before it is sent: inside the export, aligned and no longer than the server takes, and of a kind that it offers.
 * Each check answers with the error that the request fails with, or null.
 */

import { BlockferryError } from '../../errors.js';
import { PAYLOAD_BYTES_DEFAULT, PAYLOAD_BYTES_MAX, TransmissionFlag } from '../constants.js';
import type { ExportInfo } from './export-info.js';

const U32_MAX = 0xffffffff;

export class RequestChecks {
  /** Largest READ or WRITE, bytes. */
  readonly payloadBytesMax: number;
  readonly #alignment: number;
  /** Longest request without payload, bytes. */
  readonly #lengthMax: number;

  constructor(
    readonly info: ExportInfo,
    readonly peer: string,
  ) {
    this.payloadBytesMax = Math.min(info.blockSize?.maximum ?? PAYLOAD_BYTES_DEFAULT, PAYLOAD_BYTES_MAX);
    this.#alignment = info.blockSize?.minimum ?? 1;
    this.#lengthMax = info.extended ? info.size : U32_MAX;
  }

  range(offset: number, length: number): BlockferryError | null {
    if (!isCount(offset) || !isCount(length) || length > this.info.size - offset) {
      return new BlockferryError(
        'bounds',
        `${length} bytes at ${offset} are not inside an export of ${this.info.size}`,
      );
    }
    if (length > this.#lengthMax) return tooLong(length, this.#lengthMax);
    if (this.#alignment > 1 && (offset % this.#alignment !== 0 || length % this.#alignment !== 0)) {
      const message = `${length} bytes at ${offset} are not aligned to the server's minimum block of ${this.#alignment}`;
      return new BlockferryError('bounds', message);
    }
    return null;
  }

  /** Of buffer[at, at + length). */
  payload(length: number, buffer: Buffer, at: number): BlockferryError | null {
    if (length > this.payloadBytesMax) return tooLong(length, this.payloadBytesMax);
    if (!isCount(at) || length > buffer.length - at) {
      return new BlockferryError(
        'bounds',
        `${length} bytes from ${at} on do not fit a buffer of ${buffer.length}`,
      );
    }
    return null;
  }

  /** Of a request that changes the range. */
  change(offset: number, length: number, fua: boolean): BlockferryError | null {
    const wrong = this.range(offset, length);
    if (wrong !== null) return wrong;
    if (this.info.readOnly)
      return new BlockferryError('read-only', `the export at ${this.peer} is read-only`);
    return fua ? this.offers(TransmissionFlag.SEND_FUA, 'FUA') : null;
  }

  /** The server has the flag, of TransmissionFlag, that stands for `what`. */
  offers(flag: number, what: string): BlockferryError | null {
    if ((this.info.flags & flag) !== 0) return null;
    return new BlockferryError('usage', `the server at ${this.peer} does not offer ${what}`);
  }
}

function tooLong(length: number, most: number): BlockferryError {
  return new BlockferryError('bounds', `${length} bytes in one request, of ${most} at most: split it`);
}

function isCount(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0;
}
