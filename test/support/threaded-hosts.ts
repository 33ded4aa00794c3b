/** Hosts whose volumes are on data threads that fail on demand. */

import { BroadcastChannel } from 'node:worker_threads';
import { listenWith } from '../../src/host/listen.js';
import type { DaemonParts } from '../../src/host/parts.js';
import { DataThreads } from '../../src/host/threads/data-threads.js';
import { FAULTS, type Fault } from './faults.js';

export function faultyParts(threadsMax = 2): Omit<DaemonParts, 'hypervisor'> & { threads: DataThreads } {
  const threads = new DataThreads({ threadsMax, script: new URL('./faulty-thread.js', import.meta.url) });
  const { hold, failed, close } = threads;
  return { threads, hold, failed, close, listen: listenWith(threads.startSession) };
}

/** Makes the thread fail on which the volume with this image is. */
export function fail(fault: Fault): void {
  const channel = new BroadcastChannel(FAULTS);
  channel.postMessage(fault);
  channel.close();
}
