/**
 * What a source says it changed since tracking began (volume/dirty.ts), as a list that a standby can take to heart.
 *
 * Invariants
 * - A list is of one round: every extent of a blockferry's carries the round's cookie, and one that does not match the others spoils the list, which
 *   then says that everything may have changed.
 * - At a takeover the list must be of a sealed source, where it tells: of one that still changes it would be worth nothing.
 * - A list that is too long to keep tells too much, never too little: gaps between its runs count as changed.
 */
import { BlockferryError } from '../errors.js';
import type { Extent } from '../nbd/client/client.js';
import { DIRTY } from '../nbd/constants.js';
import { BLOCK_BYTES, blockAt, blocksOf } from '../volume/blocks.js';
import { DIRTY_COOKIE_UNIT, DirtyFlag } from '../volume/dirty-status.js';
import type { SourceChanges } from '../volume/volume.js';
import type { Lane } from './link.js';

/** Of the source, asked about at once: as much as 32 bits of length can say, in whole blocks. */
const STRETCH_BYTES = 2 ** 32 - BLOCK_BYTES;
const STRETCH_BYTES_EXTENDED = 2 ** 40;
/** Runs of a list, at most. */
export const RUNS_MAX = 1 << 20;
/** The machine stands still while a takeover asks: better to turn back than to wait for long. */
export const CHANGES_TIMEOUT_MS = 10_000;

export interface ChangesSource {
  dirty(offset: number, length: number, lane: Lane): Promise<Extent[] | null>;
}

export interface ChangesQuestion {
  /** Of the volume, bytes. */
  readonly size: number;
  readonly context: string;
  /** Fails with 'phase' if the source tells that it is not. */
  readonly sealed: boolean;
  /** Default: CHANGES_TIMEOUT_MS; null: as long as it takes. */
  readonly timeoutMs?: number | null;
}

/** A cut that comes while the list is read spoils it: it is asked for again, so often. */
const ATTEMPTS_MAX = 3;

/** Rejects with what the link does, 'source-unreachable' when it takes too long, and 'phase'. */
export async function changesOf(source: ChangesSource, question: ChangesQuestion): Promise<SourceChanges> {
  const { timeoutMs = CHANGES_TIMEOUT_MS } = question;
  const asked = { over: false };
  const list = askOften(source, question, asked);
  if (timeoutMs === null) return list;
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      reject(
        new BlockferryError(
          'source-unreachable',
          `the source did not tell its changes within ${timeoutMs / 1000} s`,
        ),
      );
    }, timeoutMs);
  });
  list.catch(() => undefined); // it may fail when nobody waits any more
  try {
    return await Promise.race([list, late]);
  } finally {
    clearTimeout(timer);
    asked.over = true;
  }
}

async function askOften(
  source: ChangesSource,
  question: ChangesQuestion,
  asked: { readonly over: boolean },
): Promise<SourceChanges> {
  for (let attempt = 1; ; attempt++) {
    const list = await ask(source, question, asked);
    if (list !== 'mixed') return list;
    if (attempt === ATTEMPTS_MAX) return { runs: null, cookie: null };
  }
}

async function ask(
  source: ChangesSource,
  question: ChangesQuestion,
  asked: { readonly over: boolean },
): Promise<SourceChanges | 'mixed'> {
  const { size, context, sealed } = question;
  const lane = sealed ? 'demand' : 'bulk';
  const rounds = context === DIRTY;
  const list = new ChangeList(size);
  for (let offset = 0, stretch = STRETCH_BYTES_EXTENDED; offset < size && !asked.over; ) {
    const extents = await source
      .dirty(offset, Math.min(stretch, size - offset), lane)
      .catch((error: unknown) => {
        // A source without extended headers takes no longer questions.
        if (stretch === STRETCH_BYTES || !(error instanceof BlockferryError && error.code === 'bounds'))
          throw error;
        stretch = STRETCH_BYTES;
        return undefined;
      });
    if (extents === undefined) continue;
    if (extents === null || extents.length === 0) return { runs: null, cookie: null };
    for (const { length, flags } of extents) {
      if (rounds) list.inRound(Math.floor(flags / DIRTY_COOKIE_UNIT));
      if (rounds && sealed && (flags & DirtyFlag.SEALED) === 0)
        throw new BlockferryError('phase', 'the source is not sealed: it may still change, takeover refused');
      if ((flags & DirtyFlag.DIRTY) !== 0) list.add(offset, Math.min(offset + length, size));
      offset += length;
    }
  }
  if (list.mixed) return 'mixed';
  return list.tracked ? { runs: list.runs, cookie: list.cookie } : { runs: null, cookie: null };
}

class ChangeList {
  /** Blocks: first, end, first, end, ... ascending. */
  readonly runs: number[] = [];
  cookie: number | null = null;
  /** Of one round and another. */
  mixed = false;
  tracked = true;

  constructor(readonly size: number) {}

  inRound(cookie: number): void {
    if (this.cookie !== null && this.cookie !== cookie) this.mixed = true;
    this.cookie = cookie;
    if (cookie === 0) this.tracked = false;
  }

  /** Bytes [from, to) changed. */
  add(from: number, to: number): void {
    const { runs } = this;
    const first = blockAt(from);
    const end = blocksOf(to);
    const last = runs.at(-1);
    if (last !== undefined && (first <= last || runs.length >= 2 * RUNS_MAX))
      runs[runs.length - 1] = Math.max(end, last);
    else runs.push(first, end);
  }
}
