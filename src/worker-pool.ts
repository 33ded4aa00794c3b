/**
 * Threads that do one kind of work for everybody on this thread: a job's memory goes there, and comes back with what was made of it.
 *
 * Invariants: nobody else has a job's memory meanwhile. Every job is answered exactly once, also when its
 * worker dies. There are at most POOL_THREADS_MAX workers, begun when jobs wait, and none holds up the end of the process; when nobody
 * uses the pool for IDLE_MS they end. A worker has at most WORKER_JOBS jobs, the others wait here in order. How many can wait is bounded by
 * who gives them: each has its own limits.
 */
import { availableParallelism } from 'node:os';
import { Worker } from 'node:worker_threads';

export const POOL_THREADS_MAX = Math.max(1, Math.min(4, availableParallelism()));
/** One to work on, one to go on with at once. */
const WORKER_JOBS = 2;
const IDLE_MS = 10_000;
/** JavaScript heap of one worker: jobs' memory is not on it. */
const HEAP_MIB_MAX = 64;

/** What a worker is sent, and what it answers with: both carry the job's number. */
export type Numbered<Message> = Message & { number: number };

interface Job<Order, Done> {
  readonly job: Numbered<Order>;
  readonly answer: (done: Numbered<Done> | null) => void;
}

class PoolWorker<Order extends { input: Uint8Array }, Done> {
  readonly jobs = new Map<number, (done: Numbered<Done> | null) => void>();
  readonly thread: Worker;

  constructor(pool: WorkerPool<Order, Done>, script: URL, name: string) {
    this.thread = new Worker(script, { name, resourceLimits: { maxOldGenerationSizeMb: HEAP_MIB_MAX } });
    this.thread.unref();
    this.thread.on('message', (done: Numbered<Done>) => {
      const answer = this.jobs.get(done.number);
      this.jobs.delete(done.number);
      pool.feed(this);
      answer?.(done);
    });
    this.thread.on('error', () => {}); // 'exit' follows
    this.thread.on('exit', () => pool.died(this));
  }
}

export class WorkerPool<Order extends { input: Uint8Array }, Done> {
  readonly #workers = new Set<PoolWorker<Order, Done>>();
  #queue: Job<Order, Done>[] = [];
  #numbers = 0;
  #users = 0;
  #idle: NodeJS.Timeout | null = null;

  /** `script`: what a worker runs. */
  constructor(
    private readonly script: URL,
    private readonly name: string,
  ) {}

  /** Somebody uses the pool from now on. */
  enter(): void {
    this.#users++;
    if (this.#idle !== null) clearTimeout(this.#idle);
    this.#idle = null;
  }

  /** He does not any more; his jobs may still be under way. */
  leave(): void {
    this.#users--;
    if (this.#users > 0) return;
    this.#idle = setTimeout(() => void this.end(), IDLE_MS);
    this.#idle.unref();
  }

  get threads(): number {
    return this.#workers.size;
  }

  /** `answer` is given null when the worker died. */
  run(order: Order, answer: (done: Numbered<Done> | null) => void): void {
    this.#numbers++;
    this.#queue.push({ job: { ...order, number: this.#numbers }, answer });
    let chosen: PoolWorker<Order, Done> | null = null;
    for (const worker of this.#workers)
      if (chosen === null || worker.jobs.size < chosen.jobs.size) chosen = worker;
    if (chosen === null || chosen.jobs.size > 0) chosen = this.begin() ?? chosen;
    if (chosen !== null) this.feed(chosen);
  }

  /** Another worker, if there may be one. */
  protected begin(): PoolWorker<Order, Done> | null {
    if (this.#workers.size >= POOL_THREADS_MAX) return null;
    const worker = new PoolWorker(this, this.script, this.name);
    this.#workers.add(worker);
    return worker;
  }

  /** Gives a worker what it can take. */
  feed(worker: PoolWorker<Order, Done>): void {
    while (worker.jobs.size < WORKER_JOBS) {
      const next = this.#queue.shift();
      if (next === undefined) return;
      worker.jobs.set(next.job.number, next.answer);
      worker.thread.postMessage(next.job, [next.job.input.buffer as ArrayBuffer]);
    }
  }

  died(worker: PoolWorker<Order, Done>): void {
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
