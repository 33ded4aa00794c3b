// Whatever a client sends, in whatever pieces: the handshake never throws, its result does not depend on the pieces, and what
// it sends is always the greeting followed by well-formed replies, one final reply an option.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import fc from 'fast-check';
import { Info, Option, OptionReply, STRING_BYTES_MAX } from '../../src/nbd/constants.js';
import type { ExportEntry } from '../../src/nbd/server/exports.js';
import type { HandshakeResult } from '../../src/nbd/server/handshake.js';
import {
  Conversation,
  clientFlags,
  directory,
  entry,
  GREETING_BYTES,
  infoData,
  metaData,
  option,
  readGreeting,
  readReplies,
  type TestEntry,
} from '../support/handshake.js';

const RUNS = 2000;

const name = fc.oneof(
  { weight: 8, arbitrary: fc.constantFrom('disk', 'other') },
  { weight: 2, arbitrary: fc.constantFrom('', 'nope', 'x'.repeat(STRING_BYTES_MAX + 1)) },
  { weight: 1, arbitrary: fc.string({ unit: 'grapheme', maxLength: 20 }) },
);
const query = fc.oneof(
  fc.constantFrom('base:', 'base:allocation', 'qemu:', 'qemu:allocation-depth', 'x:y', 'colonless', ''),
  fc.string({ maxLength: 30 }),
);
const optionNumber = fc.oneof(
  fc.constantFrom(...Object.values(Option)),
  fc.integer({ min: 0, max: 0xffff_ffff }),
);
const anyBytes = fc.uint8Array({ maxLength: 100 }).map((bytes) => Buffer.from(bytes));
const wellFormed = fc.oneof(
  fc.constantFrom(Option.LIST, Option.STRUCTURED_REPLY, Option.STARTTLS).map((number) => option(number)),
  fc
    .tuple(
      fc.constantFrom(Option.INFO, Option.INFO, Option.GO),
      name,
      fc.array(fc.integer({ min: 0, max: 6 }), { maxLength: 6 }),
    )
    .map(([number, text, infos]) => option(number, infoData(text, infos))),
  fc
    .tuple(
      fc.constantFrom(Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT),
      name,
      fc.array(query, { maxLength: 5 }),
    )
    .map(([number, text, queries]) => option(number, metaData(text, queries))),
);
const ending = fc.oneof(
  name.map((text) => option(Option.EXPORT_NAME, Buffer.from(text))),
  fc.constant(option(Option.ABORT)),
  name.map((text) => option(Option.GO, infoData(text, [Info.BLOCK_SIZE]))),
);
const anyOption = fc.oneof(
  { weight: 6, arbitrary: wellFormed },
  { weight: 2, arbitrary: fc.tuple(optionNumber, anyBytes).map(([number, data]) => option(number, data)) },
  { weight: 1, arbitrary: ending },
  { weight: 1, arbitrary: optionNumber.map((number) => option(number, Buffer.alloc(70_000, 'x'))) },
);
const flags = fc.constantFrom(0, 1, 2, 3, 3, 3, 3, 3, 4, 0xffff_ffff);
/** Nine of ten begin with what makes contexts possible. */
const opening = fc.constantFrom(
  ...Array<Buffer>(9).fill(
    Buffer.concat([
      option(Option.STRUCTURED_REPLY),
      option(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation'])),
    ]),
  ),
  Buffer.alloc(0),
);
const options = fc
  .tuple(opening, fc.array(anyOption, { maxLength: 12 }), anyBytes)
  .map(([first, others, tail]) => Buffer.concat([first, ...others, tail]));

interface Mutation {
  kind: 'flip' | 'insert' | 'remove' | 'cut';
  at: number;
  bytes: Uint8Array;
}
const mutation: fc.Arbitrary<Mutation> = fc.record({
  kind: fc.constantFrom('flip', 'insert', 'remove', 'cut'),
  at: fc.integer({ min: 0, max: 1000 }).map((thousandths) => thousandths / 1000),
  bytes: fc.uint8Array({ minLength: 1, maxLength: 8 }),
});

function mutate(stream: Buffer, { kind, at, bytes }: Mutation): Buffer {
  const index = Math.floor(at * stream.length);
  const before = stream.subarray(0, index);
  switch (kind) {
    case 'flip':
      return Buffer.concat([before, bytes, stream.subarray(index + bytes.length)]);
    case 'insert':
      return Buffer.concat([before, bytes, stream.subarray(index)]);
    case 'remove':
      return Buffer.concat([before, stream.subarray(index + bytes.length)]);
    case 'cut':
      return before;
  }
}

const mutations = fc.oneof(fc.constant([]), fc.array(mutation, { maxLength: 4 }));
const mutated = fc
  .tuple(flags, options, mutations)
  .map(([bits, stream, changes]) => Buffer.concat([clientFlags(bits), changes.reduce(mutate, stream)]));
const pieceLengths = fc.array(fc.oneof(fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 5000 })), {
  minLength: 1,
  maxLength: 50,
});

interface Outcome {
  sent: Buffer;
  result: HandshakeResult | undefined;
  /** What is left for the transmission phase. */
  rest: Buffer;
  entries: TestEntry[];
}

