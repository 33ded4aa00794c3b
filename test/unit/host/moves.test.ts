/** Moves between daemons with real volumes, and what restarts and failures of one of them do to the other. */

import assert from 'node:assert/strict';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { openVolumeService } from '../../../src/host/open.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { RealHosts, SIZE } from '../../support/real-hosts.js';

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
      openVolume: async (options) => {
        if (options.name !== 'disk') await hold;
        return openVolumeService(options);
      },
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
