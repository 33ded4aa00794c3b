/**
 * The parts a daemon is made of, as it sees them: how a volume is opened, how exports are listened for, how machines are started. The
 * daemon gets them handed in, so that its own logic can be tested without an image, a socket or QEMU.
 */

import type { Logger } from 'pino';
import type { Hypervisor } from '../hypervisor/driver.js';
import type { BlockDevice } from '../nbd/device.js';
import { defaultOrNamed, type ExportDirectory, type ExportEntry } from '../nbd/server/exports.js';
import type { ListenerParameters } from '../nbd/server/listener.js';
import { hashesNameOf } from '../relocation/source-identity.js';
import type { HoldVolume } from './held-volume.js';

/** What the daemon needs of nbd's Listener. */
export interface ExportListener {
  /** NBD URIs of an export, one for every address that has one. */
  addresses(exportName?: string): string[];
  /** Clients in the transmission phase of an export. */
  connections(exportName: string): number;
  /** Resolves when the session on stdio, if there is one, is over. */
  readonly stdioClosed: Promise<void>;
  close(): Promise<void>;
}

/** Whom an export is for. */
export type ExportPolicy = Pick<ExportEntry, 'tlsOnly' | 'access' | 'connectionsMax'>;

export type ListenLimits = Pick<
  ListenerParameters,
  'connectionsMax' | 'handshakesMax' | 'handshakeTimeoutMs'
>;

/** What is absent has its default. */
export interface ListenSettings extends Pick<ListenerParameters, 'tls' | 'listExports' | 'compression'> {
  limits?: ListenLimits;
}

/** Listens at all of `addresses` (unix:PATH, HOST:PORT, [V6]:PORT, fd:N, stdio) or fails with 'address', or 'tls'. */
export type Listen = (
  addresses: readonly string[],
  exports: ExportDirectory,
  log: Logger,
  settings?: ListenSettings,
) => Promise<ExportListener>;

export interface DaemonParts {
  hold: HoldVolume;
  /** For the link address: it can serve what `hold` gave. */
  listen: Listen;
  hypervisor: Hypervisor;
  /** Rejects when the daemon cannot go on, and must end; never resolves. */
  failed?: Promise<never>;
  /** Ends what runs for the parts themselves. Every volume must be closed. */
  close?: () => Promise<void>;
}

/** The exports of one listener, which may come and go. */
export class ExportTable implements ExportDirectory {
  readonly shuttingDown = false;
  private readonly entries = new Map<string, ExportEntry>();
  /** Of their hashes: known to those who ask by name, who are let in as to the export itself. */
  private readonly companions = new Map<string, ExportEntry>();

  /** `describe` is asked for each client anew: what a volume says of itself changes with its generation. */
  add(
    name: string,
    describe: () => string,
    device: BlockDevice,
    policy: ExportPolicy = {},
    hashes?: BlockDevice,
  ): void {
    this.remove(name);
    this.entries.set(name, entryOf(name, describe, device, policy));
    if (hashes === undefined) return;
    const companion = hashesNameOf(name);
    this.companions.set(companion, entryOf(companion, describe, hashes, policy));
  }

  /** No client is let in any more; sessions there are end with the device's volume. */
  remove(name: string): void {
    this.entries.delete(name);
    this.companions.delete(hashesNameOf(name));
  }

  list(): ExportEntry[] {
    return [...this.entries.values()];
  }

  /** By its name at once: a client may ask often. */
  find(name: string): ExportEntry | undefined {
    if (name === '') return defaultOrNamed(this.list(), name);
    return this.entries.get(name) ?? this.companions.get(name);
  }
}

function entryOf(
  name: string,
  describe: () => string,
  device: BlockDevice,
  policy: ExportPolicy,
): ExportEntry {
  return {
    name,
    get description() {
      return describe();
    },
    size: device.size,
    readOnly: device.readOnly,
    contexts: device.contexts,
    preferredBlock: device.preferredBlock,
    multiConn: device.multiConn,
    fastZero: device.fastZero ?? false,
    ...policy,
    open: () => device,
  };
}
