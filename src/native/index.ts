/**
 * The system calls Node lacks, and scans of bitmaps (native/src). The hot ones are the addon's own
 * functions, without a wrapper around them.
 *
 * Conventions: `fd` is an open descriptor that the caller keeps open until the answer is there. Offsets
 * and lengths are bytes, whole numbers from 0 to 2^53 - 1. `buffer, at, length` is the part [at, at +
 * length) of a Uint8Array; out of the array is a RangeError, anything else that is wrong with an argument
 * a RangeError or TypeError. What the kernel refuses is no exception on the data path: those functions
 * answer a count or offset >= 0, or -errno (ERRNO, `systemError`). Calls that a signal interrupted are
 * repeated.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { constants } from 'node:os';
import { join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { getSystemErrorName } from 'node:util';
import { markAsUntransferable } from 'node:worker_threads';
import { BlockferryError, messageOf } from '../errors.js';

/** Errno values by name, as the functions here answer them negated. */
export const ERRNO = constants.errno;

declare const readerBrand: unique symbol;
/** A queue of reads that wait for the disk; lives as long as its thread. */
export interface Reader {
  readonly [readerBrand]: true;
}

interface Addon {
  pread(fd: number, buffer: Uint8Array, at: number, length: number, offset: number, nowait: boolean): number;
  pwrite(fd: number, buffer: Uint8Array, at: number, length: number, offset: number): number;
  readAsync(fd: number, buffer: Uint8Array, at: number, length: number, offset: number): Promise<number>;
  writeAsync(fd: number, buffer: Uint8Array, at: number, length: number, offset: number): Promise<number>;
  openReader(entries: number, results: Int32Array, ended: (count: number) => void): Reader | number;
  queueRead(
    reader: Reader,
    slot: number,
    fd: number,
    buffer: Uint8Array,
    at: number,
    length: number,
    offset: number,
    elsewhere: boolean,
  ): number;
  beginReads(reader: Reader): number;
  punchHole(fd: number, offset: number, length: number): Promise<number>;
  zeroRange(fd: number, offset: number, length: number, keepHole: boolean): Promise<number>;
  zeroFast(fd: number, offset: number, length: number, keepHole: boolean): Promise<number>;
  allocate(fd: number, offset: number, length: number): Promise<number>;
  fdatasync(fd: number): Promise<number>;
  seekData(fd: number, offset: number): number;
  seekHole(fd: number, offset: number): number;
  seekEnd(fd: number): number;
  peerGone(fd: number): number;
  send(fd: number, buffer: Uint8Array, at: number, length: number, more: boolean): number;
  receivePayload(fd: number, buffer: Uint8Array, at: number, length: number, turnUs: number): number;
  exchange(
    job: Float64Array,
    input: Uint8Array,
    output: Uint8Array,
    present: Uint8Array | null,
    heat?: Uint8Array | null,
    dirty?: Uint8Array | null,
  ): number;
  sendBuffer(fd: number, bytes: number): number;
  lockFile(fd: number, exclusive: boolean): number;
  mapShared(fd: number, length: number): Uint8Array | number;
  unmap(view: Uint8Array): void;
  dup(fd: number): number;
  closeFd(fd: number): number;
  socketPair(): [number, number] | number;
  countOnes(map: Uint8Array, from: number, to: number): number;
  nextZero(map: Uint8Array, from: number, to: number): number;
  nextOne(map: Uint8Array, from: number, to: number): number;
  setRange(map: Uint8Array, from: number, to: number): number;
  clearRange(map: Uint8Array, from: number, to: number): number;
  orInto(map: Uint8Array, other: Uint8Array): void;
}

/** This file runs from dist/src/native; straight from src/native under a loader of TypeScript. */
export function packageRoot(): string {
  const here = fileURLToPath(new URL('.', import.meta.url));
  const roots = [resolve(here, '../../..'), resolve(here, '../..')];
  return roots.find((root) => existsSync(join(root, 'native/binding.gyp'))) ?? roots[0];
}

