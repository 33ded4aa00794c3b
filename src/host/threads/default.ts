/** How many data threads a host has where its configuration does not say. */

import { availableParallelism } from 'node:os';

const DEFAULT_MAX = 8;

/** One for every processor: the control thread has little to do. */
export function defaultDataThreads(): number {
  return Math.min(availableParallelism(), DEFAULT_MAX);
}
