/**
 * The server's side of the fixed newstyle handshake as a state machine: bytes in through `push`, bytes out through `send`,
 * no sockets and no clock. The result does not depend on how the bytes were cut up on their way.
 *
 * Invariants:
 * - Every option but EXPORT_NAME gets exactly one final reply, in the order of the options.
 * - What is held of a client's bytes is one incomplete unit, OPTION_BYTES_MAX at most.
 * - STARTTLS ends this handshake. Behind it another one begins, which knows nothing of this one but NO_ZEROES; what came in
 *   clear text behind STARTTLS is thrown away (CVE-2021-3716).
 * - A device is opened when the client has chosen its export, not before (CVE-2019-14850), and then belongs to the result.
 * - After the result nothing is sent.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Fixed newstyle negotiation» to «Option types».
 */
import {
  encodeAck,
  encodeExportNameAnswer,
  encodeGreeting,
  encodeInfoBlockSize,
  encodeInfoDescription,
  encodeInfoExport,
  encodeInfoName,
  encodeMetaContext,
  encodeOptionError,
  encodeServer,
} from '../codec/option-replies.js';
import {
  CLIENT_FLAGS_BYTES,
  type InfoRequest,
  OPTION_HEADER_BYTES,
  parseClientFlags,
  parseExportName,
  parseInfoRequest,
  parseMetaContextRequest,
  parseOptionHeader,
} from '../codec/options.js';
import {
  Info,
  LISTED_BYTES_MAX,
  OPTION_BYTES_MAX,
  OPTION_SKIP_BYTES_MAX,
  OPTIONS_MAX,
  OPTIONS_PER_LISTED_NAME,
  Option,
  OptionReply,
  PAYLOAD_BYTES_MAX,
} from '../constants.js';
import type { BlockDevice } from '../device.js';
import type { TlsMode } from '../tls.js';
import { listContexts, type SelectedContext, selectContexts } from './contexts.js';
import { type ExportDirectory, type ExportEntry, transmissionFlags } from './exports.js';

const MINIMUM_BLOCK_BYTES = 1;

export type EndReason =
  | 'abort' // the client took its leave
  | 'client-flags' // the client set flags we do not know
  | 'option-magic' // what should be an option is not
  | 'option-too-long' // more data than OPTION_SKIP_BYTES_MAX
  | 'too-many-options'
  | 'export-name' // EXPORT_NAME cannot be met, and has no way to say so
  | 'tls-required' // EXPORT_NAME, which has no way to say so either
  | 'shutting-down'; // EXPORT_NAME came too late

export type HandshakeResult =
  | {
      kind: 'transmission';
      entry: ExportEntry;
      /** Open; whoever takes the result releases it. */
      device: BlockDevice;
      /** Structured replies were agreed on. */
      structured: boolean;
      /** Extended headers were agreed on; then `structured` is true as well. */
      extended: boolean;
      /** Metadata contexts the client selected; without `structured` none. */
      contexts: readonly SelectedContext[];
      /** NO_ZEROES was agreed on. */
      noZeroes: boolean;
      /** Bytes that arrived behind the handshake: the beginning of transmission. */
      rest: Buffer;
    }
  /** The client was told to begin with TLS. `behindTls` is for the handshake that follows. */
  | { kind: 'starttls'; behindTls: { noZeroes: boolean } }
  | { kind: 'end'; reason: EndReason; detail: string };

export interface HandshakeParameters {
  exports: ExportDirectory;
  /** Default: 'off'. */
  tls?: TlsMode;
  /** This is the handshake that goes on behind STARTTLS, with what is still true of the one before. */
  behindTls?: { noZeroes: boolean };
  /** Takes what is to be sent; the buffer is the receiver's. */
  send(bytes: Buffer): void;
  /** Told of an export that a client chose and that could not be opened. The client only learns that it is not available. */
  openFailed?(entry: ExportEntry, error: unknown): void;
}

type State =
  | { kind: 'client-flags' }
  | { kind: 'option-header' }
  | { kind: 'option-data'; option: number; length: number }
  /** Data too long to be kept is read past, then refused. */
  | { kind: 'option-skip'; option: number; left: number }
  | { kind: 'over'; result: HandshakeResult };

