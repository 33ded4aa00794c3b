/**
 * What a source says it changed since tracking began (volume/dirty.ts), as a list that a standby can take to heart.
 *
 * Invariants
 * - A list is of one round: every extent of a blockferry's carries the round's cookie, and one that does not match the others spoils the list, which is
 *   asked for again, and in the end says that everything may have changed.
 * - At a takeover the list must be of a sealed source, where it tells: of one that still changes it would be worth nothing.
 * - Parts of the source are asked about at the same time, each from its start to its end: of a round all of them are true whenever they are told, as what
 *   changes later is told by the next list.
 * - A list that is too long to keep tells too much, never too little: gaps between its runs count as changed.
 */
import { BlockferryError } from '../errors.js';
import type { Extent } from '../nbd/client/client.js';
import { CHANGED, DIRTY } from '../nbd/constants.js';
import { BLOCK_BYTES, blockAt, blocksOf } from '../volume/blocks.js';
import { DIRTY_COOKIE_UNIT, DirtyFlag } from '../volume/dirty-status.js';
import type { SourceChanges } from '../volume/volume.js';
import type { Lane } from './link.js';

/** Of the source, asked about at once: as much as 32 bits of length can say, in whole blocks. */
const STRETCH_BYTES = 2 ** 32 - BLOCK_BYTES;
const STRETCH_BYTES_EXTENDED = 2 ** 40;
/** Parts of the source that are asked about at the same time, at most, and what is not worth more than one question. */
const PARTS = 32;
const PART_BYTES_MIN = 2 ** 30;
/** Runs of a list, at most. */
export const RUNS_MAX = 1 << 20;
/** The machine stands still while a takeover asks: better to turn back than to wait for long. */
export const CHANGES_TIMEOUT_MS = 10_000;
/** A cut that comes while the list is read spoils it: it is asked for again, so often. */
const ATTEMPTS_MAX = 3;

export interface ChangesSource {
  dirty(context: string, offset: number, length: number, lane: Lane): Promise<Extent[] | null>;
}

export interface ChangesQuestion {
  /** Of the volume, bytes. */
  readonly size: number;
  readonly context: string;
  /** At a takeover: fails with 'phase' if the source tells that it is not. */
  readonly sealed: boolean;
  /** Default: CHANGES_TIMEOUT_MS; null: as long as it takes. */
  readonly timeoutMs?: number | null;
}

