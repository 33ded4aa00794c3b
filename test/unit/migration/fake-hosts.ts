/**
 * Two hosts in memory with one machine between them, for the coordinator's tests. They keep the rules of the real ones, and note
 * every moment in which two guests could write, or one was let run on a disk that refuses it.
 */

import { BlockferryError } from '../../../src/errors.js';
import type {
  CreateVolume,
  HostControl,
  MachineView,
  ServedVolume,
  StatusView,
  VolumeView,
} from '../../../src/host/control/api.js';
import type { Phase, RetreatProof, RoundCut, Tracking } from '../../../src/host/service.js';
import type { MachineDefinition, MigrationInfo } from '../../../src/hypervisor/driver.js';

interface FakeVolume {
  id: string;
  phase: Phase;
  generation: number;
  sealedFor: number | null;
  settled: boolean;
  /** At the source: the move that copies, and its round. */
  rounds?: { moveId: string; cookie: number } | undefined;
  /** At the destination: the round it knows. */
  preCopy?: ServedVolume['preCopy'];
}

export interface Fault {
  /** Number of the call, from 0, over both hosts. */
  call: number;
  /**
   * lost-request, lost-answer: the caller learns nothing; refused: the host says no; kill-*: the coordinator ends there; down: the host is
   * out of reach from there on, until `repair`.
   */
  kind: 'lost-request' | 'lost-answer' | 'refused' | 'kill-before' | 'kill-after' | 'down';
}

/** Thrown through the coordinator as if its process had ended. */
export class Killed extends Error {}

export const VM = 'vm1';

export class FakeWorld {
  readonly violations: string[] = [];
  readonly log: string[] = [];
  calls = 0;
  fault: Fault | null = null;
  private down: string | null = null;

  source: {
    state: 'running' | 'stopped' | 'absent';
    migration: string;
    claim: string | null;
    departed: boolean;
  } = {
    state: 'running',
    migration: 'none',
    claim: null,
    departed: false,
  };
  destination: { state: 'absent' | 'incoming' | 'running'; moveId: string | null } = {
    state: 'absent',
    moveId: null,
  };
  readonly here = new Map<string, FakeVolume>();
  readonly there = new Map<string, FakeVolume>();
  readonly proofs = new Map<string, RetreatProof>();
  /** What the switch does: 'arrives'; or the destination's process dies, and the source's guest is let run by its own QEMU. */
  switchOutcome: 'arrives' | 'dies' = 'arrives';
  readonly from: HostControl;
  readonly to: HostControl;

  constructor(readonly names: readonly string[]) {
    for (const name of names) {
      this.here.set(name, {
        id: `id-${name}`,
        phase: 'plain',
        generation: 4,
        sealedFor: null,
        settled: true,
      });
    }
    this.from = this.wrap('from', new FakeSource(this));
    this.to = this.wrap('to', new FakeDestination(this));
  }

  repair(): void {
    this.down = null;
    this.fault = null;
  }

  get definition(): MachineDefinition {
    const disks = this.names.map((name) => ({ volume: name, node: name }));
    return { name: VM, binary: 'qemu', args: [], disks, serial: false };
  }

  /** Called after everything that happens. */
  check(): void {
    const there = this.destination.state === 'running';
    if (there && this.source.state === 'running') this.violations.push('the guest runs on both sides');
    for (const name of this.names) {
      const source = this.here.get(name);
      const destination = this.there.get(name);
      const writesHere = source?.phase === 'plain';
      const writesThere = destination?.phase === 'relocating' || (destination?.phase === 'plain' && there);
      if (writesHere && writesThere) this.violations.push(`two writers of ${name}`);
      if (there && !writesThere) this.violations.push(`the guest runs at the destination without ${name}`);
      if (this.source.state === 'running' && !writesHere && this.switchOutcome === 'arrives') {
        this.violations.push(`the guest runs at the source and ${name} refuses its writes`);
      }
      if (source?.phase === 'retired' && destination?.phase !== 'plain')
        this.violations.push(`${name} is lost`);
    }
  }

  private wrap(side: 'from' | 'to', host: HostControl): HostControl {
    return new Proxy(host, {
      get: (target, key) => {
        const value: unknown = Reflect.get(target, key);
        if (typeof value !== 'function') return value;
        return (...words: unknown[]) => this.call(side, String(key), () => value.apply(target, words));
      },
    });
  }

