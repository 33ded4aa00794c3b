/**
 * One proxied volume through many lives of its daemon, each ended by kill -9. What is compared, and with what, is in model.ts; here is
 * when the daemon dies.
 */
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import type { Phase } from '../../../src/host/service.js';
import { Errno } from '../../../src/nbd/constants.js';
import { contentOf, SOURCE_TAG } from './content.js';
import { CommandDaemon, type Daemon, Died, type Spares } from './daemon.js';
import { Guest, MIXED, type Mix } from './guest.js';
import type { Machine } from './machine.js';
import { DiskModel } from './model.js';
import type { Loss } from './power.js';
import type { Random } from './random.js';
import { type RunningSource, Source, serveSource } from './source.js';

export interface VolumePlan {
  name: string;
  sizeBytes: number;
  /** Where state and image lie. */
  folder: string;
  standby?: boolean;
  background?: boolean;
  rateBytesPerSecond?: number | null;
  /** The source has zero ranges, and says so. */
  sparse?: boolean;
  /** Share of the source's answers that are errors. */
  sourceErrors?: number;
  /** Longest delay of the source's answers, ms. */
  sourceDelayMsMax?: number;
  /** The daemon runs on this machine, which loses power now and then. */
  machine?: Machine;
}

export type Moment = 'work' | 'start' | 'flush' | 'close' | 'stopped';

/** Counted over a campaign. */
export interface Tally {
  kills: number;
  /** Kills that took the machine's power with them. */
  powerLosses: number;
  operations: number;
  refused: number;
  /** Blocks that were local when everything was compared. */
  local: number[];
}

/** Share of the daemon's deaths that are the machine's. */
const POWER_LOST = 0.7;
const HAND_OFF_MS_MAX = 10_000;
const LOSSES: Loss[] = [0, 0.05, 0.5, 1, 1];

const ZERO_EVERY_BYTES = 1 << 20;

export class Campaign {
  readonly model: DiskModel;
  readonly source: Source;
  readonly socket: string;
  readonly image: string;
  readonly stateDir: string;
  readonly tally: Tally = { kills: 0, powerLosses: 0, operations: 0, refused: 0, local: [] };
  readonly #errors: string[] = [];
  #served!: RunningSource;
  #running: Daemon | undefined;
  /** What was local for certain when the daemon last died: it is never fetched again. */
  #kept: Uint8Array;

  private constructor(
    readonly plan: VolumePlan,
    readonly random: Random,
    /** What starts its daemons: spares, or the real command line. */
    readonly starts: Spares | 'command',
  ) {
    const content = contentOf(SOURCE_TAG, 0, plan.sizeBytes);
    const zeroes = [];
    for (let at = ZERO_EVERY_BYTES / 2; plan.sparse && at < plan.sizeBytes; at += ZERO_EVERY_BYTES)
      zeroes.push({ offset: at, length: Math.min(ZERO_EVERY_BYTES / 4 + 1000, plan.sizeBytes - at) });
    this.source = new Source(content, zeroes);
    const slowest = plan.sourceDelayMsMax ?? 3;
    this.source.delayMs = () => (random.chance(0.5) ? 0 : random.between(1, slowest));
    const failing = plan.sourceErrors ?? 0;
    this.source.errno = () => (random.chance(failing) ? Errno.EIO : Errno.OK);
    this.source.onConnection = () => {
      const kept = this.#kept; // what a dead daemon asked for may come late
      return (first, end) => this.#fetched(kept, first, end);
    };
    this.model = new DiskModel(content, { machineCrashes: plan.machine !== undefined });
    this.model.keeps = !plan.standby;
    this.#kept = Uint8Array.from(this.model.local);
    this.socket = join(plan.folder, `${plan.name}.sock`);
    const disk = plan.machine?.root ?? plan.folder;
    this.image = join(disk, `${plan.name}.img`);
    this.stateDir = join(disk, 'state');
  }

