/**
 * Sends requests: headers gather in a slab, payloads are referred to where they are, and all that one turn of the event loop
 * brings goes out together.
 *
 * Invariant: bytes of the slab that were handed to the socket are left alone until the socket has written them. The usual
 * write is done when `uncork` returns; then the slab is used again from its start. After a write that waits for the peer, the
 * slab goes on behind what is under way, and a full one is replaced.
 */

import type { Duplex } from 'node:stream';
import { encodeExtendedRequest, encodeRequest } from '../codec/client.js';
import { EXTENDED_REQUEST_HEADER_BYTES } from '../constants.js';

const SLAB_BYTES = 32 << 10;
/** Payload bytes gathered before they are sent without waiting for the end of the turn. */
const GATHERED_BYTES_MAX = 1 << 20;

export class RequestSender {
  #slab = Buffer.allocUnsafeSlow(SLAB_BYTES);
  /** slab[#from, #to) are headers not handed to the socket yet. */
  #from = 0;
  #to = 0;
  #gatheredBytes = 0;
  #corked = false;
  #scheduled = false;

  constructor(
    readonly socket: Duplex,
    /** Extended headers were agreed on. */
    readonly extended = false,
  ) {}

  /** See `encodeRequest`, or with extended headers `encodeExtendedRequest`. */
  request(
    flags: number,
    command: number,
    cookieHigh: number,
    cookieLow: number,
    offset: number,
    length: number,
  ): void {
    if (this.#to + EXTENDED_REQUEST_HEADER_BYTES > SLAB_BYTES) this.#makeRoom();
    const encode = this.extended ? encodeExtendedRequest : encodeRequest;
    this.#to = encode(this.#slab, this.#to, flags, command, cookieHigh, cookieLow, offset, length);
    if (this.#scheduled) return;
    this.#scheduled = true;
    setImmediate(flushNow, this);
  }

  /** Payload of the request made last. It is not copied: leave it alone until the request is answered. */
  payload(bytes: Buffer): void {
    if (!this.#corked) {
      this.#corked = true;
      this.socket.cork();
    }
    this.#handHeaders();
    this.socket.write(bytes);
    this.#gatheredBytes += bytes.length;
    if (this.#gatheredBytes >= GATHERED_BYTES_MAX) this.flush();
  }

  flush(): void {
    if (this.socket.destroyed) return;
    this.#handHeaders();
    this.#gatheredBytes = 0;
    if (this.#corked) {
      this.#corked = false;
      this.socket.uncork();
    }
    if (this.socket.writableLength === 0) {
      this.#from = 0;
      this.#to = 0;
    }
  }

  /** Called once per turn. */
  turnEnded(): void {
    this.#scheduled = false;
    this.flush();
  }

  #handHeaders(): void {
    if (this.#from === this.#to) return;
    this.socket.write(this.#slab.subarray(this.#from, this.#to));
    this.#from = this.#to;
  }

  #makeRoom(): void {
    this.flush();
    if (this.#to === 0) return;
    this.#slab = Buffer.allocUnsafeSlow(SLAB_BYTES);
    this.#from = 0;
    this.#to = 0;
  }
}

function flushNow(sender: RequestSender): void {
  sender.turnEnded();
}