  private async call(side: string, name: string, act: () => unknown): Promise<unknown> {
    const number = this.calls;
    this.calls += 1;
    this.log.push(`${number} ${side}.${name}`);
    const fault = this.fault?.call === number ? this.fault.kind : null;
    if (fault === 'down') this.down = side;
    if (this.down === side || fault === 'lost-request')
      throw new BlockferryError('control', `${side} is out of reach`);
    if (fault === 'kill-before') throw new Killed();
    if (fault === 'refused') throw new BlockferryError('hypervisor', `${side} says no to ${name}`);
    const answer = await Promise.resolve()
      .then(act)
      .then(
        (value) => () => value,
        (error: unknown) => () => {
          throw error;
        },
      );
    this.check();
    if (fault === 'kill-after') throw new Killed();
    if (fault === 'lost-answer') throw new BlockferryError('control', `the answer of ${side} was lost`);
    return answer();
  }
}

function view(name: string, volume: FakeVolume): ServedVolume {
  return {
    name,
    id: volume.id,
    phase: volume.phase,
    generation: volume.generation,
    size: 1 << 20,
    presentBytes: 1 << 20,
    source: null,
    uri: [],
    background: {
      state: 'done',
      order: 'linear',
      rateBytesPerSecond: 0,
      rateLimitBytesPerSecond: null,
      etaSeconds: null,
    },
    demand: { reads: 0, p50Ms: 0, p99Ms: 0 },
    traffic: {
      fromSourceBytes: 3,
      demandBytes: 1,
      backgroundBytes: 2,
      wireBytes: 3,
      zeroBytes: 4,
      seedBytes: 0,
    },
    clients: 0,
    preCopy: volume.preCopy ?? null,
    tracking: null,
    handoffAt: null,
    error: null,
    home: null,
    image: `/${name}.img`,
    linkUri: `nbd://source/${name}`,
    allocatedBytes: 1 << 19,
  };
}

function ahead(cookie: number | undefined): ServedVolume['preCopy'] {
  return cookie === undefined ? null : { cookie, caughtUp: true, hotDone: true, missingBytes: 0 };
}

function refuse(code: 'phase' | 'not-found' | 'exists' | 'generation', message: string): never {
  throw new BlockferryError(code, message);
}

/** What neither role is ever asked for in a move. */
abstract class FakeHost implements HostControl {
  abstract readonly address: string;
  abstract readonly volumes: Map<string, FakeVolume>;
  constructor(protected readonly world: FakeWorld) {}

  abstract machine(name: string): Promise<MachineView>;

  async status(): Promise<StatusView> {
    const vms = await this.machine(VM).then(
      (machine) => [machine],
      () => [],
    );
    return {
      daemon: {
        name: this.address,
        kind: 'host',
        version: '0.1.0',
        pid: this.address.length,
        startedAt: this.address,
        images: { path: '/images', freeBytes: 1 << 30 },
        linkUri: 'nbd://x',
      },
      volumes: [...this.volumes].map(([name, volume]) => view(name, volume)),
      vms,
    };
  }

  async volume(name: string): Promise<VolumeView> {
    return view(name, this.get(name));
  }

  protected get(name: string): FakeVolume {
    return this.volumes.get(name) ?? refuse('not-found', `no volume ${name}`);
  }

  protected view(state: MachineView['state'], extra: Partial<MachineView>): MachineView {
    return {
      name: VM,
      state,
      detail: null,
      pid: 1,
      serialPath: null,
      ran: false,
      moveId: null,
      incomingUri: null,
      migration: null,
      definition: this.world.definition,
      error: null,
      ...extra,
    };
  }

