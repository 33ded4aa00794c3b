/** A client on a thread of its own that reads one block after the other and counts the answers where others can see it. */

import { isMainThread, Worker, workerData } from 'node:worker_threads';
import { NbdClient } from '../../src/nbd/client/client.js';

const BLOCK = 4096;

interface Orders {
  uri: string;
  answers: SharedArrayBuffer;
}

export class ReadingClient {
  readonly #answers = new SharedArrayBuffer(4);
  readonly #worker: Worker;

  constructor(uri: string) {
    const orders: Orders = { uri, answers: this.#answers };
    this.#worker = new Worker(new URL(import.meta.url), { workerData: { readingClient: orders } });
  }

  /** Reads answered so far. */
  get answers(): number {
    return Atomics.load(new Int32Array(this.#answers), 0);
  }

  async stop(): Promise<void> {
    await this.#worker.terminate();
  }
}

async function read({ uri, answers }: Orders): Promise<never> {
  const count = new Int32Array(answers);
  const client = await NbdClient.connect(uri);
  const buffer = Buffer.alloc(BLOCK);
  for (let at = 0; ; at = (at + BLOCK) % (client.info.size - BLOCK)) {
    await client.read(at, BLOCK, buffer);
    Atomics.add(count, 0, 1);
  }
}

if (!isMainThread) {
  const orders = (workerData as { readingClient?: Orders } | null)?.readingClient;
  if (orders !== undefined) await read(orders);
}
