/** Standbys that have blocks before their takeover, what is there, and what a source tells. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { BLOCK_BYTES } from '../../src/volume/blocks.js';
import type { SourceChanges, Volume } from '../../src/volume/volume.js';
import { type HeldSource, patterned } from './volume.js';
import { folderOf, host, proxiedVolume, SIZE } from './volumes.js';

const B = BLOCK_BYTES;
export const BLOCKS = Math.ceil(SIZE / B);
export const MOVE = 'move-1';
export const ROUND = 100;
export const CONTEXT = 'blockferry:dirty';

/** A standby that copies ahead and knows round ROUND. */
export function ahead(root = host(), cookie: number | null = ROUND, fills = true): Promise<Volume> {
  return proxiedVolume(root, { preCopy: { context: CONTEXT, cookie, fills } });
}

/** Blocks that are here. */
export function present(volume: Volume): number[] {
  const map = volume.store.presence;
  return Array.from({ length: BLOCKS }, (_, block) => block).filter(
    (block) => map === null || map.has(block),
  );
}

export function blocksBut(...gone: number[]): number[] {
  return Array.from({ length: BLOCKS }, (_, block) => block).filter((block) => !gone.includes(block));
}

/** Blocks of which the dirty map tells. */
export function changed(volume: Volume): number[] {
  const { dirty } = volume.store;
  return Array.from({ length: BLOCKS }, (_, block) => block).filter((block) => {
    const stretch = dirty?.stretches(block + 1)(block);
    return stretch === undefined || stretch.changed || stretch.earlier;
  });
}

export function tells(volume: Volume, changes: SourceChanges): void {
  volume.askChanges = () => Promise.resolve(changes);
}

export const dirtyFile = (root: string): string => join(folderOf(root), 'dirty.live');

/** Changes blocks of the source. */
export function rewrite(source: HeldSource, ...blocks: number[]): void {
  for (const block of blocks) patterned(B, 1000 + block).copy(source.content, block * B);
}

/** No block is here that the source has otherwise. */
export function assertNothingStale(volume: Volume, content: Buffer, hint: string): void {
  const image = readFileSync(volume.store.image.path);
  for (const block of present(volume)) {
    const [from, to] = [block * B, Math.min((block + 1) * B, SIZE)];
    assert.ok(
      image.subarray(from, to).equals(content.subarray(from, to)),
      `block ${block} is stale: ${hint}`,
    );
  }
}
