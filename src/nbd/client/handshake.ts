/**
 * The client's handshake as a state machine: bytes of the server in, bytes for the server out, no sockets.
 *
 *     greeting -> flags -> EXTENDED_HEADERS -> SET_META_CONTEXT (if contexts are wanted) -> GO -> done
 *                             unknown: STRUCTURED_REPLY, then likewise           GO unknown: EXPORT_NAME -> done
 *     greeting -> flags -> LIST -> done                          a server of plain newstyle: EXPORT_NAME at once
 *     with compression: COMPRESSION is asked first of all (behind TLS); ACK: start-compression (`compressed` is called once frames are
 *     spoken) -> EXTENDED_HEADERS; any other answer: on without it
 *     with TLS: greeting -> flags -> STARTTLS -> start-tls (`secured` is called once TLS stands) -> EXTENDED_HEADERS or LIST
 *
 * One option is under way at a time, so every byte a server sends belongs to the question asked last. A server that
 * answers before it was asked, or answers something else, broke the protocol (BlockferryError 'protocol').
 */

import { BlockferryError } from '../../errors.js';
import {
  decodeExportBasics,
  decodeGreeting,
  decodeListedExport,
  decodeOptionReplyHeader,
  displayable,
  EXPORT_NAME_REPLY_BYTES,
  EXPORT_NAME_ZEROES_BYTES,
  encodeClientFlags,
  encodeExportName,
  encodeGo,
  encodeMetaContext,
  encodeOption,
  GREETING_BYTES,
  type ListedExport,
  OPTION_REPLY_HEADER_BYTES,
  protocolError,
} from '../codec/client.js';
import { type Compression, encodeCompressionRequest } from '../codec/frames.js';
import { HandshakeFlag, Info, Option, OptionReply, type ReplyForm } from '../constants.js';
import { ExportFacts, type ExportInfo } from './export-info.js';

export type HandshakeGoal =
  | {
      readonly kind: 'connect';
      readonly exportName: string;
      /** Metadata contexts that are wanted, e.g. `base:allocation`. */
      readonly contexts: readonly string[];
      /** Fail ('source-io') rather than do without structured replies. */
      readonly requireStructured: boolean;
      /** Ask for extended headers. Default: false. */
      readonly extended?: boolean;
      /** Ask for compression. Default: 'off'. */
      readonly compression?: Compression;
    }
  | { readonly kind: 'list' };

export type HandshakeOutcome =
  | { readonly kind: 'connect'; readonly info: ExportInfo }
  | { readonly kind: 'list'; readonly exports: ListedExport[] };

type State =
  | { readonly step: 'greeting' }
  | { readonly step: 'option'; readonly option: number }
  | { readonly step: 'export-name' }
  | { readonly step: 'start-tls' }
  | { readonly step: 'start-compression' }
  | { readonly step: 'done'; readonly outcome: HandshakeOutcome };

/** One message read: its length, and what to send in answer. */
interface Taken {
  readonly bytes: number;
  readonly reply: Buffer | null;
}

/** Most bytes the replies to one option may add up to: about 100,000 short names of a LIST. */
export const OPTION_REPLIES_BYTES_MAX = 16 << 20;

export class ClientHandshake {
  #state: State = { step: 'greeting' };
  /** Bytes received that do not make a whole message yet. */
  #pending: Buffer = Buffer.alloc(0);
  #fixedNewstyle = false;
  #noZeroes = false;
  #replyBytes = 0;
  #silent = false;
  /** The client flags were given out to be sent. */
  #spoke = false;

  // What the options brought.
  #form: ReplyForm = 'simple';
  readonly #exports: ListedExport[] = [];
  readonly #facts = new ExportFacts();

  /** `secure`: TLS or nothing. */
  constructor(
    readonly goal: HandshakeGoal,
    readonly secure = false,
  ) {}

  /** TLS begins now; `receive` waits for `secured`. */
  get startsTls(): boolean {
    return this.#state.step === 'start-tls';
  }

