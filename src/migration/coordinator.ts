/**
 * The coordinator: carries out one move, step by step, until it is complete or undone.
 *
 * It keeps no state of its own that matters. What is next follows from the hosts' facts (`nextStep`); after any failure, and when it
 * goes on with a move that another coordinator began, the facts are asked for again. The journal says what was attempted, and keeps
 * what cannot be asked for twice. So it can be killed at any line.
 */

import { BlockferryError } from '../errors.js';
import type { HostControl } from '../host/control/api.js';
import { delay } from '../host/waiting.js';
import { applyStep, observe } from './facts.js';
import type { Journal, StepResult } from './journal.js';
import { DEFAULT_TIMING, type MoveProgress, perform, type Timing } from './perform.js';
import { type MoveResult, moveResult } from './result.js';
import { type Direction, type Facts, FORWARD_STEPS, nextStep, type StepName } from './steps.js';

/** A step that failed is tried this often in all, where repeating is right. */
const ATTEMPTS_MAX = 3;
/** More steps than any move can need: a guard against going in circles. */
const STEPS_MAX = 200;

/** Steps whose end holds what cannot be asked for again. */
const DURABLE_ENDS: ReadonlySet<StepName> = new Set(['retreat', 'cancel-volumes', 'wait-running']);

export interface MoveOptions {
  from: HostControl;
  to: HostControl;
  journal: Journal;
  /** 'back' undoes the move (--abort). */
  direction: Direction;
  signal?: AbortSignal;
  progress?: (event: MoveProgress) => void;
  timing?: Timing;
}

/**
 * Resolves when the move is complete ('moved') or undone ('aborted', with the reason). Rejects with 'migration' when it can go neither
 * way for now; the message says what to do.
 */
export function runMove(options: MoveOptions): Promise<MoveResult> {
  return new Coordinator(options).run();
}

function comesAfter(later: StepName, earlier: StepName): boolean {
  const order: readonly StepName[] = FORWARD_STEPS;
  return order.indexOf(later) > order.indexOf(earlier);
}

class Coordinator {
  private readonly from: HostControl;
  private readonly to: HostControl;
  private readonly journal: Journal;
  private readonly timing: Timing;
  private readonly signal: AbortSignal;
  private readonly progress: (event: MoveProgress) => void;
  private direction: Direction;
  private readonly abortAsked: boolean;
  /** Why the move was turned back. */
  private why: string | null = null;
  private readonly attempts = new Map<StepName, number>();

  constructor(options: MoveOptions) {
    this.from = options.from;
    this.to = options.to;
    this.journal = options.journal;
    this.timing = options.timing ?? DEFAULT_TIMING;
    this.signal = options.signal ?? new AbortController().signal;
    this.progress = options.progress ?? (() => undefined);
    this.abortAsked = options.direction === 'back';
    this.direction = options.direction;
    const turned = this.journal.entries.findLast((entry) => entry.kind === 'turn');
    if (turned?.kind === 'turn' && !this.abortAsked) {
      this.direction = turned.direction;
      this.why = turned.direction === 'back' ? turned.why : null;
    }
  }

  async run(): Promise<MoveResult> {
    const last = this.journal.entries.at(-1);
    if (last?.kind === 'finish') return moveResult(this.journal, this.from, this.to, last.outcome, last.why);
    if (this.abortAsked) this.turn('back', 'asked to abort');
    let facts = await this.ask();
    for (let count = 0; count < STEPS_MAX; count += 1) {
      if (this.signal.aborted && this.direction === 'forward' && !facts.arrived)
        this.turn('back', 'interrupted');
      const next = nextStep(facts, this.direction);
      switch (next.kind) {
        case 'done':
          return this.finish(facts);
        case 'turn-back':
          this.turn('back', next.why);
          break;
        case 'turn-forward':
          if (this.abortAsked) this.refuseAbort(next.why);
          this.turn('forward', next.why);
          break;
        case 'stuck':
          throw this.stuck(next.why);
        case 'step':
          facts = await this.carryOut(next.step, facts);
      }
    }
    throw this.stuck('it goes in circles: the hosts do not become what their answers promise');
  }

  private async carryOut(step: StepName, facts: Facts): Promise<Facts> {
    this.journal.append({ kind: 'begin', step }, true);
    this.progress({ kind: 'step', step });
    const { from, to, timing, signal, progress } = this;
    const { plan } = this.journal;
    const incomingUri = this.journal.result('uri');
    let result: StepResult;
    let after: Facts;
    try {
      const outcome = await perform(step, { plan, facts, from, to, timing, signal, incomingUri, progress });
      after = applyStep(facts, step, outcome.proofs);
      result = outcome.result;
    } catch (error) {
      if (!(error instanceof BlockferryError)) throw error;
      return this.recover(step, error);
    }
    if (DURABLE_ENDS.has(step)) {
      const proofs = after.volumes.map((volume) => volume.proof).filter((proof) => proof !== null);
      if (proofs.length > 0) result.proofs = proofs;
    }
    this.journal.append({ kind: 'end', step, result }, DURABLE_ENDS.has(step));
    this.attempts.delete(step);
    return after;
  }

