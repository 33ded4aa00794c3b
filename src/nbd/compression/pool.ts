/** The threads that compress and decompress for all connections of this thread. */
import { type Numbered, POOL_THREADS_MAX, WorkerPool } from '../../worker-pool.js';

export { POOL_THREADS_MAX };

interface Work {
  /** Of its whole ArrayBuffer; the frame is input[from, end). */
  input: Uint8Array;
  from: number;
  end: number;
}
export type Order =
  /** To less than `bytesMax` bytes. */
  | (Work & { kind: 'compress'; level: number; bytesMax: number })
  /** To exactly `bytesMax` bytes. */
  | (Work & { kind: 'decompress'; bytesMax: number });
export type Job = Numbered<Order>;

interface Made {
  input: Uint8Array;
  /** Null: it could not be done within `bytesMax`. */
  output: Uint8Array | null;
  /** What it took, once begun. */
  workMs: number;
}
export type Done = Numbered<Made>;

/** `done` is null when the worker died. */
export type Answer = (done: Done | null) => void;

export class CompressionPool extends WorkerPool<Order, Made> {
  constructor() {
    super(new URL('./worker.js', import.meta.url), 'compression');
  }

  /** A worker takes a while to begin, as does the handshake that follows. */
  override enter(): void {
    super.enter();
    this.begin();
  }
}

let shared: CompressionPool | null = null;

/** The pool of this thread. */
export function compressionPool(): CompressionPool {
  shared ??= new CompressionPool();
  return shared;
}
