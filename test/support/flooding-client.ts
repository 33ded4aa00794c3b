/** A client on a thread of its own that keeps a session busy: it sends the same requests again and again, some rounds ahead of the answers. */
import { readSync, writeSync } from 'node:fs';
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import { closeFd } from '../../src/native/index.js';

interface Orders {
  fd: number;
  /** Of one round, and how long its answers are. */
  requests: Uint8Array;
  answerBytes: number;
  ahead: number;
  rounds: SharedArrayBuffer;
}

export class FloodingClient {
  readonly #rounds = new SharedArrayBuffer(4);
  readonly #ended: Promise<void>;

  /** `fd`: of a connected socket, which is closed when the other end is. */
  constructor(fd: number, requests: Uint8Array, answerBytes: number, ahead = 1) {
    const orders: Orders = { fd, requests, answerBytes, ahead, rounds: this.#rounds };
    const worker = new Worker(new URL(import.meta.url), { workerData: { floodingClient: orders } });
    this.#ended = new Promise((resolve, reject) => {
      worker.once('exit', () => resolve());
      worker.once('error', reject);
    });
  }

  /** How many were answered. */
  get rounds(): number {
    return Atomics.load(new Int32Array(this.#rounds), 0);
  }

  /** Resolves when it has found the other end closed. */
  ended(): Promise<void> {
    return this.#ended;
  }
}

function flood({ fd, requests, answerBytes, ahead, rounds }: Orders): void {
  const count = new Int32Array(rounds);
  const answers = Buffer.alloc(answerBytes);
  const send = (): void => {
    for (let at = 0; at < requests.length; ) at += writeSync(fd, requests, at);
  };
  try {
    for (let i = 0; i < ahead; i++) send();
    for (;;) {
      send();
      for (let at = 0; at < answerBytes; ) {
        const got = readSync(fd, answers, at, answerBytes - at, null);
        if (got === 0) return;
        at += got;
      }
      Atomics.add(count, 0, 1);
    }
  } catch {
    // EPIPE, ECONNRESET: the session is gone
  } finally {
    closeFd(fd); // it is not of the worker's own opening, and closeSync would warn of that
  }
}

if (!isMainThread) {
  const orders = (workerData as { floodingClient?: Orders } | null)?.floodingClient;
  if (orders !== undefined) flood(orders);
}
