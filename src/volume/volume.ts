/**
 * A volume: its blocks, and who may write them. The phases are those of the design's section 5.
 *
 * Invariants
 * - Every change of phase is durable (volume.json) before it shows: before the gate opens, before it is answered.
 *   Closing the gate comes first, in one synchronous step, so that no write slips in behind it.
 * - Changes of phase run one after the other; each can be repeated after a crash with the same result.
 * - Taking over raises the generation and makes this the only writer in one durable step. The first guest write is answered
 *   only after `written` is durable, so that a retreat never throws an answered write away.
 * - A takeover of a standby that holds blocks already first drops those that the source changed, as it told when it was sealed: what is present under
 *   the new generation is what the source had. What presence.map says from before counts for nothing, by the map epoch that is in the same durable step:
 *   should the machine crash before the next commit, all that is here is fetched again. A list that is not of the round known here, or one beside it, drops all.
 * - The takeover by a coordinator begins to track changes (dirty.ts), so that the volume can go home.
 * - seal: gate closed -> no thread changes the image -> image durable -> phase durable -> answered.
 * - hand-off: all blocks here -> image and maps durable -> phase `plain` durable -> maps deleted.
 * - retreat: phase `standby` and a new map epoch durable -> bits dropped. Died in between, the old bits count for nothing.
 */
import { unlinkSync } from 'node:fs';
import { dirname } from 'node:path';
import { BlockferryError } from '../errors.js';
import { Errno } from '../nbd/constants.js';
import { BLOCK_BYTES } from './blocks.js';
import { bootId } from './boot.js';
import { DirtyMap, nextRound, type Tracking } from './dirty.js';
import { syncFolder } from './files.js';
import { FirstAccess } from './first-access.js';
import { FirstAccessFile } from './first-access-file.js';
import { Heat } from './heat.js';
import { HeatFile } from './heat-file.js';
import type { Identity, IdentityFile } from './identity.js';
import type { Image } from './image.js';
import { allows, guestReads, type Phase, TRANSITIONS, type Transition } from './phase.js';
import type { Presence } from './presence.js';
import { BlockStore, type Gate, OPEN } from './store.js';

export interface RoundCut {
  /** The next round's. */
  cookie: number;
  /** What changed in the round that ended; 0 where that is not known any more. */
  changedBytes: number;
}

/** What a source says it changed, in blocks: first, end, first, end, ... Null runs: everything may have changed. */
export interface SourceChanges {
  readonly runs: readonly number[] | null;
  /** What changed in that round, and not only in the one before. Absent: it is not told apart. */
  readonly lately?: readonly number[];
  /** The round it told of; null: it has no rounds. */
  readonly cookie: number | null;
}

/** Proof that no takeover of `generation`, or of an earlier one, stands or can happen at the destination. */
export interface RetreatProof {
  volumeId: string;
  generation: number;
}

/**
 * What of a sealed source's list matters to who has the list of round `known`; null: all blocks. Of that round it is what changed in it: what changed before
 * was dropped, and copied again. So it is of the round before, which was read when it was over, though a cut and its list came in between. The next round's
 * list has that of this one as well.
 */
function changesFor(known: number | null, { runs, lately, cookie }: SourceChanges): readonly number[] | null {
  if (cookie === known) return lately ?? runs;
  if (cookie === null || known === null) return null;
  if (known === nextRound(cookie)) return lately ?? runs;
  return cookie === nextRound(known) ? runs : null;
}

const REFUSED: Gate = { kind: 'refused', errno: Errno.EPERM };
const CLOSED: Gate = { kind: 'refused', errno: Errno.ESHUTDOWN };

/** How often changed maps become durable when no flush asks for it. */
const COMMIT_INTERVAL_MS = 5_000;

export class Volume {
  readonly store: BlockStore;
  /** Of the guest. */
  readonly heat: Heat;
  readonly heatFile: HeatFile;
  /** Likewise: what it read first after the takeover. */
  readonly firstAccess: FirstAccess;
  readonly firstAccessFile: FirstAccessFile;
  #last: Promise<unknown> = Promise.resolve();
  #closed = false;
  #closing: Promise<void> | undefined;
  #timer: NodeJS.Timeout | undefined;
  /** Told of every change of phase, and when `written` became true, after it happened; and when a takeover failed, or the volume is about to close. */
  onChange: (() => void) | null = null;
  /** Asks the source for its changes at a takeover, when it is sealed. Rejects where it does not tell. */
  askChanges: (() => Promise<SourceChanges>) | null = null;

