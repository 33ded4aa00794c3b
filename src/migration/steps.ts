/**
 * What to do next in a move, decided from facts alone. No other place decides.
 *
 * Invariants (the unit test goes through every combination of facts):
 * - `takeover` only while every source volume is sealed or has been, and the source's guest is stopped in pre-switchover.
 * - `continue` only when every destination volume has taken over.
 * - `unseal` only for a volume whose destination proved that no takeover stands; `revive` only when no source volume is sealed, no
 *   destination volume has taken over, and no process is left at the destination.
 * - Once the guest ran at the destination there is no way back, and nothing is taken from the source before every block is over.
 * - Where the facts do not allow a safe step, the answer is `stuck`, never a guess.
 */

import type { RetreatProof } from '../host/service.js';

/** What the source's process does: `switching` is between migrate-continue and the end, `sent` after it. */
export type SourceMachine =
  | 'running'
  | 'migrating'
  | 'pre-switchover'
  | 'switching'
  | 'sent'
  | 'halted'
  | 'absent';
/** `listed`: its daemon knows it by this move, but there is no process. */
export type DestinationMachine = 'absent' | 'listed' | 'incoming' | 'ran';
export type SourceVolume = 'plain' | 'sealed' | 'retired' | 'other';
export type DestinationVolume = 'absent' | 'standby' | 'relocating' | 'plain' | 'other';

export interface VolumeFacts {
  source: SourceVolume;
  destination: DestinationVolume;
  /** The destination's word that no takeover stands; from the journal or from this run. */
  proof: RetreatProof | null;
}

export interface Facts {
  /** The source's machine is claimed by this move. */
  claimed: boolean;
  source: SourceMachine;
  /** The source has noted that the machine left, or never knew it: a process that is gone says nothing of that. */
  departed: boolean;
  destination: DestinationMachine;
  /** The guest was seen to run at the destination, now or earlier. */
  arrived: boolean;
  /** What is to cross before the machine moves has crossed. */
  copiedAhead: boolean;
  volumes: readonly VolumeFacts[];
}

export type Direction = 'forward' | 'back';

export const FORWARD_STEPS = [
  'claim',
  'create-volumes',
  'pre-copy',
  'incoming',
  'migrate',
  'wait-pre-switchover',
  'seal',
  'takeover',
  'continue',
  'wait-running',
  'wait-handoff',
  'depart',
  'retire',
  'release',
] as const;
export const BACK_STEPS = ['retreat', 'discard', 'cancel-volumes', 'unseal', 'revive', 'release'] as const;
export type StepName = (typeof FORWARD_STEPS)[number] | (typeof BACK_STEPS)[number];

export type Next =
  | { kind: 'step'; step: StepName }
  /** Forward: the move is complete. Back: the machine is where it was, nothing is left at the destination. */
  | { kind: 'done' }
  /** There is no way forward, and the way back is safe to try. */
  | { kind: 'turn-back'; why: string }
  /** The way back is barred: the guest ran at the destination. */
  | { kind: 'turn-forward'; why: string }
  | { kind: 'stuck'; why: string };

const step = (name: StepName): Next => ({ kind: 'step', step: name });

/** A small or empty volume may be handed off before the guest runs. */
function tookOver(volume: VolumeFacts): boolean {
  return volume.destination === 'relocating' || volume.destination === 'plain';
}

function hasProcess(machine: DestinationMachine): boolean {
  return machine === 'incoming' || machine === 'ran';
}

export function nextStep(facts: Facts, direction: Direction): Next {
  if (facts.arrived) {
    if (direction === 'back')
      return { kind: 'turn-forward', why: 'the machine runs at the destination already' };
    return finish(facts);
  }
  const odd = facts.volumes.find((volume) => volume.source === 'other' || volume.destination === 'other');
  if (odd) return { kind: 'stuck', why: 'a volume is not in a state this move can have brought it to' };
  if (facts.volumes.some((volume) => volume.source === 'retired')) {
    return {
      kind: 'stuck',
      why: 'a source volume is retired although the machine was never seen to run at the destination',
    };
  }
  return direction === 'forward' ? goForward(facts) : goBack(facts);
}

