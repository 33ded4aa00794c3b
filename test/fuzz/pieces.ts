/** A READ's data chunk taken apart and put together otherwise: whole and honest in every length, and yet wrong, or right in an unusual way. */
import fc from 'fast-check';
import {
  CHUNK,
  EXTENDED_BYTES,
  EXTENDED_REPLY_MAGIC,
  SIMPLE_MAGIC,
  STRUCTURED_BYTES,
  STRUCTURED_MAGIC,
  u32,
  u64,
} from './wire.js';

export interface Rearrangement {
  /** Where the data is cut, in thousandths of it. */
  cuts: number[];
  /** What becomes of each piece, over and over. */
  fates: ('keep' | 'hole' | 'drop' | 'twice' | 'longer' | 'shifted')[];
  backwards: boolean;
  /** How the reply ends: by the flag of its last chunk, a chunk of its own, an error, or not at all. */
  ending: 'flag' | 'none' | 'error' | 'error-offset' | 'open';
  errno: number;
}

export const rearrangement: fc.Arbitrary<Rearrangement> = fc.record({
  cuts: fc.array(fc.nat(1000), { maxLength: 4 }),
  fates: fc.oneof(
    fc.constant<Rearrangement['fates']>(['keep']),
    fc.array(fc.constantFrom('keep', 'keep', 'keep', 'hole', 'drop', 'twice', 'longer', 'shifted'), {
      minLength: 1,
      maxLength: 5,
    }),
  ),
  backwards: fc.boolean(),
  ending: fc.constantFrom('flag', 'flag', 'none', 'error', 'error-offset', 'open'),
  errno: fc.constantFrom(5, 22, 108, 0, 9999),
});

/** The chunks in place of one data chunk; anything else stays as it is, but for an error in its place. */
export function rearranged(bytes: Buffer, plan: Rearrangement): Buffer {
  const magic = bytes.length < STRUCTURED_BYTES ? 0 : bytes.readUInt32BE(0);
  if (magic === SIMPLE_MAGIC && plan.ending === 'error') {
    const failed = Buffer.from(bytes.subarray(0, 16));
    failed.writeUInt32BE(plan.errno, 4);
    return failed;
  }
  const headBytes = magic === EXTENDED_REPLY_MAGIC ? EXTENDED_BYTES : STRUCTURED_BYTES;
  const isChunk = magic === STRUCTURED_MAGIC || magic === EXTENDED_REPLY_MAGIC;
  if (!isChunk || bytes.length < headBytes + 9 || bytes.readUInt16BE(6) !== CHUNK.DATA) return bytes;
  const chunk = (type: number, payload: Buffer, done: boolean): Buffer => {
    const head = Buffer.from(bytes.subarray(0, headBytes));
    head.writeUInt16BE(done ? 1 : 0, 4);
    head.writeUInt16BE(type, 6);
    if (headBytes === EXTENDED_BYTES) head.writeBigUInt64BE(BigInt(payload.length), 24);
    else head.writeUInt32BE(payload.length, 16);
    return Buffer.concat([head, payload]);
  };
  const offset = bytes.readBigUInt64BE(headBytes);
  const contents = piecesOf(offset, bytes.subarray(headBytes + 8), plan);
  const flagged = plan.ending === 'flag';
  const chunks = contents.map(({ type, payload }, index) =>
    chunk(type, payload, flagged && index === contents.length - 1),
  );
  const problem = Buffer.concat([u32(plan.errno), Buffer.from([0, 2]), Buffer.from('no')]);
  if (plan.ending === 'none') chunks.push(chunk(CHUNK.NONE, Buffer.alloc(0), true));
  else if (plan.ending === 'error') chunks.push(chunk(CHUNK.ERROR, problem, true));
  else if (plan.ending === 'error-offset')
    chunks.push(chunk(CHUNK.ERROR_OFFSET, Buffer.concat([problem, u64(offset)]), true));
  return Buffer.concat(chunks);
}

function piecesOf(offset: bigint, data: Buffer, plan: Rearrangement): { type: number; payload: Buffer }[] {
  const places = new Set(plan.cuts.map((cut) => Math.floor((cut * data.length) / 1000)));
  const bounds = [0, ...[...places].sort((a, b) => a - b), data.length];
  const pieces: { type: number; payload: Buffer }[] = [];
  const add = (from: number, bytes: Buffer) =>
    pieces.push({ type: CHUNK.DATA, payload: Buffer.concat([u64(offset + BigInt(from)), bytes]) });
  for (let index = 0; index + 1 < bounds.length; index++) {
    const from = bounds[index]!;
    const piece = data.subarray(from, bounds[index + 1]);
    if (piece.length === 0) continue;
    const fate = plan.fates[index % plan.fates.length];
    if (fate === 'drop') continue;
    if (fate === 'hole') {
      const payload = Buffer.concat([u64(offset + BigInt(from)), u32(piece.length)]);
      pieces.push({ type: CHUNK.HOLE, payload });
      continue;
    }
    if (fate === 'longer') add(from, Buffer.concat([piece, Buffer.alloc(7, 0xbd)]));
    else add(fate === 'shifted' ? from + 1 : from, piece);
    if (fate === 'twice') add(from, piece);
  }
  return plan.backwards ? pieces.reverse() : pieces;
}