interface Agreed {
  /** Structured replies, or extended headers. */
  structured: boolean;
  extended: boolean;
  /** Of the last SET_META_CONTEXT, if it succeeded. It counts for that export only. */
  contexts: { entryName: string; selected: SelectedContext[] } | undefined;
}

export class Handshake {
  readonly #exports: ExportDirectory;
  readonly #tls: TlsMode;
  readonly #secure: boolean;
  readonly #send: (bytes: Buffer) => void;
  readonly #openFailed: (entry: ExportEntry, error: unknown) => void;
  #state: State = { kind: 'client-flags' };
  /** The incomplete unit: its first `#held` bytes are there. */
  #unit = Buffer.alloc(0);
  #held = 0;
  readonly #agreed: Agreed = { structured: false, extended: false, contexts: undefined };
  #noZeroes = false;
  #optionsSeen = 0;
  #namesListed = 0;
  #bytesListed = 0;

  constructor(parameters: HandshakeParameters) {
    this.#exports = parameters.exports;
    this.#tls = parameters.tls ?? 'off';
    this.#secure = parameters.behindTls !== undefined;
    if (parameters.behindTls !== undefined) {
      this.#state = { kind: 'option-header' };
      this.#noZeroes = parameters.behindTls.noZeroes;
    }
    this.#send = (bytes) => parameters.send(bytes);
    this.#openFailed = (entry, error) => parameters.openFailed?.(entry, error);
  }

