/**
 * The link: all connections from one volume to its source, and what happens when they break.
 *
 * - Several connections where the source allows it: the first serves demand, the others bulk, so that a demand read never
 *   queues behind bulk ones on the wire. With one connection both share it.
 * - Losing a connection is normal: it is made again with back-off, the source is checked again, and what was pending is sent
 *   again. A read waits for as long as that takes, or until the source timeout.
 * - A source that shuts down in order is as lost as one that dies: its ESHUTDOWN is no I/O error.
 * - A source that is not the disk it was (size, or volume and generation where it tells them) is not read from, ever.
 * - Requests and bytes in flight are bounded for each lane; what is more waits in order of arrival.
 */
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import { type Extent, NbdClient, NbdReplyError } from '../nbd/client/client.js';
import type { Compression } from '../nbd/codec/frames.js';
import { zstdAvailable } from '../nbd/compression/available.js';
import { BASE_ALLOCATION, Errno, FIRST_ACCESS, HEAT, TransmissionFlag } from '../nbd/constants.js';
import type { ClientTlsSettings } from '../nbd/tls.js';
import { parseNbdUri } from '../nbd/uri.js';
import { type Asker, Budget } from './budget.js';
import {
  allocationFrom,
  extentsFrom,
  firstAccessFrom,
  heatFrom,
  isLoss,
  readFrom,
  whyNotReadable,
} from './reading.js';
import { CONNECT_TIMEOUT_MS, volumeDescribed, whyNotTheSame } from './source-identity.js';
import { LinkWindow } from './window.js';

export type Lane = 'demand' | 'bulk';
export type LinkState = 'connecting' | 'connected' | 'lost' | 'mismatch';

/** Connections to a source that allows more than one. The first is for demand. */
const CONNECTIONS = 3;
/** Requests and bytes in flight, at most, in each lane: what a fast link carries in a long round trip. */
const LANE_REQUESTS_MAX = 1024;
const LANE_BYTES_MAX = 32 << 20;
/** A source timeout shorter than this does not shorten `requestTimeoutMs` any further: a slow disk is not a lost one. */
const REQUEST_TIMEOUT_MS_MIN = 1_000;

/** Within one building the wire is seldom what is short; with 'auto' a source that was reached sooner sends its blocks as they are. */
const COMPRESSION_FROM_MS = 1;

/** How long a source may take to hang up after our goodbye: one that hangs must not hold up the end of a daemon. */
const GOODBYE_MS = 1_000;

export interface LinkTiming {
  /** Between attempts to connect, doubled from one to the next. */
  readonly backoffMsMin: number;
  readonly backoffMsMax: number;
  /** A spare connection that the source does not give us is asked for again only so often. */
  readonly spareBackoffMs: number;
  readonly connectTimeoutMs: number;
  /** A request unanswered for so long means that the connection is dead, though nobody said so. */
  readonly requestTimeoutMs: number;
}

export const LINK_TIMING: LinkTiming = {
  backoffMsMin: 100,
  backoffMsMax: 5_000,
  spareBackoffMs: 30_000,
  connectTimeoutMs: CONNECT_TIMEOUT_MS,
  requestTimeoutMs: 30_000,
};

export interface LinkOptions {
  uri: string;
  known: { size: number; description: string | null };
  /** How long a read waits for a lost source before it fails; null: for ever. */
  sourceTimeoutMs: number | null;
  /** For a source with TLS, where the URI leaves something open. */
  tls?: ClientTlsSettings | undefined;
  /** Default: 'auto', which asks a blockferry that is not on this host. A level is asked for whoever the source is. */
  compression?: Compression | undefined;
  /** Contexts in which the source may tell what it changed; default: it is not asked. */
  dirtyContexts?: readonly string[];
  log: Logger;
  timing?: Partial<LinkTiming>;
}

/** Connections lost over a question of BLOCK_STATUS, before it is taken for one that this source cannot answer. */
const QUESTION_LOSSES_MAX = 5;

/** What a read fails with when nobody waits for it any more. */
export const DROPPED = new BlockferryError('closed', 'nobody waits for this read any more');

interface Waiting {
  readonly lane: Lane;
  readonly asker: Asker | undefined;
  readonly resolve: (client: NbdClient) => void;
  readonly reject: (error: BlockferryError) => void;
}

