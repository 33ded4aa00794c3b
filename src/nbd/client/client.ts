/**
 * An NBD client: one connection, any number of requests in flight, answers in any order.
 *
 * States: open -> draining (`close`, or the server shuts down: no new requests, those in flight are answered, then DISC) ->
 * closed. Any fault of the server or the transport leads from each state straight to closed.
 *
 * Invariants: every request's promise is settled exactly once, at the latest when the connection closes. A read succeeds only
 * when the server delivered each of its bytes exactly once. A buffer is touched only while its request is in flight.
 */

import type { Socket } from 'node:net';
import type { Duplex } from 'node:stream';
import { BlockferryError, messageOf } from '../../errors.js';
import { encodeOption, encodeStatusFilter, type ListedExport, protocolError } from '../codec/client.js';
import { CompressedStream } from '../compression/stream.js';
import { Command, CommandFlag, Option, TransmissionFlag } from '../constants.js';
import { parseNbdUri } from '../uri.js';
import { type Connection, type ConnectLimits, describeLoss, openConnection } from './connect.js';
import type { ExportInfo } from './export-info.js';
import type { NbdClientOptions, ReadOptions, WriteOptions, ZeroOptions } from './options.js';
import { OverdueWatch } from './overdue.js';
import { ReplyReader } from './reply-reader.js';
import { RequestChecks } from './request-checks.js';
import { CLIENT_REQUESTS_MAX, type Extent, type PendingRequest, RequestTable } from './requests.js';
import { RequestSender } from './sender.js';

export type { ListedExport } from '../codec/client.js';
export type { ExportInfo } from './export-info.js';
export { type Extent, NbdReplyError } from './requests.js';

/** How long `close` waits for answers, and then for the server to hang up, before it cuts the connection. */
export const CLOSE_TIMEOUT_MS = 10_000;

/**
 * A connection to one export.
 *
 * All requests reject with a BlockferryError: 'source-io' when the server answered with an error (`cause` is an NbdReplyError
 * with its errno), 'closed' when the connection ended first (`cause` says why), 'bounds' for what lies outside the export, is
 * not aligned to `info.blockSize.minimum`, is longer than `payloadBytesMax`, or is one request too many; 'read-only'; and
 * 'usage' for what the server does not offer. The last three never reach the server.
 */
export class NbdClient {
  /** What the server told about the export when the connection was made. */
  readonly info: ExportInfo;
  /** Largest READ or WRITE, bytes: what the server advertised, else 32 MiB; never more than 64 MiB. Split longer ones. */
  readonly payloadBytesMax: number;
  /** Resolves when the connection is over: null after `close`, else why it ended. Never rejects. */
  readonly closed: Promise<BlockferryError | null>;

  readonly #socket: Duplex;
  readonly #transport: Socket;
  readonly #peer: string;
  readonly #table = new RequestTable();
  readonly #reader: ReplyReader;
  readonly #sender: RequestSender;
  readonly #checks: RequestChecks;
  /** Null without `requestTimeoutMs`. */
  readonly #watch: OverdueWatch | null;
  /** BLOCK_STATUS can ask for one of several contexts. */
  readonly #filters: boolean;
  #state: 'open' | 'draining' | 'closed' = 'open';
  /** What `closed` will say after an orderly end. */
  #drainReason: BlockferryError | null = null;
  /** What requests are refused with from now on. */
  #refusal: BlockferryError | null = null;
  #resolveClosed!: (reason: BlockferryError | null) => void;
  #drainTimer: NodeJS.Timeout | null = null;

