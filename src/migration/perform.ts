/** How each step is carried out. Every step may be repeated: a coordinator that was killed in it does it again. */

import { BlockferryError } from '../errors.js';
import type { HostControl, VolumeView } from '../host/control/api.js';
import type { RetreatProof } from '../host/service.js';
import { delay } from '../host/waiting.js';
import type { MigrationInfo } from '../hypervisor/driver.js';
import type { StepResult } from './journal.js';
import type { MovePlan } from './plan.js';
import { copyAhead, Rounds } from './rounds.js';
import type { Facts, StepName } from './steps.js';

export interface Timing {
  /** Length of one long poll, and so of one progress report. */
  pollMs: number;
  /** How long the destination may take from migrate-continue until the guest runs. */
  runningTimeoutMs: number;
  /** How long a host may be out of reach before the coordinator gives up asking. */
  patienceMs: number;
  retryDelayMs: number;
}

export const DEFAULT_TIMING: Timing = {
  pollMs: 1000,
  runningTimeoutMs: 60_000,
  patienceMs: 60_000,
  retryDelayMs: 500,
};

export type MoveProgress =
  | { kind: 'step'; step: StepName }
  | { kind: 'ram'; info: MigrationInfo }
  | { kind: 'pre-copy'; volumes: VolumeView[] }
  | { kind: 'relocation'; volumes: VolumeView[] }
  | { kind: 'turn'; direction: 'forward' | 'back'; why: string }
  | { kind: 'waiting'; why: string };

export interface StepContext {
  plan: MovePlan;
  facts: Facts;
  from: HostControl;
  to: HostControl;
  timing: Timing;
  /** Interrupts the long waits. */
  signal: AbortSignal;
  incomingUri: string | undefined;
  progress: (event: MoveProgress) => void;
}

/** `proofs` has one entry a volume, in the plan's order; null where the step brought none. */
export interface StepOutcome {
  result: StepResult;
  proofs: (RetreatProof | null)[];
}

export async function perform(step: StepName, context: StepContext): Promise<StepOutcome> {
  const { plan, facts, from, to } = context;
  const { vm, id } = plan;
  const proofs: (RetreatProof | null)[] = plan.volumes.map(() => null);
  const result: StepResult = {};
  switch (step) {
    case 'claim':
      await from.claim(vm, id);
      break;
    case 'create-volumes':
      await createVolumes(context);
      break;
    case 'pre-copy':
      await copyAhead(context);
      break;
    case 'incoming':
      result.uri = (await to.incoming(vm, id, plan.definition)).uri;
      break;
    case 'migrate': {
      // Not in the journal when its end was lost: the destination tells it again.
      const uri = context.incomingUri ?? (await to.incoming(vm, id, plan.definition)).uri;
      await from.migrate(vm, id, uri, plan.bandwidthBytesPerSecond);
      break;
    }
    case 'wait-pre-switchover':
      await waitPreSwitchover(context);
      break;
    case 'seal':
      // Sealed, the source waits for the destination's word: better to notice now that it gives none any more.
      for (const view of await Promise.all(plan.volumes.map((volume) => to.volume(volume.name))))
        checkLinked(view);
      await Promise.all(plan.volumes.map((volume) => from.seal(volume.name, volume.nextGeneration)));
      break;
    case 'takeover':
      await Promise.all(plan.volumes.map((volume) => to.takeover(volume.name, volume.nextGeneration)));
      break;
    case 'continue':
      await from.migrateContinue(vm, id);
      break;
    case 'wait-running':
      await waitRunning(context);
      result.arrivedAt = new Date().toISOString();
      Object.assign(result, await ramResult(context));
      break;
    case 'wait-handoff':
      await waitHandoff(context);
      result.handoffAt = new Date().toISOString();
      break;
    case 'depart':
      await from.depart(vm, id);
      break;
    case 'retire':
      for (const volume of plan.volumes)
        await from.retire(volume.name, { deleteImage: plan.deleteSourceImages });
      break;
    case 'release':
      await untrack(context);
      await to.release(vm, id);
      // Last: as long as the source is claimed, a coordinator that goes on comes by here again.
      await from.release(vm, id);
      break;
    case 'retreat':
      for (const [index, volume] of plan.volumes.entries()) {
        const { destination } = facts.volumes[index];
        if (destination === 'relocating' || destination === 'plain')
          proofs[index] = await to.retreat(volume.name);
      }
      break;
    case 'discard':
      await to.discard(vm, id);
      break;
    case 'cancel-volumes':
      for (const [index, volume] of plan.volumes.entries()) {
        const { source, destination, proof } = facts.volumes[index];
        const needed = destination === 'standby' || (source === 'sealed' && proof === null);
        if (needed) proofs[index] = await to.cancelVolume(volume.name, volume.volumeId);
      }
      break;
    case 'unseal':
      await unseal(context);
      break;
    case 'revive':
      await from.revive(vm, id);
      break;
  }
  return { result, proofs };
}

