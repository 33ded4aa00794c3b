/** A daemon's parts without images, sockets and QEMU: they keep the rules that the control side relies on, and nothing else. */

import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import pino from 'pino';
import { BlockferryError } from '../../../src/errors.js';
import { holdLocally, type OpenVolume } from '../../../src/host/held-volume.js';
import type { DaemonParts, ExportListener } from '../../../src/host/parts.js';
import type {
  Phase,
  RetreatProof,
  RoundCut,
  Tracking,
  VolumeService,
  VolumeStatus,
} from '../../../src/host/service.js';
import type {
  Hypervisor,
  Machine,
  MachineDefinition,
  MachineEvent,
  MachineExit,
  MachineStatus,
  MigrationInfo,
  StartOptions,
} from '../../../src/hypervisor/driver.js';
import type { BlockDevice } from '../../../src/nbd/device.js';

export const silent = pino({ level: 'silent' });

const device: BlockDevice = {
  size: 1 << 20,
  readOnly: false,
  multiConn: true,
  preferredBlock: 4096,
  contexts: [],
  readNow: () => 0,
  writeNow: () => 0,
  read: (request) => request.complete(0),
  write: (request) => request.complete(0),
  flush: (request) => request.complete(0),
  trim: (request) => request.complete(0),
  zero: (request) => request.complete(0),
  cache: (request) => request.complete(0),
  status: (request) => request.complete(0),
  release: () => undefined,
};

export class FakeService implements VolumeService {
  readonly size = device.size;
  readonly guest = device;
  readonly link = { ...device, readOnly: true };
  readonly hashes = { ...device, readOnly: true };
  readonly linkDescription = 'fake';
  settled = false;
  closed = false;
  rate: number | null = null;
  private sealedFor = 0;
  private announce: () => void = () => undefined;
  private readonly done: Promise<void>;

  constructor(
    readonly name: string,
    readonly id: string,
    readonly image: string,
    public phase: Phase,
    public generation: number,
  ) {
    this.done = new Promise((resolve) => {
      this.announce = resolve;
    });
  }

  private require(phase: Phase): void {
    if (this.phase !== phase)
      throw new BlockferryError('phase', `volume ${this.name} is ${this.phase}, not ${phase}`);
  }

  status(): VolumeStatus {
    return {
      name: this.name,
      id: this.id,
      phase: this.phase,
      generation: this.generation,
      size: this.size,
      presentBytes: this.size,
      source: null,
      uri: [],
      background: {
        state: 'done',
        order: 'none',
        rateBytesPerSecond: 0,
        rateLimitBytesPerSecond: this.rate,
        etaSeconds: 0,
      },
      demand: { reads: 0, p50Ms: 0, p99Ms: 0 },
      preCopy: null,
      tracking: null,
      traffic: {
        fromSourceBytes: 0,
        demandBytes: 0,
        backgroundBytes: 0,
        wireBytes: 0,
        zeroBytes: 0,
        seedBytes: 0,
      },
      clients: 0,
      handoffAt: null,
      error: null,
    };
  }
  async quiet(): Promise<void> {}
  async remember(): Promise<void> {}
  async seal(generation: number): Promise<void> {
    if (this.phase === 'sealed' && this.sealedFor === generation) return;
    this.require('plain');
    this.phase = 'sealed';
    this.sealedFor = generation;
  }
  async unseal(proof: RetreatProof): Promise<void> {
    this.require('sealed');
    if (proof.generation < this.sealedFor) throw new BlockferryError('generation', 'no proof');
    this.phase = 'plain';
    this.generation = proof.generation;
  }
  async retire(): Promise<void> {
    if (this.phase !== 'retired') this.require('sealed');
    this.phase = 'retired';
  }
  async track(): Promise<Tracking> {
    this.require('plain');
    return { cookie: 1, home: false };
  }
  async cut(_moveId: string, cookie: number): Promise<RoundCut> {
    return { cookie: cookie + 1, changedBytes: 0 };
  }
  async untrack(): Promise<void> {}
  async refresh(): Promise<void> {
    this.require('standby');
  }
  async takeover(generation = this.generation + 1): Promise<{ generation: number }> {
    this.require('standby');
    this.phase = 'relocating';
    this.generation = generation;
    return { generation };
  }
  async settle(): Promise<void> {
    if (this.phase === 'plain') return;
    this.require('relocating');
    this.settled = true;
    this.phase = 'plain';
    this.announce();
  }
  async retreat(): Promise<RetreatProof> {
    if (this.phase !== 'standby') this.require('relocating');
    this.phase = 'standby';
    return { volumeId: this.id, generation: this.generation };
  }
  async cancel(): Promise<RetreatProof> {
    this.require('standby');
    this.closed = true;
    return { volumeId: this.id, generation: this.generation + 1 };
  }
  pause(): void {}
  resume(): void {}
  setRate(bytesPerSecond: number | null): void {
    this.rate = bytesPerSecond;
  }
  async prefetch(): Promise<void> {}
  async handedOff(): Promise<void> {
    if (this.phase !== 'plain') await this.done;
  }
  async close(): Promise<void> {
    this.closed = true;
  }
}

/** Machines find each other by the URI of a migration, as over a network. */
export class FakeNetwork {
  private readonly listening = new Map<string, FakeMachine>();
  private ports = 1;