  private constructor(connection: Connection, info: ExportInfo, requestTimeoutMs: number | undefined) {
    this.info = info;
    this.#checks = new RequestChecks(info, connection.peer);
    this.payloadBytesMax = this.#checks.payloadBytesMax;
    this.closed = new Promise((resolve) => {
      this.#resolveClosed = resolve;
    });
    this.#socket = connection.socket;
    this.#transport = connection.transport;
    this.#peer = connection.peer;
    this.#sender = new RequestSender(connection.socket, info.extended);
    this.#filters = (info.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) !== 0 && info.contexts.size > 1;
    const contexts = [...info.contexts];
    this.#reader = new ReplyReader(this.#table, {
      structured: info.structured,
      extended: info.extended,
      contextIds: new Set(info.contexts.values()),
      narrowContextIds: new Set(contexts.filter(([name]) => name.startsWith('base:')).map(([, id]) => id)),
      size: info.size,
    });
    this.#table.onIdle = () => this.#idle();
    this.#table.onShutdown = () => {
      this.#drain(new BlockferryError('closed', `the server at ${this.#peer} is shutting down`));
    };
    this.#watch =
      requestTimeoutMs === undefined
        ? null
        : new OverdueWatch(this.#table, requestTimeoutMs, (request, waitedMs) => {
            const what = `${this.#peer} did not answer ${request.describe()} within ${waitedMs} ms`;
            this.#over(new BlockferryError('timeout', what));
          });
    connection.handTo({
      received: (bytes, length) => this.#received(bytes, length),
      ended: (error) => this.#ended(error),
    });
    // The server may have hung up between the end of the handshake and now.
    if (connection.socket.destroyed || connection.socket.readableEnded) this.#ended(null);
  }

  /**
   * Connects to the export that `uri` names, as in `nbd://HOST:PORT/NAME` or `nbds+unix:///NAME?socket=PATH`, and haggles. Rejects with
   * 'address' (not a usable URI), 'source-unreachable' (nobody answers, or not without TLS), 'timeout', 'closed' (the server hung
   * up, or `signal` fired), 'protocol', 'not-found' (no such export), 'source-io' (the server refused), or 'tls' (credentials, or the
   * peer's).
   */
  static async connect(uri: string, options: NbdClientOptions = {}): Promise<NbdClient> {
    const parsed = parseNbdUri(uri);
    const connection = await openConnection(
      parsed,
      {
        kind: 'connect',
        exportName: parsed.exportName,
        contexts: options.contexts ?? [],
        requireStructured: options.requireStructured ?? false,
        extended: options.extendedHeaders ?? true,
        compression: options.compression ?? 'off',
      },
      options,
    );
    if (connection.outcome.kind !== 'connect') throw new BlockferryError('protocol', 'unexpected outcome');
    return new NbdClient(connection, connection.outcome.info, options.requestTimeoutMs);
  }

  /** The exports a server lists; the URI's export name is of no account. Rejects as `connect` does. */
  static async list(uri: string, limits: ConnectLimits = {}): Promise<ListedExport[]> {
    const connection = await openConnection(parseNbdUri(uri), { kind: 'list' }, limits);
    connection.handTo({ received() {}, ended() {} });
    connection.socket.write(encodeOption(Option.ABORT));
    connection.socket.destroySoon();
    return connection.outcome.kind === 'list' ? connection.outcome.exports : [];
  }

  /** The server agreed to compress the connection. */
  get compressed(): boolean {
    return this.#socket instanceof CompressedStream;
  }

  /** What crossed the wire to us so far, with everything around the content, bytes. */
  get wireBytesReceived(): number {
    return this.#transport.bytesRead;
  }

  /** Requests not answered yet. More than 4096 are refused. */
  get inFlight(): number {
    return this.#table.active;
  }

  /** The export's bytes from `offset` on, in a buffer of their own. `length` <= `payloadBytesMax`. */
  read(offset: number, length: number): Promise<Buffer>;
  /** Fills buffer[at, at + length) with them, `at` being 0 by default. When it fails that range is undefined. */
  read(offset: number, length: number, buffer: Buffer, at?: number, options?: ReadOptions): Promise<void>;
  read(offset: number, length: number, buffer?: Buffer, at = 0, options?: ReadOptions): Promise<unknown> {
    if (buffer === undefined) return this.#readNew(offset, length);
    const whole = options?.dontFragment === true;
    const wrong =
      this.#refusal ??
      this.#checks.range(offset, length) ??
      this.#checks.payload(length, buffer, at) ??
      (whole ? this.#checks.offers(TransmissionFlag.SEND_DF, 'DF') : null);
    if (wrong !== null) return Promise.reject(wrong);
    if (length === 0) return Promise.resolve();
    const request = this.#table.take();
    if (request === null) return Promise.reject(tooMany());
    request.buffer = buffer;
    request.at = at;
    return this.#send(request, Command.READ, whole ? CommandFlag.DF : 0, offset, length);
  }

  async #readNew(offset: number, length: number): Promise<Buffer> {
    // What is too long gets no memory, and is refused.
    const buffer = Buffer.allocUnsafeSlow(length > 0 && length <= this.payloadBytesMax ? length : 0);
    await this.read(offset, length, buffer);
    return buffer;
  }

  /** Writes the whole buffer, <= `payloadBytesMax`, which must be left alone until this is settled. */
  write(offset: number, buffer: Buffer, options?: WriteOptions): Promise<void>;
  /** Writes buffer[at, at + length). */
  write(offset: number, buffer: Buffer, at: number, length: number, options?: WriteOptions): Promise<void>;
  write(
    offset: number,
    buffer: Buffer,
    from: number | WriteOptions = 0,
    length = buffer.length,
    last?: WriteOptions,
  ): Promise<void> {
    const at = typeof from === 'number' ? from : 0;
    const options = typeof from === 'number' ? last : from;
    const wrong =
      this.#refusal ??
      this.#checks.change(offset, length, options?.fua === true) ??
      this.#checks.payload(length, buffer, at);
    if (wrong !== null) return Promise.reject(wrong);
    if (length === 0) return Promise.resolve();
    const request = this.#table.take();
    if (request === null) return Promise.reject(tooMany());
    const flags =
      (options?.fua === true ? CommandFlag.FUA : 0) | (this.info.extended ? CommandFlag.PAYLOAD_LEN : 0);
    const promise = this.#send(request, Command.WRITE, flags, offset, length);
    this.#sender.payload(buffer.subarray(at, at + length));
    return promise as Promise<unknown> as Promise<void>;
  }

  /** Resolves when every write answered before this call is on stable storage. */
  flush(): Promise<void> {
    const wrong = this.#refusal ?? this.#checks.offers(TransmissionFlag.SEND_FLUSH, 'FLUSH');
    return this.#command(wrong, Command.FLUSH, 0, 0, 0);
  }

  /** The content of the range is of no use any more. `length` < 2^32, unless `info.extended`; so below. */
  trim(offset: number, length: number, options?: WriteOptions): Promise<void> {
    const wrong =
      this.#refusal ??
      this.#checks.change(offset, length, options?.fua === true) ??
      this.#checks.offers(TransmissionFlag.SEND_TRIM, 'TRIM');
    return this.#command(wrong, Command.TRIM, options?.fua === true ? CommandFlag.FUA : 0, offset, length);
  }

  /** The range reads as zeroes afterwards. */
  zero(offset: number, length: number, options?: ZeroOptions): Promise<void> {
    const wrong =
      this.#refusal ??
      this.#checks.change(offset, length, options?.fua === true) ??
      this.#checks.offers(TransmissionFlag.SEND_WRITE_ZEROES, 'WRITE_ZEROES') ??
      (options?.fast === true ? this.#checks.offers(TransmissionFlag.SEND_FAST_ZERO, 'FAST_ZERO') : null);
    const flags =
      (options?.fua === true ? CommandFlag.FUA : 0) |
      (options?.noHole === true ? CommandFlag.NO_HOLE : 0) |
      (options?.fast === true ? CommandFlag.FAST_ZERO : 0);
    return this.#command(wrong, Command.WRITE_ZEROES, flags, offset, length);
  }

  /** Asks the server to have the range at hand. */
  cache(offset: number, length: number): Promise<void> {
    const wrong =
      this.#refusal ??
      this.#checks.range(offset, length) ??
      this.#checks.offers(TransmissionFlag.SEND_CACHE, 'CACHE');
    return this.#command(wrong, Command.CACHE, 0, offset, length);
  }

  /**
   * Status of the range in a context of `info.contexts`: extents that follow one another from `offset` on, at least one,
   * neighbours differ. They may end before the range does (ask again from there), or reach beyond it, but not beyond the
   * export. `one`: a single extent, within the range. `length` is at least 1.
   */
  async blockStatus(
    context: string,
    offset: number,
    length: number,
    options?: { one?: boolean },
  ): Promise<Extent[]> {
    const wrong = this.#refusal ?? this.#checks.range(offset, length);
    if (wrong !== null) throw wrong;
    if (length === 0) throw new BlockferryError('bounds', 'the status of no bytes was asked for');
    const contextId = this.info.contexts.get(context);
    if (contextId === undefined) {
      throw new BlockferryError(
        'usage',
        `the server at ${this.#peer} does not report the context '${context}'`,
      );
    }
    const request = this.#table.take();
    if (request === null) throw tooMany();
    request.contextId = contextId;
    const flags = options?.one === true ? CommandFlag.REQ_ONE : 0;
    if (!this.#filters) return (await this.#send(request, Command.BLOCK_STATUS, flags, offset, length)) ?? [];
    request.filtered = true;
    const filter = encodeStatusFilter(length, contextId);
    const promise = this.#send(
      request,
      Command.BLOCK_STATUS,
      flags | CommandFlag.PAYLOAD_LEN,
      offset,
      length,
      filter.length,
    );
    this.#sender.payload(filter);
    return (await promise) ?? [];
  }

  /**
   * Refuses new requests, waits for those in flight, says DISC and resolves when the connection is over, at the latest
   * 2 * CLOSE_TIMEOUT_MS from now. May be called again.
   */
  async close(): Promise<void> {
    this.#drain(null);
    await this.closed;
  }

  /** Cuts the connection at once. Requests in flight fail with 'closed'; `error` becomes their cause. */
  destroy(error?: BlockferryError): void {
    this.#over(error ?? new BlockferryError('closed', `the connection to ${this.#peer} was given up`));
  }

  #received(bytes: Buffer, length: number): void {
    if (this.#state === 'closed') return;
    try {
      this.#reader.receive(bytes, length);
      this.#watch?.heard(length);
    } catch (error) {
      const known = error instanceof BlockferryError ? error : protocolError(messageOf(error));
      this.#over(new BlockferryError(known.code, `${this.#peer}: ${known.message}`, { cause: error }));
    }
  }

  #ended(error: Error | null): void {
    if (this.#state === 'closed') return;
    // Hanging up, in whatever manner, is the answer to DISC.
    if (this.#state === 'draining' && this.#table.active === 0) {
      this.#over(this.#drainReason);
      return;
    }
    if (error instanceof BlockferryError) {
      this.#over(new BlockferryError(error.code, `${this.#peer}: ${error.message}`, { cause: error }));
      return;
    }
    const why = describeLoss(error);
    this.#over(
      new BlockferryError('closed', `the connection to ${this.#peer} was lost: ${why}`, { cause: error }),
    );
  }

  #command(
    wrong: BlockferryError | null,
    command: number,
    flags: number,
    offset: number,
    length: number,
  ): Promise<void> {
    if (wrong !== null) return Promise.reject(wrong);
    if (length === 0 && command !== Command.FLUSH) return Promise.resolve();
    const request = this.#table.take();
    if (request === null) return Promise.reject(tooMany());
    return this.#send(request, command, flags, offset, length) as Promise<unknown> as Promise<void>;
  }

  #send(
    request: PendingRequest,
    command: number,
    flags: number,
    offset: number,
    length: number,
    /** What the header says, if not the bytes that it is about. */
    wireLength = length,
  ): Promise<Extent[] | undefined> {
    request.command = command;
    request.flags = flags;
    request.offset = offset;
    request.length = length;
    if (this.#watch !== null) request.startedAtMs = performance.now();
    this.#sender.request(flags, command, request.generation, request.index, offset, wireLength);
    return this.#table.promiseOf(request);
  }

  #drain(reason: BlockferryError | null): void {
    if (this.#state !== 'open') return;
    this.#state = 'draining';
    this.#drainReason = reason;
    this.#refusal =
      reason ?? new BlockferryError('closed', `the connection to ${this.#peer} is being closed`);
    this.#armDrainTimer('the requests in flight were not answered');
    if (this.#table.active === 0) this.#idle();
  }

  #idle(): void {
    if (this.#state !== 'draining') return;
    this.#armDrainTimer('the server did not hang up');
    this.#sender.request(0, Command.DISC, 0, 0, 0, 0);
    this.#sender.flush();
    this.#socket.end();
  }

  #armDrainTimer(what: string): void {
    if (this.#drainTimer !== null) clearTimeout(this.#drainTimer);
    this.#drainTimer = setTimeout(() => {
      // After DISC nothing is owed to the server: the close is as orderly as it gets.
      if (this.#table.active === 0) this.#over(this.#drainReason);
      else this.#over(new BlockferryError('timeout', `${this.#peer}: ${what} within ${CLOSE_TIMEOUT_MS} ms`));
    }, CLOSE_TIMEOUT_MS);
  }

  #over(reason: BlockferryError | null): void {
    if (this.#state === 'closed') return;
    this.#state = 'closed';
    if (this.#drainTimer !== null) clearTimeout(this.#drainTimer);
    this.#watch?.stop();
    this.#socket.destroy();
    const message = reason?.message ?? `the connection to ${this.#peer} was closed`;
    this.#refusal = new BlockferryError('closed', message, { cause: reason });
    this.#table.failAll(this.#refusal);
    this.#resolveClosed(reason);
  }
}

function tooMany(): BlockferryError {
  return new BlockferryError(
    'bounds',
    `${CLIENT_REQUESTS_MAX} requests are in flight already: wait for one of them`,
  );
}
