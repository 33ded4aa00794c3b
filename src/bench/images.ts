/** Images to serve, where they are kept, whether they are in the page cache, and in which memory. */

import { execFile } from 'node:child_process';
import { createCipheriv } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { type FileHandle, open, statfs } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { BlockferryError } from '../errors.js';
import { punchHole, systemError, writeAsync } from '../native/index.js';

/** 'cache': on a disk, and in the page cache; 'cold': on a disk, dropped from the page cache before each load. */
export type Placement = 'cache' | 'tmpfs' | 'cold';

/** Type of a tmpfs. Source: statfs(2). */
const TMPFS_MAGIC = 0x01021994;
const TMPFS = '/dev/shm';
/** Images are a multiple of it. */
export const IMAGE_UNIT_BYTES = 4 << 20;
/** Room that must be there by room that is needed. */
const ROOM = 1.1;
const ENDING = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;
/** Pages that may stay: some of them may be on their way to the disk. */
const COLD_SHARE_MAX = 0.01;
const DROP_TRIES = 20;
const DROP_RETRY_MS = 50;

const run = promisify(execFile);

/**
 * Calls `use` with a new folder for images, and removes it afterwards, also when a signal ends this process. `disk` is the folder
 * where those are kept that are to be on a disk (default: the system's for temporary files).
 */
export async function withImageFolder<Result>(
  placement: Placement,
  disk: string | undefined,
  needBytes: number,
  use: (folder: string) => Promise<Result>,
): Promise<Result> {
  const folder = await imageFolder(placement, disk, needBytes);
  const remove = (): void => rmSync(folder, { recursive: true, force: true });
  const ended = (signal: NodeJS.Signals): void => {
    remove();
    // The handler is gone by now: this ends the process, and with it the servers.
    process.kill(process.pid, signal);
  };
  for (const signal of ENDING) process.once(signal, ended);
  try {
    return await use(folder);
  } finally {
    for (const signal of ENDING) process.off(signal, ended);
    remove();
  }
}

async function imageFolder(
  placement: Placement,
  disk: string | undefined,
  needBytes: number,
): Promise<string> {
  const parent = placement === 'tmpfs' ? TMPFS : (disk ?? tmpdir());
  const { type, bavail, bsize } = await statfs(parent);
  if (placement !== 'tmpfs' && type === TMPFS_MAGIC)
    throw new BlockferryError('bench', `${parent} is a tmpfs: say with --folder where a disk is mounted`);
  if (placement === 'tmpfs' && type !== TMPFS_MAGIC)
    throw new BlockferryError('bench', `${TMPFS} is no tmpfs`);
  if (bavail * bsize < needBytes * ROOM)
    throw new BlockferryError(
      'no-space',
      `${parent} has too little room for images of ${needBytes} bytes in all: make --image smaller`,
    );
  return mkdtempSync(join(parent, 'bf-bench-'));
}

/** What every image holds: pseudo-random bytes, always the same. */
function* contentOf(bytes: number): Generator<Buffer> {
  const stream = createCipheriv('aes-128-ctr', Buffer.alloc(16, 1), Buffer.alloc(16, 2));
  const zeros = Buffer.alloc(IMAGE_UNIT_BYTES);
  for (let at = 0; at < bytes; at += IMAGE_UNIT_BYTES) yield stream.update(zeros);
}

/** Writes an image, and makes it durable. */
export async function makeImage(path: string, bytes: number): Promise<void> {
  const file = await open(path, 'wx');
  try {
    let at = 0;
    for (const piece of contentOf(bytes)) {
      await file.write(piece, 0, piece.length, at);
      at += piece.length;
    }
    await file.sync();
  } finally {
    await file.close();
  }
}

/** What was written is on the disk, and will not be written there while another server is measured. */
export async function settle(path: string): Promise<void> {
  const file = await open(path, 'r+');
  try {
    await file.datasync();
  } finally {
    await file.close();
  }
}

/** Share of a file that is in the page cache, 0..1. */
export async function residentShare(path: string): Promise<number> {
  const { stdout } = await run('fincore', ['--bytes', '--noheadings', '--raw', '--output', 'RES,SIZE', path]);
  const [resident, size] = stdout.trim().split(/\s+/).map(Number);
  return resident / size;
}

/** Takes a file out of the page cache (posix_fadvise DONTNEED, by dd) and looks whether it is out. */
export async function dropFromCache(path: string): Promise<void> {
  for (let tries = 0; tries < DROP_TRIES; tries++) {
    await run('dd', [`of=${path}`, 'oflag=nocache', 'conv=notrunc,fdatasync', 'count=0', 'status=none']);
    if ((await residentShare(path)) <= COLD_SHARE_MAX) return;
    await new Promise((resolve) => setTimeout(resolve, DROP_RETRY_MS));
  }
  throw new BlockferryError(
    'bench',
    `${path} stays in the page cache: nothing on this disk can be measured cold, or given other memory`,
  );
}

/**
 * Gives the images other pages of memory: all give theirs back, then take new ones, piece by piece in turn, beginning with another image
 * each round. On a virtual machine the pages in which an image lies decide how fast it is read, for as long as it exists, and would let a
 * server win or lose by luck. Servers have the images open, and must be idle. What was written to an image on tmpfs is gone.
 */
export async function renewMemory(
  images: readonly string[],
  bytes: number,
  placement: Placement,
  round: number,
): Promise<void> {
  // Dropped before each load as it is.
  if (placement === 'cold') return;
  const files: FileHandle[] = [];
  try {
    for (const image of images) files.push(await open(image, 'r+'));
    if (placement === 'tmpfs') return await writeAnew(files, bytes, round);
    for (const image of images) await dropFromCache(image);
    await readAnew(files, bytes, round);
  } finally {
    for (const file of files) await file.close();
  }
}

async function writeAnew(files: readonly FileHandle[], bytes: number, round: number): Promise<void> {
  for (const { fd } of files) succeeded('fallocate', await punchHole(fd, 0, bytes));
  let at = 0;
  for (const piece of contentOf(bytes)) {
    for (const { fd } of inTurn(files, round + at / IMAGE_UNIT_BYTES))
      succeeded('pwrite', await writeAsync(fd, piece, 0, piece.length, at));
    at += piece.length;
  }
}

async function readAnew(files: readonly FileHandle[], bytes: number, round: number): Promise<void> {
  const piece = Buffer.alloc(IMAGE_UNIT_BYTES);
  for (let at = 0; at < bytes; at += piece.length)
    for (const file of inTurn(files, round + at / IMAGE_UNIT_BYTES))
      await file.read(piece, 0, piece.length, at);
}

function inTurn<Item>(items: readonly Item[], turn: number): Item[] {
  const first = turn % items.length;
  return [...items.slice(first), ...items.slice(0, first)];
}

function succeeded(syscall: string, result: number): void {
  if (result < 0) throw systemError(syscall, result);
}