  listen(machine: FakeMachine): string {
    const uri = `tcp:127.0.0.1:${this.ports}`;
    this.ports += 1;
    this.listening.set(uri, machine);
    return uri;
  }
  find(uri: string): FakeMachine {
    const machine = this.listening.get(uri);
    if (!machine) throw new BlockferryError('hypervisor', `nobody listens at ${uri}`);
    return machine;
  }
}

let pids = 1000;

export class FakeMachine implements Machine {
  readonly pid: number;
  readonly serialPath = null;
  readonly exited: Promise<MachineExit>;
  state: MachineStatus['state'];
  migration = 'none';
  failsToArrive = false;
  powerdown: () => Promise<void> = () => Promise.reject(new Error('this guest does not listen'));
  private peer: FakeMachine | null = null;
  private readonly listeners = new Set<(event: MachineEvent) => void>();
  private leave: (exit: MachineExit) => void = () => undefined;

  constructor(
    readonly definition: MachineDefinition,
    readonly options: StartOptions,
    private readonly network: FakeNetwork,
  ) {
    pids += 1;
    this.pid = pids;
    this.state = options.incoming ? 'incoming' : 'running';
    this.exited = new Promise((resolve) => {
      this.leave = resolve;
    });
  }

  async status(): Promise<MachineStatus> {
    return { state: this.state, detail: this.state };
  }
  onEvent(listener: (event: MachineEvent) => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }
  emit(event: MachineEvent): void {
    for (const listener of [...this.listeners]) listener(event);
  }
  async pause(): Promise<void> {
    this.state = 'paused';
  }
  async resume(): Promise<void> {
    this.state = 'running';
    this.emit({ kind: 'resumed' });
  }
  async incoming(): Promise<string> {
    return this.network.listen(this);
  }
  async waitResumed(): Promise<void> {}
  async migrate(uri: string): Promise<void> {
    this.peer = this.network.find(uri);
    this.migration = 'active';
    setImmediate(() => {
      this.migration = 'pre-switchover';
      this.state = 'paused';
      this.emit({ kind: 'migration', status: this.migration });
    });
  }
  async waitPreSwitchover(): Promise<void> {}
  async continueSwitchover(): Promise<void> {
    if (this.migration !== 'pre-switchover') throw new BlockferryError('hypervisor', 'not in pre-switchover');
    if (this.peer?.state !== 'incoming' || this.failsToArrive) {
      this.migration = 'failed';
      this.emit({ kind: 'migration', status: this.migration });
      return;
    }
    this.migration = 'completed';
    this.state = 'migrated';
    const { peer } = this;
    setImmediate(() => void peer.resume());
  }
  async waitCompleted(): Promise<void> {}
  async cancelMigration(): Promise<void> {
    this.migration = 'cancelled';
    this.state = 'running';
  }
  async queryMigrate(): Promise<MigrationInfo> {
    return { status: this.migration };
  }
  async stop(): Promise<void> {
    this.end(0);
  }
  async kill(): Promise<void> {
    this.end(0);
  }
  end(code: number): void {
    this.state = 'stopped';
    this.leave({ code, signal: null, stderr: code === 0 ? '' : 'qemu: it broke\n' });
  }
}

/** One host's parts. What is "on disk" are the state folders, so that a second daemon on them finds what the first left. */
export class FakeParts implements DaemonParts {
  readonly services = new Map<string, FakeService>();
  readonly machines: FakeMachine[] = [];
  readonly closed: string[] = [];
  failsToStart = false;
  readonly hypervisor: Hypervisor;

  constructor(network: FakeNetwork) {
    this.hypervisor = {
      kind: 'fake',
      version: async () => '1.0',
      start: async (definition, options) => {
        if (this.failsToStart) throw new BlockferryError('hypervisor', 'QEMU says no');
        const machine = new FakeMachine(definition, options, network);
        this.machines.push(machine);
        return machine;
      },
    };
  }

  readonly openVolume: OpenVolume = async ({ stateDir, name, image = '', mode }) => {
    if (image.includes('missing')) throw new BlockferryError('image-missing', `${image} is not there`);
    if (image.includes('locked')) throw new BlockferryError('image-in-use', `${image} is in use`);
    const before = this.services.get(name);
    if (mode.kind === 'resume' && before?.phase === 'retired')
      throw new BlockferryError('phase', 'it is retired');
    const arrives = mode.kind === 'arrive';
    const id = arrives ? mode.volumeId : '00000000-0000-4000-8000-000000000001';
    const service = new FakeService(
      name,
      id,
      image,
      arrives ? 'standby' : 'plain',
      arrives ? mode.generation : 1,
    );
    mkdirSync(join(stateDir, name), { recursive: true });
    writeFileSync(join(stateDir, name, 'volume.json'), JSON.stringify({ phase: service.phase }));
    this.services.set(name, service);
    return service;
  };

  readonly listen: DaemonParts['listen'] = async (addresses, exports) => {
    if (addresses.some((address) => address.includes('taken')))
      throw new BlockferryError('address', 'the port is taken');
    const listener: ExportListener = {
      addresses: (name = '') => addresses.map((address) => `nbd://${address}/${name}`),
      connections: (name) => (exports.find(name) ? 1 : 0),
      stdioClosed: new Promise(() => undefined),
      close: async () => {
        this.closed.push(addresses.join());
      },
    };
    return listener;
  };

  readonly hold = holdLocally(this.openVolume, this.listen);
}
