/** Listens for NBD clients, with whatever carries their sessions. */

import { parseListenAddress } from '../nbd/address.js';
import { Listener, type StartSession } from '../nbd/server/listener.js';
import type { Listen } from './parts.js';

export function listenWith(startSession: StartSession): Listen {
  return (addresses, exports, log, { limits, ...settings } = {}) =>
    Listener.open({
      addresses: addresses.map(parseListenAddress),
      exports,
      startSession,
      log,
      ...settings,
      ...limits,
    });
}
