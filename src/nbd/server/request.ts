/**
 * A request that the device could not answer at once, from then until `complete`. Pooled by its session: between `begin` and
 * `complete` it belongs to the device, otherwise to the session.
 */

import { EXTENDED_EXTENT_BYTES, EXTENT_BYTES, encodeExtendedExtent, encodeExtent } from '../codec/replies.js';
import { Command, CommandFlag } from '../constants.js';
import type { StatusRequest } from '../device.js';
import type { RequestHead } from './head.js';
import { HEAD_ROOM, type Slab, type SlabPool } from './slab.js';

/** Descriptors of one BLOCK_STATUS chunk; a client that wants more asks again behind the last. */
export const EXTENTS_MAX = 16_384;

const NOTHING = Buffer.alloc(0);

export interface RequestOwner {
  readonly pool: SlabPool;
  /** Extended headers: extents have 64-bit lengths. */
  readonly extended: boolean;
  /** The session is gone. */
  readonly abandoned: boolean;
  /** `length` bytes at `offset` are as a change wanted them. */
  changed(request: Request, offset: number, length: number): void;
  /** So is the client: nothing can be sent. */
  readonly silent: boolean;
  completed(request: Request, errno: number): void;
  completedTwice(): void;
}

/** What the requests of one BLOCK_STATUS, one a selected context, share. */
export interface StatusReply {
  waiting: number;
  errno: number;
}

export class Request implements StatusRequest {
  command = 0;
  cookieHi = 0;
  cookieLo = 0;
  /** Of the request as it came; `offset` is where the device begins, which may be behind zeros that were answered already. */
  offsetHi = 0;
  offsetLo = 0;
  offset = 0;
  length = 0;
  flags = 0;
  buffer: Buffer = NOTHING;
  at = 0;
  slab: Slab | null = null;
  /** Memory the session counts for it, bytes. */
  charged = 0;
  /** What it was completed with, if that is answered later. */
  errno = 0;
  /** Its number in the transaction log, if there is one, and whether the change it makes is recorded there. */
  number = 0;
  recorded = false;
  /** The device threw while it had the request, and may still know it: neither it nor its memory is used again. */
  poisoned = false;

  /** BLOCK_STATUS only: the context, and its extents so far, which lie encoded in the slab from `at` on. */
  context = '';
  contextId = 0;
  extentsMax = 1;
  extents = 0;
  reply: StatusReply | null = null;
  #covered = 0;
  #lastStatus = 0;
  #lastLength = 0;

  #withDevice = false;

  constructor(private readonly owner: RequestOwner) {}

  get abandoned(): boolean {
    // Behind a DISC changes are carried out, but what was read has nobody to go to.
    return this.owner.abandoned || (this.owner.silent && this.command === Command.READ);
  }

  begin(head: RequestHead, slab: Slab | null): void {
    const flush = head.command === Command.FLUSH; // its offset and length mean nothing
    this.command = head.command;
    this.flags = head.flags & ~CommandFlag.PAYLOAD_LEN;
    this.cookieHi = head.cookieHi;
    this.cookieLo = head.cookieLo;
    this.offsetHi = head.offsetHi;
    this.offsetLo = head.offsetLo;
    this.offset = flush ? 0 : head.offset;
    this.length = flush ? 0 : head.length;
    this.slab = slab;
    this.charged = slab === null ? 0 : slab.buffer.length;
    this.buffer = slab === null ? NOTHING : slab.buffer;
    this.at = slab === null ? 0 : HEAD_ROOM;
    this.recorded = false;
    this.#withDevice = true;
  }

  beginStatus(context: string, contextId: number, extentsMax: number, reply: StatusReply): void {
    this.context = context;
    this.contextId = contextId;
    this.extentsMax = extentsMax;
    this.reply = reply;
    this.extents = 0;
    this.#covered = 0;
    this.#lastLength = 0;
  }

  get withDevice(): boolean {
    return this.#withDevice;
  }

  changed(offset: number, length: number): void {
    if (this.#withDevice) this.owner.changed(this, offset, length);
  }

  complete(errno: number): void {
    if (!this.#withDevice) {
      this.owner.completedTwice();
      return;
    }
    this.#withDevice = false;
    this.owner.completed(this, errno);
  }

  /** Forgets what it held, before it goes back to the session's pool. */
  clear(): void {
    this.slab = null;
    this.buffer = NOTHING;
    this.reply = null;
  }

  /** Merges equal neighbours; what goes beyond the request's end or `extentsMax` is cut off. */
  extent(length: number, status: number): void {
    const covered = Math.min(length, this.length - this.#covered);
    if (covered < 1 || !this.#withDevice) return;
    if (this.extents > 0 && status === this.#lastStatus) {
      this.#lastLength += covered;
    } else {
      if (this.extents === this.extentsMax) {
        this.#covered = this.length; // the list has an end here, whatever follows
        return;
      }
      this.extents++;
      this.#lastStatus = status;
      this.#lastLength = covered;
    }
    this.#covered += covered;
    this.#store();
  }

  #store(): void {
    const { extended } = this.owner;
    const bytes = extended ? EXTENDED_EXTENT_BYTES : EXTENT_BYTES;
    const at = this.at + (this.extents - 1) * bytes;
    if (at + bytes > this.buffer.length) this.#grow();
    if (extended) encodeExtendedExtent(this.buffer, at, this.#lastLength, this.#lastStatus);
    else encodeExtent(this.buffer, at, this.#lastLength, this.#lastStatus);
  }

  #grow(): void {
    const small = this.slab!;
    const large = this.owner.pool.take((small.buffer.length - HEAD_ROOM) * 2);
    small.buffer.copy(large.buffer);
    this.owner.pool.give(small);
    this.slab = large;
    this.buffer = large.buffer;
  }
}
