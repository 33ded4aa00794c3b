/** Two small tools of the control side: one thing at a time under a key, and waits that end. */

import { BlockferryError } from '../errors.js';

/** Runs functions one after the other per key. */
export class KeyedQueue {
  private readonly tails = new Map<string, Promise<unknown>>();

  async run<Result>(key: string, step: () => Promise<Result>): Promise<Result> {
    const before = this.tails.get(key) ?? Promise.resolve();
    const mine = before.then(step, step);
    const tail = mine.catch(() => undefined);
    this.tails.set(key, tail);
    try {
      return await mine;
    } finally {
      if (this.tails.get(key) === tail) this.tails.delete(key);
    }
  }
}

/** A thing that happens once. Waiters come and go without leaving anything behind on a promise that may never settle. */
export class Occurrence {
  private readonly waiters = new Set<(happened: boolean) => void>();
  private happened = false;

  announce(): void {
    this.happened = true;
    for (const waiter of [...this.waiters]) waiter(true);
  }

  /** True when it happened (now or within `timeoutMs`), false after the timeout or when `signal` aborts. */
  wait(timeoutMs: number, signal?: AbortSignal): Promise<boolean> {
    if (this.happened) return Promise.resolve(true);
    if (signal?.aborted) return Promise.resolve(false);
    return new Promise((resolve) => {
      const done = (happened: boolean): void => {
        clearTimeout(timer);
        signal?.removeEventListener('abort', onAbort);
        this.waiters.delete(done);
        resolve(happened);
      };
      const onAbort = (): void => done(false);
      const timer = setTimeout(() => done(false), timeoutMs);
      signal?.addEventListener('abort', onAbort);
      this.waiters.add(done);
    });
  }
}

/** Resolves after `timeoutMs`, or rejects as soon as `signal` aborts. */
export function delay(timeoutMs: number, signal?: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const stop = (): void => {
      clearTimeout(timer);
      reject(new BlockferryError('closed', 'interrupted'));
    };
    if (signal?.aborted) return reject(new BlockferryError('closed', 'interrupted'));
    const timer = setTimeout(() => {
      signal?.removeEventListener('abort', stop);
      resolve();
    }, timeoutMs);
    signal?.addEventListener('abort', stop, { once: true });
  });
}
