/**
 * What a session refuses by itself, before the device hears of it: doc/proto.md «Size constraints», «Request types»,
 * «Error values». Pure, and free of allocation: every refusal is a constant.
 */

import { Command, CommandFlag, Errno, PAYLOAD_BYTES_MAX, type ReplyForm } from '../constants.js';

export interface Refusal {
  readonly errno: number;
  /** For error chunks. */
  readonly message: string;
}

const refusal = (errno: number, message: string): Refusal => ({ errno, message });

export const UNKNOWN_COMMAND = refusal(Errno.EINVAL, 'unknown command');
export const UNKNOWN_FLAG = refusal(Errno.EINVAL, 'flag not allowed with this command');
export const READ_ONLY = refusal(Errno.EPERM, 'the export is read-only');
export const TOO_LONG = refusal(Errno.EINVAL, 'longer than the maximum payload');
export const OUT_OF_BOUNDS = refusal(Errno.EINVAL, 'beyond the end of the export');
export const NO_SPACE = refusal(Errno.ENOSPC, 'beyond the end of the export');
export const NO_CONTEXT = refusal(Errno.EINVAL, 'no metadata context selected');
export const EMPTY_STATUS = refusal(Errno.EINVAL, 'block status of length 0');
export const PAYLOAD_UNEXPECTED = refusal(Errno.EINVAL, 'a payload with a command that takes none');
export const WRONG_FILTER = refusal(
  Errno.EINVAL,
  'the payload does not name selected metadata contexts, each once',
);
export const SHUTTING_DOWN = refusal(Errno.ESHUTDOWN, 'the server is shutting down');

const EIO = refusal(Errno.EIO, 'input/output error');
const FAILURES = new Map<number, Refusal>(
  [
    EIO,
    refusal(Errno.EPERM, 'not permitted now'),
    refusal(Errno.ENOMEM, 'out of memory'),
    refusal(Errno.EINVAL, 'invalid request'),
    refusal(Errno.ENOSPC, 'no space left'),
    refusal(Errno.ESHUTDOWN, 'shutting down'),
  ].map((failure) => [failure.errno, failure]),
);

const NOT_FAST = refusal(Errno.ENOTSUP, 'not faster than writing zeroes');

/** What a device's errno is on the wire: values the protocol does not allow for the command become EIO. */
export function failureOf(errno: number, command: number, flags: number): Refusal {
  if (errno === Errno.ENOTSUP && command === Command.WRITE_ZEROES && (flags & CommandFlag.FAST_ZERO) !== 0)
    return NOT_FAST;
  return FAILURES.get(errno) ?? EIO;
}

/** What of a session decides which requests are valid. */
export interface SessionFacts {
  /** Bytes. */
  readonly size: number;
  readonly readOnly: boolean;
  /** FAST_ZERO is offered. */
  readonly fastZero: boolean;
  readonly form: ReplyForm;
  /** At least one metadata context is selected. */
  readonly hasContexts: boolean;
}

const { READ, WRITE, DISC, FLUSH, TRIM, WRITE_ZEROES, BLOCK_STATUS } = Command;

export class Rules {
  readonly #size: number;
  readonly #readOnly: boolean;
  readonly #extended: boolean;
  readonly #hasContexts: boolean;
  /** Flags allowed, by command number; FUA is accepted on every command. */
  readonly #flags: readonly number[];

  constructor({ size, readOnly, fastZero, form, hasContexts }: SessionFacts) {
    this.#size = size;
    this.#readOnly = readOnly;
    this.#extended = form === 'extended';
    this.#hasContexts = hasContexts && form !== 'simple';
    const { FUA, DF, NO_HOLE, REQ_ONE, FAST_ZERO, PAYLOAD_LEN } = CommandFlag;
    const flags = new Array<number>(BLOCK_STATUS + 1).fill(FUA);
    if (form !== 'simple') flags[READ]! |= DF;
    flags[DISC] = 0xffff; // it has no reply to refuse it with
    flags[WRITE_ZEROES]! |= fastZero ? NO_HOLE | FAST_ZERO : NO_HOLE;
    flags[BLOCK_STATUS]! |= REQ_ONE;
    if (this.#extended) {
      flags[WRITE]! |= PAYLOAD_LEN;
      if (this.#hasContexts) flags[BLOCK_STATUS]! |= PAYLOAD_LEN;
    }
    this.#flags = flags;
  }

  /**
   * Why a request is refused, or null. `offset` and `length` are the 64-bit numbers of the wire: beyond 2^53 they are rounded, and
   * beyond every size. Order: command, flags, read-only, what the command itself asks for, bounds. A BLOCK_STATUS whose payload has the
   * length that matters is asked about again with that length.
   */
  refusalOf(command: number, flags: number, offset: number, length: number): Refusal | null {
    if (command >= this.#flags.length)
      return this.#extended && (flags & CommandFlag.PAYLOAD_LEN) !== 0 ? PAYLOAD_UNEXPECTED : UNKNOWN_COMMAND;
    const wrong = flags & ~this.#flags[command]!;
    if (wrong !== 0)
      return this.#extended && wrong === CommandFlag.PAYLOAD_LEN ? PAYLOAD_UNEXPECTED : UNKNOWN_FLAG;
    if (command === FLUSH || command === DISC) return null;
    if (this.#readOnly && (command === WRITE || command === TRIM || command === WRITE_ZEROES))
      return READ_ONLY;
    if (command === BLOCK_STATUS) {
      if (!this.#hasContexts) return NO_CONTEXT;
      if (length === 0) return EMPTY_STATUS;
    } else if (length > PAYLOAD_BYTES_MAX && (command === READ || command === WRITE)) return TOO_LONG;
    // Subtraction, not addition: it cannot round or wrap.
    if (offset > this.#size || length > this.#size - offset)
      return command === WRITE || command === WRITE_ZEROES ? NO_SPACE : OUT_OF_BOUNDS;
    return null;
  }
}
