/** Facts of a move: asked from both hosts, and what a step that was carried out changes about them. */

import { BlockferryError } from '../errors.js';
import type { HostControl, MachineView, VolumeView } from '../host/control/api.js';
import type { RetreatProof } from '../host/service.js';
import type { Journal } from './journal.js';
import type { MovePlan } from './plan.js';
import type {
  DestinationMachine,
  DestinationVolume,
  Facts,
  SourceMachine,
  SourceVolume,
  StepName,
  VolumeFacts,
} from './steps.js';

/** Asks both hosts. The journal adds what cannot be asked for again. */
export async function observe(from: HostControl, to: HostControl, journal: Journal): Promise<Facts> {
  const { plan } = journal;
  const proofs = journal.result('proofs') ?? [];
  const [machine, twin, volumes] = await Promise.all([
    optional(from.machine(plan.vm)),
    optional(to.machine(plan.vm)),
    Promise.all(
      plan.volumes.map(async (volume): Promise<VolumeFacts> => {
        const [here, there] = await Promise.all([
          optional(from.volume(volume.name)),
          optional(to.volume(volume.name)),
        ]);
        return {
          source: sourceVolume(here, volume.volumeId),
          destination: destinationVolume(there, volume.volumeId),
          proof: proofs.find((proof) => proof.volumeId === volume.volumeId) ?? null,
        };
      }),
    ),
  ]);
  const destination = destinationMachine(twin, plan);
  return {
    claimed: machine?.moveId === plan.id,
    source: sourceMachine(machine),
    departed: machine === null || machine.state === 'departed',
    destination,
    arrived: destination === 'ran' || journal.result('arrivedAt') !== undefined,
    copiedAhead:
      plan.switch === 'now' ||
      journal.entries.some((entry) => entry.kind === 'end' && entry.step === 'pre-copy'),
    volumes,
  };
}

async function optional<View>(view: Promise<View>): Promise<View | null> {
  try {
    return await view;
  } catch (error) {
    if (error instanceof BlockferryError && error.code === 'not-found') return null;
    throw error;
  }
}

function sourceMachine(view: MachineView | null): SourceMachine {
  if (view === null || view.pid === null) return 'absent';
  const status = view.migration?.status ?? 'none';
  if (status === 'setup' || status === 'active' || status === 'cancelling') return 'migrating';
  // Asked for after the state, and so newer: it was running a moment ago and stands still now.
  if (status === 'pre-switchover') return 'pre-switchover';
  if (status === 'device') return 'switching';
  if (view.state === 'running') return 'running';
  return status === 'completed' ? 'sent' : 'halted';
}

function destinationMachine(view: MachineView | null, plan: MovePlan): DestinationMachine {
  if (view === null || view.state === 'departed') return 'absent';
  if (view.ran) return 'ran';
  if (view.moveId !== plan.id) return 'absent';
  return view.state === 'stopped' ? 'listed' : 'incoming';
}

function sourceVolume(view: VolumeView | null, volumeId: string): SourceVolume {
  if (view?.phase === 'unavailable' && view.retiredId === volumeId) return 'retired';
  if (view === null || view.phase === 'unavailable' || view.id !== volumeId) return 'other';
  return view.phase === 'plain' || view.phase === 'sealed' || view.phase === 'retired' ? view.phase : 'other';
}

/** A volume of that name that retired here earlier makes room for the one that arrives. */
function destinationVolume(view: VolumeView | null, volumeId: string): DestinationVolume {
  if (view === null || view.phase === 'retired') return 'absent';
  if (view.phase === 'unavailable' && view.retiredId !== null) return 'absent';
  if (view.phase === 'unavailable' || view.id !== volumeId) return 'other';
  return view.phase === 'sealed' ? 'other' : view.phase;
}

/** The facts after `step` was carried out for every volume. */
export function applyStep(facts: Facts, step: StepName, proofs: readonly (RetreatProof | null)[]): Facts {
  const volumes = (change: Partial<VolumeFacts>): VolumeFacts[] =>
    facts.volumes.map((volume, index) => ({ ...volume, ...change, proof: proofs[index] ?? volume.proof }));
  switch (step) {
    case 'claim':
      return { ...facts, claimed: true };
    case 'create-volumes':
      return { ...facts, volumes: volumes({ destination: 'standby' }) };
    case 'pre-copy':
      return { ...facts, copiedAhead: true };
    case 'incoming':
      return { ...facts, destination: 'incoming' };
    case 'migrate':
      return { ...facts, source: 'migrating' };
    case 'wait-pre-switchover':
      return { ...facts, source: 'pre-switchover' };
    case 'seal':
      return { ...facts, volumes: volumes({ source: 'sealed' }) };
    case 'takeover':
      return { ...facts, volumes: volumes({ destination: 'relocating' }) };
    case 'continue':
      return { ...facts, source: 'switching' };
    case 'wait-running':
      return { ...facts, destination: 'ran', arrived: true };
    case 'wait-handoff':
      return { ...facts, volumes: volumes({ destination: 'plain' }) };
    case 'depart':
      return { ...facts, source: 'absent', departed: true };
    case 'retire':
      return { ...facts, volumes: volumes({ source: 'retired' }) };
    case 'release':
      return { ...facts, claimed: false };
    case 'retreat':
      return { ...facts, volumes: volumes({ destination: 'standby' }) };
    case 'discard':
      return { ...facts, destination: 'absent' };
    case 'cancel-volumes':
      return { ...facts, volumes: volumes({ destination: 'absent' }) };
    case 'unseal':
      return { ...facts, volumes: volumes({ source: 'plain' }) };
    case 'revive':
      return { ...facts, source: 'running' };
  }
}
