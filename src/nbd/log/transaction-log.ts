/**
 * The transaction log of one export: a file in nbd-server's format, for nbd-trdump and nbd-trplay. All sessions of the export write it,
 * each through its Recorder, which decides what a request leaves in it.
 *
 * Invariants
 * - Records are whole, and lie in the file in the order in which they were appended. Nobody else writes the file (it is locked); what a
 *   killed daemon left of a record is cut off before anything follows it.
 * - A change is appended in the very step in which it took effect, before anything else can change the same bytes (IoRequest.changed).
 *   Changes lie in the file in the order that the image saw, so that playing them back in that order gives the image, whatever requests
 *   overlapped and however long they took.
 * - No answer leaves before what it answers is in the file (`isWritten`): a daemon that is killed has answered nothing that the log lacks.
 *   Only what was not answered may be in the image and not in the log. The file is made durable at its end, not with every flush.
 * - Writing never blocks the thread. One write is under way at a time; what comes meanwhile gathers for the next. When more than
 *   BUFFERED_BYTES_MAX have gathered the log is `full`: sessions begin no more requests, and stop reading.
 * - Nothing is left out silently. A log that cannot be written ends for good, at its last whole record: a log with a gap would play back
 *   to an image that never was. It says so once in the daemon's log, and in `failure` from then on; serving goes on without it, because a
 *   machine's disk is worth more than its log.
 */
import { closeSync, constants, fstatSync, ftruncateSync, openSync, writeSync, writev } from 'node:fs';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../../errors.js';
import { fdatasync, lockFile, systemError } from '../../native/index.js';
import {
  encodeDataSwitch,
  encodeReplyRecord,
  encodeRequestRecord,
  REPLY_RECORD_BYTES,
  REQUEST_RECORD_BYTES,
} from '../codec/transaction-log.js';
import { wholeRecordsEnd } from './tail.js';

/** More that was not written yet makes the log full, bytes. */
export const BUFFERED_BYTES_MAX = 32 << 20;
const CHUNK_BYTES = 256 << 10;
const SPARE_CHUNKS_MAX = 16;

export interface TransactionLogSettings {
  path: string;
  /** With what was written, so that it can be played back; otherwise headers only. */
  data: boolean;
}

/** A session that waits for the log: told once, when more was written or the log failed. */
export interface LogWaiter {
  logWentOn(): void;
}

interface Chunk {
  readonly bytes: Buffer;
  used: number;
}

export class TransactionLog {
  /** Why nothing is recorded any more, if so. */
  failure: BlockferryError | null = null;

  /** Bytes since the opening: appended, given to the kernel or on the way there, and in the file. */
  #appended = 0;
  #issued = 0;
  #written = 0;

  #chunks: Chunk[] = [];
  readonly #spare: Chunk[] = [];
  #waiters = new Set<LogWaiter>();
  #connections = 0;
  #writing = false;
  #scheduled = false;
  #onIdle: (() => void) | null = null;
  #closed = false;

  private constructor(
    private readonly fd: number,
    readonly path: string,
    readonly withData: boolean,
    /** The file's size when it was opened, bytes. */
    private readonly startBytes: number,
    private readonly log: Logger,
  ) {}

  /**
   * Opens a log to go on with, or creates it for its owner only. Throws 'transaction-log': it cannot be opened or written, is another
   * program's at the moment, or holds something else.
   */
  static open({ path, data }: TransactionLogSettings, log: Logger): TransactionLog {
    let fd: number;
    try {
      const { O_RDWR, O_CREAT, O_APPEND, O_NONBLOCK } = constants; // O_NONBLOCK: opening a named pipe would wait for its other end
      fd = openSync(path, O_RDWR | O_CREAT | O_APPEND | O_NONBLOCK, 0o600);
    } catch (cause) {
      throw refusal(`cannot open the transaction log ${path}: ${messageOf(cause)}`, cause);
    }
    try {
      const begun = prepare(fd, path, log);
      const start = encodeDataSwitch(data);
      if (writeSync(fd, start) !== start.length) throw new Error('no space left');
      return new TransactionLog(fd, path, data, begun + start.length, log);
    } catch (cause) {
      closeSync(fd);
      if (cause instanceof BlockferryError) throw cause;
      throw refusal(`cannot write the transaction log ${path}: ${messageOf(cause)}`, cause);
    }
  }

  /** A number for a connection, unique in this log since it was opened: 1, 2, ... */
  nextConnection(): number {
    this.#connections = (this.#connections + 1) >>> 0;
    return this.#connections;
  }

  /** Where the next record will begin: bytes since the opening. */
  get end(): number {
    return this.#appended;
  }

  /** Whether all up to `end` is in the file; true also when that will never be. */
  isWritten(end: number): boolean {
    return this.#written >= end || this.#over;
  }

  get full(): boolean {
    return this.#appended - this.#written > BUFFERED_BYTES_MAX && !this.#over;
  }

