/** Data threads that die: their volumes are opened again as after a kill, by the same daemon; the others notice nothing. */

import assert from 'node:assert/strict';
import { readdirSync, readlinkSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import type { DaemonParts } from '../../../src/host/parts.js';
import { runDaemon } from '../../../src/host/run.js';
import type { RemoteVolume } from '../../../src/host/threads/remote-volume.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { readAt, writeAt } from '../../lab/ferry.js';
import { type RealHost, RealHosts, SIZE } from '../../support/real-hosts.js';
import { fail, faultyParts } from '../../support/threaded-hosts.js';
import { failsWith, until } from '../../support/volume.js';
import { FakeParts, silent } from './fakes.js';

const BLOCK = 4096;
const SERVE = { kind: 'serve', readOnly: false } as const;

/** Descriptors of this process that lead to a path. */
function descriptorsOf(path: string): number {
  const links = readdirSync('/proc/self/fd').map((fd) => {
    try {
      return readlinkSync(join('/proc/self/fd', fd));
    } catch {
      return ''; // the one that reads the folder
    }
  });
  return links.filter((link) => link === path).length;
}

interface Pair {
  hosts: RealHosts;
  host: RealHost;
  parts: ReturnType<typeof faultyParts>;
  images: [string, string];
  guest(volume: string): Promise<NbdClient>;
}

/** A host with the volumes `one` and `two` on a thread each. */
async function pair(t: TestContext): Promise<Pair> {
  const hosts = new RealHosts(t);
  const images = ['one', 'two'].map((name) => join(hosts.folder, `${name}.img`)) as [string, string];
  for (const image of images) writeFileSync(image, Buffer.alloc(SIZE, 'a'));
  const parts = faultyParts();
  const volumes = [
    { name: 'one', image: images[0], mode: SERVE },
    { name: 'two', image: images[1], mode: SERVE },
  ];
  const host = await hosts.start('h', { volumes }, parts);
  const guest = (volume: string) =>
    NbdClient.connect(`nbd+unix:///${volume}?socket=${hosts.guestSocket('h', volume)}`);
  return { hosts, host, parts, images, guest };
}

function threadOf(host: RealHost, volume: string): string {
  return (host.daemon.volumes.service(volume) as RemoteVolume).thread.name;
}

/** The volume is open again, on another thread than `before`. */
async function reopened(host: RealHost, volume: string, before: string): Promise<void> {
  await until(() => {
    try {
      return threadOf(host, volume) !== before;
    } catch {
      return false; // unavailable
    }
  }, `${volume} on another thread`);
}

for (const how of ['throw', 'exit', 'memory'] as const) {
  test(`a thread that dies (${how}) is replaced, and its volume served again by one owner`, async (t) => {
    const { host, images, guest } = await pair(t);
    const [dying, other] = await Promise.all([guest('one'), guest('two')]);
    const before = threadOf(host, 'one');
    assert.notEqual(threadOf(host, 'two'), before);
    const written = Buffer.alloc(BLOCK, 'w');
    await writeAt(dying, 0, written);
    const asked = host.client.setRate('one', 1).catch((error: unknown) => error); // whatever it is told: not nothing

    fail({ image: images[0], how });
    assert.notEqual(await dying.closed, null);
    await reopened(host, 'one', before);
    await asked;
    assert.equal(descriptorsOf(images[0]), 1);

    const again = await guest('one');
    assert.ok((await readAt(again, 0, BLOCK)).equals(written), 'what was answered is there');
    await writeAt(again, BLOCK, written);
    assert.ok((await readAt(other, 0, BLOCK)).equals(Buffer.alloc(BLOCK, 'a')));
    const { volumes } = await host.client.status();
    assert.deepEqual(
      volumes.map(({ name, phase }) => [name, phase]),
      [
        ['one', 'plain'],
        ['two', 'plain'],
      ],
    );
    await Promise.all([again.close(), other.close()]);
  });
}

test('what a volume tracks goes on over the death of its thread', async (t) => {
  const { host, images, guest } = await pair(t);
  const { cookie } = await host.client.track('one', 'move', null);
  const dying = await guest('one');
  await writeAt(dying, 0, Buffer.alloc(BLOCK, 'w'));
  const before = threadOf(host, 'one');
  fail({ image: images[0], how: 'throw' });
  assert.notEqual(await dying.closed, null);
  await reopened(host, 'one', before);
  const again = await guest('one');
  await writeAt(again, 3 * BLOCK, Buffer.alloc(BLOCK, 'w'));
  assert.deepEqual(await host.client.track('one', 'move', null), { cookie, home: false });
  assert.equal((await host.client.cut('one', 'move', cookie)).changedBytes, 2 * BLOCK);
  await again.close();
});

test('what is asked of a thread that dies is answered with ‘control’: nobody knows whether it was done', async (t) => {
  const { host, images } = await pair(t);
  const held = host.daemon.volumes.service('one');
  fail({ image: images[0], how: 'exit' });
  await assert.rejects(
    async () => {
      for (;;) await held.look();
    },
    failsWith('control', /data thread .* died/),
  );
  await assert.rejects(held.seal(2), failsWith('control'));
  const view = await host.client.volume('one'); // waits for the reopening
  assert.equal(view.phase, 'plain');
});

test('a machine that arrives goes on with its disk, and the source’s link comes back', async (t) => {
  const hosts = new RealHosts(t);
  const parts = { a: faultyParts(), b: faultyParts() };
  const a = await hosts.withMachine('a', parts.a);
  const b = await hosts.start('b', {}, parts.b);
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const slow = { rateBytesPerSecond: 4096 };
  await b.client.createVolume({ name: 'disk', size: SIZE, volumeId, generation, sourceUri, ...slow });
  await a.client.seal('disk', generation + 1);
  await b.client.takeover('disk', generation + 1);
  const socket = `nbd+unix:///disk?socket=${hosts.guestSocket('b')}`;
  const first = await NbdClient.connect(socket);
  await writeAt(first, BLOCK, Buffer.alloc(BLOCK, 'w'));

  const arrived = await b.client.volume('disk');
  assert.ok(arrived.phase === 'relocating');
  const before = [threadOf(a, 'disk'), threadOf(b, 'disk')] as const;
  const handoff = b.client.waitHandoff('disk', 20_000);
  fail({ image: arrived.image, how: 'throw' });
  assert.notEqual(await first.closed, null);
  await reopened(b, 'disk', before[1]);
  fail({ image: disk.image, how: 'throw' });
  await reopened(a, 'disk', before[0]);

  const guest = await NbdClient.connect(socket);
  const all = await readAt(guest, 0, SIZE);
  const expected = Buffer.alloc(SIZE, 'a');
  expected.fill('w', BLOCK, 2 * BLOCK);
  assert.ok(all.equals(expected));
  await guest.close();
  assert.equal((await handoff).done, true, 'who waited for the hand-off hears of it');
  assert.equal((await b.client.volume('disk')).phase, 'plain');
});

test('what was answered is there, however often the thread dies in the midst of it', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b', {}, faultyParts());
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const slow = { rateBytesPerSecond: 4096 };
  await b.client.createVolume({ name: 'disk', size: SIZE, volumeId, generation, sourceUri, ...slow });
  await a.client.seal('disk', generation + 1);
  await b.client.takeover('disk', generation + 1);
  const { image } = b.daemon.volumes.service('disk');

  const blocks = SIZE / BLOCK;
  /** By block: what was answered, and what may be there instead. */
  const sure = new Uint8Array(blocks).fill('a'.charCodeAt(0));
  const maybe = Array.from({ length: blocks }, () => new Set<number>());
  let version = 0;
  for (let death = 0; death < 3; death++) {
    const before = threadOf(b, 'disk');
    const guest = await NbdClient.connect(`nbd+unix:///disk?socket=${hosts.guestSocket('b')}`);
    /** Writes blocks of its own, and parts of them, until the guest's connection is lost. */
    const write = async (lane: number): Promise<void> => {
      for (let block = lane; ; block = (block + 16) % blocks) {
        version = (version + 1) % 256;
        const value = version;
        maybe[block]!.add(value);
        await guest.write(block * BLOCK, Buffer.alloc(BLOCK, value), 0, BLOCK, { fua: value % 4 === 0 });
        maybe[block]!.clear();
        sure[block] = value;
      }
    };
    const flush = async (): Promise<void> => {
      for (;;) await guest.flush();
    };
    const lanes = [...Array.from({ length: 16 }, (_, lane) => write(lane)), flush()];
    const ended = Promise.allSettled(lanes);
    const from = version;
    await until(() => (version - from + 256) % 256 > 60, 'some writes');
    fail({ image, how: death % 2 === 0 ? 'throw' : 'exit' });
    await ended;
    await reopened(b, 'disk', before);
    const again = await NbdClient.connect(`nbd+unix:///disk?socket=${hosts.guestSocket('b')}`);
    const content = await readAt(again, 0, SIZE);
    for (let block = 0; block < blocks; block++) {
      const value = content[block * BLOCK]!;
      const right = value === sure[block] || maybe[block]!.has(value);
      assert.ok(right, `block ${block} is ${value}, was answered ${sure[block]} (death ${death})`);
      // A write that was under way when the thread died is there, or is not; from now on that is settled.
      sure[block] = value;
      maybe[block]!.clear();
    }
    await again.close();
  }
});