  async createVolume(_request: CreateVolume): Promise<VolumeView> {
    return refuse('phase', 'not here');
  }
  async takeover(_name: string, _generation?: number): Promise<{ generation: number }> {
    return refuse('phase', 'not here');
  }
  async track(_name: string, _moveId: string, _since: number | null): Promise<Tracking> {
    return refuse('phase', 'not here');
  }
  async cut(_name: string, _moveId: string, _cookie: number): Promise<RoundCut> {
    return refuse('phase', 'not here');
  }
  async untrack(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async refresh(_name: string, _from: number, _to: number): Promise<void> {
    refuse('phase', 'not here');
  }
  async seal(_name: string, _generation: number): Promise<void> {
    refuse('phase', 'not here');
  }
  async unseal(_name: string, _proof: RetreatProof): Promise<void> {
    refuse('phase', 'not here');
  }
  async retreat(_name: string): Promise<RetreatProof> {
    return refuse('phase', 'not here');
  }
  async cancelVolume(_name: string, _volumeId: string): Promise<RetreatProof> {
    return refuse('phase', 'not here');
  }
  async retire(_name: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async setRate(): Promise<void> {}
  async waitHandoff(_name: string): Promise<{ done: boolean; volume: VolumeView }> {
    return refuse('phase', 'not here');
  }
  async claim(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async release(_name: string, _moveId: string): Promise<void> {}
  async incoming(_name: string, _moveId: string): Promise<{ uri: string }> {
    return refuse('phase', 'not here');
  }
  async migrate(_name: string, _moveId: string, _uri: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async waitMigration(_name: string): Promise<MigrationInfo> {
    return refuse('phase', 'not here');
  }
  async migrateContinue(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async revive(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async waitRunning(_name: string): Promise<{ running: boolean }> {
    return refuse('phase', 'not here');
  }
  async depart(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
  async discard(_name: string, _moveId: string): Promise<void> {
    refuse('phase', 'not here');
  }
}

class FakeSource extends FakeHost {
  readonly address = 'source';
  get volumes(): Map<string, FakeVolume> {
    return this.world.here;
  }

  override async machine(): Promise<MachineView> {
    const { state, migration, claim, departed } = this.world.source;
    if (state === 'absent') return this.view(departed ? 'departed' : 'stopped', { pid: null, moveId: claim });
    const info = migration === 'none' ? null : { status: migration };
    return this.view(state === 'running' ? 'running' : 'paused', {
      moveId: claim,
      migration: info,
      ran: true,
    });
  }
  override async claim(_name: string, moveId: string): Promise<void> {
    const { source } = this.world;
    if (source.claim !== null && source.claim !== moveId) refuse('exists', 'claimed by another');
    source.claim = moveId;
  }
  override async release(_name: string, moveId: string): Promise<void> {
    if (this.world.source.claim === moveId) this.world.source.claim = null;
  }
  override async migrate(_name: string, moveId: string): Promise<void> {
    const { source, destination } = this.world;
    if (source.claim !== moveId) refuse('exists', 'not claimed');
    if (destination.state !== 'incoming') refuse('phase', 'nobody listens');
    source.migration = 'active';
  }
  override async waitMigration(): Promise<MigrationInfo> {
    const { source } = this.world;
    if (source.state === 'absent') refuse('phase', 'no process');
    if (source.migration === 'active') {
      source.migration = 'pre-switchover';
      source.state = 'stopped';
    }
    return { status: source.migration, downtimeMs: 33, ramTransferredBytes: 1000, totalTimeMs: 40 };
  }
  override async migrateContinue(): Promise<void> {
    const { source, destination, there, names } = this.world;
    if (source.migration === 'completed') return;
    if (source.migration !== 'pre-switchover') refuse('phase', 'not in pre-switchover');
    if (destination.state !== 'incoming' || this.world.switchOutcome === 'dies') {
      source.migration = 'failed';
      source.state = 'running';
      if (destination.state === 'incoming') destination.state = 'absent';
      return;
    }
    source.migration = 'completed';
    destination.state = 'running';
    for (const name of names) there.get(name)!.settled = true;
  }
  override async revive(_name: string, moveId: string): Promise<void> {
    const { source, here } = this.world;
    if (source.claim !== moveId) refuse('exists', 'not claimed');
    if ([...here.values()].some((volume) => volume.phase !== 'plain'))
      refuse('phase', 'a volume refuses writes');
    if (source.state === 'absent') refuse('phase', 'no process');
    if (source.migration !== 'completed') source.migration = 'cancelled';
    source.state = 'running';
  }
  override async depart(): Promise<void> {
    const { source, here } = this.world;
    if ([...here.values()].some((volume) => volume.phase === 'plain')) refuse('phase', 'a volume is plain');
    source.state = 'absent';
    source.departed = true;
  }
  override async track(name: string, moveId: string): Promise<Tracking> {
    const volume = this.get(name);
    if (volume.phase !== 'plain') refuse('phase', `cannot track, is ${volume.phase}`);
    if (volume.rounds?.moveId !== moveId) volume.rounds = { moveId, cookie: 1 };
    return { cookie: volume.rounds.cookie, home: false };
  }
  override async cut(name: string, moveId: string, cookie: number): Promise<RoundCut> {
    const { rounds } = this.get(name);
    if (rounds?.moveId !== moveId || cookie > rounds.cookie || cookie < rounds.cookie - 1)
      refuse('generation', 'not this round');
    rounds.cookie = cookie + 1;
    return { cookie: rounds.cookie, changedBytes: 0 };
  }
  override async untrack(name: string, moveId: string): Promise<void> {
    const volume = this.get(name);
    if (volume.rounds?.moveId === moveId) volume.rounds = undefined;
  }
  override async seal(name: string, generation: number): Promise<void> {
    const volume = this.get(name);
    if (volume.phase === 'sealed' && volume.sealedFor === generation) return;
    if (volume.phase !== 'plain') refuse('phase', `cannot seal, is ${volume.phase}`);
    if (generation <= volume.generation) refuse('generation', 'stale');
    volume.phase = 'sealed';
    volume.sealedFor = generation;
  }
  override async unseal(name: string, proof: RetreatProof): Promise<void> {
    const volume = this.get(name);
    if (volume.phase === 'plain') return;
    if (volume.phase !== 'sealed' || proof.volumeId !== volume.id || proof.generation < volume.sealedFor!) {
      refuse('generation', 'no proof');
    }
    volume.phase = 'plain';
    volume.generation = proof.generation;
    volume.sealedFor = null;
  }
  override async retire(name: string): Promise<void> {
    const volume = this.get(name);
    if (volume.phase !== 'sealed' && volume.phase !== 'retired') refuse('phase', 'not sealed');
    volume.phase = 'retired';
  }
}

class FakeDestination extends FakeHost {
  readonly address = 'destination';
  get volumes(): Map<string, FakeVolume> {
    return this.world.there;
  }

  override async machine(): Promise<MachineView> {
    const { state, moveId } = this.world.destination;
    if (state === 'absent') refuse('not-found', 'no such machine');
    return this.view(state, { moveId, ran: state === 'running' });
  }
  override async createVolume(request: CreateVolume): Promise<VolumeView> {
    const present = this.world.there.get(request.name);
    if (present && present.phase !== 'standby') refuse('exists', 'there is one');
    const { volumeId: id, generation } = request;
    const volume: FakeVolume = present ?? {
      id,
      phase: 'standby',
      generation,
      sealedFor: null,
      settled: false,
      preCopy: ahead(request.preCopy?.cookie),
    };
    this.world.there.set(request.name, volume);
    return view(request.name, volume);
  }
  override async refresh(name: string, from: number, to: number): Promise<void> {
    const volume = this.get(name);
    const known = volume.preCopy?.cookie;
    if (volume.phase !== 'standby' || (known !== from && known !== to))
      refuse('generation', 'not this round');
    volume.preCopy = ahead(to);
  }
  override async incoming(_name: string, moveId: string): Promise<{ uri: string }> {
    const { destination, there, names } = this.world;
    if (names.some((name) => there.get(name)?.phase !== 'standby'))
      refuse('phase', 'a volume is not standby');
    if (destination.state === 'absent') this.world.destination = { state: 'incoming', moveId };
    return { uri: 'tcp:somewhere:1' };
  }
  override async takeover(name: string, generation = 0): Promise<{ generation: number }> {
    const volume = this.get(name);
    if (volume.phase === 'relocating' && volume.generation === generation) return { generation };
    if (volume.phase !== 'standby') refuse('phase', `cannot take over, is ${volume.phase}`);
    if (generation <= volume.generation) refuse('generation', 'burnt');
    volume.phase = 'relocating';
    volume.generation = generation;
    return { generation };
  }
  override async retreat(name: string): Promise<RetreatProof> {
    const volume = this.get(name);
    if (volume.phase === 'relocating') {
      if (volume.settled) refuse('phase', 'the guest has written');
      volume.phase = 'standby';
    }
    if (volume.phase !== 'standby') refuse('phase', `cannot retreat, is ${volume.phase}`);
    return { volumeId: volume.id, generation: volume.generation };
  }
  override async cancelVolume(name: string, volumeId: string): Promise<RetreatProof> {
    const volume = this.world.there.get(name);
    if (!volume) return this.world.proofs.get(volumeId) ?? refuse('not-found', 'no such volume');
    if (volume.phase !== 'standby') refuse('phase', `cannot cancel, is ${volume.phase}`);
    const proof = { volumeId, generation: volume.generation + 1 };
    this.world.proofs.set(volumeId, proof);
    this.world.there.delete(name);
    return proof;
  }
  override async waitRunning(): Promise<{ running: boolean }> {
    return { running: this.world.destination.state === 'running' };
  }
  override async waitHandoff(name: string): Promise<{ done: boolean; volume: VolumeView }> {
    const volume = this.get(name);
    if (volume.phase === 'relocating' && volume.settled) volume.phase = 'plain';
    return { done: volume.phase === 'plain', volume: view(name, volume) };
  }
  override async discard(_name: string, moveId: string): Promise<void> {
    const { destination, there } = this.world;
    if (destination.state === 'absent') return;
    if (destination.moveId !== moveId) refuse('exists', 'of another move');
    if ([...there.values()].some((volume) => volume.phase !== 'standby'))
      refuse('phase', 'it may have written');
    this.world.destination = { state: 'absent', moveId: null };
  }
}
