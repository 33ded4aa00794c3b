/**
 * Pre-copy: the destination copies blocks while the machine works at the source, in rounds. A round ends when the destination has all it wants; the
 * source then begins the next one, and the destination drops what it tells to have changed in the last.
 *
 * - Each call may be repeated, and a coordinator that was killed goes on where the hosts are: the round the destination knows is asked for, not kept.
 * - It ends when little is left, when rounds do not get shorter (the guest changes as much as the link carries), or when its time is over. The machine
 *   moves then; what is left, and what changes until the switch, comes after it, as every block does with `--switch now`.
 */
import { BlockferryError } from '../errors.js';
import type { HostControl, ServedVolume } from '../host/control/api.js';
import { delay } from '../host/waiting.js';
import type { StepContext } from './perform.js';
import type { MovePlan } from './plan.js';

/** So much may be left when the machine moves, or so many milliseconds' worth of the link. */
const LEFT_BYTES_MAX = 4 << 20;
const LEFT_MS_MAX = 1_000;
/** A round that changed more than this share of the one before is no progress; so many in turn are enough. */
const PROGRESS_MIN = 0.8;
const STUCK_ROUNDS_MAX = 2;
/** Of `hot`: what changed while it was copied is fetched once more. */
const HOT_ROUNDS = 1;
/** What passes when a host or a link is back. */
const PASSING: ReadonlySet<string> = new Set(['control', 'timeout', 'source-unreachable', 'closed']);
/** Between two looks at the destination. */
const POLL_MS_MAX = 200;
/** Between two rounds while the memory is on its way. */
const ROUND_MS_MIN = 1_000;

export async function copyAhead(context: StepContext): Promise<void> {
  const rounds = new Rounds(context);
  const { plan, timing, signal, progress } = context;
  const deadline = performance.now() + plan.preCopyMsMax;
  for (let stuck = 0, before = Number.POSITIVE_INFINITY, round = 0; ; round++) {
    for (;;) {
      const volumes = await rounds.viewsPatiently();
      progress({ kind: 'pre-copy', volumes });
      if (performance.now() >= deadline) return;
      if (volumes.every((volume) => isReady(plan, volume))) break;
      if (signal.aborted)
        throw new BlockferryError('migration', 'interrupted while blocks were copied ahead');
      await delay(Math.min(timing.pollMs, POLL_MS_MAX));
    }
    if (plan.switch === 'hot' && round >= HOT_ROUNDS) return;
    const { changedBytes, leftBytesMax } = await rounds.patiently(() => rounds.refresh());
    if (plan.switch === 'hot') continue;
    if (changedBytes <= leftBytesMax) return;
    stuck = changedBytes > before * PROGRESS_MIN ? stuck + 1 : 0;
    before = changedBytes;
    if (stuck >= STUCK_ROUNDS_MAX) return;
  }
}

/** Whether all has crossed that should before the machine moves, as far as the last round told. */
function isReady({ switch: when }: MovePlan, { preCopy }: ServedVolume): boolean {
  if (preCopy === null || preCopy.caughtUp) return true;
  return when === 'hot' && preCopy.hotDone;
}

export class Rounds {
  readonly #plan: MovePlan;
  readonly #from: HostControl;
  readonly #to: HostControl;
  readonly #context: StepContext;
  /** When a volume's copy was first seen to stand still. */
  readonly #stoppedAtMs = new Map<string, number>();
  #refreshedAtMs = performance.now();
  #refreshing = false;

  constructor(context: StepContext) {
    this.#context = context;
    this.#plan = context.plan;
    this.#from = context.from;
    this.#to = context.to;
  }

  /** A host that is out of reach for a while, or restarts, does not end a long copy. */
  async patiently<Result>(act: () => Promise<Result>): Promise<Result> {
    const { timing, progress, signal } = this.#context;
    const deadline = performance.now() + timing.patienceMs;
    for (;;) {
      try {
        return await act();
      } catch (error) {
        const passing = error instanceof BlockferryError && PASSING.has(error.code);
        if (!passing || signal.aborted || performance.now() > deadline) throw error;
        progress({ kind: 'waiting', why: error.message });
        await delay(timing.retryDelayMs);
      }
    }
  }

  /** As `views`. Throws 'migration' where the copy has come to a stop. */
  async viewsPatiently(): Promise<ServedVolume[]> {
    const views = await this.patiently(() => this.views());
    for (const { name, error, background } of views) {
      if (error === null || background.state === 'running') this.#stoppedAtMs.delete(name);
      else if (performance.now() - this.#since(name) > this.#context.timing.patienceMs)
        throw new BlockferryError('migration', `the copy of "${name}" stands still: ${error}`);
    }
    return views;
  }

  #since(name: string): number {
    const now = performance.now();
    const since = this.#stoppedAtMs.get(name) ?? now;
    this.#stoppedAtMs.set(name, since);
    return since;
  }

  /** The destination's volumes, in the plan's order. */
  views(): Promise<ServedVolume[]> {
    return Promise.all(
      this.#plan.volumes.map(async ({ name }) => {
        const view = await this.#to.volume(name);
        if (view.phase !== 'unavailable') return view;
        throw new BlockferryError('migration', `volume "${name}" is not served any more: ${view.error}`);
      }),
    );
  }

  /** Begins the next round: what changed in the last one is copied again. Answers how much that is, and how much of it needs no further round. */
  async refresh(): Promise<{ changedBytes: number; leftBytesMax: number }> {
    const sum = { changedBytes: 0, leftBytesMax: LEFT_BYTES_MAX };
    const views = await this.views();
    const rounds = await Promise.allSettled(
      views.map(async ({ name, preCopy, background }) => {
        const known = preCopy?.cookie ?? null;
        if (known === null) return;
        const { cookie, changedBytes } = await this.#from.cut(name, this.#plan.id, known);
        await this.#to.refresh(name, known, cookie);
        sum.changedBytes += changedBytes;
        sum.leftBytesMax += (background.rateBytesPerSecond * LEFT_MS_MAX) / 1000;
      }),
    );
    for (const round of rounds) if (round.status === 'rejected') throw round.reason;
    this.#refreshedAtMs = performance.now();
    return sum;
  }

  /**
   * While the memory is on its way: so that little is left at the switch. Which works without as well, and nobody waits for it: a machine that stands
   * still must not.
   */
  async refreshIfDue(): Promise<void> {
    if (this.#refreshing || performance.now() - this.#refreshedAtMs < ROUND_MS_MIN) return;
    this.#refreshing = true;
    const done = (): void => {
      this.#refreshedAtMs = performance.now();
      this.#refreshing = false;
    };
    await this.refresh().then(done, done);
  }
}
