/**
 * Moves between two real daemons, each a process of its own that can be killed, of a machine that only pretends: its disk is used by an NbdGuest, its
 * memory takes no time. The coordinator is the real one, in this process. What happens at which of its calls is the test's to say.
 */
import assert from 'node:assert/strict';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { BlockferryError } from '../../src/errors.js';
import type { HostControl, MachineView, StatusView, VolumeView } from '../../src/host/control/api.js';
import type { ControlClient } from '../../src/host/control/client.js';
import type { MachineDefinition, MigrationInfo } from '../../src/hypervisor/driver.js';
import { runMove } from '../../src/migration/coordinator.js';
import { Journal } from '../../src/migration/journal.js';
import { makePlan, type Switch } from '../../src/migration/plan.js';
import type { MoveResult } from '../../src/migration/result.js';
import type { Direction } from '../../src/migration/steps.js';
import { Random } from './crash/random.js';
import { LabHost } from './hosts.js';
import { NbdGuest } from './nbd-guest.js';

export const VM = 'vm1';
export const DISK = 'disk';
const DEFINITION: MachineDefinition = {
  name: VM,
  binary: 'none',
  args: [],
  disks: [{ volume: DISK, node: 'disk0' }],
  serial: false,
};
const TIMING = { pollMs: 20, runningTimeoutMs: 5000, patienceMs: 15_000, retryDelayMs: 20 };
const COORDINATORS_MAX = 6;
/** Looks at a migration until its memory is over. */
const MEMORY_LOOKS = 3;

export type SideName = 'a' | 'b';
export type Role = 'from' | 'to';

/** Thrown through the coordinator as if its process had ended. */
export class Killed extends Error {}

/** A call of the coordinator's. */
export interface Call {
  readonly role: Role;
  readonly verb: string;
  /** Calls of this verb at this host before it, in this move. */
  readonly nth: number;
}

/** What happens at the calls of a move. */
export interface Faults {
  before?: (call: Call) => Promise<void> | void;
  /** Its answer is lost if this throws. */
  after?: (call: Call) => Promise<void> | void;
}

interface PretendedMachine {
  state: 'none' | 'running' | 'paused' | 'incoming' | 'departed';
  moveId: string | null;
  migration: string | null;
  looks: number;
}

export class Side {
  readonly machine: PretendedMachine = { state: 'none', moveId: null, migration: null, looks: 0 };
  host!: LabHost;
  /** A daemon is being started. */
  #starting: Promise<void> | null = null;

  constructor(
    readonly name: SideName,
    readonly folder: string,
    readonly image: string | null,
  ) {}

  get client(): ControlClient {
    return this.host.client;
  }

  get guestUri(): string {
    return `nbd+unix:///?socket=${join(this.folder, this.name, 'run', 'nbd', `${DISK}.sock`)}`;
  }

  /** Its images that arrived. */
  get images(): string[] {
    const folder = join(this.folder, this.name, 'images');
    return existsSync(folder) ? readdirSync(folder) : [];
  }

  start(): Promise<void> {
    this.#starting ??= LabHost.start({
      folder: this.folder,
      name: this.name,
      ...(this.image === null ? {} : { volumes: [{ name: DISK, image: this.image }] }),
      // The same after a restart: a link that is lost comes back.
      more: { link: `unix:${join(this.folder, `${this.name}.link`)}`, dataThreads: 1 },
    })
      .then((host) => {
        this.host = host;
      })
      .finally(() => {
        this.#starting = null;
      });
    return this.#starting;
  }

  async kill(): Promise<void> {
    this.host.daemon.kill();
    await this.host.daemon.exited;
    this.host.client.close();
  }

  async restart(): Promise<void> {
    await this.kill();
    await this.start();
  }

  /** Ends the daemon in order and starts it again. */
  async reboot(between: () => void = () => undefined): Promise<void> {
    assert.equal(await this.host.stop(), 0, this.host.daemon.stderr);
    between();
    await this.start();
  }

  signal(name: 'SIGSTOP' | 'SIGCONT'): void {
    this.host.daemon.child.kill(name);
  }

  async view(): Promise<VolumeView | null> {
    return this.client.volume(DISK).catch((error: unknown) => {
      if (error instanceof BlockferryError && error.code === 'not-found') return null;
      throw error;
    });
  }
}

export interface MovesOptions {
  seed: number;
  content: Buffer;
}

export class Moves {
  readonly violations: string[] = [];
  readonly log: string[] = [];
  /** What goes on beside a move, and must be over before its end is looked at. */
  readonly beside: Promise<void>[] = [];
  /** Where the machine runs, or stands still on its way. */
  at: SideName = 'a';
  #moves = 0;

