/**
 * What the requests of one connection leave in a transaction log.
 *
 * Handles are the log's own, since connections share it and clients choose cookies as they like: the number of the connection (from 1 on,
 * since the daemon started), then that of the request in it, 32 bits each. Replies are recorded as simple ones whatever the client
 * agreed on: nbd-trplay knows no others. No reply is recorded where none is sent.
 *
 * Without data every request is recorded as it was sent (FLUSH and DISC, which have none, with offset and length 0). With data the log is
 * one that nbd-trplay can play back, which carries out whatever change it finds, failed or not, and stops at commands it does not know:
 * - a change is recorded with the range that changed: a TRIM with the blocks that were given back, and length 0 if it failed or did
 *   nothing;
 * - CACHE, BLOCK_STATUS and unknown commands, which change nothing, are left out, with their replies.
 *
 * READ, FLUSH and what else changes nothing is recorded when it begins, a change when it took effect (or failed); replies when they are
 * given. A length of 32 bits or more, which extended headers allow, becomes several records with one handle, answered once.
 */
import { Command, CommandFlag, Errno } from '../constants.js';
import type { RequestHead } from '../server/head.js';
import type { Request } from '../server/request.js';
import { failureOf } from '../server/validate.js';
import type { LogWaiter, TransactionLog } from './transaction-log.js';

/** Longest piece of a long change: a power of two, so that nbd-trplay's block size divides it. Bytes. */
const PIECE_BYTES = 2 ** 31;
const LENGTH_MAX = 0xffff_ffff;
/** Flags that compact requests have; PAYLOAD_LEN only speaks of an extended header. */
const FLAGS =
  CommandFlag.FUA | CommandFlag.NO_HOLE | CommandFlag.DF | CommandFlag.REQ_ONE | CommandFlag.FAST_ZERO;

type Head = Pick<RequestHead, 'command' | 'flags' | 'offset' | 'length'>;

const WRITTEN = { command: Command.WRITE, flags: 0 };

const changes = (command: number): boolean =>
  command === Command.WRITE || command === Command.TRIM || command === Command.WRITE_ZEROES;

const playable = (command: number): boolean => command <= Command.WRITE_ZEROES && command !== Command.CACHE;

export class Recorder implements LogWaiter {
  readonly #connection: number;
  #requests = 0;
  /** Behind the last record of this connection: its answers wait for that. */
  #end = 0;
  /** Of the write that is being tried: where its record begins, and its number. */
  #triedAt = 0;
  #triedNumber = 0;

  /** `onProgress` is called, never from within a call of this class's users, when the log went on that kept this connection waiting. */
  constructor(
    private readonly log: TransactionLog,
    private readonly onProgress: () => void,
  ) {
    this.#connection = log.nextConnection();
  }

  /** No further request may begin yet; `onProgress` will tell. */
  get full(): boolean {
    if (!this.log.full) return false;
    this.log.wait(this);
    return true;
  }

  /** Answers may leave: what they answer is in the file. Otherwise `onProgress` will tell. */
  get open(): boolean {
    if (this.log.isWritten(this.#end)) return true;
    this.log.wait(this);
    return false;
  }

  logWentOn(): void {
    this.onProgress();
  }

  close(): void {
    this.log.forget(this);
  }

  // Requests that are over at once

  /** A request and its answer; `errno` as a device has it. Not for a change that was carried out, but for one of length 0. */
  answered(head: Head, errno: number): void {
    if (!this.#kept(head.command)) return;
    const number = this.#number();
    this.#request(number, head, head.offset, this.#lengthOf(head, errno));
    this.#reply(number, errno, head);
  }

  disconnected(head: Head): void {
    this.#request(this.#number(), head, head.offset, head.length);
  }

  /** The device is asked to write buffer[at, at + head.length) now: recorded before, as that may let other changes follow at once. */
  tryWrite(head: Head, buffer: Buffer, at: number): void {
    this.#triedAt = this.log.end;
    this.#triedNumber = this.#number();
    this.#change(this.#triedNumber, head, head.offset, head.length, buffer, at);
  }

  /** It did. */
  wrote(): void {
    this.#reply(this.#triedNumber, Errno.OK, WRITTEN);
  }

  /** It did not: it failed, or will be asked again. Nothing else happened meanwhile. */
  takeBackWrite(): void {
    this.log.takeBack(this.#triedAt);
    this.#requests = (this.#triedNumber - 1) >>> 0;
  }

  // Requests that the device has

  /** The request's number, for `Request.number`. */
  begin(head: Head): number {
    const number = this.#number();
    if (!changes(head.command) && this.#kept(head.command))
      this.#request(number, head, head.offset, head.length);
    return number;
  }

  /** The change took effect, on `length` bytes at `offset`. */
  changed(request: Request, offset: number, length: number): void {
    request.recorded = true;
    const asSent = !this.log.withData;
    this.#change(
      request.number,
      request,
      asSent ? request.offset : offset,
      asSent ? request.length : length,
      request.buffer,
      request.at,
    );
  }

  /** A device that did not say when a change took effect has it recorded now. */
  completed(request: Request, errno: number, isAnswered: boolean): void {
    const { command, offset } = request;
    if (changes(command) && !request.recorded) {
      if (errno === Errno.OK) this.changed(request, offset, request.length);
      else this.#request(request.number, request, offset, this.#lengthOf(request, errno));
    }
    if (isAnswered) this.reply(request, errno);
  }

  reply(request: Request, errno: number): void {
    if (this.#kept(request.command)) this.#reply(request.number, errno, request);
  }

  // Records

  #number(): number {
    this.#requests = (this.#requests + 1) >>> 0;
    return this.#requests;
  }

  #kept(command: number): boolean {
    return !this.log.withData || playable(command);
  }

  /** What a request that changed nothing is recorded with. */
  #lengthOf({ command, length }: Head, errno: number): number {
    return this.log.withData && errno !== Errno.OK && changes(command) ? 0 : length;
  }

  #change(number: number, head: Head, offset: number, length: number, buffer: Buffer, at: number): void {
    if (head.command === Command.WRITE) {
      this.#request(number, head, offset, length);
      if (this.log.withData) {
        this.log.payload(buffer, at, length);
        this.#end = this.log.end;
      }
      return;
    }
    let done = 0;
    do {
      const count = length - done > LENGTH_MAX ? PIECE_BYTES : length - done;
      this.#request(number, head, offset + done, count);
      done += count;
    } while (done < length);
  }

  #request(number: number, { flags, command }: Head, offset: number, length: number): void {
    const ranged = command !== Command.FLUSH && command !== Command.DISC;
    const shown = ranged ? Math.min(length, LENGTH_MAX) : 0;
    this.log.request(flags & FLAGS, command, this.#connection, number, ranged ? offset : 0, shown);
    this.#end = this.log.end;
  }

  #reply(number: number, errno: number, { command, flags }: Pick<Head, 'command' | 'flags'>): void {
    const shown = errno === Errno.OK ? Errno.OK : failureOf(errno, command, flags).errno;
    this.log.reply(this.#connection, number, shown);
    this.#end = this.log.end;
  }
}
