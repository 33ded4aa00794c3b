/** Real machines move with their disks between two real daemons, by the commands and with failures at the worst moments. */

import assert from 'node:assert/strict';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { BlockferryError } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { runBlockferry } from '../lab/hosts.js';
import { TwoHosts } from '../lab/two-hosts.js';
import { labMissing, type WorkloadOptions } from '../lab/vm.js';

const SLOTS = 8192;
const skip = (await labMissing()) ?? false;

let guest: Guest;
before(async () => {
  if (!skip) guest = await buildGuest();
});

const RAW: WorkloadOptions = { mode: 'raw', slots: SLOTS, rate: 400, dirty: 16 };

for (const workload of [RAW, { ...RAW, mode: 'ext4', files: 3 }] satisfies WorkloadOptions[]) {
  test(`blockferry migrate moves a working machine with its disk (${workload.mode})`, { skip }, async (t) => {
    const lab = await TwoHosts.open(t, guest, workload);
    const result = await lab.migrate();
    assert.equal(result.outcome, 'moved');
    assert.ok(result.demandBytes + result.backgroundBytes > 0);
    assert.ok(result.downtimeMs !== null && result.handoffMs !== null);
    await lab.monitor.progress('b', { count: 30, records: 30 });

    const there = await lab.b.client.volume('disk');
    assert.equal(there.phase, 'plain');
    assert.ok(
      there.phase === 'plain' &&
        there.source === null &&
        there.presentBytes === there.size &&
        there.handoffAt !== null,
    );
    const here = await lab.a.client.volume('disk');
    assert.ok(here.phase === 'retired' || here.phase === 'unavailable', here.phase);
    assert.equal(await lab.a.stop(), 0, 'the source daemon can be stopped');
    await lab.monitor.progress('b', { count: 30, records: 30 });
    await lab.verify(lab.b);
    t.diagnostic(`longest heartbeat gap ${lab.monitor.longestGapMs().toFixed(0)} ms`);
  });
}

test('a move that fails in pre-switchover leaves the machine at the source, and the next one succeeds', {
  skip,
}, async (t) => {
  const lab = await TwoHosts.open(t, guest, RAW);
  const refused = await lab.migrateWith((from) => {
    from.seal = () => Promise.reject(new BlockferryError('image-io', 'the seal fails'));
  });
  await lab.expectBackAtA(refused);
  assert.equal((await lab.migrate()).outcome, 'moved');
  await lab.monitor.progress('b', { count: 30, records: 30 });
  await lab.verify(lab.b);
});

test('sealed for a takeover that fails: the source refuses writes, and is unsealed only with proof', {
  skip,
}, async (t) => {
  const lab = await TwoHosts.open(t, guest, RAW);
  let refusal: unknown;
  const result = await lab.migrateWith((_from, to) => {
    to.takeover = async () => {
      const socket = join(lab.a.folder, 'run', 'nbd', 'disk.sock');
      const client = await NbdClient.connect(`nbd+unix:///?socket=${socket}`);
      refusal = await client.write(0, Buffer.alloc(4096), 0, 4096).catch((error: unknown) => error);
      await client.close();
      throw new BlockferryError('image-io', 'the takeover fails');
    };
  });
  assert.ok(refusal instanceof BlockferryError, 'the sealed source took a write');
  await lab.expectBackAtA(result);
  await lab.verify(lab.a);
});

test('a takeover is taken back while the guest has not run at the destination', { skip }, async (t) => {
  const lab = await TwoHosts.open(t, guest, RAW);
  const result = await lab.migrateWith((from) => {
    from.migrateContinue = () => Promise.reject(new BlockferryError('hypervisor', 'it does not go on'));
  });
  await lab.expectBackAtA(result);
  assert.equal((await lab.migrate()).outcome, 'moved');
  await lab.monitor.progress('b', { count: 30, records: 30 });
  await lab.verify(lab.b);
});

test('a destination daemon that dies while the memory is on its way: the machine works on, and all is undone later', {
  skip,
}, async (t) => {
  const lab = await TwoHosts.open(t, guest, RAW);
  const killed = lab.migrateWith((from) => {
    const wait = from.waitMigration.bind(from);
    from.waitMigration = async (...words) => {
      lab.b.daemon.kill();
      await lab.b.daemon.exited;
      return wait(...words);
    };
  });
  await assert.rejects(killed, { code: 'migration' });
  await lab.monitor.progress('a', { count: 30, records: 30 });
  assert.equal((await lab.a.client.volume('disk')).phase, 'plain');

  await lab.start('b');
  const { code, stderr } = await runBlockferry(['migrate', 'vm1', '--abort', '--state-dir', lab.folder]);
  assert.equal(code, 0, stderr);
  const status = await lab.b.client.status();
  assert.deepEqual([status.volumes, status.vms], [[], []]);
  await lab.verify(lab.a);
});
