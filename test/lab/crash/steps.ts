/**
 * One change of a volume, and its daemon killed right before each of the steps that it takes (system calls on its files, stores into
 * its live map), one after the other. What is left is opened twice: as the next process of the same boot finds it, and as the machine
 * finds it after it lost power at that moment. Then the change is asked for again.
 */
import assert from 'node:assert/strict';
import { cpSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError, type ErrorCode } from '../../../src/errors.js';
import type { OpenMode } from '../../../src/host/open.js';
import type { Phase, VolumeStatus } from '../../../src/host/service.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { BLOCK_BYTES } from '../../../src/volume/blocks.js';
import { contentOf, nameContent, SOURCE_TAG } from './content.js';
import { ChildDaemon, Died, Spares } from './daemon.js';
import type { Machine } from './machine.js';
import type { Loss } from './power.js';
import type { Random } from './random.js';
import { type RunningSource, Source, serveSource } from './source.js';

export const SIZE = 40 * 4096 + 700;
export const NAME = 'vm';
/** Nobody writes to it, and `read` leaves it out. */
export const UNREAD_BLOCK = 30;
export const VOLUME_ID = '3f0f0c3c-52a5-4c0e-8f53-6f7d4b5c1a11';
/** What the source holds when the machine stops there; before that it holds SOURCE_TAG's content. */
export const FINAL_TAG = 1000;

/** What is left of a volume: its phase and generation, or why it cannot be opened. */
export type Left = { phase: Phase; generation: number } | { refused: ErrorCode };

export interface Change {
  name: string;
  /** Makes the volume as it is before the change; ends with the volume closed. */
  prepare(bench: Bench): Promise<void>;
  /** How it is opened for the change; undefined: `make` opens it. */
  mode?: OpenMode;
  /** What is done before the change, each time. */
  before?(bench: Bench): Promise<void>;
  make(bench: Bench): Promise<unknown>;
  /** How what is left is opened; default: `mode`. */
  reopen?: OpenMode;
  /** What may be left, besides `after`, if the change was not answered. */
  from: Left;
  after: Left;
  /** An answer means that all that the guest wrote is on stable storage. */
  durable?: boolean;
  /** More that must hold of what is left. */
  look?(bench: Bench, left: Left, answered: boolean): Promise<void>;
  /** Whether the change is made again on what is left, with the same result. Default: yes. */
  again?(left: Left): boolean;
  /** What must hold after it was made again. */
  finally?(bench: Bench): Promise<void>;
}

/** How what is not certain arrives when power is lost. */
const LOSSES: Loss[] = [1, 0.4];

export class Bench {
  readonly source = new Source(contentOf(SOURCE_TAG, 0, SIZE));
  readonly image: string;
  readonly stateDir: string;
  readonly #template: string;
  readonly #aside: string;
  readonly #victims: Spares;
  readonly #steady: ChildDaemon;
  #daemon: ChildDaemon;
  #served!: RunningSource;
  #uri = '';
  /** The guest's writes: what the disk must have, and what it had before those that no flush covered. */
  expected = Buffer.alloc(0);
  #flushed = Buffer.alloc(0);
  /** With the write that may have been done or not. */
  #attempted = Buffer.alloc(0);
  #client: NbdClient | undefined;
  /** For `make`: what the last one answered. */
  answer: unknown;

  private constructor(
    readonly machine: Machine,
    private readonly folder: string,
    private readonly random: Random,
  ) {
    this.image = join(machine.root, 'vm.img');
    this.stateDir = join(machine.root, 'state');
    this.#template = join(folder, 'template');
    this.#aside = join(folder, 'aside');
    this.#victims = new Spares(() => machine.env());
    this.#steady = new ChildDaemon(machine.envUnwatched());
    this.#daemon = this.#steady;
  }

  static async begin(machine: Machine, folder: string, random: Random): Promise<Bench> {
    const bench = new Bench(machine, folder, random);
    bench.#served = await serveSource(bench.source, join(folder, 'steps.source'));
    return bench;
  }

  async close(): Promise<void> {
    this.#client?.destroy();
    await this.#victims.close();
    await this.#steady.kill();
    if (this.#daemon !== this.#steady) await this.#daemon.kill();
    await this.#served.close();
  }

  get arriving(): OpenMode {
    const { uri } = this.#served;
    return {
      kind: 'arrive',
      sourceUri: uri,
      volumeId: VOLUME_ID,
      generation: 1,
      size: SIZE,
      rateBytesPerSecond: null,
    };
  }

  /** Of a volume that exists, or a new one for which nobody else cares. No background copy: every step is the change's own. */
  get proxying(): OpenMode {
    return {
      kind: 'proxy',
      sourceUri: this.#served.uri,
      standby: true,
      background: false,
      rateBytesPerSecond: null,
      sourceTimeoutMs: null,
    };
  }

  get serving(): OpenMode {
    return { kind: 'serve', readOnly: false };
  }

  get daemon(): ChildDaemon {
    return this.#daemon;
  }

  async open(mode: OpenMode): Promise<void> {
    const socket = join(this.folder, 'steps.sock');
    this.#uri = await this.#daemon.open(
      { stateDir: this.stateDir, name: NAME, image: this.image, mode },
      socket,
    );
  }

