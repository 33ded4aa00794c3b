/**
 * The volumes of one daemon: opened, served under their two faces, shown, and taken away again. A volume that cannot be
 * opened is kept with its error and does not disturb the others.
 */

import { existsSync, mkdirSync, statfsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { CreateVolume, ServedVolume, UnavailableVolume, VolumeView } from './control/api.js';
import type { OpenMode } from './open.js';
import {
  type ExportListener,
  type ExportPolicy,
  ExportTable,
  type Listen,
  type OpenVolume,
} from './parts.js';
import type { DaemonRecord } from './record.js';
import { bringRetiredBack, retiredId, setRetiredAside } from './retired.js';
import type { Phase, RetreatProof, VolumeService } from './service.js';
import { KeyedQueue, Occurrence } from './waiting.js';

export const VOLUMES_MAX = 4096;

export interface VolumesOptions {
  stateDir: string;
  /** Folder for images of volumes that arrive; null: none may arrive. */
  images: string | null;
  /** Addresses a volume's guest face is served on. */
  guestAddresses: (name: string) => readonly string[];
  /** Where all volumes' link faces are served; null: nowhere. */
  link: { table: ExportTable; listener: ExportListener } | null;
  openVolume: OpenVolume;
  listen: Listen;
  /** Whom a volume's faces are for. */
  guestPolicy: (name: string) => ExportPolicy;
  linkPolicy: (name: string) => ExportPolicy;
  record: DaemonRecord;
  log: Logger;
}

interface OpenEntry {
  kind: 'open';
  service: VolumeService;
  /** Serves the guest face; null until it listens and once it is closed. */
  guest: ExportListener | null;
  handoff: Occurrence;
}
type Entry = OpenEntry | { kind: 'unavailable'; view: UnavailableVolume };

export class Volumes {
  private readonly entries = new Map<string, Entry>();
  private readonly queue = new KeyedQueue();

  constructor(private readonly options: VolumesOptions) {}

  /** Opens and serves a volume. Fails with what kept it from being opened; `keep` remembers the failure instead. */
  async open(name: string, image: string, mode: OpenMode, keep = false): Promise<void> {
    await this.queue.run(name, async () => {
      try {
        await this.openEntry(name, image, mode);
      } catch (error) {
        if (!keep) throw error;
        const retired = await retiredId(this.options.stateDir, name);
        if (retired === null)
          this.options.log.error({ volume: name }, `volume not served: ${messageOf(error)}`);
        this.markUnavailable(name, image, retired, messageOf(error));
      }
    });
  }

  has(name: string): boolean {
    return this.entries.has(name);
  }

  /** Fails with 'not-found', or with the error that keeps the volume from being served. */
  service(name: string): VolumeService {
    return this.entry(name).service;
  }

  phase(name: string): Phase | 'unavailable' | 'absent' {
    const entry = this.entries.get(name);
    if (!entry) return 'absent';
    if (entry.kind === 'open') return entry.service.status().phase;
    return entry.view.retiredId === null ? 'unavailable' : 'retired';
  }

  view(name: string): VolumeView {
    const entry = this.entries.get(name);
    if (!entry) throw new BlockferryError('not-found', `this daemon has no volume "${name}"`);
    return entry.kind === 'open' ? this.served(entry) : entry.view;
  }

  /** Resolves when nothing is about to change what the volume is: not its coming or going, nor its phase. */
  async quiet(name: string): Promise<void> {
    await this.queue.run(name, async () => {
      const entry = this.entries.get(name);
      if (entry?.kind === 'open') await entry.service.quiet();
    });
  }

  /** The volume took over, and cannot go back. */
  settled(name: string): boolean {
    const entry = this.entries.get(name);
    if (entry?.kind !== 'open') return false;
    const { phase } = entry.service.status();
    return phase === 'plain' || (phase === 'relocating' && entry.service.settled);
  }

  views(): VolumeView[] {
    return [...this.entries.keys()].sort().map((name) => this.view(name));
  }

  /** NBD URIs of every guest face. */
  uris(): string[] {
    return [...this.entries.values()].flatMap((entry) => (entry.kind === 'open' ? guestUris(entry) : []));
  }

  /** True once the volume is plain, false after the timeout or when the caller is gone. */
  async waitHandoff(name: string, timeoutMs: number, signal: AbortSignal): Promise<boolean> {
    const entry = this.entry(name);
    const { phase } = entry.service.status();
    if (phase === 'plain') return true;
    if (phase === 'sealed' || phase === 'retired') {
      throw new BlockferryError(
        'phase',
        `volume "${name}" is ${phase}: it moved away, watch it at its destination`,
      );
    }
    return entry.handoff.wait(timeoutMs, signal);
  }

  /** Makes a standby volume for a move. Repeated for the same volume it answers with the one that is there. */
  arrive(request: CreateVolume): Promise<VolumeView> {
    return this.queue.run(request.name, async () => {
      const { name } = request;
      const images = this.options.images;
      if (images === null)
        throw new BlockferryError('usage', 'this daemon serves one volume and takes no others');
      const present = this.entries.get(name);
      if (present?.kind === 'open') {
        const status = present.service.status();
        if (present.service.id === request.volumeId && status.phase === 'standby')
          return this.served(present);
        if (status.phase !== 'retired') {
          throw new BlockferryError('exists', `there is a volume "${name}" (${status.phase}) here already`);
        }
        await this.drop(name, present);
      } else if (present && present.view.retiredId === null) {
        throw new BlockferryError(
          'exists',
          `there is a volume "${name}" here that could not be opened: ${present.view.error}`,
        );
      }
      if (this.entries.size >= VOLUMES_MAX) {
        throw new BlockferryError('no-space', `this daemon has ${VOLUMES_MAX} volumes and takes no more`);
      }
      const image = request.image ?? freeImagePath(images, name, request.generation);
      await this.receive(request, image);
      return this.view(name);
    });
  }

  /** A volume whose cancelling was begun takes over no more: the proof of that may be out. */
  takeover(name: string, generation?: number): Promise<{ generation: number }> {
    return this.queue.run(name, async () => {
      const { service } = this.entry(name);
      if (this.options.record.proof(service.id) !== undefined) {
        throw new BlockferryError(
          'generation',
          `volume "${name}" was about to be cancelled: it takes over no more, cancel it (migrate --abort)`,
        );
      }
      return service.takeover(generation);
    });
  }

  /** Standby -> gone. For a volume that is gone already the proof is given again. */
  cancel(name: string, volumeId: string): Promise<RetreatProof> {
    return this.queue.run(name, async () => {
      const entry = this.entries.get(name);
      if (entry?.kind !== 'open' || entry.service.id !== volumeId) {
        const known = this.options.record.proof(volumeId);
        if (known) {
          await this.options.record.addProof(known); // it may not have been durable
          return known;
        }
        throw new BlockferryError('not-found', `this daemon has no volume "${name}" with the id ${volumeId}`);
      }
      const { phase, generation } = entry.service.status();
      if (phase !== 'standby') {
        throw new BlockferryError('phase', `volume "${name}" is ${phase}: only a standby can be cancelled`);
      }
      // Before the volume goes: once it is gone nothing else could prove it. No takeover gets in between, they queue as this does.
      const proof = { volumeId, generation: generation + 1 };
      await this.options.record.addProof(proof);
      await this.unpublish(name, entry);
      try {
        await entry.service.cancel();
        this.entries.delete(name);
        await this.forgetArrival(name);
        return proof;
      } catch (error) {
        this.markUnavailable(name, entry.service.image, null, messageOf(error));
        throw error;
      }
    });
  }

  private async receive(request: CreateVolume, image: string): Promise<void> {
    const { stateDir, images, record } = this.options;
    const { name, sourceUri, volumeId, generation, size, rateBytesPerSecond = null } = request;
    this.entries.delete(name);
    await record.expectVolume(name, image, volumeId);
    try {
      if ((await retiredId(stateDir, name)) !== null) setRetiredAside(stateDir, name);
      if (request.image === undefined && images !== null) mkdirSync(images, { recursive: true, mode: 0o700 });
      await this.openEntry(name, image, {
        kind: 'arrive',
        sourceUri,
        volumeId,
        generation,
        size,
        rateBytesPerSecond,
      });
    } catch (error) {
      await this.forgetArrival(name);
      throw error;
    }
  }

  /** As if it had never come: what was retired here before is so again. */
  private async forgetArrival(name: string): Promise<void> {
    const { stateDir, record } = this.options;
    await record.forgetVolume(name);
    bringRetiredBack(stateDir, name);
    const retired = await retiredId(stateDir, name);
    if (retired !== null) this.markUnavailable(name, '', retired, 'it moved to another host');
  }

  private markUnavailable(name: string, image: string, retired: string | null, error: string): void {
    const view = { name, phase: 'unavailable', retiredId: retired, image, error } as const;
    this.entries.set(name, { kind: 'unavailable', view });
  }

  /** Resolves when the client on stdio, if a volume is served there, is gone. */
  stdioClosed(): Promise<void> {
    const listeners = [...this.entries.values()].flatMap((entry) =>
      entry.kind === 'open' ? (entry.guest ?? []) : [],
    );
    return Promise.race([
      ...listeners.map((listener) => listener.stdioClosed),
      new Promise<void>(() => undefined),
    ]);
  }

  /** Ends all sessions, then lets go of every volume. */
  async close(): Promise<void> {
    const failures: unknown[] = [];
    for (const [name, entry] of this.entries) {
      if (entry.kind !== 'open') continue;
      await this.drop(name, entry).catch((error: unknown) => failures.push(error));
    }
    if (failures.length > 0) throw failures[0];
  }

  /** What is free where images of arriving volumes go. */
  imagesSpace(): { path: string; freeBytes: number } | null {
    const path = this.options.images;
    if (path === null) return null;
    mkdirSync(path, { recursive: true, mode: 0o700 });
    const space = statfsSync(path);
    return { path, freeBytes: space.bavail * space.bsize };
  }

  private entry(name: string): OpenEntry {
    const entry = this.entries.get(name);
    if (!entry) throw new BlockferryError('not-found', `this daemon has no volume "${name}"`);
    if (entry.kind === 'open') return entry;
    throw new BlockferryError('closed', `volume "${name}" is not served: ${entry.view.error}`);
  }

  private served(entry: OpenEntry): ServedVolume {
    const { service, guest } = entry;
    const { link } = this.options;
    const { name } = service;
    return {
      ...service.status(),
      uri: guestUris(entry),
      clients: (guest?.connections(name) ?? 0) + (link?.listener.connections(name) ?? 0),
      image: service.image,
      linkUri: link?.listener.addresses(name)[0] ?? null,
      allocatedBytes: allocatedBytes(service),
    };
  }

  private async openEntry(name: string, image: string, mode: OpenMode): Promise<void> {
    const { stateDir, openVolume, log, link, listen, guestAddresses, guestPolicy, linkPolicy } = this.options;
    const service = await openVolume({ stateDir, name, image, mode, log });
    const entry: OpenEntry = { kind: 'open', service, guest: null, handoff: new Occurrence() };
    const describe = (): string => service.linkDescription;
    try {
      const table = new ExportTable();
      table.add(name, describe, service.guest, guestPolicy(name));
      entry.guest = await listen(guestAddresses(name), table, log);
      link?.table.add(name, describe, service.link, linkPolicy(name));
    } catch (error) {
      await service.close();
      throw error;
    }
    service.handedOff().then(
      () => entry.handoff.announce(),
      // The volume was closed or cancelled before: nobody may be left waiting for it.
      () => undefined,
    );
    this.entries.set(name, entry);
  }

  private async unpublish(name: string, entry: OpenEntry): Promise<void> {
    this.options.link?.table.remove(name);
    await entry.guest?.close();
    entry.guest = null;
  }

  private async drop(name: string, entry: OpenEntry): Promise<void> {
    this.entries.delete(name);
    await this.unpublish(name, entry);
    await entry.service.close();
  }
}

function guestUris(entry: OpenEntry): string[] {
  return entry.guest?.addresses(entry.service.name) ?? [];
}

/** What the image occupies; a block device occupies its size. */
function allocatedBytes(service: VolumeService): number {
  try {
    const stat = statSync(service.image);
    return stat.isFile() ? Math.min(stat.blocks * 512, service.size) : service.size;
  } catch {
    return 0;
  }
}

/** An image left here by an earlier stay of the same volume is never written over. */
function freeImagePath(images: string, name: string, generation: number): string {
  const plain = join(images, `${name}.img`);
  if (!existsSync(plain)) return plain;
  for (let count = generation; count < generation + 1000; count += 1) {
    const numbered = join(images, `${name}.g${count}.img`);
    if (!existsSync(numbered)) return numbered;
  }
  throw new BlockferryError(
    'exists',
    `${plain} is there already: remove the images of earlier moves from ${images}`,
  );
}
