/**
 * Phases of a volume (design, section 5) and the ways between them. Every change of phase is one durable replacement of
 * volume.json. What the guest's writes meet in each phase is the gate of volume.ts.
 */

export const PHASES = ['plain', 'standby', 'relocating', 'sealed', 'retired'] as const;
export type Phase = (typeof PHASES)[number];

export const TRANSITIONS = {
  seal: { from: 'plain', to: 'sealed' },
  unseal: { from: 'sealed', to: 'plain' },
  retire: { from: 'sealed', to: 'retired' },
  takeover: { from: 'standby', to: 'relocating' },
  retreat: { from: 'relocating', to: 'standby' },
  handOff: { from: 'relocating', to: 'plain' },
} as const satisfies Record<string, { from: Phase; to: Phase }>;

export type Transition = keyof typeof TRANSITIONS;

export function allows(phase: Phase, transition: Transition): boolean {
  return TRANSITIONS[transition].from === phase;
}

/** Phases in which some blocks may still be at the source, so that maps exist. */
export function hasMaps(phase: Phase): boolean {
  return phase === 'standby' || phase === 'relocating';
}

/** Phases in which the guest may read. */
export function guestReads(phase: Phase): boolean {
  return phase !== 'sealed' && phase !== 'retired';
}
