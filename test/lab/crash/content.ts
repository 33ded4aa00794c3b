/**
 * What is on the disk: every write has a tag, and every four bytes tell the tag that wrote them and where they belong, so that a
 * lost, stale, torn or misplaced block is seen and named. No byte is zero: zeros are only what was zeroed.
 */
import { mix } from './random.js';

/** The tag of what the source holds from the start. */
export const SOURCE_TAG = 0;

function word(tag: number, index: number): number {
  return (mix(Math.imul(tag + 1, 0x85ebca6b) ^ mix(index)) | 0x01010101) >>> 0;
}

/** `length` bytes that tag `tag` puts at `offset`. */
export function contentOf(tag: number, offset: number, length: number): Buffer {
  const first = Math.floor(offset / 4);
  const words = new Uint32Array(Math.ceil((offset + length) / 4) - first);
  for (let i = 0; i < words.length; i++) words[i] = word(tag, first + i);
  const skip = offset - first * 4;
  return Buffer.from(words.buffer, skip, length);
}

/** Names what lies at `offset`: for messages. `tags`: how many there were so far. */
export function nameContent(bytes: Buffer, offset: number, tags: number): string {
  if (bytes.subarray(0, 8).every((byte) => byte === 0)) return 'zeros';
  const skip = (4 - (offset % 4)) % 4;
  if (bytes.length < skip + 4) return `bytes ${bytes.subarray(0, 16).toString('hex')}`;
  const found = bytes.readUInt32LE(skip);
  const index = (offset + skip) / 4;
  for (let tag = 0; tag <= tags; tag++) {
    if (word(tag, index) === found) return tag === SOURCE_TAG ? "the source's content" : `write ${tag}`;
  }
  return `nothing that was written there (${bytes.subarray(0, 16).toString('hex')})`;
}
