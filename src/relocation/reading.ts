/** Reads any range from one connection to a source, in requests as the source wants them: not too long, and on its blocks. */
import { BlockferryError } from '../errors.js';
import type { Extent, NbdClient } from '../nbd/client/client.js';
import { BASE_ALLOCATION, FIRST_ACCESS, HEAT } from '../nbd/constants.js';
import type { Budget } from './budget.js';

/** Bytes of one request, at most. */
const REQUEST_BYTES_MAX = 4 << 20;

/** Why nothing can be read from such an export to its last byte; undefined if all can. */
export function whyNotReadable({ size, blockSize }: NbdClient['info']): string | undefined {
  if (blockSize === null || size % blockSize.minimum === 0) return undefined;
  return `its size of ${size} bytes is no multiple of its smallest request of ${blockSize.minimum} bytes, so that its end cannot be read`;
}

/** Fills buffer[at, at + length). Rejects as NbdClient.read does, when none of its requests is in flight any more. */
export async function readFrom(
  client: NbdClient,
  budget: Budget,
  offset: number,
  length: number,
  buffer: Buffer,
  at: number,
): Promise<void> {
  const minimum = client.info.blockSize?.minimum ?? 1;
  const before = offset % minimum;
  if (before === 0 && length % minimum === 0) return readAligned(client, budget, offset, length, buffer, at);
  const wide = Math.ceil((before + length) / minimum) * minimum;
  const bounce = Buffer.allocUnsafe(wide);
  await readAligned(client, budget, offset - before, wide, bounce, 0);
  bounce.copy(buffer, at, before, before + length);
}

async function readAligned(
  client: NbdClient,
  budget: Budget,
  offset: number,
  length: number,
  buffer: Buffer,
  at: number,
): Promise<void> {
  const minimum = client.info.blockSize?.minimum ?? 1;
  const most = Math.min(client.payloadBytesMax, REQUEST_BYTES_MAX);
  const piece = Math.max(minimum, most - (most % minimum));
  if (length <= piece) return readOnce(client, budget, offset, length, buffer, at);
  const pieces: Promise<void>[] = [];
  for (let done = 0; done < length; done += piece) {
    const bytes = Math.min(piece, length - done);
    pieces.push(readOnce(client, budget, offset + done, bytes, buffer, at + done));
  }
  // The buffer is theirs until the last one is over.
  for (const result of await Promise.allSettled(pieces))
    if (result.status === 'rejected') throw result.reason;
}

async function readOnce(
  client: NbdClient,
  budget: Budget,
  offset: number,
  length: number,
  buffer: Buffer,
  at: number,
): Promise<void> {
  const turn = budget.take(length);
  if (turn !== null) await turn;
  try {
    await client.read(offset, length, buffer, at);
  } finally {
    budget.give(length);
  }
}

/** Extents of `base:allocation` from `offset` on; none if the source's answer does not reach that far. Null: it does not tell. */
export async function allocationFrom(
  client: NbdClient,
  offset: number,
  length: number,
): Promise<Extent[] | null> {
  return extentsFrom(client, BASE_ALLOCATION, offset, length);
}

/**
 * Extents of `blockferry:heat` from `offset` on, their flags the source's counts: writes in the high 16 bits, reads in the low ones. They may
 * end before the range does: ask on from there. Null: the source does not tell.
 */
export async function heatFrom(client: NbdClient, offset: number, length: number): Promise<Extent[] | null> {
  return extentsFrom(client, HEAT, offset, length);
}

/** Likewise of `blockferry:first-access`, their flags the regions' ranks; 0: none. */
export async function firstAccessFrom(
  client: NbdClient,
  offset: number,
  length: number,
): Promise<Extent[] | null> {
  return extentsFrom(client, FIRST_ACCESS, offset, length);
}

/** Extents of any context from `offset` on; they may end early, as `heatFrom`'s. Null: the source does not tell. */
export async function extentsFrom(
  client: NbdClient,
  context: string,
  offset: number,
  length: number,
): Promise<Extent[] | null> {
  if (!client.info.contexts.has(context)) return null;
  const minimum = client.info.blockSize?.minimum ?? 1;
  const before = offset % minimum;
  const wide = Math.ceil((before + length) / minimum) * minimum;
  const extents = await client.blockStatus(context, offset - before, wide);
  return before === 0 ? extents : withoutFront(extents, before);
}

function withoutFront(extents: readonly Extent[], bytes: number): Extent[] {
  let skip = bytes;
  const rest: Extent[] = [];
  for (const { length, flags } of extents) {
    if (length > skip) rest.push({ length: length - skip, flags });
    skip = Math.max(0, skip - length);
  }
  return rest;
}

/** Whether the connection failed, rather than the request. */
export function isLoss(error: unknown): boolean {
  if (!(error instanceof BlockferryError)) return false;
  return error.code === 'closed' || error.code === 'protocol' || error.code === 'timeout';
}
