/** BLOCK_STATUS of a volume, from its presence and the holes of its image. */
import { Allocation, BASE_ALLOCATION } from '../nbd/constants.js';
import type { StatusRequest } from '../nbd/device.js';
import { BLOCK_BYTES, blockAt, blocksOf } from './blocks.js';
import type { Image } from './image.js';
import type { Presence } from './presence.js';

/** Depths of `qemu:allocation-depth`: in this layer, in the one behind. */
const LOCAL = 1;
const AT_SOURCE = 2;

/** After so long an answer ends where it is, at the next multiple of LOOK_AFTER extents: others wait meanwhile, and clients ask again. */
const STATUS_MS_MAX = 5;
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
  const past = request.offset + request.length;
  const allocation = request.context === BASE_ALLOCATION;
  const untilMs = performance.now() + STATUS_MS_MAX;
  let extents = 0;
  for (let at = request.offset; at < past && extents < request.extentsMax; extents++) {
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
    at = end;
    if (extents % LOOK_AFTER === LOOK_AFTER - 1 && performance.now() > untilMs) return;
  }
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
