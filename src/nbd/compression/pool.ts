/**
 * The threads that compress and decompress for all connections of this thread.
 *
 * Invariants: a job's memory goes to a worker and comes back, nobody else has it meanwhile. Every job is answered exactly once, also when its
 * worker dies. There are at most POOL_THREADS_MAX workers, begun when jobs wait, and none holds up the end of the process; when nobody
 * uses the pool for IDLE_MS they end. A worker has at most WORKER_JOBS jobs, the others wait here in order. How many can wait is bounded by
 * who gives them: each connection has its own limits.
 */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';

export const POOL_THREADS_MAX = Math.max(1, Math.min(4, availableParallelism()));
/** One to work on, one to go on with at once. */
const WORKER_JOBS = 2;
const IDLE_MS = 10_000;
/** JavaScript heap of one worker: frames are not on it. */
const HEAP_MIB_MAX = 64;

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
export type Job = Order & { number: number };

export interface Done {
  number: number;
  input: Uint8Array;
  /** Null: it could not be done within `bytesMax`. */
  output: Uint8Array | null;
}

/** `done` is null when the worker died. */
export type Answer = (done: Done | null) => void;

class PoolWorker {
  readonly jobs = new Map<number, Answer>();
  readonly thread = new Worker(new URL('./worker.js', import.meta.url), {
    name: 'compression',
    resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB_MAX },
  });

  constructor(pool: CompressionPool) {
    this.thread.unref();
    this.thread.on('message', (done: Done) => {
      const answer = this.jobs.get(done.number);
      this.jobs.delete(done.number);
      pool.feed(this);
      answer?.(done);
    });
    this.thread.on('error', () => {}); // 'exit' follows
    this.thread.on('exit', () => pool.died(this));
  }
}

export class CompressionPool {
  readonly #workers = new Set<PoolWorker>();
  #queue: { job: Job; answer: Answer }[] = [];
  #numbers = 0;
  #users = 0;
  #idle: NodeJS.Timeout | null = null;

  /** A connection uses the pool from now on. */
  enter(): void {
    this.#users++;
    if (this.#idle !== null) clearTimeout(this.#idle);
    this.#idle = null;
  }

  /** It does not any more; its jobs may still be under way. */
  leave(): void {
    this.#users--;
    if (this.#users > 0) return;
    this.#idle = setTimeout(() => void this.end(), IDLE_MS);
    this.#idle.unref();
  }

  get threads(): number {
    return this.#workers.size;
  }

  run(order: Order, answer: Answer): void {
    this.#numbers++;
    this.#queue.push({ job: { ...order, number: this.#numbers }, answer });
    let chosen: PoolWorker | null = null;
    for (const worker of this.#workers)
      if (chosen === null || worker.jobs.size < chosen.jobs.size) chosen = worker;
    if ((chosen === null || chosen.jobs.size > 0) && this.#workers.size < POOL_THREADS_MAX) {
      chosen = new PoolWorker(this);
      this.#workers.add(chosen);
    }
    if (chosen !== null) this.feed(chosen);
  }

  /** Gives a worker what it can take. */
  feed(worker: PoolWorker): void {
    while (worker.jobs.size < WORKER_JOBS) {
      const next = this.#queue.shift();
      if (next === undefined) return;
      worker.jobs.set(next.job.number, next.answer);
      worker.thread.postMessage(next.job, [next.job.input.buffer as ArrayBuffer]);
    }
  }

  died(worker: PoolWorker): void {
    this.#workers.delete(worker);
    const lost = [...worker.jobs.values()];
    worker.jobs.clear();
    // Those that wait here would wait for ever if nobody is left, or came with the same fault.
    if (this.#workers.size === 0) {
      lost.push(...this.#queue.map(({ answer }) => answer));
      this.#queue = [];
    }
    for (const answer of lost) answer(null);
  }

  /** Ends the workers. The pool can be used again. */
  async end(): Promise<void> {
    await Promise.all([...this.#workers].map(({ thread }) => thread.terminate()));
  }
}

let shared: CompressionPool | null = null;

/** The pool of this thread. */
export function compressionPool(): CompressionPool {
  shared ??= new CompressionPool();
  return shared;
}
