/**
 * Memory of the transmission phase: slabs by size class, reused.
 *
 *     | HEAD_ROOM | payload, a power of two of 4 KiB .. 1 MiB |        larger payloads: exactly their size, not pooled
 *      ^ reply header, right before the payload, so that both leave in one piece
 *
 * A slab is with exactly one owner (a request, a batch of output, or the pool), which counts `references` if it hands it
 * out in parts.
 */

/** Bytes before the payload: room for the longest reply header that precedes one (40, of extended headers), rounded up. */
export const HEAD_ROOM = 64;

const CLASS_BITS_MIN = 12;
const CLASS_BITS_MAX = 20;
/** Most bytes that lie unused in one pool; what comes back beyond that is left to the garbage collector. */
const POOLED_BYTES_MAX = 32 << 20;
const UNPOOLED = -1;

export class Slab {
  /** Writes to the socket that still use a part of it. Counted by the output. */
  references = 0;
  constructor(
    readonly buffer: Buffer,
    /** Index of its free list, or UNPOOLED. */
    readonly sizeClass: number,
  ) {}
}

export class SlabPool {
  readonly #free: Slab[][] = Array.from({ length: CLASS_BITS_MAX - CLASS_BITS_MIN + 1 }, () => []);
  #pooledBytes = 0;

  /** Bytes lying unused. */
  get pooledBytes(): number {
    return this.#pooledBytes;
  }

  /** A slab whose payload part holds at least `payloadBytes`. Its content is whatever was there before. */
  take(payloadBytes: number): Slab {
    if (payloadBytes > 1 << CLASS_BITS_MAX) {
      return new Slab(Buffer.allocUnsafeSlow(HEAD_ROOM + payloadBytes), UNPOOLED);
    }
    const bits = payloadBytes <= 1 << CLASS_BITS_MIN ? CLASS_BITS_MIN : 32 - Math.clz32(payloadBytes - 1);
    const sizeClass = bits - CLASS_BITS_MIN;
    const slab = this.#free[sizeClass]!.pop();
    if (slab === undefined) return new Slab(Buffer.allocUnsafeSlow(HEAD_ROOM + (1 << bits)), sizeClass);
    this.#pooledBytes -= slab.buffer.length;
    return slab;
  }

  give(slab: Slab): void {
    if (slab.sizeClass === UNPOOLED) return;
    if (this.#pooledBytes + slab.buffer.length > POOLED_BYTES_MAX) return;
    this.#pooledBytes += slab.buffer.length;
    this.#free[slab.sizeClass]!.push(slab);
  }
}
