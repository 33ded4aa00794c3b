/** A raw image file or block device as a BlockDevice: a volume's store without maps, as `blockferry serve` has it. */

import { BlockferryError } from '../errors.js';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, Errno } from '../nbd/constants.js';
import type { BlockDevice, DirectAccess, IoRequest, StatusRequest } from '../nbd/device.js';
import { BLOCK_BYTES } from '../volume/blocks.js';
import { Image } from '../volume/image.js';
import { BlockStore } from '../volume/store.js';

export class ImageDevice implements BlockDevice {
  readonly size: number;
  readonly readOnly: boolean;
  readonly multiConn = true;
  readonly fastZero = true;
  readonly preferredBlock = BLOCK_BYTES;
  readonly contexts = [BASE_ALLOCATION, ALLOCATION_DEPTH];
  readonly path: string;
  readonly #store: BlockStore;
  #closing: Promise<void> | null = null;

  constructor(path: string, readOnly: boolean) {
    const image = Image.open(path, { readOnly });
    this.#store = new BlockStore(image, null, 0);
    this.size = image.size;
    this.path = image.path;
    this.readOnly = readOnly;
    if (readOnly) this.#store.setGate({ kind: 'refused', errno: Errno.EPERM });
  }

  /** Idempotent. Throws 'image-io' when what was written could not be made durable; the image is let go of all the same. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    const store = this.#store;
    store.setGate({ kind: 'refused', errno: Errno.ESHUTDOWN });
    await store.idle();
    const errno = await store.commit();
    store.image.close();
    if (errno !== Errno.OK)
      throw store.failure ?? new BlockferryError('image-io', `${this.path} could not be synced`);
  }

  direct(): DirectAccess | null {
    return this.#closing === null ? this.#store.direct() : null;
  }

  directWriteHeldUp(): void {
    this.#store.directWriteHeldUp();
  }

  readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    return this.#closing === null ? this.#store.readNow(offset, length, buffer, at) : Errno.ESHUTDOWN;
  }

  zeroesNow(offset: number, length: number): number {
    return this.#closing === null ? this.#store.zeroesNow(offset, length) : 0;
  }

  writeNow(offset: number, length: number, buffer: Buffer, at: number): number {
    return this.#store.writeNow(offset, length, buffer, at);
  }

  read(request: IoRequest): void {
    if (this.#open(request)) this.#store.read(request);
  }

  write(request: IoRequest): void {
    this.#store.write(request);
  }

  flush(request: IoRequest): void {
    if (this.#open(request)) this.#store.flush(request);
  }

  trim(request: IoRequest): void {
    this.#store.trim(request);
  }

  zero(request: IoRequest): void {
    this.#store.zero(request);
  }

  cache(request: IoRequest): void {
    if (this.#open(request)) this.#store.cache(request);
  }

  status(request: StatusRequest): void {
    if (this.#open(request)) this.#store.status(request);
  }

  release(): void {}

  #open(request: IoRequest): boolean {
    if (this.#closing === null) return true;
    request.complete(Errno.ESHUTDOWN);
    return false;
  }
}
