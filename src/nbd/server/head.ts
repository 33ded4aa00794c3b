/**
 * A request's header, parsed in place: 28 bytes, or 32 with extended headers (doc/proto.md, «Request message»). One object a session,
 * reused.
 */

import {
  Command,
  CommandFlag,
  EXTENDED_REQUEST_HEADER_BYTES,
  EXTENDED_REQUEST_MAGIC,
  REQUEST_HEADER_BYTES,
  REQUEST_MAGIC,
} from '../constants.js';

const U32 = 0x1_0000_0000;

export class RequestHead {
  /** Length of the header. */
  readonly bytes: number;
  readonly #magic: number;

  command = 0;
  flags = 0;
  /** The cookie's two halves, unsigned. */
  cookieHi = 0;
  cookieLo = 0;
  /** The offset's halves, as it came: an extended reply repeats it. */
  offsetHi = 0;
  offsetLo = 0;
  /** The 64-bit offset as a number: exact below 2^53, rounded beyond, where no device reaches. */
  offset = 0;
  /** Likewise. */
  length = 0;
  /**
   * Bytes of payload that follow the header. A WRITE has one also if it lacks the flag PAYLOAD_LEN of extended headers, which it must have:
   * QEMU's client (8.2 to 10.0 at least) forgets it, and a WRITE without payload cannot be meant.
   */
  payload = 0;

  constructor(private readonly extended: boolean) {
    this.bytes = extended ? EXTENDED_REQUEST_HEADER_BYTES : REQUEST_HEADER_BYTES;
    this.#magic = extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC;
  }

  /** Takes the `this.bytes` bytes at `at`; false if they do not begin with the request magic. */
  parse(bytes: Buffer, at: number): boolean {
    if (uint32(bytes, at) !== this.#magic) return false;
    this.flags = (bytes[at + 4]! << 8) | bytes[at + 5]!;
    this.command = (bytes[at + 6]! << 8) | bytes[at + 7]!;
    this.cookieHi = uint32(bytes, at + 8);
    this.cookieLo = uint32(bytes, at + 12);
    this.offsetHi = uint32(bytes, at + 16);
    this.offsetLo = uint32(bytes, at + 20);
    this.offset = this.offsetHi * U32 + this.offsetLo;
    this.length = uint32(bytes, at + 24);
    if (this.extended) {
      this.length = this.length * U32 + uint32(bytes, at + 28);
    }
    const carries =
      this.command === Command.WRITE || (this.extended && (this.flags & CommandFlag.PAYLOAD_LEN) !== 0);
    this.payload = carries ? this.length : 0;
    return true;
  }
}

function uint32(bytes: Buffer, at: number): number {
  return ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0;
}
