/**
 * What the source says of its zeros (`base:allocation`): asked for a stretch at a time, when it is first wanted, and remembered as long as there
 * is room for it. What was forgotten is asked for again.
 */
import { LRUCache } from 'lru-cache';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { Extent } from '../nbd/client/client.js';
import { BLOCK_BYTES } from '../volume/blocks.js';
import { ZeroMap } from './zero-map.js';

/** Bytes of the source that are asked about at once, at most. */
const STRETCH_BYTES = 1 << 30;
const STRETCH_BLOCKS = STRETCH_BYTES / BLOCK_BYTES;
/** Runs of zeros that are remembered, of all stretches; about 32 bytes each. */
const RUNS_MAX = 1 << 18;

export interface AllocationSource {
  allocation(offset: number, length: number): Promise<Extent[] | null>;
}

export class SourceAllocation {
  /** Answers of one stretch, in ascending order: the source may tell less than it was asked for. */
  readonly #known = new LRUCache<number, ZeroMap[]>({
    maxSize: RUNS_MAX,
    sizeCalculation: (maps) => maps.reduce((runs, map) => runs + map.runs + 1, 1),
  });
  #told = true;
  #asking = false;
  /** Answers to what was asked before are worth nothing. */
  #era = 0;

  constructor(
    private readonly source: AllocationSource,
    /** Of the volume, bytes. */
    private readonly size: number,
    private readonly log: Logger,
    /** A question was answered, or failed: with this, if the source is out of reach. */
    private readonly onAnswer: (unreachable: boolean) => void,
  ) {}

  /** The source tells; false: everything has to be taken for data. */
  get told(): boolean {
    return this.#told;
  }

  /** What is known of the stretch around the block. */
  around(block: number): ZeroMap | undefined {
    return this.#known.get(Math.floor(block / STRETCH_BLOCKS))?.find((map) => map.knows(block));
  }

  /** Asks about what is around the block, unless a question is under way: `onAnswer` is called then. */
  async ask(block: number): Promise<void> {
    if (this.#asking) return;
    this.#asking = true;
    const era = this.#era;
    const stretch = Math.floor(block / STRETCH_BLOCKS);
    // The whole stretch, unless a part of it is known.
    const offset = this.#known.has(stretch) ? block * BLOCK_BYTES : stretch * STRETCH_BYTES;
    const past = Math.min((stretch + 1) * STRETCH_BYTES, this.size);
    let unreachable = false;
    try {
      const extents = await this.source.allocation(offset, past - offset);
      if (era === this.#era) this.#learn(stretch, offset, extents);
    } catch (error) {
      const code = error instanceof BlockferryError ? error.code : undefined;
      unreachable = code === 'source-unreachable';
      if (!unreachable && code !== 'closed') {
        // Copying without knowing is right, only dearer.
        this.log.warn({ why: messageOf(error) }, 'the source does not tell what is allocated, copying all');
        this.#told = false;
      }
    } finally {
      this.#asking = false;
    }
    this.onAnswer(unreachable);
  }

  #learn(stretch: number, offset: number, extents: Extent[] | null): void {
    const map = extents === null ? ZeroMap.NOTHING : ZeroMap.of(offset, extents, this.size);
    // Extents smaller than a block lead nowhere.
    this.#told = map.to > map.from;
    if (!this.#told) return;
    const maps = [...(this.#known.get(stretch) ?? []), map];
    this.#known.set(
      stretch,
      maps.sort((a, b) => a.from - b.from),
    );
  }

  /** What was learned is worth nothing any more. */
  forget(): void {
    this.#era++;
    this.#known.clear();
    this.#told = true;
  }
}
