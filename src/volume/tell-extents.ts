/** How every context of a volume answers BLOCK_STATUS: extent by extent, for a bounded time. */
import type { StatusRequest } from '../nbd/device.js';

/** After so long an answer ends where it is: others wait meanwhile, and clients ask again. */
const STATUS_MS_MAX = 5;

/**
 * Covers the request's range from its start on, with at most as many extents as it wants. `tell` adds the one that begins at byte `at` and ends at `past` at
 * the latest, and answers where it ends. The clock is looked at behind every `lookAfter` of them.
 */
export function tellExtents(
  request: StatusRequest,
  lookAfter: number,
  tell: (at: number, past: number) => number,
): void {
  const past = request.offset + request.length;
  const untilMs = performance.now() + STATUS_MS_MAX;
  let extents = 0;
  for (let at = request.offset; at < past && extents < request.extentsMax; extents++) {
    at = tell(at, past);
    if (extents % lookAfter === lookAfter - 1 && performance.now() > untilMs) return;
  }
}
