/** The client's side of the handshake, one step at a time and with any bytes. What it receives must fit the grammar. */
import { strict as assert } from 'node:assert';
import { isUtf8 } from 'node:buffer';
import {
  HandshakeFlag,
  Info,
  NBD_MAGIC,
  OPTION_MAGIC,
  OPTION_REPLY_MAGIC,
  Option,
  OptionReply,
  STRING_BYTES_MAX,
} from '../../../src/nbd/constants.js';
import { clientFlags, infoData, metaData, option } from '../../support/handshake.js';
import type { Wire } from './wire.js';

/** More replies to one option than any server here has reason to send. */
const REPLIES_MAX = 100_000;
const REPLY_BYTES_MAX = 1 << 20;

export interface OptionAnswer {
  type: number;
  data: Buffer;
}

/** All replies to one option; the last is the final one. */
export interface Answers {
  all: OptionAnswer[];
  /** The type of the final reply. */
  final: number;
}

export interface ExportFacts {
  size: bigint;
  flags: number;
  /** In bytes; null: the server did not say. */
  blocks: { minimum: number; preferred: number; payloadMax: number } | null;
}

export interface Context {
  id: number;
  name: string;
}

export class Haggle {
  private constructor(
    readonly wire: Wire,
    /** The server's handshake flags. */
    readonly offered: number,
  ) {}

  /** Reads the greeting; sends client flags only if told (default: what the server offers, of the two we know). */
  static async begin(wire: Wire, flags?: number | null): Promise<Haggle> {
    const greeting = await wire.receive(18, 'the greeting');
    assert.equal(greeting.readBigUInt64BE(0), NBD_MAGIC, 'the greeting begins with NBDMAGIC');
    assert.equal(greeting.readBigUInt64BE(8), OPTION_MAGIC, 'the greeting goes on with IHAVEOPT');
    const offered = greeting.readUInt16BE(16);
    const known = HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES;
    if (flags !== null) wire.send(clientFlags(flags ?? offered & known));
    return new Haggle(wire, offered);
  }

  /** Goes on with the options: greeting and flags were exchanged before. */
  static resumed(wire: Wire): Haggle {
    return new Haggle(wire, 0);
  }

  async ask(number: number, data?: Buffer): Promise<Answers> {
    this.wire.send(option(number, data));
    return this.answers(number);
  }

  /** Reads the replies to an option that was sent. */
  async answers(number: number): Promise<Answers> {
    const all: OptionAnswer[] = [];
    while (all.length < REPLIES_MAX) {
      const header = await this.wire.receive(20, `a reply to option ${number}`);
      assert.equal(header.readBigUInt64BE(0), OPTION_REPLY_MAGIC, 'an option reply begins with its magic');
      assert.equal(header.readUInt32BE(8), number, 'a reply repeats the option it answers');
      const type = header.readUInt32BE(12);
      const length = header.readUInt32BE(16);
      assert.ok(length <= REPLY_BYTES_MAX, `an option reply of ${length} bytes`);
      const data = await this.wire.receive(length, 'the data of an option reply');
      all.push({ type, data });
      if (type === OptionReply.ACK) assert.equal(length, 0, 'an ACK has no data');
      if (type === OptionReply.ACK || type >= 0x8000_0000) return { all, final: type };
    }
    throw new Error(`more than ${REPLIES_MAX} replies to one option`);
  }

  /** Asks and demands the ACK. */
  async agreed(number: number, data?: Buffer): Promise<OptionAnswer[]> {
    const { all, final } = await this.ask(number, data);
    assert.ok(final === OptionReply.ACK, `option ${number} is answered with ${nameOf(final)} instead of ACK`);
    return all.slice(0, -1);
  }

  /** Asks and demands one refusal of the given types (default: any), without anything before it. */
  async refused(number: number, data?: Buffer, ...types: number[]): Promise<OptionAnswer> {
    const { all, final } = await this.ask(number, data);
    assert.ok(final >= 0x8000_0000, `option ${number} is answered with ${nameOf(final)} instead of an error`);
    if (types.length > 0) assertType(final, types);
    return all.at(-1)!;
  }

