/**
 * Moves that copy ahead, with real daemons that are killed at the worst moments, answers that are lost, coordinators that die, and links that
 * stand still. The machine goes on on one side, with everything it ever wrote, and never two sides are open to its writes. It moves there and back
 * all the time: so a volume that comes home to its old image is met by the same faults.
 *
 * `BLOCKFERRY_PRE_COPY_MOVES=N` makes N moves more, with faults at random; `BLOCKFERRY_SEED=N` repeats one run.
 */
import assert from 'node:assert/strict';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { after, before, describe, type TestContext, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../../src/errors.js';
import type { MoveResult } from '../../src/migration/result.js';
import { Random, SEED } from '../lab/crash/random.js';
import { type Call, type Faults, Killed, Moves, type Role, type Side } from '../lab/moves.js';
import { patterned } from '../support/volume.js';

const BYTES = 16 << 20;
const MOVES = Number(process.env.BLOCKFERRY_PRE_COPY_MOVES ?? 0);
const LONG = MOVES > 0 ? false : 'a long form: BLOCKFERRY_PRE_COPY_MOVES=N';
/** Longer than a round, at least, while the memory is on its way. */
const ROUND_MS = 1_050;
/** Longer than a destination waits for the list of changes at its takeover. */
const STANDSTILL_MS = 10_500;

let moves: Moves;
before(async () => {
  moves = await Moves.open({ seed: SEED, content: patterned(BYTES) });
});
after(() => moves.close());

const random = new Random(SEED);

function isCall(call: Call, role: Role, verb: string, nth = 0): boolean {
  return call.role === role && call.verb === verb && call.nth === nth;
}

interface Fault extends Faults {
  /** Whether it came to that. */
  met: boolean;
}

/** Once, before that call or behind it; then its answer is lost. */
function once(
  when: 'before' | 'after',
  at: [role: Role, verb: string, nth?: number],
  act: () => Promise<void>,
): Fault {
  const fault: Fault = {
    met: false,
    before: async (call) => {
      // The second round begins while the memory is on its way, if that takes its time.
      if ((at[2] ?? 0) > 0 && isCall(call, 'from', 'waitMigration')) await delay(ROUND_MS);
      if (when === 'before') await strike(call);
    },
    after: async (call) => {
      if (when === 'after' && (await strike(call)))
        throw new BlockferryError('control', 'the answer was lost');
    },
  };
  const strike = async (call: Call): Promise<boolean> => {
    if (!isCall(call, ...at)) return false;
    fault.met = true;
    await act();
    return true;
  };
  return fault;
}

/** The source's and the destination's, of the move that is next. */
const sides = (): Record<Role, Side> => ({ from: moves.here, to: moves.there });

function told(t: TestContext, result: MoveResult): void {
  t.diagnostic(
    `seed ${SEED}: ${result.outcome}, ${result.backgroundBytes + result.demandBytes} bytes; ${result.why ?? ''}`,
  );
}

/** Moments of a move, in their order. */
const MOMENTS: [name: string, role: Role, verb: string, nth?: number][] = [
  ['tracking begins', 'from', 'track'],
  ['the standby is made', 'to', 'createVolume'],
  ['blocks are copied ahead', 'to', 'volume', 3],
  ['a round is cut', 'from', 'cut'],
  ['a cut is taken to heart', 'to', 'refresh'],
  ['the memory is on its way', 'from', 'waitMigration', 1],
  ['a round is cut meanwhile', 'from', 'cut', 1],
  ['a cut is taken to heart meanwhile', 'to', 'refresh', 1],
  ['the seal', 'from', 'seal'],
  ['the takeover', 'to', 'takeover'],
  ['the switch', 'from', 'migrateContinue'],
  ['the blocks that are left follow', 'to', 'waitHandoff'],
  ['the source retires', 'from', 'retire'],
];

/** Which of the kills every run makes: before the call or behind it, of the source's daemon (from) or the destination's (to). */
const SHORT = new Set([
  'to after createVolume 0',
  'from before volume 3',
  'to before volume 3',
  'from after cut 0',
  'to after cut 0',
  'from before refresh 0',
  'to before refresh 1',
  'from after seal 0',
  'from before takeover 0',
  'to before takeover 0',
  'to after takeover 0',
  'from before waitHandoff 0',
]);

describe('a daemon is killed and comes back', () => {
  for (const [name, role, verb, nth = 0] of MOMENTS) {
    for (const victim of ['from', 'to'] as const) {
      for (const when of ['before', 'after'] as const) {
        const skip = SHORT.has(`${victim} ${when} ${verb} ${nth}`) ? false : LONG;
        const whose = victim === 'from' ? "the source's" : "the destination's";
        test(`${whose}, ${when} this: ${name}`, { skip }, async (t) => {
          const side = sides()[victim];
          const faults = once(when, [role, verb, nth], () => side.restart());
          told(t, await moves.move('all', faults, random.pick(['forward', 'back'])));
          assert.ok(faults.met);
        });
      }
    }
  }
});

describe('a coordinator is killed while blocks are copied ahead', () => {
  async function killedAt(
    role: Role,
    verb: string,
    nth: number,
    then: 'forward' | 'back',
  ): Promise<MoveResult> {
    const killed = (call: Call): void => {
      if (isCall(call, role, verb, nth)) throw new Killed();
    };
    return moves.move('all', { before: killed }, then);
  }

  test('and the move is continued', async () => {
    assert.equal((await killedAt('to', 'volume', 3, 'forward')).outcome, 'moved');
    assert.equal((await killedAt('to', 'refresh', 0, 'forward')).outcome, 'moved');
  });

  test('and undone: the standby and its image are gone, and nobody tracks the source', async () => {
    for (const [verb, nth] of [
      ['volume', 3],
      ['refresh', 0],
    ] as const) {
      const { from, to } = sides();
      const images = to.images;
      assert.equal((await killedAt('to', verb, nth, 'back')).outcome, 'aborted');
      assert.deepEqual(to.images, images);
      const [here, there] = [await from.view(), await to.view()];
      assert.ok(here?.phase === 'plain' && (here.tracking === null || here.tracking.moveId === null));
      assert.ok(there === null || there.phase === 'unavailable' || there.phase === 'retired');
    }
  });
});

describe('a source that stands still', () => {
  test('for a while in a round: the move waits, and goes on', async () => {
    const { from } = sides();
    const stopped = async (call: Call): Promise<void> => {
      if (!isCall(call, 'to', 'refresh')) return;
      from.signal('SIGSTOP');
      setTimeout(() => from.signal('SIGCONT'), 300);
    };
    assert.equal((await moves.move('all', { before: stopped })).outcome, 'moved');
  });

  test('so that the last list before the switch is lost: what was copied counts all the same', {
    skip: LONG,
  }, async (t) => {
    moves.guest.paceMs = 50;
    t.after(() => {
      moves.guest.paceMs = 1;
    });
    await moves.here.restart(); // it is no home that it moves to
    const faults = once('before', ['to', 'refresh', 1], () =>
      Promise.reject(new BlockferryError('source-unreachable', 'the list is lost')),
    );
    const { outcome, backgroundBytes, demandBytes } = await moves.move('all', faults);
    assert.ok(faults.met && outcome === 'moved');
    assert.ok(backgroundBytes + demandBytes < 1.5 * BYTES, `${backgroundBytes + demandBytes} bytes came`);
  });

  test('at the takeover: the machine is let run again at the source', { skip: LONG }, async (t) => {
    const { from } = sides();
    const stopped = async (call: Call): Promise<void> => {
      if (!isCall(call, 'to', 'takeover')) return;
      from.signal('SIGSTOP');
      setTimeout(() => from.signal('SIGCONT'), STANDSTILL_MS);
    };
    const result = await moves.move('all', { before: stopped });
    told(t, result);
    assert.equal(result.outcome, 'aborted');
    assert.match(result.why!, /did not tell its changes/);
  });
});

describe('a volume that comes home', () => {
  before(() => {
    moves.guest.paceMs = 10;
  });
  after(() => {
    moves.guest.paceMs = 1;
  });

  /** Moves until both hosts have an image of the volume, and what changed since is known. Gives the one it is to come home to. */
  async function away(): Promise<string> {
    for (let count = 0; count < 2; count++) assert.equal((await moves.move('now')).outcome, 'moved');
    const [here, there] = [await moves.here.view(), await moves.there.view()];
    assert.ok(here?.phase === 'plain' && here.tracking?.since === there?.home && there !== null);
    return there.image;
  }

  /** Moves, and says whether it came home to that image. */
  async function comesTo(image: string, when: 'all' | 'now' = 'now', faults: Faults = {}): Promise<boolean> {
    const result = await moves.move(when, faults);
    const here = await moves.here.view();
    if (result.outcome !== 'moved') return false;
    assert.ok(here !== null);
    // What came over the link tells the same, but for what the guest wrote there before it came.
    const came = result.backgroundBytes + result.demandBytes + result.zeroBytes;
    assert.equal(here.image === image, came < BYTES / 2, `${came} bytes came`);
    return here.image === image;
  }

  for (const when of ['now', 'all'] as const) {
    test(`needs what changed since, and nothing else (--switch ${when})`, async () => {
      assert.ok(await comesTo(await away(), when));
    });
  }

  test('over a stop of both daemons in order as well', { skip: LONG }, async () => {
    const image = await away();
    await moves.guest.pause(); // what it changes meanwhile is not to be much
    await moves.here.reboot();
    await moves.there.reboot();
    moves.guest.resume(moves.here.guestUri);
    assert.ok(await comesTo(image));
  });

  test('after its daemon was killed needs all: nobody knows what changed', async () => {
    const image = await away();
    await moves.here.restart();
    const view = await moves.here.view();
    assert.ok(view?.phase === 'plain' && view.tracking === null);
    assert.ok(!(await comesTo(image)));
  });

  test('to an image that was touched needs all, and leaves that image alone', async () => {
    const image = await away();
    writeFileSync(image, 'touched', { flag: 'r+' });
    const touched = readFileSync(image);
    assert.equal((await moves.there.view())?.home, null);
    assert.ok(!(await comesTo(image)));
    assert.ok(readFileSync(image).equals(touched));
  });

  test('to an image that is touched between the plan and the move is not taken for what it was', {
    skip: LONG,
  }, async () => {
    const image = await away();
    const faults = once('before', ['to', 'createVolume'], async () =>
      writeFileSync(image, 'touched', { flag: 'r+' }),
    );
    assert.equal((await moves.move('all', faults, 'back')).outcome, 'aborted');
    assert.ok(!(await comesTo(image)));
  });

  test('of an image that was touched while its daemon was stopped here needs all', async () => {
    const image = await away();
    const view = await moves.here.view();
    await moves.here.reboot(() => {
      assert.ok(view !== null);
      writeFileSync(view.image, moves.guest.content.subarray(0, 1), { flag: 'r+' }); // the guest must find what it wrote
    });
    assert.ok(!(await comesTo(image)));
  });

  test('that is aborted half way needs all the next time', async () => {
    const image = await away();
    const faults = once('before', ['from', 'seal'], () =>
      Promise.reject(new BlockferryError('image-io', 'the seal fails')),
    );
    assert.equal((await moves.move('all', faults)).outcome, 'aborted');
    assert.ok(existsSync(image), 'its image is left');
    assert.ok(!(await comesTo(image)));
  });

  const kills: [string, Role, string, number][] = [
    ['while it copies ahead', 'to', 'volume', 2],
    ['before the list is asked for', 'to', 'takeover', 0],
    ['while the source begins to tell', 'to', 'createVolume', 0],
  ];
  for (const [name, role, verb, nth] of kills) {
    test(`whose daemon at home is killed ${name}`, { skip: verb === 'volume' ? false : LONG }, async (t) => {
      await away();
      const { to } = sides();
      told(
        t,
        await moves.move(
          'all',
          once('before', [role, verb, nth], () => to.restart()),
        ),
      );
    });
  }
});

describe('at random', { skip: LONG }, () => {
  const random = new Random(SEED);
  /** In the midst of the call, or of what follows. */
  async function later(act: () => Promise<void>): Promise<void> {
    moves.beside.push(delay(random.below(40)).then(act));
  }

  for (let number = 0; number < MOVES; number++) {
    test(`move ${number}`, async (t) => {
      const { from, to } = sides();
      const [, role, verb, last = 0] = random.pick(MOMENTS);
      const nth = random.below(last + 2);
      const acts: [string, () => Promise<void>][] = [
        ['the source is killed', () => from.restart()],
        ['the destination is killed', () => to.restart()],
        ['the source is killed a little later', () => later(() => from.restart())],
        ['the destination is killed a little later', () => later(() => to.restart())],
        ['the source is stopped and started in order', () => from.reboot()],
        ['the destination is stopped and started in order', () => to.reboot()],
        ['both are killed', async () => void (await Promise.all([from.restart(), to.restart()]))],
        ['the coordinator is killed', () => Promise.reject(new Killed())],
        ['it takes its time', () => delay(random.below(50))],
        [
          'the source stands still',
          async () => {
            from.signal('SIGSTOP');
            setTimeout(() => from.signal('SIGCONT'), random.below(500));
          },
        ],
      ];
      const [what, act] = random.pick(acts);
      const when = random.pick(['before', 'after'] as const);
      const then = random.pick(['forward', 'back'] as const);
      const way = random.pick(['all', 'all', 'hot', 'now'] as const);
      t.diagnostic(`${what} ${when} ${role}.${verb} ${nth}, --switch ${way}, then ${then}`);
      told(t, await moves.move(way, once(when, [role, verb, nth], act), then));
    });
  }
});
