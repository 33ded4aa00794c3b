/**
 * What a session refuses by itself, before the device hears of it: doc/proto.md «Size constraints», «Request types»,
 * «Error values». Pure, and free of allocation: every refusal is a constant.
 */

import { Command, CommandFlag, Errno, PAYLOAD_BYTES_MAX } from '../constants.js';

export interface Refusal {
  readonly errno: number;
  /** For structured replies. */
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

/** What a device's errno is on the wire: values the protocol does not allow for these commands become EIO. */
export function failureOf(errno: number): Refusal {
  return FAILURES.get(errno) ?? EIO;
}

/** What of a session decides which requests are valid. */
export interface Rules {
  /** Bytes. */
  readonly size: number;
  readonly readOnly: boolean;
  readonly structured: boolean;
  /** At least one metadata context is selected. */
  readonly hasContexts: boolean;
}

/** Flags allowed per command, by command number; FUA is accepted on every command. */
const FLAGS: readonly number[] = [
  CommandFlag.FUA, // READ; DF with structured replies
  CommandFlag.FUA, // WRITE
  0xffff, // DISC has no reply to refuse it with
  CommandFlag.FUA, // FLUSH
  CommandFlag.FUA, // TRIM
  CommandFlag.FUA, // CACHE
  CommandFlag.FUA | CommandFlag.NO_HOLE, // WRITE_ZEROES; FAST_ZERO is not advertised
  CommandFlag.FUA | CommandFlag.REQ_ONE, // BLOCK_STATUS
];

const changes = (command: number): boolean =>
  command === Command.WRITE || command === Command.TRIM || command === Command.WRITE_ZEROES;

/**
 * Why a request is refused, or null. `offset` is the 64-bit offset as a number: beyond 2^53 it is rounded, and beyond
 * every size. Order: command, flags, read-only, what the command itself asks for, bounds.
 */
export function refusalOf(
  rules: Rules,
  command: number,
  flags: number,
  offset: number,
  length: number,
): Refusal | null {
  if (command >= FLAGS.length) return UNKNOWN_COMMAND;
  let allowed = FLAGS[command]!;
  if (command === Command.READ && rules.structured) allowed |= CommandFlag.DF;
  if ((flags & ~allowed) !== 0) return UNKNOWN_FLAG;
  if (command === Command.FLUSH || command === Command.DISC) return null;
  if (rules.readOnly && changes(command)) return READ_ONLY;
  if (command === Command.BLOCK_STATUS) {
    if (!rules.structured || !rules.hasContexts) return NO_CONTEXT;
    if (length === 0) return EMPTY_STATUS;
  }
  if (length > PAYLOAD_BYTES_MAX && (command === Command.READ || command === Command.WRITE)) return TOO_LONG;
  // Subtraction, not addition: it cannot round or wrap.
  if (offset > rules.size || length > rules.size - offset) {
    return command === Command.WRITE || command === Command.WRITE_ZEROES ? NO_SPACE : OUT_OF_BOUNDS;
  }
  return null;
}