  /** Sends the greeting, unless that was done before TLS. Once, before the first `push`. */
  start(): void {
    if (!this.#secure) this.#send(encodeGreeting());
  }

  get result(): HandshakeResult | undefined {
    return this.#state.kind === 'over' ? this.#state.result : undefined;
  }

  /** Takes bytes from the client, in pieces of any size. Returns the result once there is one; then it takes no more. */
  push(bytes: Buffer): HandshakeResult | undefined {
    let at = 0;
    for (;;) {
      const state = this.#state;
      if (state.kind === 'over') return state.result;
      if (state.kind === 'option-skip') {
        const skipped = Math.min(state.left, bytes.length - at);
        at += skipped;
        state.left -= skipped;
        if (state.left > 0) return undefined;
        this.#optionSkipped(state.option);
        continue;
      }
      const missing = unitBytes(state) - this.#held;
      if (bytes.length - at < missing) {
        this.#hold(bytes.subarray(at), unitBytes(state));
        return undefined;
      }
      const unit = this.#complete(bytes.subarray(at, at + missing));
      at += missing;
      this.#state = this.#next(state, unit, bytes.subarray(at));
    }
  }

  #hold(bytes: Buffer, unitLength: number): void {
    if (bytes.length === 0) return;
    if (this.#held === 0) this.#unit = Buffer.allocUnsafe(unitLength);
    bytes.copy(this.#unit, this.#held);
    this.#held += bytes.length;
  }

  #complete(bytes: Buffer): Buffer {
    if (this.#held === 0) return bytes;
    bytes.copy(this.#unit, this.#held);
    this.#held = 0;
    return this.#unit;
  }

  #next(state: Exclude<State, { kind: 'over' | 'option-skip' }>, unit: Buffer, rest: Buffer): State {
    switch (state.kind) {
      case 'client-flags':
        return this.#clientFlags(unit);
      case 'option-header':
        return this.#optionHeader(unit);
      case 'option-data': {
        const result = this.#option(state.option, unit, rest);
        return result === undefined ? { kind: 'option-header' } : { kind: 'over', result };
      }
    }
  }

  #clientFlags(unit: Buffer): State {
    const flags = parseClientFlags(unit);
    if (!flags.ok) return over('client-flags', flags.problem);
    // A client that does not claim FIXED_NEWSTYLE and yet sends its options is answered: it can only understand.
    this.#noZeroes = flags.value.noZeroes;
    return { kind: 'option-header' };
  }

  #optionHeader(unit: Buffer): State {
    const header = parseOptionHeader(unit);
    if (!header.ok) return over('option-magic', header.problem);
    const { option, length } = header.value;
    this.#optionsSeen++;
    if (this.#optionsSeen > OPTIONS_MAX + OPTIONS_PER_LISTED_NAME * this.#namesListed)
      return over('too-many-options', `${this.#optionsSeen} options and no export chosen`);
    if (length <= OPTION_BYTES_MAX) return { kind: 'option-data', option, length };
    if (option === Option.EXPORT_NAME)
      return over('export-name', `an export name of ${length} bytes is too long`);
    if (length > OPTION_SKIP_BYTES_MAX)
      return over('option-too-long', `option ${option} announces ${length} bytes of data`);
    return { kind: 'option-skip', option, left: length };
  }

  #optionSkipped(option: number): void {
    this.#state = { kind: 'option-header' };
    if (option === Option.ABORT) this.#state = { kind: 'over', result: this.#abort() };
    else if (this.#exports.shuttingDown) this.#refuseShuttingDown(option);
    else if (option === Option.STARTTLS) this.#refuseStartTls(true);
    else if (this.#tlsMissing) this.#refuseWithoutTls(option);
    else if (!IMPLEMENTED.has(option)) this.#refuseUnknown(option);
    else {
      if (option === Option.SET_META_CONTEXT) this.#agreed.contexts = undefined;
      this.#refuse(option, OptionReply.ERR_TOO_BIG, `more than ${OPTION_BYTES_MAX} bytes of data`);
    }
  }

  /** Answers one option. A result ends the handshake. */
  #option(option: number, data: Buffer, rest: Buffer): HandshakeResult | undefined {
    if (option === Option.ABORT) return this.#abort();
    if (option === Option.EXPORT_NAME) return this.#exportName(data, rest);
    if (this.#exports.shuttingDown) return this.#refuseShuttingDown(option);
    if (option === Option.STARTTLS) return this.#startTls(data);
    if (this.#tlsMissing) return this.#refuseWithoutTls(option);
    switch (option) {
      case Option.LIST:
        return this.#list(data);
      case Option.INFO:
      case Option.GO:
        return this.#infoOrGo(option, data, rest);
      case Option.STRUCTURED_REPLY:
        return this.#structuredReply(data);
      case Option.LIST_META_CONTEXT:
      case Option.SET_META_CONTEXT:
        return this.#metaContext(option, data);
      case Option.EXTENDED_HEADERS:
        return this.#extendedHeaders(data);
      default:
        return this.#refuseUnknown(option);
    }
  }

  #abort(): HandshakeResult {
    this.#ack(Option.ABORT);
    return { kind: 'end', reason: 'abort', detail: 'the client ended the handshake' };
  }

  /** TLS is required, and is not there. */
  get #tlsMissing(): boolean {
    return this.#tls === 'required' && !this.#secure;
  }

  #startTls(data: Buffer): HandshakeResult | undefined {
    if (this.#tls === 'off' || this.#secure || data.length > 0) return this.#refuseStartTls(data.length > 0);
    this.#ack(Option.STARTTLS);
    return { kind: 'starttls', behindTls: { noZeroes: this.#noZeroes } };
  }

  #refuseStartTls(hasData: boolean): undefined {
    const option = Option.STARTTLS;
    if (this.#tls === 'off') return this.#refuseUnknown(option);
    const why = hasData ? 'STARTTLS takes no data' : 'TLS is on already';
    return this.#refuse(option, OptionReply.ERR_INVALID, why);
  }

  #refuseWithoutTls(option: number): undefined {
    return this.#refuse(option, OptionReply.ERR_TLS_REQD, 'TLS must be started first');
  }

  /** The entry is for clients behind TLS, and this one is not. */
  #outOfReach(entry: ExportEntry): boolean {
    return entry.tlsOnly === true && !this.#secure;
  }

  #exportName(data: Buffer, rest: Buffer): HandshakeResult {
    if (this.#exports.shuttingDown) return end('shutting-down', 'the server is shutting down');
    if (this.#tlsMissing) return end('tls-required', 'it asked for an export without TLS, which is required');
    if (this.#agreed.extended) return end('export-name', 'EXPORT_NAME must not follow EXTENDED_HEADERS');
    const name = parseExportName(data);
    if (!name.ok) return end('export-name', name.problem);
    const entry = this.#exports.find(name.value);
    if (entry === undefined) return end('export-name', noExport(name.value));
    if (this.#outOfReach(entry)) return end('tls-required', 'it asked for an export that requires TLS');
    const device = this.#open(entry);
    if (device === undefined) return end('export-name', unavailable(entry));
    const flags = transmissionFlags(device, this.#agreed.structured);
    this.#send(encodeExportNameAnswer(device.size, flags, this.#noZeroes));
    return this.#transmission(entry, device, rest);
  }

  #list(data: Buffer): undefined {
    if (data.length > 0) return this.#refuse(Option.LIST, OptionReply.ERR_INVALID, 'LIST takes no data');
    if (this.#bytesListed > LISTED_BYTES_MAX)
      return this.#refuse(Option.LIST, OptionReply.ERR_TOO_BIG, 'listed too often');
    const entries = this.#exports.list().filter((entry) => !this.#outOfReach(entry));
    for (const entry of entries) {
      const reply = encodeServer(entry.name, entry.description);
      this.#bytesListed += reply.length;
      this.#send(reply);
    }
    // The largest list counts, not the sum: listing again and again earns no further options.
    this.#namesListed = Math.max(this.#namesListed, entries.length);
    return this.#ack(Option.LIST);
  }

  #infoOrGo(option: number, data: Buffer, rest: Buffer): HandshakeResult | undefined {
    const request = parseInfoRequest(data);
    if (!request.ok) return this.#refuse(option, OptionReply.ERR_INVALID, request.problem);
    const entry = this.#exports.find(request.value.name);
    if (entry === undefined)
      return this.#refuse(option, OptionReply.ERR_UNKNOWN, noExport(request.value.name));
    if (this.#outOfReach(entry)) return this.#refuseWithoutTls(option);
    if (option === Option.INFO) return this.#describe(option, entry, request.value);
    const device = this.#open(entry);
    if (device === undefined) return this.#refuse(option, OptionReply.ERR_UNKNOWN, unavailable(entry));
    this.#describe(option, entry, request.value);
    return this.#transmission(entry, device, rest);
  }

  #describe(option: number, entry: ExportEntry, { infos }: InfoRequest): undefined {
    this.#send(encodeInfoExport(option, entry.size, this.#flagsOf(entry)));
    if (infos.has(Info.NAME)) this.#send(encodeInfoName(option, entry.name));
    if (infos.has(Info.DESCRIPTION) && entry.description !== '')
      this.#send(encodeInfoDescription(option, entry.description));
    if (infos.has(Info.BLOCK_SIZE))
      this.#send(encodeInfoBlockSize(option, MINIMUM_BLOCK_BYTES, entry.preferredBlock, PAYLOAD_BYTES_MAX));
    return this.#ack(option);
  }

  /** Transmission flags of an export for this client. */
  #flagsOf(entry: ExportEntry): number {
    const { structured, extended } = this.#agreed;
    return transmissionFlags(entry, structured, extended && this.#contextsOf(entry).length > 0);
  }

  #contextsOf(entry: ExportEntry): readonly SelectedContext[] {
    const { contexts } = this.#agreed;
    return contexts?.entryName === entry.name ? contexts.selected : [];
  }

  #structuredReply(data: Buffer): undefined {
    const option = Option.STRUCTURED_REPLY;
    if (data.length > 0)
      return this.#refuse(option, OptionReply.ERR_INVALID, 'STRUCTURED_REPLY takes no data');
    if (this.#agreed.extended)
      return this.#refuse(option, OptionReply.ERR_EXT_HEADER_REQD, 'extended headers are agreed on already');
    if (this.#agreed.structured) return this.#refuse(option, OptionReply.ERR_INVALID, 'agreed on already');
    this.#agreed.structured = true;
    return this.#ack(option);
  }

  #extendedHeaders(data: Buffer): undefined {
    const option = Option.EXTENDED_HEADERS;
    if (data.length > 0)
      return this.#refuse(option, OptionReply.ERR_INVALID, 'EXTENDED_HEADERS takes no data');
    if (this.#agreed.extended) return this.#refuse(option, OptionReply.ERR_INVALID, 'agreed on already');
    this.#agreed.structured = true;
    this.#agreed.extended = true;
    return this.#ack(option);
  }

  #metaContext(option: number, data: Buffer): undefined {
    const set = option === Option.SET_META_CONTEXT;
    if (set) this.#agreed.contexts = undefined; // the old set is gone even if the new one fails
    if (set && !this.#agreed.structured)
      return this.#refuse(option, OptionReply.ERR_INVALID, 'structured replies must be agreed on first');
    const request = parseMetaContextRequest(data);
    if (!request.ok) return this.#refuse(option, OptionReply.ERR_INVALID, request.problem);
    const { name, queries } = request.value;
    const entry = this.#exports.find(name);
    if (entry === undefined) return this.#refuse(option, OptionReply.ERR_UNKNOWN, noExport(name));
    if (this.#outOfReach(entry)) return this.#refuseWithoutTls(option);
    if (set) {
      const selected = selectContexts(entry.contexts, queries);
      for (const context of selected) this.#send(encodeMetaContext(option, context.id, context.name));
      this.#agreed.contexts = { entryName: entry.name, selected };
    } else {
      for (const context of listContexts(entry.contexts, queries))
        this.#send(encodeMetaContext(option, 0, context));
    }
    return this.#ack(option);
  }

  /** Opens an export for the client that chose it. A device that is not what its entry promised to INFO is let go. */
  #open(entry: ExportEntry): BlockDevice | undefined {
    try {
      const device = entry.open();
      if (
        device.size === entry.size &&
        device.readOnly === entry.readOnly &&
        device.multiConn === entry.multiConn &&
        (device.fastZero === true || entry.fastZero !== true)
      )
        return device;
      device.release();
      throw new Error(
        `export ${JSON.stringify(entry.name)} changed while it was opened: the client must try again`,
      );
    } catch (error) {
      this.#openFailed(entry, error);
      return undefined;
    }
  }

  #transmission(entry: ExportEntry, device: BlockDevice, rest: Buffer): HandshakeResult {
    const { structured, extended } = this.#agreed;
    return {
      kind: 'transmission',
      entry,
      device,
      structured,
      extended,
      contexts: this.#contextsOf(entry),
      noZeroes: this.#noZeroes,
      rest,
    };
  }

  #refuseUnknown(option: number): undefined {
    return this.#refuse(option, OptionReply.ERR_UNSUP, `option ${option} is not supported`);
  }

  #refuseShuttingDown(option: number): undefined {
    return this.#refuse(option, OptionReply.ERR_SHUTDOWN, 'the server is shutting down');
  }

  #refuse(option: number, type: number, message: string): undefined {
    this.#send(encodeOptionError(option, type, message));
  }

  #ack(option: number): undefined {
    this.#send(encodeAck(option));
  }
}

const IMPLEMENTED: ReadonlySet<number> = new Set([
  Option.EXPORT_NAME,
  Option.ABORT,
  Option.LIST,
  Option.INFO,
  Option.GO,
  Option.STRUCTURED_REPLY,
  Option.LIST_META_CONTEXT,
  Option.SET_META_CONTEXT,
  Option.EXTENDED_HEADERS,
]);

function unitBytes(state: Exclude<State, { kind: 'over' | 'option-skip' }>): number {
  switch (state.kind) {
    case 'client-flags':
      return CLIENT_FLAGS_BYTES;
    case 'option-header':
      return OPTION_HEADER_BYTES;
    case 'option-data':
      return state.length;
  }
}

function end(reason: EndReason, detail: string): HandshakeResult {
  return { kind: 'end', reason, detail };
}

function over(reason: EndReason, detail: string): State {
  return { kind: 'over', result: end(reason, detail) };
}

function noExport(name: string): string {
  return name === '' ? 'there is no default export: name one' : `there is no export ${JSON.stringify(name)}`;
}

function unavailable(entry: ExportEntry): string {
  return `export ${JSON.stringify(entry.name)} is not available now`;
}
