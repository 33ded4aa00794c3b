/** A store on a sparse image with a source under the test's control, and threads that the test can hold. */
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { closeSync, openSync, readSync } from 'node:fs';
import { BLOCK_BYTES, blocksOf } from '../../src/volume/blocks.js';
import { Image } from '../../src/volume/image.js';
import { Presence } from '../../src/volume/presence.js';
import { BlockStore } from '../../src/volume/store.js';
import { HeldSource, patterned, sparseFile, tempFolder } from './volume.js';

export const B = BLOCK_BYTES;

/** What an image method was asked, done when the test says so. */
export interface HeldCall {
  /** Does it, or answers `result` without. Resolves when the store has taken note. */
  release(result?: number | false): Promise<void>;
}

export class StoreFixture {
  readonly guest: Buffer;

  private constructor(
    readonly image: Image,
    readonly presence: Presence,
    readonly store: BlockStore,
    readonly source: HeldSource,
  ) {
    this.guest = Buffer.from(source.content);
  }

  static async of(size: number): Promise<StoreFixture> {
    const image = Image.open(sparseFile(size));
    const identity = { id: randomUUID(), mapEpoch: 1, openBootId: null };
    const presence = await Presence.create(tempFolder(), identity, blocksOf(size));
    const store = new BlockStore(image, presence, 1);
    store.keeps = true;
    return new StoreFixture(image, presence, store, new HeldSource(store, patterned(size, size)));
  }

  /** The next call of an image method waits; whoever calls it finds `call` filled. */
  hold(method: 'zero' | 'punch' | 'sync' | 'writeLater'): { readonly calls: HeldCall[] } {
    const calls: HeldCall[] = [];
    const image = this.image as unknown as Record<string, (...args: unknown[]) => Promise<unknown>>;
    const real = image[method]!.bind(this.image);
    image[method] = (...args) =>
      new Promise((answer) => {
        calls.push({
          async release(result) {
            answer(result ?? (await real(...args)));
            for (let turns = 0; turns < 5; turns++) await Promise.resolve();
          },
        });
      });
    return { calls };
  }

  /** What the image file holds, whatever presence says. */
  onDisk(offset: number, length: number): Buffer {
    const fd = openSync(this.image.path, 'r');
    const content = Buffer.alloc(length);
    readSync(fd, content, 0, length, offset);
    closeSync(fd);
    return content;
  }

  /** Checks that a block is here and what it holds. */
  holds(block: number, content: Uint8Array): void {
    assert.ok(this.presence.has(block), `block ${block} is missing`);
    assert.ok(this.onDisk(block * B, content.length).equals(content), `block ${block} holds something else`);
  }

  sourceBlock(block: number): Buffer {
    return this.source.content.subarray(block * B, (block + 1) * B);
  }

  close(): void {
    this.presence.close();
    this.image.close();
  }
}
