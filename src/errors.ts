import { Errno } from './nbd/constants.js';

/**
 * Every failure of blockferry has one code. The message says what happened, why, and what to do about it, in one line.
 * Where a failure reaches an NBD client, `errnoOf` maps it to one of the values the protocol allows.
 */
export type ErrorCode =
  | 'usage' // the words of a command or configuration are off
  | 'address' // an address or URI cannot be parsed or listened on
  | 'image-missing'
  | 'image-in-use'
  | 'image-io' // the image failed us
  | 'transaction-log' // it cannot be opened or written
  | 'no-space'
  | 'state-damaged' // map files or identity cannot be trusted
  | 'state-mismatch' // state exists and belongs to something else
  | 'phase' // not allowed in this phase of the volume
  | 'generation' // a stale or burnt generation
  | 'source-unreachable'
  | 'source-mismatch' // the source is not the disk we know
  | 'source-io' // the source answered with an error
  | 'tls' // credentials that cannot be used, or a peer that could not be trusted
  | 'protocol' // the peer broke the NBD protocol
  | 'closed' // the connection or volume was closed under the request
  | 'read-only'
  | 'bounds'
  | 'not-found'
  | 'exists'
  | 'control' // the control API refused or could not be reached
  | 'hypervisor' // QEMU failed or said no
  | 'migration'
  | 'bench' // a server under load failed, or cannot be measured
  | 'timeout';

/** What everything of blockferry throws and rejects with. `message` is one line; `cause` is the error below it, if there is one. */
export class BlockferryError extends Error {
  override readonly name = 'BlockferryError';
  constructor(
    readonly code: ErrorCode,
    message: string,
    options?: { cause?: unknown },
  ) {
    super(message, options);
  }
}

const NBD_ERRNO: Partial<Record<ErrorCode, number>> = {
  usage: Errno.EINVAL,
  bounds: Errno.EINVAL,
  'no-space': Errno.ENOSPC,
  phase: Errno.EPERM,
  generation: Errno.EPERM,
  'read-only': Errno.EPERM,
  closed: Errno.ESHUTDOWN,
};

const SYSTEM_ERRNO: Record<string, number> = {
  EPERM: Errno.EPERM,
  EACCES: Errno.EPERM,
  EROFS: Errno.EPERM,
  EINVAL: Errno.EINVAL,
  ENOSPC: Errno.ENOSPC,
  EDQUOT: Errno.ENOSPC,
  EFBIG: Errno.ENOSPC,
};

/** The NBD error value (never 0) that tells a client of `error`. Unknown causes are EIO. */
export function errnoOf(error: unknown): number {
  if (error instanceof BlockferryError) return NBD_ERRNO[error.code] ?? Errno.EIO;
  const code = (error as NodeJS.ErrnoException | undefined)?.code;
  return (code !== undefined && SYSTEM_ERRNO[code]) || Errno.EIO;
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