/** Rejects with what the link does, 'source-unreachable' when it takes too long, and 'phase'. */
export async function changesOf(source: ChangesSource, question: ChangesQuestion): Promise<SourceChanges> {
  const { timeoutMs = CHANGES_TIMEOUT_MS } = question;
  const asked: Asked = { source, question, over: false };
  const list = askOften(asked);
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

/**
 * At a takeover, as `changesOf`: the machine stands still, so no more is asked for than will do. What changed before the round that is known here was
 * dropped, and copied again; only where the source is in another round its whole list is needed.
 */
export async function lastChangesOf(
  source: ChangesSource,
  question: ChangesQuestion,
  known: number | null,
): Promise<SourceChanges> {
  if (question.context !== DIRTY) return changesOf(source, question);
  const lately = await changesOf(source, { ...question, context: CHANGED });
  return lately.cookie !== null && lately.cookie === known ? lately : changesOf(source, question);
}

interface Asked {
  readonly source: ChangesSource;
  readonly question: ChangesQuestion;
  /** Nobody waits for the answer any more. */
  over: boolean;
}

async function askOften(asked: Asked): Promise<SourceChanges> {
  for (let attempt = 1; ; attempt++) {
    const list = await ask(asked);
    if (!list.mixed || asked.over || attempt === ATTEMPTS_MAX)
      return list.changes(asked.question.context === CHANGED);
  }
}

/** All parts at once: a list of many changes takes many answers, and the machine may stand still for each round trip. */
async function ask(asked: Asked): Promise<ChangeList> {
  const { size } = asked.question;
  const partBytes = Math.max(PART_BYTES_MIN, Math.ceil(size / PARTS / BLOCK_BYTES) * BLOCK_BYTES);
  const list = new ChangeList(Math.ceil(size / partBytes));
  await Promise.all(
    list.parts.map((part, index) => {
      const from = index * partBytes;
      return askPart(asked, list, part, from, Math.min(from + partBytes, size));
    }),
  );
  return list;
}

/** Of the source's bytes [from, to). */
async function askPart(asked: Asked, list: ChangeList, part: Part, from: number, to: number): Promise<void> {
  const { source, question } = asked;
  const { context } = question;
  const rounds = context === DIRTY || context === CHANGED;
  const lane = question.sealed ? 'demand' : 'bulk';
  for (let offset = from, stretch = STRETCH_BYTES_EXTENDED; offset < to && list.whole && !asked.over; ) {
    const extents = await source
      .dirty(context, offset, Math.min(stretch, to - offset), lane)
      .catch((error: unknown) => {
        // A source without extended headers takes no longer questions.
        if (stretch === STRETCH_BYTES || !(error instanceof BlockferryError && error.code === 'bounds'))
          throw error;
        stretch = STRETCH_BYTES;
        return undefined;
      });
    if (extents === undefined) continue;
    if (extents === null || extents.length === 0) list.untold = true;
    for (const { length, flags } of extents ?? []) {
      if (rounds) list.inRound(Math.floor(flags / DIRTY_COOKIE_UNIT));
      if (rounds && question.sealed && (flags & DirtyFlag.SEALED) === 0)
        throw new BlockferryError('phase', 'the source is not sealed: it may still change, takeover refused');
      // The last one may reach into the next part, which tells of itself.
      const past = Math.min(offset + length, to);
      if ((flags & DirtyFlag.CHANGED) !== 0) list.add(part.lately, offset, past);
      if ((flags & (DirtyFlag.CHANGED | DirtyFlag.TOLD)) !== 0) list.add(part.runs, offset, past);
      offset += length;
    }
  }
}

/** Blocks: first, end, first, end, ... ascending. */
interface Part {
  readonly runs: number[];
  readonly lately: number[];
}

class ChangeList {
  /** Of the source, in ascending order. */
  readonly parts: readonly Part[];
  #entries = 0;
  #cookie: number | null = null;
  /** Of one round and another. */
  mixed = false;
  untold = false;

  constructor(parts: number) {
    this.parts = Array.from({ length: parts }, () => ({ runs: [], lately: [] }));
  }

  get whole(): boolean {
    return !this.mixed && !this.untold;
  }

  /** `partly`: only of the round that is under way; who knows no other may take all for changed. */
  changes(partly: boolean): SourceChanges {
    if (!this.whole) return { runs: null, cookie: null };
    const [runs, lately] = [this.parts.map((part) => part.runs), this.parts.map((part) => part.lately)];
    return { runs: partly ? null : joined(runs), lately: joined(lately), cookie: this.#cookie };
  }

  inRound(cookie: number): void {
    if (this.#cookie !== null && this.#cookie !== cookie) this.mixed = true;
    this.#cookie = cookie;
    if (cookie === 0) this.untold = true; // nobody tracks there
  }

  /** Bytes [from, to) changed, which lie behind what the runs have. */
  add(runs: number[], from: number, to: number): void {
    const first = blockAt(from);
    const end = blocksOf(to);
    const last = runs.at(-1);
    if (last !== undefined && (first <= last || this.#entries >= 2 * RUNS_MAX))
      runs[runs.length - 1] = Math.max(end, last);
    else {
      runs.push(first, end);
      this.#entries++;
    }
  }
}

/** Runs of parts that follow one another; those that touch are one. */
function joined(parts: readonly number[][]): number[] {
  const all: number[] = [];
  for (const runs of parts) {
    const touches = runs.length > 0 && all.length > 0 && all.at(-1)! >= runs[0]!;
    if (touches) all.pop();
    for (let at = touches ? 1 : 0; at < runs.length; at++) all.push(runs[at]!);
  }
  return all;
}
