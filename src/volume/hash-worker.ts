/** What a thread of the hashing pool runs. */
import { parentPort } from 'node:worker_threads';
import { hashBlocks } from './block-hash.js';
import type { HashDone, HashJob } from './hash-device.js';

if (parentPort === null) throw new Error('this is no program, but what a thread of the hashing pool runs');
const port = parentPort;

port.on('message', ({ number, input }: HashJob) => {
  const hashes = hashBlocks(input);
  port.postMessage({ number, hashes } satisfies HashDone, [hashes.buffer]);
});
