import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { ControlClient } from '../../../src/host/control/client.js';
import { Daemon, type DaemonOptions } from '../../../src/host/daemon.js';
import type { MachineDefinition } from '../../../src/hypervisor/driver.js';
import { runMove } from '../../../src/migration/coordinator.js';
import { Journal } from '../../../src/migration/journal.js';
import { makePlan } from '../../../src/migration/plan.js';
import type { MoveResult } from '../../../src/migration/result.js';
import { FakeNetwork, FakeParts, silent } from './fakes.js';

const NEVER = new AbortController().signal;
const TIMING = { pollMs: 50, runningTimeoutMs: 300, patienceMs: 300, retryDelayMs: 5 };
const VM: MachineDefinition = {
  name: 'vm1',
  binary: 'qemu',
  args: [],
  disks: [{ volume: 'disk', node: 'disk0' }],
  serial: false,
};

let folder: string;
let network: FakeNetwork;
const running: Daemon[] = [];
const clients: ControlClient[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-daemon-'));
  network = new FakeNetwork();
});
afterEach(async () => {
  for (const client of clients.splice(0)) client.close();
  for (const daemon of running.splice(0)) await daemon.stop(AbortSignal.abort());
  rmSync(folder, { recursive: true, force: true });
});

function options(name: string, change: Partial<DaemonOptions> = {}): DaemonOptions {
  const stateDir = join(folder, name);
  return {
    kind: 'host',
    name,
    stateDir,
    control: join(stateDir, 'control', `${name}.sock`),
    link: '127.0.0.1:0',
    images: join(stateDir, 'images'),
    folders: [],
    machinesDir: join(stateDir, 'run'),
    guestAddresses: (volume) => [`unix:/run/${volume}`],
    diskSocket: (volume) => `/run/${volume}`,
    migrationAddress: '::1',
    stopTimeoutMs: 0,
    volumes: [],
    vms: [],
    toleratesBadVolumes: true,
    parts: new FakeParts(network),
    log: silent,
    ...change,
  };
}

const DISK = { name: 'disk', image: '/disk.img', mode: { kind: 'serve', readOnly: false } } as const;

async function start(
  name: string,
  change: Partial<DaemonOptions> = {},
): Promise<{ daemon: Daemon; client: ControlClient; parts: FakeParts }> {
  const all = options(name, change);
  const daemon = await Daemon.start(all);
  running.push(daemon);
  const client = new ControlClient(all.control);
  clients.push(client);
  return { daemon, client, parts: all.parts as FakeParts };
}

async function move(from: ControlClient, to: ControlClient): Promise<MoveResult> {
  const request = {
    vm: 'vm1',
    switch: 'now',
    bandwidthBytesPerSecond: 1 << 20,
    deleteSourceImages: false,
  } as const;
  const journal = Journal.create(join(folder, 'migrations'), await makePlan(from, to, request));
  try {
    return await runMove({ from, to, journal, direction: 'forward', timing: TIMING });
  } finally {
    journal.close();
  }
}

