/**
 * What the control thread and a data thread say to each other. Everything is plain data, copied on its way; a descriptor is its number,
 * and belongs to the sender until the other says `taken`.
 */

import { BlockferryError, type ErrorCode, messageOf } from '../../errors.js';
import type { BlockDevice } from '../../nbd/device.js';
import type { SessionParameters } from '../../nbd/server/listener.js';
import type { HeldVolume, HoldOptions } from '../held-volume.js';

/** What a volume is opened with, but for what is no data. */
export type OpenOrder = Omit<HoldOptions, 'log' | 'onLost'>;

/** What can be asked of a volume that is open. */
export const VERBS = [
  'look',
  'remember',
  'seal',
  'unseal',
  'retire',
  'track',
  'cut',
  'untrack',
  'refresh',
  'takeover',
  'settle',
  'retreat',
  'cancel',
  'pause',
  'resume',
  'setRate',
  'prefetch',
  'handedOff',
  'unpublish',
  'close',
] as const satisfies readonly (keyof HeldVolume)[];
export type Verb = (typeof VERBS)[number];

/** What the handshake agreed on, and the first bytes behind it. */
export type Agreed = Omit<SessionParameters, 'device' | 'log' | 'complain'>;

/** What a handshake tells of a device. */
export type DeviceFacts = Pick<
  BlockDevice,
  'size' | 'readOnly' | 'multiConn' | 'fastZero' | 'preferredBlock' | 'contexts'
>;

/** What the control side knows of a volume from its opening on. */
export interface VolumeFacts {
  id: string;
  image: string;
  link: DeviceFacts;
  hashes: DeviceFacts;
  linkDescription: string;
}

/** What of a volume the link address serves. */
export type Face = 'link' | 'hashes';

/** `request`, `volume` and `session` are numbers that the control thread gives, each once a thread. */
export type ToThread =
  | { kind: 'open'; request: number; volume: number; order: OpenOrder }
  | { kind: 'call'; request: number; volume: number; verb: Verb; arguments: unknown[] }
  | {
      kind: 'session';
      session: number;
      volume: number;
      face: Face;
      fd: number;
      /** The client was told so: if it is not true any more, there is no session. */
      linkDescription: string;
      agreed: Agreed;
      /** Of the connection's log. */
      bindings: Record<string, unknown>;
    }
  | { kind: 'drain'; session: number }
  | { kind: 'destroy'; session: number }
  /** Every volume is closed: the thread ends. */
  | { kind: 'end' };

export type FromThread =
  | { kind: 'answer'; request: number; value: unknown }
  | { kind: 'failure'; request: number; error: CarriedError }
  /** Comes before the answer to whatever changed it. */
  | { kind: 'description'; volume: number; linkDescription: string }
  /** The descriptor is the thread's. */
  | { kind: 'taken'; session: number }
  | { kind: 'complaint'; session: number; about: string; detail: string }
  | { kind: 'closed'; session: number; error: CarriedError | null }
  /** A line for the log, as it is. */
  | { kind: 'log'; line: string };

export interface ThreadData {
  log: { level: string; bindings: Record<string, unknown> };
}

export interface CarriedError {
  /** Null: not one of ours, but a system's error or a fault. */
  blockferry: ErrorCode | null;
  message: string;
  stack: string | undefined;
  /** Of a system's error. */
  system: string | undefined;
  cause: CarriedError | undefined;
}

const CAUSES_MAX = 4;

export function packError(error: unknown, causesMax = CAUSES_MAX): CarriedError {
  const cause = error instanceof Error ? error.cause : undefined;
  const code: unknown = error instanceof Error ? (error as NodeJS.ErrnoException).code : undefined;
  const ours = error instanceof BlockferryError;
  return {
    blockferry: ours ? error.code : null,
    message: messageOf(error),
    stack: error instanceof Error ? error.stack : undefined,
    system: !ours && typeof code === 'string' ? code : undefined,
    cause: cause === undefined || causesMax === 0 ? undefined : packError(cause, causesMax - 1),
  };
}

export function unpackError(carried: CarriedError): Error {
  const { blockferry, message, stack, system } = carried;
  const options = carried.cause === undefined ? {} : { cause: unpackError(carried.cause) };
  const error =
    blockferry === null ? new Error(message, options) : new BlockferryError(blockferry, message, options);
  if (stack !== undefined) error.stack = stack;
  if (system !== undefined) Object.assign(error, { code: system });
  return error;
}

/** The thread a volume lived on died: whether what was asked for happened is not known. */
export class ThreadLostError extends BlockferryError {
  constructor(why: string) {
    super('control', `the data thread of the volume died (${why}) and is replaced: try again`);
  }
}