  /** The handshake goes on: an option that no server knows is refused as such. */
  async goesOn(): Promise<void> {
    const { all, final } = await this.ask(UNKNOWN_OPTION);
    assert.equal(nameOf(final), 'ERR_UNSUP', 'the next option is understood');
    assert.equal(all.length, 1);
  }

  async describe(number: number, name: string, infos: number[] = []): Promise<ExportFacts> {
    return factsOf(await this.agreed(number, infoData(name, infos)));
  }

  async contexts(number: number, name: string, queries: string[]): Promise<Context[]> {
    return contextsOf(await this.agreed(number, metaData(name, queries)));
  }

  async structured(): Promise<void> {
    await this.agreed(Option.STRUCTURED_REPLY);
  }
}

/** Used by nobody: neither assigned by the protocol nor known to be taken by a server. */
export const UNKNOWN_OPTION = 0x6e6f6e65;

export function assertType(type: number, allowed: readonly number[]): void {
  const expected = allowed.map(nameOf).join(' or ');
  assert.ok(allowed.includes(type), `answered with ${nameOf(type)} instead of ${expected}`);
}

const NAMES = new Map<number, string>(Object.entries(OptionReply).map(([name, type]) => [type, name]));

export function nameOf(type: number): string {
  return NAMES.get(type) ?? `0x${type.toString(16)}`;
}

export function factsOf(replies: readonly OptionAnswer[]): ExportFacts {
  let facts: ExportFacts | null = null;
  let blocks: ExportFacts['blocks'] = null;
  for (const { data } of infosOf(replies)) {
    const kind = data.readUInt16BE(0);
    if (kind === Info.EXPORT) {
      assert.equal(data.length, 12, 'INFO_EXPORT has 12 bytes');
      facts = { size: data.readBigUInt64BE(2), flags: data.readUInt16BE(10), blocks: null };
    } else if (kind === Info.BLOCK_SIZE) {
      assert.equal(data.length, 14, 'INFO_BLOCK_SIZE has 14 bytes');
      const [minimum, preferred, payloadMax] = [2, 6, 10].map((at) => data.readUInt32BE(at)) as [
        number,
        number,
        number,
      ];
      blocks = { minimum, preferred, payloadMax };
    }
  }
  assert.ok(facts !== null, 'INFO_EXPORT comes before the ACK');
  return { ...facts, blocks };
}

/** The INFO replies, each with a type. */
export function infosOf(replies: readonly OptionAnswer[]): OptionAnswer[] {
  const infos = replies.filter(({ type }) => type < 0x8000_0000 && type !== OptionReply.ACK);
  for (const { type, data } of infos) {
    assert.equal(nameOf(type), 'INFO', 'before the ACK there are only INFO replies');
    assert.ok(data.length >= 2, 'an INFO reply has a type');
  }
  return infos;
}

/** The text of one kind of information, or null. */
export function infoText(replies: readonly OptionAnswer[], kind: number): string | null {
  const found = infosOf(replies).find(({ data }) => data.readUInt16BE(0) === kind);
  return found === undefined ? null : text(found.data.subarray(2));
}

export function contextsOf(replies: readonly OptionAnswer[]): Context[] {
  return replies.map(({ type, data }) => {
    assert.equal(nameOf(type), 'META_CONTEXT');
    assert.ok(data.length > 4, 'a META_CONTEXT has an id and a name');
    const name = text(data.subarray(4));
    assert.match(name, /^[^:]+:/, 'a context begins with its namespace');
    return { id: data.readUInt32BE(0), name };
  });
}

/** The names of a LIST. */
export function listedOf(replies: readonly OptionAnswer[]): string[] {
  return replies.map(({ type, data }) => {
    assert.equal(nameOf(type), 'SERVER');
    assert.ok(data.length >= 4, 'a SERVER reply has a name length');
    const length = data.readUInt32BE(0);
    assert.ok(length <= data.length - 4, 'the name ends within its reply');
    text(data.subarray(4 + length));
    return text(data.subarray(4, 4 + length));
  });
}

/** A string as the protocol allows it. */
export function text(bytes: Buffer): string {
  assert.ok(bytes.length <= STRING_BYTES_MAX, `a string of ${bytes.length} bytes`);
  assert.ok(isUtf8(bytes), 'strings are UTF-8');
  assert.ok(!bytes.includes(0), 'strings hold no NUL');
  return bytes.toString('utf8');
}
