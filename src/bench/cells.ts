/**
 * What is measured: one cell is one load on one kind of place. A cell's name is its words, and a filter is some of them:
 *
 *     read 4k random d16 c1 unix tmpfs          write 1m seq d8 c1 tcp cache          write 4k random d16 c1 flush32 unix cache
 */

import { BlockferryError } from '../errors.js';
import type { Placement } from './images.js';
import type { LoadOptions } from './load.js';

export type Work = 'read' | 'write' | 'mixed';
export type Transport = 'unix' | 'tcp';

export interface Cell {
  name: string;
  work: Work;
  blockBytes: number;
  sequential: boolean;
  depth: number;
  connections: number;
  /** 0: never. */
  flushEvery: number;
  transport: Transport;
  placement: Placement;
}

/** The filter that is fulfilled by every cell. */
export const EVERYTHING = 'all';

const READ_PERCENT: Record<Work, number> = { read: 100, write: 0, mixed: 70 };
const RANDOM_BYTES = 4096;
const RANDOM_DEPTHS = [1, 16, 64];
const SEQUENTIAL_BYTES = [64 << 10, 128 << 10, 1 << 20];
const SEQUENTIAL_DEPTHS = [1, 8];
const FLUSH_EVERY = 32;
/** The same offsets for every server and in every round. */
const SEED = 20_260_101;

type Shape = Omit<Cell, 'name' | 'transport' | 'placement'>;

function sizeWord(bytes: number): string {
  return bytes >= 1 << 20 ? `${bytes >> 20}m` : `${bytes >> 10}k`;
}

function cellOf(shape: Shape, transport: Transport, placement: Placement): Cell {
  const words = [
    shape.work,
    sizeWord(shape.blockBytes),
    shape.sequential ? 'seq' : 'random',
    `d${shape.depth}`,
    `c${shape.connections}`,
    ...(shape.flushEvery === 0 ? [] : [`flush${shape.flushEvery}`]),
    transport,
    placement,
  ];
  return { ...shape, name: words.join(' '), transport, placement };
}

function shapes(): Shape[] {
  const random = [1, 4].flatMap((connections) =>
    (['read', 'write', 'mixed'] as const).flatMap((work) =>
      RANDOM_DEPTHS.map((depth) => ({
        work,
        blockBytes: RANDOM_BYTES,
        sequential: false,
        depth,
        connections,
        flushEvery: 0,
      })),
    ),
  );
  const sequential = SEQUENTIAL_BYTES.flatMap((blockBytes) =>
    (['read', 'write'] as const).flatMap((work) =>
      SEQUENTIAL_DEPTHS.map((depth) => ({
        work,
        blockBytes,
        sequential: true,
        depth,
        connections: 1,
        flushEvery: 0,
      })),
    ),
  );
  const flushed = random
    .filter(({ work, connections }) => work === 'write' && connections === 1)
    .map((shape) => ({ ...shape, flushEvery: FLUSH_EVERY }));
  return [...random, ...sequential, ...flushed];
}

/** The whole matrix. Only reads can find a cold cache. */
export const CELLS: readonly Cell[] = (['tmpfs', 'cache', 'cold'] as const).flatMap((placement) =>
  (['unix', 'tcp'] as const).flatMap((transport) =>
    shapes()
      .filter(({ work }) => placement !== 'cold' || work === 'read')
      .map((shape) => cellOf(shape, transport, placement)),
  ),
);

/** What `--quick` measures. */
export const QUICK: readonly string[] = [
  'read 4k d1 c1 unix tmpfs',
  'read 4k d16 c1 unix tmpfs',
  'read 4k d64 c1 unix tmpfs',
  'read 4k d16 c4 unix tmpfs',
  'write 4k d16 c1 unix tmpfs -flush32',
  'mixed 4k d16 c1 unix tmpfs',
  'read 4k d16 c1 tcp tmpfs',
  'read 1m d8 unix tmpfs',
];

/**
 * The cells that have all words of one of the filters; a word after "-" is one they must not have. Throws 'usage' for
 * a filter that no cell has.
 */
export function selectCells(filters: readonly string[]): Cell[] {
  const fitting = filters.map((filter) => {
    const words = filter
      .toLowerCase()
      .split(/\s+/)
      .filter((word) => word !== '' && word !== EVERYTHING);
    const found = CELLS.filter(({ name }) => {
      const has = new Set(name.split(' '));
      return words.every((word) => (word.startsWith('-') ? !has.has(word.slice(1)) : has.has(word)));
    });
    if (found.length === 0)
      throw new BlockferryError(
        'usage',
        `no cell is "${filter}": write some words of one, as in "${CELLS[0].name}", or "${EVERYTHING}"`,
      );
    return new Set(found);
  });
  return CELLS.filter((cell) => fitting.some((cells) => cells.has(cell)));
}

/** A cold cache is read once, each block at most once, and nothing is read to warm up. */
export function loadOf(cell: Cell, times: { durationMs: number; warmupMs: number }): Partial<LoadOptions> {
  const cold = cell.placement === 'cold';
  return {
    connections: cell.connections,
    depth: cell.depth,
    blockBytes: cell.blockBytes,
    order: cell.sequential ? 'sequential' : cold ? 'shuffled' : 'random',
    readPercent: READ_PERCENT[cell.work],
    flushEvery: cell.flushEvery,
    durationMs: times.durationMs,
    ...(cold ? { lap: true } : { warmupMs: times.warmupMs }),
    seed: SEED,
  };
}
