/**
 * Long changes of an image, piece by piece: while a thread zeroes or punches, the filesystem holds the image's lock, and every write
 * waits for it; and a request that nobody wants any more can be left between two pieces.
 */

/** The first piece, and where pieces end: a multiple of every block size. */
export const PIECE_BYTES_MIN = 64 << 20;
/** Longest piece. Even 8 TiB of holes are 2048 of them. */
export const PIECE_BYTES_MAX = 2 ** 32;
/** Pieces grow while they take less, and shrink when they take longer than eight times as long. */
const QUICK_MS = 2;

/**
 * Does [offset, offset + length) by `step`, one piece after the other, until one answers a negative errno. Before each but the first
 * `goesOn` is asked; if it says no, the rest is left and the answer is `stopped`. Otherwise resolves with 0 or that errno.
 */
export async function inPieces(
  offset: number,
  length: number,
  step: (offset: number, length: number) => Promise<number>,
  goesOn: () => boolean,
  stopped: number,
): Promise<number> {
  const past = offset + length;
  let size = PIECE_BYTES_MIN;
  for (let at = offset; at < past; ) {
    if (at > offset && !goesOn()) return stopped;
    const end = Math.min(past, Math.floor((at + size) / PIECE_BYTES_MIN) * PIECE_BYTES_MIN);
    const beganMs = performance.now();
    const done = await step(at, end - at);
    if (done < 0) return done;
    const tookMs = performance.now() - beganMs;
    if (tookMs < QUICK_MS) size = Math.min(size * 2, PIECE_BYTES_MAX);
    else if (tookMs > QUICK_MS * 8) size = Math.max(size / 2, PIECE_BYTES_MIN);
    at = end;
  }
  return 0;
}
