/**
 * The parts a daemon is made of, as it sees them: how a volume is opened, how exports are listened for, how machines are started. The
 * daemon gets them handed in, so that its own logic can be tested without an image, a socket or QEMU.
 */

import type { Logger } from 'pino';
import type { Hypervisor } from '../hypervisor/driver.js';
import type { BlockDevice } from '../nbd/device.js';
import type { ExportDirectory, ExportEntry } from '../nbd/server/exports.js';
import { defaultOrNamed } from '../nbd/server/exports.js';
import type { ServerTlsSettings } from '../nbd/tls.js';
import type { OpenVolumeOptions } from './open.js';
import type { VolumeService } from './service.js';

export type OpenVolume = (options: OpenVolumeOptions) => Promise<VolumeService>;

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

/** Listens at all of `addresses` (unix:PATH, HOST:PORT, [V6]:PORT, fd:N, stdio) or fails with 'address', or 'tls'. */
export type Listen = (
  addresses: readonly string[],
  exports: ExportDirectory,
  log: Logger,
  tls?: ServerTlsSettings,
) => Promise<ExportListener>;

export interface DaemonParts {
  openVolume: OpenVolume;
  listen: Listen;
  hypervisor: Hypervisor;
}

/** The exports of one listener, which may come and go. */
export class ExportTable implements ExportDirectory {
  readonly shuttingDown = false;
  private readonly entries: ExportEntry[] = [];

  /** `describe` is asked for each client anew: what a volume says of itself changes with its generation. */
  add(name: string, describe: () => string, device: BlockDevice, tlsOnly = false): void {
    this.remove(name);
    this.entries.push({
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
      tlsOnly,
      open: () => device,
    });
  }

  /** No client is let in any more; sessions there are end with the device's volume. */
  remove(name: string): void {
    const index = this.entries.findIndex((entry) => entry.name === name);
    if (index >= 0) this.entries.splice(index, 1);
  }

  list(): ExportEntry[] {
    return [...this.entries];
  }

  find(name: string): ExportEntry | undefined {
    return defaultOrNamed(this.entries, name);
  }
}