  async shut(): Promise<void> {
    this.#client?.destroy();
    this.#client = undefined;
    await this.#daemon.command({ do: 'close' });
  }

  async client(): Promise<NbdClient> {
    this.#client ??= await NbdClient.connect(this.#uri);
    return this.#client;
  }

  /** Reads the disk, all but one block: with that the last would be local, and a hand-off of its own would follow. */
  async read(): Promise<Buffer> {
    const found = Buffer.from(this.expected);
    const client = await this.client();
    await client.read(0, UNREAD_BLOCK * BLOCK_BYTES, found, 0);
    const rest = (UNREAD_BLOCK + 1) * BLOCK_BYTES;
    await client.read(rest, SIZE - rest, found, rest);
    return found;
  }

  /** An answered write; `tag` tells it from others. */
  async write(tag: number, offset: number, length: number): Promise<void> {
    const content = contentOf(tag, offset, length);
    content.copy(this.#attempted, offset);
    await (await this.client()).write(offset, content, 0, length);
    content.copy(this.expected, offset);
  }

  async flush(): Promise<void> {
    await (await this.client()).flush();
    this.flushed();
  }

  /** All that was written is durable. */
  flushed(): void {
    this.#flushed = Buffer.from(this.expected);
  }

  /** What the guest's disk has from now on. */
  startFrom(content: Buffer): void {
    this.expected = Buffer.from(content);
    this.#attempted = Buffer.from(content);
    this.flushed();
  }

  /** The machine at the source wrote on until it stopped there: from now on its disk is `tag`'s. */
  sourceBecomes(tag: number): void {
    this.source.content.set(contentOf(tag, 0, SIZE));
    this.startFrom(this.source.content);
  }

  /** Compares the whole disk; `lost`: writes that no flush covered may be gone. */
  compare(found: Buffer, lost: boolean, what: string): void {
    for (let at = 0; at < SIZE; at++) {
      if (found[at] === this.expected[at] || found[at] === this.#attempted[at]) continue;
      if (lost && found[at] === this.#flushed[at]) continue;
      const is = nameContent(found.subarray(at), at, FINAL_TAG + 10);
      assert.fail(
        `${what}: byte ${at} is ${is}, not ${nameContent(this.expected.subarray(at), at, FINAL_TAG + 10)}`,
      );
    }
  }

  async left(change: Change): Promise<Left> {
    try {
      await this.open(change.reopen ?? change.mode ?? this.proxying);
    } catch (error) {
      if (!(error instanceof BlockferryError)) throw error;
      return { refused: error.code };
    }
    return this.now();
  }

  async now(): Promise<Left> {
    const { phase, generation } = await this.#daemon.command<VolumeStatus>({ do: 'status' });
    return { phase, generation };
  }

  async isRefused(work: Promise<unknown>, code: ErrorCode): Promise<void> {
    await assert.rejects(work, (error: unknown) => error instanceof BlockferryError && error.code === code);
  }

  /** The guest cannot write: what it tries is refused, and not done. */
  async refusesWrites(): Promise<void> {
    const content = contentOf(FINAL_TAG + 1, 0, 512);
    await this.isRefused((await this.client()).write(0, content, 0, 512), 'source-io');
  }

  /** Runs `work` in a daemon of its own, which is killed then. */
  async killedAfter(work: () => Promise<void>): Promise<void> {
    this.#daemon = new ChildDaemon(this.machine.envUnwatched());
    await work();
    this.#client?.destroy();
    this.#client = undefined;
    await this.#daemon.kill();
    this.#daemon = this.#steady;
  }

  /** Runs a change with a crash before each of its steps. Returns how many there are. */
  async everyStep(change: Change): Promise<number> {
    await this.#prepare(change);
    const steps = await this.#crashAt(change, 0);
    assert.ok(steps > 0, `${change.name} takes no step: it tests nothing`);
    for (let step = 1; step <= steps; step++) await this.#crashAt(change, step);
    return steps;
  }

  async #prepare(change: Change): Promise<void> {
    this.#empty();
    this.machine.boot(BOOT);
    this.#daemon = this.#steady;
    this.source.content.set(contentOf(SOURCE_TAG, 0, SIZE));
    this.startFrom(this.source.content);
    await change.prepare(this);
    rmSync(this.#template, { recursive: true, force: true });
    cpSync(this.machine.root, this.#template, { recursive: true });
    this.#prepared = {
      expected: this.expected,
      flushed: this.#flushed,
      source: Buffer.from(this.source.content),
    };
  }

  #prepared = { expected: Buffer.alloc(0), flushed: Buffer.alloc(0), source: Buffer.alloc(0) };

  #empty(): void {
    for (const entry of readdirSync(this.machine.root))
      rmSync(join(this.machine.root, entry), { recursive: true, force: true });
  }

  /** One crash, before step `step` of the change (0: behind its last). Returns the steps that were made. */
  async #crashAt(change: Change, step: number): Promise<number> {
    this.#empty();
    cpSync(this.#template, this.machine.root, { recursive: true });
    this.machine.boot(BOOT);
    this.source.content.set(this.#prepared.source);
    this.startFrom(this.#prepared.expected);
    this.#flushed = Buffer.from(this.#prepared.flushed);
    const victim = this.#victims.take();
    this.#daemon = victim;
    const answered = await this.#dieAt(change, step, victim);
    const steps = this.machine.daemonDied(victim);
    const { power } = this.machine;
    if (answered && change.durable) this.flushed();
    const where = `${change.name}, killed ${step === 0 ? 'when it was done' : `before step ${step}`}`;
    rmSync(this.#aside, { recursive: true, force: true });
    cpSync(this.machine.root, this.#aside, { recursive: true });
    const after = {
      expected: this.expected,
      flushed: this.#flushed,
      attempted: this.#attempted,
      source: Buffer.from(this.source.content),
      answer: this.answer,
    };
    const restore = (): void => {
      this.expected = Buffer.from(after.expected);
      this.#flushed = Buffer.from(after.flushed);
      this.#attempted = Buffer.from(after.attempted);
      this.source.content.set(after.source);
      this.answer = after.answer;
    };
    restore();
    await this.#examine(change, answered, false, where);
    for (const loss of LOSSES) {
      this.#empty();
      cpSync(this.#aside, this.machine.root, { recursive: true });
      this.machine.losePower(this.random, loss, power);
      restore();
      await this.#examine(change, answered, true, `${where}, and power lost (${loss})`);
    }
    return steps;
  }

  async #dieAt(change: Change, step: number, victim: ChildDaemon): Promise<boolean> {
    if (change.mode !== undefined) await this.open(change.mode);
    await change.before?.(this);
    await victim.command({ do: 'arm', step });
    this.answer = undefined;
    let answered = true;
    try {
      this.answer = await change.make(this);
    } catch (error) {
      if (!(error instanceof Died) && (error as { code?: string }).code !== 'closed') throw error;
      answered = false;
    }
    await Promise.race([victim.exited, delay(step === 0 ? LAST_STEPS_MS : 0)]);
    this.#client?.destroy();
    this.#client = undefined;
    await victim.kill();
    return answered;
  }

  async #examine(change: Change, answered: boolean, lost: boolean, where: string): Promise<void> {
    this.#daemon = this.#steady;
    try {
      const left = await this.left(change);
      const allowed = answered ? [change.after] : [change.from, change.after];
      assert.ok(
        allowed.some((one) => JSON.stringify(one) === JSON.stringify(left)),
        `${JSON.stringify(left)} is left, not ${allowed.map((one) => JSON.stringify(one)).join(' or ')}`,
      );
      if (!('refused' in left)) {
        // A sealed disk is read by its destination only; what that would get is the image.
        const found = left.phase === 'sealed' ? readFileSync(this.image) : await this.read();
        this.compare(found, lost, 'the disk');
      }
      await change.look?.(this, left, answered);
      if (change.again?.(left) ?? true) await this.#again(change);
    } catch (error) {
      throw new Error(`${where}: ${(error as Error).message}`, { cause: error });
    } finally {
      await this.shut();
    }
  }

  async #again(change: Change): Promise<void> {
    if (change.mode === undefined) await this.shut();
    const again = await change.make(this);
    if (this.answer != null) assert.deepEqual(again, this.answer, 'the same change, another answer');
    this.answer ??= again;
    if ('phase' in change.after)
      assert.deepEqual(await this.now(), change.after, 'after the change was made again');
    await change.finally?.(this);
  }
}

const BOOT = 'aaaaaaaa-1111-4222-8333-444444444444';
/** What a daemon still does behind its answer, it does at once. */
const LAST_STEPS_MS = 60;
