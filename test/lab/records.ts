/**
 * The guest's records, as test/lab/guest/workload.c defines them: one 4 KiB block each, which follows from (slot, sequence). The host
 * makes the initial ones (sequence 0), and checks an image afterwards against the digest that the guest printed.
 */

import { execFile } from 'node:child_process';
import { mkdtemp, open, rm, truncate } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);

export const RECORD_BYTES = 4096;
const WORDS = RECORD_BYTES / 4;
const BODY = 8;
const MAGIC0 = 0x45524642; // "BFRE"
const MAGIC1 = 0x44524f43; // "CORD"
const HASH_START = 0x811c9dc5;
const HASH_PRIME = 0x01000193;
const CHUNK_RECORDS = 256;

function hashWord(hash: number, word: number): number {
  return Math.imul(hash ^ word, HASH_PRIME);
}

function recordHash(words: Uint32Array, at: number): number {
  let hash = HASH_START;
  for (let i = 0; i < WORDS; i++) {
    if (i !== 4) hash = hashWord(hash, words[at + i]!);
  }
  return hash >>> 0;
}

/** Writes the record of (slot, sequence) into `words` from word `at` on. */
export function makeRecord(words: Uint32Array, at: number, slot: number, sequence: number): void {
  words[at] = MAGIC0;
  words[at + 1] = MAGIC1;
  words[at + 2] = slot;
  words[at + 3] = sequence;
  words.fill(0, at + 5, at + BODY);
  let x = Math.imul(slot, 0x9e3779b1) ^ Math.imul(sequence, 0x85ebca6b) ^ 0x2545f491;
  if (x === 0) x = 1;
  for (let i = BODY; i < WORDS; i++) {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    words[at + i] = x;
  }
  words[at + 4] = recordHash(words, at);
}

/** Writes `slots` records of sequence 0 from byte 0 of a file on; the record at `index` is that of slot `slotOf(index)`. */
export async function writeInitialRecords(
  path: string,
  slots: number,
  slotOf: (index: number) => number = (index) => index,
): Promise<void> {
  const file = await open(path, 'r+');
  try {
    const words = new Uint32Array(CHUNK_RECORDS * WORDS);
    for (let first = 0; first < slots; first += CHUNK_RECORDS) {
      const count = Math.min(CHUNK_RECORDS, slots - first);
      for (let i = 0; i < count; i++) makeRecord(words, i * WORDS, slotOf(first + i), 0);
      await file.write(
        Buffer.from(words.buffer, 0, count * RECORD_BYTES),
        0,
        count * RECORD_BYTES,
        first * RECORD_BYTES,
      );
    }
  } finally {
    await file.close();
  }
}

async function createSparse(path: string, sizeBytes: number): Promise<void> {
  await (await open(path, 'w')).close();
  await truncate(path, sizeBytes);
}

/** A raw disk of `sizeBytes` whose first `slots` blocks are initial records; the rest is a hole. For bf.mode=raw. */
export async function createRawDisk(path: string, sizeBytes: number, slots: number): Promise<void> {
  if (slots * RECORD_BYTES > sizeBytes)
    throw new Error(`${slots} records do not fit into ${sizeBytes} bytes`);
  await createSparse(path, sizeBytes);
  await writeInitialRecords(path, slots);
}

/** A disk of `sizeBytes` with an ext4 file system that holds `slots` initial records in `files` files. For bf.mode=ext4. */
export async function createExt4Disk(
  path: string,
  sizeBytes: number,
  slots: number,
  files = 1,
): Promise<void> {
  const content = await mkdtemp(join(dirname(path), 'records-'));
  try {
    for (let file = 0; file < files; file++) {
      const inFile = Math.floor((slots - file + files - 1) / files);
      const records = join(content, `records${file}`);
      await createSparse(records, inFile * RECORD_BYTES);
      await writeInitialRecords(records, inFile, (index) => index * files + file);
    }
    await createSparse(path, sizeBytes);
    // Nothing is left for the guest's kernel to initialise in the background: what is written is the workload's.
    const extended = 'lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0';
    await run('/sbin/mkfs.ext4', ['-q', '-F', '-b', '4096', '-E', extended, '-d', content, path]);
  } finally {
    await rm(content, { recursive: true, force: true });
  }
}

export interface RecordCheck {
  /** Slots whose block is not an intact record of that slot. At most 20 are named. */
  bad: number;
  badSlots: number[];
  /** As the guest prints it: 8 hexadecimal digits over the sequences of all slots. */
  digest: string;
}

/** Reads every record of a raw-mode disk. */
export async function checkRawDisk(path: string, slots: number): Promise<RecordCheck> {
  const file = await open(path, 'r');
  try {
    const words = new Uint32Array(CHUNK_RECORDS * WORDS);
    const bytes = Buffer.from(words.buffer);
    const badSlots: number[] = [];
    let bad = 0;
    let digest = HASH_START;
    for (let first = 0; first < slots; first += CHUNK_RECORDS) {
      const count = Math.min(CHUNK_RECORDS, slots - first);
      words.fill(0);
      await file.read(bytes, 0, count * RECORD_BYTES, first * RECORD_BYTES);
      for (let i = 0; i < count; i++) {
        const at = i * WORDS;
        const intact =
          words[at] === MAGIC0 &&
          words[at + 1] === MAGIC1 &&
          words[at + 2] === first + i &&
          words[at + 4] === recordHash(words, at);
        if (!intact && bad++ < 20) badSlots.push(first + i);
        digest = hashWord(digest, words[at + 3]!);
      }
    }
    return { bad, badSlots, digest: (digest >>> 0).toString(16).padStart(8, '0') };
  } finally {
    await file.close();
  }
}
