/**
 * A coordinator that dies at the beginning of each of its steps, with real daemons and real QEMU: whoever goes on, by --resume or by
 * --abort, ends with the machine running on one side and nothing left on the other.
 */

import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { daemonParts } from '../../src/cli/parts.js';
import { ControlClient } from '../../src/host/control/client.js';
import { Daemon } from '../../src/host/daemon.js';
import { QemuDriver } from '../../src/hypervisor/qemu.js';
import { runMove } from '../../src/migration/coordinator.js';
import { Journal } from '../../src/migration/journal.js';
import { type MoveRequest, makePlan } from '../../src/migration/plan.js';
import type { MoveResult } from '../../src/migration/result.js';
import { FORWARD_STEPS, type StepName } from '../../src/migration/steps.js';
import { silent } from '../unit/host/fakes.js';

const QEMU = 'qemu-system-x86_64';
const skip = spawnSync(QEMU, ['--version']).status === 0 ? false : `${QEMU} is not installed`;
/** From here on the guest runs at the destination: an abort must be refused. */
const POINT_OF_NO_RETURN = FORWARD_STEPS.indexOf('wait-handoff');
const TIMING = { pollMs: 200, runningTimeoutMs: 20_000, patienceMs: 5000, retryDelayMs: 20 };
/** No operating system: the firmware finds nothing to boot and runs on, which is enough to be moved. */
const DEFINITION = {
  name: 'vm1',
  binary: QEMU,
  args: [
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-machine', 'q35', '-accel', 'tcg', '-m', '32'],
    ...['-device', 'virtio-blk-pci,drive=disk0,rerror=stop,werror=stop'],
  ],
  disks: [{ volume: 'disk', node: 'disk0' }],
  serial: false,
};

class Killed extends Error {}

let folder: string;
const daemons: Daemon[] = [];
const clients: ControlClient[] = [];

async function startHost(name: string, first: boolean): Promise<void> {
  const stateDir = join(folder, name);
  const machinesDir = join(stateDir, 'vms');
  const control = join(stateDir, 'control.sock');
  const diskSocket = (volume: string): string => join(stateDir, 'nbd', `${volume}.sock`);
  const daemon = await Daemon.start({
    kind: 'host',
    name,
    stateDir,
    control,
    link: '127.0.0.1:0',
    images: join(stateDir, 'images'),
    folders: [join(stateDir, 'nbd')],
    machinesDir,
    guestAddresses: (volume) => [`unix:${diskSocket(volume)}`],
    diskSocket,
    migrationAddress: '127.0.0.1',
    stopTimeoutMs: 0,
    volumes: first
      ? [{ name: 'disk', image: join(folder, 'disk.img'), mode: { kind: 'serve', readOnly: false } }]
      : [],
    vms: first ? [{ definition: DEFINITION, autostart: true }] : [],
    toleratesBadVolumes: false,
    parts: {
      ...daemonParts(machinesDir, 1),
      hypervisor: new QemuDriver({ runtimeDir: machinesDir, dieWithParent: true }),
    },
    log: silent,
  });
  daemons.push(daemon);
  clients.push(new ControlClient(control));
}

function go(journal: Journal, direction: 'forward' | 'back', dieAt: StepName | null): Promise<MoveResult> {
  const from = clients.find((client) => client.address === journal.plan.from)!;
  const to = clients.find((client) => client.address === journal.plan.to)!;
  return runMove({
    from,
    to,
    journal,
    direction,
    timing: TIMING,
    progress: (event) => {
      if (event.kind === 'step' && event.step === dieAt) throw new Killed();
    },
  });
}

async function reopened<Result>(path: string, act: (journal: Journal) => Promise<Result>): Promise<Result> {
  const journal = Journal.open(path);
  try {
    return await act(journal);
  } finally {
    journal.close();
  }
}

/** Where the machine runs, having checked that it is nowhere else and that only its volume there can be written. */
async function whereItRuns(): Promise<number> {
  const all = await Promise.all(clients.map((client) => client.status()));
  const where = all.findIndex(({ vms }) => vms.some(({ state }) => state === 'running'));
  assert.ok(where >= 0, JSON.stringify(all));
  const there = all[where];
  const other = all[1 - where];
  assert.deepEqual(
    there.volumes.map(({ phase }) => phase),
    ['plain'],
  );
  assert.equal(there.vms[0].moveId, null);
  for (const { state } of other.vms) assert.equal(state, 'departed');
  for (const volume of other.volumes) {
    assert.ok(volume.phase === 'retired' || (volume.phase === 'unavailable' && volume.retiredId !== null));
  }
  return where;
}

describe('a coordinator killed at each step', { skip }, () => {
  before(async () => {
    folder = mkdtempSync(join(tmpdir(), 'bf-killed-'));
    writeFileSync(join(folder, 'disk.img'), Buffer.alloc(3 << 20, 0x77));
    truncateSync(join(folder, 'disk.img'), 16 << 20);
    await startHost('a', true);
    await startHost('b', false);
  });
  after(async () => {
    for (const client of clients) client.close();
    for (const daemon of daemons) await daemon.stop(AbortSignal.abort());
    rmSync(folder, { recursive: true, force: true });
  });

  for (const [index, step] of FORWARD_STEPS.entries()) {
    for (const direction of ['back', 'forward'] as const) {
      test(`${step}, then ${direction === 'back' ? '--abort' : '--resume'}`, async () => {
        const where = await whereItRuns();
        const request: MoveRequest = {
          vm: 'vm1',
          switch: step === 'pre-copy' ? 'all' : 'now',
          bandwidthBytesPerSecond: null,
          deleteSourceImages: true,
        };
        const plan = await makePlan(clients[where], clients[1 - where], request);
        const journal = Journal.create(join(folder, 'migrations'), plan);
        await assert.rejects(go(journal, 'forward', step), Killed);
        journal.close();
        let arrived = index >= POINT_OF_NO_RETURN;
        if (direction === 'back' && arrived) {
          await assert.rejects(
            reopened(journal.path, (again) => go(again, 'back', null)),
            /cannot be aborted/,
          );
        }
        const way = arrived ? 'forward' : direction;
        const result = await reopened(journal.path, (again) => go(again, way, null)).catch(
          (error: unknown) => {
            // Between migrate-continue and the journal's next line the guest may have come to run at the destination.
            assert.ok(step === 'wait-running' && /cannot be aborted/.test(String(error)), String(error));
            arrived = true;
            return reopened(journal.path, (again) => go(again, 'forward', null));
          },
        );
        const moved = arrived || direction === 'forward';
        assert.equal(result.outcome, moved ? 'moved' : 'aborted', result.why ?? '');
        assert.equal(await whereItRuns(), moved ? 1 - where : where);
      });
    }
  }
});
