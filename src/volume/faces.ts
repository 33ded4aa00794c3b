/** The two devices a volume is served as. What a phase allows is asked at each request: sessions outlive phases. */
import {
  ALLOCATION_DEPTH,
  BASE_ALLOCATION,
  CHANGED,
  DIRTY,
  DIRTY_BITMAP,
  Errno,
  FIRST_ACCESS,
  HEAT,
} from '../nbd/constants.js';
import type { BlockDevice, DirectAccess, IoRequest, StatusRequest } from '../nbd/device.js';
import type { TransactionLog } from '../nbd/log/transaction-log.js';
import { reportAccessOrder } from './access-order.js';
import { BLOCK_BYTES } from './blocks.js';
import { DIRTY_COOKIE_UNIT, DirtyFlag, reportDirty } from './dirty-status.js';
import type { FirstAccess } from './first-access.js';
import { type Heat, reportHeat } from './heat.js';
import { ReadOnlyFace } from './read-only-face.js';
import type { BlockStore } from './store.js';
import type { Volume } from './volume.js';

const CONTEXTS = [
  BASE_ALLOCATION,
  ALLOCATION_DEPTH,
  HEAT,
  FIRST_ACCESS,
  DIRTY_BITMAP,
  DIRTY,
  CHANGED,
] as const;

/** The machine's disk: reads and writes as the phase allows. What it reads and writes here is the volume's heat. */
export class GuestDevice implements BlockDevice {
  readonly size: number;
  readonly readOnly: boolean;
  readonly multiConn = true;
  readonly fastZero = true;
  readonly preferredBlock = BLOCK_BYTES;
  readonly contexts = CONTEXTS;
  readonly #store: BlockStore;
  readonly #heat: Heat;
  readonly #firstAccess: FirstAccess;

  constructor(
    private readonly volume: Volume,
    readonly transactionLog: TransactionLog | null = null,
  ) {
    this.#store = volume.store;
    this.#heat = volume.heat;
    this.#firstAccess = volume.firstAccess;
    this.size = volume.size;
    this.readOnly = volume.readOnly;
  }

  direct(): DirectAccess | null {
    return this.volume.readable ? this.#store.direct(this.#heat.bytes) : null;
  }

  directWriteHeldUp(): void {
    this.#store.directWriteHeldUp();
  }

  readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    if (!this.volume.readable) return Errno.EPERM;
    const errno = this.#store.readNow(offset, length, buffer, at);
    if (errno === Errno.OK) this.#heat.read(offset, length);
    return errno;
  }

  zeroesNow(offset: number, length: number): number {
    return this.volume.readable ? this.#store.zeroesNow(offset, length) : 0;
  }

  writeNow(offset: number, length: number, buffer: Buffer, at: number): number {
    const errno = this.#store.writeNow(offset, length, buffer, at);
    if (errno === Errno.OK) this.#heat.written(offset, length);
    return errno;
  }

  read(request: IoRequest): void {
    if (!this.volume.readable) {
      request.complete(Errno.EPERM);
      return;
    }
    this.#heat.read(request.offset, request.length);
    this.#firstAccess.readWaits(request.offset, request.length);
    this.#store.readLater(request);
  }

  write(request: IoRequest): void {
    if (this.#store.gate.kind !== 'refused') {
      this.#heat.written(request.offset, request.length);
      this.#firstAccess.writeWaits(request.offset, request.length);
    }
    this.#store.write(request);
  }

  flush(request: IoRequest): void {
    this.#store.flush(request);
  }

  trim(request: IoRequest): void {
    this.#store.trim(request);
  }

  zero(request: IoRequest): void {
    this.#store.zero(request);
  }

  cache(request: IoRequest): void {
    this.#store.cache(request);
  }

  status(request: StatusRequest): void {
    if (this.volume.readable) statusOf(this.volume, request);
    else request.complete(Errno.EPERM);
  }

  release(): void {
    this.#store.dropAbandoned();
  }
}

/**
 * What another host's link reads: never writable, and readable also while the volume is sealed. Its sessions may outlive the volume,
 * which goes when it makes room for one that comes back.
 */
export class LinkDevice extends ReadOnlyFace implements BlockDevice {
  readonly size: number;
  readonly multiConn = true;
  readonly preferredBlock = BLOCK_BYTES;
  readonly contexts = CONTEXTS;
  readonly #store: BlockStore;

  constructor(private readonly volume: Volume) {
    super();
    this.#store = volume.store;
    this.size = volume.size;
  }

  direct(): DirectAccess | null {
    return this.volume.closed ? null : this.#store.direct(); // the session writes nothing: it is read-only
  }

  readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    return this.volume.closed ? Errno.ESHUTDOWN : this.#store.readNow(offset, length, buffer, at);
  }

  zeroesNow(offset: number, length: number): number {
    return this.volume.closed ? 0 : this.#store.zeroesNow(offset, length);
  }

  read(request: IoRequest): void {
    if (this.volume.closed) request.complete(Errno.ESHUTDOWN);
    else this.#store.readLater(request);
  }

  cache(request: IoRequest): void {
    if (this.volume.closed) request.complete(Errno.ESHUTDOWN);
    else this.#store.cache(request);
  }

  status(request: StatusRequest): void {
    if (this.volume.closed) request.complete(Errno.ESHUTDOWN);
    else statusOf(this.volume, request);
  }

  release(): void {
    this.#store.dropAbandoned();
  }
}

function statusOf(volume: Volume, request: StatusRequest): void {
  const { context } = request;
  if (context === HEAT) reportHeat(request, volume.heat);
  else if (context === DIRTY_BITMAP) reportDirty(request, volume.store.dirty, null);
  else if (context === DIRTY) reportDirty(request, volume.store.dirty, roundOf(volume));
  else if (context === CHANGED) reportDirty(request, volume.store.dirty, roundOf(volume), true);
  else if (context === FIRST_ACCESS) reportAccessOrder(request, volume.firstAccess.told);
  else {
    volume.store.status(request);
    return;
  }
  request.complete(Errno.OK);
}

/** What every extent of `blockferry:dirty` says besides whether it is dirty. */
function roundOf(volume: Volume): number {
  const sealed = volume.phase === 'sealed' ? DirtyFlag.SEALED : 0;
  return sealed + (volume.store.dirty?.cookie ?? 0) * DIRTY_COOKIE_UNIT;
}
