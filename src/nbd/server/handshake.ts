/**
 * The server's side of the fixed newstyle handshake as a state machine: bytes in through `push`, bytes out through `send`,
 * no sockets and no clock. The result does not depend on how the bytes were cut up on their way.
 *
 * Invariants:
 * - Every option but EXPORT_NAME gets exactly one final reply, in the order of the options (option-answers.ts).
 * - What is held of a client's bytes is one incomplete unit, OPTION_BYTES_MAX at most.
 * - STARTTLS ends this handshake. Behind it another one begins, which knows nothing of this one but NO_ZEROES; what came in
 *   clear text behind STARTTLS is thrown away (CVE-2021-3716).
 * - COMPRESSION, once, ends it likewise; behind it STARTTLS is refused.
 * Source: NetworkBlockDevice/nbd, doc/proto.md, «Fixed newstyle negotiation» to «Option types».
 */
import { encodeGreeting } from '../codec/option-replies.js';
import {
  CLIENT_FLAGS_BYTES,
  OPTION_HEADER_BYTES,
  parseClientFlags,
  parseOptionHeader,
} from '../codec/options.js';
import {
  OPTION_BYTES_MAX,
  OPTION_SKIP_BYTES_MAX,
  OPTIONS_MAX,
  OPTIONS_PER_LISTED_NAME,
  Option,
} from '../constants.js';
import { type EndReason, end, type HandshakeParameters, type HandshakeResult } from './handshake-result.js';
import { OptionAnswers } from './option-answers.js';

export type { EndReason, HandshakeParameters, HandshakeResult } from './handshake-result.js';

type State =
  | { kind: 'client-flags' }
  | { kind: 'option-header' }
  | { kind: 'option-data'; option: number; length: number }
  /** Data too long to be kept is read past, then refused. */
  | { kind: 'option-skip'; option: number; left: number }
  | { kind: 'over'; result: HandshakeResult };

export class Handshake {
  readonly #answers: OptionAnswers;
  readonly #send: (bytes: Buffer) => void;
  /** It goes on behind TLS or compression. */
  readonly #goesOn: boolean;
  #state: State = { kind: 'client-flags' };
  /** The incomplete unit: its first `#held` bytes are there. */
  #unit = Buffer.alloc(0);
  #held = 0;
  #optionsSeen = 0;

  constructor(parameters: HandshakeParameters) {
    this.#answers = new OptionAnswers(parameters);
    this.#send = (bytes) => parameters.send(bytes);
    this.#goesOn = parameters.behindTls !== undefined || parameters.behindCompression !== undefined;
    if (this.#goesOn) this.#state = { kind: 'option-header' };
  }

  /** Sends the greeting, unless that was done before TLS or compression. Once, before the first `push`. */
  start(): void {
    if (!this.#goesOn) this.#send(encodeGreeting());
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
        this.#state = afterOption(this.#answers.answerSkipped(state.option));
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
      case 'option-data':
        return afterOption(this.#answers.answer(state.option, unit, rest));
    }
  }

  #clientFlags(unit: Buffer): State {
    const flags = parseClientFlags(unit);
    if (!flags.ok) return over('client-flags', flags.problem);
    // A client that does not claim FIXED_NEWSTYLE and yet sends its options is answered: it can only understand.
    this.#answers.noZeroes = flags.value.noZeroes;
    return { kind: 'option-header' };
  }

  #optionHeader(unit: Buffer): State {
    const header = parseOptionHeader(unit);
    if (!header.ok) return over('option-magic', header.problem);
    const { option, length } = header.value;
    this.#optionsSeen++;
    if (this.#optionsSeen > OPTIONS_MAX + OPTIONS_PER_LISTED_NAME * this.#answers.namesListed)
      return over('too-many-options', `${this.#optionsSeen} options and no export chosen`);
    if (length <= OPTION_BYTES_MAX) return { kind: 'option-data', option, length };
    if (option === Option.EXPORT_NAME)
      return over('export-name', `an export name of ${length} bytes is too long`);
    if (length > OPTION_SKIP_BYTES_MAX)
      return over('option-too-long', `option ${option} announces ${length} bytes of data`);
    return { kind: 'option-skip', option, left: length };
  }
}

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

function afterOption(result: HandshakeResult | undefined): State {
  return result === undefined ? { kind: 'option-header' } : { kind: 'over', result };
}

function over(reason: EndReason, detail: string): State {
  return { kind: 'over', result: end(reason, detail) };
}
