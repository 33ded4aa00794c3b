/** A request's 28-byte header, parsed in place (doc/proto.md, «Request message»). One object a session, reused. */

import { REQUEST_MAGIC } from '../constants.js';

export class RequestHead {
  command = 0;
  flags = 0;
  /** The cookie's two halves, unsigned. */
  cookieHi = 0;
  cookieLo = 0;
  /** The 64-bit offset as a number: exact below 2^53, rounded beyond, where no device reaches. */
  offset = 0;
  length = 0;

  /** Takes the REQUEST_HEADER_BYTES bytes at `at`; false if they do not begin with the request magic. */
  parse(bytes: Buffer, at: number): boolean {
    if (uint32(bytes, at) !== REQUEST_MAGIC) return false;
    this.flags = (bytes[at + 4]! << 8) | bytes[at + 5]!;
    this.command = (bytes[at + 6]! << 8) | bytes[at + 7]!;
    this.cookieHi = uint32(bytes, at + 8);
    this.cookieLo = uint32(bytes, at + 12);
    this.offset = uint32(bytes, at + 16) * 0x1_0000_0000 + uint32(bytes, at + 20);
    this.length = uint32(bytes, at + 24);
    return true;
  }
}

function uint32(bytes: Buffer, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}
