/**
 * A real guest is copied ahead while it works, between real daemons: coordinators and daemons are killed meanwhile, and it comes home to its old image.
 * `BLOCKFERRY_PRE_COPY_MOVES=1` makes the long form: every daemon killed at every turn of a move, a boot of the guest each.
 */
import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { existsSync } from 'node:fs';
import { before, describe, test } from 'node:test';
import type { HostControl } from '../../src/host/control/api.js';
import { buildGuest, type Guest } from '../lab/guest.js';
import { runBlockferry } from '../lab/hosts.js';
import { checkRawDisk } from '../lab/records.js';
import { TwoHosts } from '../lab/two-hosts.js';
import { labMissing, type WorkloadOptions } from '../lab/vm.js';

const WORKLOAD: WorkloadOptions = { mode: 'raw', slots: 8192, rate: 400, dirty: 16 };
const missing = (await labMissing()) ?? false;
const LONG =
  missing ||
  (process.env.BLOCKFERRY_PRE_COPY_MOVES === undefined && 'a long form: BLOCKFERRY_PRE_COPY_MOVES=1');

let guest: Guest;
before(async () => {
  if (missing === false) guest = await buildGuest();
});

/** Acts once, before that call. */
function strikeBefore<Verb extends keyof HostControl>(
  host: HostControl,
  verb: Verb,
  act: () => Promise<void>,
): void {
  const real = (host[verb] as unknown as (...words: unknown[]) => Promise<unknown>).bind(host);
  let due = true;
  Object.assign(host, {
    [verb]: async (...words: unknown[]) => {
      if (due) {
        due = false;
        await act();
      }
      return real(...words);
    },
  });
}

test('aborted, killed, moved and brought home: a guest that works all the time loses nothing', {
  skip: missing,
}, async (t) => {
  const lab = await TwoHosts.open(t, guest, WORKLOAD);
  const { monitor } = lab;

  // A coordinator dies while blocks are copied ahead, and a person undoes what it did.
  let coordinator: ChildProcess | undefined;
  const words = ['migrate', 'vm1', '--from', lab.a.control, '--to', lab.b.control, '--state-dir', lab.folder];
  const killed = await runBlockferry([...words, '--switch', 'all'], {
    onStart: (child) => {
      coordinator = child;
    },
    onLine: (line) => line.startsWith('pre-copy') && coordinator!.kill('SIGKILL'),
  });
  assert.equal(killed.code, null);
  const standby = await lab.b.client.volume('disk');
  assert.equal(standby.phase, 'standby');
  const undone = await runBlockferry(['migrate', 'vm1', '--abort', '--state-dir', lab.folder]);
  assert.equal(undone.code, 0, undone.stderr);
  await lab.expectNothingAtB();

  // The destination's daemon dies between a cut and its list; what was copied is still there, and the move goes on.
  const listening = lab.listenAt('b');
  const moved = await lab.migrateWith(
    (_from, to) => strikeBefore(to, 'refresh', () => lab.restart('b')),
    'all',
  );
  assert.equal(moved.outcome, 'moved', moved.why ?? '');
  await listening;
  await monitor.progress('b', { count: 30, records: 30 });

  // It comes home: what changed meanwhile, and not the whole disk, crosses.
  const home = await lab.migrate('a', '--switch', 'all');
  await monitor.progress('a', { count: 30, records: 30 });
  const bytes = home.demandBytes + home.backgroundBytes;
  t.diagnostic(`there ${moved.demandBytes + moved.backgroundBytes} bytes, and back ${bytes}`);
  assert.ok(bytes > 0 && bytes < 16 << 20, `${bytes} bytes came home`);
  assert.equal(await lab.a.imageOf('disk'), lab.image);
  await lab.verify(lab.a);
});

describe('a daemon is killed under a guest', { skip: LONG }, () => {
  type Moment = [name: string, role: 'from' | 'to', verb: keyof HostControl];
  const moments: Moment[] = [
    ['while blocks are copied ahead', 'to', 'volume'],
    ['at a cut', 'from', 'cut'],
    ['between a cut and its list', 'to', 'refresh'],
    ['before the seal', 'from', 'seal'],
    ['between seal and takeover', 'to', 'takeover'],
    ['behind the switch', 'to', 'waitHandoff'],
  ];
  for (const [name, role, verb] of moments) {
    for (const victim of ['a', 'b'] as const) {
      test(`${victim === 'a' ? "the source's" : "the destination's"}, ${name}`, async (t) => {
        const lab = await TwoHosts.open(t, guest, WORKLOAD);
        const pids = new Set<number>();
        t.after(() => {
          // Machines that outlive their daemon are nobody's.
          for (const pid of pids) {
            try {
              process.kill(pid, 'SIGKILL');
            } catch {
              // it has ended
            }
          }
        });
        const note = async (): Promise<void> => {
          for (const host of [lab.a, lab.b]) {
            const view = await host.client.machine('vm1').catch(() => null);
            if (view?.pid != null) pids.add(view.pid);
          }
        };
        const listening = lab.listenAt('b');
        listening.catch(() => undefined);
        const strike = (from: HostControl, to: HostControl): void =>
          strikeBefore(role === 'from' ? from : to, verb, async () => {
            await note();
            await lab.restart(victim);
          });
        const result = await lab.migrateWith(strike, 'all').catch((error: unknown) => String(error));
        const outcome = typeof result === 'string' ? result : result.outcome;
        t.diagnostic(`${outcome}${typeof result === 'string' ? '' : `: ${result.why}`}`);
        const [here, there] = await Promise.all(
          [lab.a, lab.b].map((host) => host.client.volume('disk').catch(() => null)),
        );
        const open = [here, there].filter((view) => view?.phase === 'plain' || view?.phase === 'relocating');
        assert.equal(open.length, 1, `${here?.phase}, ${there?.phase}: ${outcome}`);
        const at = open[0] === here ? 'a' : 'b';
        const works = await lab.monitor.progress(at, { count: 30, records: 30, timeoutMs: 15_000 }).then(
          () => true,
          () => false,
        );
        t.diagnostic(`at ${at}, ${works ? 'works on' : 'stands still'}`);
        if (works) await lab.verify(lab[at]);
        else {
          // A machine whose daemon died in its switch stands still where it was: its disk is whole.
          assert.ok(victim === 'a' && at === 'a', 'the machine stands still');
          assert.deepEqual((await checkRawDisk(lab.image, WORKLOAD.slots)).badSlots, []);
        }
        assert.ok(existsSync(lab.image));
        assert.deepEqual(lab.monitor.complaints, []);
      });
    }
  }
});
