/** Rounds of a pre-copy: when the next one begins, and when the machine moves. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import type { HostControl, ServedVolume } from '../../../src/host/control/api.js';
import type { MoveProgress, StepContext } from '../../../src/migration/perform.js';
import type { MovePlan, Switch } from '../../../src/migration/plan.js';
import { copyAhead, Rounds } from '../../../src/migration/rounds.js';
import { failsWith } from '../../support/volume.js';

const MIB = 1 << 20;
const FIRST = 100;

interface Script {
  switch?: Switch;
  names?: string[];
  /** What each cut says to have changed, of each volume; the last one again and again. */
  changed?: number[];
  /** Looks at the destination until a round is over there. */
  looks?: number;
  hotDone?: boolean;
  /** It never has all. */
  never?: boolean;
  preCopyMsMax?: number;
  rate?: number;
}

/** Both hosts, as rounds see them. */
class World {
  /** 'cut a 100', 'refresh a 100 101', in order. */
  readonly calls: string[] = [];
  readonly progress: MoveProgress[] = [];
  readonly abort = new AbortController();
  readonly cookies = new Map<string, number>();
  looksLeft: number;
  looks = 0;
  cuts = 0;
  unavailable = false;
  withoutRounds = false;
  refuse: 'cut' | 'refresh' | null = null;
  onLook: () => void = () => undefined;

  constructor(readonly script: Script) {
    this.looksLeft = script.looks ?? 0;
    for (const name of this.names) this.cookies.set(name, FIRST);
  }

  get names(): string[] {
    return this.script.names ?? ['a'];
  }

  get context(): StepContext {
    const { switch: when = 'all', preCopyMsMax = 60_000 } = this.script;
    const volumes = this.names.map((name) => ({ name }));
    return {
      plan: { id: 'move', switch: when, preCopyMsMax, volumes } as unknown as MovePlan,
      from: this.from as unknown as HostControl,
      to: this.to as unknown as HostControl,
      timing: { pollMs: 1, runningTimeoutMs: 1, patienceMs: 1, retryDelayMs: 1 },
      signal: this.abort.signal,
      progress: (event: MoveProgress) => this.progress.push(event),
    } as unknown as StepContext;
  }

  readonly from = {
    cut: async (name: string, move: string, cookie: number) => {
      if (this.refuse === 'cut') throw new BlockferryError('generation', 'no');
      assert.equal(move, 'move');
      this.calls.push(`cut ${name} ${cookie}`);
      const { changed = [0] } = this.script;
      const round = Math.min(Math.floor(this.cuts++ / this.names.length), changed.length - 1);
      return { cookie: cookie + 1, changedBytes: changed[round]! };
    },
  };

  readonly to = {
    volume: async (name: string): Promise<ServedVolume> => {
      this.looks++;
      this.onLook();
      if (this.unavailable) return { name, phase: 'unavailable', error: 'broken' } as unknown as ServedVolume;
      const caughtUp = this.script.never !== true && this.looksLeft-- <= 0;
      const { hotDone = false, rate = 0 } = this.script;
      const preCopy = { cookie: this.cookies.get(name)!, caughtUp, hotDone, missingBytes: 0 };
      return {
        name,
        phase: 'standby',
        preCopy: this.withoutRounds ? null : preCopy,
        background: { rateBytesPerSecond: rate },
        error: null,
      } as unknown as ServedVolume;
    },
    refresh: async (name: string, from: number, to: number) => {
      if (this.refuse === 'refresh') throw new BlockferryError('generation', 'no');
      this.calls.push(`refresh ${name} ${from} ${to}`);
      assert.equal(this.cookies.get(name), from);
      this.cookies.set(name, to);
      this.looksLeft = this.script.looks ?? 0;
    },
  };

  get rounds(): number {
    return this.cookies.get(this.names[0]!)! - FIRST;
  }
}

async function copied(script: Script): Promise<World> {
  const world = new World(script);
  await copyAhead(world.context);
  return world;
}

