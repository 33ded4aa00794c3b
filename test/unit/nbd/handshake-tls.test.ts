/** STARTTLS in the server's handshake. Clauses: NetworkBlockDevice/nbd, doc/proto.md, «TLS support» and NBD_OPT_STARTTLS. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import { Info, OPTION_BYTES_MAX, Option, OptionReply } from '../../../src/nbd/constants.js';
import type { TlsMode } from '../../../src/nbd/tls.js';
import {
  Conversation,
  counted,
  directory,
  entry,
  infoData,
  metaData,
  option,
  readReplies,
} from '../../support/handshake.js';

const { ACK, ERR_INVALID, ERR_TLS_REQD, ERR_UNSUP, ERR_UNKNOWN, SERVER } = OptionReply;
const {
  STARTTLS,
  LIST,
  INFO,
  GO,
  STRUCTURED_REPLY,
  LIST_META_CONTEXT,
  SET_META_CONTEXT,
  ABORT,
  EXPORT_NAME,
} = Option;

const disk = () => entry('disk');
const begun = (tls?: TlsMode, exports = directory(disk())) => Conversation.begun(exports, undefined, tls);
const types = (replies: { type: number }[]) => replies.map(({ type }) => type);
/** The handshake behind TLS. */
function secure(tls: TlsMode, exports = directory(disk()), noZeroes = true): Conversation {
  const conversation = new Conversation(exports, { tls, behindTls: { noZeroes } });
  assert.equal(conversation.sent().length, 0, 'no second greeting');
  return conversation;
}

const EVERY_OTHER: [name: string, number: number, data: Buffer][] = [
  ['LIST', LIST, Buffer.alloc(0)],
  ['INFO', INFO, infoData('disk')],
  ['GO', GO, infoData('disk')],
  ['GO of nothing there is', GO, infoData('nothing')],
  ['STRUCTURED_REPLY', STRUCTURED_REPLY, Buffer.alloc(0)],
  ['LIST_META_CONTEXT', LIST_META_CONTEXT, metaData('disk', [])],
  ['SET_META_CONTEXT', SET_META_CONTEXT, metaData('disk', [])],
  ['EXTENDED_HEADERS', Option.EXTENDED_HEADERS, Buffer.alloc(0)],
  ['an unknown option', 4711, Buffer.from('x')],
  ['one too long to be kept', GO, Buffer.alloc(OPTION_BYTES_MAX + 1)],
];

describe('TLS off', () => {
  test('STARTTLS is refused as any option that is not supported, with data or without', () => {
    for (const data of [Buffer.alloc(0), Buffer.from('x'), Buffer.alloc(OPTION_BYTES_MAX + 1)])
      assert.deepEqual(types(begun().ask(STARTTLS, data)), [ERR_UNSUP]);
  });
  test('and haggling goes on', () => {
    const conversation = begun();
    conversation.ask(STARTTLS);
    assert.deepEqual(types(conversation.ask(STRUCTURED_REPLY)), [ACK]);
  });
});

describe('TLS required', () => {
  for (const [name, number, data] of EVERY_OTHER)
    test(`${name} gets TLS_REQD, and haggling goes on`, () => {
      const conversation = begun('required');
      assert.deepEqual(types(conversation.ask(number, data)), [ERR_TLS_REQD]);
      assert.deepEqual(types(conversation.ask(STARTTLS)), [ACK]);
    });
  test('nothing is opened', () => {
    const one = disk();
    begun('required', directory(one)).ask(GO, infoData('disk'));
    assert.equal(one.opened.length, 0);
  });
  test('EXPORT_NAME ends the session without a byte', () => {
    const conversation = begun('required');
    const result = conversation.push(option(EXPORT_NAME, Buffer.from('disk')));
    assert.ok(result?.kind === 'end' && result.reason === 'tls-required');
    assert.equal(conversation.sent().length, 0);
  });
  test('ABORT is answered', () => {
    const conversation = begun('required');
    const result = conversation.push(option(ABORT));
    assert.ok(result?.kind === 'end' && result.reason === 'abort');
    assert.deepEqual(types(readReplies(conversation.sent())), [ACK]);
  });
});