describe('daemon', () => {
  test('serves the good volumes and shows what is wrong with the others', async () => {
    const bad = { ...DISK, name: 'bad', image: '/missing.img' };
    const locked = { ...DISK, name: 'locked', image: '/locked.img' };
    const { client } = await start('a', { volumes: [bad, DISK, locked] });
    const { volumes, daemon } = await client.status();
    assert.deepEqual(
      volumes.map((volume) => [volume.name, volume.phase]),
      [
        ['bad', 'unavailable'],
        ['disk', 'plain'],
        ['locked', 'unavailable'],
      ],
    );
    const disk = await client.volume('disk');
    assert.ok(disk.phase !== 'unavailable');
    assert.deepEqual(disk.uri, ['nbd://unix:/run/disk/disk']);
    assert.equal(disk.linkUri, 'nbd://127.0.0.1:0/disk');
    assert.equal(disk.clients, 2);
    assert.ok((daemon.images?.freeBytes ?? 0) > 0);
    await assert.rejects(client.seal('bad', 2), { code: 'closed', message: /missing\.img is not there/ });
    await assert.rejects(client.seal('nothing', 2), { code: 'not-found' });
  });

  test('of one volume does not start without it', async () => {
    const bad = { ...DISK, image: '/missing.img' };
    await assert.rejects(Daemon.start(options('a', { volumes: [bad], toleratesBadVolumes: false })), {
      code: 'image-missing',
    });
    assert.equal(existsSync(join(folder, 'a', 'control', 'a.sock')), false);
    const { client } = await start('a', { volumes: [DISK], toleratesBadVolumes: false, images: null });
    const arriving = { name: 'x', size: 4096, volumeId: 'x', generation: 1, sourceUri: 'nbd://y' };
    await assert.rejects(client.createVolume(arriving), { code: 'usage' });
  });

  test('is refused where one of its name runs', async () => {
    await start('a');
    await assert.rejects(Daemon.start(options('a')), { code: 'address' });
  });

  test('does not start on a damaged record, and says which', async () => {
    const { daemon } = await start('a');
    await daemon.stop(NEVER);
    mkdirSync(join(folder, 'a', 'daemons'), { recursive: true });
    writeFileSync(join(folder, 'a', 'daemons', 'a.json'), '{"format": 1, "vol');
    await assert.rejects(Daemon.start(options('a')), { code: 'state-damaged', message: /daemons\/a\.json/ });
  });

  test('starts its machines, ends them with itself, and asks guests first where it can', async () => {
    const { daemon, client, parts } = await start('a', {
      volumes: [DISK],
      vms: [{ definition: VM, autostart: true }],
      stopTimeoutMs: 10_000,
    });
    const [machine] = parts.machines;
    assert.deepEqual(machine.options.disks, { disk: { socketPath: '/run/disk', exportName: 'disk' } });
    assert.equal((await client.machine('vm1')).state, 'running');
    await assert.rejects(client.startMachine('vm1'), { code: 'exists' });
    let asked = false;
    machine.powerdown = async () => {
      asked = true;
      machine.end(0);
    };
    await daemon.stop(NEVER);
    assert.ok(asked);
    assert.ok(parts.services.get('disk')?.closed);
    assert.deepEqual(parts.closed, ['127.0.0.1:0', 'unix:/run/disk']);
  });

  test('does not wait for guests when hurried', async () => {
    const { daemon, parts } = await start('a', {
      volumes: [DISK],
      vms: [{ definition: VM, autostart: true }],
      stopTimeoutMs: 3_600_000,
    });
    parts.machines[0].powerdown = async () => undefined;
    const hurry = new AbortController();
    const stopped = daemon.stop(hurry.signal);
    hurry.abort();
    await stopped;
    assert.equal(parts.machines[0].state, 'stopped');
  });

  test('tells how a machine ended, and starts it again', async () => {
    const { client, parts } = await start('a', {
      volumes: [DISK],
      vms: [{ definition: VM, autostart: true }],
    });
    parts.machines[0].emit({
      kind: 'io-error',
      node: 'disk0',
      operation: 'write',
      action: 'stop',
      reason: 'EIO',
    });
    assert.match((await client.machine('vm1')).error ?? '', /I\/O error on disk0/);
    parts.machines[0].end(1);
    await parts.machines[0].exited;
    const view = await client.machine('vm1');
    assert.equal(view.state, 'stopped');
    assert.match(view.error ?? '', /exit code 1: qemu: it broke/);
    assert.equal((await client.startMachine('vm1')).state, 'running');
    assert.equal((await client.stopMachine('vm1', { mode: 'quit' })).state, 'stopped');
  });

  test('does not start a machine on volumes that are away or in use', async () => {
    const twin = { ...VM, name: 'vm2' };
    const { client } = await start('a', {
      volumes: [DISK],
      vms: [
        { definition: VM, autostart: true },
        { definition: twin, autostart: true },
      ],
    });
    assert.equal((await client.machine('vm2')).state, 'stopped');
    await assert.rejects(client.startMachine('vm2'), { code: 'exists', message: /in use by machine "vm1"/ });
    await client.stopMachine('vm1', { mode: 'quit' });
    await client.seal('disk', 2);
    await assert.rejects(client.startMachine('vm1'), { code: 'phase', message: /"disk" is sealed/ });
  });
});

