/** What a server offers, and how it describes it to clients. */
import { TransmissionFlag } from '../constants.js';
import type { BlockDevice } from '../device.js';
import type { AccessRule } from './access.js';

export interface ExportEntry {
  /** UTF-8 of 1 to STRING_BYTES_MAX bytes without NUL, unique in its directory. */
  name: string;
  /** For a person's eyes; empty: none. */
  description: string;
  /** Bytes, as of the device that `open` gives: clients are told before it is opened. */
  size: number;
  /** Writes are refused. True if they are by the device. */
  readOnly: boolean;
  /** Metadata contexts the device can report, each `namespace:leaf`. */
  contexts: readonly string[];
  /** Preferred request size in bytes, a power of two >= 512. */
  preferredBlock: number;
  /** FLUSH and FUA on one connection cover completed writes of all. */
  multiConn: boolean;
  /** The device heeds FAST_ZERO. Default: false. */
  fastZero?: boolean;
  /** Shown to and opened for clients behind TLS only. Default: false. */
  tlsOnly?: boolean;
  /** Which clients may do what; the first rule that fits counts, and whom none fits sees nothing. Default: everybody may write. */
  access?: readonly AccessRule[];
  /** Clients in transmission at the same time, >= 1. Default: no limit but the listener's. */
  connectionsMax?: number;
  /** Called once a client has chosen the export, never before; the session releases the device. May throw. */
  open(): BlockDevice;
}

export interface ExportDirectory {
  list(): ExportEntry[];
  /** '' is the default export: the only one. */
  find(name: string): ExportEntry | undefined;
  /** From now on no client is let in any more. */
  readonly shuttingDown: boolean;
}

/** The entry of that name; for the empty name the only entry there is, if there is only one. */
export function defaultOrNamed(entries: readonly ExportEntry[], name: string): ExportEntry | undefined {
  if (name === '' && entries.length === 1) return entries[0];
  return entries.find((entry) => entry.name === name);
}

/**
 * The transmission flags of an export (TransmissionFlag). A read-only export offers no command that writes.
 * `structured`: structured replies, or extended headers, were agreed on; `filters`: extended headers, and metadata contexts.
 */
export function transmissionFlags(
  device: { readonly readOnly: boolean; readonly multiConn: boolean; readonly fastZero?: boolean },
  structured: boolean,
  filters = false,
): number {
  let flags =
    TransmissionFlag.HAS_FLAGS |
    TransmissionFlag.SEND_FLUSH |
    TransmissionFlag.SEND_FUA |
    TransmissionFlag.SEND_CACHE;
  if (device.readOnly) flags |= TransmissionFlag.READ_ONLY;
  else {
    flags |= TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES;
    if (device.fastZero === true) flags |= TransmissionFlag.SEND_FAST_ZERO;
  }
  if (structured) flags |= TransmissionFlag.SEND_DF;
  if (filters) flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD;
  if (device.multiConn) flags |= TransmissionFlag.CAN_MULTI_CONN;
  return flags;
}
