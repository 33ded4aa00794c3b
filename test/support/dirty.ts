/** Dirty maps of a volume that no image belongs to. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { join } from 'node:path';
import { DirtyMap, type DirtyOwner } from '../../src/volume/dirty.js';
import { tempFolder } from './volume.js';

/** More than a page of bits, and no multiple of eight. */
export const BLOCKS = 40_003;
export const STAMP = '1:2:3:4';
export const MOVE = 'vm1-20260101T000000Z-00000001';
export const OTHER_MOVE = 'vm1-20260101T000000Z-00000002';
export const SINCE = 7;
export interface Place {
  readonly folder: string;
  readonly file: string;
  readonly owner: DirtyOwner;
}

export function place(blocks = BLOCKS): Place {
  const folder = tempFolder();
  return { folder, file: join(folder, 'dirty.live'), owner: { id: randomUUID(), blocks } };
}

/** Runs of blocks that are told as changed. */
export function told(map: DirtyMap, blocks = BLOCKS): [number, number][] {
  const runs: [number, number][] = [];
  for (let at = 0; at < blocks; ) {
    const { changed, earlier, end } = map.stretches(blocks)(at);
    assert.ok(end > at && end <= blocks);
    if (changed || earlier) {
      const last = runs.at(-1);
      if (last?.[1] === at) last[1] = end;
      else runs.push([at, end]);
    }
    at = end;
  }
  return runs;
}

/** A map of a volume that came from generation SINCE, which a move copies in its second round. */
export async function second({ folder, owner }: Place): Promise<{ map: DirtyMap; cookie: number }> {
  const map = await DirtyMap.create(folder, owner, SINCE);
  map.mark(1, 2);
  const { cookie } = map.claim(MOVE, null, []);
  map.mark(5, 9);
  const next = map.cut(MOVE, cookie, []);
  map.mark(30_000, 30_001);
  return { map, cookie: next };
}
