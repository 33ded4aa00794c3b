/**
 * presence.live: the presence map as it is now, in memory shared with the page cache, so that it survives the process but not
 * the machine. Its header names the boot, the volume and the epoch it belongs to.
 *
 * Invariants
 * - A bit is set after its block's data was written to the image: whoever finds the bit after a kill -9 finds the data.
 * - The header is made valid after the bits are, and invalid before they are dropped.
 * - The file is allocated whole before it is mapped: touching a page can not fail for lack of space.
 */
import { closeSync, constants, fstatSync, openSync, readSync } from 'node:fs';
import { BlockferryError } from '../errors.js';
import * as native from '../native/index.js';

const MAGIC = 'BFLIVE01';
const HEAD_BYTES = 4096;
// Head: 0 magic, 8 epoch (u32, 0 while the bits are not valid), 16 blocks (u64), 24 volume id (36), 64 boot id (36)
const EPOCH_AT = 8;

export interface LiveTag {
  volumeId: string;
  bootId: string;
  blocks: number;
  epoch: number;
}

export class LiveMap {
  readonly #mapping: Uint8Array;
  readonly #head: Buffer;
  /** One bit a block, LSB first. */
  readonly bits: Uint8Array;

  private constructor(mapping: Uint8Array) {
    this.#mapping = mapping;
    this.#head = Buffer.from(mapping.buffer, mapping.byteOffset, HEAD_BYTES);
    this.bits = new Uint8Array(mapping.buffer, mapping.byteOffset + HEAD_BYTES, mapping.length - HEAD_BYTES);
  }

  /** A map with all bits clear that is not valid yet; an old file is replaced. */
  static async create(path: string, blocks: number): Promise<LiveMap> {
    const fd = openSync(path, constants.O_RDWR | constants.O_CREAT | constants.O_TRUNC, 0o600);
    try {
      const length = fileBytes(blocks);
      let done = await native.allocate(fd, 0, length);
      if (done === -native.ERRNO.EOPNOTSUPP) done = await native.zeroRange(fd, 0, length, false);
      if (done < 0) {
        throw new BlockferryError(
          'no-space',
          `no room for the presence map ${path} (${length} bytes): free some space`,
        );
      }
      return new LiveMap(native.mapShared(fd, length));
    } finally {
      closeSync(fd);
    }
  }

  /**
   * What a process of this boot left behind: the map with just this tag; 'unset' if the file is this boot's but has no bits
   * of this epoch yet (a process died while it dropped the bits of an earlier one); 'missing' for anything else.
   */
  static open(path: string, tag: LiveTag): LiveMap | 'unset' | 'missing' {
    let fd: number;
    try {
      fd = openSync(path, constants.O_RDWR);
    } catch {
      return 'missing';
    }
    try {
      const length = fileBytes(tag.blocks);
      const head = Buffer.alloc(HEAD_BYTES);
      if (fstatSync(fd).size !== length || readSync(fd, head, 0, HEAD_BYTES, 0) !== HEAD_BYTES)
        return 'missing';
      const epoch = head.readUInt32BE(EPOCH_AT);
      if (!head.equals(headFor({ ...tag, epoch }))) return 'missing';
      if (epoch < tag.epoch) return 'unset';
      return epoch === tag.epoch ? new LiveMap(native.mapShared(fd, length)) : 'missing';
    } finally {
      closeSync(fd);
    }
  }

  /** From now on the bits count. */
  validate(tag: LiveTag): void {
    const head = headFor(tag);
    head.copy(this.#head, EPOCH_AT + 4, EPOCH_AT + 4);
    head.copy(this.#head, 0, 0, EPOCH_AT);
    this.#head.writeUInt32BE(tag.epoch, EPOCH_AT);
  }

  /** From now on, until `validate`, they do not. */
  invalidate(): void {
    this.#head.writeUInt32BE(0, EPOCH_AT);
  }

  close(): void {
    native.unmap(this.#mapping);
  }
}

function headFor(tag: LiveTag): Buffer {
  const head = Buffer.alloc(HEAD_BYTES);
  head.write(MAGIC, 0, 'latin1');
  head.writeUInt32BE(tag.epoch, EPOCH_AT);
  head.writeBigUInt64BE(BigInt(tag.blocks), 16);
  head.write(tag.volumeId, 24, 36, 'latin1');
  head.write(tag.bootId, 64, 36, 'latin1');
  return head;
}

function fileBytes(blocks: number): number {
  const page = 4096;
  return HEAD_BYTES + Math.max(page, Math.ceil(Math.ceil(blocks / 8) / page) * page);
}
