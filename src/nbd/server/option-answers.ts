/**
 * What a server answers to each option: one final reply to every option but EXPORT_NAME, sent before `answer` returns. The bytes
 * come from the state machine in handshake.ts, one whole option at a time.
 *
 * Invariants:
 * - A device is opened when the client has chosen its export, not before (CVE-2019-14850), and then belongs to the result.
 * - After a result nothing is sent.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Option types».
 */

import { parseCompressionRequest } from '../codec/frames.js';
import {
  encodeAck,
  encodeExportNameAnswer,
  encodeInfoBlockSize,
  encodeInfoDescription,
  encodeInfoExport,
  encodeInfoName,
  encodeMetaContext,
  encodeOptionError,
  encodeServer,
} from '../codec/option-replies.js';
import {
  type InfoRequest,
  parseExportName,
  parseInfoRequest,
  parseMetaContextRequest,
} from '../codec/options.js';
import { zstdAvailable } from '../compression/available.js';
import {
  Info,
  LISTED_BYTES_MAX,
  OPTION_BYTES_MAX,
  Option,
  OptionReply,
  PAYLOAD_BYTES_MAX,
} from '../constants.js';
import type { BlockDevice } from '../device.js';
import type { TlsMode } from '../tls.js';
import { listContexts, type SelectedContext, selectContexts } from './contexts.js';
import { type ExportDirectory, type ExportEntry, transmissionFlags } from './exports.js';
import { end, type HandshakeParameters, type HandshakeResult } from './handshake-result.js';

const MINIMUM_BLOCK_BYTES = 1;

interface Agreed {
  /** Structured replies, or extended headers. */
  structured: boolean;
  extended: boolean;
  /** Of the last SET_META_CONTEXT, if it succeeded. It counts for that export only. */
  contexts: { entryName: string; selected: SelectedContext[] } | undefined;
}

export class OptionAnswers {
  /** NO_ZEROES was agreed on. */
  noZeroes: boolean;
  readonly #exports: ExportDirectory;
  readonly #tls: TlsMode;
  readonly #secure: boolean;
  /** The option COMPRESSION: not known here, to be had, or on. */
  readonly #compression: 'unknown' | 'offered' | 'on';
  readonly #send: (bytes: Buffer) => void;
  readonly #listExports: boolean;
  readonly #refusal: (entry: ExportEntry) => string | undefined;
  readonly #openFailed: (entry: ExportEntry, error: unknown) => void;
  readonly #agreed: Agreed = { structured: false, extended: false, contexts: undefined };
  #namesListed = 0;
  #bytesListed = 0;

  constructor(parameters: HandshakeParameters) {
    this.#exports = parameters.exports;
    this.#tls = parameters.tls ?? 'off';
    const { behindTls, behindCompression } = parameters;
    this.#secure = behindTls !== undefined || behindCompression?.secure === true;
    this.noZeroes = (behindCompression ?? behindTls)?.noZeroes ?? false;
    if (behindCompression !== undefined) this.#compression = 'on';
    else this.#compression = parameters.compression === true && zstdAvailable() ? 'offered' : 'unknown';
    this.#send = (bytes) => parameters.send(bytes);
    this.#listExports = parameters.listExports ?? true;
    this.#refusal = (entry) => parameters.refusal?.(entry);
    this.#openFailed = (entry, error) => parameters.openFailed?.(entry, error);
  }

  /** Names in the longest list the client was given. */
  get namesListed(): number {
    return this.#namesListed;
  }

  /** Answers one option, whose data is `data`; `rest` came behind it. A result ends the handshake. */
  answer(option: number, data: Buffer, rest: Buffer): HandshakeResult | undefined {
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
      case Option.COMPRESSION:
        return this.#compress(data, rest);
      default:
        return this.#refuseUnknown(option);
    }
  }

  /** Answers one option whose data was too long to be kept. */
  answerSkipped(option: number): HandshakeResult | undefined {
    if (option === Option.ABORT) return this.#abort();
    if (this.#exports.shuttingDown) return this.#refuseShuttingDown(option);
    if (option === Option.STARTTLS) return this.#refuseStartTls(true);
    if (this.#tlsMissing) return this.#refuseWithoutTls(option);
    if (option === Option.COMPRESSION && this.#compression !== 'unknown')
      return this.#refuse(option, OptionReply.ERR_INVALID, 'more data than COMPRESSION takes');
    if (!IMPLEMENTED.has(option)) return this.#refuseUnknown(option);
    if (option === Option.SET_META_CONTEXT) this.#agreed.contexts = undefined;
    return this.#refuse(option, OptionReply.ERR_TOO_BIG, `more than ${OPTION_BYTES_MAX} bytes of data`);
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
    const possible = this.#tls !== 'off' && !this.#secure && this.#compression !== 'on';
    if (!possible || data.length > 0) return this.#refuseStartTls(data.length > 0);
    this.#ack(Option.STARTTLS);
    return { kind: 'starttls', behindTls: { noZeroes: this.noZeroes } };
  }

  #refuseStartTls(hasData: boolean): undefined {
    const option = Option.STARTTLS;
    if (this.#tls === 'off') return this.#refuseUnknown(option);
    const late = this.#secure ? 'TLS is on already' : 'TLS must be started before compression';
    const why = hasData ? 'STARTTLS takes no data' : late;
    return this.#refuse(option, OptionReply.ERR_INVALID, why);
  }

  #compress(data: Buffer, rest: Buffer): HandshakeResult | undefined {
    const option = Option.COMPRESSION;
    if (this.#compression === 'unknown') return this.#refuseUnknown(option);
    if (this.#compression === 'on') return this.#refuse(option, OptionReply.ERR_INVALID, 'agreed on already');
    const request = parseCompressionRequest(data);
    if (!request.ok) return this.#refuse(option, OptionReply.ERR_INVALID, request.problem);
    if (request.value === undefined)
      return this.#refuse(option, OptionReply.ERR_UNSUP, 'that version of COMPRESSION is not known here');
    this.#ack(option);
    const behindCompression = { noZeroes: this.noZeroes, secure: this.#secure };
    return { kind: 'compression', level: request.value, behindCompression, rest };
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
    const refusal = this.#refusal(entry);
    if (refusal !== undefined) return end('connections-max', refusal);
    const device = this.#open(entry);
    if (device === undefined) return end('export-name', unavailable(entry));
    const flags = transmissionFlags(entry, this.#agreed.structured);
    this.#send(encodeExportNameAnswer(entry.size, flags, this.noZeroes));
    return this.#transmission(entry, device, rest);
  }

  #list(data: Buffer): undefined {
    if (data.length > 0) return this.#refuse(Option.LIST, OptionReply.ERR_INVALID, 'LIST takes no data');
    if (!this.#listExports)
      return this.#refuse(Option.LIST, OptionReply.ERR_POLICY, 'this server does not list its exports');
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
    const refusal = this.#refusal(entry);
    if (refusal !== undefined) return this.#refuse(option, OptionReply.ERR_POLICY, refusal);
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
        (entry.readOnly || !device.readOnly) &&
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
      noZeroes: this.noZeroes,
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

function noExport(name: string): string {
  return name === '' ? 'there is no default export: name one' : `there is no export ${JSON.stringify(name)}`;
}

function unavailable(entry: ExportEntry): string {
  return `export ${JSON.stringify(entry.name)} is not available now`;
}