  private constructor(
    readonly folder: string,
    readonly a: Side,
    readonly b: Side,
    readonly guest: NbdGuest,
  ) {}

  static async open({ seed, content }: MovesOptions): Promise<Moves> {
    // In memory where that is possible: syncs are many and nobody loses power here.
    const folder = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'bfm-'));
    const image = join(folder, 'disk.img');
    writeFileSync(image, content);
    mkdirSync(join(folder, 'a', 'images'), { recursive: true });
    const moves = new Moves(
      folder,
      new Side('a', folder, image),
      new Side('b', folder, null),
      new NbdGuest(content, new Random(seed)),
    );
    try {
      await Promise.all([moves.a.start(), moves.b.start()]);
    } catch (error) {
      await moves.close();
      throw error;
    }
    moves.a.machine.state = 'running';
    moves.guest.resume(moves.a.guestUri);
    return moves;
  }

  async close(): Promise<void> {
    await this.guest.close();
    for (const side of [this.a, this.b]) {
      side.host?.daemon.child.kill('SIGCONT');
      await side.host?.stop();
    }
    rmSync(this.folder, { recursive: true, force: true });
  }

  get here(): Side {
    return this[this.at];
  }

  get there(): Side {
    return this.at === 'a' ? this.b : this.a;
  }

  /**
   * One move of the machine to the other host, continued by new coordinators until it has come to an end: the first of them by `then`, as a person
   * would. Checks that the machine works on where it is then, that all it ever wrote is there, and that nobody else can write.
   */
  async move(when: Switch, faults: Faults = {}, then: Direction = 'forward'): Promise<MoveResult> {
    const [from, to] = [this.here, this.there];
    this.log.length = 0;
    const plain = { from: this.control(from, 'from', {}), to: this.control(to, 'to', {}) };
    const journal = Journal.create(
      join(this.folder, `migrations-${++this.#moves}`),
      await makePlan(plain.from, plain.to, {
        vm: VM,
        switch: when,
        bandwidthBytesPerSecond: null,
        deleteSourceImages: false,
      }),
    );
    this.log.length = 0;
    const faulty = { from: this.control(from, 'from', faults), to: this.control(to, 'to', faults) };
    let result = await this.#coordinate(journal, faulty, 'forward');
    let direction = then;
    for (let count = 1; result === null; count++) {
      assert.ok(count < COORDINATORS_MAX, `the move does not end: ${this.log.slice(-40).join(', ')}`);
      const again = Journal.open(journal.path);
      result = await this.#coordinate(again, plain, direction);
      // A person turns to the other way if the one does not go.
      direction = direction === 'forward' ? 'back' : 'forward';
    }
    await this.#settled(result);
    return result;
  }

  /** Null: it has not come to an end. */
  async #coordinate(
    journal: Journal,
    { from, to }: { from: HostControl; to: HostControl },
    direction: Direction,
  ): Promise<MoveResult | null> {
    try {
      return await runMove({ from, to, journal, direction, timing: TIMING });
    } catch (error) {
      const expected =
        error instanceof Killed || (error instanceof BlockferryError && error.code === 'migration');
      if (!expected) throw error;
      this.log.push(`(${error.message.slice(0, 300)})`);
      return null;
    } finally {
      journal.close();
    }
  }

  async #settled(result: MoveResult): Promise<void> {
    await Promise.all(this.beside.splice(0));
    const hint = `${result.outcome}: ${result.why}; ${this.log.join(', ')}`;
    assert.deepEqual(this.violations, [], hint);
    if (result.outcome === 'moved') this.at = this.at === 'a' ? 'b' : 'a';
    const [here, there] = [this.here, this.there];
    assert.equal(here.machine.state, 'running', hint);
    assert.ok(this.guest.runs, hint);
    await this.guest.progress(30);
    const view = await here.view();
    assert.equal(view?.phase, 'plain', hint);
    assert.ok(view.phase === 'plain' && (view.tracking?.moveId ?? null) === null, `still tracked: ${hint}`);
    const other = await there.view();
    const left =
      other === null ||
      other.phase === 'retired' ||
      (other.phase === 'unavailable' && other.retiredId !== null);
    assert.ok(left, `${other?.phase} is left: ${hint}`);
    await this.guest.pause();
    await this.guest.verify();
    this.guest.resume(here.guestUri);
  }

  /** Host control of one side, whose machine pretends. */
  control(side: Side, role: Role, faults: Faults): HostControl {
    const counts = new Map<string, number>();
    const own = this.#machineVerbs(side);
    const target = { address: side.host.control } as HostControl;
    return new Proxy(target, {
      get: (_target, verb: string) => {
        if (verb === 'address') return side.host.control;
        return async (...words: unknown[]) => {
          const nth = counts.get(verb) ?? 0;
          counts.set(verb, nth + 1);
          const call = { role, verb, nth };
          await faults.before?.(call);
          this.log.push(`${role}.${verb}`);
          const act = own[verb] ?? (Reflect.get(side.client, verb) as (...words: unknown[]) => unknown);
          let answer: unknown;
          try {
            answer = await act.apply(own[verb] === undefined ? side.client : own, words);
          } catch (error) {
            if (error instanceof BlockferryError)
              this.log.push(`! ${error.code} ${error.message.slice(0, 200)}`);
            throw error;
          }
          await faults.after?.(call);
          if (faults.after !== undefined || faults.before !== undefined) await this.#checkWriters();
          return answer;
        };
      },
    });
  }

  /** Never are both sides open to the machine's writes. */
  async #checkWriters(): Promise<void> {
    const views = await Promise.all([this.a, this.b].map((side) => side.view().catch(() => null)));
    const open = views.filter((view) => view?.phase === 'plain' || view?.phase === 'relocating');
    if (open.length > 1) this.violations.push(`two writers after ${this.log.at(-1)}`);
  }

  #machineVerbs(side: Side): Record<string, (...words: unknown[]) => unknown> {
    const { machine } = side;
    const other = side === this.a ? this.b : this.a;
    const refuse = (message: string): never => {
      throw new BlockferryError('phase', message);
    };
    const verbs = {
      status: async (): Promise<StatusView> => {
        const { daemon, volumes } = await side.client.status();
        return { daemon, volumes, vms: machine.state === 'none' ? [] : [viewOf(machine)] };
      },
      machine: async () => {
        if (machine.state === 'none') throw new BlockferryError('not-found', `no machine ${VM}`);
        return viewOf(machine);
      },
      claim: async (_vm: string, moveId: string) => {
        machine.moveId = moveId;
        machine.migration = null;
      },
      release: async (_vm: string, moveId: string) => {
        if (machine.moveId === moveId) machine.moveId = null;
      },
      incoming: async (_vm: string, moveId: string) => {
        if (machine.state === 'none' || machine.state === 'departed')
          Object.assign(machine, { state: 'incoming', moveId, migration: null });
        return { uri: 'tcp:nowhere:1' };
      },
      migrate: async () => {
        if (other.machine.state !== 'incoming') refuse('nobody waits for the machine');
        Object.assign(machine, { migration: 'active', looks: 0 });
      },
      waitMigration: async (): Promise<MigrationInfo> => {
        if (machine.migration === 'active' && ++machine.looks >= MEMORY_LOOKS) {
          await this.guest.pause();
          Object.assign(machine, { migration: 'pre-switchover', state: 'paused' });
        }
        return { status: machine.migration ?? 'none', downtimeMs: 1, ramTransferredBytes: 1, totalTimeMs: 1 };
      },
      migrateContinue: async () => {
        if (machine.migration === 'completed') return;
        if (machine.migration !== 'pre-switchover') refuse('the machine has not come to its switch');
        machine.migration = 'completed';
        other.machine.state = 'running';
        this.guest.resume(other.guestUri);
      },
      revive: async () => {
        if (machine.migration === 'completed') refuse('the machine has left');
        machine.migration = machine.migration === null ? null : 'cancelled';
        if (machine.state !== 'paused') return;
        const view = await side.view();
        if (view?.phase !== 'plain') refuse(`its disk is ${view?.phase}`);
        machine.state = 'running';
        this.guest.resume(side.guestUri);
      },
      waitRunning: async () => ({ running: machine.state === 'running' }),
      depart: async () => {
        Object.assign(machine, { state: 'departed', migration: null });
      },
      discard: async () => {
        if (machine.state === 'incoming') Object.assign(machine, { state: 'none', moveId: null });
      },
    };
    return verbs as unknown as Record<string, (...words: unknown[]) => unknown>;
  }
}

function viewOf({ state, moveId, migration }: PretendedMachine): MachineView {
  const runs = state === 'running' || state === 'paused';
  return {
    name: VM,
    state: state === 'none' ? 'stopped' : state,
    detail: null,
    pid: runs || state === 'incoming' ? 1 : null,
    serialPath: null,
    ran: runs,
    moveId,
    incomingUri: null,
    migration: migration === null ? null : { status: migration },
    definition: DEFINITION,
    error: null,
  };
}
