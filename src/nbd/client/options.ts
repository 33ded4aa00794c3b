/** What can be asked of a client beside where and how much: when it connects, and with each request. */

import type { Compression } from '../codec/frames.js';
import type { ConnectLimits } from './connect.js';

/** How to connect, and what to ask for. */
export interface NbdClientOptions extends ConnectLimits {
  /** Metadata contexts to ask for, as `base:allocation`; those the server agreed to are in `info.contexts`. */
  readonly contexts?: readonly string[];
  /** Fail ('source-io') rather than connect without structured replies. */
  readonly requireStructured?: boolean;
  /** Ask for extended headers, which take requests longer than 4 GiB; `info.extended` says whether the server has them. Default: true. */
  readonly extendedHeaders?: boolean;
  /**
   * Ask for a compressed connection, which only blockferry knows: it is 'auto', or compresses with a level from -7 to 19 but 0. `compression`
   * says whether the server has it. Default: 'off'.
   */
  readonly compression?: Compression;
  /**
   * A request unanswered for so long, while nothing else came either (or next to nothing: less than 1 KiB), ends the connection
   * ('timeout'): many long requests on a slow connection are no fault. One request may be overtaken by others for ten times as long.
   * Default: none. Exact to an eighth.
   */
  readonly requestTimeoutMs?: number;
}

/** Of what changes an export. */
export interface WriteOptions {
  /** Answered only when the data is on stable storage. */
  readonly fua?: boolean;
}

/** Of `zero`. */
export interface ZeroOptions extends WriteOptions {
  /** The range stays allocated. */
  readonly noHole?: boolean;
  /**
   * Fail at once ('source-io', with an NbdReplyError of errno ENOTSUP), and change nothing, unless it takes less time than to write the
   * zeroes. Only where the server offers it (TransmissionFlag.SEND_FAST_ZERO), else 'usage'.
   */
  readonly fast?: boolean;
}

/** Of `read`. */
export interface ReadOptions {
  /** The server must send the range in one piece; it may fail what is longer than 64 KiB with EOVERFLOW. */
  readonly dontFragment?: boolean;
}
