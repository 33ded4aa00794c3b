// Extended headers in the server's handshake. Source of each clause: doc/proto.md, branch extension-ext-header.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { Info, OPTION_BYTES_MAX, Option, OptionReply, TransmissionFlag } from '../../../src/nbd/constants.js';
import type { HandshakeResult } from '../../../src/nbd/server/handshake.js';
import {
  Conversation,
  directory,
  entry,
  infoData,
  metaData,
  option,
  type Reply,
} from '../../support/handshake.js';

const { ACK, INFO, ERR_INVALID, ERR_TOO_BIG, ERR_EXT_HEADER_REQD } = OptionReply;
const { EXTENDED_HEADERS, STRUCTURED_REPLY, SET_META_CONTEXT, GO } = Option;

const types = (replies: Reply[]) => replies.map(({ type }) => type);

function agreed(...before: number[]): Conversation {
  const conversation = Conversation.begun(directory(entry('disk'), entry('other')));
  for (const number of [...before, EXTENDED_HEADERS])
    assert.deepEqual(types(conversation.ask(number)), [ACK]);
  return conversation;
}

type Transmission = Extract<HandshakeResult, { kind: 'transmission' }>;

function gone(conversation: Conversation, name = 'disk'): Transmission {
  const result = conversation.push(option(GO, infoData(name)));
  assert.ok(result?.kind === 'transmission');
  return result;
}

function flagsOf(replies: Reply[]): number {
  const basics = replies.find(({ type, data }) => type === INFO && data.readUInt16BE(0) === Info.EXPORT);
  return basics!.data.readUInt16BE(10);
}

describe('EXTENDED_HEADERS', () => {
  test('is acknowledged, and brings structured replies with it', () => {
    const { extended, structured } = gone(agreed());
    assert.deepEqual([extended, structured], [true, true]);
  });

  test('may follow STRUCTURED_REPLY', () => {
    assert.equal(gone(agreed(STRUCTURED_REPLY)).extended, true);
  });

  test('without it nothing is extended', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    conversation.ask(STRUCTURED_REPLY);
    assert.equal(gone(conversation).extended, false);
  });

  for (const [bytes, type] of [
    [1, ERR_INVALID],
    [OPTION_BYTES_MAX + 1, ERR_TOO_BIG],
  ] as const)
    test(`${bytes} bytes of data are refused and agree on nothing`, () => {
      const conversation = Conversation.begun(directory(entry('disk')));
      assert.deepEqual(types(conversation.ask(EXTENDED_HEADERS, Buffer.alloc(bytes))), [type]);
      const { extended, structured } = gone(conversation);
      assert.deepEqual([extended, structured], [false, false]);
    });

  test('a second time is ERR_INVALID and takes nothing back', () => {
    const conversation = agreed();
    assert.deepEqual(types(conversation.ask(EXTENDED_HEADERS)), [ERR_INVALID]);
    assert.equal(gone(conversation).extended, true);
  });

  for (const before of [[], [STRUCTURED_REPLY]])
    test(`STRUCTURED_REPLY afterwards is ERR_EXT_HEADER_REQD (${before.length} before)`, () => {
      const conversation = agreed(...before);
      assert.deepEqual(types(conversation.ask(STRUCTURED_REPLY)), [ERR_EXT_HEADER_REQD]);
      assert.equal(gone(conversation).extended, true);
    });

  test('EXPORT_NAME afterwards ends the connection', () => {
    const conversation = agreed();
    const result = conversation.push(option(Option.EXPORT_NAME, Buffer.from('disk')));
    assert.ok(result?.kind === 'end' && result.reason === 'export-name');
    assert.equal(conversation.sent().length, 0);
  });

  test('is forgotten behind STARTTLS', () => {
    const exports = directory(entry('disk'));
    const clear = Conversation.begun(exports, undefined, 'allowed');
    clear.ask(EXTENDED_HEADERS);
    assert.equal(clear.push(option(Option.STARTTLS))?.kind, 'starttls');
    const secure = new Conversation(exports, { tls: 'allowed', behindTls: { noZeroes: true } });
    assert.equal(gone(secure).extended, false);
  });

  test('is out of reach where TLS is required', () => {
    const conversation = Conversation.begun(directory(entry('disk')), undefined, 'required');
    assert.deepEqual(types(conversation.ask(EXTENDED_HEADERS)), [OptionReply.ERR_TLS_REQD]);
  });

  test('contexts can be selected with it alone, and stay selected', () => {
    for (const order of [
      [EXTENDED_HEADERS, SET_META_CONTEXT],
      [STRUCTURED_REPLY, SET_META_CONTEXT, EXTENDED_HEADERS],
    ]) {
      const conversation = Conversation.begun(directory(entry('disk')));
      for (const number of order) {
        const data = number === SET_META_CONTEXT ? metaData('disk', ['base:allocation']) : undefined;
        assert.equal(types(conversation.ask(number, data)).at(-1), ACK);
      }
      assert.deepEqual(
        gone(conversation).contexts.map(({ name }) => name),
        ['base:allocation'],
      );
    }
  });
});

describe('transmission flags', () => {
  const FILTERS = TransmissionFlag.BLOCK_STATUS_PAYLOAD;

  test('BLOCK_STATUS_PAYLOAD with extended headers and selected contexts, not without either', () => {
    for (const [number, queries, offered] of [
      [EXTENDED_HEADERS, ['base:allocation'], true],
      [EXTENDED_HEADERS, [], false],
      [STRUCTURED_REPLY, ['base:allocation'], false],
    ] as const) {
      const conversation = Conversation.begun(directory(entry('disk'), entry('other')));
      conversation.ask(number);
      conversation.ask(SET_META_CONTEXT, metaData('disk', [...queries]));
      const flags = flagsOf(conversation.ask(Option.INFO, infoData('disk')));
      assert.equal((flags & FILTERS) !== 0, offered);
      assert.equal(flagsOf(conversation.ask(Option.INFO, infoData('other'))) & FILTERS, 0, 'another export');
      assert.equal(flagsOf(conversation.ask(GO, infoData('disk'))), flags, 'INFO and GO say the same');
    }
  });

  test('FAST_ZERO where the device heeds it, never without WRITE_ZEROES', () => {
    for (const [changes, offered] of [
      [{}, false],
      [{ fastZero: false }, false],
      [{ fastZero: true }, true],
      [{ fastZero: true, readOnly: true }, false],
    ] as const) {
      const conversation = Conversation.begun(directory(entry('disk', changes)));
      const flags = flagsOf(conversation.ask(Option.INFO, infoData('disk')));
      assert.equal((flags & TransmissionFlag.SEND_FAST_ZERO) !== 0, offered, JSON.stringify(changes));
    }
  });

  test('an export that promises FAST_ZERO is not opened if its device knows nothing of it', () => {
    const promising = entry('disk', { fastZero: true });
    const conversation = Conversation.begun(directory(promising));
    assert.deepEqual(types(conversation.ask(GO, infoData('disk'))), [OptionReply.ERR_UNKNOWN]);
    assert.equal(promising.opened[0]!.released, 1);
  });
});
