/**
 * The journal of a move: STATE/migrations/ID.jsonl, one JSON object a line, only ever appended to.
 *
 * Invariants
 * - The first line is the whole plan; it is durable before anything is changed on either host.
 * - A step's `begin` is durable before the step is carried out. Its `end` may be lost, unless it holds something that cannot be
 *   asked for again (proofs, that the machine arrived): then it is durable before the next step begins.
 * - A last line without its end is from a coordinator that was killed while it wrote, and counts for nothing.
 * - One coordinator at a time: a lock file names its process, by its number and its start.
 */

import {
  closeSync,
  fsyncSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { z } from 'zod';
import { BlockferryError, messageOf } from '../errors.js';
import { type MovePlan, planSchema } from './plan.js';
import { BACK_STEPS, FORWARD_STEPS } from './steps.js';

const JOURNALS_MAX = 10_000;

const at = z.iso.datetime();
const stepName = z.enum([...FORWARD_STEPS, ...BACK_STEPS]);
const proof = z.strictObject({ volumeId: z.string(), generation: z.number() });
const resultSchema = z.strictObject({
  proofs: z.array(proof).optional(),
  uri: z.string().optional(),
  arrivedAt: at.optional(),
  handoffAt: at.optional(),
  ram: z
    .strictObject({
      transferredBytes: z.number(),
      downtimeMs: z.number().nullable(),
      totalMs: z.number().nullable(),
    })
    .optional(),
});
export type StepResult = z.infer<typeof resultSchema>;

const entrySchema = z.discriminatedUnion('kind', [
  z.strictObject({ kind: z.literal('plan'), at, plan: planSchema }),
  z.strictObject({ kind: z.literal('begin'), at, step: stepName }),
  z.strictObject({ kind: z.literal('end'), at, step: stepName, result: resultSchema }),
  z.strictObject({ kind: z.literal('turn'), at, direction: z.enum(['forward', 'back']), why: z.string() }),
  z.strictObject({
    kind: z.literal('finish'),
    at,
    outcome: z.enum(['moved', 'aborted']),
    why: z.string().nullable(),
  }),
]);
export type JournalEntry = z.infer<typeof entrySchema>;
type WithoutTime<Entry> = Entry extends unknown ? Omit<Entry, 'at'> : never;

export interface JournalSummary {
  id: string;
  vm: string;
  path: string;
  finished: boolean;
}

export class Journal {
  /** A line was not written to its end, and is still there. */
  private torn = false;

  private constructor(
    readonly path: string,
    readonly plan: MovePlan,
    readonly entries: JournalEntry[],
    private readonly descriptor: number,
    /** Bytes of whole lines. */
    private length: number,
    private readonly lock: string,
  ) {}

  static create(folder: string, plan: MovePlan): Journal {
    const path = join(folder, `${plan.id}.jsonl`);
    return failing(path, () => {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
      const descriptor = openSync(path, 'ax', 0o600);
      const journal = new Journal(path, plan, [], descriptor, 0, takeLock(path));
      journal.append({ kind: 'plan', plan }, true);
      const parent = openSync(folder, 'r');
      fsyncSync(parent);
      closeSync(parent);
      return journal;
    });
  }

  /** Opens a journal to go on with it. */
  static open(path: string): Journal {
    return failing(path, () => {
      const lock = takeLock(path);
      try {
        const { entries, length } = readEntries(path);
        const plan = planOf(entries, path);
        const descriptor = openSync(path, 'a', 0o600);
        ftruncateSync(descriptor, length);
        return new Journal(path, plan, entries, descriptor, length, lock);
      } catch (error) {
        unlinkSync(lock);
        throw error;
      }
    });
  }

  /** The moves of `folder`, oldest first. A journal that cannot be read fails the listing: it may be the one that is needed. */
  static list(folder: string): JournalSummary[] {
    return failing(folder, () => {
      let names: string[];
      try {
        names = readdirSync(folder);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
        throw error;
      }
      const paths = names.filter((name) => name.endsWith('.jsonl')).slice(0, JOURNALS_MAX);
      return paths
        .map((name) => {
          const path = join(folder, name);
          const { entries } = readEntries(path);
          // Killed before its plan was durable: nothing was changed on any host.
          if (entries.length === 0) return null;
          const plan = planOf(entries, path);
          const finished = entries.at(-1)?.kind === 'finish';
          return { id: plan.id, vm: plan.vm, path, finished, at: plan.createdAt };
        })
        .filter((summary) => summary !== null)
        .sort((a, b) => (a.at < b.at ? -1 : 1))
        .map(({ id, vm, path, finished }) => ({ id, vm, path, finished }));
    });
  }

  append(entry: WithoutTime<JournalEntry>, durable: boolean): void {
    failing(this.path, () => {
      const complete = { ...entry, at: new Date().toISOString() } as JournalEntry;
      this.write(Buffer.from(`${JSON.stringify(complete)}\n`), durable);
      this.entries.push(complete);
    });
  }

  /** All of it or nothing: what a full disk left of a line would make one damaged line of it and the next. */
  private write(line: Buffer, durable: boolean): void {
    if (this.torn) ftruncateSync(this.descriptor, this.length);
    this.torn = true;
    try {
      for (let done = 0; done < line.length; ) done += writeSync(this.descriptor, line, done);
      if (durable) fsyncSync(this.descriptor);
      this.length += line.length;
      this.torn = false;
    } finally {
      if (this.torn) ftruncateSync(this.descriptor, this.length);
      this.torn = false;
    }
  }

  /** The latest result of a step that has the field. */
  result<Key extends keyof StepResult>(key: Key): StepResult[Key] | undefined {
    for (const entry of this.entries.toReversed()) {
      if (entry.kind === 'end' && entry.result[key] !== undefined) return entry.result[key];
    }
    return undefined;
  }

  close(): void {
    closeSync(this.descriptor);
    unlinkSync(this.lock);
  }
}

function failing<Result>(path: string, act: () => Result): Result {
  try {
    return act();
  } catch (error) {
    if (error instanceof BlockferryError) throw error;
    throw new BlockferryError('migration', `the journal ${path} cannot be used: ${messageOf(error)}`, {
      cause: error,
    });
  }
}

function readEntries(path: string): { entries: JournalEntry[]; length: number } {
  const bytes = readFileSync(path);
  const length = bytes.lastIndexOf(0x0a) + 1;
  const lines = bytes.subarray(0, length).toString('utf8').split('\n').slice(0, -1);
  const entries = lines.map((line, index) => {
    try {
      return entrySchema.parse(JSON.parse(line));
    } catch (error) {
      const what = `line ${index + 1} of the journal ${path} is damaged`;
      throw new BlockferryError('migration', `${what}: restore it, or settle the move by hand`, {
        cause: error,
      });
    }
  });
  return { entries, length };
}

function planOf(entries: JournalEntry[], path: string): MovePlan {
  const first = entries[0];
  if (first?.kind === 'plan') return first.plan;
  throw new BlockferryError('migration', `the journal ${path} does not begin with a plan`);
}

/** A lock of a process that is gone is replaced. */
function takeLock(path: string): string {
  const lock = `${path}.lock`;
  for (let attempt = 0; attempt < 2; attempt += 1) {
    try {
      writeFileSync(lock, `${process.pid} ${startOf(process.pid)}\n`, { flag: 'wx', mode: 0o600 });
      return lock;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    }
    const [holder = 0, startedAt] = readFileSync(lock, 'utf8').trim().split(' ').map(Number);
    if (!isRunning(holder) || (startedAt !== undefined && startedAt !== startOf(holder))) unlinkSync(lock);
    else
      throw new BlockferryError('migration', `another coordinator (process ${holder}) is at work on ${path}`);
  }
  throw new BlockferryError('migration', `another coordinator is at work on ${path}`);
}

/** When a process began, in ticks since the machine did: tells it from a later one of the same number. NaN if it is gone. Source: proc(5). */
function startOf(pid: number): number {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, 'latin1');
    return Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19]);
  } catch {
    return Number.NaN;
  }
}

function isRunning(pid: number): boolean {
  if (!Number.isInteger(pid) || pid <= 0) return false;
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
