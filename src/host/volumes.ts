/**
 * The volumes of one daemon: opened, served under their two faces, shown, and taken away again. A volume that cannot be
 * opened is kept with its error and does not disturb the others.
 *
 * A volume may live on another thread, so that what it says of itself may be untrue when it is heard. Each look is one step of its
 * thread (phase, generation and `settled` of one moment); what is done on it is safe for one of these reasons:
 * - Coming and going, takeover and cancel of one name run one after the other (`queue`). A standby that is seen there stays one: only
 *   takeover and cancel lead out of it. That is what `cancel` builds its proof on, and `arrive` its answer.
 * - Retired stays retired: `arrive` may drop such a volume.
 * - `seal`, `unseal`, `retire`, `settle` and `retreat` are decided by the volume's own thread, whatever was seen here before. So a check
 *   of phases (machine-disks.ts) only says no early: a machine let start on a volume that is sealed at that very moment gets EPERM,
 *   as it would a moment later.
 * - `settled` and the hand-off never become untrue again. Who acts on them after a wait looks again at what else may have changed
 *   meanwhile (machines.ts).
 * - A coordinator decides by `quietView`, which the volume's thread makes in the step in which no change is under way.
 * - An entry that was found before a wait is not looked for again in the map: its volume answers 'closed' if it has gone.
 *
 * A volume whose thread died is opened again as after a kill, in the name's queue. Until then it is unavailable, and requests that were
 * under way fail with 'control': whether they were carried out is not known, and asking tells.
 */

import { mkdirSync } from 'node:fs';
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import { DIRTY } from '../nbd/constants.js';
import type { CreateVolume, VolumeView } from './control/api.js';
import type { HeldVolume, HoldVolume } from './held-volume.js';
import { freeBytes, freeImagePath } from './images.js';
import type { OpenMode } from './open.js';
import type { ExportListener, ExportPolicy, ExportTable, ListenSettings } from './parts.js';
import type { DaemonRecord } from './record.js';
import { bringRetiredBack, giveUpHome, type Home, homeOf, retiredId, setRetiredAside } from './retired.js';
import type { Phase, RetreatProof } from './service.js';
import { hasState } from './state-dir.js';
import { ThreadLostError } from './threads/messages.js';
import { type OpenEntry, quietPhaseOf, unavailable, type VolumeEntry, viewOf } from './volume-entry.js';
import { KeyedQueue, Occurrence } from './waiting.js';

export const VOLUMES_MAX = 4096;
/** A key of the queue that is no volume's name. */
const SECOND_ATTEMPTS = '/';

export interface VolumesOptions {
  stateDir: string;
  /** Folder for images of volumes that arrive; null: none may arrive. */
  images: string | null;
  /** Addresses a volume's guest face is served on. */
  guestAddresses: (name: string) => readonly string[];
  /** Where all volumes' link faces are served; null: nowhere. */
  link: { table: ExportTable; listener: ExportListener } | null;
  hold: HoldVolume;
  /** How guest faces are served. */
  guestSettings: ListenSettings;
  /** Whom a volume's faces are for. */
  guestPolicy: (name: string) => ExportPolicy;
  linkPolicy: (name: string) => ExportPolicy;
  record: DaemonRecord;
  log: Logger;
}

export class Volumes {
  private readonly entries = new Map<string, VolumeEntry>();
  private readonly queue = new KeyedQueue();
  private closing = false;
  /** What went wrong while all were closed. */
  private readonly failures: unknown[] = [];

  constructor(private readonly options: VolumesOptions) {}

  /** Opens and serves a volume. Fails with what kept it from being opened; `keep` remembers the failure instead. */
  async open(name: string, image: string, mode: OpenMode, keep = false): Promise<void> {
    await this.queue.run(name, async () => {
      try {
        await this.openPatiently(name, image, mode);
      } catch (error) {
        if (!keep) throw error;
        const retired = await retiredId(this.options.stateDir, name);
        if (retired === null)
          this.options.log.error({ volume: name }, `volume not served: ${messageOf(error)}`);
        this.markUnavailable(name, image, retired, messageOf(error));
      }
    });
  }

  has(name: string): boolean {
    return this.entries.has(name);
  }

  /** Fails with 'not-found', or with the error that keeps the volume from being served. */
  service(name: string): HeldVolume {
    return this.entry(name).service;
  }

  /** What the volume is once nothing is about to change that: not its coming or going, nor its phase. */
  quietPhase(name: string): Promise<Phase | 'unavailable' | 'absent'> {
    return this.queue.run(name, () => quietPhaseOf(this.entries.get(name)));
  }

