/** Options of `serve` and `proxy` about TLS, and what they mean to a daemon. */

import { resolve } from 'node:path';
import { Option } from 'commander';
import { BlockferryError } from '../errors.js';
import type { DaemonOptions } from '../host/daemon.js';
import type { TlsMode } from '../nbd/tls.js';

export interface TlsOptions {
  tls: TlsMode;
  tlsCertificates?: string;
  tlsPsk?: string;
  tlsVerifyPeer: boolean;
  tlsUsername?: string;
}

export function tlsModeOption(): Option {
  return new Option('--tls <mode>', 'whether clients may or must use TLS')
    .choices(['off', 'allowed', 'required'])
    .default('off');
}

export function tlsCertificatesOption(): Option {
  return new Option(
    '--tls-certificates <folder>',
    'folder with ca-cert.pem, server-cert.pem and server-key.pem (client-cert.pem and client-key.pem for a source)',
  ).conflicts('tlsPsk');
}

export function tlsPskOption(): Option {
  return new Option('--tls-psk <file>', 'file of keys, NAME:HEXKEY in each line, instead of certificates');
}

export function tlsVerifyPeerOption(): Option {
  return new Option(
    '--tls-verify-peer',
    'refuse clients without a certificate signed by ca-cert.pem',
  ).default(false);
}

export function tlsUsernameOption(): Option {
  return new Option(
    '--tls-username <name>',
    'name of our key at the source (default: that of the URI, or of this user)',
  );
}

function filesOf({ tlsCertificates, tlsPsk }: TlsOptions): { certificates?: string; pskFile?: string } {
  return {
    ...(tlsCertificates === undefined ? {} : { certificates: resolve(tlsCertificates) }),
    ...(tlsPsk === undefined ? {} : { pskFile: resolve(tlsPsk) }),
  };
}

/** TLS for the daemon's clients. Throws 'usage' for words that do not go together. */
export function guestTls(kind: 'serve' | 'proxy', options: TlsOptions): Pick<DaemonOptions, 'guestTls'> {
  const { tls: mode, tlsVerifyPeer: verifyPeer } = options;
  const files = filesOf(options);
  const given = files.certificates !== undefined || files.pskFile !== undefined;
  if (verifyPeer && (mode === 'off' || files.certificates === undefined))
    throw new BlockferryError('usage', '--tls-verify-peer needs --tls and --tls-certificates');
  if (mode === 'off') {
    // A proxy may need them for its source alone.
    if (given && kind === 'serve')
      throw new BlockferryError('usage', 'credentials without --tls are of no use: add --tls required');
    return {};
  }
  if (!given)
    throw new BlockferryError('usage', `--tls ${mode} needs --tls-certificates FOLDER or --tls-psk FILE`);
  return { guestTls: { mode, verifyPeer, ...files } };
}

/** TLS towards a source, where its URI leaves something open. */
export function sourceTls(options: TlsOptions): Pick<DaemonOptions, 'sourceTls'> {
  const { tlsUsername: username } = options;
  return { sourceTls: { ...filesOf(options), ...(username === undefined ? {} : { username }) } };
}
