/** What a case is, and what it has to work with: connections to the server under test that end with it. */
import { strict as assert } from 'node:assert';
import { execFile } from 'node:child_process';
import { existsSync } from 'node:fs';
import { promisify } from 'node:util';
import { Command, Info, Option, TransmissionFlag } from '../../../src/nbd/constants.js';
import { infoData, metaData } from '../../support/handshake.js';
import { contextsOf, factsOf, Haggle } from './haggle.js';
import { type Target, UNKNOWN_NAME } from './target.js';
import { Transmission } from './transmission.js';
import { Wire } from './wire.js';

export const BASE_ALLOCATION = 'base:allocation';
const PYTHON = '/usr/bin/python3';
const PYTHON_TIMEOUT_MS = 20_000;

/** M: the protocol says MUST; S: SHOULD, or it is what a robust server does. */
export type Level = 'M' | 'S';

export interface Case {
  /** C1 to C6: a part of the protocol; docs/protocol.md says which sections. */
  clause: string;
  level: Level;
  /** What is checked; unique. */
  name: string;
  /** Throws when the server fails. A text it resolves with is what the server chose where it is free to. */
  run(lab: Lab): Promise<unknown>;
}

const make =
  (level: Level) =>
  (clause: string, name: string, run: Case['run']): Case => ({ clause, level, name, run });
export const must = make('M');
export const should = make('S');

/** The server does not offer what the case is about. */
export class NotOffered extends Error {}

export interface GoOptions {
  structured?: boolean;
  extended?: boolean;
  contexts?: string[];
  infos?: number[];
  /** The target's read-only export. */
  readOnly?: boolean;
}

export class Lab {
  readonly #wires: Wire[] = [];

  constructor(readonly target: Target) {}

  get name(): string {
    return this.target.exportName;
  }

  needs(condition: boolean, what: string): void {
    if (!condition) throw new NotOffered(what);
  }

  needsSize(bytes: number): void {
    this.needs(this.target.facts.size >= BigInt(bytes), `an export of ${bytes} bytes`);
  }

  needsFlag(flag: keyof typeof TransmissionFlag): void {
    this.needs((this.target.facts.flags & TransmissionFlag[flag]) !== 0, flag);
  }

  needsWritable(): void {
    this.needs((this.target.facts.flags & TransmissionFlag.READ_ONLY) === 0, 'a writable export');
  }

  needsStructured(): void {
    this.needs(this.target.structured, 'structured replies');
  }

  /** A name of no export, `length` characters long. */
  unknownName(length = UNKNOWN_NAME.length): string {
    this.needs(this.target.refusesNames, 'a server that knows its exports by name');
    return UNKNOWN_NAME.padEnd(length, 'e');
  }

  needsContexts(): void {
    this.needs(this.target.contexts.includes(BASE_ALLOCATION), BASE_ALLOCATION);
  }

  needsExtended(): void {
    this.needs(this.target.extended, 'extended headers');
  }

  /** A connection; the greeting is not read yet. */
  async connect(readOnly = false): Promise<Wire> {
    const { address, readOnlyAddress } = this.target;
    return this.keep(await Wire.connect(readOnly ? readOnlyAddress! : address));
  }

  keep(wire: Wire): Wire {
    this.#wires.push(wire);
    return wire;
  }

  async haggle(flags?: number | null): Promise<Haggle> {
    return Haggle.begin(await this.connect(), flags);
  }

  /** A connection in transmission, by GO. Structured replies are agreed on if the server has them and nothing else is said. */
  async go(options: GoOptions = {}): Promise<Transmission> {
    const { target } = this;
    const readOnly = options.readOnly ?? false;
    if (readOnly) this.needs(target.readOnlyAddress !== null, 'a read-only export');
    const extended = options.extended ?? false;
    const structured = extended || (options.structured ?? target.structured);
    const name = readOnly ? target.readOnlyName : target.exportName;
    const haggle = await Haggle.begin(await this.connect(readOnly));
    if (extended) await haggle.agreed(Option.EXTENDED_HEADERS);
    else if (structured) await haggle.structured();
    const contexts =
      options.contexts === undefined
        ? []
        : contextsOf(await haggle.agreed(Option.SET_META_CONTEXT, metaData(name, options.contexts)));
    const infos = options.infos ?? [Info.BLOCK_SIZE];
    const facts = factsOf(await haggle.agreed(Option.GO, infoData(name, infos)));
    return new Transmission(haggle.wire, facts, { structured, extended, contexts });
  }

  /** The server still takes clients and serves them, in time. */
  async alive(): Promise<void> {
    const transmission = await this.go();
    await transmission.goesOn();
    transmission.wire.close();
  }

  /**
   * Runs a script of libnbd's Python, strict mode off, with the handle `h` and the URI `uri`; what it prints is JSON. `errno_of(f, ...)`
   * calls f and gives the name of its error or 'OK'. Connected beforehand unless the script does that itself.
   */
  async python(script: string, connect = true): Promise<unknown> {
    this.needs(existsSync(PYTHON), PYTHON);
    const prelude = `
import json, sys, errno
try:
    import nbd
except ImportError:
    print('null'); sys.exit(0)
uri = sys.argv[1]
def errno_of(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
        return 'OK'
    except nbd.Error as e:
        return errno.errorcode.get(e.errnum, str(e.errnum)) if e.errnum else str(e)
def handle():
    h = nbd.NBD()
    h.set_strict_mode(0)
    return h
h = handle()
${connect ? 'h.connect_uri(uri)' : ''}
`;
    const words = ['-c', prelude + script, this.target.uri];
    const limits = { timeout: PYTHON_TIMEOUT_MS, killSignal: 'SIGKILL' } as const;
    const { stdout } = await promisify(execFile)(PYTHON, words, limits).catch(
      (error: { stderr?: string }) => {
        throw new Error(error.stderr?.trim().split('\n').at(-1) || 'the script did not end in time');
      },
    );
    const result: unknown = JSON.parse(stdout);
    this.needs(result !== null, "libnbd's Python module");
    return result;
  }

  close(): void {
    for (const wire of this.#wires) wire.close();
  }
}

/** Bytes that differ from place to place and from seed to seed. */
export function pattern(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length);
  let state = (seed * 2654435761 + 1) >>> 0;
  for (let at = 0; at < length; at++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bytes[at] = state >>> 24;
  }
  return bytes;
}

export function assertBytes(actual: Buffer, expected: Buffer, what: string): void {
  assert.equal(actual.length, expected.length, `${what}: its length`);
  if (actual.equals(expected)) return;
  const at = actual.findIndex((byte, index) => byte !== expected[index]);
  assert.fail(`${what}: byte ${at} is ${actual[at]}, not ${expected[at]}`);
}

export const reading = (offset: number | bigint, length: number, flags = 0) => ({
  command: Command.READ,
  offset,
  length,
  flags,
});
