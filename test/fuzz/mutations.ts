/**
 * Recorded sessions, damaged: what fast-check chooses are small lists of numbers, which are applied to the units of a stream modulo what
 * is there, so that every choice is valid for every stream and shrinks well.
 */
import fc from 'fast-check';
import {
  CMD,
  DISK_BYTES,
  encodeOption,
  encodeRequest,
  type Field,
  FLAG,
  OPT,
  type Unit,
  u32,
  u64,
  unitOf,
} from './wire.js';

export type Mutation =
  /** A number in a unit becomes another one. */
  | { kind: 'field'; unit: number; field: number; value: number }
  /** Bits of a byte flip. */
  | { kind: 'flip'; unit: number; at: number; bits: number }
  /** Bytes of a unit go, or come. */
  | { kind: 'shorten'; unit: number; at: number; count: number }
  | { kind: 'lengthen'; unit: number; at: number; count: number; fill: number }
  | { kind: 'drop' | 'repeat' | 'swap'; unit: number; with: number }
  /** From here on it is another session, from some unit of that on. */
  | { kind: 'splice'; unit: number; other: number }
  /** A unit of another session in between. */
  | { kind: 'borrow'; unit: number; other: number }
  /** A request or option that nobody recorded. Streams of servers have none: nothing happens. */
  | { kind: 'request'; unit: number; request: AnyRequest }
  | { kind: 'option'; unit: number; option: number; data: Uint8Array };

interface AnyRequest {
  extended: boolean;
  command: number;
  flags: number;
  offset: number;
  length: number;
  /** The length is such that it ends so many bytes from the end of the disk. */
  toEnd: number | null;
  payload: 'right' | 'none' | 'short' | 'long';
}

const nat = fc.nat(100_000);

/** Values that have hurt parsers before. Relative ones are added to what is there. */
const BOUNDARIES: ((old: bigint, width: number) => bigint)[] = [
  () => 0n,
  () => 1n,
  (_old, width) => (1n << BigInt(8 * width)) - 1n,
  (_old, width) => (1n << BigInt(8 * width)) - 2n,
  (_old, width) => 1n << BigInt(8 * width - 1),
  (_old, width) => (1n << BigInt(8 * width - 1)) - 1n,
  (old) => old + 1n,
  (old) => old - 1n,
  (old) => old + 8n,
  (old) => old - 8n,
  (old) => old * 2n,
  (old) => old / 2n,
  (old) => old + 4096n,
  (old) => old - 4096n,
  (old) => old ^ 0x8000n,
  (old) => old ^ 0x20n,
  () => 2n,
  () => 3n,
  () => 5n,
  () => 6n,
  () => 7n,
  () => 8n,
  () => 11n,
  () => 12n,
  () => 13n,
  () => 22n,
  () => 0x8001n,
  () => 0x8002n,
  () => 0xffffn,
  () => 0x10000n,
  () => 0x10001n,
  () => 64n << 20n,
  () => (64n << 20n) + 1n,
  () => 0xffff_ffffn,
  () => 0x1_0000_0000n,
  () => (1n << 53n) - 1n,
  () => 1n << 53n,
  () => 1n << 63n,
  () => (1n << 64n) - 4096n,
];

const anyRequest: fc.Arbitrary<AnyRequest> = fc.record({
  extended: fc.boolean(),
  command: fc.oneof(
    {
      weight: 9,
      arbitrary: fc.constantFrom(...Object.values(CMD).filter((command) => command !== CMD.DISC)),
    },
    { weight: 1, arbitrary: fc.constantFrom(CMD.DISC, 8, 9, 0xffff) },
  ),
  flags: fc.oneof(
    { weight: 6, arbitrary: fc.constant(0) },
    { weight: 4, arbitrary: fc.constantFrom(...Object.values(FLAG), FLAG.FUA | FLAG.NO_HOLE, 0x40, 0xffff) },
  ),
  offset: fc.oneof(nat, fc.constantFrom(0, 65_535, 65_536, 65_537, 2 ** 32, 2 ** 53)),
  length: fc.oneof(
    nat,
    fc.nat(5000),
    fc.constantFrom(0, 1, 512, 4096, 65_536, 0xffff_ffff, 2 ** 32, 2 ** 53),
  ),
  toEnd: fc.option(fc.constantFrom(0, 1, -1, 512), { freq: 3 }),
  payload: fc.oneof(
    { weight: 9, arbitrary: fc.constant('right' as const) },
    { weight: 1, arbitrary: fc.constantFrom('none' as const, 'short' as const, 'long' as const) },
  ),
});

