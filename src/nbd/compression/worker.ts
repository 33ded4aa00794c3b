/** What a thread of the pool runs: one frame after the other, no state but zstd's contexts. */
import { parentPort } from 'node:worker_threads';
import binding from 'zstd-napi/binding.js';
import { FRAME_HEADER_BYTES } from '../codec/frames.js';
import type { Done, Job } from './pool.js';

if (parentPort === null)
  throw new Error('this is no program, but what a thread of the compression pool runs');
const port = parentPort;
const compression = new binding.CCtx();
const decompression = new binding.DCtx();
let levelSet: number | null = null;

/** Room for a header is left in front. Null: it does not come out shorter than `bytesMax`. */
function compress(content: Uint8Array, level: number, bytesMax: number): Uint8Array | null {
  if (level !== levelSet) {
    compression.setParameter(binding.CParameter.compressionLevel, level);
    levelSet = level;
  }
  const output = new Uint8Array(FRAME_HEADER_BYTES + bytesMax);
  try {
    const length = compression.compress2(output.subarray(FRAME_HEADER_BYTES), content);
    return output.subarray(0, FRAME_HEADER_BYTES + length);
  } catch {
    return null; // there is not enough room: zstd gives up as soon as it knows
  }
}

/** Null: it is not a zstd frame of exactly so much content. */
function decompress(payload: Uint8Array, contentBytes: number): Uint8Array | null {
  const content = new Uint8Array(contentBytes);
  try {
    return decompression.decompress(content, payload) === contentBytes ? content : null;
  } catch {
    return null;
  }
}

port.on('message', (job: Job) => {
  const input = job.input.subarray(job.from, job.end);
  const began = performance.now();
  const output =
    job.kind === 'compress' ? compress(input, job.level, job.bytesMax) : decompress(input, job.bytesMax);
  const done: Done = { number: job.number, input: job.input, output, workMs: performance.now() - began };
  const memory = [job.input.buffer as ArrayBuffer];
  if (output !== null) memory.push(output.buffer as ArrayBuffer);
  port.postMessage(done, memory);
});
