/**
 * A volume as the control side holds it, on whatever thread it lives. Everything is asked, and an answer may be old when it
 * arrives: what was seen decides nothing that the volume's own thread does not decide again (see volumes.ts).
 */

import type { BlockDevice } from '../nbd/device.js';
import type { OpenVolumeOptions } from './open.js';
import {
  type ExportListener,
  type ExportPolicy,
  ExportTable,
  type Listen,
  type ListenSettings,
} from './parts.js';
import type { RetreatProof, RoundCut, Tracking, VolumeService, VolumeStatus } from './service.js';

export type OpenVolume = (options: OpenVolumeOptions) => Promise<VolumeService>;

/** What a volume was in one step of its thread. */
export interface VolumeLook {
  /** With the guest face's URIs, and its clients. */
  status: VolumeStatus;
  /** The machine is known to run here, or nothing is left to come: no retreat any more. */
  settled: boolean;
}

export interface HeldVolume {
  readonly name: string;
  readonly id: string;
  /** Bytes. */
  readonly size: number;
  /** Path of the image. */
  readonly image: string;
  /** What another host's link reads. On another thread's volume it says what it is, and only `startSession` of that thread's pool serves it. */
  readonly link: BlockDevice;
  /** What the volume's blocks hash to; likewise. */
  readonly hashes: BlockDevice;
  /** What links are told. Never older than the last answer; the volume's thread checks it once more for every link. */
  readonly linkDescription: string;
  /** Resolves when the session on stdio, if the guest face has one, is over. */
  readonly stdioClosed: Promise<void>;

  /** `quiet`: in the step in which no change of phase is under way any more. */
  look(quiet?: boolean): Promise<VolumeLook>;

  // As in VolumeService.
  remember(): Promise<void>;
  seal(generation: number): Promise<void>;
  unseal(proof: RetreatProof): Promise<void>;
  retire(options: { deleteImage: boolean }): Promise<void>;
  track(moveId: string, since: number | null): Promise<Tracking>;
  cut(moveId: string, cookie: number): Promise<RoundCut>;
  untrack(moveId: string): Promise<void>;
  refresh(from: number, to: number): Promise<void>;
  takeover(generation?: number): Promise<{ generation: number }>;
  settle(): Promise<void>;
  retreat(): Promise<RetreatProof>;
  cancel(): Promise<RetreatProof>;
  pause(): Promise<void>;
  resume(): Promise<void>;
  setRate(bytesPerSecond: number | null): Promise<void>;
  prefetch(offset: number, length: number): Promise<void>;
  handedOff(): Promise<void>;

  /** Ends the guest face: no new clients, requests under way finished. Repeatable. */
  unpublish(): Promise<void>;
  /** `unpublish`, then lets go of image, maps and link, all made durable. */
  close(): Promise<void>;
}

export interface HoldOptions extends OpenVolumeOptions {
  /** Where the guest face is served, to whom and how. */
  guest: { addresses: readonly string[]; policy: ExportPolicy; settings: ListenSettings };
  /**
   * The volume's thread died, and the volume with it as by a kill of the process: its descriptors are closed. Called at most once, from
   * the time it is held until it is closed, before anything that waits for the volume hears of it.
   */
  onLost?: (why: Error) => void;
}

/** Opens a volume and serves its guest face, or fails with what keeps it from that. */
export type HoldVolume = (options: HoldOptions) => Promise<HeldVolume>;

/** Volumes on the thread that asks for them. */
export function holdLocally(openVolume: OpenVolume, listen: Listen): HoldVolume {
  return async ({ guest, onLost: _never, ...options }) => {
    const service = await openVolume(options);
    try {
      const table = new ExportTable();
      table.add(options.name, () => service.linkDescription, service.guest, guest.policy, service.hashes);
      return new LocalVolume(service, await listen(guest.addresses, table, options.log, guest.settings));
    } catch (error) {
      await service.close();
      throw error;
    }
  };
}

/** Its methods are asynchronous also where the service's are not: what these throw is a rejection. */
export class LocalVolume implements HeldVolume {
  readonly stdioClosed: Promise<void>;
  /** Null once it was closed. */
  #guest: ExportListener | null;

  constructor(
    readonly service: VolumeService,
    guest: ExportListener,
  ) {
    this.#guest = guest;
    this.stdioClosed = guest.stdioClosed;
  }

  get name(): string {
    return this.service.name;
  }

  get id(): string {
    return this.service.id;
  }

  get size(): number {
    return this.service.size;
  }

  get image(): string {
    return this.service.image;
  }

  get link(): BlockDevice {
    return this.service.link;
  }

  get hashes(): BlockDevice {
    return this.service.hashes;
  }

  get linkDescription(): string {
    return this.service.linkDescription;
  }

  async look(quiet = false): Promise<VolumeLook> {
    if (quiet) await this.service.quiet();
    const { name, service } = this;
    const faces = {
      uri: this.#guest?.addresses(name) ?? [],
      clients: this.#guest?.connections(name) ?? 0,
    };
    return { status: { ...service.status(), ...faces }, settled: service.settled };
  }

  remember(): Promise<void> {
    return this.service.remember();
  }

  seal(generation: number): Promise<void> {
    return this.service.seal(generation);
  }

  unseal(proof: RetreatProof): Promise<void> {
    return this.service.unseal(proof);
  }

  retire(options: { deleteImage: boolean }): Promise<void> {
    return this.service.retire(options);
  }

  track(moveId: string, since: number | null): Promise<Tracking> {
    return this.service.track(moveId, since);
  }

  cut(moveId: string, cookie: number): Promise<RoundCut> {
    return this.service.cut(moveId, cookie);
  }

  untrack(moveId: string): Promise<void> {
    return this.service.untrack(moveId);
  }

  refresh(from: number, to: number): Promise<void> {
    return this.service.refresh(from, to);
  }

  takeover(generation?: number): Promise<{ generation: number }> {
    return this.service.takeover(generation);
  }

  settle(): Promise<void> {
    return this.service.settle();
  }

  retreat(): Promise<RetreatProof> {
    return this.service.retreat();
  }

  cancel(): Promise<RetreatProof> {
    return this.service.cancel();
  }

  async pause(): Promise<void> {
    this.service.pause();
  }

  async resume(): Promise<void> {
    this.service.resume();
  }

  async setRate(bytesPerSecond: number | null): Promise<void> {
    this.service.setRate(bytesPerSecond);
  }

  prefetch(offset: number, length: number): Promise<void> {
    return this.service.prefetch(offset, length);
  }

  handedOff(): Promise<void> {
    return this.service.handedOff();
  }

  async unpublish(): Promise<void> {
    await this.#guest?.close();
    this.#guest = null;
  }

  async close(): Promise<void> {
    await this.unpublish();
    await this.service.close();
  }
}
