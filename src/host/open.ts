/** Opens a volume with its relocation, as every daemon runs it. */
import type { Logger } from 'pino';
import { BlockferryError } from '../errors.js';
import type { Compression } from '../nbd/codec/frames.js';
import type { BlockDevice } from '../nbd/device.js';
import { TransactionLog, type TransactionLogSettings } from '../nbd/log/transaction-log.js';
import type { ClientTlsSettings } from '../nbd/tls.js';
import type { BackgroundOrder } from '../relocation/background.js';
import { Relocation, type RelocationTiming } from '../relocation/relocation.js';
import type { SeedSettings } from '../relocation/seeds.js';
import { describeVolume, probeSource, volumeDescribed } from '../relocation/source-identity.js';
import type { Tracking } from '../volume/dirty.js';
import { GuestDevice, LinkDevice } from '../volume/faces.js';
import { HashDevice } from '../volume/hash-device.js';
import type { Identity } from '../volume/identity.js';
import { createProxied, openPlain, reopen } from '../volume/open.js';
import type { RetreatProof, RoundCut, Volume } from '../volume/volume.js';
import type { VolumeService, VolumeStatus } from './service.js';

export type PreCopy = NonNullable<Identity['preCopy']>;

export interface RelocationSettings {
  background: boolean;
  /** Fetch what streams of the guest are about to read. */
  readAhead: boolean;
  order: BackgroundOrder;
  rateBytesPerSecond: number | null;
  /** null: reads wait for a lost source for ever, as on a hard mount. */
  sourceTimeoutMs: number | null;
}

export type OpenMode =
  | { kind: 'serve'; readOnly: boolean }
  | ({
      kind: 'proxy';
      sourceUri: string;
      standby: boolean;
      preCopy?: PreCopy | null;
    } & Partial<RelocationSettings>)
  | {
      kind: 'arrive';
      sourceUri: string;
      volumeId: string;
      generation: number;
      size: number;
      rateBytesPerSecond: number | null;
      /** Of the link to the source, in place of `sourceCompression`. */
      compression?: Compression;
      /** See Identity. */
      preCopy?: PreCopy | null;
      /** The image is the volume's own of an earlier stay: see ProxiedOptions. */
      homeStamp?: string | null;
    }
  | { kind: 'resume' };

export interface OpenVolumeOptions {
  stateDir: string;
  name: string;
  /** Not needed to resume. */
  image?: string;
  mode: OpenMode;
  /** For a source with TLS, where its URI leaves something open. */
  sourceTls?: ClientTlsSettings;
  /** Of the link to the source; default: 'auto'. */
  sourceCompression?: Compression;
  /** Path of the record of first accesses that is replayed where the source tells none; default: none. */
  orderFrom?: string;
  /** Where the guest's requests are recorded; default: nowhere. */
  transactionLog?: TransactionLogSettings;
  /** Images here in which blocks of its source are looked for; default: none. */
  seeds?: SeedSettings;
  log: Logger;
  timing?: Partial<RelocationTiming>;
}

const DEFAULTS: RelocationSettings = {
  background: true,
  readAhead: true,
  order: 'hot',
  rateBytesPerSecond: null,
  sourceTimeoutMs: null,
};

/** Throws what volume/open.ts, NbdClient.connect and TransactionLog.open throw. */
export async function openVolumeService(options: OpenVolumeOptions): Promise<VolumeService> {
  const { mode, log, sourceTls, sourceCompression, orderFrom, seeds, timing = {} } = options;
  // First: where it cannot be had, no volume is made.
  const transactionLog =
    options.transactionLog === undefined ? null : TransactionLog.open(options.transactionLog, log);
  let volume: Volume | null = null;
  try {
    volume = await openVolume(options);
    const settings = mode.kind === 'proxy' ? { ...DEFAULTS, ...mode } : DEFAULTS;
    const limited =
      mode.kind === 'arrive' ? { ...settings, rateBytesPerSecond: mode.rateBytesPerSecond } : settings;
    const { source } = volume.identity.current;
    const compression = (mode.kind === 'arrive' ? mode.compression : undefined) ?? sourceCompression;
    const relocation =
      source === null
        ? null
        : new Relocation(volume, {
            ...limited,
            orderFrom,
            tls: sourceTls,
            compression,
            seeds,
            log,
            timing,
          });
    return new RunningVolume(volume, relocation, transactionLog);
  } catch (error) {
    await volume?.close().catch(() => undefined);
    await transactionLog?.close();
    throw error;
  }
}