  /** A step failed: what became of it is asked, never guessed. */
  private async recover(step: StepName, error: BlockferryError): Promise<Facts> {
    const attempts = (this.attempts.get(step) ?? 0) + 1;
    this.attempts.set(step, attempts);
    const why = this.signal.aborted ? 'interrupted' : `${step} failed: ${error.message}`;
    if (this.signal.aborted && step === 'wait-handoff') throw this.resumable(error.message, error);
    const facts = await this.ask();
    const next = nextStep(facts, this.direction);
    const due = next.kind === 'step' ? next.step : null;
    // Only an answer that was lost leaves open whether the step happened, and is worth a second try on the way out.
    const lost = error.code === 'control' || error.code === 'timeout';
    if (this.direction === 'forward' && !facts.arrived) {
      const happened = lost && due !== null && comesAfter(due, step);
      const tooLate = step === 'wait-running' && error.code === 'timeout';
      const again = lost && due === step && attempts < ATTEMPTS_MAX && !tooLate;
      if (again) await this.pause();
      else if (!happened) this.turn('back', why);
      return facts;
    }
    if (due !== step) return facts;
    if (attempts >= ATTEMPTS_MAX || (step === 'retreat' && !lost)) throw this.failedFor(step, facts, error);
    await this.pause();
    return facts;
  }

  private failedFor(step: StepName, facts: Facts, error: BlockferryError): BlockferryError {
    if (step === 'retreat' || step === 'cancel-volumes') {
      const sealed = facts.volumes.some((volume) => volume.source === 'sealed');
      if (sealed) {
        return this.stuck(
          `the destination does not prove that its takeover is undone (${error.message})`,
          error,
        );
      }
    }
    return this.resumable(`${step} failed: ${error.message}`, error);
  }

  /** Both hosts' facts; waits for a host that is out of reach, within reason. */
  private async ask(): Promise<Facts> {
    const deadline = performance.now() + this.timing.patienceMs;
    for (;;) {
      try {
        return await observe(this.from, this.to, this.journal);
      } catch (error) {
        if (!(error instanceof BlockferryError)) throw error;
        await this.letTheSourceRun(error);
        if (performance.now() >= deadline) throw this.stuck(error.message, error);
        this.progress({ kind: 'waiting', why: error.message });
        await this.pause();
      }
    }
  }

  /**
   * A host is out of reach. As long as no takeover was begun the guest need not stand still at the source until the destination
   * answers; the daemon there lets it run only on disks that are not sealed. The rest is undone when both answer.
   */
  private async letTheSourceRun(error: BlockferryError): Promise<void> {
    const begun = new Set(this.journal.entries.map((entry) => (entry.kind === 'begin' ? entry.step : null)));
    if (begun.has('takeover') || !begun.has('migrate')) return;
    const { vm, id } = this.journal.plan;
    try {
      await this.from.revive(vm, id);
      this.turn('back', error.message);
    } catch {
      // It is the source that is out of reach, or its guest runs already.
    }
  }

  private pause(): Promise<void> {
    return delay(this.timing.retryDelayMs);
  }

  private turn(direction: Direction, why: string): void {
    if (direction === this.direction && this.why !== null) return;
    this.direction = direction;
    this.why = direction === 'back' ? why : null;
    this.journal.append({ kind: 'turn', direction, why }, true);
    this.progress({ kind: 'turn', direction, why });
  }

  private async finish(facts: Facts): Promise<MoveResult> {
    const outcome = this.direction === 'forward' ? 'moved' : 'aborted';
    if (outcome === 'aborted' && facts.source !== 'running') {
      this.why = `${this.why ?? 'aborted'}; the machine does not run at the source any more, start it there`;
    }
    // Asked for before the journal is closed: afterwards nothing holds the numbers together.
    const result = await moveResult(this.journal, this.from, this.to, outcome, this.why);
    this.journal.append({ kind: 'finish', outcome, why: this.why }, true);
    return result;
  }

  private refuseAbort(why: string): never {
    throw new BlockferryError(
      'migration',
      `move ${this.journal.plan.id} cannot be aborted: ${why}; complete it with ${this.command('--resume')}`,
    );
  }

  private command(flag: string): string {
    return `\`blockferry migrate ${this.journal.plan.vm} ${flag}\``;
  }

  private resumable(message: string, cause: unknown): BlockferryError {
    const way = this.direction === 'forward' ? '--resume' : '--abort';
    return new BlockferryError('migration', `${message}; continue with ${this.command(way)}`, { cause });
  }

  /** Neither way is safe: a person has to look. */
  private stuck(why: string, cause?: unknown): BlockferryError {
    const { plan } = this.journal;
    const names = plan.volumes.map((volume) => `"${volume.name}"`).join(', ');
    return new BlockferryError(
      'migration',
      `move ${plan.id} stops here: ${why}. Nothing was unsealed without proof: look at ${names} with \`blockferry status\` on both hosts, ` +
        `then ${this.command('--resume')} or ${this.command('--abort')}`,
      { cause },
    );
  }
}