  /** What the volume is now, though a change may be under way. */
  async view(name: string): Promise<VolumeView> {
    return this.look(this.known(name));
  }

  /** As `quietPhase`. */
  quietView(name: string): Promise<VolumeView> {
    return this.queue.run(name, async () => this.look(this.known(name), true));
  }

  /** The volume took over, and cannot go back. False also where that cannot be told now. */
  async settled(name: string): Promise<boolean> {
    const entry = this.entries.get(name);
    if (entry?.kind !== 'open') return false;
    const look = await entry.service.look().catch(() => null);
    if (look === null) return false;
    const { phase } = look.status;
    return phase === 'plain' || (phase === 'relocating' && look.settled);
  }

  /** All there are, each as it is when it is asked. */
  async views(): Promise<VolumeView[]> {
    const views = await Promise.all([...this.entries.keys()].sort().map((name) => this.viewIfThere(name)));
    return views.filter((view) => view !== null);
  }

  /** Null for a volume that went meanwhile. */
  private async viewIfThere(name: string): Promise<VolumeView | null> {
    const entry = this.entries.get(name);
    if (!entry) return null;
    if (entry.kind === 'unavailable') return this.withHome(entry.view);
    try {
      return await this.look(entry);
    } catch (error) {
      const now = this.entries.get(name);
      if (!now) return null;
      if (now.kind === 'unavailable') return now.view;
      return unavailable(name, entry.service.image, null, messageOf(error));
    }
  }

  /** True once the volume is plain, false after the timeout or when the caller is gone. */
  async waitHandoff(name: string, timeoutMs: number, signal: AbortSignal): Promise<boolean> {
    const entry = this.entry(name);
    // Should its thread die now, the wait goes on with the volume that is opened again.
    const look = await entry.service.look().catch(unlessLost);
    const phase = look?.status.phase;
    if (phase === 'plain') return true;
    if (phase === 'sealed' || phase === 'retired') {
      throw new BlockferryError(
        'phase',
        `volume "${name}" is ${phase}: it moved away, watch it at its destination`,
      );
    }
    return entry.handoff.wait(timeoutMs, signal);
  }

  /** Makes a standby volume for a move. Repeated for the same volume it answers with the one that is there. */
  arrive(request: CreateVolume): Promise<VolumeView> {
    return this.queue.run(request.name, async () => {
      const { name } = request;
      const images = this.options.images;
      if (images === null)
        throw new BlockferryError('usage', 'this daemon serves one volume and takes no others');
      const present = this.entries.get(name);
      const home = await this.homeFor(request);
      if (present?.kind === 'open') {
        const { status } = await present.service.look();
        if (present.service.id === request.volumeId && status.phase === 'standby') return this.look(present);
        if (status.phase !== 'retired') {
          throw new BlockferryError('exists', `there is a volume "${name}" (${status.phase}) here already`);
        }
        await this.drop(name, present);
      } else if (present && present.view.retiredId === null) {
        throw new BlockferryError(
          'exists',
          `there is a volume "${name}" here that could not be opened: ${present.view.error}`,
        );
      }
      if (this.entries.size >= VOLUMES_MAX) {
        throw new BlockferryError('no-space', `this daemon has ${VOLUMES_MAX} volumes and takes no more`);
      }
      const image = home?.image ?? request.image ?? freeImagePath(images, name, request.generation);
      await this.receive(request, image, home?.stamp ?? null);
      return this.view(name);
    });
  }

  /** A volume whose cancelling was begun takes over no more: the proof of that may be out. */
  takeover(name: string, generation?: number): Promise<{ generation: number }> {
    return this.queue.run(name, async () => {
      const { service } = this.entry(name);
      if (this.options.record.proof(service.id) !== undefined) {
        throw new BlockferryError(
          'generation',
          `volume "${name}" was about to be cancelled: it takes over no more, cancel it (migrate --abort)`,
        );
      }
      return service.takeover(generation);
    });
  }

