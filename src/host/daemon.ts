/**
 * A blockferry daemon: volumes, machines, the link address and the control socket, put together. `serve` and `proxy` are daemons of
 * one volume, `host` is one of many.
 *
 * What a stop does: the machines this daemon started end first, because their disks go with it (see Machines.stopAll); then the
 * control socket, the link and the volumes are closed, each volume made durable. Nothing is adopted at the next start: a machine
 * whose process outlived a killed daemon is shown as `unmanaged` until that process ends.
 */

import { mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { MachineDefinition } from '../hypervisor/driver.js';
import type { Compression } from '../nbd/codec/frames.js';
import type { TransactionLogSettings } from '../nbd/log/transaction-log.js';
import type { ClientTlsSettings, ServerTlsSettings } from '../nbd/tls.js';
import { type SeedFinder, type SeedSettings, useSeeds } from '../relocation/seeds.js';
import { VERSION } from '../version.js';
import type { DaemonView, StatusView } from './control/api.js';
import { controlRoutes } from './control/routes.js';
import { ControlServer } from './control/server.js';
import { isAlive } from './control/socket.js';
import { Machines } from './machines.js';
import type { OpenMode, OpenVolumeOptions } from './open.js';
import {
  type DaemonParts,
  type ExportListener,
  type ExportPolicy,
  ExportTable,
  type ListenLimits,
  type ListenSettings,
} from './parts.js';
import { DaemonRecord } from './record.js';
import { bringRetiredBack } from './retired.js';
import { hasState, seedsDir } from './state-dir.js';
import { Volumes } from './volumes.js';

export interface DaemonOptions {
  kind: DaemonView['kind'];
  name: string;
  stateDir: string;
  /** Path of the control socket. */
  control: string;
  /** ADDR at which other hosts read; null: nowhere. */
  link: string | null;
  /** TLS at the link address; default: none. */
  linkTls?: ServerTlsSettings;
  /** TLS at the guests' addresses; default: none. */
  guestTls?: ServerTlsSettings;
  /** What sources with TLS are asked with, where their URIs leave it open. */
  sourceTls?: ClientTlsSettings;
  /** Of links: how sources are asked for it, and 'off' keeps others from having it here as well. Default: 'auto'. */
  compression?: Compression;
  /** Path of the record that a volume whose source tells none is copied by; default: none. */
  orderFrom?: string;
  /** Whom a volume is for at the guests' addresses and at the link address; default: everybody who gets there. */
  guestPolicy?: (volume: string) => ExportPolicy;
  linkPolicy?: (volume: string) => ExportPolicy;
  /** False: who reads at the link address must know the names of volumes. */
  linkListsExports?: boolean;
  /** Of the link address, and of each volume's addresses. */
  limits?: ListenLimits;
  /** Where the guest's requests of a volume are recorded, by its name; of others they are not. */
  transactionLogs?: ReadonlyMap<string, TransactionLogSettings>;
  /** Images in which the blocks of volumes that come from elsewhere are looked for; default: none. */
  seeds?: readonly string[];
  /** Folder for images of volumes that arrive; null: none may arrive. */
  images: string | null;
  /** Folders that must be there before anything is served, for this user only. */
  folders: readonly string[];
  /** Folder of the machines' own folders. */
  machinesDir: string;
  /** Where the guest face of a volume is served. */
  guestAddresses: (volume: string) => readonly string[];
  /** The unix socket among them that machines use. */
  diskSocket: (volume: string) => string;
  migrationAddress: string;
  stopTimeoutMs: number;
  volumes: readonly { name: string; image: string; mode: OpenMode }[];
  vms: readonly { definition: MachineDefinition; autostart: boolean }[];
  /** A volume that cannot be opened is shown with its error; false: it fails the start. */
  toleratesBadVolumes: boolean;
  parts: DaemonParts;
  log: Logger;
}

/** Volumes opened at the same time when a daemon starts. */
const OPENING_MAX = 8;

export class Daemon {
  private readonly startedAt = new Date().toISOString();
  private control: ControlServer | null = null;
  private stopping: Promise<void> | null = null;
  private seeds: SeedFinder | null = null;
  /** What an earlier run left is known again. */
  private ready = false;

  private constructor(
    private readonly options: DaemonOptions,
    private readonly link: { table: ExportTable; listener: ExportListener } | null,
    readonly volumes: Volumes,
    readonly machines: Machines,
    private readonly record: DaemonRecord,
  ) {}

  /** Resolves when everything that can be served is served. Fails with what makes the whole daemon impossible. */
  static async start(options: DaemonOptions): Promise<Daemon> {
    const { stateDir, log, parts, images, guestAddresses, diskSocket, migrationAddress, machinesDir } =
      options;
    const record = DaemonRecord.open(stateDir, options.name);
    makeFolders(options.folders);
    const link = await openLink(options);
    const { hold, hypervisor } = parts;
    const { guestTls, limits = {}, guestPolicy, linkPolicy } = options;
    const compression = options.compression !== 'off';
    const settings: ListenSettings = {
      limits,
      compression,
      ...(guestTls === undefined ? {} : { tls: guestTls }),
    };
    const volumes = new Volumes({
      stateDir,
      images,
      guestAddresses,
      link,
      hold: (what) => hold({ ...what, ...settingsOf(options, what.name) }),
      guestSettings: settings,
      guestPolicy: guestPolicy ?? (() => ({})),
      linkPolicy: linkPolicy ?? (() => ({})),
      record,
      log,
    });
    const hasLeftover = (machine: string): Promise<boolean> => leftoverIn(machinesDir, machine);
    const machines = new Machines({
      volumes,
      hypervisor,
      diskSocket,
      hasLeftover,
      migrationAddress,
      record,
      log,
    });
    const daemon = new Daemon(options, link, volumes, machines, record);
    try {
      // First of all: a second daemon of this name must fail before it touches a volume.
      const routes = controlRoutes({
        status: () => daemon.status(),
        ready: () => daemon.ready,
        volumes,
        machines,
      });
      daemon.control = await ControlServer.listen(options.control, routes, log);
      daemon.seeds = prepareSeeds(options);
      await daemon.openVolumes();
      await daemon.startMachines();
    } catch (error) {
      await daemon.stop(AbortSignal.abort());
      throw error;
    }
    return daemon;
  }

  async status(): Promise<StatusView> {
    const { kind, name, log } = this.options;
    let images: DaemonView['images'] = null;
    try {
      images = this.volumes.imagesSpace();
    } catch (error) {
      log.error({ err: error }, 'folder for images');
    }
    return {
      daemon: {
        name,
        kind,
        version: VERSION,
        pid: process.pid,
        startedAt: this.startedAt,
        images,
        linkUri: this.link?.listener.addresses()[0] ?? null,
      },
      volumes: await this.volumes.views(),
      vms: await this.machines.views(),
    };
  }

  /** Rejects when the daemon cannot go on, and must be stopped; never resolves. */
  get failed(): Promise<never> {
    return this.options.parts.failed ?? new Promise<never>(() => undefined);
  }

  /** Ends machines, sessions and volumes, in this order. `hurry` ends the guests' time to power off. Repeatable. */
  stop(hurry: AbortSignal): Promise<void> {
    this.stopping ??= this.close(hurry);
    return this.stopping;
  }

  private async close(hurry: AbortSignal): Promise<void> {
    const failures: unknown[] = [];
    const attempt = async (what: string, step: Promise<void> | undefined): Promise<void> => {
      try {
        await step;
      } catch (error) {
        this.options.log.error({ err: error }, `stopping: ${what}`);
        failures.push(error);
      }
    };
    this.seeds?.release();
    await attempt('machines', this.machines.stopAll(this.options.stopTimeoutMs, hurry));
    await attempt('control socket', this.control?.close());
    await attempt('link', this.link?.listener.close());
    await attempt('volumes', this.volumes.close());
    await attempt('data threads', this.options.parts.close?.());
    if (failures.length > 0) throw failures[0];
  }

  private async openVolumes(): Promise<void> {
    const { kind, stateDir, volumes, toleratesBadVolumes } = this.options;
    const came = new Map(this.record.volumes());
    // State of an earlier run counts more than the configuration: the volume may have left, or come back to another image.
    const names = new Set([...volumes.map((volume) => volume.name), ...came.keys()]);
    for (const name of names) bringRetiredBack(stateDir, name);
    const all: { name: string; image: string; mode: OpenMode }[] = volumes.map(({ name, image, mode }) =>
      kind === 'host' && hasState(stateDir, name)
        ? { name, image: came.get(name) ?? image, mode: { kind: 'resume' } }
        : { name, image, mode },
    );
    for (const [name, image] of came) {
      const configured = volumes.some((volume) => volume.name === name);
      if (!configured && hasState(stateDir, name)) all.push({ name, image, mode: { kind: 'resume' } });
    }
    const queue = all.values();
    const worker = async (): Promise<void> => {
      for (const { name, image, mode } of queue)
        await this.volumes.open(name, image, mode, toleratesBadVolumes);
    };
    await Promise.all(Array.from({ length: Math.min(OPENING_MAX, all.length) }, worker));
  }

  private async startMachines(): Promise<void> {
    const { vms, log } = this.options;
    for (const { definition } of vms) this.machines.define(definition);
    this.machines.restore();
    this.ready = true;
    for (const { definition, autostart } of vms) {
      if (!autostart) continue;
      try {
        await this.machines.start(definition.name);
      } catch (error) {
        // Shown in status; the other machines are none the worse for it.
        log.error({ vm: definition.name }, `machine not started: ${messageOf(error)}`);
      }
    }
  }
}

/** What of the daemon's settings a volume is opened with. */
function settingsOf(
  options: DaemonOptions,
  volume: string,
): Pick<OpenVolumeOptions, 'sourceTls' | 'sourceCompression' | 'orderFrom' | 'transactionLog' | 'seeds'> {
  const { sourceTls, compression, orderFrom, transactionLogs } = options;
  const transactionLog = transactionLogs?.get(volume);
  const seeds = seedsOf(options);
  return {
    ...(seeds === undefined ? {} : { seeds }),
    ...(sourceTls === undefined ? {} : { sourceTls }),
    ...(compression === undefined ? {} : { sourceCompression: compression }),
    ...(orderFrom === undefined ? {} : { orderFrom }),
    ...(transactionLog === undefined ? {} : { transactionLog }),
  };
}

function seedsOf({ seeds = [], stateDir }: DaemonOptions): SeedSettings | undefined {
  return seeds.length === 0 ? undefined : { images: seeds, folder: seedsDir(stateDir) };
}

/** A host's seeds are indexed before the first volume that wants them arrives. */
function prepareSeeds(options: DaemonOptions): SeedFinder | null {
  const settings = seedsOf(options);
  if (settings === undefined || options.kind !== 'host') return null;
  const seeds = useSeeds(settings, options.log);
  void seeds.built.then(() => seeds.release());
  return seeds;
}

function makeFolders(folders: readonly string[]): void {
  for (const folder of folders) {
    try {
      mkdirSync(folder, { recursive: true, mode: 0o700 });
    } catch (error) {
      throw new BlockferryError('address', `cannot make the folder ${folder}: ${messageOf(error)}`, {
        cause: error,
      });
    }
  }
}

async function openLink(
  options: DaemonOptions,
): Promise<{ table: ExportTable; listener: ExportListener } | null> {
  if (options.link === null) return null;
  const table = new ExportTable();
  const { link, log, linkTls, linkListsExports = true, limits = {}, parts } = options;
  const tls = linkTls === undefined ? {} : { tls: linkTls };
  const compression = options.compression !== 'off';
  const settings = { limits, compression, listExports: linkListsExports, ...tls };
  return { table, listener: await parts.listen([link], table, log, settings) };
}

/** The driver gives every process a folder NAME-XXXXXX with its QMP socket: one that answers is alive. */
async function leftoverIn(machinesDir: string, machine: string): Promise<boolean> {
  let folders: string[];
  try {
    folders = readdirSync(machinesDir);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw new BlockferryError('hypervisor', `cannot look into ${machinesDir}: ${messageOf(error)}`, {
      cause: error,
    });
  }
  const mine = folders.filter(
    (folder) => folder.startsWith(`${machine}-`) && folder.length === machine.length + 7,
  );
  const alive = await Promise.all(mine.map((folder) => isAlive(join(machinesDir, folder, 'qmp.sock'))));
  return alive.includes(true);
}
