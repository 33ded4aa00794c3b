import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { runMove } from '../../../src/migration/coordinator.js';
import { Journal } from '../../../src/migration/journal.js';
import type { Timing } from '../../../src/migration/perform.js';
import { makePlan, type Switch } from '../../../src/migration/plan.js';
import type { MoveResult } from '../../../src/migration/result.js';
import { FakeWorld, type Fault, Killed, VM } from './fake-hosts.js';

const TIMING: Timing = { pollMs: 1, runningTimeoutMs: 5, patienceMs: 10, retryDelayMs: 1 };
const KINDS: Fault['kind'][] = [
  'lost-request',
  'lost-answer',
  'refused',
  'kill-before',
  'kill-after',
  'down',
];
const REQUEST = { vm: VM, switch: 'now', bandwidthBytesPerSecond: null, deleteSourceImages: false } as const;

let folder: string;
before(() => {
  // Thousands of moves, each with its durable journal: in memory where that is possible.
  folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'blockferry-move-'));
});
after(() => rmSync(folder, { recursive: true, force: true }));

async function newJournal(world: FakeWorld, when: Switch = 'now'): Promise<Journal> {
  const request = { ...REQUEST, switch: when };
  const journal = Journal.create(folder, await makePlan(world.from, world.to, request));
  world.calls = 0;
  world.log.length = 0;
  return journal;
}

function move(
  world: FakeWorld,
  journal: Journal,
  direction: 'forward' | 'back' = 'forward',
): Promise<MoveResult> {
  return runMove({ from: world.from, to: world.to, journal, direction, timing: TIMING });
}

/** The move as it ends when it is continued until it does, by new coordinators if need be. */
async function settle(world: FakeWorld, path: string, direction: 'forward' | 'back'): Promise<MoveResult> {
  world.repair();
  const journal = Journal.open(path);
  try {
    return await move(world, journal, direction);
  } finally {
    journal.close();
  }
}

function assertMoved(world: FakeWorld, hint: string): void {
  assert.equal(world.source.state, 'absent', hint);
  assert.equal(world.source.departed, true, hint);
  assert.equal(world.source.claim, null, hint);
  assert.equal(world.destination.state, 'running', hint);
  for (const volume of world.here.values()) assert.equal(volume.phase, 'retired', hint);
  for (const volume of world.there.values()) assert.equal(volume.phase, 'plain', hint);
}

function assertBack(world: FakeWorld, hint: string): void {
  assert.equal(world.source.state, 'running', hint);
  assert.equal(world.source.claim, null, hint);
  assert.equal(world.destination.state, 'absent', hint);
  assert.equal(world.there.size, 0, hint);
  for (const volume of world.here.values()) assert.equal(volume.phase, 'plain', hint);
}

function assertEnd(world: FakeWorld, outcome: string, hint: string): void {
  assert.deepEqual(world.violations, [], hint);
  if (outcome === 'moved') assertMoved(world, hint);
  else assertBack(world, hint);
}

async function callsWithoutFault(
  disks: readonly string[],
  outcome: FakeWorld['switchOutcome'],
  when: Switch,
): Promise<number> {
  const world = new FakeWorld(disks);
  world.switchOutcome = outcome;
  const journal = await newJournal(world, when);
  await move(world, journal);
  journal.close();
  return world.calls;
}

/** One move that meets `fault`, continued as `then` says if it did not come to an end by itself. True if it did not. */
async function moveWithFault(
  disks: readonly string[],
  switchOutcome: FakeWorld['switchOutcome'],
  fault: Fault,
  then: 'forward' | 'back',
  when: Switch,
): Promise<boolean> {
  const world = new FakeWorld(disks);
  world.switchOutcome = switchOutcome;
  const journal = await newJournal(world, when);
  world.fault = fault;
  let result: MoveResult | null = null;
  try {
    result = await move(world, journal);
  } catch (error) {
    const expected =
      error instanceof Killed || (error instanceof BlockferryError && error.code === 'migration');
    assert.ok(expected, String(error));
  } finally {
    journal.close();
  }
  const hint = `${fault.kind} at ${world.log[fault.call]}, then ${then}: ${world.log.join(', ')}`;
  assert.deepEqual(world.violations, [], hint);
  if (result === null && world.destination.state === 'running' && then === 'back') {
    await assert.rejects(settle(world, journal.path, 'back'), /cannot be aborted/, hint);
    result = await settle(world, journal.path, 'forward');
  }
  const continued = result === null || world.fault === null;
  result ??= await settle(world, journal.path, then);
  if (switchOutcome === 'dies') assert.equal(result.outcome, 'aborted', hint);
  assertEnd(world, result.outcome, hint);
  return continued;
}