async function openVolume(options: OpenVolumeOptions): Promise<Volume> {
  const { stateDir, name, image, mode, sourceTls } = options;
  if (mode.kind === 'resume') return reopen({ stateDir, name, ...(image === undefined ? {} : { image }) });
  if (image === undefined) throw new BlockferryError('usage', `volume ${name} needs an image`);
  if (mode.kind === 'serve') return openPlain({ stateDir, name, image, readOnly: mode.readOnly });
  if (mode.kind === 'proxy') {
    const known = await reopenProxied(stateDir, name, image, mode.sourceUri);
    if (known !== undefined) return known;
  }
  const facts = await probeSource(mode.sourceUri, sourceTls);
  const size = mode.kind === 'arrive' ? mode.size : facts.size;
  if (facts.size !== size) {
    throw new BlockferryError(
      'source-mismatch',
      `source ${mode.sourceUri} has ${facts.size} bytes, volume ${name} was announced with ${size}: check the source`,
    );
  }
  const id = volumeDescribed(facts.description);
  if (mode.kind === 'arrive' && id !== undefined && id !== mode.volumeId) {
    throw new BlockferryError(
      'source-mismatch',
      `source ${mode.sourceUri} is volume ${id}, volume ${name} was announced as ${mode.volumeId}: check the source`,
    );
  }
  return createProxied({
    stateDir,
    name,
    image,
    size,
    source: { uri: mode.sourceUri, description: facts.description === '' ? null : facts.description },
    standby: mode.kind === 'arrive' || mode.standby,
    ...(mode.kind === 'arrive'
      ? {
          arrival: { volumeId: mode.volumeId, generation: mode.generation },
          preCopy: mode.preCopy ?? null,
          homeStamp: mode.homeStamp ?? null,
        }
      : { arrival: null, preCopy: mode.preCopy ?? null }),
  });
}

/** A proxy that was stopped goes on where it was; a source that answers must still be that disk, which its link checks. */
async function reopenProxied(
  stateDir: string,
  name: string,
  image: string,
  uri: string,
): Promise<Volume | undefined> {
  let volume: Volume;
  try {
    volume = await reopen({ stateDir, name, image });
  } catch (error) {
    if (error instanceof BlockferryError && error.code === 'not-found') return undefined;
    throw error;
  }
  const { source, phase } = volume.identity.current;
  if (source === null || source.uri === uri) return volume;
  await volume.close();
  throw new BlockferryError(
    'state-mismatch',
    `volume ${name} (${phase}) comes from ${source.uri}, not ${uri}: give that source, or another --name and image`,
  );
}

class RunningVolume implements VolumeService {
  readonly guest: BlockDevice;
  readonly link: BlockDevice;
  readonly hashes: BlockDevice;
  #gone = false;

  constructor(
    private readonly volume: Volume,
    private readonly relocation: Relocation | null,
    private readonly transactionLog: TransactionLog | null,
  ) {
    this.guest = new GuestDevice(volume, transactionLog);
    this.link = new LinkDevice(volume);
    this.hashes = new HashDevice(volume);
  }

  get name(): string {
    return this.volume.name;
  }

  get id(): string {
    return this.volume.id;
  }

  get size(): number {
    return this.volume.size;
  }

  get image(): string {
    return this.volume.store.image.path;
  }

  get linkDescription(): string {
    return describeVolume(this.volume.id, this.volume.generation);
  }

