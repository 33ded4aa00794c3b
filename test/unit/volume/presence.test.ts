import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { bootId } from '../../../src/volume/boot.js';
import { PAGE_BITS } from '../../../src/volume/durable-map.js';
import { Presence } from '../../../src/volume/presence.js';
import { copyOf, failsWith, OTHER_BOOT, tempFolder, turns } from '../../support/volume.js';

const BLOCKS = 2 * PAGE_BITS + 77;
const noImage = async (): Promise<void> => {};

/** A volume's maps, as one process after the other opens them. */
class Maps {
  identity = { id: randomUUID() as string, mapEpoch: 1, openBootId: bootId() as string | null };
  folder = tempFolder();
  presence!: Presence;

  static async of(): Promise<Maps> {
    const maps = new Maps();
    maps.presence = await Presence.create(maps.folder, maps.identity, BLOCKS);
    return maps;
  }

  path(file: 'presence.live' | 'presence.map'): string {
    return join(this.folder, file);
  }

  damage(file: 'presence.live' | 'presence.map', at: number): void {
    const bytes = readFileSync(this.path(file));
    bytes[at]! ^= 0xff;
    writeFileSync(this.path(file), bytes);
  }

  /** The process is killed: nothing is closed, the files are as the page cache has them. */
  async killed(): Promise<Presence> {
    this.folder = copyOf(this.folder);
    return this.#recover();
  }

  /** The machine dies: what was open was open in another boot. */
  async rebooted(): Promise<Presence> {
    this.folder = copyOf(this.folder);
    this.identity.openBootId = OTHER_BOOT;
    const live = readFileSync(this.path('presence.live')).fill(0xff, 4096);
    live.write(OTHER_BOOT, 64, 'latin1');
    writeFileSync(this.path('presence.live'), live);
    return this.#recover();
  }

  async #recover(): Promise<Presence> {
    const before = this.presence;
    this.presence = await Presence.recover(this.folder, this.identity, BLOCKS);
    before.close();
    this.identity.openBootId = bootId();
    return this.presence;
  }

  blocks(): number[] {
    const all: number[] = [];
    const { presence } = this;
    for (let at = presence.nextPresent(0, BLOCKS); at < BLOCKS; at = presence.nextPresent(at + 1, BLOCKS))
      all.push(at);
    assert.equal(all.length, presence.present);
    return all;
  }
}

describe('Presence in memory', () => {
  test('set, count, search, across pages and at the ends', async () => {
    const { presence } = await Maps.of();
    presence.set(0, 1);
    presence.set(0, 1);
    presence.set(PAGE_BITS - 2, PAGE_BITS + 2);
    presence.set(BLOCKS - 1, BLOCKS);
    assert.equal(presence.present, 6);
    assert.ok(presence.has(0) && !presence.has(1) && presence.has(BLOCKS - 1));
    assert.ok(presence.hasAll(PAGE_BITS - 2, PAGE_BITS + 2));
    assert.ok(!presence.hasAll(PAGE_BITS - 3, PAGE_BITS + 1));
    assert.ok(!presence.hasAll(PAGE_BITS - 2, PAGE_BITS + 40));
    assert.equal(presence.nextMissing(0, BLOCKS), 1);
    assert.equal(presence.nextMissing(PAGE_BITS - 2, PAGE_BITS + 1), PAGE_BITS + 1);
    assert.equal(presence.nextPresent(1, BLOCKS), PAGE_BITS - 2);
    assert.equal(presence.nextPresent(5, 5), 5);
    presence.set(0, BLOCKS);
    assert.ok(presence.complete);
    presence.close();
  });

  test('changed pages, and those only, are due', async () => {
    const { presence } = await Maps.of();
    assert.equal(presence.changed, false);
    presence.set(3, 4);
    assert.equal(presence.changed, true);
    await presence.commit(noImage);
    assert.equal(presence.changed, false);
    presence.set(3, 4);
    assert.equal(presence.changed, false);
    presence.close();
  });

  test('a commit without changed bits still syncs the image, and fails with it', async () => {
    const { presence } = await Maps.of();
    await assert.rejects(
      presence.commit(() => Promise.reject(new Error('disk'))),
      /disk/,
    );
    presence.close();
  });
});