function load(): Addon {
  const root = packageRoot();
  // Another build of it, for tests: test/fuzz/sanitizers.ts.
  const file = process.env.BLOCKFERRY_ADDON ?? join(root, 'native/build/Release/blockferry.node');
  const remedy = `build it: cd '${root}' && npm run install`;
  if (!existsSync(file))
    throw new BlockferryError('not-found', `the native addon ${file} is missing; ${remedy}`);
  try {
    return createRequire(import.meta.url)(file) as Addon;
  } catch (cause) {
    const why = messageOf(cause).split('\n')[0];
    throw new BlockferryError('not-found', `the native addon cannot be loaded (${why}); ${remedy}`, {
      cause,
    });
  }
}

const addon = load();

/**
 * The error of a call that answered `result` = -errno: `code` ('ENOSPC'), `errno` (negative) and `syscall`
 * as Node's own have them.
 */
export function systemError(syscall: string, result: number): NodeJS.ErrnoException {
  const code = getSystemErrorName(result);
  return Object.assign(new Error(`${syscall} failed: ${code}`), { code, errno: result, syscall });
}

/**
 * Reads once at `offset` -> bytes read, fewer than `length` where the file ends (0 behind the end) or the
 * kernel stops, or -errno. `nowait` reads only what is in the page cache (preadv2 with RWF_NOWAIT): what
 * is not gives a short count or -EAGAIN; -EOPNOTSUPP where the file system does not know the flag.
 */
export const pread = addon.pread;

/** Writes all of it at `offset` -> `length`, or -errno; after an error a part may have been written. */
export const pwrite = addon.pwrite;

/**
 * Reads on libuv's pool until `length` or the end of the file -> bytes read, or -errno. The memory belongs
 * to the call until the answer: it must not be transferred away meanwhile, and cannot be of `mapShared`
 * (TypeError).
 */
export const readAsync = addon.readAsync;

/** `pwrite` on libuv's pool; the memory as with `readAsync`. */
export const writeAsync = addon.writeAsync;

/**
 * Opens a queue of at most `entries` (1 to 4096) reads at a time, on io_uring -> the queue, or -errno where the system has none for
 * us. When reads have ended, `ended` is called with their number, 64 at most, and `results` (128 or more) holds the slot and the
 * result of each: bytes read, fewer than asked for where the file ends or for no reason, or -errno; -EAGAIN means that this file
 * must be read in another way.
 */
export const openReader = addon.openReader;

/**
 * Puts a read into the queue, under a number of the caller's -> 0, or -EAGAIN if there is no place for it. It begins with the next
 * `beginReads`. The memory must be kept, by the caller, until it has ended, and must not be transferred away nor be of `mapShared`.
 * `elsewhere`: let a thread of the kernel's copy the data.
 */
export const queueRead = addon.queueRead;

/** Begins all reads of the queue -> how many could not begin, for want of memory: to be called again for them. */
export const beginReads = addon.beginReads;

/**
 * Gives the range back to the file system; it reads as zeros then, and the file keeps its size -> 0, or
 * -errno: -EOPNOTSUPP where holes are not known, and then nothing has changed. Block devices give back
 * whole blocks of a page; the rest of the range is written with zeros. On libuv's pool.
 */
export const punchHole = addon.punchHole;

/**
 * Makes the range, which must be within the file, read as zeros -> 0, or -errno. With `keepHole` the range
 * may become a hole; without, it has its space reserved afterwards. Uses what the file system or device
 * can do best, and writes zeros where it can do nothing. On libuv's pool.
 */
export const zeroRange = addon.zeroRange;

/**
 * As `zeroRange`, but never by writing: -EOPNOTSUPP, and nothing has changed, where the file system or device cannot do it without.
 * (A block device may be zeroed by its driver, which writes: `write_zeroes_max_bytes` of its queue tells.)
 */
export const zeroFast = addon.zeroFast;

/**
 * Reserves the space of the range, leaving its data as it is, and grows the file to its end -> 0, or
 * -errno; -EOPNOTSUPP where the file system cannot. (glibc's posix_fallocate would write there, and may
 * lose what others write at that time.) Block devices have their space: -ENOSPC behind their end. On
 * libuv's pool.
 */
export const allocate = addon.allocate;

/** Data and what is needed to find it again are on stable storage -> 0, or -errno. On libuv's pool. */
export const fdatasync = addon.fdatasync;

/**
 * Start of the next data at or behind `offset`, or -errno; -ENXIO if there is none. Block devices are all
 * data.
 */
export const seekData = addon.seekData;

/**
 * Start of the next hole at or behind `offset` (the end of the file counts as one), or -errno; -ENXIO from
 * the end on.
 */
