import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { appendFileSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, test } from 'node:test';
import { Journal } from '../../../src/migration/journal.js';
import { type MovePlan, makePlan } from '../../../src/migration/plan.js';
import { FakeWorld, VM } from './fake-hosts.js';

let folder: string;
beforeEach(() => {
  folder = join(mkdtempSync(join(tmpdir(), 'blockferry-journal-')), 'migrations');
});
afterEach(() => rmSync(join(folder, '..'), { recursive: true, force: true }));

async function newPlan(): Promise<MovePlan> {
  const { from, to } = new FakeWorld(['disk']);
  return makePlan(from, to, { vm: VM, switch: 'now', bandwidthBytesPerSecond: 5, deleteSourceImages: true });
}

describe('journal', () => {
  test('gives back what was written', async () => {
    const journal = Journal.create(folder, await newPlan());
    journal.append({ kind: 'begin', step: 'claim' }, true);
    journal.append(
      { kind: 'end', step: 'retreat', result: { proofs: [{ volumeId: 'v', generation: 2 }] } },
      true,
    );
    journal.append({ kind: 'end', step: 'incoming', result: { uri: 'tcp:x:1' } }, false);
    journal.close();
    const again = Journal.open(journal.path);
    assert.deepEqual(again.plan, journal.plan);
    assert.deepEqual(again.entries, journal.entries);
    assert.equal(again.result('uri'), 'tcp:x:1');
    assert.deepEqual(again.result('proofs'), [{ volumeId: 'v', generation: 2 }]);
    assert.equal(again.result('arrivedAt'), undefined);
    again.close();
  });

  test('forgets a line that was not written to its end, and goes on after the last whole one', async () => {
    const journal = Journal.create(folder, await newPlan());
    journal.append({ kind: 'begin', step: 'claim' }, true);
    journal.close();
    const whole = readFileSync(journal.path, 'utf8');
    appendFileSync(journal.path, '{"kind":"end","step":"cl');
    const again = Journal.open(journal.path);
    assert.equal(again.entries.length, 2);
    again.append({ kind: 'end', step: 'claim', result: {} }, true);
    again.close();
    const text = readFileSync(journal.path, 'utf8');
    assert.ok(text.startsWith(whole));
    assert.equal(Journal.open(journal.path).entries.length, 3);
  });

  test('stays readable when the disk was full for a while', async () => {
    const journal = Journal.create(folder, await newPlan());
    journal.close();
    const limit = statSync(journal.path).size + 150; // the first entry fits, the second one in part
    const script = `
      import { execFileSync } from 'node:child_process';
      import { Journal } from ${JSON.stringify(new URL('../../../src/migration/journal.js', import.meta.url).href)};
      const limit = (bytes) => execFileSync('prlimit', ['--pid', String(process.pid), '--fsize=' + bytes + ':']);
      const journal = Journal.open(${JSON.stringify(journal.path)});
      journal.append({ kind: 'begin', step: 'claim' }, true);
      limit(${limit});
      let refused = 0;
      for (let i = 0; i < 2; i++) {
        try {
          journal.append({ kind: 'turn', direction: 'back', why: 'w'.repeat(200) }, true);
        } catch {
          refused++;
        }
      }
      limit('unlimited');
      journal.append({ kind: 'begin', step: 'discard' }, true);
      journal.close();
      process.stdout.write(String(refused));
    `;
    const child = spawnSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' });
    assert.equal(child.stdout, '2', child.stderr);
    const again = Journal.open(journal.path);
    assert.deepEqual(
      again.entries.slice(1).map((entry) => (entry.kind === 'begin' ? entry.step : entry.kind)),
      ['claim', 'discard'],
    );
    again.close();
  });

  test('does not go on from what it cannot understand', async () => {
    const journal = Journal.create(folder, await newPlan());
    journal.close();
    appendFileSync(journal.path, '{"kind":"begin","step":"unseal everything","at":"2026-01-01T00:00:00Z"}\n');
    assert.throws(() => Journal.open(journal.path), { code: 'migration', message: /line 2 of the journal/ });
    writeFileSync(journal.path, '{"kind":"begin","step":"claim","at":"2026-01-01T00:00:00Z"}\n');
    assert.throws(() => Journal.open(journal.path), {
      code: 'migration',
      message: /does not begin with a plan/,
    });
  });

  test('lists moves, oldest first, and knows which are unfinished', async () => {
    assert.deepEqual(Journal.list(folder), []);
    const first = Journal.create(folder, { ...(await newPlan()), createdAt: '2026-01-01T00:00:00.000Z' });
    first.append({ kind: 'finish', outcome: 'moved', why: null }, true);
    first.close();
    const second = Journal.create(folder, { ...(await newPlan()), createdAt: '2026-01-02T00:00:00.000Z' });
    second.close();
    writeFileSync(join(folder, 'torn.jsonl'), '{"kind":"plan","pl');
    assert.deepEqual(
      Journal.list(folder).map(({ id, vm, finished }) => [id, vm, finished]),
      [
        [first.plan.id, VM, true],
        [second.plan.id, VM, false],
      ],
    );
  });

  test('is for one coordinator; the lock of one that is gone counts for nothing', async () => {
    const journal = Journal.create(folder, await newPlan());
    assert.throws(() => Journal.open(journal.path), /another coordinator/);
    journal.close();
    writeFileSync(`${journal.path}.lock`, '999999999\n');
    Journal.open(journal.path).close();
    // Its number is another process's by now, as after a restart of the machine.
    writeFileSync(`${journal.path}.lock`, `${process.ppid} 1\n`);
    Journal.open(journal.path).close();
  });
});
