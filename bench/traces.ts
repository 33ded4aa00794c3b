/** What a guest reads and writes while it boots, and while it builds a program, as requests of blocks of real files. Always the same for a seed. */

const BLOCK_BYTES = 4096;

export type Random = (below: number) => number;

/** Numerical Recipes' generator: small, and the same for a seed. */
export function randomFrom(seed: number): Random {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

export interface Access {
  readonly kind: 'read' | 'write';
  /** Bytes. */
  readonly offset: number;
  readonly length: number;
  /** The guest computes for so long before it. */
  readonly thinkMs: number;
}

/** A file's blocks, in order. */
export type FileBlocks = readonly number[];

const BOOT_FILES_MAX = 400;
/** Of its pieces behind the first, so many of a hundred are read. */
const PAGES_PERCENT = 35;
/** Blocks of a piece: 16 to 64 KiB. */
const PIECE_BLOCKS = [4, 16] as const;
const BOOT_THINK_MS = 1;

const UNITS = 150;
const HEADERS_OF_UNIT = 40;
const OBJECT_BLOCKS = (64 << 10) / BLOCK_BYTES;
const READ_THINK_MS = 1;
const COMPILE_MS = 30;
const SCALE = 2 ** 30;

/** Head and a part of the pages of programs and libraries. `seed` says in which order; which pages does not depend on it. */
export function bootTrace(files: readonly FileBlocks[], seed: number): Access[] {
  const fixed = randomFrom(1);
  const large = shuffled(
    files.filter((blocks) => blocks.length >= PIECE_BLOCKS[0]),
    fixed,
  ).slice(0, BOOT_FILES_MAX);
  const read = large.map((blocks) => {
    const accesses: Access[] = [];
    for (let at = 0; at < blocks.length; ) {
      const [least, most] = PIECE_BLOCKS;
      const count = least + fixed(most - least + 1);
      if (at === 0 || fixed(100) < PAGES_PERCENT)
        accesses.push(...accessesOf('read', blocks.slice(at, at + count), BOOT_THINK_MS));
      at += count;
    }
    return accesses;
  });
  return shuffled(read, randomFrom(seed)).flat();
}

/** Per unit some headers by Zipf's law, each once in all as the guest caches them, then an object. `seed` says which units include what. */
export function buildTrace(
  headers: readonly FileBlocks[],
  objects: readonly FileBlocks[],
  seed: number,
): Access[] {
  const popular = shuffled(headers, randomFrom(1));
  const random = randomFrom(seed);
  const sums: number[] = [];
  for (let rank = 1; rank <= popular.length; rank++) sums.push((sums.at(-1) ?? 0) + 1 / rank);
  const cached = new Set<number>();
  const accesses: Access[] = [];
  for (let unit = 0; unit < UNITS; unit++) {
    for (let include = 0; include < HEADERS_OF_UNIT; include++) {
      const at = (random(SCALE) / SCALE) * sums.at(-1)!;
      const header = sums.findIndex((sum) => at < sum);
      if (cached.has(header)) continue;
      cached.add(header);
      accesses.push(...accessesOf('read', popular[header]!, READ_THINK_MS));
    }
    const object = objects[unit % objects.length]!.slice(0, OBJECT_BLOCKS);
    accesses.push(...accessesOf('write', object, COMPILE_MS));
  }
  return accesses;
}

/** One for each run of blocks, `PIECE_BLOCKS` long at most; the guest thinks before the first. */
function accessesOf(kind: Access['kind'], blocks: FileBlocks, thinkMs: number): Access[] {
  const accesses: Access[] = [];
  for (let at = 0, next = 0; at < blocks.length; at = next) {
    for (next = at + 1; next < blocks.length && next - at < PIECE_BLOCKS[1]; next++)
      if (blocks[next] !== blocks[next - 1]! + 1) break;
    const [offset, length] = [blocks[at]! * BLOCK_BYTES, (next - at) * BLOCK_BYTES];
    accesses.push({ kind, offset, length, thinkMs: at === 0 ? thinkMs : 0 });
  }
  return accesses;
}

function shuffled<T>(list: readonly T[], random: Random): T[] {
  const result = [...list];
  for (let i = result.length - 1; i > 0; i--) {
    const j = random(i + 1);
    [result[i], result[j]] = [result[j]!, result[i]!];
  }
  return result;
}
