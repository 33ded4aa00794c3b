/** Bytes of a block, the unit of presence. */
export const BLOCK_BYTES = 4096;
/** Blocks of a region, 256 KiB: what waits and what is in flight is found by region. */
export const REGION_BLOCKS = 64;
/** Largest volume: block numbers stay within 32 bits, so that bitmap arithmetic is exact and fast. */
export const VOLUME_BYTES_MAX = 2 ** 32 * BLOCK_BYTES;

/** How many blocks `size` bytes take; the last one may be cut short. */
export function blocksOf(size: number): number {
  return Math.ceil(size / BLOCK_BYTES);
}

export function blockAt(offset: number): number {
  return Math.floor(offset / BLOCK_BYTES);
}

/** Bytes of the blocks [first, end) of a volume of `size` bytes. */
export function bytesOfBlocks(first: number, end: number, size: number): number {
  return Math.min(end * BLOCK_BYTES, size) - first * BLOCK_BYTES;
}
