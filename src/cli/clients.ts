/** Options of `serve` and `proxy` about which clients are served, and how many. */

import { Option } from 'commander';
import { BlockferryError } from '../errors.js';
import type { DaemonOptions } from '../host/daemon.js';
import { CONNECTIONS_MAX, HANDSHAKE_TIMEOUT_MS, HANDSHAKES_MAX } from '../nbd/constants.js';
import { ACCESS_RULES_MAX, type AccessRule, parseAccessRule, unprovable } from '../nbd/server/access.js';
import { argument } from './common.js';
import { parseCount, parseSeconds } from './units.js';

export interface ClientOptions {
  access?: AccessRule[];
  maxConnections?: number;
  maxHandshakes?: number;
  handshakeTimeout?: number;
}

const checkedRule = argument(parseAccessRule);

/** In the order in which `--help` shows them. */
export function clientOptions(): Option[] {
  return [
    new Option(
      '--access <rule>',
      'none, read or write, then :address=IP[/PREFIX], unix, certificate=NAME or psk=NAME with commas between; may be repeated, the first that fits counts (default: write)',
    ).argParser((text: string, before: AccessRule[] | undefined) => [...(before ?? []), checkedRule(text)]),
    new Option(
      '--max-connections <n>',
      `clients served at the same time (default: ${CONNECTIONS_MAX})`,
    ).argParser(argument(parseCount)),
    new Option(
      '--max-handshakes <n>',
      `clients in the handshake at the same time (default: ${HANDSHAKES_MAX})`,
    ).argParser(argument(parseCount)),
    new Option(
      '--handshake-timeout <seconds>',
      `how long a handshake may take (default: ${HANDSHAKE_TIMEOUT_MS / 1000})`,
    ).argParser(argument(parseSeconds)),
  ];
}

/** Throws 'usage' for rules that can never fit. */
export function guestClients(
  options: ClientOptions,
  tls: DaemonOptions['guestTls'],
): Pick<DaemonOptions, 'guestPolicy' | 'limits'> {
  const { access, maxConnections, maxHandshakes, handshakeTimeout } = options;
  if (access !== undefined && access.length > ACCESS_RULES_MAX)
    throw new BlockferryError('usage', `--access may be given ${ACCESS_RULES_MAX} times`);
  const lacking = unprovable(access ?? [], tls);
  if (lacking !== undefined) {
    const needed =
      lacking === 'psk' ? '--tls and --tls-psk' : '--tls, --tls-certificates and --tls-verify-peer';
    throw new BlockferryError(
      'usage',
      `--access with ${lacking}= needs ${needed}, or nobody can prove that name`,
    );
  }
  return {
    guestPolicy: () => (access === undefined ? {} : { access }),
    limits: {
      ...(maxConnections === undefined ? {} : { connectionsMax: maxConnections }),
      ...(maxHandshakes === undefined ? {} : { handshakesMax: maxHandshakes }),
      ...(handshakeTimeout === undefined ? {} : { handshakeTimeoutMs: handshakeTimeout }),
    },
  };
}