export class Link {
  #state: LinkState = 'connecting';
  #error: string | null = null;
  #exportName: string | null = null;
  #closed = false;
  readonly #clients: (NbdClient | null)[] = [];
  readonly #budgets = {
    demand: new Budget(LANE_REQUESTS_MAX, LANE_BYTES_MAX),
    bulk: new Budget(LANE_REQUESTS_MAX, LANE_BYTES_MAX),
  };
  /** What the link carries, by the answers of late. */
  readonly window = new LinkWindow(() => this.wireBytes);
  readonly #timing: LinkTiming;
  /** Every connection that is not over yet, whether it is used any more or not. */
  readonly #alive = new Set<NbdClient>();
  /** Those that have answered something. */
  readonly #useful = new WeakSet<NbdClient>();
  #waiting: Waiting[] = [];
  #turn = 0;
  #timeout: NodeJS.Timeout | undefined;
  #overdue: BlockferryError | null = null;
  readonly #abort = new AbortController();
  readonly #loops: Promise<void>[] = [];
  readonly #compression: Compression;
  /** Of connections that are over. */
  #wireBytesBefore = 0;

  constructor(private readonly options: LinkOptions) {
    const timing = { ...LINK_TIMING, ...options.timing };
    const patienceMs = Math.max(REQUEST_TIMEOUT_MS_MIN, options.sourceTimeoutMs ?? Number.POSITIVE_INFINITY);
    this.#timing = { ...timing, requestTimeoutMs: Math.min(timing.requestTimeoutMs, patienceMs) };
    this.#compression = compressionFor(options);
    this.#lost();
    this.#open(0);
  }

  get state(): LinkState {
    return this.#state;
  }

  /** Why there is no connection, if so. */
  get error(): string | null {
    return this.#error;
  }

  get uri(): string {
    return this.options.uri;
  }

  /** What the source calls the export; null before the first connection, and where it does not say. */
  get exportName(): string | null {
    return this.#exportName;
  }

  /** What the connections have received, compressed where they are, and with everything around the content. */
  get wireBytes(): number {
    let bytes = this.#wireBytesBefore;
    for (const client of this.#alive) bytes += client.wireBytesReceived;
    return bytes;
  }

  /** Bulk has connections of its own. */
  get lanesApart(): boolean {
    return this.#clients.some((client, index) => index > 0 && client !== null);
  }

  /**
   * Fills buffer[at, at + length). Waits through losses of the source; rejects with 'source-io' when the source answers with an
   * error, 'source-unreachable' after the source timeout, 'closed' when the link is closed, and with DROPPED once `asker` has gone
   * and the source is lost.
   */
  async read(
    lane: Lane,
    offset: number,
    length: number,
    buffer: Buffer,
    at: number,
    asker?: Asker,
  ): Promise<void> {
    for (let lostAtMs: number | null = null; ; ) {
      const client = this.#pick(lane) ?? (await this.#connected(lane, asker));
      try {
        await readFrom(client, this.#budgets[lane], offset, length, buffer, at);
        this.#useful.add(client);
        return;
      } catch (error) {
        this.#rethrowFinal(error, client);
        if (asker?.abandoned) throw DROPPED;
        lostAtMs = this.#patientSince(lostAtMs);
      }
    }
  }

  /** Sends away the reads that wait for a lost source and for nobody. Those under way end with their connection. */
  dropAbandoned(): void {
    const waiting = this.#waiting;
    if (waiting.length === 0) return;
    this.#waiting = waiting.filter(({ asker }) => asker === undefined || !asker.abandoned);
    for (const { asker, reject } of waiting) if (asker?.abandoned) reject(DROPPED);
  }

  /**
   * What the source says is allocated from `offset` on, as far as it told; null if it does not tell. Rejects as `read` does, with
   * 'source-io' also when connection after connection is lost over this question.
   */
  allocation(offset: number, length: number): Promise<Extent[] | null> {
    return this.#ask((client) => allocationFrom(client, offset, length));
  }

  /** Likewise, how much the source's machine used its regions: see `heatFrom`. */
  heat(offset: number, length: number): Promise<Extent[] | null> {
    return this.#ask((client) => heatFrom(client, offset, length));
  }

  /** Likewise, what the source changed, in a context that tells it. `lane` demand: the machine waits for it. */
  dirty(context: string, offset: number, length: number, lane: Lane): Promise<Extent[] | null> {
    return this.#ask((client) => extentsFrom(client, context, offset, length), lane);
  }

  /** Likewise, in which order the source's machine read them first after its last move: see `firstAccessFrom`. */
  firstAccess(offset: number, length: number): Promise<Extent[] | null> {
    return this.#ask((client) => firstAccessFrom(client, offset, length));
  }

  async #ask(
    question: (client: NbdClient) => Promise<Extent[] | null>,
    lane: Lane = 'bulk',
  ): Promise<Extent[] | null> {
    for (let losses = 1, lostAtMs: number | null = null; ; losses++) {
      const client = this.#pick(lane) ?? (await this.#connected(lane));
      try {
        const extents = await question(client);
        this.#useful.add(client);
        return extents;
      } catch (error) {
        this.#rethrowFinal(error, client);
        if (losses === QUESTION_LOSSES_MAX)
          throw new BlockferryError('source-io', `the source fails at BLOCK_STATUS: ${messageOf(error)}`);
        lostAtMs = this.#patientSince(lostAtMs);
      }
    }
  }

  /** Returns if the request is worth sending again over another connection. */
  #rethrowFinal(error: unknown, client: NbdClient): void {
    if (this.#closed) throw closedError();
    if (!isLoss(error) && !isShutdown(error)) throw error;
    // Its own loop notices too, but maybe later than the next pick.
    const index = this.#clients.indexOf(client);
    if (index !== -1) this.#clients[index] = null;
    if (this.#clients.every((other) => other === null)) this.#lost();
  }

  /** When a request was lost first. Throws if that is too long ago: a source may accept connections and yet answer nothing. */
  #patientSince(lostAtMs: number | null): number {
    const nowMs = performance.now();
    const { sourceTimeoutMs } = this.options;
    const since = lostAtMs ?? nowMs;
    if (sourceTimeoutMs !== null && nowMs - since >= sourceTimeoutMs) throw this.#unreachable();
    return since;
  }

  #unreachable(): BlockferryError {
    const { uri, sourceTimeoutMs } = this.options;
    return new BlockferryError('source-unreachable', `source ${uri} gave no answer in ${sourceTimeoutMs} ms`);
  }

  #pick(lane: Lane): NbdClient | null {
    if (lane === 'demand' && this.#clients[0]) return this.#clients[0];
    const spare = this.#clients.length - 1;
    for (let i = 0; i < spare; i++) {
      this.#turn = (this.#turn + 1) % spare;
      const client = this.#clients[1 + this.#turn];
      if (client) return client;
    }
    return this.#clients[0] ?? null;
  }

  #connected(lane: Lane, asker?: Asker): Promise<NbdClient> {
    if (this.#closed) return Promise.reject(closedError());
    if (this.#overdue !== null) return Promise.reject(this.#overdue);
    return new Promise((resolve, reject) => this.#waiting.push({ lane, asker, resolve, reject }));
  }

  #open(index: number): void {
    this.#clients[index] = null;
    this.#loops.push(this.#run(index));
  }

  /** Keeps one connection alive until the link is closed. */
  async #run(index: number): Promise<void> {
    const { backoffMsMin, backoffMsMax, spareBackoffMs } = this.#timing;
    let backoffMs = backoffMsMin;
    while (!this.#closed) {
      try {
        const client = await this.#connect();
        const began = performance.now();
        this.#use(index, client);
        const why = await client.closed;
        this.#drop(index, client, why);
        // A source that lets us in and then fails at once is not to be rushed at either.
        const wasUseful = this.#useful.has(client) || performance.now() - began >= backoffMsMax;
        if (wasUseful) backoffMs = backoffMsMin;
      } catch (error) {
        this.#refused(index, error);
        if (index > 0 && this.#clients[0]) backoffMs = spareBackoffMs;
      }
      if (!this.#closed) await this.#pauseFor(backoffMs * (0.75 + Math.random() / 2));
      backoffMs = Math.min(backoffMs * 2, backoffMsMax);
    }
  }

  async #connect(): Promise<NbdClient> {
    const { uri, known, tls = {}, dirtyContexts = [] } = this.options;
    const { connectTimeoutMs, requestTimeoutMs } = this.#timing;
    const client = await NbdClient.connect(uri, {
      contexts: [BASE_ALLOCATION, HEAT, FIRST_ACCESS, ...dirtyContexts],
      connectTimeoutMs,
      handshakeTimeoutMs: connectTimeoutMs,
      requestTimeoutMs,
      tls,
      compression: this.#compression,
      compressionFromMs: this.#compression === 'auto' ? COMPRESSION_FROM_MS : 0,
      signal: this.#abort.signal,
    });
    const why = whyNotTheSame(known, client.info) ?? whyNotReadable(client.info);
    if (why === undefined) return client;
    client.destroy();
    throw new BlockferryError('source-mismatch', `${uri} is not the source any more: ${why}`);
  }

  #use(index: number, client: NbdClient): void {
    if (this.#closed) {
      client.destroy();
      return;
    }
    this.#clients[index] = client;
    this.#alive.add(client);
    this.#exportName = client.info.name;
    if (this.#state !== 'connected') this.options.log.info({ source: this.uri }, 'source connected');
    this.#state = 'connected';
    this.#error = null;
    this.#overdue = null;
    clearTimeout(this.#timeout);
    const waiting = this.#waiting;
    this.#waiting = [];
    // The guest's reads are sent again before the copy's.
    for (const { lane, resolve } of waiting) if (lane === 'demand') resolve(client);
    for (const { lane, resolve } of waiting) if (lane === 'bulk') resolve(client);
    const several = (client.info.flags & TransmissionFlag.CAN_MULTI_CONN) !== 0;
    if (index === 0 && several) {
      for (let spare = this.#clients.length; spare < CONNECTIONS; spare++) this.#open(spare);
    }
  }

  #drop(index: number, client: NbdClient, why: BlockferryError | null): void {
    if (this.#alive.delete(client)) this.#wireBytesBefore += client.wireBytesReceived;
    if (this.#clients[index] === client) this.#clients[index] = null;
    if (this.#closed) return;
    this.#error = why === null ? 'the source closed the connection' : why.message;
    if (this.#clients.every((other) => other === null)) this.#lost();
  }

  #refused(index: number, error: unknown): void {
    if (this.#closed || index > 0) return;
    const mismatch = error instanceof BlockferryError && error.code === 'source-mismatch';
    const state = mismatch ? 'mismatch' : this.#state === 'connecting' ? 'connecting' : 'lost';
    if (this.#error !== messageOf(error)) {
      this.options.log.warn({ source: this.uri, error: messageOf(error) }, 'source not connected, trying on');
    }
    this.#error = messageOf(error);
    if (!this.#clients.some((client) => client !== null)) this.#state = state;
  }

  #lost(): void {
    if (this.#closed || this.#state === 'lost') return;
    if (this.#state === 'connected') {
      this.#state = 'lost';
      this.options.log.warn(
        { source: this.uri, error: this.#error },
        'source lost, reads of missing blocks wait',
      );
    }
    const { sourceTimeoutMs } = this.options;
    if (sourceTimeoutMs === null) return;
    clearTimeout(this.#timeout);
    this.#timeout = setTimeout(() => {
      this.#overdue = this.#unreachable();
      const waiting = this.#waiting;
      this.#waiting = [];
      for (const { reject } of waiting) reject(this.#overdue);
    }, sourceTimeoutMs);
  }

  #pauseFor(ms: number): Promise<void> {
    return new Promise((resolve) => {
      const { signal } = this.#abort;
      const done = (): void => {
        clearTimeout(timer);
        signal.removeEventListener('abort', done);
        resolve();
      };
      const timer = setTimeout(done, ms);
      signal.addEventListener('abort', done);
      if (signal.aborted) done();
    });
  }

  /** Lets go of the source, in order if nothing is in flight. Pending reads reject with 'closed', at once. */
  async close(): Promise<void> {
    this.#closed = true;
    clearTimeout(this.#timeout);
    this.#abort.abort();
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const { reject } of waiting) reject(closedError());
    for (const client of this.#alive) {
      if (client.inFlight > 0) client.destroy(closedError());
      else void client.close();
    }
    const patience = setTimeout(() => {
      for (const client of this.#alive) client.destroy(closedError());
    }, GOODBYE_MS);
    await Promise.all(this.#loops);
    clearTimeout(patience);
  }
}

/** Over a unix socket there is no wire to spare, and only a blockferry knows compression. */
function compressionFor({ uri, known, compression = 'auto' }: LinkOptions): Compression {
  if (!zstdAvailable()) return 'off';
  if (compression !== 'auto') return compression;
  const local = parseNbdUri(uri).address.kind === 'unix';
  return local || volumeDescribed(known.description ?? '') === undefined ? 'off' : 'auto';
}

function isShutdown(error: unknown): boolean {
  const cause = error instanceof BlockferryError ? error.cause : undefined;
  return cause instanceof NbdReplyError && cause.errno === Errno.ESHUTDOWN;
}

function closedError(): BlockferryError {
  return new BlockferryError('closed', 'the link to the source is closed');
}
