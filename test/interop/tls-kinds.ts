/** The two kinds of TLS credentials, as each program wants to be told of them; and a daemon of ours that demands them. */

import { join } from 'node:path';
import { DaemonProcess } from '../lab/hosts.js';
import type { Pki } from '../support/pki.js';

export interface TlsKind {
  readonly name: 'x509' | 'psk';
  /** Options of `blockferry serve` and `proxy`. */
  options(): string[];
  /** Of a URI: who before the host, and parameters. */
  readonly user: string;
  parameters(): string;
  /** QEMU's object, with the id `t`. */
  qemu(endpoint: 'client' | 'server'): string;
  /** nbdkit as a server. */
  nbdkit(): string[];
  /** nbdkit's nbd plugin, a client. */
  nbdkitClient(): string[];
}

/** `pki` is asked for when the credentials are used: it is made in a `before`. */
export function tlsKinds(pki: () => Pki): readonly [x509: TlsKind, psk: TlsKind] {
  const psk = (): string => pki().keysFolder;
  return [
    {
      name: 'x509',
      options: () => ['--tls-certificates', pki().good, '--tls-verify-peer'],
      user: '',
      parameters: () => `tls-certificates=${pki().good}`,
      qemu: (endpoint) => `tls-creds-x509,id=t,endpoint=${endpoint},dir=${pki().good},verify-peer=on`,
      nbdkit: () => [`--tls-certificates=${pki().good}`, '--tls-verify-peer'],
      nbdkitClient: () => ['tls=require', `tls-certificates=${pki().good}`],
    },
    {
      name: 'psk',
      options: () => ['--tls-psk', pki().keys],
      user: 'alice@',
      parameters: () => `tls-psk-file=${pki().keys}`,
      qemu: (endpoint) =>
        `tls-creds-psk,id=t,endpoint=${endpoint},dir=${psk()}${endpoint === 'client' ? ',username=alice' : ''}`,
      nbdkit: () => [`--tls-psk=${pki().keys}`],
      nbdkitClient: () => ['tls=require', `tls-psk=${pki().keys}`, 'tls-username=alice'],
    },
  ];
}

/** The directory certificate or key options come from, `blockferry serve` of an image as the export `disk`. */
export interface TlsServer {
  readonly daemon: DaemonProcess;
  readonly socket: string;
  readonly port: string;
  /** For libnbd, over the unix socket and over TCP, credentials included. */
  readonly uris: readonly [unix: string, tcp: string];
}

let serial = 0;

/** `options`: default those of the kind. State and socket are put into `folder`. */
export async function serveTls(
  folder: string,
  image: string,
  mode: 'allowed' | 'required',
  kind: TlsKind,
  options = kind.options(),
): Promise<TlsServer> {
  const socket = join(folder, `tls-${++serial}.sock`);
  const where = ['--listen', `unix:${socket}`, '--listen', '127.0.0.1:0'];
  const state = ['--state-dir', join(folder, `tls-${serial}.state`)];
  const words = ['serve', image, '--name', 'disk', ...where, ...state, '--tls', mode, ...options];
  const daemon = await DaemonProcess.start(words);
  const port = daemon.uris.find((uri) => uri.startsWith('nbds://'))!.match(/:(\d+)\//)![1]!;
  const uris = [
    `nbds+unix://${kind.user}/disk?socket=${socket}&${kind.parameters()}`,
    `nbds://${kind.user}localhost:${port}/disk?${kind.parameters()}`,
  ] as const;
  return { daemon, socket, port, uris };
}
