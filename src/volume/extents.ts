/** BLOCK_STATUS of a volume, from its presence and the holes of its image. */
import { Allocation, BASE_ALLOCATION } from '../nbd/constants.js';
import type { StatusRequest } from '../nbd/device.js';
import { BLOCK_BYTES, blockAt, blocksOf } from './blocks.js';
import type { Image } from './image.js';
import type { Presence } from './presence.js';
import { tellExtents } from './tell-extents.js';

/** Depths of `qemu:allocation-depth`: in this layer, in the one behind. */
const LOCAL = 1;
const AT_SOURCE = 2;

const LOOK_AFTER = 256;

/**
 * Adds the extents of the request's range, from its start on and at most as many as it wants. `current`: what is here is; otherwise all counts as
 * being at the source.
 */
export function reportExtents(
  request: StatusRequest,
  image: Image,
  presence: Presence | null,
  current = true,
): void {
  const allocation = request.context === BASE_ALLOCATION;
  tellExtents(request, LOOK_AFTER, (at, past) => {
    const local = localStretch(presence, at, past, current);
    let { end } = local;
    if (!allocation) request.extent(end - at, local.present ? LOCAL : AT_SOURCE);
    else if (!local.present)
      request.extent(end - at, 0); // its holes, if any, are at the source
    else {
      const stretch = image.stretch(at, end);
      end = stretch.end;
      request.extent(end - at, stretch.hole ? Allocation.HOLE | Allocation.ZERO : 0);
    }
    return end;
  });
}

function localStretch(
  presence: Presence | null,
  at: number,
  past: number,
  current: boolean,
): { present: boolean; end: number } {
  if (presence === null) return { present: true, end: past };
  if (!current) return { present: false, end: past };
  const block = blockAt(at);
  const end = blocksOf(past);
  const present = presence.has(block);
  const next = present ? presence.nextMissing(block, end) : presence.nextPresent(block, end);
  return { present, end: Math.min(next * BLOCK_BYTES, past) };
}