describe('daemons with a coordinator between them', () => {
  async function two(): Promise<{
    a: Awaited<ReturnType<typeof start>>;
    b: Awaited<ReturnType<typeof start>>;
  }> {
    const a = await start('a', { volumes: [DISK], vms: [{ definition: VM, autostart: true }] });
    return { a, b: await start('b') };
  }

  test('a machine moves there', async () => {
    const { a, b } = await two();
    const result = await move(a.client, b.client);
    assert.equal(result.outcome, 'moved', result.why ?? '');
    assert.equal(result.state, 'running');
    assert.equal((await a.client.machine('vm1')).state, 'departed');
    const arrived = await b.client.machine('vm1');
    assert.equal(arrived.state, 'running');
    assert.equal(arrived.moveId, null);
    assert.deepEqual(arrived.definition, VM);
    assert.equal((await a.client.volume('disk')).phase, 'retired');
    assert.equal((await b.client.volume('disk')).phase, 'plain');
    assert.ok(b.parts.services.get('disk')?.image.endsWith('/images/disk.img'));
    await assert.rejects(a.client.startMachine('vm1'), { code: 'phase', message: /moved away/ });
  });

  test('what arrived is there after a restart, what left is not started again', async () => {
    const { a, b } = await two();
    assert.equal((await move(a.client, b.client)).outcome, 'moved');
    await a.daemon.stop(NEVER);
    await b.daemon.stop(NEVER);
    const again = await start('a', {
      volumes: [DISK],
      vms: [{ definition: VM, autostart: true }],
      parts: a.parts,
    });
    assert.equal((await again.client.machine('vm1')).state, 'departed');
    const other = await start('b', { parts: b.parts });
    assert.equal((await other.client.machine('vm1')).state, 'stopped');
    assert.equal((await other.client.startMachine('vm1')).state, 'running');
  });

  test('a destination whose QEMU does not start is left clean', async () => {
    const { a, b } = await two();
    b.parts.failsToStart = true;
    const result = await move(a.client, b.client);
    assert.equal(result.outcome, 'aborted');
    assert.match(result.why ?? '', /incoming failed: QEMU says no/);
    assert.equal((await a.client.machine('vm1')).state, 'running');
    assert.equal((await a.client.machine('vm1')).moveId, null);
    const { volumes, vms } = await b.client.status();
    assert.deepEqual([volumes, vms], [[], []]);
    const record = JSON.parse(readFileSync(join(folder, 'b', 'daemons', 'b.json'), 'utf8')) as Record<
      string,
      unknown
    >;
    assert.deepEqual(record.vms, {});
    assert.deepEqual(record.volumes, {});
    b.parts.failsToStart = false;
    assert.equal((await move(a.client, b.client)).outcome, 'moved');
  });

  test('a switch that fails is retreated from', async () => {
    const { a, b } = await two();
    a.parts.machines[0].failsToArrive = true;
    const result = await move(a.client, b.client);
    assert.equal(result.outcome, 'aborted');
    assert.equal((await a.client.machine('vm1')).state, 'running');
    const disk = await a.client.volume('disk');
    assert.equal(disk.phase, 'plain');
    assert.ok(disk.phase === 'plain' && disk.generation === 2, 'the generation is burnt');
    assert.deepEqual((await b.client.status()).volumes, []);
  });

  test('two moves of one machine do not mix', async () => {
    const { a, b } = await two();
    await a.client.claim('vm1', 'other-move');
    await assert.rejects(move(a.client, b.client), { code: 'migration', message: /other-move/ });
    await assert.rejects(a.client.migrate('vm1', 'mine', 'tcp:x:1', null), { code: 'exists' });
    await assert.rejects(a.client.claim('vm1', 'mine'), { code: 'exists' });
    await a.client.release('vm1', 'mine');
    await assert.rejects(a.client.claim('vm1', 'mine'), { code: 'exists' });
    await a.client.release('vm1', 'other-move');
    await a.client.claim('vm1', 'mine');
  });

  test('a cancelled volume is proved to be gone as often as it is asked', async () => {
    const { b } = await two();
    const request = { name: 'disk', size: 1 << 20, volumeId: 'v', generation: 3, sourceUri: 'nbd://a/disk' };
    await b.client.createVolume(request);
    await b.client.createVolume(request);
    await assert.rejects(b.client.createVolume({ ...request, volumeId: 'w' }), { code: 'exists' });
    await assert.rejects(b.client.cancelVolume('disk', 'w'), { code: 'not-found' });
    const proof = await b.client.cancelVolume('disk', 'v');
    assert.deepEqual(proof, { volumeId: 'v', generation: 4 });
    assert.deepEqual(await b.client.cancelVolume('disk', 'v'), proof);
  });

  test('what stands in the way of a move is said before anything is changed', async () => {
    const { a, b } = await two();
    await assert.rejects(move(a.client, a.client), { code: 'migration', message: /the same daemon/ });
    await assert.rejects(move(b.client, a.client), { code: 'migration', message: /has no machine "vm1"/ });
    await b.client.createVolume({
      name: 'disk',
      size: 1,
      volumeId: 'v',
      generation: 1,
      sourceUri: 'nbd://x',
    });
    await assert.rejects(move(a.client, b.client), {
      code: 'migration',
      message: /has a volume "disk" already/,
    });
    await b.client.cancelVolume('disk', 'v');
    await a.client.stopMachine('vm1', { mode: 'quit' });
    await assert.rejects(move(a.client, b.client), { code: 'migration', message: /is stopped/ });
    assert.equal((await a.client.volume('disk')).phase, 'plain');
    await assert.rejects(move(new ControlClient(join(folder, 'none.sock')), b.client), {
      code: 'control',
      message: /none\.sock/,
    });
  });
});