  static async begin(plan: VolumePlan, random: Random, starts: Spares | 'command'): Promise<Campaign> {
    mkdirSync(plan.folder, { recursive: true });
    const campaign = new Campaign(plan, random, starts);
    await campaign.#serve();
    return campaign;
  }

  get sourceUri(): string {
    return this.#served.uri;
  }

  #fetched(kept: Uint8Array, first: number, end: number): void {
    for (let block = first; block < end; block++)
      if (kept[block] === 1 && this.#errors.length < 10)
        this.#errors.push(`block ${block} was local before the daemon died, and was fetched again`);
  }

  /** Throws what was seen beside the guest's own answers. */
  check(): void {
    if (this.#errors.length > 0) throw new Error(this.#errors.join('\n'));
  }

  /** From now on nothing that is local now may be fetched again. */
  #daemonDied(child: Daemon): void {
    this.tally.kills++;
    const { machine } = this.plan;
    machine?.daemonDied(child);
    if (machine !== undefined && this.random.chance(POWER_LOST)) {
      machine.losePower(this.random, this.random.pick(LOSSES));
      this.model.machineCrashed();
      this.tally.powerLosses++;
    }
    this.#kept = Uint8Array.from(this.model.local);
    this.check();
  }

  volume(rateBytesPerSecond = this.plan.rateBytesPerSecond ?? null) {
    const { name, standby = false, background = true } = this.plan;
    return {
      stateDir: this.stateDir,
      name,
      image: this.image,
      mode: {
        kind: 'proxy' as const,
        sourceUri: this.sourceUri,
        standby,
        background,
        // Without a background copy only what is read comes: tests count on it.
        readAhead: background,
        rateBytesPerSecond,
        sourceTimeoutMs: null,
      },
    };
  }

  /** A daemon that serves the volume, and a guest that settled what was doubtful. */
  async resume(): Promise<{ child: Daemon; guest: Guest }> {
    const { child, uri } = this.#launch();
    return { child, guest: await this.attach(await uri) };
  }

