/** Moves between daemons with real volumes, and what restarts and failures of one of them do to the other. */

import assert from 'node:assert/strict';
import { once } from 'node:events';
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:net';
import { join } from 'node:path';
import { test } from 'node:test';
import { holdLocally, type LocalVolume, type OpenVolume } from '../../../src/host/held-volume.js';
import { listenWith } from '../../../src/host/listen.js';
import { openVolumeService } from '../../../src/host/open.js';
import type { DaemonParts } from '../../../src/host/parts.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { startSession } from '../../../src/nbd/server/session.js';
import type { Volume } from '../../../src/volume/volume.js';
import { pattern, quiet, until } from '../../lab/ferry.js';
import { type RealHost, RealHosts, SIZE, VM } from '../../support/real-hosts.js';
import { FakeParts } from './fakes.js';

test('a source that was a destination before, restarted while it is sealed, is still known to its link', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b');
  assert.equal((await hosts.move(a.client, b.client)).outcome, 'moved');

  const disk = await b.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  await a.client.createVolume({ name: 'disk', size: SIZE, volumeId, generation, sourceUri });
  await b.client.seal('disk', generation + 1);
  const again = await b.restart();
  await a.client.takeover('disk', generation + 1);
  const guest = await NbdClient.connect(`nbd+unix:///disk?socket=${hosts.guestSocket('a')}`);
  t.after(() => guest.destroy());
  const bytes = Buffer.alloc(SIZE);
  const timeout = AbortSignal.timeout(5000);
  await Promise.race([
    guest.read(0, SIZE, bytes),
    new Promise((_, reject) => timeout.addEventListener('abort', () => reject(new Error('no data')))),
  ]);
  assert.ok(bytes.equals(Buffer.alloc(SIZE, 'a')));
  await again.daemon.stop(AbortSignal.abort());
});

test('the proof of a cancelled volume does not count for the same volume that comes again', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const request = { name: 'disk', size: SIZE, volumeId, generation, sourceUri };
  let opened: () => void = () => undefined;
  let hold: Promise<void> | null = null;
  const others = Array.from({ length: 8 }, (_, index) => join(hosts.folder, `other${index}`));
  for (const image of others) writeFileSync(image, Buffer.alloc(4096));
  const b = await hosts.start(
    'b',
    {
      volumes: others.map((image, index) => ({
        name: `other${index}`,
        image,
        mode: { kind: 'serve', readOnly: false },
      })),
    },
    {
      ...onThisThread(async (options) => {
        if (options.name !== 'disk') await hold;
        return openVolumeService(options);
      }),
    },
  );
  await b.client.createVolume(request);
  const early = await b.client.cancelVolume('disk', volumeId); // a move that was given up before the seal
  assert.equal(early.generation, generation + 1);

  await b.client.createVolume(request);
  await a.client.seal('disk', generation + 1);
  await b.client.takeover('disk', generation + 1);
  hold = new Promise((resolve) => {
    opened = resolve;
  });
  const restarting = b.restart(); // control socket first, then the volumes
  t.after(() => opened());
  const answer = await untilAnswered(() => b.client.cancelVolume('disk', volumeId));
  assert.ok(answer instanceof Error, `proof ${JSON.stringify(answer)} although generation 2 took over`);
  await assert.rejects(b.client.volume('disk'), { code: 'control' });
  await assert.rejects(b.client.machine('vm1'), { code: 'control' });
  opened();
  const again = await restarting;
  await assert.rejects(again.client.cancelVolume('disk', volumeId), { code: 'phase' });
});

test('a destination that dies while it cancels a volume gives its proof afterwards', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const b = await hosts.start('b');
  await b.client.createVolume({ name: 'disk', size: SIZE, volumeId, generation, sourceUri });
  await a.client.seal('disk', generation + 1);
  // The volume goes, and the daemon with it: as after a kill between the two.
  const service = b.daemon.volumes.service('disk');
  const cancel = service.cancel.bind(service);
  service.cancel = async () => {
    await cancel();
    throw new Error('killed');
  };
  await assert.rejects(b.client.cancelVolume('disk', volumeId));
  const again = await b.restart();
  await a.client.unseal('disk', await again.client.cancelVolume('disk', volumeId));
});

test('a volume whose cancelling was begun takes over no more, and is cancelled after all', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  const b = await hosts.start('b');
  await b.client.createVolume({ name: 'disk', size: SIZE, volumeId, generation, sourceUri });
  const service = b.daemon.volumes.service('disk');
  service.cancel = async () => {
    await service.close();
    throw new Error('killed');
  };
  await assert.rejects(b.client.cancelVolume('disk', volumeId));
  const again = await b.restart();
  await assert.rejects(again.client.takeover('disk', generation + 1), { code: 'generation' });
  assert.equal((await again.client.cancelVolume('disk', volumeId)).generation, generation + 1);
  await assert.rejects(again.client.volume('disk'), { code: 'not-found' });
});

