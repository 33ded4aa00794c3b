/** A volume on a data thread, as the control thread sees it. */

import { BlockferryError } from '../../errors.js';
import { Errno } from '../../nbd/constants.js';
import type { BlockDevice, IoRequest } from '../../nbd/device.js';
import type { HeldVolume, VolumeLook } from '../held-volume.js';
import type { RetreatProof, RoundCut, Tracking } from '../service.js';
import type { DataThread } from './data-thread.js';
import type { DeviceFacts, Face, Verb, VolumeFacts } from './messages.js';

/** Of one volume, waiting for their blocks: a source that is away holds up any number of them, and their callers may be gone. */
const PREFETCHES_MAX = 256;

const NEVER = new Promise<void>(() => undefined);

export class RemoteVolume implements HeldVolume {
  readonly id: string;
  readonly image: string;
  readonly link: RemoteDevice;
  readonly hashes: RemoteDevice;
  /** Kept up to date by the thread. */
  linkDescription: string;
  readonly stdioClosed = NEVER;
  #prefetches = 0;
  #closing: Promise<void> | null = null;

  constructor(
    readonly thread: DataThread,
    /** Of the thread's volumes. */
    readonly number: number,
    readonly name: string,
    facts: VolumeFacts,
  ) {
    this.id = facts.id;
    this.image = facts.image;
    this.link = new RemoteDevice(this, 'link', facts.link);
    this.hashes = new RemoteDevice(this, 'hashes', facts.hashes);
    this.linkDescription = facts.linkDescription;
  }

  get size(): number {
    return this.link.size;
  }

  #call<V extends Verb>(verb: V, ...words: Parameters<HeldVolume[V]>): ReturnType<HeldVolume[V]> {
    return this.thread.call(this.number, verb, words) as ReturnType<HeldVolume[V]>;
  }

  look(quiet = false): Promise<VolumeLook> {
    return this.#call('look', quiet);
  }

  remember(): Promise<void> {
    return this.#call('remember');
  }

  seal(generation: number): Promise<void> {
    return this.#call('seal', generation);
  }

  unseal({ volumeId, generation }: RetreatProof): Promise<void> {
    return this.#call('unseal', { volumeId, generation });
  }

  retire({ deleteImage }: { deleteImage: boolean }): Promise<void> {
    return this.#call('retire', { deleteImage });
  }

  track(moveId: string, since: number | null): Promise<Tracking> {
    return this.#call('track', moveId, since);
  }

  cut(moveId: string, cookie: number): Promise<RoundCut> {
    return this.#call('cut', moveId, cookie);
  }

  untrack(moveId: string): Promise<void> {
    return this.#call('untrack', moveId);
  }

  refresh(from: number, to: number): Promise<void> {
    return this.#call('refresh', from, to);
  }

  takeover(generation?: number): Promise<{ generation: number }> {
    return this.#call('takeover', generation);
  }

  settle(): Promise<void> {
    return this.#call('settle');
  }

  retreat(): Promise<RetreatProof> {
    return this.#call('retreat');
  }

  async cancel(): Promise<RetreatProof> {
    const proof = await this.#call('cancel');
    this.#closing = Promise.resolve();
    return proof;
  }

  pause(): Promise<void> {
    return this.#call('pause');
  }

  resume(): Promise<void> {
    return this.#call('resume');
  }

  setRate(bytesPerSecond: number | null): Promise<void> {
    return this.#call('setRate', bytesPerSecond);
  }

  async prefetch(offset: number, length: number): Promise<void> {
    if (this.#prefetches >= PREFETCHES_MAX)
      throw new BlockferryError(
        'control',
        `${PREFETCHES_MAX} prefetches of volume ${this.name} wait already: try again when its source answers`,
      );
    this.#prefetches++;
    try {
      await this.#call('prefetch', offset, length);
    } finally {
      this.#prefetches--;
    }
  }

  handedOff(): Promise<void> {
    return this.#call('handedOff');
  }

  unpublish(): Promise<void> {
    return this.#call('unpublish');
  }

  close(): Promise<void> {
    this.#closing ??= this.#call('close');
    return this.#closing;
  }
}

/**
 * What a handshake on the control thread tells of a volume elsewhere. It carries nothing out: the session that follows the handshake
 * is handed over to the volume's thread.
 */
export class RemoteDevice implements BlockDevice {
  readonly size: number;
  readonly readOnly: boolean;
  readonly multiConn: boolean;
  readonly fastZero: boolean;
  readonly preferredBlock: number;
  readonly contexts: readonly string[];

  constructor(
    readonly volume: RemoteVolume,
    readonly face: Face,
    facts: DeviceFacts,
  ) {
    this.size = facts.size;
    this.readOnly = facts.readOnly;
    this.multiConn = facts.multiConn;
    this.fastZero = facts.fastZero ?? false;
    this.preferredBlock = facts.preferredBlock;
    this.contexts = facts.contexts;
  }

  readNow(): number {
    return Errno.ESHUTDOWN;
  }

  writeNow(): number {
    return Errno.ESHUTDOWN;
  }

  read(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  write(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  flush(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  trim(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  zero(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  cache(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  status(request: IoRequest): void {
    request.complete(Errno.ESHUTDOWN);
  }

  release(): void {}
}