  #launch(): { child: Daemon; uri: Promise<string> } {
    if (this.starts === 'command') {
      const child = new CommandDaemon(this.words());
      this.#running = child;
      return { child, uri: child.ready() };
    }
    const child = this.starts.take();
    this.#running = child;
    return { child, uri: child.open(this.volume(), this.socket) };
  }

  async attach(uri: string): Promise<Guest> {
    const guest = await Guest.attach(uri, this.model, this.random.fork());
    await guest.settle();
    return guest;
  }

  /** Starts the real daemon: words of its command line, and what kills it in the end. */
  words(): string[] {
    const { name, background = true, rateBytesPerSecond = null, standby = false } = this.plan;
    return [
      ...['proxy', this.sourceUri, this.image, '--name', name],
      ...['--listen', `unix:${this.socket}`, '--state-dir', this.stateDir, '--log-level', 'warn'],
      ...(background ? [] : ['--no-background']),
      ...(standby ? ['--standby'] : []),
      ...(rateBytesPerSecond === null ? [] : ['--bandwidth', `${rateBytesPerSecond}/s`]),
    ];
  }

  /** One life of the daemon, and its end. */
  async live(moment: Moment, options: { compare?: boolean; mix?: Mix } = {}): Promise<void> {
    if (moment === 'start') return this.#dieAtStart();
    const { child, guest } = await this.resume();
    if (options.compare) this.tally.local.push((await guest.compareAll()).localBlocks);
    await this.killAtWork(child, guest, { ...options, moment, answers: this.random.below(120) });
  }

  /** Lets the guest work, and kills the daemon after so many answers and a moment more. */
  async killAtWork(
    child: Daemon,
    guest: Guest,
    options: { answers: number; moment?: Moment; mix?: Mix },
  ): Promise<void> {
    if (options.moment === 'stopped') return this.#stop(child, guest, options.answers);
    const over = this.#diesAt(options.moment ?? 'work', child, guest, options.answers);
    await guest.work(options.mix ?? MIXED);
    await over;
    this.#ended(child, guest);
  }

  /** An orderly end: all that was answered is durable. */
  async #stop(child: Daemon, guest: Guest, answers: number): Promise<void> {
    guest.onAnswer = () => {
      if (guest.completed >= answers) guest.stop();
    };
    await guest.work();
    const flush = this.model.beginFlush();
    guest.detach();
    await child.stop();
    assert.equal(child.process.exitCode, 0, child.stderr);
    this.model.endFlush(flush);
    this.#ended(child, guest);
  }

  /** Kills the daemon a moment from now. */
  async killNow(child: Daemon, guest: Guest): Promise<void> {
    await this.pause();
    await child.kill();
    this.#ended(child, guest);
  }

  #ended(child: Daemon, guest: Guest): void {
    guest.detach();
    this.tally.operations += guest.completed;
    this.tally.refused += guest.refused;
    this.#daemonDied(child);
  }

  /** What volume.json says. */
  phase(): Phase {
    const path = join(this.stateDir, this.plan.name, 'volume.json');
    return (JSON.parse(readFileSync(path, 'utf8')) as { phase: Phase }).phase;
  }

  async #dieAtStart(): Promise<void> {
    const { child, uri } = this.#launch();
    const opened = uri.catch((error) => {
      if (!(error instanceof Died)) throw error;
    });
    // A spare has only the volume to open; the command begins with node itself.
    await delay(this.random.below(this.starts === 'command' ? 600 : 25));
    await this.pause();
    await child.kill();
    await opened;
    this.#daemonDied(child);
  }

  /** Resolves when the daemon is dead: after so many answers, and a moment more. */
  #diesAt(moment: Moment, child: Daemon, guest: Guest, operations: number): Promise<void> {
    return new Promise((resolve, reject) => {
      const die = async (): Promise<void> => {
        if (moment === 'flush') void guest.flush(guest.client);
        if (moment === 'close') child.end();
        await this.pause();
        await child.kill();
      };
      let due = false;
      const look = (): void => {
        if (due || guest.completed < operations) return;
        due = true;
        die().then(resolve, reject);
      };
      guest.onAnswer = look;
      void child.exited.then(() => resolve());
      look();
    });
  }

  /** From nothing at all over some turns of the loop to some milliseconds. */
  async pause(): Promise<void> {
    const { random } = this;
    switch (random.below(4)) {
      case 0:
        return;
      case 1:
        for (let turns = random.below(20); turns > 0; turns--) await new Promise(setImmediate);
        return;
      case 2: {
        const until = performance.now() + random.fraction() * 2;
        while (performance.now() < until);
        return;
      }
      default:
        await delay(random.below(8));
    }
  }

  /** Does `what` while the source is away. */
  async withoutSource(what: () => Promise<void>): Promise<void> {
    await this.#served.close();
    try {
      await what();
    } finally {
      await this.#serve();
    }
  }

  async #serve(): Promise<void> {
    this.#served = await serveSource(this.source, join(this.plan.folder, `${this.plan.name}.source`));
  }

  /** The end of it: all of the disk through the daemon, then the image as it lies there. */
  async finish(): Promise<void> {
    const { child, guest } = await this.resume();
    this.source.errno = () => Errno.OK;
    await guest.compareAll();
    if (this.model.keeps) {
      await guest.readAll(); // fetches what is missing
      for (const deadline = Date.now() + HAND_OFF_MS_MAX; this.phase() !== 'plain'; await delay(2))
        assert.ok(Date.now() < deadline, 'all blocks are local, and no hand-off comes');
      await guest.readAll();
    }
    guest.detach();
    await child.stop();
    assert.equal(child.process.exitCode, 0, child.stderr);
    this.check();
    if (this.model.keeps) this.model.checkAll(readFileSync(this.image), 'the image after the hand-off');
  }

  async close(): Promise<void> {
    await this.#running?.kill();
    await this.#served.close();
    rmSync(this.image, { force: true });
  }
}
