/** What a data thread runs. */

import { parentPort, workerData } from 'node:worker_threads';
import { startSession } from '../../nbd/server/session.js';
import { holdLocally } from '../held-volume.js';
import { listenWith } from '../listen.js';
import { openVolumeService } from '../open.js';
import type { ThreadData } from './messages.js';
import { runVolumeThread } from './volume-thread.js';

if (parentPort === null) throw new Error('this is no program, but what a data thread runs');
runVolumeThread(parentPort, workerData as ThreadData, {
  hold: holdLocally(openVolumeService, listenWith(startSession)),
  startSession,
});