function goForward(facts: Facts): Next {
  const { source, destination, volumes } = facts;
  const sealed = volumes.filter((volume) => volume.source === 'sealed').length;
  const moved = volumes.filter(tookOver).length;
  if (source === 'halted' || source === 'absent')
    return { kind: 'turn-back', why: 'the machine does not run at the source' };
  if (source === 'running' || source === 'migrating') {
    if (sealed > 0 || moved > 0)
      return { kind: 'turn-back', why: 'the source runs on although its volumes are sealed' };
    if (!facts.claimed) return step('claim');
    if (volumes.some((volume) => volume.destination === 'absent')) {
      if (source === 'migrating' || hasProcess(destination))
        return { kind: 'turn-back', why: 'a destination volume is gone' };
      return step('create-volumes');
    }
    if (!hasProcess(destination)) {
      if (source === 'running' && !facts.copiedAhead) return step('pre-copy');
      return source === 'running'
        ? step('incoming')
        : { kind: 'turn-back', why: 'the process at the destination is gone' };
    }
    return step(source === 'running' ? 'migrate' : 'wait-pre-switchover');
  }
  if (volumes.some((volume) => volume.destination === 'absent'))
    return { kind: 'turn-back', why: 'a destination volume is gone' };
  if (!hasProcess(destination)) return { kind: 'turn-back', why: 'the process at the destination is gone' };
  if (source === 'pre-switchover') {
    if (!facts.claimed) return { kind: 'turn-back', why: 'the source no longer knows this move' };
    if (volumes.some((volume) => volume.proof !== null))
      return { kind: 'turn-back', why: 'a takeover was taken back already' };
    if (sealed < volumes.length) {
      return moved === 0
        ? step('seal')
        : { kind: 'stuck', why: 'a takeover happened although its source is not sealed' };
    }
    return step(moved < volumes.length ? 'takeover' : 'continue');
  }
  if (moved < volumes.length)
    return { kind: 'turn-back', why: 'the switch began before every volume had taken over' };
  return step('wait-running');
}

/** The guest runs at the destination. */
function finish(facts: Facts): Next {
  if (facts.volumes.some((volume) => volume.destination === 'absent' || volume.destination === 'standby')) {
    return {
      kind: 'stuck',
      why: 'the machine ran at the destination and its volume there is gone: the sealed source is not touched',
    };
  }
  if (facts.volumes.some((volume) => volume.destination === 'other' || volume.source === 'other')) {
    return {
      kind: 'stuck',
      why: 'a volume is not served: repair what `blockferry status` shows, then continue with --resume',
    };
  }
  if (facts.volumes.some((volume) => volume.destination === 'relocating')) return step('wait-handoff');
  if (facts.source !== 'absent' || !facts.departed) return step('depart');
  if (facts.volumes.some((volume) => volume.source !== 'retired')) return step('retire');
  return facts.claimed ? step('release') : { kind: 'done' };
}

/**
 * Retreat and unseal come first: a process that is told to give up its migration, or loses its peer, lets the guest run at once, and
 * then its disk must accept writes. Only a volume that never took over needs the process at the destination gone before it proves that.
 */
function goBack(facts: Facts): Next {
  const { volumes } = facts;
  if (volumes.some(tookOver)) return step('retreat');
  const unproven = volumes.some((volume) => volume.source === 'sealed' && volume.proof === null);
  if (unproven) {
    if (facts.destination !== 'absent') return step('discard');
    // For a volume that is gone the daemon has kept the proof: cancelling again asks for it.
    return step('cancel-volumes');
  }
  if (volumes.some((volume) => volume.source === 'sealed')) return step('unseal');
  if (facts.destination !== 'absent') return step('discard');
  if (facts.source !== 'running' && facts.source !== 'absent' && facts.claimed) return step('revive');
  if (volumes.some((volume) => volume.destination === 'standby')) return step('cancel-volumes');
  return facts.claimed ? step('release') : { kind: 'done' };
}