for (const mode of ['allowed', 'required'] as const) {
  describe(`STARTTLS, TLS ${mode}`, () => {
    test('is acknowledged, and ends the handshake in clear text', () => {
      const conversation = begun(mode);
      const result = conversation.push(option(STARTTLS));
      assert.deepEqual(result, { kind: 'starttls', behindTls: { noZeroes: true } });
      assert.deepEqual(types(readReplies(conversation.sent())), [ACK]);
    });
    test('what came behind it in clear text is thrown away', () => {
      const one = disk();
      const conversation = begun(mode, directory(one));
      const result = conversation.push(
        option(STARTTLS),
        option(STRUCTURED_REPLY),
        option(GO, infoData('disk')),
      );
      assert.deepEqual(result, { kind: 'starttls', behindTls: { noZeroes: true } });
      assert.deepEqual(types(readReplies(conversation.sent())), [ACK]);
      assert.deepEqual(conversation.push(option(GO, infoData('disk'))), result, 'nor is it ever taken');
      assert.equal(conversation.sent().length, 0);
      assert.equal(one.opened.length, 0);
    });
    for (const bytes of [1, OPTION_BYTES_MAX + 1])
      test(`with ${bytes} bytes of data is invalid, and may be tried again`, () => {
        const conversation = begun(mode);
        assert.deepEqual(types(conversation.ask(STARTTLS, Buffer.alloc(bytes))), [ERR_INVALID]);
        assert.deepEqual(types(conversation.ask(STARTTLS)), [ACK]);
      });
    test('a second time is invalid, and haggling goes on', () => {
      const conversation = secure(mode);
      assert.deepEqual(types(conversation.ask(STARTTLS)), [ERR_INVALID]);
      assert.deepEqual(types(conversation.ask(STARTTLS, Buffer.from('x'))), [ERR_INVALID]);
      assert.deepEqual(types(conversation.ask(STRUCTURED_REPLY)), [ACK]);
    });
    test('behind it no greeting and no flags are sent again', () => {
      assert.deepEqual(types(secure(mode).ask(LIST)), [SERVER, ACK]);
    });
    test('behind it NO_ZEROES is as it was agreed on', () => {
      for (const noZeroes of [false, true]) {
        const conversation = secure(mode, directory(disk()), noZeroes);
        const result = conversation.push(option(EXPORT_NAME, Buffer.from('disk')));
        assert.ok(result?.kind === 'transmission' && result.noZeroes === noZeroes);
        assert.equal(conversation.sent().length, noZeroes ? 10 : 134);
      }
    });
  });
}

describe('what was agreed on before STARTTLS (CVE-2021-3716)', () => {
  test('structured replies and contexts do not count behind it', () => {
    const exports = directory(disk());
    const clear = begun('allowed', exports);
    clear.ask(STRUCTURED_REPLY);
    clear.ask(SET_META_CONTEXT, metaData('disk', ['base:allocation']));
    const started = clear.push(option(STARTTLS));
    assert.ok(started?.kind === 'starttls');
    const conversation = new Conversation(exports, { tls: 'allowed', behindTls: started.behindTls });
    const result = conversation.push(option(GO, infoData('disk')));
    assert.ok(result?.kind === 'transmission');
    assert.equal(result.structured, false);
    assert.deepEqual(result.contexts, []);
  });
  test('contexts need structured replies behind TLS, too', () => {
    const replies = secure('allowed').ask(SET_META_CONTEXT, metaData('disk', ['base:allocation']));
    assert.deepEqual(types(replies), [ERR_INVALID]);
  });
  test('structured replies can be agreed on again', () => {
    assert.deepEqual(types(secure('allowed').ask(STRUCTURED_REPLY)), [ACK]);
  });
});

describe('an export for TLS only, TLS allowed', () => {
  const exports = () => directory(entry('open'), entry('secret', { tlsOnly: true }));
  for (const [name, number, data] of [
    ['INFO', INFO, infoData('secret', [Info.NAME])],
    ['GO', GO, infoData('secret')],
    ['LIST_META_CONTEXT', LIST_META_CONTEXT, metaData('secret', [])],
  ] as const)
    test(`${name} without TLS gets TLS_REQD and nothing else`, () => {
      assert.deepEqual(types(begun('allowed', exports()).ask(number, data)), [ERR_TLS_REQD]);
    });
  test('SET_META_CONTEXT likewise', () => {
    const conversation = begun('allowed', exports());
    conversation.ask(STRUCTURED_REPLY);
    assert.deepEqual(types(conversation.ask(SET_META_CONTEXT, metaData('secret', []))), [ERR_TLS_REQD]);
  });
  test('EXPORT_NAME without TLS ends the session', () => {
    const result = begun('allowed', exports()).push(option(EXPORT_NAME, Buffer.from('secret')));
    assert.ok(result?.kind === 'end' && result.reason === 'tls-required');
  });
  test('is not listed without TLS, and is with it', () => {
    const listed = (conversation: Conversation) =>
      conversation.ask(LIST).flatMap(({ type, data }) => (type === SERVER ? [data] : []));
    assert.deepEqual(listed(begun('allowed', exports())), [counted('open')]);
    assert.deepEqual(listed(secure('allowed', exports())), [counted('open'), counted('secret')]);
  });
  test('the other one is served without TLS', () => {
    const result = begun('allowed', exports()).push(option(GO, infoData('open')));
    assert.equal(result?.kind, 'transmission');
  });
  test('with TLS it is as any other', () => {
    const result = secure('allowed', exports()).push(option(GO, infoData('secret')));
    assert.equal(result?.kind, 'transmission');
    assert.deepEqual(types(secure('allowed', exports()).ask(GO, infoData('nothing'))), [ERR_UNKNOWN]);
  });
});