test('a volume whose thread dies while the daemon stops was not closed in order, and that is said', async (t) => {
  const { host, images } = await pair(t);
  const both = ['one', 'two'].map((name) => host.daemon.volumes.service(name));
  let first = true;
  for (const [index, held] of both.entries()) {
    const other = both[1 - index]!;
    const close = held.close.bind(held);
    held.close = async () => {
      if (first) {
        first = false;
        fail({ image: other.image, how: 'exit' });
        await assert.rejects(async () => {
          for (;;) await other.look();
        }, failsWith('control'));
      }
      await close();
    };
  }
  await assert.rejects(host.daemon.stop(AbortSignal.abort()), failsWith('control'));
  assert.equal(descriptorsOf(images[0]) + descriptorsOf(images[1]), 0);
});

test('a cancel whose answer was lost with its thread is known to have been one', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b', {}, faultyParts());
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const request = { name: 'disk', size: SIZE, volumeId, generation, sourceUri };
  await b.client.createVolume(request);
  const { image } = b.daemon.volumes.service('disk');
  fail({ image, how: 'at-cancel' });
  // The word may be later than the request: then it is cancelled in order, and comes again.
  let failure: unknown = null;
  while (failure === null) {
    failure = await b.client.cancelVolume('disk', volumeId).then(
      () => null,
      (error: unknown) => error,
    );
    if (failure === null) await b.client.createVolume(request);
  }
  assert.ok(failsWith('control')(failure));
  await assert.rejects(b.client.volume('disk'), { code: 'not-found' });
  assert.equal((await b.client.cancelVolume('disk', volumeId)).generation, generation + 1);
  assert.deepEqual((await b.client.status()).volumes, []);
  await b.client.createVolume(request);
});