describe('coordinator', () => {
  for (const disks of [['disk'], ['disk', 'data']]) {
    const of = `${disks.length} disk${disks.length > 1 ? 's' : ''}`;

    test(`moves a machine of ${of}`, async () => {
      const world = new FakeWorld(disks);
      const journal = await newJournal(world);
      const result = await move(world, journal);
      journal.close();
      assertEnd(world, 'moved', '');
      assert.equal(result.outcome, 'moved');
      assert.equal(result.downtimeMs, 33);
      assert.equal(result.zeroBytes, 4 * disks.length);
      const steps = readFileSync(journal.path, 'utf8')
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line) as { kind: string });
      assert.equal(steps[0].kind, 'plan');
      assert.equal(steps.at(-1)?.kind, 'finish');
    });

    for (const when of ['now', 'all'] as const) {
      for (const switchOutcome of ['arrives', 'dies'] as const) {
        for (const kind of KINDS) {
          test(`${of}, ${when}, switch ${switchOutcome}, ${kind} at every call: one writer, and a clean end`, async () => {
            const calls = await callsWithoutFault(disks, switchOutcome, when);
            for (let call = 0; call < calls; call += 1) {
              const fault = { call, kind };
              const continued = await moveWithFault(disks, switchOutcome, fault, 'forward', when);
              if (continued) await moveWithFault(disks, switchOutcome, fault, 'back', when);
            }
          });
        }
      }
    }
  }

  test('a destination that dies in the switch is retreated from, and the guest goes on at the source', async () => {
    const world = new FakeWorld(['disk', 'data']);
    world.switchOutcome = 'dies';
    const journal = await newJournal(world);
    const result = await move(world, journal);
    journal.close();
    assert.equal(result.outcome, 'aborted');
    assertBack(world, '');
    assert.equal(world.here.get('disk')?.generation, 5, 'the generation is burnt');
  });

  test('after an aborted move a second one succeeds', async () => {
    const world = new FakeWorld(['disk']);
    const first = await newJournal(world);
    world.fault = { call: 9_999, kind: 'refused' };
    world.switchOutcome = 'dies';
    assert.equal((await move(world, first)).outcome, 'aborted');
    first.close();
    world.switchOutcome = 'arrives';
    const second = await newJournal(world);
    assert.equal((await move(world, second)).outcome, 'moved');
    second.close();
    assertMoved(world, '');
  });

  test('without a proof nothing is unsealed', async () => {
    const world = new FakeWorld(['disk']);
    const journal = await newJournal(world);
    const destination = world.to;
    const from = world.from;
    const stubborn: typeof destination = new Proxy(destination, {
      get: (target, key) => {
        if (key === 'retreat')
          return () => Promise.reject(new BlockferryError('phase', 'the guest has written'));
        if (key === 'waitRunning')
          return () => Promise.reject(new BlockferryError('timeout', 'it does not run'));
        if (key === 'machine')
          return () => Promise.reject(new BlockferryError('not-found', 'no such machine'));
        return Reflect.get(target, key);
      },
    });
    // The destination's process is gone before the switch and its volume will not retreat.
    await assert.rejects(
      runMove({
        from: new Proxy(from, {
          get: (target, key) =>
            key === 'migrateContinue'
              ? () => Promise.reject(new BlockferryError('hypervisor', 'no'))
              : Reflect.get(target, key),
        }),
        to: stubborn,
        journal,
        direction: 'forward',
        timing: TIMING,
      }),
      /does not prove/,
    );
    journal.close();
    assert.equal(world.here.get('disk')?.phase, 'sealed');
    assert.deepEqual(world.violations, []);
  });

  test('a migration that fails on its way is not tried again behind the back of the operator', async () => {
    const world = new FakeWorld(['disk']);
    const journal = await newJournal(world);
    const from = new Proxy(world.from, {
      get: (target, key) =>
        key === 'waitMigration'
          ? async () => {
              world.source.migration = 'failed';
              return { status: 'failed', error: 'broken pipe' };
            }
          : Reflect.get(target, key),
    });
    const result = await runMove({ from, to: world.to, journal, direction: 'forward', timing: TIMING });
    journal.close();
    assert.equal(result.outcome, 'aborted');
    assert.match(result.why ?? '', /migration of "vm1" is failed: broken pipe/);
    assert.equal(world.log.filter((entry) => entry.endsWith('to.incoming')).length, 1);
    assertEnd(world, 'aborted', '');
  });

  test('an interrupt while memory is on its way turns back', async () => {
    const world = new FakeWorld(['disk']);
    const journal = await newJournal(world);
    const interrupt = new AbortController();
    const result = await runMove({
      from: world.from,
      to: world.to,
      journal,
      direction: 'forward',
      timing: TIMING,
      signal: interrupt.signal,
      progress: (event) => {
        if (event.kind === 'step' && event.step === 'migrate') interrupt.abort();
      },
    });
    journal.close();
    assert.equal(result.outcome, 'aborted');
    assert.equal(result.why, 'interrupted');
    assertEnd(world, 'aborted', '');
  });

  test('a second coordinator of the same move is refused', async () => {
    const world = new FakeWorld(['disk']);
    const journal = await newJournal(world);
    assert.throws(() => Journal.open(journal.path), /another coordinator/);
    journal.close();
    Journal.open(journal.path).close();
  });
});
