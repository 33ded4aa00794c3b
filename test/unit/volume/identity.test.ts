import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { type Identity, IdentityFile, readIdentity } from '../../../src/volume/identity.js';
import { failsWith, tempFolder } from '../../support/volume.js';

function identityOf(change: Partial<Identity> = {}): Identity {
  return {
    format: 1,
    id: randomUUID(),
    name: 'vm',
    image: '/images/vm.img',
    size: 1 << 20,
    phase: 'relocating',
    generation: 3,
    mapEpoch: 2,
    sealedFor: null,
    written: true,
    source: { uri: 'nbd://host/vm', description: 'what it said' },
    takesOverAtWrite: false,
    preCopy: null,
    imageStamp: null,
    imageCreated: true,
    openBootId: randomUUID(),
    created: new Date().toISOString(),
    handoffAt: null,
    ...change,
  };
}

/** A folder that does not exist yet. */
const fresh = (): string => join(tempFolder(), 'vm');

describe('IdentityFile', () => {
  test('what is stored is read back, and only the user may read it', async () => {
    const folder = fresh();
    const identity = identityOf();
    const file = new IdentityFile(folder, identity, { stored: false });
    assert.equal(await readIdentity(folder), undefined);
    await file.update({});
    assert.deepEqual(await readIdentity(folder), identity);
    assert.equal(statSync(join(folder, 'volume.json')).mode & 0o077, 0);
    assert.equal(statSync(folder).mode & 0o077, 0);
  });

  test('a change shows only once it is durable', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf(), { stored: false });
    const change = file.update({ phase: 'standby' });
    assert.equal(file.current.phase, 'relocating');
    await change;
    assert.equal(file.current.phase, 'standby');
    assert.equal((await readIdentity(folder))?.phase, 'standby');
  });

  test('changes at the same time happen one after the other and keep one another', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf(), { stored: false });
    await Promise.all([
      file.update({ generation: 4 }),
      file.update({ phase: 'plain' }),
      file.update({ generation: 5 }),
    ]);
    const read = await readIdentity(folder);
    assert.deepEqual([read?.generation, read?.phase], [5, 'plain']);
    assert.deepEqual(read, file.current);
    assert.deepEqual(readdirSync(folder), ['volume.json']);
  });

  test('a change that cannot be stored does not show, and the next one can', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf(), { stored: false });
    await file.update({});
    mkdirSync(join(folder, 'volume.json.next'));
    await assert.rejects(file.update({ generation: 9 }));
    assert.equal(file.current.generation, 3);
    const { rmdirSync } = await import('node:fs');
    rmdirSync(join(folder, 'volume.json.next'));
    await file.update({ phase: 'plain' });
    assert.deepEqual([file.current.generation, file.current.phase], [3, 'plain']);
  });

  test('a half written successor, as a crash leaves it, is no obstacle', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf(), { stored: false });
    await file.update({});
    writeFileSync(join(folder, 'volume.json.next'), '{"format":');
    assert.equal((await readIdentity(folder))?.generation, 3);
    await file.update({ generation: 4 });
    assert.equal((await readIdentity(folder))?.generation, 4);
    assert.ok(!existsSync(join(folder, 'volume.json.next')));
  });

  test('at any moment of a replacement a reader finds the old identity or the new one', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf({ generation: 1 }), { stored: false });
    await file.update({});
    let over = false;
    const changes = (async () => {
      for (let generation = 2; generation <= 30; generation++) await file.update({ generation });
      over = true;
    })();
    for (let last = 1; !over; ) {
      const read = await readIdentity(folder);
      assert.ok(read !== undefined && read.generation >= last);
      last = read.generation;
    }
    await changes;
  });

  test('remove forgets it, and can be repeated', async () => {
    const folder = fresh();
    const file = new IdentityFile(folder, identityOf(), { stored: false });
    await file.remove();
    await file.update({});
    await file.remove();
    await file.remove();
    assert.equal(await readIdentity(folder), undefined);
  });
});

describe('readIdentity refuses', () => {
  const good = identityOf();
  const bad: [string, string | Buffer][] = [
    ['an empty file', ''],
    ['garbage', Buffer.from([0, 1, 2, 0xff, 0xfe])],
    ['half a file', JSON.stringify(good).slice(0, 100)],
    ['zeros', Buffer.alloc(500)],
    ['null', 'null'],
    ['a list', '[]'],
    ['an unknown key', JSON.stringify({ ...good, extra: 1 })],
    ['a later format', JSON.stringify({ ...good, format: 2 })],
    ['an unknown phase', JSON.stringify({ ...good, phase: 'moving' })],
    ['a generation that is no number', JSON.stringify({ ...good, generation: '3' })],
    ['a generation of 0', JSON.stringify({ ...good, generation: 0 })],
    ['a fractional size', JSON.stringify({ ...good, size: 1.5 })],
    ['a relative image', JSON.stringify({ ...good, image: 'vm.img' })],
    ['an id that is none', JSON.stringify({ ...good, id: 'vm' })],
    ['a missing key', JSON.stringify({ ...good, written: undefined })],
    ['an unknown key of the source', JSON.stringify({ ...good, source: { ...good.source, more: 1 } })],
  ];
  for (const [what, content] of bad) {
    test(what, async () => {
      const folder = tempFolder();
      writeFileSync(join(folder, 'volume.json'), content);
      await assert.rejects(readIdentity(folder), failsWith('state-damaged', /volume\.json .*restore/));
      assert.deepEqual(
        readFileSync(join(folder, 'volume.json')),
        Buffer.from(content),
        'it is left as it is',
      );
    });
  }

  test('a file that cannot be read', async () => {
    const folder = tempFolder();
    mkdirSync(join(folder, 'volume.json'));
    await assert.rejects(readIdentity(folder), failsWith('state-damaged'));
    chmodSync(join(folder, 'volume.json'), 0o700);
  });
});
