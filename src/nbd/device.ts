/**
 * What a session serves. nbd defines it; a volume is one.
 *
 * Reads and writes come in two steps, so that the usual case allocates nothing: the session first asks for it *now*
 * (`readNow`, `writeNow`: one synchronous step, straight into or out of the session's slab). Only when the device answers
 * LATER does the session give the request a buffer of its own and hand it over (`read`, `write`); the device then calls
 * `complete` exactly once, from any later turn of the loop or before it returns.
 */

import type { TransactionLog } from './log/transaction-log.js';

/** Answer of a `...Now` call: it cannot be done without waiting. Every other answer is an NBD errno, 0 for success. */
export const LATER = -1;

/** A request that waits for its answer. The session uses the object again once it is complete: keep nothing of it. */
export interface IoRequest {
  /** Bytes from the start of the device. Bounds were checked by the session: offset + length <= size. */
  readonly offset: number;
  /** Bytes, >= 1 (FLUSH: 0). READ and WRITE: PAYLOAD_BYTES_MAX at most; all others as long as the device. */
  readonly length: number;
  /** Command flags (CommandFlag), without PAYLOAD_LEN. */
  readonly flags: number;
  /** READ: filled from `at` on; WRITE: the payload from `at` on. It belongs to the request until `complete`. */
  readonly buffer: Buffer;
  readonly at: number;
  /** The session is gone: nobody waits for the answer. `complete` must be called all the same. */
  readonly abandoned: boolean;
  /**
   * A change took effect, on `length` bytes at `offset` (TRIM: what was given back, length 0 for nothing). Called in the very step in
   * which it did, before any other request finds it done; a device that never calls it has its changes recorded when they complete,
   * which is right if nothing else can change the same bytes in between.
   */
  changed(offset: number, length: number): void;
  /** Answers with an NBD errno, 0 for success. Exactly once. */
  complete(errno: number): void;
}

/** BLOCK_STATUS: at least one extent is added before it is completed with success. */
export interface StatusRequest extends IoRequest {
  /** Name of one of the device's contexts. Asked once per selected context. */
  readonly context: string;
  /** Most extents that are wanted, >= 1. */
  readonly extentsMax: number;
  /** Adds an extent; they follow one another from `offset` on, lengths >= 1. Equal neighbours are merged by the session. */
  extent(length: number, status: number): void;
}

/**
 * Where a device's bytes lie, for requests that need nothing but them: a session may carry those out without asking the device, as if it had
 * asked `readNow` or `writeNow`, which then never hear of them.
 */
export interface DirectAccess {
  /** Of a file or block device that begins with the device's first byte. */
  readonly fd: number;
  readonly reads: boolean;
  readonly writes: boolean;
  /** Only what is in the page cache may be read; the rest goes to `read`. */
  readonly nowait: boolean;
  /** Which blocks of 4 KiB may be touched: bit i & 7 of byte i >> 3 is block i. Null: all. */
  readonly present: Uint8Array | null;
  /** Where what is carried out is counted, as native/src/heat.h says. Null: nowhere. */
  readonly heat: Uint8Array | null;
  /** A write sets the bit of each block it touches, as in `present`, before it changes them. Null or absent: nobody wants to know. */
  readonly dirty?: Uint8Array | null;
}

/** A disk that sessions serve. All sessions may call it at any time; it must not throw. */
export interface BlockDevice {
  /** Bytes. */
  readonly size: number;
  /** Served with READ_ONLY set; the session itself refuses writes then. */
  readonly readOnly: boolean;
  /** FLUSH and FUA on one connection cover completed writes of all (MULTI_CONN). */
  readonly multiConn: boolean;
  /**
   * Heeds FAST_ZERO in `zero`: it answers ENOTSUP at once, and changes nothing, unless it zeroes faster than data could be written. Default:
   * false, and clients are not offered it.
   */
  readonly fastZero?: boolean;
  /** Preferred request size in bytes, a power of two >= 512. */
  readonly preferredBlock: number;
  /** Metadata contexts it can report, e.g. `base:allocation`. */
  readonly contexts: readonly string[];
  /** Where its requests are recorded, if anywhere. */
  readonly transactionLog?: TransactionLog | null;

  /** What may be touched at this moment; null: nothing. It holds until this thread does anything else, and is not kept. */
  direct?(): DirectAccess | null;
  /** Told when the kernel made such a write wait: `direct` may forbid the next ones. */
  directWriteHeldUp?(): void;
  readNow(offset: number, length: number, buffer: Buffer, at: number): number;
  /**
   * How many bytes from `offset` on are known to read as zeros at this moment, 0 to `length`: asked before long READs, whose reply
   * can do without them. Cheap, and never a guess. Without it nothing is known.
   */
  zeroesNow?(offset: number, length: number): number;
  /** Never asked with FUA: those go to `write`. */
  writeNow(offset: number, length: number, buffer: Buffer, at: number): number;
  read(request: IoRequest): void;
  write(request: IoRequest): void;
  flush(request: IoRequest): void;
  trim(request: IoRequest): void;
  /** Its flags may hold NO_HOLE, and FAST_ZERO if that is offered; nothing but FAST_ZERO may be answered with ENOTSUP. */
  zero(request: IoRequest): void;
  cache(request: IoRequest): void;
  status(request: StatusRequest): void;
  /**
   * The session is over. Those of its requests that are `abandoned` should be completed soon, whatever they wait for: they keep
   * the session's place among the connections. Called once per session.
   */
  release(): void;
}
