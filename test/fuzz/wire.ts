/**
 * The protocol's numbers once more, from doc/proto.md and its branch `extension-ext-header` (e6f3b94), so that a wrong one in src is
 * seen; and the units a stream is made of, with the places of their fields, which is what mutations work on.
 */

/** The disk of every recording, and of every target, bytes. */
export const DISK_BYTES = 64 << 10;

export const GREETING = 'NBDMAGICIHAVEOPT';
export const OPTION_MAGIC = Buffer.from('IHAVEOPT');
export const OPTION_REPLY_MAGIC = 0x0003e889045565a9n;
export const REQUEST_MAGIC = 0x25609513;
export const EXTENDED_REQUEST_MAGIC = 0x21e41c71;
export const SIMPLE_MAGIC = 0x67446698;
export const STRUCTURED_MAGIC = 0x668e33ef;
export const EXTENDED_REPLY_MAGIC = 0x6e8a278c;

export const REQUEST_BYTES = 28;
export const EXTENDED_BYTES = 32;
export const STRUCTURED_BYTES = 20;
export const SIMPLE_BYTES = 16;

export const OPT = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  STARTTLS: 5,
  INFO: 6,
  GO: 7,
  STRUCTURED: 8,
  LIST_META: 9,
  SET_META: 10,
  EXTENDED: 11,
} as const;

export const REP = {
  ACK: 1,
  SERVER: 2,
  INFO: 3,
  META_CONTEXT: 4,
  ERROR: 0x80000000,
  ERROR_LAST: 0x8000000a,
} as const;

export const CMD = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  ZERO: 6,
  STATUS: 7,
} as const;

export const FLAG = { FUA: 1, NO_HOLE: 2, DF: 4, REQ_ONE: 8, FAST_ZERO: 16, PAYLOAD: 32 } as const;

export const CHUNK = {
  NONE: 0,
  DATA: 1,
  HOLE: 2,
  STATUS: 5,
  STATUS_EXT: 6,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const;

/** Error values a server may send. */
export const ERRNOS: ReadonlySet<number> = new Set([1, 5, 12, 22, 28, 75, 95, 108]);

/** Transmission flags of an export that the rules below look at. */
export const EXPORT = { READ_ONLY: 1 << 1, DF: 1 << 7, FAST_ZERO: 1 << 11 } as const;

/** Where a number lies in a unit. */
export type Field = readonly [at: number, width: 1 | 2 | 4 | 8];

export type UnitKind =
  | 'greeting'
  | 'flags'
  | 'option'
  | 'option-reply'
  | 'export'
  | 'request'
  | 'reply'
  | 'chunk';

/** What belongs together in a stream. */
export interface Unit {
  readonly kind: UnitKind;
  readonly bytes: Buffer;
  readonly fields: readonly Field[];
}

const OPTION_FIELDS: readonly Field[] = [
  [0, 8],
  [8, 4],
  [12, 4],
];
const REQUEST_FIELDS: readonly Field[] = [
  [0, 4],
  [4, 2],
  [6, 2],
  [8, 8],
  [16, 8],
];
const FIELDS: Record<UnitKind, readonly Field[]> = {
  greeting: [
    [0, 8],
    [8, 8],
    [16, 2],
  ],
  flags: [[0, 4]],
  option: OPTION_FIELDS,
  'option-reply': [...OPTION_FIELDS, [16, 4]],
  export: [
    [0, 8],
    [8, 2],
  ],
  request: REQUEST_FIELDS,
  reply: [
    [0, 4],
    [4, 4],
    [8, 8],
  ],
  chunk: [
    [0, 4],
    [4, 2],
    [6, 2],
    [8, 8],
  ],
};

/** The first fields of a unit's data: whatever they are, they are numbers of these widths. */
function dataFields(from: number, length: number): Field[] {
  const fields: Field[] = [];
  for (const width of [2, 4, 8] as const) if (from + width <= length) fields.push([from, width]);
  if (from + 12 <= length) fields.push([from + 4, 4], [from + 8, 4]);
  return fields;
}

export function unitOf(kind: UnitKind, bytes: Buffer): Unit {
  const fields = [...FIELDS[kind]];
  if (kind === 'option') fields.push(...dataFields(16, bytes.length));
  else if (kind === 'option-reply') fields.push(...dataFields(20, bytes.length));
  else if (kind === 'request') fields.push(isExtended(bytes) ? [24, 8] : [24, 4]);
  else if (kind === 'chunk') {
    const head = isExtended(bytes) ? EXTENDED_BYTES : STRUCTURED_BYTES;
    fields.push(
      ...(head === EXTENDED_BYTES
        ? ([
            [16, 8],
            [24, 8],
          ] as Field[])
        : ([[16, 4]] as Field[])),
    );
    fields.push(...dataFields(head, bytes.length));
  }
  return { kind, bytes, fields: fields.filter(([at, width]) => at + width <= bytes.length) };
}

function isExtended(bytes: Buffer): boolean {
  if (bytes.length < EXTENDED_BYTES) return false;
  const magic = bytes.readUInt32BE(0);
  return magic === EXTENDED_REQUEST_MAGIC || magic === EXTENDED_REPLY_MAGIC;
}

export function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
}

export function u64(value: bigint | number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
}

export function encodeOption(option: number, data: Uint8Array = Buffer.alloc(0)): Buffer {
  return Buffer.concat([OPTION_MAGIC, u32(option), u32(data.length), data]);
}

export interface RequestFields {
  extended: boolean;
  flags: number;
  command: number;
  cookie: bigint;
  offset: bigint;
  length: bigint;
  payload?: Uint8Array;
}

export function encodeRequest(request: RequestFields): Buffer {
  const { extended, flags, command, cookie, offset, length, payload = Buffer.alloc(0) } = request;
  const tail = extended ? u64(BigInt.asUintN(64, length)) : u32(Number(BigInt.asUintN(32, length)));
  return Buffer.concat([
    u32(extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC),
    u16(flags),
    u16(command),
    u64(cookie),
    u64(BigInt.asUintN(64, offset)),
    tail,
    payload,
  ]);
}
