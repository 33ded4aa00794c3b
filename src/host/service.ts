/** One volume as a daemon runs it: the volume, its relocation if it has a source, and the two faces it is served under. */

import type { BlockDevice } from '../nbd/device.js';
import type { BackgroundOrder, BackgroundState } from '../relocation/background.js';
import type { LinkState } from '../relocation/link.js';
import type { Tracking } from '../volume/dirty.js';
import type { Phase } from '../volume/phase.js';
import type { RetreatProof, RoundCut } from '../volume/volume.js';

export type { Phase, RetreatProof, RoundCut, Tracking };

/** `status --json` of a volume: stable for scripts (design, section 8). Sizes in bytes, times ISO 8601. */
export interface VolumeStatus {
  name: string;
  id: string;
  phase: Phase;
  generation: number;
  size: number;
  presentBytes: number;
  source: { uri: string; state: LinkState; error: string | null } | null;
  uri: string[];
  background: {
    state: BackgroundState;
    order: BackgroundOrder | 'none';
    rateBytesPerSecond: number;
    rateLimitBytesPerSecond: number | null;
    etaSeconds: number | null;
  };
  demand: { reads: number; p50Ms: number; p99Ms: number };
  traffic: {
    fromSourceBytes: number;
    demandBytes: number;
    backgroundBytes: number;
    wireBytes: number;
    zeroBytes: number;
    /** Found in a seed: neither of the source's nor over the wire. */
    seedBytes: number;
  };
  /** Of a standby that copies ahead, or has an old image of the volume: the round it knows, and what is left to copy before the takeover. */
  preCopy: {
    cookie: number | null;
    caughtUp: boolean;
    /** All is here of what the machine reads at the source. */
    hotDone: boolean;
    missingBytes: number;
  } | null;
  /** Of a volume whose changes are kept: the move that copies it, and the generation whose image somebody may still have. */
  tracking: { moveId: string | null; since: number | null } | null;
  clients: number;
  handoffAt: string | null;
  error: string | null;
}

export interface VolumeService {
  readonly name: string;
  readonly id: string;
  readonly size: number;
  readonly image: string;
  /** What the machine's disk attaches to: writes as the phase allows. */
  readonly guest: BlockDevice;
  /** What another host's link reads: always read-only, also answers while sealed. */
  readonly link: BlockDevice;
  /** What its blocks hash to, for another host's link. */
  readonly hashes: BlockDevice;
  /** As it is now: told to NBD clients that ask for a description, and checked again by a link that reconnects. */
  readonly linkDescription: string;
  status(): VolumeStatus;
  /** The machine is known to run here, or nothing is left to come: no retreat any more. */
  readonly settled: boolean;
  /** Resolves when no change of phase is under way: what `status` says is then not about to be untrue. */
  quiet(): Promise<void>;

  /** The id is durable from now on: that of a plain volume that was only served is its image file's, and goes with it. */
  remember(): Promise<void>;
  /** Source side. Refuses writes from now on, waits for those under way, makes all durable. Idempotent per generation. */
  seal(generation: number): Promise<void>;
  unseal(proof: RetreatProof): Promise<void>;
  /** Sealed -> retired: never served again. The image stays, or is deleted. */
  retire(options: { deleteImage: boolean }): Promise<void>;

  /** Source side: a move begins to copy, and is told what changes, from generation `since` on if that is known. See volume/dirty.ts. */
  track(moveId: string, since: number | null): Promise<Tracking>;
  /** Begins the next round of changes. Idempotent. */
  cut(moveId: string, cookie: number): Promise<RoundCut>;
  untrack(moveId: string): Promise<void>;
  /** Standby: takes to heart what the source changed up to round `to`, which follows `from`. Idempotent. */
  refresh(from: number, to: number): Promise<void>;

  /** Destination side: standby -> relocating as `generation` (default: the next one). Idempotent per generation. */
  takeover(generation?: number): Promise<{ generation: number }>;
  /** The machine is known to run here: no retreat any more, and the hand-off may come. A guest's write says the same. */
  settle(): Promise<void>;
  /** Relocating -> standby, only before the guest's first write. The generation is burnt. */
  retreat(): Promise<RetreatProof>;
  /** Standby -> gone: maps, identity and the image it created. */
  cancel(): Promise<RetreatProof>;

  pause(): void;
  resume(): void;
  /** Background bytes per second, null for no limit. */
  setRate(bytesPerSecond: number | null): void;
  /** Fetches a range ahead of need; resolves when it is local. */
  prefetch(offset: number, length: number): Promise<void>;
  /** Resolves when the last block is local and the volume is plain. */
  handedOff(): Promise<void>;
  /** Makes everything durable and lets go of image, maps and link. */
  close(): Promise<void>;
}