test('while a seal is under way nobody is told that the volume is plain, and the guest is not let run on it', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a', onThisThread(openVolumeService));
  await a.client.claim('vm1', 'move');
  const held = a.daemon.volumes.service('disk') as LocalVolume;
  const { store } = (held.service as unknown as { volume: Volume }).volume;
  const { image } = store;
  let synced: () => void = () => undefined;
  const slow = new Promise<void>((resolve) => {
    synced = resolve;
  });
  t.after(() => synced());
  const sync = image.sync.bind(image);
  image.sync = () => slow.then(sync);
  const sealed = a.client.seal('disk', 2); // by a coordinator that is killed now
  await until(() => store.gate.kind === 'refused', 'the seal begins');
  const looked = a.client.volume('disk').then((view) => view.phase);
  const revived = a.client.revive('vm1', 'move').then(
    () => 'revived',
    (error: Error) => error.message,
  );
  await quiet(); // time enough for both, if they did not wait
  synced();
  assert.equal(await looked, 'sealed');
  assert.match(await revived, /"disk" is sealed/);
  await sealed;
});

test('a destination that dies between the first write of the guest and the note of it knows that it runs', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b');
  const { journal, disk } = await switched(hosts, a, b);
  await b.daemon.volumes.service('disk').settle(); // the guest wrote
  const again = await b.restart();
  assert.equal((await again.client.machine('vm1')).ran, true);
  const result = await hosts.go(journal, a.client, again.client, 'back').catch((error: Error) => error);
  assert.match(String(result), /cannot be aborted: the machine runs at the destination already/);
  journal.close();
  assert.equal(disk.generation, 1);
});

test('a machine whose arrival is not certain is not started afresh at the destination', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b');
  const { journal } = await switched(hosts, a, b);
  const again = await b.restart();
  assert.equal((await again.client.volume('disk')).phase, 'relocating');
  await assert.rejects(again.client.startMachine('vm1'), { code: 'phase', message: /--resume .* --abort/ });
  const result = await hosts.go(journal, a.client, again.client, 'back');
  assert.equal(result.outcome, 'aborted');
  assert.equal((await a.client.machine('vm1')).state, 'running');
  assert.equal((await a.client.volume('disk')).phase, 'plain');
  journal.close();
});

test('two machines never get one volume: not when both are started at once, nor beside one that outlived its daemon', async (t) => {
  const hosts = new RealHosts(t);
  const twin = { ...VM, name: 'vm2' };
  const host = await hosts.start('a', {
    volumes: [{ name: 'disk', image: hosts.image, mode: { kind: 'serve', readOnly: false } }],
    vms: [VM, twin].map((definition) => ({ definition, autostart: false })),
  });
  const starts = await Promise.allSettled([host.client.startMachine('vm1'), host.client.startMachine('vm2')]);
  assert.equal(starts.filter(({ status }) => status === 'fulfilled').length, 1);
  const running = starts[0].status === 'fulfilled' ? 'vm1' : 'vm2';
  await host.client.stopMachine(running, { mode: 'quit' });

  const folder = join(hosts.folder, 'a', 'vms', 'vm1-abcdef');
  mkdirSync(folder, { recursive: true });
  const qmp = createServer((socket) => socket.destroy()).listen(join(folder, 'qmp.sock'));
  t.after(() => qmp.close());
  await once(qmp, 'listening');
  assert.equal((await host.client.machine('vm1')).state, 'unmanaged');
  await assert.rejects(host.client.startMachine('vm2'), {
    code: 'exists',
    message: /in use by machine "vm1"/,
  });
});

test('while a machine’s process starts, nobody else comes to its control socket', async (t) => {
  const hosts = new RealHosts(t);
  const { hypervisor } = new FakeParts(hosts.network);
  const folder = join(hosts.folder, 'a', 'vms', 'vm1-abcdef');
  let visitors = 0;
  let states: Promise<string[]> | null = null;
  const host = await hosts.start(
    'a',
    {
      volumes: [{ name: 'disk', image: hosts.image, mode: { kind: 'serve', readOnly: false } }],
      vms: [{ definition: VM, autostart: false }],
    },
    {
      hypervisor: {
        kind: hypervisor.kind,
        version: (definition) => hypervisor.version(definition),
        start: async (definition, options) => {
          mkdirSync(folder, { recursive: true });
          const qmp = createServer((socket) => {
            visitors++;
            socket.destroy();
          }).listen(join(folder, 'qmp.sock'));
          t.after(() => qmp.close());
          await once(qmp, 'listening');
          const views = [host.client.machine('vm1'), host.client.machine('vm1')];
          states = Promise.all(views).then((all) => all.map(({ state }) => state));
          await states;
          return hypervisor.start(definition, options);
        },
      },
    },
  );
  assert.equal((await host.client.startMachine('vm1')).state, 'running');
  assert.deepEqual(await states, ['stopped', 'stopped']);
  assert.equal(visitors, 0);
});