  /** Compression is not asked for after all. */
  plain = false;

  /** Frames begin now, in both directions; `receive` waits for `compressed`. */
  get startsCompression(): boolean {
    return this.#state.step === 'start-compression';
  }

  /** Frames are spoken. Gives back what to send first. */
  compressed(): Buffer {
    if (this.#state.step !== 'start-compression') throw protocolError('compression out of turn');
    return this.#askExtended();
  }

  /** TLS stands. Gives back what to send first. */
  secured(): Buffer {
    if (this.#state.step !== 'start-tls') throw protocolError('TLS out of turn');
    this.#silent = true;
    return this.#askFirst();
  }

  /** Set once the handshake is over. */
  get outcome(): HandshakeOutcome | null {
    return this.#state.step === 'done' ? this.#state.outcome : null;
  }

  /**
   * What to send before leaving early, so that the server need not guess; null where the protocol knows no such thing. A server that
   * is asked to GO may be in transmission already, where an option is garbage, and one that was sent no client flags yet takes it for
   * them.
   */
  get farewell(): Buffer | null {
    const { step } = this.#state;
    const going = this.#state.step === 'option' && this.#state.option === Option.GO;
    const starting = step === 'start-tls' || step === 'start-compression';
    const speaking = step !== 'export-name' && !starting && !going;
    return this.#fixedNewstyle && this.#spoke && speaking ? encodeOption(Option.ABORT) : null;
  }

  /** The server has not said a word since TLS began. */
  get refusesSilently(): boolean {
    return this.#silent;
  }

  /** Where it stands, for the message of a connection that ended or hung here. */
  get awaiting(): string {
    if (this.#state.step === 'greeting') return 'its greeting';
    if (this.#state.step === 'start-tls') return 'TLS';
    if (this.#state.step === 'start-compression') return 'compression';
    if (this.#state.step === 'option') return `its answer to ${optionName(this.#state.option)}`;
    return 'its answer to EXPORT_NAME (perhaps it has no such export)';
  }

  /**
   * Takes what the server sent (the bytes are not kept) and gives back what to send, or null. Throws BlockferryError:
   * 'protocol', 'not-found' (no such export), 'source-unreachable' (it wants TLS or shuts down), 'source-io' (it refused), 'tls' (it
   * has none).
   */
  receive(bytes: Buffer): Buffer | null {
    this.#silent = false;
    const input = this.#pending.length === 0 ? bytes : Buffer.concat([this.#pending, bytes]);
    let at = 0;
    let reply: Buffer | null = null;
    for (;;) {
      const taken: Taken | null = reply === null ? this.#step(input, at) : null;
      if (taken === null) break;
      at += taken.bytes;
      reply = taken.reply;
      if (this.#state.step === 'done' || this.#state.step === 'start-tls') break;
    }
    const { step } = this.#state;
    if (
      (reply !== null || step === 'done' || step === 'start-tls' || step === 'start-compression') &&
      at < input.length
    ) {
      throw protocolError('it sent more than it was asked for');
    }
    this.#pending = Buffer.from(input.subarray(at));
    if (reply !== null) this.#spoke = true;
    return reply;
  }

  /** One message from `at` on; null when it is not complete yet. */
  #step(input: Buffer, at: number): Taken | null {
    const available = input.length - at;
    switch (this.#state.step) {
      case 'greeting':
        if (available < GREETING_BYTES) return null;
        return { bytes: GREETING_BYTES, reply: this.#greeted(input.subarray(at, at + GREETING_BYTES)) };
      case 'option': {
        const header = decodeOptionReplyHeader(input, at);
        if (header === null) return null;
        if (header.option !== this.#state.option) {
          throw protocolError(
            `it answered ${optionName(header.option)} instead of ${optionName(this.#state.option)}`,
          );
        }
        const bytes = OPTION_REPLY_HEADER_BYTES + header.length;
        if (available < bytes) return null;
        this.#replyBytes += bytes;
        if (this.#replyBytes > OPTION_REPLIES_BYTES_MAX) {
          throw protocolError(`its answer to ${optionName(header.option)} does not end`);
        }
        const payload = input.subarray(at + OPTION_REPLY_HEADER_BYTES, at + bytes);
        return { bytes, reply: this.#answered(header.option, header.type, payload) };
      }
      case 'export-name': {
        const bytes = EXPORT_NAME_REPLY_BYTES + (this.#noZeroes ? 0 : EXPORT_NAME_ZEROES_BYTES);
        if (available < bytes) return null;
        this.#facts.basics = decodeExportBasics(input, at);
        this.#finish();
        return { bytes, reply: null };
      }
      case 'start-tls':
      case 'start-compression':
      case 'done':
        return null;
    }
  }

  #greeted(greeting: Buffer): Buffer {
    const { fixedNewstyle, noZeroes } = decodeGreeting(greeting);
    this.#fixedNewstyle = fixedNewstyle;
    this.#noZeroes = noZeroes;
    const flags = encodeClientFlags(
      (fixedNewstyle ? HandshakeFlag.FIXED_NEWSTYLE : 0) | (noZeroes ? HandshakeFlag.NO_ZEROES : 0),
    );
    if (!this.secure) return Buffer.concat([flags, this.#askFirst()]);
    if (!fixedNewstyle) throw new BlockferryError('tls', 'the server is too old for TLS');
    return Buffer.concat([flags, this.#ask(Option.STARTTLS, encodeOption(Option.STARTTLS))]);
  }

  #askFirst(): Buffer {
    if (this.goal.kind === 'list') {
      if (!this.#fixedNewstyle)
        throw new BlockferryError('source-io', 'the server is too old to list its exports');
      return this.#ask(Option.LIST, encodeOption(Option.LIST));
    }
    if (!this.#fixedNewstyle) return this.#askExportName();
    const { compression = 'off' } = this.goal;
    if (compression === 'off' || this.plain) return this.#askExtended();
    const data = encodeCompressionRequest(compression);
    return this.#ask(Option.COMPRESSION, encodeOption(Option.COMPRESSION, data));
  }

  #askExtended(): Buffer {
    return this.goal.kind === 'connect' && this.goal.extended === true
      ? this.#ask(Option.EXTENDED_HEADERS, encodeOption(Option.EXTENDED_HEADERS))
      : this.#askStructured();
  }

  #askStructured(): Buffer {
    return this.#ask(Option.STRUCTURED_REPLY, encodeOption(Option.STRUCTURED_REPLY));
  }

  /** One option reply. Gives back the next question, null while more of the answer is to come. */
  #answered(option: number, type: number, payload: Buffer): Buffer | null {
    if (type >= 0x80000000) return this.#refused(option, type, payload);
    switch (type) {
      case OptionReply.ACK:
        if (payload.length !== 0) throw protocolError('an ACK with data');
        return this.#acknowledged(option);
      case OptionReply.SERVER:
        if (option !== Option.LIST) break;
        this.#exports.push(decodeListedExport(payload));
        return null;
      case OptionReply.META_CONTEXT:
        if (option !== Option.SET_META_CONTEXT || this.goal.kind !== 'connect') break;
        this.#facts.addContext(payload, this.goal.contexts);
        return null;
      case OptionReply.INFO:
        if (option !== Option.GO) break;
        this.#facts.addInfo(payload);
        return null;
    }
    throw protocolError(`a reply of type ${type} to ${optionName(option)}`);
  }

  #acknowledged(option: number): Buffer | null {
    switch (option) {
      case Option.STARTTLS:
        this.#state = { step: 'start-tls' };
        this.#silent = true;
        return null;
      case Option.COMPRESSION:
        this.#state = { step: 'start-compression' };
        return null;
      case Option.EXTENDED_HEADERS:
        this.#form = 'extended';
        return this.#askContexts();
      case Option.STRUCTURED_REPLY:
        this.#form = 'structured';
        return this.#askContexts();
      case Option.SET_META_CONTEXT:
        return this.#askGo();
      default:
        this.#finish();
        return null;
    }
  }

  #refused(option: number, type: number, payload: Buffer): Buffer | null {
    const message = displayable(payload.toString());
    const said = message === '' ? '' : `: '${message}'`;
    if (type === OptionReply.ERR_TLS_REQD) {
      throw new BlockferryError(
        'source-unreachable',
        `the server demands TLS: use nbds or nbds+unix in its URI${said}`,
      );
    }
    if (type === OptionReply.ERR_SHUTDOWN) {
      throw new BlockferryError('source-unreachable', `the server is shutting down${said}`);
    }
    switch (option) {
      case Option.STARTTLS:
        // Never on without it: who asks for nbds wants no clear text.
        throw new BlockferryError(
          'tls',
          `the server offers no TLS (${refusal(type)}): turn it on there, or use nbd instead of nbds${said}`,
        );
      case Option.COMPRESSION:
        return this.#askExtended();
      case Option.EXTENDED_HEADERS:
        return this.#askStructured();
      case Option.STRUCTURED_REPLY:
        return this.#askContexts();
      case Option.SET_META_CONTEXT:
        this.#facts.forgetContexts();
        return this.#askGo();
      case Option.GO:
        if (type !== OptionReply.ERR_UNSUP) break;
        if (this.#form === 'extended')
          throw protocolError('it agreed on extended headers, and does not know GO');
        return this.#askExportName();
    }
    if (type === OptionReply.ERR_UNKNOWN && this.goal.kind === 'connect') {
      const name = displayable(this.goal.exportName);
      throw new BlockferryError('not-found', `the server has no export '${name}'${said}`);
    }
    throw new BlockferryError(
      'source-io',
      `the server refused ${optionName(option)} (${refusal(type)})${said}`,
    );
  }

  #askContexts(): Buffer {
    if (this.goal.kind !== 'connect') throw protocolError('an answer out of turn');
    const simple = this.#form === 'simple';
    if (simple && this.goal.requireStructured) throw withoutStructured();
    if (simple || this.goal.contexts.length === 0) return this.#askGo();
    const { exportName, contexts } = this.goal;
    return this.#ask(
      Option.SET_META_CONTEXT,
      encodeMetaContext(Option.SET_META_CONTEXT, exportName, contexts),
    );
  }

  #askGo(): Buffer {
    const wanted = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE];
    return this.#ask(Option.GO, encodeGo(Option.GO, this.#exportName(), wanted));
  }

  #askExportName(): Buffer {
    if (this.#form === 'simple' && this.goal.kind === 'connect' && this.goal.requireStructured)
      throw withoutStructured();
    this.#state = { step: 'export-name' };
    return encodeExportName(this.#exportName());
  }

  #ask(option: number, bytes: Buffer): Buffer {
    this.#state = { step: 'option', option };
    this.#replyBytes = 0;
    return bytes;
  }

  #exportName(): string {
    return this.goal.kind === 'connect' ? this.goal.exportName : '';
  }

  #finish(): void {
    if (this.goal.kind === 'list') {
      this.#state = { step: 'done', outcome: { kind: 'list', exports: this.#exports } };
      return;
    }
    const info = this.#facts.info(this.goal.exportName, this.#form);
    this.#state = { step: 'done', outcome: { kind: 'connect', info } };
  }
}

function withoutStructured(): BlockferryError {
  return new BlockferryError(
    'source-io',
    'the server does not offer structured replies, which are required here',
  );
}

function optionName(option: number): string {
  return nameOf(Option, option) ?? `option ${option}`;
}

function refusal(type: number): string {
  return nameOf(OptionReply, type) ?? `error 0x${type.toString(16)}`;
}

function nameOf(numbers: Readonly<Record<string, number>>, wanted: number): string | undefined {
  return Object.keys(numbers).find((name) => numbers[name] === wanted);
}
