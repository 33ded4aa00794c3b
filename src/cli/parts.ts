/** The real parts of a daemon, put together for the commands that run one. */

import { openVolumeService } from '../host/open.js';
import type { DaemonParts } from '../host/parts.js';
import { QemuDriver } from '../hypervisor/qemu.js';
import { parseListenAddress } from '../nbd/address.js';
import { Listener } from '../nbd/server/listener.js';
import { startSession } from '../nbd/server/session.js';

export function daemonParts(machinesDir: string): DaemonParts {
  return {
    openVolume: openVolumeService,
    listen: (addresses, exports, log, { limits, ...settings } = {}) =>
      Listener.open({
        addresses: addresses.map(parseListenAddress),
        exports,
        startSession,
        log,
        ...settings,
        ...limits,
      }),
    hypervisor: new QemuDriver({ runtimeDir: machinesDir }),
  };
}
