/** A data thread that fails when it is told to: what `DataThreads` runs as `script` in tests. */

import { BroadcastChannel, parentPort, workerData } from 'node:worker_threads';
import { type HoldVolume, holdLocally } from '../../src/host/held-volume.js';
import { listenWith } from '../../src/host/listen.js';
import { openVolumeService } from '../../src/host/open.js';
import type { ThreadData } from '../../src/host/threads/messages.js';
import { runVolumeThread } from '../../src/host/threads/volume-thread.js';
import { startSession } from '../../src/nbd/server/session.js';
import { FAULTS, type Fault } from './faults.js';

const images = new Set<string>();
let diesAtCancel = false;

const open = holdLocally(openVolumeService, listenWith(startSession));
const hold: HoldVolume = async (options) => {
  if (options.image?.includes('poison')) throw asUncaught('poison');
  const held = await open(options);
  images.add(held.image);
  const cancel = held.cancel.bind(held);
  held.cancel = async () => {
    const proof = await cancel();
    if (diesAtCancel) process.exit(3);
    return proof;
  };
  return held;
};

function asUncaught(why: string): Error {
  const error = new Error(why);
  setImmediate(() => {
    throw error;
  });
  return error;
}

const channel = new BroadcastChannel(FAULTS);
channel.unref();
channel.onmessage = (event): void => {
  const { image, how } = (event as { data: Fault }).data;
  if (!images.has(image)) return;
  if (how === 'throw') asUncaught('a fault of this thread');
  else if (how === 'exit') process.exit(3);
  else if (how === 'at-cancel') diesAtCancel = true;
  else setImmediate(overflow);
};

function overflow(): void {
  const kept: number[][] = [];
  for (;;) kept.push(new Array<number>(1 << 16).fill(kept.length + 0.5));
}

if (parentPort === null) throw new Error('a worker is wanted');
runVolumeThread(parentPort, workerData as ThreadData, { hold, startSession });
