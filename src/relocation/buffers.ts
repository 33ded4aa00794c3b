/** Buffers for fetched data, kept by size class (powers of two from a block on) and used again. */
const CLASS_BYTES_MIN = 4096;
/** Bytes that lie idle in one class, at most. */
const IDLE_BYTES_MAX = 4 << 20;

export class BufferPool {
  readonly #idle: Buffer[][] = [];

  /** At least `bytes` long, content undefined. */
  take(bytes: number): Buffer {
    const size = classOf(bytes);
    return this.#idle[size]?.pop() ?? Buffer.allocUnsafeSlow(CLASS_BYTES_MIN * 2 ** size);
  }

  /** Only buffers that nobody writes to any more. */
  give(buffer: Buffer): void {
    const size = classOf(buffer.length);
    this.#idle[size] ??= [];
    const idle = this.#idle[size];
    if ((idle.length + 1) * buffer.length <= Math.max(IDLE_BYTES_MAX, buffer.length)) idle.push(buffer);
  }
}

function classOf(bytes: number): number {
  return bytes <= CLASS_BYTES_MIN ? 0 : Math.ceil(Math.log2(bytes / CLASS_BYTES_MIN));
}