/** Feeds a stream in pieces of the given lengths, over and over. */
function run(stream: Buffer, lengths: readonly number[], changes: Partial<ExportEntry> = {}): Outcome {
  const entries = [entry('disk', { description: 'a disk', ...changes }), entry('other')];
  const conversation = new Conversation(directory(...entries));
  let result: HandshakeResult | undefined;
  let at = 0;
  for (let piece = 0; at < stream.length && result === undefined; piece++) {
    const length = lengths[piece % lengths.length]!;
    result = conversation.push(stream.subarray(at, at + length));
    at = Math.min(stream.length, at + length);
  }
  const early = result?.kind === 'transmission' ? result.rest : Buffer.alloc(0);
  return { sent: conversation.sent(), result, rest: Buffer.concat([early, stream.subarray(at)]), entries };
}

function summaryOf({ sent, result, rest }: Outcome): unknown {
  if (result?.kind !== 'transmission') return { sent, result };
  const { entry: chosen, structured, contexts, noZeroes } = result;
  return { sent, rest, export: chosen.name, structured, contexts, noZeroes };
}

/** The grammar of everything a server sends in the handshake. */
function assertGrammar({ sent, result }: Outcome): void {
  assert.equal(readGreeting(sent), 3);
  let replies = sent.subarray(GREETING_BYTES);
  if (result?.kind === 'transmission') {
    const nameless = result.noZeroes ? 10 : 134;
    // An answer to EXPORT_NAME has no header and comes last; an ACK to GO has nothing behind it.
    if (!endsWithAckOfGo(replies)) {
      const answer = replies.subarray(replies.length - nameless);
      assert.equal(answer.length, nameless);
      assert.equal(answer.readBigUInt64BE(0), BigInt(result.device.size));
      replies = replies.subarray(0, replies.length - nameless);
    }
  }
  let open: number | undefined;
  for (const reply of readReplies(replies)) {
    if (open !== undefined)
      assert.equal(reply.option, open, 'an option is answered to its end before the next');
    const isError = reply.type >= 0x8000_0000;
    const isFinal = isError || reply.type === OptionReply.ACK;
    if (isError) assert.ok(reply.data.length <= 256);
    if (reply.type === OptionReply.ACK) assert.equal(reply.data.length, 0);
    if (reply.type === OptionReply.SERVER) assert.ok(reply.data.readUInt32BE(0) <= reply.data.length - 4);
    if (reply.type === OptionReply.INFO) assertInfo(reply.data);
    open = isFinal ? undefined : reply.option;
  }
  assert.equal(open, undefined, 'every option has its final reply');
}

function assertInfo(data: Buffer): void {
  const lengths: Record<number, number> = { [Info.EXPORT]: 12, [Info.BLOCK_SIZE]: 14 };
  const expected = lengths[data.readUInt16BE(0)];
  if (expected !== undefined) assert.equal(data.length, expected);
}

function endsWithAckOfGo(replies: Buffer): boolean {
  if (replies.length < 20) return false;
  const last = replies.subarray(replies.length - 20);
  return last.equals(Buffer.from('0003e889045565a9000000070000000100000000', 'hex'));
}

describe('any byte stream', () => {
  test('garbage never throws and is answered by the grammar', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), pieceLengths, (bytes, lengths) => {
        assertGrammar(run(Buffer.from(bytes), lengths));
      }),
      { numRuns: RUNS },
    );
  });

  test('mutated conversations never throw and are answered by the grammar', () => {
    fc.assert(
      fc.property(mutated, pieceLengths, (stream, lengths) => {
        assertGrammar(run(stream, lengths));
      }),
      { numRuns: RUNS },
    );
  });

  test('the result does not depend on how the bytes were cut up', () => {
    fc.assert(
      fc.property(mutated, pieceLengths, (stream, lengths) => {
        const whole = run(stream, [Number.MAX_SAFE_INTEGER]);
        assert.deepEqual(summaryOf(run(stream, lengths)), summaryOf(whole));
      }),
      { numRuns: RUNS },
    );
  });

  test('a conversation cut short at any byte is waited for, and then ends as if it had come in one piece', () => {
    const stream = Buffer.concat([
      clientFlags(),
      option(Option.STRUCTURED_REPLY),
      option(Option.LIST),
      option(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation'])),
      option(Option.GO, infoData('disk', [Info.NAME, Info.BLOCK_SIZE])),
    ]);
    const whole = summaryOf(run(stream, [stream.length]));
    for (let cut = 1; cut < stream.length; cut++) {
      assert.equal(run(stream.subarray(0, cut), [cut]).result, undefined);
      assert.deepEqual(summaryOf(run(stream, [cut, stream.length])), whole);
    }
    assert.deepEqual(summaryOf(run(stream, [1])), whole);
  });

  test('a device is open exactly when the result is transmission, and an export that fails to open harms nobody', () => {
    const refuse = (): never => {
      throw new Error('not today');
    };
    fc.assert(
      fc.property(mutated, fc.boolean(), (stream, fails) => {
        const outcome = run(stream, [4096], fails ? { open: refuse } : {});
        assertGrammar(outcome);
        const opened = outcome.entries.flatMap(({ opened: devices }) => devices);
        assert.deepEqual(opened, outcome.result?.kind === 'transmission' ? [outcome.result.device] : []);
      }),
      { numRuns: RUNS },
    );
  });
});
