/**
 * Numbers of the NBD protocol. Source: NetworkBlockDevice/nbd, doc/proto.md; those of extended headers: the same file on the branch
 * extension-ext-header. All integers on the wire are big-endian.
 */

// Handshake
export const NBD_MAGIC = 0x4e42444d41474943n; // "NBDMAGIC"
export const OPTION_MAGIC = 0x49484156454f5054n; // "IHAVEOPT"
export const OPTION_REPLY_MAGIC = 0x0003e889045565a9n;
export const DEFAULT_PORT = 10809;

/** Handshake flags, 16 bits from the server; the client answers with the same bits in 32. */
export const HandshakeFlag = { FIXED_NEWSTYLE: 1, NO_ZEROES: 2 } as const;

export const Option = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
  EXTENDED_HEADERS: 11,
  /** Of blockferry's own: "bfz1". See codec/frames.ts. */
  COMPRESSION: 0x62667a31,
} as const;

export const OptionReply = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERR_UNSUP: 0x80000001,
  ERR_POLICY: 0x80000002,
  ERR_INVALID: 0x80000003,
  ERR_PLATFORM: 0x80000004,
  ERR_TLS_REQD: 0x80000005,
  ERR_UNKNOWN: 0x80000006,
  ERR_SHUTDOWN: 0x80000007,
  ERR_BLOCK_SIZE_REQD: 0x80000008,
  ERR_TOO_BIG: 0x80000009,
  ERR_EXT_HEADER_REQD: 0x8000000a,
} as const;

export const Info = { EXPORT: 0, NAME: 1, DESCRIPTION: 2, BLOCK_SIZE: 3 } as const;

/** Transmission flags, 16 bits. */
export const TransmissionFlag = {
  HAS_FLAGS: 1 << 0,
  READ_ONLY: 1 << 1,
  SEND_FLUSH: 1 << 2,
  SEND_FUA: 1 << 3,
  ROTATIONAL: 1 << 4,
  SEND_TRIM: 1 << 5,
  SEND_WRITE_ZEROES: 1 << 6,
  SEND_DF: 1 << 7,
  CAN_MULTI_CONN: 1 << 8,
  SEND_RESIZE: 1 << 9,
  SEND_CACHE: 1 << 10,
  SEND_FAST_ZERO: 1 << 11,
  /** Extended headers only. */
  BLOCK_STATUS_PAYLOAD: 1 << 12,
} as const;

// Transmission
export const REQUEST_MAGIC = 0x25609513;
export const SIMPLE_REPLY_MAGIC = 0x67446698;
export const STRUCTURED_REPLY_MAGIC = 0x668e33ef;
export const EXTENDED_REQUEST_MAGIC = 0x21e41c71;
export const EXTENDED_REPLY_MAGIC = 0x6e8a278c;
export const REQUEST_HEADER_BYTES = 28;
export const EXTENDED_REQUEST_HEADER_BYTES = 32;
export const SIMPLE_REPLY_HEADER_BYTES = 16;
export const STRUCTURED_REPLY_HEADER_BYTES = 20;
export const EXTENDED_REPLY_HEADER_BYTES = 32;

export const Command = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
} as const;

/** Command flags, 16 bits. */
export const CommandFlag = {
  FUA: 1 << 0,
  NO_HOLE: 1 << 1,
  DF: 1 << 2,
  REQ_ONE: 1 << 3,
  FAST_ZERO: 1 << 4,
  /** Extended headers only: the header's length is that of a payload behind it. */
  PAYLOAD_LEN: 1 << 5,
} as const;

export const ChunkFlag = { DONE: 1 } as const;