export const seekHole = addon.seekHole;

/**
 * Size of a file or block device in bytes, or -errno. Moves the descriptor's position, which nothing here
 * uses.
 */
export const seekEnd = addon.seekEnd;

/** 1 if the other end of a socket sends no more (though bytes may be unread), 0 if it may, or -errno. */
export const peerGone = addon.peerGone;

/**
 * Sends what a socket takes at once -> bytes, or -errno: -EAGAIN for none, -EPIPE (and no signal) if its other end is gone. `more`: the
 * rest of a packet follows at once.
 */
export const send = addon.send;

/**
 * Receives what is on its way, until there are `length` bytes -> how many came: fewer if nothing came for a millisecond, if the event loop has
 * other work, after `turnUs` microseconds in all, or if the connection ended or broke, which the socket's stream learns by itself.
 */
export const receivePayload = addon.receivePayload;

/**
 * Carries out the requests of a session that are in `input` and need nothing but the image, sends their answers, and goes on with what it
 * receives (native/src/exchange.h) -> why it ended (`Ending`). `job`: see nbd/server/exchange.ts, which knows its places and when it may
 * be called. `present`: one bit a block of 4 KiB, null: all are. `heat`: where requests are counted (native/src/heat.h). In place; nothing is
 * kept.
 */
export const exchange = addon.exchange;

/**
 * Lets a socket take `bytes` before its other end has read them, or as many as this user is allowed (net.core.wmem_max) -> 0, or
 * -errno.
 */
export const sendBuffer = addon.sendBuffer;

/**
 * How many bits of [from, to) are 1. Here and below bit i is bit i & 7 of byte i >> 3, least significant first.
 */
export const countOnes = addon.countOnes;

/** The first 0 bit of [from, to), or `to`. */
export const nextZero = addon.nextZero;

/** The first 1 bit of [from, to), or `to`. */
export const nextOne = addon.nextOne;

/** Makes all bits of [from, to) 1 -> how many were 0. Writes nothing if none was. */
export const setRange = addon.setRange;

/** Makes all bits of [from, to) 0 -> how many were 1. Writes nothing if none was. */
export const clearRange = addon.clearRange;

/**
 * Takes a lock on the whole file for the open file description of `fd` (F_OFD_SETLK): until its last
 * duplicate is closed, however many others open and close the file. Can be repeated, also to change
 * between exclusive and shared -> false if somebody else's lock is in the way. @throws systemError: EBADF
 * if the lock is exclusive and `fd` not writable.
 */
export function lockFile(fd: number, exclusive: boolean): boolean {
  return checked('fcntl', addon.lockFile(fd, exclusive)) === 1;
}

/**
 * The first `length` bytes (1 to 2^31) of a file, mapped shared and writable; unmapped by `unmap`, or when
 * it is collected. The file must not be truncated meanwhile, and its space should be reserved before
 * (`allocate`): the kernel answers access to what it cannot provide with SIGBUS, which ends the process.
 * @throws systemError: EOVERFLOW if the file is shorter, EACCES if `fd` is not open for both.
 */
export function mapShared(fd: number, length: number): Uint8Array {
  const view = addon.mapShared(fd, length);
  if (typeof view === 'number') throw systemError('mmap', view);
  // On another thread it would outlive what unmaps it here.
  markAsUntransferable(view.buffer);
  return view;
}

/**
 * Ends a mapping at once: the view, and all others of its ArrayBuffer, have length 0 then. Does nothing
 * the second time.
 */
export const unmap = addon.unmap;

/** Another descriptor of the same open file description, close-on-exec. @throws systemError */
export function dup(fd: number): number {
  return checked('fcntl', addon.dup(fd));
}

/** @throws systemError; the descriptor is gone all the same, unless it was none (EBADF). */
export function closeFd(fd: number): void {
  checked('close', addon.closeFd(fd));
}

/** Two connected unix stream sockets, close-on-exec, blocking. @throws systemError */
export function socketPair(): [number, number] {
  const pair = addon.socketPair();
  if (typeof pair === 'number') throw systemError('socketpair', pair);
  return pair;
}

function checked(syscall: string, result: number): number {
  if (result < 0) throw systemError(syscall, result);
  return result;
}

/** Sets in `map` every bit that is set in `other`, a bitmap of the same length. */
export const orInto = addon.orInto;
