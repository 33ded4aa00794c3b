import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { closeSync, openSync, readFileSync, readSync, statSync, truncateSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { copyPages, DurableMap, PAGE_BITS } from '../../../src/volume/durable-map.js';
import { failsWith, tempFolder } from '../../support/volume.js';

const SLOT = 4096;
const PAGES_AT = 4 * SLOT;
const PAGE_BYTES = PAGE_BITS / 8;
const VOLUME = randomUUID();

/** A map under test: its file, its bits, and commits of chosen pages. */
class Fixture {
  readonly path = join(tempFolder(), 'presence.map');
  readonly bits: Uint8Array;
  map!: DurableMap;

  private constructor(
    readonly pages: number,
    readonly epoch: number,
  ) {
    this.bits = new Uint8Array(pages * PAGE_BYTES);
  }

  static async of(pages: number, epoch = 1): Promise<Fixture> {
    const fixture = new Fixture(pages, epoch);
    fixture.map = await DurableMap.create(fixture.path, VOLUME, pages * PAGE_BITS, epoch);
    return fixture;
  }

  async commit(...pages: number[]): Promise<void> {
    await this.map.commit(copyPages(this.bits, pages), async () => {});
  }

  /** Closes the map and reads it anew. */
  async load(epoch = this.epoch, volume = VOLUME): Promise<Buffer> {
    const bits = Buffer.alloc(this.bits.length);
    const map = await DurableMap.open(this.path, volume, this.pages * PAGE_BITS, epoch, bits);
    map.close();
    return bits;
  }

  bytes(at: number, length: number): Buffer {
    return readFileSync(this.path).subarray(at, at + length);
  }

  patch(at: number, bytes: Uint8Array): void {
    const fd = openSync(this.path, 'r+');
    writeSync(fd, bytes, 0, bytes.length, at);
    closeSync(fd);
  }

  /** Flips a bit. */
  flip(at: number): void {
    const fd = openSync(this.path, 'r+');
    const byte = Buffer.alloc(1);
    readSync(fd, byte, 0, 1, at);
    byte[0] ^= 0x10;
    writeSync(fd, byte, 0, 1, at);
    closeSync(fd);
  }
}

const slotAt = (page: number, slot: number): number => PAGES_AT + (2 * page + slot) * SLOT;

describe('DurableMap', () => {
  test('what was committed is there when it is opened again', async () => {
    const it = await Fixture.of(3);
    it.bits[5] = 0x81;
    it.bits[2 * PAGE_BYTES + 7] = 0xff;
    await it.commit(0, 2);
    it.bits[6] = 1;
    await it.commit(0);
    it.bits[7] = 0xff; // never committed
    const loaded = await it.load();
    it.bits[7] = 0;
    assert.deepEqual(loaded, Buffer.from(it.bits));
    it.map.close();
  });

  test('a map of a number of bits that fills no byte, and one of a page and one bit', async () => {
    for (const bits of [1, 7, PAGE_BITS - 1, PAGE_BITS, PAGE_BITS + 1]) {
      const path = join(tempFolder(), 'map');
      const all = new Uint8Array(Math.ceil(bits / 8)).fill(0xff);
      const map = await DurableMap.create(path, VOLUME, bits, 1);
      await map.commit(copyPages(all, bits > PAGE_BITS ? [0, 1] : [0]), async () => {});
      map.close();
      const loaded = new Uint8Array(all.length);
      (await DurableMap.open(path, VOLUME, bits, 1, loaded)).close();
      assert.deepEqual(loaded, all);
    }
  });

  test('the pages are written after the image is synced, and the caller is answered after them', async () => {
    const it = await Fixture.of(1);
    it.bits[0] = 1;
    let resolve = (): void => {};
    let answered = false;
    const commit = it.map
      .commit(
        copyPages(it.bits, [0]),
        () =>
          new Promise((done) => {
            resolve = done;
          }),
      )
      .then(() => {
        answered = true;
      });
    const before = it.bytes(PAGES_AT, 2 * SLOT);
    assert.ok(before.equals(Buffer.alloc(2 * SLOT)));
    it.bits[0] = 3; // behind the copy: not of this commit
    assert.equal(answered, false);
    resolve();
    await commit;
    assert.equal((await it.load())[0], 1);
    it.map.close();
  });

  test('a failed sync of the image writes no page', async () => {
    const it = await Fixture.of(1);
    it.bits[0] = 1;
    const failed = it.map.commit(copyPages(it.bits, [0]), () => Promise.reject(new Error('no')));
    await assert.rejects(failed, /no/);
    assert.equal((await it.load())[0], 0);
    it.map.close();
  });

  test('a torn slot of an announced page leaves the older copy, whichever slot it is', async () => {
    for (const commits of [1, 2, 3, 4]) {
      const it = await Fixture.of(2);
      for (let i = 0; i < commits; i++) {
        it.bits[i] = 0xff;
        await it.commit(0, 1);
      }
      it.map.close();
      // The idle header never reached the disk, and of the page's last write only a part did.
      const header = (2 * commits) % 4;
      it.patch(header * SLOT, Buffer.alloc(SLOT));
      it.flip(slotAt(0, commits % 2) + 2000);
      const loaded = await it.load();
      assert.deepEqual(
        [...loaded.subarray(0, 5)],
        [0, 1, 2, 3, 4].map((i) => (i < commits - 1 ? 0xff : 0)),
      );
    }
  });

  test('a torn slot does not make the file refused after later commits of other pages', async () => {
    const it = await Fixture.of(2);
    it.bits[0] = 1;
    await it.commit(0);
    it.bits[1] = 1;
    await it.commit(0);
    it.map.close();
    it.patch(0, Buffer.alloc(SLOT)); // the second commit's idle header is lost
    it.flip(slotAt(0, 0) + 100);
    const bits = new Uint8Array(2 * PAGE_BYTES);
    const map = await DurableMap.open(it.path, VOLUME, 2 * PAGE_BITS, 1, bits);
    assert.equal(bits[0], 1);
    bits[PAGE_BYTES] = 1;
    await map.commit(copyPages(bits, [1]), async () => {});
    map.close();
    const loaded = await it.load();
    assert.deepEqual([loaded[0], loaded[1], loaded[PAGE_BYTES]], [1, 0, 1]);
  });

  test('a damaged slot of a page that was not being written is refused, the newest copy or the older one', async () => {
    for (const slot of [0, 1]) {
      const it = await Fixture.of(2);
      await it.commit(0, 1);
      await it.commit(0, 1);
      it.map.close();
      it.flip(slotAt(1, slot) + 4095);
      await assert.rejects(it.load(), failsWith('state-damaged', /page 1 .*restore/));
    }
  });

  test('both slots of an announced page bad: no crash does that, it is refused', async () => {
    const it = await Fixture.of(1);
    await it.commit(0);
    await it.commit(0);
    it.map.close();
    it.patch(0, Buffer.alloc(SLOT)); // no idle header: page 0 is announced
    it.flip(slotAt(0, 0) + 80);
    it.flip(slotAt(0, 1) + 80);
    await assert.rejects(it.load(), failsWith('state-damaged'));
  });

  test("another page's slot, another volume's file, another size: refused", async () => {
    const it = await Fixture.of(2);
    it.bits[0] = 1;
    await it.commit(0, 1);
    await assert.rejects(it.load(1, randomUUID()), failsWith('state-damaged'));
    const bits = new Uint8Array(3 * PAGE_BYTES);
    await assert.rejects(
      DurableMap.open(it.path, VOLUME, 3 * PAGE_BITS, 1, bits),
      failsWith('state-damaged', /bytes/),
    );
    it.patch(slotAt(1, 1), it.bytes(slotAt(0, 1), SLOT));
    await assert.rejects(it.load(), failsWith('state-damaged', /another page/));
    it.map.close();
  });

  test('a file that was cut or is missing is refused', async () => {
    const it = await Fixture.of(2);
    await it.commit(0, 1);
    it.map.close();
    const size = statSync(it.path).size;
    for (const cut of [size - 1, size - SLOT, PAGES_AT, 10, 0]) {
      truncateSync(it.path, cut);
      await assert.rejects(it.load(), failsWith('state-damaged', /bytes/));
    }
    await assert.rejects(
      DurableMap.open(`${it.path}.none`, VOLUME, 1, 1, new Uint8Array(1)),
      failsWith('state-damaged', /restore/),
    );
  });

  test('a header that is torn takes nothing away', async () => {
    const it = await Fixture.of(1);
    for (let i = 0; i < 3; i++) {
      it.bits[i] = 1;
      await it.commit(0);
    }
    it.map.close();
    const whole = readFileSync(it.path);
    for (let header = 0; header < 4; header++) {
      it.flip(header * SLOT + 300);
      assert.deepEqual([...(await it.load()).subarray(0, 3)], [1, 1, 1]);
      it.patch(0, whole);
    }
  });

  test('the first header of all torn: no page was written yet, so the map is empty, not damaged', async () => {
    const it = await Fixture.of(300);
    const pages = Array.from({ length: 300 }, (_, i) => i);
    it.bits.fill(0xff);
    await assert.rejects(it.map.commit(copyPages(it.bits, pages), () => Promise.reject(new Error('crash'))));
    it.map.close();
    it.patch(SLOT + 1024, Buffer.alloc(512)); // one of its sectors did not arrive
    assert.ok((await it.load()).equals(Buffer.alloc(it.bits.length)));
  });

  test('no header left, but pages: refused', async () => {
    const it = await Fixture.of(1);
    it.bits[0] = 1;
    await it.commit(0);
    it.map.close();
    for (let header = 0; header < 4; header++) it.flip(header * SLOT + 300);
    await assert.rejects(it.load(), failsWith('state-damaged', /header/));
  });

  test('bits of another epoch count for nothing, also where the newer copy is torn', async () => {
    const it = await Fixture.of(2, 1);
    it.bits.fill(0xff);
    await it.commit(0, 1);
    assert.ok((await it.load(2)).equals(Buffer.alloc(it.bits.length)));
    it.map.epoch = 2;
    it.bits.fill(0);
    it.bits[1] = 4;
    await it.commit(0);
    const loaded = await it.load(2);
    assert.equal(loaded[1], 4);
    assert.equal(loaded.indexOf(0xff), -1);
    it.map.close();
    it.patch(0, Buffer.alloc(SLOT));
    it.flip(slotAt(0, 0) + 80);
    assert.ok((await it.load(2)).equals(Buffer.alloc(it.bits.length)));
  });

  test('a commit keeps the epoch it began with', async () => {
    const it = await Fixture.of(1, 1);
    it.bits[0] = 1;
    await it.map.commit(copyPages(it.bits, [0]), async () => {
      it.map.epoch = 2;
    });
    it.map.close();
    assert.equal((await it.load(2))[0], 0);
    assert.equal((await it.load(1))[0], 1);
  });

  test('more pages in one commit than a header lists: all of them may be torn', async () => {
    const pages = 1100;
    const it = await Fixture.of(pages);
    await it.commit(...Array.from({ length: pages }, (_, i) => i));
    it.bits.fill(0xff);
    await it.commit(...Array.from({ length: pages }, (_, i) => i));
    it.map.close();
    it.patch(0, Buffer.alloc(SLOT));
    it.flip(slotAt(1099, 0) + 80);
    const loaded = await it.load();
    assert.equal(loaded[0], 0xff);
    assert.equal(loaded[1099 * PAGE_BYTES], 0);
  });

  test('a large map has its space from the start, and loads what little it holds', async () => {
    const pages = 8324; // 1 TiB of blocks
    const it = await Fixture.of(pages);
    it.bits[0] = 1;
    it.bits[5000 * PAGE_BYTES + 11] = 2;
    it.bits[it.bits.length - 1] = 4;
    await it.commit(0, 5000, pages - 1);
    const { blocks, size } = statSync(it.path);
    assert.equal(size, PAGES_AT + 2 * pages * SLOT);
    assert.ok(blocks * 512 >= size, `${blocks * 512} bytes: a commit could fail on a full disk`);
    it.map.close();
    assert.deepEqual(await it.load(), Buffer.from(it.bits));
  });
});
