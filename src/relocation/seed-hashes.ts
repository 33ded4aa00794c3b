/**
 * What the source's blocks hash to, asked over a connection of its own: a blockferry has an export for that beside each volume's, which it lists
 * nowhere. Whoever else the source is, and an older blockferry, has none: then there are no hashes, and that is all.
 *
 * - The export must say of itself that it is the very volume (its description), or it is not believed.
 * - Nothing is tried again here: a question that fails is answered with null. A connection that is lost is made again, later each time.
 */
import type { Logger } from 'pino';
import { BlockferryError, messageOf } from '../errors.js';
import { NbdClient, NbdReplyError } from '../nbd/client/client.js';
import { Errno } from '../nbd/constants.js';
import type { ClientTlsSettings } from '../nbd/tls.js';
import { formatNbdUri, parseNbdUri } from '../nbd/uri.js';
import { HASH_BYTES } from '../volume/block-hash.js';
import { blocksOf } from '../volume/blocks.js';
import { hashesNameOf, volumeDescribed } from './source-identity.js';

export interface HashesTiming {
  readonly connectTimeoutMs: number;
  /** No answer at all for so long ends the connection. */
  readonly answerTimeoutMs: number;
  /** Between attempts, doubled from one to the next. */
  readonly backoffMsMin: number;
  readonly backoffMsMax: number;
  /** The first behind a connection that was of no use. */
  readonly giveUpMs: number;
}

export const HASHES_TIMING: HashesTiming = {
  connectTimeoutMs: 10_000,
  answerTimeoutMs: 10_000,
  backoffMsMin: 1_000,
  backoffMsMax: 600_000,
  giveUpMs: 30_000,
};
/** A connection that was there for so long was no failure. */
const LASTING_MS = 60_000;
/** While the source's name of the export is not known yet. */
const NAMELESS_MS = 50;

export interface SourceHashesOptions {
  uri: string;
  known: { size: number; description: string | null };
  tls?: ClientTlsSettings | undefined;
  /** What the source calls the export, where the URI leaves that to it; null: not known yet. */
  exportName: () => string | null;
  log: Logger;
  timing?: Partial<HashesTiming> | undefined;
}

export class SourceHashes {
  readonly #timing: HashesTiming;
  #client: NbdClient | null = null;
  /** Null: nobody wants hashes. */
  #abort: AbortController | null = null;
  /** There are none, and never will be. */
  #off: boolean;
  #backoffMs: number;
  #complained = false;
  #gaveUp = false;
  #wireBytesBefore = 0;
  #loop: Promise<void> = Promise.resolve();

  constructor(private readonly options: SourceHashesOptions) {
    this.#timing = { ...HASHES_TIMING, ...options.timing };
    this.#backoffMs = this.#timing.backoffMsMin;
    this.#off = volumeDescribed(options.known.description ?? '') === undefined;
  }

  /** Questions can be asked. */
  get usable(): boolean {
    return this.#client !== null;
  }

  /** What was received for it. */
  get wireBytes(): number {
    return this.#wireBytesBefore + (this.#client?.wireBytesReceived ?? 0);
  }

  start(): void {
    if (this.#off || this.#abort !== null) return;
    const abort = new AbortController();
    this.#abort = abort;
    this.#loop = this.#loop.then(() => this.#run(abort.signal));
  }

  stop(): void {
    this.#abort?.abort();
    this.#abort = null;
    this.#client?.destroy();
  }

  async close(): Promise<void> {
    this.stop();
    this.#off = true;
    await this.#loop;
  }

  /** The hashes of the blocks [first, end); null: there are none to be had now. */
  async of(first: number, end: number): Promise<Uint8Array | null> {
    const client = this.#client;
    if (client === null) return null;
    try {
      return await client.read(first * HASH_BYTES, (end - first) * HASH_BYTES);
    } catch (error) {
      const cause = error instanceof BlockferryError ? error.cause : undefined;
      // A block that the source cannot read has no hash. All else is a source that has none now.
      if (cause instanceof NbdReplyError && cause.errno !== Errno.EIO) this.giveUp(messageOf(error));
      return null;
    }
  }

  /** They are of no use for now. */
  giveUp(why: string): void {
    this.#complain(why);
    this.#gaveUp = true;
    this.#client?.destroy();
    this.#drop();
  }

  #drop(): void {
    if (this.#client === null) return;
    this.#wireBytesBefore += this.#client.wireBytesReceived;
    this.#client = null;
  }

  async #run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted && !this.#off) {
      const began = performance.now();
      try {
        const client = await this.#connect(signal);
        if (client === null) {
          await pause(NAMELESS_MS, signal);
          continue;
        }
        this.#client = client;
        const why = await client.closed;
        if (this.#client === client) this.#drop();
        if (signal.aborted) return;
        if (this.#gaveUp) this.#backoffMs = Math.max(this.#backoffMs, this.#timing.giveUpMs);
        else if (performance.now() - began >= LASTING_MS) this.#backoffMs = this.#timing.backoffMsMin;
        if (why !== null) this.#complain(why.message);
      } catch (error) {
        if (signal.aborted) return;
        this.#complain(messageOf(error));
        if (isFinal(error)) this.#off = true;
      }
      if (!this.#off) await pause(this.#backoffMs, signal);
      this.#backoffMs = Math.min(this.#backoffMs * 2, this.#timing.backoffMsMax);
    }
  }

  async #connect(signal: AbortSignal): Promise<NbdClient | null> {
    const { known, tls = {}, exportName } = this.options;
    const uri = parseNbdUri(this.options.uri);
    const name = uri.exportName === '' ? exportName() : uri.exportName;
    if (name === null) return null;
    const { connectTimeoutMs, answerTimeoutMs } = this.#timing;
    this.#gaveUp = false;
    const client = await NbdClient.connect(formatNbdUri({ ...uri, exportName: hashesNameOf(name) }), {
      connectTimeoutMs,
      handshakeTimeoutMs: connectTimeoutMs,
      requestTimeoutMs: answerTimeoutMs,
      tls,
      signal,
    });
    const { size, description } = client.info;
    if (size === blocksOf(known.size) * HASH_BYTES && description === known.description) return client;
    client.destroy();
    throw new BlockferryError('source-mismatch', 'what it offers are not the hashes of this volume');
  }

  /** Once: what is lost is speed. */
  #complain(why: string): void {
    if (this.#complained) return;
    this.#complained = true;
    this.options.log.info({ why }, 'no hashes from the source for now: what seeds have comes over the link');
  }
}

/** To ask again would bring the same. */
function isFinal(error: unknown): boolean {
  const code = error instanceof BlockferryError ? error.code : undefined;
  return code === 'not-found' || code === 'source-mismatch' || code === 'address';
}

function pause(ms: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer);
      signal.removeEventListener('abort', done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    timer.unref();
    signal.addEventListener('abort', done);
    if (signal.aborted) done();
  });
}