test('threads that die again and again end the daemon', async (t) => {
  const { host, images } = await pair(t);
  let failure: unknown = null;
  host.daemon.failed.catch((error: unknown) => {
    failure = error;
  });
  for (let deaths = 1; failure === null; deaths++) {
    assert.ok(deaths <= 4);
    const before = threadOf(host, 'one');
    fail({ image: images[0], how: 'exit' });
    if (deaths < 4) await reopened(host, 'one', before);
    else await until(() => failure !== null, 'the failure');
  }
  assert.ok(failsWith('closed', /4 data threads died/)(failure));
  const view = await host.client.volume('one');
  assert.equal(view.phase, 'unavailable');
  assert.equal((await host.client.volume('two')).phase, 'plain');
});

test('a daemon whose threads die again and again ends in order, with the reason', async (t) => {
  const hosts = new RealHosts(t);
  const home = join(hosts.folder, 'h');
  const socket = join(home, 'one.sock');
  const parts: DaemonParts = {
    ...faultyParts(1),
    hypervisor: new FakeParts(hosts.network).hypervisor,
  };
  let ready: () => void = () => undefined;
  const started = new Promise<void>((resolve) => {
    ready = resolve;
  });
  const ended = runDaemon(
    {
      kind: 'host',
      name: 'h',
      stateDir: join(home, 'state'),
      control: join(home, 'c.sock'),
      link: null,
      images: null,
      folders: [home],
      machinesDir: join(home, 'vms'),
      guestAddresses: () => [`unix:${socket}`],
      diskSocket: () => socket,
      migrationAddress: '::1',
      stopTimeoutMs: 0,
      volumes: [{ name: 'one', image: hosts.image, mode: SERVE }],
      vms: [],
      toleratesBadVolumes: true,
      parts,
      log: silent,
    },
    ready,
  ).catch((error: unknown) => error);
  await started;
  for (let deaths = 0; deaths < 4; deaths++) {
    let guest: NbdClient | null = null;
    while (guest === null) guest = await NbdClient.connect(`nbd+unix:///?socket=${socket}`).catch(() => null);
    fail({ image: hosts.image, how: 'exit' });
    await guest.closed;
  }
  assert.ok(failsWith('closed', /4 data threads died/)(await ended));
  assert.equal(descriptorsOf(hosts.image), 0);
});

test('a volume that kills its thread as it is opened does not take the daemon with it', async (t) => {
  const hosts = new RealHosts(t);
  const names = ['one', 'poison', 'two'];
  const volumes = names.map((name) => ({
    name,
    image: join(hosts.folder, `${name}.img`),
    mode: SERVE,
  }));
  for (const { image } of volumes) writeFileSync(image, Buffer.alloc(SIZE, 'a'));
  const host = await hosts.start('h', { volumes }, faultyParts());
  await until(() => threadOf(host, 'one') !== '' && threadOf(host, 'two') !== '', 'the good ones');
  const views = (await host.client.status()).volumes;
  assert.deepEqual(
    views.map(({ name, phase }) => [name, phase]),
    [
      ['one', 'plain'],
      ['poison', 'unavailable'],
      ['two', 'plain'],
    ],
  );
});