describe('Presence recovered', () => {
  test('the process killed: every bit is there, and what presence.map lacks is due', async () => {
    const maps = await Maps.of();
    maps.presence.set(1, 3);
    await maps.presence.commit(noImage);
    maps.presence.set(PAGE_BITS + 1, PAGE_BITS + 2);
    const presence = await maps.killed();
    assert.deepEqual(maps.blocks(), [1, 2, PAGE_BITS + 1]);
    assert.equal(presence.changed, true);
    await presence.commit(noImage);
    await maps.rebooted();
    assert.deepEqual(maps.blocks(), [1, 2, PAGE_BITS + 1]);
    maps.presence.close();
  });

  test('the machine rebooted: what was committed is there and nothing else, whatever presence.live holds', async () => {
    const maps = await Maps.of();
    maps.presence.set(1, 3);
    await maps.presence.commit(noImage);
    maps.presence.set(9, 10);
    await maps.rebooted();
    assert.deepEqual(maps.blocks(), [1, 2]);
    maps.presence.set(10, 11);
    await maps.killed();
    assert.deepEqual(maps.blocks(), [1, 2, 10]);
    maps.presence.close();
  });

  test('the machine rebooted and presence.live gone: the same', async () => {
    const maps = await Maps.of();
    maps.presence.set(1, 3);
    await maps.presence.commit(noImage);
    rmSync(maps.path('presence.live'));
    maps.identity.openBootId = OTHER_BOOT;
    maps.presence.close();
    maps.presence = await Presence.recover(maps.folder, maps.identity, BLOCKS);
    assert.deepEqual(maps.blocks(), [1, 2]);
    maps.presence.close();
  });

  test('presence.live damaged, cut or gone in the boot that had it open: refused', async () => {
    for (const harm of [
      (maps: Maps) => maps.damage('presence.live', 30),
      (maps: Maps) => truncateSync(maps.path('presence.live'), 4096),
      (maps: Maps) => rmSync(maps.path('presence.live')),
    ]) {
      const maps = await Maps.of();
      harm(maps);
      await assert.rejects(maps.killed(), failsWith('state-damaged', /presence\.live .*restore/));
    }
  });

  test('presence.live gone but the volume was closed: presence.map has it all', async () => {
    const maps = await Maps.of();
    maps.presence.set(4, 5);
    await maps.presence.commit(noImage);
    maps.identity.openBootId = null;
    rmSync(maps.path('presence.live'));
    await maps.killed();
    assert.deepEqual(maps.blocks(), [4]);
    maps.presence.close();
  });

  test('presence.map damaged or gone after a reboot: refused', async () => {
    for (const harm of [
      (maps: Maps) => maps.damage('presence.map', 4 * 4096 + 4096 + 100),
      (maps: Maps) => truncateSync(maps.path('presence.map'), 8192),
      (maps: Maps) => rmSync(maps.path('presence.map')),
    ]) {
      const maps = await Maps.of();
      maps.presence.set(1, 2);
      await maps.presence.commit(noImage);
      harm(maps);
      await assert.rejects(maps.rebooted(), failsWith('state-damaged', /presence\.map/));
    }
  });
});

describe('presence.map damaged while presence.live is good', () => {
  for (const bits of [[1, 2, PAGE_BITS + 3], []]) {
    test(`it is made anew without loss (${bits.length} blocks here)`, async () => {
      const maps = await Maps.of();
      for (const bit of bits) maps.presence.set(bit, bit + 1);
      await maps.presence.commit(noImage);
      truncateSync(maps.path('presence.map'), 5000);
      await maps.killed();
      assert.deepEqual(maps.blocks(), bits);
      assert.equal(maps.presence.changed, true, 'a commit is due');
      await maps.presence.commit(noImage);
      assert.ok(!readdirSync(maps.folder).includes('presence.map.next'));
      await maps.rebooted();
      assert.deepEqual(maps.blocks(), bits);
      maps.presence.close();
    });
  }

  test('killed before the new one is complete: nothing is lost still', async () => {
    const maps = await Maps.of();
    maps.presence.set(1, 2);
    await maps.presence.commit(noImage);
    truncateSync(maps.path('presence.map'), 5000);
    await maps.killed();
    maps.presence.set(5, 6);
    await assert.rejects(maps.presence.commit(() => Promise.reject(new Error('killed'))));
    await maps.killed();
    assert.deepEqual(maps.blocks(), [1, 5]);
    await maps.presence.commit(noImage);
    await maps.rebooted();
    assert.deepEqual(maps.blocks(), [1, 5]);
    maps.presence.close();
  });

  test('bits dropped before the new one is complete: it takes its place all the same', async () => {
    const maps = await Maps.of();
    maps.presence.set(1, 2);
    truncateSync(maps.path('presence.map'), 5000);
    await maps.killed();
    maps.identity.mapEpoch = 2;
    maps.presence.drop(2);
    await maps.presence.commit(noImage);
    await maps.rebooted();
    assert.deepEqual(maps.blocks(), []);
    maps.presence.close();
  });
});

