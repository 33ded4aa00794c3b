/** The one-volume daemons `serve` and `proxy`, made of the same parts as `host`. */

import { resolve } from 'node:path';
import { BlockferryError } from '../errors.js';
import { volumeName } from '../host/config.js';
import type { DaemonOptions } from '../host/daemon.js';
import type { OpenMode } from '../host/open.js';
import { daemonLog, runDaemon } from '../host/run.js';
import { controlSocketPath, defaultStateDir } from '../host/state-dir.js';
import { activatedAddresses, formatListenAddress } from '../nbd/address.js';
import type { Compression } from '../nbd/codec/frames.js';
import { defaultName } from '../volume/open.js';
import { type ClientOptions, guestClients } from './clients.js';
import { daemonParts } from './parts.js';
import { guestTls, sourceTls, type TlsOptions } from './tls.js';

const DEFAULT_LISTEN = '127.0.0.1:10809';

export interface OneVolumeOptions extends TlsOptions, ClientOptions {
  name?: string;
  listen?: string[];
  stateDir?: string;
  control?: string;
  transactionLog?: string;
  transactionLogData: boolean;
  logLevel: string;
  /** Of `proxy`. */
  compression?: Compression;
  /** Of `proxy`. */
  orderFrom?: string;
  seed?: string[];
}

export async function runOneVolume(
  kind: 'serve' | 'proxy',
  disk: string,
  options: OneVolumeOptions,
  mode: OpenMode,
): Promise<void> {
  const checked = volumeName.safeParse(options.name ?? defaultName(disk));
  if (!checked.success)
    throw new BlockferryError('usage', `--name: expected ${checked.error.issues[0].message}`);
  const name = checked.data;
  if (options.transactionLogData && options.transactionLog === undefined)
    throw new BlockferryError('usage', '--transaction-log-data: give the file with --transaction-log FILE');
  const stateDir = resolve(options.stateDir ?? defaultStateDir());
  const activated = activatedAddresses(process.env, process.pid).map(formatListenAddress);
  const listen = [options.listen ?? [], activated, [DEFAULT_LISTEN]].find((words) => words.length > 0) ?? [];
  const log = daemonLog('blockferry', options.logLevel);
  const machinesDir = resolve(stateDir, 'run');
  const tls = guestTls(kind, options);
  const daemon: DaemonOptions = {
    kind,
    name,
    stateDir,
    control: resolve(options.control ?? controlSocketPath(stateDir, name)),
    link: null,
    ...tls,
    ...guestClients(options, tls.guestTls),
    ...sourceTls(options),
    ...(options.compression === undefined ? {} : { compression: options.compression }),
    ...(options.orderFrom === undefined ? {} : { orderFrom: resolve(options.orderFrom) }),
    ...(options.seed === undefined ? {} : { seeds: options.seed.map((path) => resolve(path)) }),
    images: null,
    folders: [],
    machinesDir,
    guestAddresses: () => listen,
    diskSocket: () => '',
    migrationAddress: '127.0.0.1',
    stopTimeoutMs: 0,
    volumes: [{ name, image: resolve(disk), mode }],
    vms: [],
    ...(options.transactionLog === undefined
      ? {}
      : {
          transactionLogs: new Map([
            [name, { path: resolve(options.transactionLog), data: options.transactionLogData }],
          ]),
        }),
    toleratesBadVolumes: false,
    parts: daemonParts(machinesDir, 0),
    log,
  };
  // Who made the sockets, or holds the other end of stdio, has stdout for itself: nbdinfo --json, an NBD session.
  const ours = listen !== activated && !listen.includes('stdio');
  await runDaemon(daemon, (uris) => announce(uris, ours ? process.stdout : process.stderr));
}

/** The readiness line. */
export function announce(uris: string[], out: NodeJS.WritableStream): void {
  out.write(`${`ready ${uris.join(' ')}`.trimEnd()}\n`);
}