test('a source whose daemon ends before the seal: the move is undone, nothing is left at the destination', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b');
  const journal = await hosts.plan(a.client, b.client);
  const [{ name, size, volumeId, generation, sourceUri }] = journal.plan.volumes;
  await a.client.claim('vm1', journal.plan.id);
  await b.client.createVolume({ name, size, volumeId, generation, sourceUri });
  await b.client.incoming('vm1', journal.plan.id, VM);
  const again = await a.restart();
  const result = await hosts.go(journal, again.client, b.client, 'back');
  assert.equal(result.outcome, 'aborted');
  assert.deepEqual((await b.client.status()).volumes, []);
  assert.deepEqual((await b.client.status()).vms, []);
  journal.close();
});

test('a source whose process ended by itself has still departed, so that the machine can come back', async (t) => {
  const hosts = new RealHosts(t);
  const a = await hosts.withMachine('a');
  const b = await hosts.start('b');
  const { journal } = await switched(hosts, a, b);
  await a.client.migrateContinue('vm1', journal.plan.id);
  assert.equal((await b.client.waitRunning('vm1', 5000)).running, true);
  a.machines[0].end(0);
  await a.machines[0].exited;
  assert.equal((await hosts.go(journal, a.client, b.client)).outcome, 'moved');
  journal.close();
  assert.equal((await a.client.machine('vm1')).state, 'departed');
  const back = await hosts.move(b.client, a.client);
  assert.equal(back.outcome, 'moved', back.why ?? '');
});

/** Volumes where the test can reach into them. */
function onThisThread(openVolume: OpenVolume): Partial<DaemonParts> {
  const listen = listenWith(startSession);
  return { hold: holdLocally(openVolume, listen), listen };
}

/** A move up to the takeover, by a coordinator that was killed then. */
async function switched(hosts: RealHosts, a: RealHost, b: RealHost) {
  const journal = await hosts.plan(a.client, b.client);
  const [disk] = journal.plan.volumes;
  const { name, size, volumeId, generation, nextGeneration, sourceUri } = disk;
  const { id } = journal.plan;
  await a.client.claim('vm1', id);
  await b.client.createVolume({ name, size, volumeId, generation, sourceUri });
  const { uri } = await b.client.incoming('vm1', id, VM);
  await a.client.migrate('vm1', id, uri, null);
  await a.client.waitMigration('vm1', ['pre-switchover'], 5000);
  await a.client.seal(name, nextGeneration);
  await b.client.takeover(name, nextGeneration);
  return { journal, disk };
}

/** Asks until somebody listens; an answer that refuses is an answer. */
async function untilAnswered<Answer>(ask: () => Promise<Answer>): Promise<Answer | Error> {
  for (;;) {
    try {
      return await ask();
    } catch (error) {
      const text = (error as Error).message;
      if (!/cannot be reached/.test(text)) return error as Error;
    }
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

test('a volume that arrives takes what a seed of its host has from there', async (t) => {
  const hosts = new RealHosts(t);
  const content = pattern(SIZE);
  writeFileSync(hosts.image, content);
  const a = await hosts.withMachine('a');
  const seed = join(hosts.folder, 'template.img');
  writeFileSync(seed, content.subarray(0, SIZE / 2));
  const b = await hosts.start('b', { seeds: [join(hosts.folder, 'is-not-there.img'), seed] });
  const indexes = join(b.stateDir, '.seeds');
  await until(() => existsSync(indexes) && readdirSync(indexes).length === 1, 'the host indexes its seeds');
  const disk = await a.client.volume('disk');
  assert.ok(disk.phase === 'plain' && disk.linkUri !== null);
  const { id: volumeId, generation, linkUri: sourceUri } = disk;
  // Nothing but a first piece comes over the link before there are hashes.
  const rateBytesPerSecond = SIZE / 2;
  await b.client.createVolume({
    name: 'disk',
    size: SIZE,
    volumeId,
    generation,
    sourceUri,
    rateBytesPerSecond,
  });
  await a.client.seal('disk', generation + 1);
  await b.client.takeover('disk', generation + 1);
  const guest = await NbdClient.connect(`nbd+unix:///disk?socket=${hosts.guestSocket('b')}`);
  t.after(() => guest.destroy());
  await guest.write(0, content.subarray(0, 4096)); // the machine runs there
  const { done, volume: after } = await b.client.waitHandoff('disk', 20_000);
  assert.ok(done && after.phase === 'plain');
  const { seedBytes, fromSourceBytes, wireBytes } = after.traffic;
  assert.ok(seedBytes >= SIZE / 4, `${seedBytes} bytes from the seed`);
  assert.ok(seedBytes + fromSourceBytes >= SIZE - 4096, `${fromSourceBytes} bytes from the source`);
  assert.ok(wireBytes >= fromSourceBytes + (SIZE / 4096) * 24, 'hashes cross the wire, too');
  assert.deepEqual(readFileSync(after.image), content);
});
