/**
 * BLOCK_STATUS of a dirty map. Flags of an extent of `blockferry:dirty`: bit 0 changed in this round, bit 1 the volume is sealed, bit 2 changed in the round
 * before, bits 3 to 31 the round's cookie, 0 where no move copies. Each extent tells them, so that a list that spans a cut is not taken for one round's.
 */
import type { StatusRequest } from '../nbd/device.js';
import { BLOCK_BYTES, blockAt, blocksOf } from './blocks.js';
import type { DirtyMap } from './dirty.js';
import { tellExtents } from './tell-extents.js';

export const DirtyFlag = { CHANGED: 1, SEALED: 2, TOLD: 4 } as const;
/** What a cookie is multiplied with in the flags. */
export const DIRTY_COOKIE_UNIT = 8;

const LOOK_AFTER = 256;

/**
 * Adds the extents of the request's range. Without a map every block counts as dirty. `round`: flags of every extent besides; null: it is asked as QEMU's
 * bitmaps are, and told what changed since tracking began, in whatever round. `lately`: in the round that is under way alone.
 */
export function reportDirty(
  request: StatusRequest,
  dirty: DirtyMap | null,
  round: number | null,
  lately = false,
): void {
  const end = blocksOf(request.offset + request.length);
  const stretches = dirty?.stretches(end, round === null ? 'ever' : lately ? 'none' : 'told');
  tellExtents(request, LOOK_AFTER, (at, past) => {
    const stretch = stretches?.(blockAt(at)) ?? { changed: true, earlier: false, end };
    const to = Math.min(stretch.end * BLOCK_BYTES, past);
    request.extent(to - at, round === null ? bitmapFlags(stretch) : round + flagsOf(stretch));
    return to;
  });
}

interface Stretch {
  readonly changed: boolean;
  readonly earlier: boolean;
}

function bitmapFlags({ changed, earlier }: Stretch): number {
  return changed || earlier ? DirtyFlag.CHANGED : 0;
}

function flagsOf({ changed, earlier }: Stretch): number {
  return (changed ? DirtyFlag.CHANGED : 0) + (earlier ? DirtyFlag.TOLD : 0);
}