/** A machine that moves now would wait for its disk. */
function checkLinked(view: VolumeView): void {
  if (view.phase === 'unavailable' || view.source === null) return;
  const { state, error } = view.source;
  if (state !== 'lost' && state !== 'mismatch') return;
  throw new BlockferryError(
    'source-unreachable',
    `the destination's link to "${view.name}" is ${state}${error === null ? '' : `: ${error}`}`,
  );
}

async function createVolumes({ plan, facts, from, to }: StepContext): Promise<void> {
  for (const [index, volume] of plan.volumes.entries()) {
    if (facts.volumes[index].destination !== 'absent') continue;
    const { name, volumeId, size, generation, sourceUri, since } = volume;
    const fills = plan.switch !== 'now';
    const tracking = fills || since !== null ? await from.track(name, plan.id, since) : null;
    await to.createVolume({
      name,
      volumeId,
      size,
      generation,
      sourceUri,
      rateBytesPerSecond: plan.bandwidthBytesPerSecond,
      ...(plan.compression === null ? {} : { compression: plan.compression }),
      preCopy:
        tracking === null ? null : { cookie: tracking.cookie, fills, since: tracking.home ? since : null },
    });
  }
}

/** Nobody copies from the source any more. A volume that moved has no changes to tell of. */
async function untrack({ plan, facts, from }: StepContext): Promise<void> {
  for (const [index, volume] of plan.volumes.entries())
    if (facts.volumes[index].source === 'plain') await from.untrack(volume.name, plan.id);
}

async function unseal({ plan, facts, from }: StepContext): Promise<void> {
  for (const [index, volume] of plan.volumes.entries()) {
    const { source, proof } = facts.volumes[index];
    if (source !== 'sealed') continue;
    if (proof === null)
      throw new BlockferryError('migration', `there is no proof that "${volume.name}" was not taken over`);
    await from.unseal(volume.name, proof);
  }
}

async function waitPreSwitchover(context: StepContext): Promise<void> {
  const { plan, from, timing, signal, progress } = context;
  const rounds = plan.switch === 'now' ? null : new Rounds(context);
  const ends = ['pre-switchover', 'device', 'completed', 'failed', 'cancelled', 'none'];
  for (;;) {
    const info = await from.waitMigration(plan.vm, ends, timing.pollMs);
    progress({ kind: 'ram', info });
    if (info.status === 'pre-switchover') return;
    if (ends.includes(info.status)) {
      const why = info.error === undefined ? '' : `: ${info.error}`;
      throw new BlockferryError('hypervisor', `the migration of "${plan.vm}" is ${info.status}${why}`);
    }
    if (signal.aborted) throw new BlockferryError('migration', 'interrupted while the memory was on its way');
    void rounds?.refreshIfDue();
  }
}

async function waitRunning({ plan, from, to, timing }: StepContext): Promise<void> {
  const deadline = performance.now() + timing.runningTimeoutMs;
  while (!(await to.waitRunning(plan.vm, timing.pollMs)).running) {
    const info = await from.waitMigration(plan.vm, ['failed', 'cancelled'], 0);
    if (info.status === 'failed' || info.status === 'cancelled') {
      const why = info.error === undefined ? '' : `: ${info.error}`;
      throw new BlockferryError('hypervisor', `the migration of "${plan.vm}" is ${info.status}${why}`);
    }
    if (performance.now() > deadline) {
      throw new BlockferryError(
        'timeout',
        `"${plan.vm}" does not run at the destination ${timing.runningTimeoutMs} ms after the switch`,
      );
    }
  }
}

/** What QEMU says of the RAM's move. Nice to have: the move does not depend on it. */
async function ramResult({ plan, from, timing }: StepContext): Promise<StepResult> {
  try {
    const info = await from.waitMigration(plan.vm, ['completed', 'failed'], timing.pollMs);
    const { ramTransferredBytes, downtimeMs, totalTimeMs } = info;
    return {
      ram: {
        transferredBytes: ramTransferredBytes ?? 0,
        downtimeMs: downtimeMs ?? null,
        totalMs: totalTimeMs ?? null,
      },
    };
  } catch {
    return {};
  }
}

/** The hand-off takes as long as it takes; only a host that stays out of reach ends the wait. */
async function waitHandoff(context: StepContext): Promise<void> {
  const { plan, to, timing, signal, progress } = context;
  let reachedAt = performance.now();
  for (;;) {
    if (signal.aborted)
      throw new BlockferryError('migration', 'interrupted before the hand-off; the copy goes on by itself');
    try {
      const answers = await Promise.all(
        plan.volumes.map((volume) => to.waitHandoff(volume.name, timing.pollMs)),
      );
      reachedAt = performance.now();
      progress({ kind: 'relocation', volumes: answers.map((answer) => answer.volume) });
      if (answers.every((answer) => answer.done)) return;
    } catch (error) {
      if (!(error instanceof BlockferryError) || error.code !== 'control') throw error;
      if (performance.now() - reachedAt > timing.patienceMs) throw error;
      progress({ kind: 'waiting', why: error.message });
      await delay(timing.retryDelayMs);
    }
  }
}