  /** Use `openVolume` and its kin in open.ts. */
  constructor(
    readonly identity: IdentityFile,
    image: Image,
    presence: Presence | null,
    dirty: DirtyMap | null = null,
  ) {
    this.store = new BlockStore(image, presence, identity.current.mapEpoch);
    this.store.dirty = dirty;
    this.heat = new Heat(image.size);
    this.firstAccess = new FirstAccess(this.heat);
    const owner = { id: this.id, size: image.size };
    const isStored = () => identity.stored;
    this.heatFile = new HeatFile(identity.folder, owner, this.heat, isStored);
    this.firstAccessFile = new FirstAccessFile(identity.folder, owner, this.firstAccess, isStored);
    this.firstAccessFile.start();
    this.heatFile.start();
    this.#enter();
    if (presence !== null) {
      this.#timer = setInterval(() => {
        if (this.store.presence?.changed && this.store.failure === null) void this.store.commit();
      }, COMMIT_INTERVAL_MS);
      this.#timer.unref();
    }
  }

  get name(): string {
    return this.identity.current.name;
  }

  get id(): string {
    return this.identity.current.id;
  }

  get phase(): Phase {
    return this.identity.current.phase;
  }

  get generation(): number {
    return this.identity.current.generation;
  }

  get size(): number {
    return this.store.image.size;
  }

  get readOnly(): boolean {
    return this.store.image.readOnly;
  }

  /** The image is let go of, or about to be: its descriptor may be another file's any moment. */
  get closed(): boolean {
    return this.#closed;
  }

  /** Of a standby: what is here before the takeover, if anything. */
  get preCopy(): Identity['preCopy'] {
    return this.identity.current.preCopy;
  }

  /** Whether reads by the guest are answered. */
  get readable(): boolean {
    return !this.#closed && guestReads(this.phase);
  }

  /** The machine is known to run here: no way back, and the hand-off may come. */
  get settled(): boolean {
    return this.identity.current.written;
  }

  /** Makes what is allowed follow the phase. */
  #enter(): void {
    this.firstAccess.follow(this.phase);
    this.store.keeps = this.phase === 'relocating';
    this.store.prefills = this.phase === 'standby' && this.preCopy?.fills === true;
    this.store.setGate(this.#gate());
    this.onChange?.();
  }

  #gate(): Gate {
    const { phase, written, takesOverAtWrite } = this.identity.current;
    if (this.#closed) return CLOSED;
    if (this.readOnly) return REFUSED;
    switch (phase) {
      case 'plain':
        return OPEN;
      case 'relocating':
        return written ? OPEN : { kind: 'ask', ask: () => this.settle() };
      case 'standby':
        return takesOverAtWrite ? { kind: 'ask', ask: () => this.#takeOverAtWrite() } : REFUSED;
      case 'sealed':
      case 'retired':
        return REFUSED;
    }
  }

  #serially<T>(step: () => Promise<T>): Promise<T> {
    const result = this.#last.then(() => {
      if (this.#closed) throw new BlockferryError('closed', `volume ${this.name} is closed`);
      return step();
    });
    this.#last = result.catch(() => undefined);
    return result;
  }

  /** Resolves when the changes of phase that were asked for are over. */
  async quiet(): Promise<void> {
    await this.#last;
  }

  #require(transition: Transition, because = ''): void {
    if (allows(this.phase, transition)) return;
    const { from } = TRANSITIONS[transition];
    throw new BlockferryError(
      'phase',
      `volume ${this.name} is ${this.phase}, not ${from}${because}: ${transition} refused`,
    );
  }

  #requireNewer(generation: number): void {
    if (generation > this.generation) return;
    throw new BlockferryError(
      'generation',
      `generation ${generation} of volume ${this.name} is stale, it has seen ${this.generation}: plan the move anew`,
    );
  }

  async #change(change: Partial<Identity>): Promise<void> {
    await this.identity.update(change);
    this.#enter();
  }

  /** Stores what the volume is, if that is not done yet: its id is the same from now on, whatever happens to this process. */
  remember(): Promise<void> {
    return this.#serially(async () => {
      if (!this.identity.stored) await this.identity.update({});
    });
  }

  // Source side

  seal(generation: number): Promise<void> {
    return this.#serially(async () => {
      if (this.phase === 'sealed' && this.identity.current.sealedFor === generation) return;
      this.#require(
        'seal',
        this.phase === 'sealed' ? ` (for generation ${this.identity.current.sealedFor})` : '',
      );
      this.#requireNewer(generation);
      this.store.setGate(REFUSED);
      try {
        await this.store.unchanging();
        if ((await this.store.commit()) !== Errno.OK) throw this.store.failure;
        await this.identity.update({ phase: 'sealed', sealedFor: generation });
      } finally {
        this.#enter();
      }
    });
  }

  unseal(proof: RetreatProof): Promise<void> {
    return this.#serially(async () => {
      const { phase, generation, sealedFor } = this.identity.current;
      if (proof.volumeId !== this.id) {
        throw new BlockferryError(
          'generation',
          `the proof is for volume ${proof.volumeId}, not ${this.id}: unseal refused`,
        );
      }
      if (phase === 'plain' && generation >= proof.generation) return;
      this.#require('unseal');
      if (sealedFor !== null && proof.generation < sealedFor) {
        throw new BlockferryError(
          'generation',
          `the proof covers generation ${proof.generation}, but ${this.name} is sealed for ${sealedFor}: unseal refused`,
        );
      }
      await this.#change({
        phase: 'plain',
        generation: Math.max(generation, proof.generation),
        sealedFor: null,
      });
    });
  }

  retire(options: { deleteImage: boolean }): Promise<void> {
    return this.#serially(async () => {
      if (this.phase !== 'retired') {
        this.#require('retire');
        const imageStamp = options.deleteImage ? null : this.store.image.stamp;
        await this.#change({ phase: 'retired', imageStamp });
      }
      await this.heatFile.remove();
      await this.#endTracking();
      await this.firstAccessFile.remove();
      if (options.deleteImage && !this.store.image.blockDevice) await this.#deleteImage();
    });
  }

  // Tracking of changes, at the source

  /** See DirtyMap.claim. The volume must be plain. */
  track(move: string, since: number | null): Promise<Tracking> {
    return this.#serially(async () => {
      if (this.phase !== 'plain') {
        throw new BlockferryError(
          'phase',
          `volume ${this.name} is ${this.phase}: its changes cannot be tracked`,
        );
      }
      if (!this.identity.stored) await this.identity.update({});
      this.store.dirty ??= await this.#startTracking(0);
      return this.store.claimChanges(move, since);
    });
  }

  /** See DirtyMap.cut. */
  cut(move: string, cookie: number): Promise<RoundCut> {
    return this.#serially(async () => {
      const changed = this.store.dirty?.changedBlocks ?? 0;
      return {
        cookie: this.store.cutChanges(move, cookie),
        changedBytes: Math.min(changed * BLOCK_BYTES, this.size),
      };
    });
  }

  /** The move does not copy any more. What a host that has an older image would have to know stays. */
  untrack(move: string): Promise<void> {
    return this.#serially(async () => {
      const { dirty } = this.store;
      if (dirty === null || dirty.move !== move) return;
      dirty.release();
      if (dirty.since === 0) await this.#endTracking();
    });
  }

  #startTracking(since: number): Promise<DirtyMap> {
    return DirtyMap.create(this.identity.folder, { id: this.id, blocks: this.store.blocks }, since);
  }

  async #endTracking(): Promise<void> {
    this.store.dirty?.unmap();
    this.store.dirty = null;
    await DirtyMap.remove(this.identity.folder);
  }

  // Destination side

  takeover(generation = this.generation + 1): Promise<{ generation: number }> {
    return this.#attempt(() => this.#takeoverAs(generation));
  }

  /** A takeover, or a standby that goes on as one. */
  async #attempt<T>(takeover: () => Promise<T>): Promise<T> {
    try {
      return await takeover();
    } catch (error) {
      this.onChange?.();
      throw error;
    }
  }

  async #takeoverAs(generation: number): Promise<{ generation: number }> {
    const changes = await this.#changesAtTakeover();
    return this.#serially(async () => {
      const repeated =
        this.generation === generation && (this.phase === 'relocating' || this.phase === 'plain');
      if (!repeated) {
        this.#require('takeover');
        this.#requireNewer(generation);
        // Without a coordinator nobody will ask for a retreat, and nobody says later that the machine runs here.
        const written = this.identity.current.takesOverAtWrite;
        this.#forget(changes);
        // Without room for it the volume moves all the same; it cannot go home with only what changed then.
        this.store.dirty = await this.#startTracking(this.generation).catch(() => null);
        try {
          await this.#takeOver({ generation, written });
        } catch (error) {
          await this.#endTracking();
          throw error;
        }
      }
      return { generation };
    });
  }

  /** Asked for before the volume's turn: a source that does not answer holds up nothing else. */
  async #changesAtTakeover(): Promise<SourceChanges | null> {
    if (this.phase !== 'standby' || this.preCopy === null) return null;
    if (this.askChanges === null || this.store.presence?.present === 0) return null; // nothing is known to be good
    return this.askChanges();
  }

  /** What the source changed since it was copied is not here any more. */
  #forget(changes: SourceChanges | null): void {
    const { preCopy } = this;
    if (preCopy === null) return;
    this.store.drop(changes === null ? null : changesFor(preCopy.cookie, changes));
  }

  /**
   * The one durable step of a takeover. What was copied ahead gets a new epoch in it: what presence.map has of it may tell of blocks that were dropped
   * since, and to write that anew, behind the image's data, would keep the machine waiting. Until the next commit does, a machine that crashes finds none
   * of it here: it is still at the source.
   */
  async #takeOver(change: Partial<Identity>): Promise<void> {
    const { preCopy, mapEpoch } = this.identity.current;
    if (this.store.failure !== null) throw this.store.failure;
    const epoch = preCopy === null ? mapEpoch : mapEpoch + 1;
    await this.identity.update({ ...change, phase: 'relocating', preCopy: null, mapEpoch: epoch });
    if (preCopy !== null) this.store.presence?.renew(epoch);
    this.#enter();
    this.store.retryParked();
  }

  /**
   * Round `from` of the source's is over here, and these are the changes that the next one told of. Repeated it changes nothing. Throws 'generation' if
   * they follow another round.
   */
  refresh(from: number, changes: SourceChanges): Promise<void> {
    return this.#serially(async () => {
      const { preCopy, phase } = this.identity.current;
      if (phase !== 'standby' || preCopy === null)
        throw new BlockferryError('phase', `volume ${this.name} is ${phase} and copies nothing ahead`);
      const { runs, cookie } = changes;
      if (preCopy.cookie === cookie) return;
      if (preCopy.cookie !== from || cookie !== nextRound(from) || runs === null) {
        throw new BlockferryError(
          'generation',
          `volume ${this.name} knows round ${preCopy.cookie}, not ${from}: what follows that one says nothing`,
        );
      }
      this.store.drop(runs);
      await this.#change({ preCopy: { ...preCopy, cookie } });
    });
  }

  #takeOverAtWrite(): Promise<void> {
    return this.#attempt(async () => {
      const changes = await this.#changesAtTakeover();
      await this.#serially(async () => {
        if (this.phase !== 'standby') return;
        this.#forget(changes);
        await this.#takeOver({ generation: this.generation + 1, written: true });
      });
    });
  }

  /** The machine runs here: from now on there is only forward. */
  settle(): Promise<void> {
    return this.#serially(async () => {
      if (this.phase === 'plain' || this.identity.current.written) return;
      if (this.phase !== 'relocating') {
        throw new BlockferryError('phase', `volume ${this.name} is ${this.phase}: no machine runs on it`);
      }
      await this.#change({ written: true });
    });
  }

  retreat(): Promise<RetreatProof> {
    return this.#serially(async () => {
      const proof = { volumeId: this.id, generation: this.generation };
      if (this.phase === 'standby') return proof;
      this.#require('retreat');
      if (this.settled) {
        throw new BlockferryError(
          'phase',
          `the machine has written to ${this.name} since the takeover: retreat refused`,
        );
      }
      const epoch = this.identity.current.mapEpoch + 1;
      await this.identity.update({ phase: 'standby', mapEpoch: epoch });
      await this.store.serially(async () => {
        this.store.presence?.drop(epoch);
        this.store.epoch++;
        this.#enter(); // in this very step: nothing that is fetched from now on may be kept
        await this.#endTracking();
      });
      this.store.retryParked();
      return proof;
    });
  }

  /** All blocks are here: the volume becomes plain and its maps go. False while that cannot be yet. */
  handOff(): Promise<boolean> {
    return this.#serially(async () => {
      if (this.phase === 'plain') return true;
      if (this.phase !== 'relocating' || !this.settled || !this.store.presence?.complete) return false;
      if ((await this.store.commit()) !== Errno.OK) throw this.store.failure;
      await this.identity.update({
        phase: 'plain',
        source: null,
        openBootId: null,
        handoffAt: new Date().toISOString(),
      });
      clearInterval(this.#timer);
      await this.store.serially(async () => {
        const { presence } = this.store;
        this.store.presence = null;
        this.#enter();
        presence?.remove(); // last: should that fail, they are in nobody's way, and go at the next opening
      });
      return true;
    });
  }

  /** Standby -> gone: maps, identity, and the image if it was made for the move. The volume is closed then. */
  cancel(): Promise<RetreatProof> {
    return this.#serially(async () => {
      if (this.phase !== 'standby') {
        throw new BlockferryError(
          'phase',
          `volume ${this.name} is ${this.phase}, not standby: cancel refused`,
        );
      }
      const proof = { volumeId: this.id, generation: this.generation + 1 };
      await this.#shut();
      // Should this process die, the next finds a standby that was closed, or one without maps, which is taken for a cancelled one: the
      // rest is done at its opening.
      await this.identity.update({ openBootId: null });
      await this.heatFile.remove();
      await this.firstAccessFile.remove();
      await this.store.serially(async () => {
        const { presence } = this.store;
        this.store.presence = null;
        await presence?.discard();
      });
      await DirtyMap.remove(this.identity.folder); // of a takeover that failed
      if (this.identity.current.imageCreated) await this.#deleteImage();
      await this.identity.remove();
      this.store.image.close();
      return proof;
    });
  }

  async #deleteImage(): Promise<void> {
    const { path } = this.store.image;
    try {
      unlinkSync(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
    await syncFolder(dirname(path));
  }

  async #shut(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    this.heatFile.stop();
    this.firstAccessFile.stop();
    this.store.keeps = false; // ends a long fill of zeros between two of its steps
    this.store.prefills = false;
    this.store.setGate(CLOSED);
    this.onChange?.(); // who copies stops before the maps go
    this.store.giveUp(0, this.store.blocks, Errno.ESHUTDOWN);
    await this.store.idle();
  }

  /** Makes all durable and lets go of the image. The sessions must be gone. */
  close(): Promise<void> {
    if (this.#closing !== undefined) return this.#closing;
    this.#closing = this.#last.then(async () => {
      if (this.#closed) return; // cancelled
      await this.#shut();
      if (!this.readOnly) await Promise.all([this.heatFile.save(), this.firstAccessFile.save()]);
      const durable = (await this.store.commit()) === Errno.OK;
      if (durable) this.store.dirty?.close(this.store.image.stamp);
      else this.store.dirty?.unmap();
      this.store.dirty = null;
      if (this.store.presence !== null) {
        this.store.presence.close();
        if (durable) await this.identity.update({ openBootId: null });
      }
      this.store.image.close();
      if (!durable && !this.readOnly) throw this.store.failure;
    });
    this.#last = this.#closing.catch(() => undefined);
    return this.#closing;
  }

  /** The maps are about to be used: should this process die, in this boot presence.live is the truth. */
  async markOpen(): Promise<void> {
    const { openBootId } = this.identity.current;
    if (this.store.presence === null || openBootId === bootId()) return; // as a killed process left it: no space is needed for that
    await this.identity.update({ openBootId: bootId() });
  }
}
