/** A kill of the process, or a crash of the machine, at any moment of a refresh and of a takeover of a standby that has blocks. */
import assert from 'node:assert/strict';
import { existsSync, readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { Errno } from '../../../src/nbd/constants.js';
import type { Volume } from '../../../src/volume/volume.js';
import {
  ahead,
  assertNothingStale,
  BLOCKS,
  blocksBut,
  changed,
  dirtyFile,
  MOVE,
  present,
  ROUND,
  rewrite,
  tells,
} from '../../support/pre-copy.js';
import { failsWith, type HeldSource, patterned, turns } from '../../support/volume.js';
import {
  afterKill,
  afterReboot,
  host,
  momentsOf,
  plainVolume,
  reopened,
  SIZE,
  sourceOf,
} from '../../support/volumes.js';

const B = 4096;

describe('killed or rebooted at any moment', () => {
  /** What the source becomes while the standby copies, and what it tells of it. */
  const REWRITTEN = [1, 2, 8];
  const RUNS = [1, 3, 8, 9];

  async function copied(root: string): Promise<{ volume: Volume; content: Buffer }> {
    const volume = await ahead(root);
    const source = sourceOf(volume);
    source.deliver(0, BLOCKS);
    assert.equal(await volume.store.commit(), Errno.OK);
    rewrite(source, ...REWRITTEN);
    return { volume, content: source.content };
  }

  test('a refresh: repeated, or with a takeover in its place, no stale block is here', async () => {
    const root = host();
    const { volume, content } = await copied(root);
    const source = volume.store.supplier as HeldSource;
    const refreshed = volume.refresh(ROUND, { runs: RUNS, cookie: ROUND + 1 });
    // The copy goes on in the very step in which blocks were dropped.
    const moments = await momentsOf(
      root,
      Promise.all([refreshed, turns(1).then(() => source.deliver(1, 3))]),
    );
    assert.ok(moments.length > 1);
    for (const [index, moment] of moments.entries()) {
      for (const leave of [afterKill, afterReboot]) {
        for (const way of ['refreshed', 'taken over'] as const) {
          const hint = `${leave.name} at ${index}, ${way}`;
          const again = await reopened(leave(moment, root));
          const { cookie } = again.preCopy!;
          assert.ok(cookie === ROUND || cookie === ROUND + 1, hint);
          if (leave === afterReboot) assert.deepEqual(present(again), [], hint);
          else if (cookie === ROUND + 1) assertNothingStale(again, content, hint);
          sourceOf(again); // of the old content: it must not be asked
          const list = { runs: RUNS, cookie: ROUND + 1 };
          if (way === 'refreshed') {
            await again.refresh(ROUND, list);
            assertNothingStale(again, content, hint);
            assert.equal(again.preCopy!.cookie, ROUND + 1, hint);
          }
          tells(again, list);
          await again.takeover(5);
          assertNothingStale(again, content, hint);
          await again.close();
        }
      }
    }
  });

  test('a takeover: what is present under the new generation is what the source had', async () => {
    const root = host();
    const { volume, content } = await copied(root);
    const list = { runs: RUNS, cookie: ROUND };
    tells(volume, list);
    const moments = await momentsOf(root, volume.takeover(5));
    let before = 0;
    let kept = 0;
    for (const [index, moment] of moments.entries()) {
      for (const leave of [afterKill, afterReboot]) {
        const hint = `${leave.name} at ${index}`;
        const left = leave(moment, root);
        const again = await reopened(left);
        if (again.phase === 'standby') {
          before++;
          assert.equal(again.store.dirty, null, hint);
          assert.ok(!existsSync(dirtyFile(left)), hint);
          if (leave === afterReboot) assert.deepEqual(present(again), [], hint);
          tells(again, list);
        } else {
          assert.equal(again.phase, 'relocating');
          // Killed between the identity and the live map, or crashed before a commit: nothing, and all is at the source.
          const here = present(again);
          const all = leave === afterKill && here.length > 0;
          assert.deepEqual(here, all ? blocksBut(...REWRITTEN) : [], hint);
          kept += Number(all);
          assert.equal(again.store.dirty, null, 'a kill ends what home is told');
        }
        assertNothingStale(again, again.phase === 'standby' ? staleAllowed(again, content) : content, hint);
        await again.takeover(5);
        assertNothingStale(again, content, hint);
        assert.equal(again.generation, 5, hint);
        await again.close();
      }
    }
    assert.ok(before > 0 && before < 2 * moments.length);
    assert.ok(kept > 0, 'a kill keeps what was copied ahead');
  });

  /** Before the takeover what the list names may be here as it was. */
  function staleAllowed(volume: Volume, content: Buffer): Buffer {
    const image = readFileSync(volume.store.image.path);
    const allowed = Buffer.from(content);
    for (const block of REWRITTEN) image.copy(allowed, block * B, block * B, Math.min((block + 1) * B, SIZE));
    return allowed;
  }

  test('a standby that is closed in order keeps its blocks in this boot, and none over a reboot', async () => {
    const root = host();
    const { volume } = await copied(root);
    await volume.close();
    const same = await reopened(afterKill(root));
    assert.deepEqual([present(same), same.preCopy!.cookie], [blocksBut(), ROUND]);
    assert.deepEqual(present(await reopened(afterReboot(root))), []);
  });

  test('the dirty map of a source: marks of answered writes are there', async () => {
    const root = host();
    const volume = await plainVolume(root);
    const { cookie } = await volume.track(MOVE, null);
    volume.store.writeNow(B, B, patterned(B, 3), 0);
    const next = (await volume.cut(MOVE, cookie)).cookie;
    volume.store.writeNow(4 * B, 10, patterned(10, 3), 0);
    const killed = await reopened(afterKill(root));
    assert.deepEqual([changed(killed), killed.store.dirty!.cookie], [[1, 4], next]);
    assert.equal((await killed.track(MOVE, null)).cookie, next, 'the move goes on');
    const rebooted = await reopened(afterReboot(root));
    assert.deepEqual([changed(rebooted), rebooted.store.dirty], [blocksBut(), null]);
    await assert.rejects(rebooted.cut(MOVE, next), failsWith('generation'));
    await killed.close();
    await rebooted.close();
  });
});
