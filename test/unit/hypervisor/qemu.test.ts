import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { type MachineDefinition, machineDefinitionSchema } from '../../../src/hypervisor/driver.js';
import { QemuDriver, qemuArguments } from '../../../src/hypervisor/qemu.js';
import type { QemuMachine } from '../../../src/hypervisor/qemu-machine.js';
import { type FakeBehaviour, writeFakeQemu } from '../../fakes/fake-qemu.js';

const TIMEOUT_MS = 10_000;
const disks = { root: { socketPath: '/run/nbd.sock' } };

function definitionOf(more: Partial<MachineDefinition> = {}): MachineDefinition {
  return machineDefinitionSchema.parse({
    name: 'vm1',
    args: [],
    disks: [{ node: 'disk0', volume: 'root' }],
    ...more,
  });
}

interface Bench {
  runtimeDir: string;
  binary: string;
  driver: QemuDriver;
  start(behaviour: FakeBehaviour, incoming?: boolean): Promise<QemuMachine>;
}

function bench(t: TestContext): Bench {
  const folder = mkdtempSync(join(tmpdir(), 'bf-qemu-'));
  const runtimeDir = join(folder, 'run');
  const binary = writeFakeQemu(folder);
  const driver = new QemuDriver({ runtimeDir, dieWithParent: true, stopStepTimeoutMs: 300 });
  const machines: QemuMachine[] = [];
  t.after(async () => {
    for (const machine of machines) await machine.kill();
    rmSync(folder, { recursive: true });
  });
  const start = async (behaviour: FakeBehaviour, incoming = false) => {
    const definition = definitionOf({ binary, args: ['-fake', behaviour], serial: true });
    const machine = await driver.start(definition, { disks, incoming });
    machines.push(machine);
    return machine;
  };
  return { runtimeDir, binary, driver, start };
}

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

test('the command line: disks as NBD nodes, sockets in the machine’s folder', () => {
  const definition = definitionOf({
    args: ['-m', '64', '-device', 'virtio-blk-pci,drive=disk0'],
    serial: true,
  });
  const options = { disks: { root: { socketPath: '/run/a,b.sock', exportName: 'root' } }, incoming: true };
  const args = qemuArguments(definition, options, '/run/vm,1');
  assert.deepEqual(args.slice(0, 6), [
    '-name',
    'guest=vm1',
    '-m',
    '64',
    '-device',
    'virtio-blk-pci,drive=disk0',
  ]);
  assert.ok(args.includes('socket,id=blockferry-qmp,path=/run/vm,,1/qmp.sock,server=on,wait=off'));
  assert.deepEqual(args.slice(-2), ['-incoming', 'defer']);
  assert.deepEqual(JSON.parse(args[args.indexOf('-blockdev') + 1]!), {
    driver: 'nbd',
    'node-name': 'disk0',
    server: { type: 'unix', path: '/run/a,b.sock' },
    export: 'root',
    cache: { direct: true },
    discard: 'unmap',
    'reconnect-delay': 30,
  });
});

test('a disk that is not served here, and a socket path that is too long', () => {
  assert.throws(() => qemuArguments(definitionOf(), { disks: {} }, '/run'), { code: 'hypervisor' });
  assert.throws(() => qemuArguments(definitionOf(), { disks }, `/${'x'.repeat(100)}`), { code: 'address' });
});

test('definitions from elsewhere are checked', () => {
  for (const name of ['', 'a/b', '../x', 'a,b', '-x', 'a'.repeat(65)]) {
    assert.equal(machineDefinitionSchema.safeParse({ ...definitionOf(), name }).success, false, name);
  }
  assert.equal(machineDefinitionSchema.safeParse({ ...definitionOf(), socket: '/x' }).success, false);
  assert.equal(machineDefinitionSchema.safeParse({ ...definitionOf(), disks: [] }).success, false);
  assert.deepEqual(machineDefinitionSchema.parse(JSON.parse(JSON.stringify(definitionOf()))), definitionOf());
});

test('versions', async (t) => {
  const { driver, binary } = bench(t);
  assert.equal(await driver.version({ binary }), '10.0.2');
  await assert.rejects(driver.version({ binary: '/nonexistent/qemu' }), { code: 'hypervisor' });
  await assert.rejects(driver.version({ binary: 'true' }), /names no version/);
});

test('start, status, stop: nothing is left', async (t) => {
  const { start, runtimeDir } = bench(t);
  const machine = await start('well');
  assert.deepEqual(await machine.status(), { state: 'running', detail: 'running' });
  assert.ok(machine.serialPath!.startsWith(runtimeDir));
  assert.ok(alive(machine.pid));
  await machine.stop();
  await machine.stop();
  assert.equal((await machine.exited).code, 0);
  assert.ok(!alive(machine.pid));
  assert.deepEqual(readdirSync(runtimeDir), []);
  await assert.rejects(machine.status(), { code: 'hypervisor', message: /vm1 ended with code 0/ });
});

test('two machines of one name have folders of their own', async (t) => {
  const { start, runtimeDir } = bench(t);
  const [a, b] = [await start('well'), await start('well', true)];
  assert.notEqual(a.serialPath, b.serialPath);
  assert.equal((await b.status()).state, 'incoming');
  await a.kill();
  assert.equal((await b.status()).state, 'incoming');
  assert.equal(readdirSync(runtimeDir).length, 1);
});

