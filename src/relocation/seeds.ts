/**
 * Seeds: images on this host whose blocks may be what a source has, such as the template a disk was cloned from. One thread knows them (seed-worker.ts),
 * and is shared by all volumes of this thread that have the same seeds; it lives as long as one of them needs it.
 */
import { Worker } from 'node:worker_threads';
import type { Logger } from 'pino';

/** Images that one volume may have as seeds. */
export const SEEDS_MAX = 16;
/** Questions that wait for an answer: beyond them the thread is taken for one that hangs (a file system that does not answer). */
const QUESTIONS_MAX = 1024;
const HEAP_MIB_MAX = 128;

export interface SeedSettings {
  /** Absolute paths. */
  readonly images: readonly string[];
  /** Where their indexes are kept; made if it is not there. */
  readonly folder: string;
}

/** Which blocks are there. `hashes` of blocks that follow one another and are `bytes` long together: the last may be cut. */
export interface SeedQuestion {
  readonly number: number;
  readonly hashes: Uint8Array;
  readonly bytes: number;
}

export type FromSeeds =
  /** Some of a seed is indexed. */
  | { kind: 'usable' }
  /** All there is to index is. */
  | { kind: 'built' }
  | { kind: 'trouble'; path: string; why: string }
  /** found[i]: block i is in `content`, at its place. Null: none of them was found. */
  | { kind: 'answer'; number: number; found: Uint8Array | null; content: Uint8Array | null };

export interface Found {
  readonly found: Uint8Array;
  readonly content: Buffer;
}

/** Where blocks are looked for. */
export interface SeedFinder {
  /** There is something to look in. */
  readonly usable: boolean;
  /** Null: nothing was found. Never rejects. */
  find(hashes: Uint8Array, bytes: number): Promise<Found | null>;
  release(): void;
}

const shared = new Map<string, Seeds>();

/** The seeds, for one more user, who releases them. */
export function useSeeds(
  settings: SeedSettings,
  log: Logger,
): SeedFinder & { readonly built: Promise<void> } {
  const key = JSON.stringify([settings.folder, ...settings.images]);
  let seeds = shared.get(key);
  if (seeds === undefined || seeds.over) {
    seeds = new Seeds(settings, log, (ended) => {
      if (shared.get(key) === ended) shared.delete(key);
    });
    shared.set(key, seeds);
  }
  return seeds.use();
}

class Seeds {
  readonly #thread: Worker;
  readonly #asked = new Map<number, (found: Found | null) => void>();
  #numbers = 0;
  #users = 0;
  #usable = false;
  over = false;
  /** Resolves when the indexes are complete, or nobody works on them any more. */
  readonly built: Promise<void>;
  #tellBuilt!: () => void;

  constructor(
    settings: SeedSettings,
    private readonly log: Logger,
    private readonly onEnd: (seeds: Seeds) => void,
  ) {
    this.built = new Promise((resolve) => {
      this.#tellBuilt = resolve;
    });
    this.#thread = new Worker(new URL('./seed-worker.js', import.meta.url), {
      name: 'seeds',
      workerData: settings,
      resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB_MAX },
      trackUnmanagedFds: true,
    });
    this.#thread.unref();
    this.#thread.on('message', (message: FromSeeds) => this.#take(message));
    this.#thread.on('error', (error) => this.log.error({ err: error }, 'the thread of the seeds failed'));
    this.#thread.on('exit', () => this.#end());
  }

  use(): SeedFinder & { readonly built: Promise<void> } {
    const seeds = this;
    let using = true;
    this.#users++;
    return {
      built: this.built,
      get usable() {
        return seeds.#usable && !seeds.over && seeds.#asked.size < QUESTIONS_MAX;
      },
      find: (hashes, bytes) => seeds.#find(hashes, bytes),
      release() {
        if (using) seeds.#release();
        using = false;
      },
    };
  }

  #release(): void {
    this.#users--;
    if (this.#users > 0) return;
    this.#end();
    void this.#thread.terminate();
  }

  #find(hashes: Uint8Array, bytes: number): Promise<Found | null> {
    if (this.over || this.#asked.size >= QUESTIONS_MAX) return Promise.resolve(null);
    return new Promise((resolve) => {
      this.#numbers++;
      this.#asked.set(this.#numbers, resolve);
      this.#thread.postMessage({ number: this.#numbers, hashes, bytes } satisfies SeedQuestion);
    });
  }

  #take(message: FromSeeds): void {
    switch (message.kind) {
      case 'usable':
        this.#usable = true;
        return;
      case 'built':
        this.#tellBuilt();
        return;
      case 'trouble':
        this.log.warn({ seed: message.path, why: message.why }, 'a seed is of no use, or not all of it');
        return;
      case 'answer': {
        const { number, found, content } = message;
        const answer = this.#asked.get(number);
        this.#asked.delete(number);
        if (found === null || content === null) answer?.(null);
        else
          answer?.({
            found,
            content: Buffer.from(content.buffer, content.byteOffset, content.byteLength),
          });
        return;
      }
    }
  }

  #end(): void {
    this.over = true;
    this.#tellBuilt();
    this.onEnd(this);
    const asked = [...this.#asked.values()];
    this.#asked.clear();
    for (const answer of asked) answer(null);
  }
}