  /** Standby -> gone. For a volume that is gone already the proof is given again. */
  cancel(name: string, volumeId: string): Promise<RetreatProof> {
    return this.queue.run(name, async () => {
      const entry = this.entries.get(name);
      if (entry?.kind !== 'open' || entry.service.id !== volumeId) {
        const known = this.options.record.proof(volumeId);
        if (known) {
          await this.options.record.addProof(known); // it may not have been durable
          return known;
        }
        throw new BlockferryError('not-found', `this daemon has no volume "${name}" with the id ${volumeId}`);
      }
      const { phase, generation } = (await entry.service.look()).status;
      if (phase !== 'standby') {
        throw new BlockferryError('phase', `volume "${name}" is ${phase}: only a standby can be cancelled`);
      }
      // Before the volume goes: once it is gone nothing else could prove it. No takeover gets in between, they queue as this does.
      const proof = { volumeId, generation: generation + 1 };
      await this.options.record.addProof(proof);
      await this.unpublish(name, entry);
      try {
        await entry.service.cancel();
        this.entries.delete(name);
        await this.forgetArrival(name);
        return proof;
      } catch (error) {
        this.markUnavailable(name, entry.service.image, null, messageOf(error));
        throw error;
      }
    });
  }

  /** The volume's own image of an earlier stay, if it is to come home to that. It must be what the source was told. */
  private async homeFor({ name, volumeId, preCopy = null }: CreateVolume): Promise<Home | null> {
    const since = preCopy?.since ?? null;
    if (since === null) return null;
    const standby = this.entries.get(name);
    if (standby?.kind === 'open' && standby.service.id === volumeId) {
      if ((await standby.service.look()).status.phase === 'standby') return null; // repeated: it is here
    }
    const home = await homeOf(this.options.stateDir, name);
    if (home?.id === volumeId && home.generation === since) return home;
    throw new BlockferryError(
      'state-mismatch',
      `the image of "${name}" that was left here is not generation ${since} any more: plan the move anew`,
    );
  }

  private async receive(request: CreateVolume, image: string, homeStamp: string | null): Promise<void> {
    const { stateDir, images, record } = this.options;
    const { name, sourceUri, volumeId, generation, size, rateBytesPerSecond = null } = request;
    const { compression, preCopy: round = null } = request;
    const preCopy = round === null ? null : { context: DIRTY, cookie: round.cookie, fills: round.fills };
    this.entries.delete(name);
    await record.expectVolume(name, image, volumeId);
    try {
      if (homeStamp !== null) await giveUpHome(stateDir, name);
      if ((await retiredId(stateDir, name)) !== null) setRetiredAside(stateDir, name);
      if (request.image === undefined && images !== null) mkdirSync(images, { recursive: true, mode: 0o700 });
      const mode = {
        kind: 'arrive',
        sourceUri,
        volumeId,
        generation,
        size,
        rateBytesPerSecond,
        preCopy,
        homeStamp,
        ...(compression === undefined ? {} : { compression }),
      } as const;
      await this.openEntry(name, image, mode, new Occurrence());
    } catch (error) {
      await this.notArrived(name, image, error);
      throw error;
    }
  }

  /** What came of a volume before its thread died stays, as after a kill: the move is repeated, or cancelled. */
  private async notArrived(name: string, image: string, error: unknown): Promise<void> {
    if (error instanceof ThreadLostError && hasState(this.options.stateDir, name))
      await this.reopen(name, image, { kind: 'resume' }, new Occurrence());
    else await this.forgetArrival(name);
  }

  /** As if it had never come: what was retired here before is so again. */
  private async forgetArrival(name: string): Promise<void> {
    const { stateDir, record } = this.options;
    await record.forgetVolume(name);
    bringRetiredBack(stateDir, name);
    const retired = await retiredId(stateDir, name);
    if (retired !== null) this.markUnavailable(name, '', retired, 'it moved to another host');
  }

  private markUnavailable(name: string, image: string, retired: string | null, error: string): void {
    this.entries.set(name, { kind: 'unavailable', view: unavailable(name, image, retired, error) });
  }

  /** Resolves when the client on stdio, if a volume is served there, is gone. */
  stdioClosed(): Promise<void> {
    const sessions = [...this.entries.values()].flatMap((entry) =>
      entry.kind === 'open' ? entry.service.stdioClosed : [],
    );
    return Promise.race([...sessions, new Promise<void>(() => undefined)]);
  }

  /** Ends all sessions, then lets go of every volume. */
  async close(): Promise<void> {
    this.closing = true;
    for (const [name, entry] of this.entries) {
      if (entry.kind !== 'open') continue;
      await this.drop(name, entry).catch((error: unknown) => this.failures.push(error));
    }
    if (this.failures.length > 0) throw this.failures[0];
  }

  /** What is free where images of arriving volumes go. */
  imagesSpace(): { path: string; freeBytes: number } | null {
    const path = this.options.images;
    return path === null ? null : { path, freeBytes: freeBytes(path) };
  }

  private known(name: string): VolumeEntry {
    const entry = this.entries.get(name);
    if (entry) return entry;
    throw new BlockferryError('not-found', `this daemon has no volume "${name}"`);
  }