test('QEMU that does not start says why', async (t) => {
  const { start, driver, runtimeDir } = bench(t);
  await assert.rejects(start('dies-at-start'), {
    code: 'hypervisor',
    message: /code 1: qemu: could not open disk image: No such/,
  });
  await assert.rejects(start('no-greeting-then-dies'), {
    code: 'hypervisor',
    message: /cannot set up guest memory/,
  });
  const nowhere = definitionOf({ binary: '/nonexistent/qemu' });
  await assert.rejects(driver.start(nowhere, { disks }), { code: 'hypervisor', message: /nonexistent/ });
  await assert.rejects(new QemuDriver({ runtimeDir }).start(nowhere, { disks }), {
    code: 'hypervisor',
    message: /nonexistent/,
  });
  assert.deepEqual(readdirSync(runtimeDir), []);
});

test('a migration from end to end, each side seen through its events', async (t) => {
  const { start } = bench(t);
  const source = await start('well');
  const destination = await start('well', true);
  const seen: string[] = [];
  source.onEvent((event) => seen.push(event.kind === 'migration' ? event.status : event.kind));
  assert.equal(await destination.incoming('tcp:127.0.0.1:0'), 'tcp:127.0.0.1:4444');
  await source.migrate('tcp:127.0.0.1:4444', { bandwidthBytesPerSecond: 1e6, downtimeLimitMs: 300 });
  await assert.rejects(source.migrate('tcp:127.0.0.1:4444'), /being migrated already/);
  await source.waitPreSwitchover(TIMEOUT_MS);
  await source.waitPreSwitchover(TIMEOUT_MS);
  await source.continueSwitchover();
  await source.waitCompleted(TIMEOUT_MS);
  assert.deepEqual(seen, ['setup', 'active', 'stopped', 'pre-switchover', 'device', 'completed']);
  assert.equal((await source.status()).state, 'migrated');
  assert.deepEqual(await source.queryMigrate(), {
    status: 'completed',
    ramTransferredBytes: 5,
    ramRemainingBytes: 0,
    ramTotalBytes: 9,
    totalTimeMs: 100,
    downtimeMs: 7,
    bytesPerSecond: 1e6,
  });
  await assert.rejects(source.waitPreSwitchover(TIMEOUT_MS), /its migration is completed/);
  await assert.rejects(source.cancelMigration(200), /had completed/);
});

test('a cancelled migration leaves the machine running, and a second one can follow', async (t) => {
  const { start } = bench(t);
  const source = await start('well');
  await source.cancelMigration();
  for (let round = 0; round < 2; round++) {
    await source.migrate('unix:/run/x');
    await source.waitPreSwitchover(TIMEOUT_MS);
    await source.cancelMigration();
    assert.equal((await source.status()).state, 'running');
  }
});

test('a cancel that does not work is not taken for one that does', async (t) => {
  const { start } = bench(t);
  const cases: [FakeBehaviour, { code: string; message: RegExp }][] = [
    ['stays-stopped', { code: 'timeout', message: /did not run on/ }],
    ['never-cancels', { code: 'timeout', message: /did not cancel/ }],
    ['completes-on-cancel', { code: 'hypervisor', message: /had completed/ }],
  ];
  for (const [behaviour, expected] of cases) {
    const source = await start(behaviour);
    await source.migrate('unix:/run/x');
    await source.waitPreSwitchover(TIMEOUT_MS);
    await assert.rejects(source.cancelMigration(100), expected);
  }
});

test('after the switchover was let go there is no cancelling', async (t) => {
  const { start } = bench(t);
  const source = await start('hangs-in-device');
  await source.migrate('unix:/run/x');
  await source.waitPreSwitchover(TIMEOUT_MS);
  await source.continueSwitchover();
  await assert.rejects(source.cancelMigration(100), {
    code: 'hypervisor',
    message: /has begun its switchover/,
  });
  await assert.rejects(source.waitCompleted(50), { code: 'timeout', message: /migration is device/ });
});

test('a migration that fails rejects with QEMU’s reason', async (t) => {
  const { start } = bench(t);
  const source = await start('migration-fails');
  await source.migrate('unix:/run/x');
  await assert.rejects(source.waitPreSwitchover(TIMEOUT_MS), { code: 'hypervisor', message: /Broken pipe/ });
  await source.cancelMigration(TIMEOUT_MS);
  assert.equal((await source.status()).state, 'running');
});

test('a wait ends at its deadline', async (t) => {
  const { start } = bench(t);
  const destination = await start('well', true);
  await assert.rejects(destination.waitResumed(30), { code: 'timeout', message: /did not run within 30 ms/ });
});

test('QEMU that dies in a migration: whoever waits hears its last words, nothing is left', async (t) => {
  const { start, runtimeDir } = bench(t);
  const source = await start('dies-in-migration');
  await source.migrate('unix:/run/x').catch(() => {});
  await assert.rejects(source.waitPreSwitchover(TIMEOUT_MS), {
    code: 'hypervisor',
    message: /migration stream lost/,
  });
  await source.exited;
  assert.deepEqual(readdirSync(runtimeDir), []);

  const destination = await start('incoming-fails', true);
  await destination.incoming('tcp:127.0.0.1:0').catch(() => {});
  await assert.rejects(destination.waitResumed(TIMEOUT_MS), {
    code: 'hypervisor',
    message: /Input\/output error/,
  });
});

test('QEMU killed from outside', async (t) => {
  const { start } = bench(t);
  const machine = await start('well', true);
  const waiting = assert.rejects(machine.waitResumed(TIMEOUT_MS), { message: /killed by SIGKILL/ });
  process.kill(machine.pid, 'SIGKILL');
  await waiting;
  assert.equal((await machine.exited).signal, 'SIGKILL');
  assert.ok(!existsSync(machine.serialPath!));
});

test('QEMU that hears neither quit nor SIGTERM is killed', { timeout: 60_000 }, async (t) => {
  const { start } = bench(t);
  const machine = await start('deaf');
  await machine.stop();
  assert.equal((await machine.exited).signal, 'SIGKILL');
});
