/** Moves between daemons with real volumes, and what restarts and failures of one of them do to the other. */

import assert from 'node:assert/strict';
import { test } from 'node:test';
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
