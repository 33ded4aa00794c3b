/** The real parts of a daemon, put together for the commands that run one. */

import { holdLocally } from '../host/held-volume.js';
import { listenWith } from '../host/listen.js';
import { openVolumeService } from '../host/open.js';
import type { DaemonParts } from '../host/parts.js';
import { DataThreads } from '../host/threads/data-threads.js';
import { QemuDriver } from '../hypervisor/qemu.js';
import { startSession } from '../nbd/server/session.js';

/** `dataThreads`: threads for volumes, at most; 0: they are on the main thread. */
export function daemonParts(machinesDir: string, dataThreads: number): DaemonParts {
  const hypervisor = new QemuDriver({ runtimeDir: machinesDir });
  if (dataThreads === 0) {
    const listen = listenWith(startSession);
    return { hold: holdLocally(openVolumeService, listen), listen, hypervisor };
  }
  const { hold, startSession: carry, failed, close } = new DataThreads({ threadsMax: dataThreads });
  return { hold, listen: listenWith(carry), hypervisor, failed, close };
}