export const ChunkType = {
  NONE: 0,
  OFFSET_DATA: 1,
  OFFSET_HOLE: 2,
  BLOCK_STATUS: 5,
  /** Extended headers only, where it takes the place of BLOCK_STATUS. */
  BLOCK_STATUS_EXT: 6,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const;

/** What the transmission phase looks like: as was agreed in the handshake, each including what comes before it. */
export type ReplyForm = 'simple' | 'structured' | 'extended';

/** Error values allowed on the wire; 0 is success. */
export const Errno = {
  OK: 0,
  EPERM: 1,
  EIO: 5,
  ENOMEM: 12,
  EINVAL: 22,
  ENOSPC: 28,
  EOVERFLOW: 75,
  ENOTSUP: 95,
  ESHUTDOWN: 108,
} as const;

/** Status bits of `base:allocation`. */
export const Allocation = { HOLE: 1, ZERO: 2 } as const;
/** The context that tells holes and zeroes. */
export const BASE_ALLOCATION = 'base:allocation';
/** Source: QEMU, docs/interop/nbd.txt. The status is the depth in a chain: 0 unallocated, 1 here, 2 in the layer behind. */
export const ALLOCATION_DEPTH = 'qemu:allocation-depth';
/** Ours: how often regions are read and written (docs/protocol.md). */
export const HEAT = 'blockferry:heat';
/** Which blocks the guest changed since tracking began: as QEMU tells of its dirty bitmaps, and with the round, as docs/protocol.md has it. */
export const DIRTY_BITMAP = 'qemu:dirty-bitmap:blockferry';
export const DIRTY = 'blockferry:dirty';
/** Likewise, of the round that is under way alone: what who has the list of the one before still needs. */
export const CHANGED = 'blockferry:changed';
/** Ours: in which order regions were read first after a takeover (docs/protocol.md). */
export const FIRST_ACCESS = 'blockferry:first-access';

// Limits of ours
/** Longest string the protocol allows, bytes. */
export const STRING_BYTES_MAX = 4096;
/** Longest string a message of ours should be, bytes. */
export const STRING_BYTES_PREFERRED = 256;
/** Largest payload of one request we accept and offer, bytes. */
export const PAYLOAD_BYTES_MAX = 64 << 20;
/** Payload every server must accept unless it says otherwise, bytes. */
export const PAYLOAD_BYTES_DEFAULT = 32 << 20;
/** Largest data of one option we read, bytes. */
export const OPTION_BYTES_MAX = 64 << 10;
/** Largest data of one option we read past to refuse it politely, bytes. A client that announces more is cut off. */
export const OPTION_SKIP_BYTES_MAX = 32 << 20;
/** Options one client may send before it is cut off (plus OPTIONS_PER_LISTED_NAME for each export listed to it). */
export const OPTIONS_MAX = 32;
export const OPTIONS_PER_LISTED_NAME = 32;
/** Bytes of LIST replies one client may have before a further LIST is refused; the first one is always whole. */
export const LISTED_BYTES_MAX = 1 << 20;
export const HANDSHAKE_TIMEOUT_MS = 10_000;
/** How long a closing listener waits for clients that are still haggling, and for sessions that finish their requests. */
export const HANDSHAKE_DRAIN_TIMEOUT_MS = 1000;
export const SESSION_DRAIN_TIMEOUT_MS = 10_000;
/** Clients in transmission that one listener serves at the same time. */
export const CONNECTIONS_MAX = 1024;
/** Clients in the handshake with one listener at the same time. */
export const HANDSHAKES_MAX = 512;
/**
 * A TCP client that says nothing for so long is asked whether it is still there, every second, ten times: one whose machine vanished
 * gives its place back. As long as Linux and nbd-server wait: a shorter time would end idle sessions in a short break of the network.
 */
export const KEEPALIVE_IDLE_MS = 7_200_000;
/**
 * Answers the client has not taken, beyond which nothing more is begun for it at first, bytes: what is read far ahead of the socket leaves the
 * processor's cache before it is sent.
 */
export const UNSENT_BYTES_MAX = 1 << 20;
/** Requests and payload bytes one session may have in flight before we stop reading from it. */
export const IN_FLIGHT_REQUESTS_MAX = 1024;
export const IN_FLIGHT_BYTES_MAX = 128 << 20;
/** The same for all sessions of a thread together; beyond it each may still have one request. */
export const IN_FLIGHT_BYTES_TOTAL_MAX = 512 << 20;