  get #over(): boolean {
    return this.failure !== null || this.#closed;
  }

  /** `hi` and `lo`: the handle; the rest as `encodeRequestRecord` has it. */
  request(flags: number, command: number, hi: number, lo: number, offset: number, length: number): void {
    if (this.#over) return;
    const chunk = this.#room(REQUEST_RECORD_BYTES);
    encodeRequestRecord(chunk.bytes, chunk.used, flags, command, hi, lo, offset, length);
    this.#took(chunk, REQUEST_RECORD_BYTES);
  }

  /** The payload of the WRITE that was recorded just before: buffer[at, at + length). */
  payload(buffer: Buffer, at: number, length: number): void {
    if (this.#over) return;
    for (let from = at; from < at + length; ) {
      const chunk = this.#room(1);
      const count = Math.min(at + length - from, CHUNK_BYTES - chunk.used);
      buffer.copy(chunk.bytes, chunk.used, from, from + count);
      this.#took(chunk, count);
      from += count;
    }
  }

  reply(hi: number, lo: number, errno: number): void {
    if (this.#over) return;
    const chunk = this.#room(REPLY_RECORD_BYTES);
    encodeReplyRecord(chunk.bytes, chunk.used, hi, lo, errno);
    this.#took(chunk, REPLY_RECORD_BYTES);
  }

  /** Forgets what was appended since `end` was as given. In the same step only: later it may be on its way to the file, and stays. */
  takeBack(end: number): void {
    if (this.#over || end < this.#issued) return;
    while (this.#appended > end) {
      const last = this.#chunks.at(-1)!;
      const count = Math.min(last.used, this.#appended - end);
      last.used -= count;
      this.#appended -= count;
      if (last.used === 0) this.#giveChunk(this.#chunks.pop()!);
    }
  }

  /** `waiter` is told when the log has gone on. */
  wait(waiter: LogWaiter): void {
    this.#waiters.add(waiter);
    this.#issue();
  }

  forget(waiter: LogWaiter): void {
    this.#waiters.delete(waiter);
  }

  /** Writes what is left, makes it durable and lets go of the file. Nothing is recorded from then on. Never rejects. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#issue();
    while (this.#writing) await new Promise<void>((resolve) => (this.#onIdle = resolve));
    if (this.#closed) return;
    if (this.failure === null) {
      const synced = await fdatasync(this.fd);
      if (synced < 0) this.#fail(systemError('fdatasync', synced));
    }
    this.#closed = true;
    closeSync(this.fd);
  }

  /** A chunk with room for at least `length` bytes; what is left of the one before stays unused. */
  #room(length: number): Chunk {
    const last = this.#chunks.at(-1);
    if (last !== undefined && last.used + length <= CHUNK_BYTES) return last;
    const chunk = this.#spare.pop() ?? { bytes: Buffer.allocUnsafeSlow(CHUNK_BYTES), used: 0 };
    this.#chunks.push(chunk);
    return chunk;
  }

  #giveChunk(chunk: Chunk): void {
    chunk.used = 0;
    if (this.#spare.length < SPARE_CHUNKS_MAX) this.#spare.push(chunk);
  }

  #took(chunk: Chunk, length: number): void {
    chunk.used += length;
    this.#appended += length;
    if (this.#scheduled || this.#writing) return;
    // Sessions that wait for their records have them written at once; this is for those that wait for nothing.
    this.#scheduled = true;
    setImmediate(this.#turn);
  }

  readonly #turn = (): void => {
    this.#scheduled = false;
    this.#issue();
  };

  /** Begins to write what has gathered, unless a write is under way or there is nothing. */
  #issue(): void {
    if (this.#writing || this.#over || this.#appended === this.#issued) return;
    const chunks = this.#chunks;
    this.#chunks = [];
    this.#issued = this.#appended;
    this.#writing = true;
    this.#write(
      chunks.map(({ bytes, used }) => bytes.subarray(0, used)),
      chunks,
    );
  }

  #write(pieces: Buffer[], chunks: Chunk[]): void {
    writev(this.fd, pieces, (error, count) => {
      const rest = error === null ? behind(pieces, count) : pieces;
      if (error === null && rest.length > 0 && count > 0) {
        this.#write(rest, chunks);
        return;
      }
      this.#writing = false;
      if (error !== null || rest.length > 0) this.#fail(error ?? new Error('nothing could be written'));
      else this.#written = this.#issued;
      for (const chunk of chunks) this.#giveChunk(chunk);
      this.#wentOn();
    });
  }

  #wentOn(): void {
    this.#issue();
    const waiters = this.#waiters;
    if (waiters.size > 0) {
      this.#waiters = new Set();
      for (const waiter of waiters) waiter.logWentOn();
    }
    if (this.#writing) return;
    this.#onIdle?.();
    this.#onIdle = null;
  }

  #fail(cause: Error): void {
    this.failure = refusal(
      `the transaction log ${this.path} has ended, requests are served without it: ${cause.message}; make room if that is it, and start the daemon anew`,
      cause,
    );
    this.#chunks = [];
    const whole = this.startBytes + this.#written;
    try {
      if (fstatSync(this.fd).size > whole) ftruncateSync(this.fd, whole);
    } catch {
      // What is left of a record is cut off when the log is opened again.
    }
    this.log.error({ err: cause }, this.failure.message);
  }
}

/** Locks the file and cuts off what is no whole record. Its size, bytes. */
function prepare(fd: number, path: string, log: Logger): number {
  const stat = fstatSync(fd);
  if (!stat.isFile()) throw refusal(`the transaction log ${path} is no regular file: name another`);
  if (!lockFile(fd, true))
    throw refusal(`the transaction log ${path} is in use, as a log or as an image: name another file`);
  const whole = wholeRecordsEnd(fd, stat.size);
  if (whole === null)
    throw refusal(`${path} holds something else than a transaction log: name another file, or remove it`);
  if (whole < stat.size) {
    ftruncateSync(fd, whole);
    log.warn({ cutBytes: stat.size - whole }, `the transaction log ${path} ended within a record`);
  }
  return whole;
}

/** What is left of `pieces` behind their first `count` bytes. */
function behind(pieces: Buffer[], count: number): Buffer[] {
  let skip = count;
  let index = 0;
  while (index < pieces.length && skip >= pieces[index].length) skip -= pieces[index++].length;
  const rest = pieces.slice(index);
  if (skip > 0) rest[0] = rest[0].subarray(skip);
  return rest;
}

function refusal(message: string, cause?: unknown): BlockferryError {
  return new BlockferryError('transaction-log', message, cause === undefined ? {} : { cause });
}