test('a commit of very many pages goes in rounds, each behind a sync of the image of its own', async () => {
  const folder = tempFolder();
  const pages = 2005;
  const blocks = pages * PAGE_BITS;
  const identity = { id: randomUUID() as string, mapEpoch: 1, openBootId: bootId() as string | null };
  const presence = await Presence.create(folder, identity, blocks);
  for (let page = 0; page < pages; page++) presence.set(page * PAGE_BITS, page * PAGE_BITS + 1);
  let syncs = 0;
  await presence.commit(async () => {
    // Data of blocks in the first and the last page arrives while the first round is under way.
    if (++syncs > 1) return;
    presence.set(1, 2);
    presence.set(blocks - 1, blocks);
  });
  assert.equal(syncs, 3);
  assert.equal(presence.changed, true, 'the first page is due again');
  const lost = copyOf(folder);
  rmSync(join(lost, 'presence.live'));
  const found = await Presence.recover(lost, { ...identity, openBootId: OTHER_BOOT }, blocks);
  assert.equal(found.present, pages + 1);
  assert.ok(found.has(blocks - 1) && !found.has(1));
  found.close();
  await presence.commit(noImage);
  assert.equal(presence.changed, false);
  presence.close();
});

describe('Presence dropped', () => {
  /** Bits of epoch 1 on disk and in memory. */
  async function full(): Promise<Maps> {
    const maps = await Maps.of();
    maps.presence.set(0, 10);
    await maps.presence.commit(noImage);
    maps.presence.set(20, 30);
    maps.identity.mapEpoch = 2;
    return maps;
  }

  test('nothing is here, and nothing is due', async () => {
    const maps = await full();
    maps.presence.drop(2);
    assert.deepEqual(maps.blocks(), []);
    assert.equal(maps.presence.changed, false);
    maps.presence.close();
  });

  test('no bit comes back, killed or rebooted, before the drop or after it', async () => {
    for (const dropped of [false, true]) {
      for (const end of ['killed', 'rebooted'] as const) {
        const maps = await full();
        if (dropped) maps.presence.drop(2);
        await maps[end]();
        assert.deepEqual(maps.blocks(), [], `${dropped} ${end}`);
        maps.presence.close();
      }
    }
  });

  test('killed in the middle of the drop', async () => {
    const maps = await full();
    const before = readFileSync(maps.path('presence.live'));
    before.writeUInt32BE(0, 8); // what `invalidate` does
    writeFileSync(maps.path('presence.live'), before);
    await maps.killed();
    assert.deepEqual(maps.blocks(), []);
    maps.presence.close();
  });

  test('killed before the drop, and again at any moment of the recovery: not refused', async () => {
    const maps = await full();
    const copies = [copyOf(maps.folder)];
    let over = false;
    const recovering = Presence.recover(maps.folder, maps.identity, BLOCKS).finally(() => {
      over = true;
    });
    while (!over) {
      copies.push(copyOf(maps.folder));
      await turns(1);
    }
    (await recovering).close();
    for (const copy of copies) {
      maps.folder = copy;
      await maps.killed();
      assert.deepEqual(maps.blocks(), []);
      assert.ok(!existsSync(`${maps.path('presence.live')}.next`));
    }
    maps.presence.close();
  });

  test('new bits of the new epoch stay, killed or rebooted, on pages with old copies and on others', async () => {
    for (const end of ['killed', 'rebooted'] as const) {
      const maps = await full();
      maps.presence.drop(2);
      maps.presence.set(PAGE_BITS + 5, PAGE_BITS + 6);
      await maps.presence.commit(noImage);
      maps.presence.set(7, 8);
      await maps.presence.commit(noImage);
      await maps[end]();
      assert.deepEqual(maps.blocks(), [7, PAGE_BITS + 5]);
      maps.presence.close();
    }
  });
});

test('remove leaves no file', async () => {
  const maps = await Maps.of();
  for (const name of ['presence.map.next', 'presence.live.next']) writeFileSync(join(maps.folder, name), '');
  maps.presence.remove();
  assert.deepEqual(readdirSync(maps.folder), []);
});
