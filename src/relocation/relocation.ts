/**
 * The relocation of one volume: follows its phase, from standby to the hand-off, and lets go of the source then.
 *
 * standby: reads pass through. Nothing is kept, or blocks are copied ahead of the takeover, which drops what the source changed since. relocating: demand and background fill the volume. All blocks here, and the
 * machine known to run here: hand-off, the link closes, clients stay connected.
 */
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import type { Compression } from '../nbd/codec/frames.js';
import { CHANGED, DIRTY } from '../nbd/constants.js';
import type { ClientTlsSettings } from '../nbd/tls.js';
import { blockAt, blocksOf } from '../volume/blocks.js';
import type { SourceChanges, Volume } from '../volume/volume.js';
import { Background, type BackgroundOrder } from './background.js';
import { Fetcher } from './fetcher.js';
import { LINK_TIMING, Link, type LinkTiming } from './link.js';
import { CHANGES_TIMEOUT_MS, changesOf, lastChangesOf } from './pre-copy.js';
import { Replay } from './replay.js';
import { type HashesTiming, SourceHashes } from './seed-hashes.js';
import { Seeder } from './seeder.js';
import { type SeedSettings, useSeeds } from './seeds.js';

export interface RelocationTiming extends LinkTiming {
  /** How long the background copy stops after failures, and a hand-off that failed waits for its next attempt. */
  readonly retryAfterErrorMs: number;
  /** Of the connection for hashes; what is absent has its default. */
  readonly hashes: Partial<HashesTiming>;
}

export const RELOCATION_TIMING: RelocationTiming = { ...LINK_TIMING, retryAfterErrorMs: 5_000, hashes: {} };

export interface RelocationOptions {
  background: boolean;
  readAhead: boolean;
  order: BackgroundOrder;
  /** Path of the record that is replayed where the source tells none. */
  orderFrom?: string | undefined;
  rateBytesPerSecond: number | null;
  sourceTimeoutMs: number | null;
  /** For a source with TLS, where its URI leaves something open. */
  tls?: ClientTlsSettings | undefined;
  /** As in LinkOptions. */
  compression?: Compression | undefined;
  /** Images here that may have some of the source's blocks; default: none. */
  seeds?: SeedSettings | undefined;
  log: Logger;
  timing?: Partial<RelocationTiming>;
}

export class Relocation {
  readonly link: Link;
  readonly fetcher: Fetcher;
  readonly background: Background;
  readonly #seeder: Seeder | null;
  readonly #handedOff: Promise<void>;
  #tellHandedOff: () => void = () => undefined;
  #failHandOff: (error: unknown) => void = () => undefined;
  #handOffError: string | null = null;
  #handOffTimer: NodeJS.Timeout | undefined;
  readonly #timing: RelocationTiming;
  #over = false;

