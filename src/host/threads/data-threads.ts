/**
 * The data threads of one daemon. A volume is opened on the thread with the fewest volumes, and stays there as long as it is open; a
 * thread is started when one is wanted and every one there is has a volume, up to the maximum.
 *
 * A thread that died is replaced, and whoever held its volumes opens them again (`onLost`): nothing in its memory is used again, what is
 * on disk and in the live maps is as after a kill, and their locks see to it that the old owner is gone. Threads that die again
 * and again are a fault that a new thread does not mend: then the daemon is to end (`failed`).
 */

import type { Logger } from 'pino';
import { BlockferryError } from '../../errors.js';
import type { StartSession } from '../../nbd/server/listener.js';
import { startSession } from '../../nbd/server/session.js';
import type { HoldVolume } from '../held-volume.js';
import { DataThread } from './data-thread.js';
import { handOver } from './hand-over.js';
import { RemoteDevice } from './remote-volume.js';

/** More than this many deaths within the period, and the daemon ends. */
const DEATHS_MAX = 3;
const DEATHS_PERIOD_MS = 10 * 60_000;

export interface DataThreadsOptions {
  /** >= 1. */
  threadsMax: number;
  /** What a thread runs; default: worker.js. */
  script?: URL;
}

export class DataThreads {
  readonly #threads = new Set<DataThread>();
  readonly #script: URL;
  readonly #threadsMax: number;
  #started = 0;
  #deaths: number[] = [];
  #failure: BlockferryError | null = null;
  #fail: (error: BlockferryError) => void = () => undefined;
  #closed = false;
  /** Rejects when threads die again and again; never resolves. */
  readonly failed: Promise<never>;

  constructor({ threadsMax, script }: DataThreadsOptions) {
    this.#threadsMax = threadsMax;
    this.#script = script ?? new URL('./worker.js', import.meta.url);
    this.failed = new Promise((_resolve, reject) => {
      this.#fail = reject;
    });
    this.failed.catch(() => undefined);
  }

  /** Volumes of each thread. */
  get loads(): number[] {
    return [...this.#threads].map((thread) => thread.load);
  }

  readonly hold: HoldVolume = async ({ log, onLost, ...order }) => {
    if (this.#failure !== null) throw this.#failure;
    if (this.#closed) throw new BlockferryError('closed', 'the daemon ends');
    return this.#assign(log).open(order.name, order, onLost);
  };

  /** Serves a connection where its device lives. */
  readonly startSession: StartSession = (socket, parameters) => {
    const { device } = parameters;
    if (device instanceof RemoteDevice) return handOver(socket, device, parameters);
    return startSession(socket, parameters);
  };

  /** Ends the threads. Every volume must be closed. */
  readonly close = async (): Promise<void> => {
    this.#closed = true;
    await Promise.all([...this.#threads].map((thread) => thread.end()));
  };

  #assign(log: Logger): DataThread {
    let chosen: DataThread | undefined;
    for (const thread of this.#threads)
      if (chosen === undefined || thread.load < chosen.load) chosen = thread;
    if (chosen !== undefined && (chosen.load === 0 || this.#threads.size >= this.#threadsMax)) return chosen;
    return this.#start(log);
  }

  #start(log: Logger): DataThread {
    this.#started++;
    const thread = new DataThread(`data-${this.#started}`, this.#script, log, (why) =>
      this.#died(thread, why, log),
    );
    this.#threads.add(thread);
    return thread;
  }

  /** Before anybody else hears of it. */
  #died(thread: DataThread, why: string, log: Logger): void {
    this.#threads.delete(thread);
    const now = performance.now();
    this.#deaths = this.#deaths.filter((at) => now - at < DEATHS_PERIOD_MS);
    this.#deaths.push(now);
    log.error({ thread: thread.name, volumes: thread.load }, `a data thread died: ${why}`);
    if (this.#deaths.length <= DEATHS_MAX || this.#failure !== null) return;
    this.#failure = new BlockferryError(
      'closed',
      `${this.#deaths.length} data threads died in a short time, the last one because: ${why}; see the log`,
    );
    this.#fail(this.#failure);
  }
}