describe('--switch all', () => {
  test('goes on while rounds get shorter, until little is left', async () => {
    const world = await copied({ changed: [800 * MIB, 300 * MIB, 100 * MIB, 20 * MIB, 4 * MIB, 0] });
    assert.equal(world.rounds, 5);
    assert.deepEqual(world.calls.slice(0, 4), [
      'cut a 100',
      'refresh a 100 101',
      'cut a 101',
      'refresh a 101 102',
    ]);
  });

  test('waits for the end of each round, and shows how far it is', async () => {
    const world = await copied({ changed: [40 * MIB, 0], looks: 4 });
    assert.equal(world.rounds, 2);
    // Five looks a round at the destination, and one by each refresh.
    assert.equal(world.looks, 12);
    assert.ok(world.progress.every((event) => event.kind === 'pre-copy' && event.volumes[0]!.name === 'a'));
    assert.equal(world.progress.length, 10);
  });

  test('ends when two rounds in turn are no shorter: the guest changes as much as the link carries', async () => {
    assert.equal((await copied({ changed: [100 * MIB] })).rounds, 3);
    assert.equal((await copied({ changed: [100 * MIB, 90 * MIB, 85 * MIB] })).rounds, 3);
    assert.equal((await copied({ changed: [100 * MIB, 200 * MIB, 400 * MIB] })).rounds, 3);
    // One that is stuck, and then is not.
    assert.equal((await copied({ changed: [100, 95, 50, 49, 20, 1].map((mib) => mib * MIB) })).rounds, 6);
  });

  test('what the link carries in a second may be left', async () => {
    assert.equal((await copied({ changed: [100 * MIB, 60 * MIB, 0], rate: 60 * MIB })).rounds, 2);
    assert.equal((await copied({ changed: [100 * MIB, 60 * MIB, 0], rate: 50 * MIB })).rounds, 3);
  });

  test('ends when its time is over, also in the midst of a round', async () => {
    const world = await copied({ never: true, preCopyMsMax: 20 });
    assert.equal(world.rounds, 0);
    assert.ok(world.progress.length > 0);
  });

  test('several disks: a round ends when all have ended it, and what is left is the sum', async () => {
    const world = await copied({ names: ['a', 'b'], changed: [3 * MIB, MIB] });
    assert.equal(world.rounds, 2, '6 MiB are too much, 2 are not');
    assert.deepEqual([...world.cookies.values()], [FIRST + 2, FIRST + 2]);
  });
});

describe('--switch hot', () => {
  test('waits for what the machine reads, and once more for what changed of it meanwhile', async () => {
    const world = await copied({ switch: 'hot', never: true, hotDone: true, changed: [500 * MIB] });
    assert.equal(world.rounds, 1);
  });

  test('is content with all as well, where nothing is hot', async () => {
    assert.equal((await copied({ switch: 'hot', changed: [0] })).rounds, 1);
  });

  test('that is not done is waited for until the time is over', async () => {
    assert.equal((await copied({ switch: 'hot', never: true, preCopyMsMax: 20 })).rounds, 0);
  });
});

describe('what goes wrong', () => {
  test('an interrupted coordinator ends the wait', async () => {
    const world = new World({ never: true });
    world.onLook = () => world.looks >= 3 && world.abort.abort();
    await assert.rejects(copyAhead(world.context), failsWith('migration', /interrupted/));
    assert.equal(world.rounds, 0);
  });

  test('a volume that is not served any more', async () => {
    const world = new World({});
    world.unavailable = true;
    await assert.rejects(
      copyAhead(world.context),
      failsWith('migration', /"a" is not served any more: broken/),
    );
  });

  test('a source or a destination that refuses the round fails the step', async () => {
    for (const refuse of ['cut', 'refresh'] as const) {
      const world = new World({});
      world.refuse = refuse;
      await assert.rejects(copyAhead(world.context), failsWith('generation'));
    }
  });

  test('a volume without rounds needs none, and is ready', async () => {
    const world = new World({ never: true });
    world.withoutRounds = true;
    await copyAhead(world.context);
    assert.deepEqual(world.calls, []);
  });
});

describe('while the memory is on its way', () => {
  test('a round begins once a second, and one that fails is of no matter', async (t) => {
    let nowMs = 5000;
    t.mock.method(performance, 'now', () => nowMs);
    const world = new World({ changed: [MIB] });
    const rounds = new Rounds(world.context);
    nowMs += 999;
    await rounds.refreshIfDue();
    assert.equal(world.rounds, 0);
    nowMs += 1;
    await rounds.refreshIfDue();
    await rounds.refreshIfDue();
    assert.equal(world.rounds, 1);
    world.refuse = 'refresh';
    nowMs += 1000;
    await rounds.refreshIfDue();
    world.refuse = null;
    nowMs += 500;
    await rounds.refreshIfDue();
    assert.equal(world.rounds, 1, 'not at once again');
    nowMs += 500;
    await rounds.refreshIfDue();
    assert.equal(world.rounds, 2, 'the round the destination knows is asked for, not kept');
  });
});