  /** Attaches to a volume in phase standby or relocating, which has a source. */
  constructor(
    private readonly volume: Volume,
    private readonly options: RelocationOptions,
  ) {
    const { source, size } = volume.identity.current;
    if (source === null)
      throw new BlockferryError('state-damaged', `volume ${volume.name} has no source to come from`);
    const known = { size, description: source.description };
    this.#timing = { ...RELOCATION_TIMING, ...options.timing };
    this.link = new Link({
      uri: source.uri,
      known,
      sourceTimeoutMs: options.sourceTimeoutMs,
      tls: options.tls,
      compression: options.compression,
      dirtyContexts: contextsOf(volume.preCopy?.context),
      log: options.log,
      timing: this.#timing,
    });
    this.fetcher = new Fetcher(volume.store, this.link);
    this.#seeder = this.#makeSeeder(source.uri, known);
    this.background = new Background(volume.store, this.fetcher, this.link, {
      enabled: options.background,
      readAhead: options.readAhead,
      order: options.order,
      replay: new Replay(this.link, volume.firstAccess, size, options.orderFrom ?? null, options.log),
      rateBytesPerSecond: options.rateBytesPerSecond,
      seeder: this.#seeder,
      log: options.log,
      retryAfterErrorMs: this.#timing.retryAfterErrorMs,
    });
    this.fetcher.onPrefetch = (first, end) => this.background.want(first, end);
    this.fetcher.onMiss = (first, end) => this.background.missed(first, end);
    this.fetcher.onDemandDone = () => this.background.nudge();
    this.#handedOff = new Promise((resolve, reject) => {
      this.#tellHandedOff = resolve;
      this.#failHandOff = reject;
    });
    this.#handedOff.catch(() => undefined);
    volume.store.supplier = this.fetcher;
    volume.askChanges = () => {
      this.background.hold(); // until the volume's next change, or its failure to
      return this.#changes(true);
    };
    volume.onChange = () => this.#follow();
    this.#follow();
  }

  #makeSeeder(uri: string, known: { size: number; description: string | null }): Seeder | null {
    const { seeds, tls, log } = this.options;
    if (seeds === undefined || seeds.images.length === 0 || !this.options.background) return null;
    const { store } = this.volume;
    const exportName = (): string | null => this.link.exportName;
    const hashes = new SourceHashes({ uri, known, tls, exportName, log, timing: this.#timing.hashes });
    return new Seeder(store, this.fetcher.traffic, hashes, useSeeds(seeds, log), log);
  }

  /** What came over the wire, bytes. */
  get wireBytes(): number {
    return this.link.wireBytes + (this.#seeder?.wireBytes ?? 0);
  }

  /** Why the hand-off did not happen though all blocks are here, if so. */
  get error(): string | null {
    return this.#handOffError ?? this.background.error;
  }

  #follow(): void {
    if (this.#over) return;
    const { store, phase, settled, preCopy, closed } = this.volume;
    if (closed) {
      this.background.stop();
      return;
    }
    if (phase === 'standby' && preCopy?.fills === true) {
      this.background.start(true);
      return;
    }
    if (phase !== 'relocating') {
      this.background.stop();
      return;
    }
    store.onComplete = () => void this.#handOff();
    if (store.presence?.complete) {
      if (settled) void this.#handOff();
    } else {
      this.background.start();
    }
  }

  async #handOff(): Promise<void> {
    try {
      if (!(await this.volume.handOff())) return; // not settled yet: the next change of the volume asks again
      if (this.#over) return;
      this.#over = true;
      this.#handOffError = null;
      this.volume.store.supplier = null;
      this.background.stop();
      this.options.log.info(
        { volume: this.volume.name },
        'handed off: every block is local, the source is let go',
      );
      await Promise.all([this.link.close(), this.#seeder?.close()]);
      this.#tellHandedOff();
    } catch (error) {
      if (this.#over) return;
      // Nothing is lost by it: all is served, and a state folder without room may have some later.
      if (this.#handOffError === null)
        this.options.log.error({ why: messageOf(error) }, 'hand-off failed, it is tried again');
      this.#handOffError = messageOf(error);
      if (this.volume.store.failure !== null) return; // nothing becomes durable any more
      clearTimeout(this.#handOffTimer);
      this.#handOffTimer = setTimeout(() => this.#follow(), this.#timing.retryAfterErrorMs).unref();
    }
  }

  async #changes(sealed: boolean): Promise<SourceChanges> {
    const { preCopy, size, identity } = this.volume;
    if (preCopy === null) return { runs: null, cookie: null };
    // A guest whose first write takes over waits for a lost source as its reads do; a coordinator turns back.
    const timeoutMs = identity.current.takesOverAtWrite ? null : CHANGES_TIMEOUT_MS;
    const question = { size, context: preCopy.context, sealed, timeoutMs };
    return sealed ? lastChangesOf(this.link, question, preCopy.cookie) : changesOf(this.link, question);
  }

  /** The source began a round that ends round `from`: what it changed is dropped here, and fetched again. Repeated it changes nothing. */
  async refresh(from: number, to: number): Promise<void> {
    if (this.volume.preCopy?.cookie === to) return;
    const changes = await this.#changes(false);
    if (changes.cookie !== to) {
      throw new BlockferryError(
        'generation',
        `the source of ${this.volume.name} tells of round ${changes.cookie}, not ${to}`,
      );
    }
    await this.volume.refresh(from, changes);
  }

  /** Resolves when every block is local and the link is closed; rejects when the relocation is closed before. */
  handedOff(): Promise<void> {
    return this.#handedOff;
  }

  /** Brings a range here before the rest; resolves when it is local. Bytes. */
  async prefetch(offset: number, length: number): Promise<void> {
    const { store, size, phase } = this.volume;
    if (phase === 'plain') return;
    if (phase !== 'relocating') {
      throw new BlockferryError(
        'phase',
        `volume ${this.volume.name} is ${phase}: there is nothing to prefetch before the takeover`,
      );
    }
    const past = Math.min(offset + length, size);
    if (length <= 0 || offset >= past)
      throw new BlockferryError('bounds', 'the range lies outside the volume');
    const first = blockAt(offset);
    const end = blocksOf(past);
    await this.background.bring(first, end);
    if (this.volume.phase === 'standby') {
      throw new BlockferryError(
        'phase',
        `volume ${this.volume.name} went back to standby: nothing fetched is kept`,
      );
    }
    if (store.presence !== null && !store.presence.hasAll(first, end)) {
      throw new BlockferryError(
        'source-io',
        `not all of the range could be fetched: ${this.background.error ?? 'the source failed'}`,
      );
    }
  }

  async close(): Promise<void> {
    if (this.#over) return;
    this.#over = true;
    clearTimeout(this.#handOffTimer);
    this.background.stop();
    await Promise.all([this.link.close(), this.#seeder?.close()]);
    this.#failHandOff(
      new BlockferryError('closed', `volume ${this.volume.name} was closed before its hand-off`),
    );
  }
}

function contextsOf(context: string | undefined): string[] {
  if (context === undefined) return [];
  return context === DIRTY ? [DIRTY, CHANGED] : [context];
}
