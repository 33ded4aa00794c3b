/** Compares two disks byte by byte: NBD exports or raw images, in any combination. */

import { readFileSync, realpathSync } from 'node:fs';
import { type FileHandle, open } from 'node:fs/promises';
import { BlockferryError, messageOf } from '../errors.js';
import { NbdClient } from '../nbd/client/client.js';

const CHUNK_BYTES = 1 << 20;
/** Chunks under way at once, on either side. */
const CHUNKS_MAX = 8;
const BLOCK_BYTES = 4096;

export type Comparison =
  | { kind: 'same'; sizeBytes: number }
  | { kind: 'size'; a: number; b: number }
  /** `offset` is the first byte that differs. */
  | { kind: 'content'; offset: number };

interface Side {
  readonly size: number;
  readonly chunkBytes: number;
  read(offset: number, length: number, buffer: Buffer): Promise<void>;
  close(): Promise<void>;
}

/** `a` and `b` are NBD URIs or paths of raw images. `compared` is told the bytes that are done. */
export async function compareDisks(
  a: string,
  b: string,
  compared: (doneBytes: number, sizeBytes: number) => void = () => undefined,
): Promise<Comparison> {
  const left = await openSide(a);
  try {
    const right = await openSide(b);
    try {
      if (left.size !== right.size) return { kind: 'size', a: left.size, b: right.size };
      return await compareSides(left, right, compared);
    } finally {
      await right.close();
    }
  } finally {
    await left.close();
  }
}

async function compareSides(
  left: Side,
  right: Side,
  compared: (doneBytes: number, sizeBytes: number) => void,
): Promise<Comparison> {
  const { size } = left;
  const chunkBytes = Math.min(left.chunkBytes, right.chunkBytes);
  let next = 0;
  let done = 0;
  let first = Number.POSITIVE_INFINITY;
  // Chunks are taken in order, so once one differs no lower one is left untaken.
  const worker = async (): Promise<void> => {
    const mine = Buffer.allocUnsafe(chunkBytes);
    const theirs = Buffer.allocUnsafe(chunkBytes);
    while (next < size && first === Number.POSITIVE_INFINITY) {
      const offset = next;
      const length = Math.min(chunkBytes, size - offset);
      next += length;
      await Promise.all([left.read(offset, length, mine), right.read(offset, length, theirs)]);
      const at = firstDifference(mine, theirs, length);
      if (at >= 0) first = Math.min(first, offset + at);
      done += length;
      compared(done, size);
    }
  };
  await Promise.all(Array.from({ length: CHUNKS_MAX }, worker));
  return first === Number.POSITIVE_INFINITY
    ? { kind: 'same', sizeBytes: size }
    : { kind: 'content', offset: first };
}

/** Index of the first byte that differs, -1 if none does. */
function firstDifference(a: Buffer, b: Buffer, length: number): number {
  if (a.compare(b, 0, length, 0, length) === 0) return -1;
  for (let block = 0; block < length; block += BLOCK_BYTES) {
    const end = Math.min(block + BLOCK_BYTES, length);
    if (a.compare(b, block, end, block, end) === 0) continue;
    for (let index = block; index < end; index += 1) if (a[index] !== b[index]) return index;
  }
  return -1;
}

function openSide(text: string): Promise<Side> {
  return /^nbds?(\+unix|\+vsock)?:\/\//.test(text) ? openExport(text) : openImage(text);
}

async function openExport(uri: string): Promise<Side> {
  const client = await NbdClient.connect(uri);
  return {
    size: client.info.size,
    chunkBytes: Math.min(CHUNK_BYTES, client.payloadBytesMax),
    read: (offset, length, buffer) => client.read(offset, length, buffer),
    close: () => client.close(),
  };
}

async function openImage(path: string): Promise<Side> {
  let file: FileHandle;
  try {
    file = await open(path, 'r');
  } catch (error) {
    const code = (error as NodeJS.ErrnoException).code === 'ENOENT' ? 'image-missing' : 'image-io';
    throw new BlockferryError(code, `cannot open ${path}: ${messageOf(error)}`, { cause: error });
  }
  const stat = await file.stat();
  if (!stat.isFile() && !stat.isBlockDevice()) {
    await file.close();
    throw new BlockferryError('image-io', `${path} is neither a file nor a block device`);
  }
  const size = stat.isBlockDevice() ? blockDeviceSize(path) : stat.size;
  const read = async (offset: number, length: number, buffer: Buffer): Promise<void> => {
    let got = 0;
    while (got < length) {
      const { bytesRead } = await file.read(buffer, got, length - got, offset + got);
      if (bytesRead === 0)
        throw new BlockferryError('image-io', `${path} ended at ${offset + got} while it was read`);
      got += bytesRead;
    }
  };
  return { size, chunkBytes: CHUNK_BYTES, read, close: () => file.close() };
}

/** stat says 0 of a block device; the kernel tells its size in sectors of 512 bytes. */
function blockDeviceSize(path: string): number {
  const name = realpathSync(path).split('/').at(-1) ?? '';
  return Number(readFileSync(`/sys/class/block/${name}/size`, 'utf8')) * 512;
}
