/** The hash by which blocks of different disks are found to be equal: SHA-256 of a block's content, the last one cut at its disk's end. */
import { hash } from 'node:crypto';
import { BLOCK_BYTES } from './blocks.js';

export const HASH_BYTES = 32;

/** Of the blocks that follow one another in `content`, one after the other. */
export function hashBlocks(content: Uint8Array): Uint8Array<ArrayBuffer> {
  const hashes = new Uint8Array(Math.ceil(content.length / BLOCK_BYTES) * HASH_BYTES);
  for (let at = 0, to = 0; at < content.length; at += BLOCK_BYTES, to += HASH_BYTES)
    hashes.set(hash('sha256', content.subarray(at, at + BLOCK_BYTES), 'buffer'), to);
  return hashes;
}

/** Of a whole block of zeros. */
export const ZERO_HASH: Uint8Array = hashBlocks(new Uint8Array(BLOCK_BYTES));