  private entry(name: string): OpenEntry {
    const entry = this.known(name);
    if (entry.kind === 'open') return entry;
    throw new BlockferryError('closed', `volume "${name}" is not served: ${entry.view.error}`);
  }

  private async look(entry: VolumeEntry, quiet = false): Promise<VolumeView> {
    return this.withHome(await viewOf(entry, quiet, this.options.link?.listener));
  }

  /** Of a volume that moved away. */
  private async withHome(view: VolumeView): Promise<VolumeView> {
    const left = view.phase === 'retired' || (view.phase === 'unavailable' && view.retiredId !== null);
    if (!left) return view;
    return { ...view, home: (await homeOf(this.options.stateDir, view.name))?.generation ?? null };
  }

  /** A thread that died meanwhile may have died of another volume: a second attempt, of one volume at a time, tells. */
  private async openPatiently(
    name: string,
    image: string,
    mode: OpenMode,
    handoff = new Occurrence(),
  ): Promise<void> {
    try {
      await this.openEntry(name, image, mode, handoff);
    } catch (error) {
      if (!(error instanceof ThreadLostError) || this.closing) throw error;
      const now: OpenMode = hasState(this.options.stateDir, name) ? { kind: 'resume' } : mode;
      await this.queue.run(SECOND_ATTEMPTS, () => this.openEntry(name, image, now, handoff));
    }
  }

  private async openEntry(name: string, image: string, mode: OpenMode, handoff: Occurrence): Promise<void> {
    const { stateDir, hold, log, link, guestAddresses, guestSettings, guestPolicy, linkPolicy } =
      this.options;
    const guest = { addresses: guestAddresses(name), policy: guestPolicy(name), settings: guestSettings };
    let entry: OpenEntry | null = null;
    const onLost = (why: Error): void => {
      if (entry !== null) this.lost(name, entry, why);
    };
    const service = await hold({ stateDir, name, image, mode, log, guest, onLost });
    entry = { kind: 'open', service, mode, handoff };
    link?.table.add(name, () => service.linkDescription, service.link, linkPolicy(name), service.hashes);
    service.handedOff().then(
      () => handoff.announce(),
      // The volume was closed or cancelled before: nobody may be left waiting for it.
      () => undefined,
    );
    this.entries.set(name, entry);
  }

  /** The volume's thread died. In this very step the volume is unavailable, and its reopening the next in its queue. */
  private lost(name: string, entry: OpenEntry, why: Error): void {
    if (this.entries.get(name) !== entry) return; // on its way out: whoever takes it away hears of it
    this.options.link?.table.remove(name);
    this.markUnavailable(name, entry.service.image, null, messageOf(why));
    if (this.closing) this.failures.push(why);
    void this.queue.run(name, async () => {
      // What was under way there may have failed, and left it so as well.
      if (this.closing || this.entries.get(name)?.kind !== 'unavailable') return;
      await this.reopen(name, entry.service.image, entry.mode, entry.handoff);
    });
  }

  /** As a daemon that starts does with what a killed one left. */
  private async reopen(name: string, image: string, mode: OpenMode, handoff: Occurrence): Promise<void> {
    const { stateDir, record, log } = this.options;
    const came = record.volumes().some(([arrived]) => arrived === name);
    try {
      if (hasState(stateDir, name)) await this.openPatiently(name, image, { kind: 'resume' }, handoff);
      else if (!came) await this.openPatiently(name, image, mode, handoff);
      if (this.entries.get(name)?.kind === 'open') log.info({ volume: name }, 'the volume is open again');
    } catch (error) {
      log.error({ volume: name }, `volume not served: ${messageOf(error)}`);
      this.markUnavailable(name, image, await retiredId(stateDir, name), messageOf(error));
    }
    if (!came || hasState(stateDir, name)) return;
    this.entries.delete(name); // its cancelling was complete
    await this.forgetArrival(name).catch((error: unknown) =>
      log.error({ volume: name, err: error }, 'its cancelling is not noted'),
    );
  }

  private async unpublish(name: string, entry: OpenEntry): Promise<void> {
    this.options.link?.table.remove(name);
    await entry.service.unpublish();
  }

  private async drop(name: string, entry: OpenEntry): Promise<void> {
    this.entries.delete(name);
    await this.unpublish(name, entry);
    await entry.service.close();
  }
}

/** Null for a thread that died. */
function unlessLost(error: unknown): null {
  if (error instanceof ThreadLostError) return null;
  throw error;
}