const structural = fc.oneof(
  fc.record({ kind: fc.constantFrom('drop', 'repeat', 'swap'), unit: nat, with: nat }),
  fc.record({ kind: fc.constantFrom('splice', 'borrow'), unit: nat, other: nat }),
  fc.record({ kind: fc.constant('shorten'), unit: nat, at: nat, count: fc.nat(20) }),
  fc.record({ kind: fc.constant('lengthen'), unit: nat, at: nat, count: fc.nat(20), fill: fc.nat(255) }),
) as fc.Arbitrary<Mutation>;
const inPlace = fc.oneof(
  fc.record({ kind: fc.constant('field'), unit: nat, field: nat, value: fc.nat(BOUNDARIES.length - 1) }),
  fc.record({ kind: fc.constant('flip'), unit: nat, at: nat, bits: fc.integer({ min: 1, max: 255 }) }),
) as fc.Arbitrary<Mutation>;
const inserted = fc.oneof(
  { weight: 4, arbitrary: fc.record({ kind: fc.constant('request'), unit: nat, request: anyRequest }) },
  {
    weight: 1,
    arbitrary: fc.record({
      kind: fc.constant('option'),
      unit: nat,
      option: fc.oneof(fc.constantFrom(...Object.values(OPT), 4, 12, 0, 0xffff_ffff)),
      data: fc.uint8Array({ maxLength: 40 }),
    }),
  },
) as fc.Arbitrary<Mutation>;

/** For what clients send. */
export const clientMutation = fc.oneof(
  { weight: 4, arbitrary: inPlace },
  { weight: 3, arbitrary: structural },
  { weight: 4, arbitrary: inserted },
);
/** For what servers send. */
export const serverMutation = fc.oneof(
  { weight: 5, arbitrary: inPlace },
  { weight: 2, arbitrary: structural },
);

/** The units of a session with its mutations; `others` are the sessions that `splice` and `borrow` take from. */
export function mutated(
  units: readonly Unit[],
  mutations: readonly Mutation[],
  others: readonly (readonly Unit[])[],
): Unit[] {
  const result = [...units];
  for (const mutation of mutations) apply(result, mutation, others);
  return result;
}

/** Three numbers of four are places behind the handshake, where there are any: most damage to a handshake ends the session. */
function placeOf(units: readonly Unit[], number: number): number {
  const first = units.findIndex(({ kind }) => kind === 'request' || kind === 'reply' || kind === 'chunk');
  const from = number % 4 === 0 || first < 0 ? 0 : first;
  return from + (Math.floor(number / 4) % (units.length - from));
}

