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
      const volumes = await rounds.views();
      progress({ kind: 'pre-copy', volumes });
      if (performance.now() >= deadline) return;
      if (volumes.every((volume) => isReady(plan, volume))) break;
      if (signal.aborted)
        throw new BlockferryError('migration', 'interrupted while blocks were copied ahead');
      await delay(Math.min(timing.pollMs, POLL_MS_MAX));
    }
    if (plan.switch === 'hot' && round >= HOT_ROUNDS) return;
    const { changedBytes, leftBytesMax } = await rounds.refresh();
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
  #refreshedAtMs = performance.now();

  constructor({ plan, from, to }: Pick<StepContext, 'plan' | 'from' | 'to'>) {
    this.#plan = plan;
    this.#from = from;
    this.#to = to;
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
    await Promise.all(
      views.map(async ({ name, preCopy, background }) => {
        const known = preCopy?.cookie ?? null;
        if (known === null) return;
        const { cookie, changedBytes } = await this.#from.cut(name, this.#plan.id, known);
        await this.#to.refresh(name, known, cookie);
        sum.changedBytes += changedBytes;
        sum.leftBytesMax += (background.rateBytesPerSecond * LEFT_MS_MAX) / 1000;
      }),
    );
    this.#refreshedAtMs = performance.now();
    return sum;
  }

  /** While the memory is on its way: so that little is left at the switch. Which works without as well, only more is left. */
  async refreshIfDue(): Promise<void> {
    if (performance.now() - this.#refreshedAtMs < ROUND_MS_MIN) return;
    try {
      await this.refresh();
    } catch (error) {
      if (!(error instanceof BlockferryError)) throw error;
      this.#refreshedAtMs = performance.now();
    }
  }
}
