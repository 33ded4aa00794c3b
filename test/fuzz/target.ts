/** The server as it is attacked: its handshake and sessions over a device, on a stream in memory or on a unix socket. */
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import pino from 'pino';
import { HANDSHAKE_TIMEOUT_MS } from '../../src/nbd/constants.js';
import type { BlockDevice } from '../../src/nbd/device.js';
import { Connection } from '../../src/nbd/server/connection.js';
import { defaultOrNamed, type ExportDirectory, type ExportEntry } from '../../src/nbd/server/exports.js';
import { Listener } from '../../src/nbd/server/listener.js';
import { startSession } from '../../src/nbd/server/session.js';
import type { TlsAcceptor } from '../../src/nbd/server/tls-acceptor.js';

/** Faults of ours that the server caught and logged: there must be none. */
export class Faults {
  readonly told: string[] = [];
  readonly log = pino(
    { level: 'error' },
    { write: (line: string) => void (this.told.length < 10 && this.told.push(line)) },
  );
}

export function exportOf(device: BlockDevice): ExportEntry {
  const { size, readOnly, contexts, multiConn, preferredBlock, fastZero = false } = device;
  return {
    name: 'disk',
    description: 'a disk',
    size,
    readOnly,
    contexts,
    preferredBlock,
    multiConn,
    fastZero,
    open: () => device,
  };
}

function directoryOf(device: BlockDevice): ExportDirectory {
  const entries = [exportOf(device)];
  return { list: () => entries, find: (name) => defaultOrNamed(entries, name), shuttingDown: false };
}

/** Serves one stream; `tls`: null for none. */
export function serveStream(
  stream: Duplex,
  device: BlockDevice,
  faults: Faults,
  tls: TlsAcceptor | null = null,
): Connection {
  return new Connection(
    stream,
    { kind: 'unix' },
    {
      exports: directoryOf(device),
      listExports: true,
      refusal: () => undefined,
      denied: () => {},
      startSession,
      log: faults.log,
      handshakeTimeoutMs: HANDSHAKE_TIMEOUT_MS,
      compression: true,
      tls,
      complain: () => {},
    },
  );
}

/** Serves a device at a unix socket in `folder`. */
export async function serveSocket(
  folder: string,
  name: string,
  device: BlockDevice,
  faults: Faults,
): Promise<{ path: string; listener: Listener }> {
  const path = join(folder, `${name}.sock`);
  const listener = await Listener.open({
    addresses: [{ kind: 'unix', path }],
    exports: directoryOf(device),
    startSession,
    log: faults.log,
    handshakeDrainTimeoutMs: 100,
    sessionDrainTimeoutMs: 100,
  });
  return { path, listener };
}