function apply(units: Unit[], mutation: Mutation, others: readonly (readonly Unit[])[]): void {
  if (units.length === 0) return;
  const at = placeOf(units, mutation.unit);
  const unit = units[at]!;
  switch (mutation.kind) {
    case 'drop':
      units.splice(at, 1);
      return;
    case 'repeat':
      for (let times = mutation.with % 3; times >= 0; times--) units.splice(at, 0, unit);
      return;
    case 'swap': {
      const other = mutation.with % units.length;
      units[at] = units[other]!;
      units[other] = unit;
      return;
    }
    case 'splice':
    case 'borrow': {
      const other = others[mutation.other % others.length]!;
      if (other.length === 0) return;
      const from = Math.floor(mutation.other / others.length) % other.length;
      if (mutation.kind === 'splice') units.splice(at, units.length, ...other.slice(from));
      else units.splice(at, 0, other[from]!);
      return;
    }
    case 'request': {
      // Among the requests, where there are any: anywhere else it is only bytes.
      const first = units.findIndex(({ kind }) => kind === 'request');
      const from = first < 0 ? units.length : first;
      const bytes = requestBytes(mutation.request, 0xf000_0000n + BigInt(units.length));
      units.splice(from + (mutation.unit % (units.length - from + 1)), 0, unitOf('request', bytes));
      return;
    }
    case 'option': {
      const options = units.filter(({ kind }) => kind === 'option').length;
      units.splice(
        1 + (mutation.unit % (options + 1)),
        0,
        unitOf('option', encodeOption(mutation.option, mutation.data)),
      );
      return;
    }
    default:
      units[at] = { ...unit, bytes: damaged(unit, mutation) };
  }
}

/** One unit with an in-place mutation; others leave it as it is. */
export function damaged({ bytes, fields }: Unit, mutation: Mutation): Buffer {
  switch (mutation.kind) {
    case 'field': {
      if (fields.length === 0) return bytes;
      return withField(bytes, fields[mutation.field % fields.length]!, BOUNDARIES[mutation.value]!);
    }
    case 'flip': {
      const changed = Buffer.from(bytes);
      if (bytes.length > 0) changed[mutation.at % bytes.length]! ^= mutation.bits;
      return changed;
    }
    case 'shorten': {
      const from = mutation.at % (bytes.length + 1);
      return Buffer.concat([bytes.subarray(0, from), bytes.subarray(from + mutation.count)]);
    }
    case 'lengthen': {
      const from = mutation.at % (bytes.length + 1);
      const more = Buffer.alloc(mutation.count, mutation.fill);
      return Buffer.concat([bytes.subarray(0, from), more, bytes.subarray(from)]);
    }
    default:
      return bytes;
  }
}

function withField(bytes: Buffer, [at, width]: Field, value: (old: bigint, width: number) => bigint): Buffer {
  if (at + width > bytes.length) return bytes; // shortened before
  const changed = Buffer.from(bytes);
  let old = 0n;
  for (let i = 0; i < width; i++) old = (old << 8n) | BigInt(bytes[at + i]!);
  let rest = BigInt.asUintN(8 * width, value(old, width));
  for (let i = width - 1; i >= 0; i--, rest >>= 8n) changed[at + i] = Number(rest & 0xffn);
  return changed;
}

function requestBytes(request: AnyRequest, cookie: bigint): Buffer {
  const { extended, command, offset, toEnd } = request;
  const length = toEnd === null ? request.length : Math.max(0, DISK_BYTES + toEnd - offset);
  const flags = extended && command === CMD.WRITE ? request.flags | FLAG.PAYLOAD : request.flags;
  const payload = payloadOf(request, flags, length);
  // The payload of a BLOCK_STATUS is its own: its length is in there.
  const filters = extended && command === CMD.STATUS && payload.length > 0;
  return encodeRequest({
    ...{ extended, command, flags, cookie, payload },
    offset: BigInt(offset),
    length: BigInt(filters ? payload.length : length),
  });
}

function payloadOf(
  { extended, command, offset, payload }: AnyRequest,
  flags: number,
  length: number,
): Buffer {
  const flagged = extended && (flags & FLAG.PAYLOAD) !== 0;
  if (command !== CMD.WRITE && !flagged) return Buffer.alloc(0);
  if (flagged && command === CMD.STATUS) {
    const ids = { right: [1 + (offset % 2)], none: [], short: [9], long: [1, 2] }[payload];
    return Buffer.concat([u64(length), ...ids.map(u32)]);
  }
  // No more data than a disk of 64 KiB can take, whatever the header says.
  const bytes = { right: length, none: 0, short: length - 7, long: length + 7 }[payload];
  return Buffer.alloc(Math.max(0, Math.min(bytes, 100_000)), (offset % 255) + 1);
}