  status(): VolumeStatus {
    const { volume, relocation } = this;
    const { source, handoffAt } = volume.identity.current;
    const { presentBytes, failure } = volume.store;
    const background = relocation?.background;
    const rate = background?.state === 'running' ? background.rate : 0;
    const left = volume.size - presentBytes;
    const traffic = relocation?.fetcher.traffic;
    const fromSource = traffic ? traffic.demandBytes + traffic.backgroundBytes + traffic.throughBytes : 0;
    const latency = relocation?.fetcher.demandLatency;
    const linked = source !== null && relocation !== null;
    return {
      name: volume.name,
      id: volume.id,
      phase: volume.phase,
      generation: volume.generation,
      size: volume.size,
      presentBytes,
      source: linked ? { uri: source.uri, state: relocation.link.state, error: relocation.link.error } : null,
      uri: [],
      background: {
        state: background?.state ?? 'done',
        order: background?.order ?? 'none',
        rateBytesPerSecond: Math.round(rate),
        rateLimitBytesPerSecond: background?.rateLimit ?? null,
        etaSeconds: left === 0 ? 0 : rate > 1 ? Math.ceil(left / rate) : null,
      },
      demand: {
        reads: latency?.total ?? 0,
        p50Ms: round(latency?.quantile(0.5)),
        p99Ms: round(latency?.quantile(0.99)),
      },
      traffic: {
        fromSourceBytes: fromSource,
        demandBytes: traffic?.demandBytes ?? 0,
        backgroundBytes: traffic?.backgroundBytes ?? 0,
        wireBytes: relocation?.wireBytes ?? 0,
        zeroBytes: traffic?.zeroBytes ?? 0,
        seedBytes: traffic?.seedBytes ?? 0,
      },
      preCopy: this.#preCopy(),
      tracking: this.#tracking(),
      clients: 0,
      handoffAt,
      error: failure?.message ?? relocation?.error ?? this.transactionLog?.failure?.message ?? null,
    };
  }

  #preCopy(): VolumeStatus['preCopy'] {
    const { volume, relocation } = this;
    if (volume.phase !== 'standby' || volume.preCopy === null) return null;
    const { caughtUp = false, hotDone = false } = relocation?.background ?? {};
    const missingBytes = volume.size - volume.store.presentBytes;
    return { cookie: volume.preCopy.cookie, caughtUp, hotDone, missingBytes };
  }

  #tracking(): VolumeStatus['tracking'] {
    const { dirty } = this.volume.store;
    return dirty === null ? null : { moveId: dirty.move, since: dirty.since === 0 ? null : dirty.since };
  }

  get settled(): boolean {
    return this.volume.settled;
  }

  quiet(): Promise<void> {
    return this.volume.quiet();
  }

  remember(): Promise<void> {
    return this.volume.remember();
  }

  seal(generation: number): Promise<void> {
    return this.volume.seal(generation);
  }

  unseal(proof: RetreatProof): Promise<void> {
    return this.volume.unseal(proof);
  }

  retire(options: { deleteImage: boolean }): Promise<void> {
    return this.volume.retire(options);
  }

  track(moveId: string, since: number | null): Promise<Tracking> {
    return this.volume.track(moveId, since);
  }

  cut(moveId: string, cookie: number): Promise<RoundCut> {
    return this.volume.cut(moveId, cookie);
  }

  untrack(moveId: string): Promise<void> {
    return this.volume.untrack(moveId);
  }

  async refresh(from: number, to: number): Promise<void> {
    await this.#relocating().refresh(from, to);
  }

  takeover(generation?: number): Promise<{ generation: number }> {
    return this.volume.takeover(generation);
  }

  settle(): Promise<void> {
    return this.volume.settle();
  }

  retreat(): Promise<RetreatProof> {
    return this.volume.retreat();
  }

  async cancel(): Promise<RetreatProof> {
    try {
      return await this.volume.cancel();
    } finally {
      // Also when the rest of it is left to the next opening.
      if (this.volume.closed) {
        this.#gone = true;
        await this.relocation?.close();
        await this.transactionLog?.close();
      }
    }
  }

  #relocating(): Relocation {
    if (this.relocation !== null) return this.relocation;
    throw new BlockferryError(
      'phase',
      `volume ${this.name} is ${this.volume.phase} and has no source: there is nothing to relocate`,
    );
  }

  pause(): void {
    this.#relocating().background.pause();
  }

  resume(): void {
    this.#relocating().background.resume();
  }

  setRate(bytesPerSecond: number | null): void {
    this.#relocating().background.setRate(bytesPerSecond);
  }

  async prefetch(offset: number, length: number): Promise<void> {
    await this.relocation?.prefetch(offset, length);
  }

  async handedOff(): Promise<void> {
    await this.relocation?.handedOff();
  }

  async close(): Promise<void> {
    if (this.#gone) return;
    this.#gone = true;
    await this.relocation?.close();
    try {
      await this.volume.close();
    } finally {
      await this.transactionLog?.close();
    }
  }
}

function round(ms = 0): number {
  return Math.round(ms * 1000) / 1000;
}
