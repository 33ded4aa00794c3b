// Each test is a clause of the protocol («Conventions», «Handshake», «Option types») or an abuse limit of ours.
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  Info,
  LISTED_BYTES_MAX,
  OPTION_BYTES_MAX,
  OPTION_MAGIC,
  OPTION_SKIP_BYTES_MAX,
  OPTIONS_MAX,
  OPTIONS_PER_LISTED_NAME,
  Option,
  OptionReply,
  PAYLOAD_BYTES_MAX,
  STRING_BYTES_MAX,
  TransmissionFlag,
} from '../../../src/nbd/constants.js';
import type { HandshakeResult } from '../../../src/nbd/server/handshake.js';
import {
  Conversation,
  clientFlags,
  counted,
  directory,
  entry,
  infoData,
  metaData,
  option,
  type Reply,
  readGreeting,
  readReplies,
  u16,
  u32,
  u64,
} from '../../support/handshake.js';

const { ACK, SERVER, INFO, META_CONTEXT } = OptionReply;

function typesOf(replies: Reply[]): number[] {
  return replies.map((reply) => reply.type);
}

function assertRefused(replies: Reply[], type: number): void {
  assert.deepEqual(typesOf(replies), [type]);
  const text = replies[0]!.data.toString();
  assert.ok(text.length > 0 && Buffer.byteLength(text) <= 256, 'the error has a message of 1 to 256 bytes');
}

function infoOf(replies: Reply[], info: number): Buffer | undefined {
  return replies.find((reply) => reply.type === INFO && reply.data.readUInt16BE(0) === info)?.data;
}

function flagsOf(replies: Reply[]): number {
  return infoOf(replies, Info.EXPORT)!.readUInt16BE(10);
}

function contextsOf(replies: Reply[]): { id: number; name: string }[] {
  return replies
    .filter((reply) => reply.type === META_CONTEXT)
    .map(({ data }) => ({ id: data.readUInt32BE(0), name: data.subarray(4).toString() }));
}

function transmissionOf(
  result: HandshakeResult | undefined,
): Extract<HandshakeResult, { kind: 'transmission' }> {
  assert.equal(result?.kind, 'transmission');
  return result as Extract<HandshakeResult, { kind: 'transmission' }>;
}

function assertEnd(result: HandshakeResult | undefined, reason: string): void {
  assert.equal(result?.kind === 'end' && result.reason, reason);
}

describe('greeting and client flags', () => {
  test('the greeting has FIXED_NEWSTYLE, NO_ZEROES and no other bit', () => {
    const conversation = new Conversation(directory());
    assert.equal(readGreeting(conversation.sent()), 3);
  });

  for (const flags of [0, 1, 2, 3])
    test(`client flags ${flags} are taken`, () => {
      const conversation = new Conversation(directory());
      assert.equal(conversation.push(clientFlags(flags)), undefined);
    });

  for (const flags of [4, 7, 0x8000_0000, 0xffff_ffff])
    test(`client flags 0x${flags.toString(16)}: the connection is dropped`, () => {
      const conversation = new Conversation(directory());
      conversation.sent();
      assertEnd(conversation.push(clientFlags(flags)), 'client-flags');
      assert.equal(conversation.sent().length, 0);
    });

  test('a client that did not say FIXED_NEWSTYLE is answered all the same', () => {
    assert.deepEqual(typesOf(Conversation.begun(directory(), 0).ask(Option.LIST)), [ACK]);
  });
});

describe('options in general', () => {
  for (const unknown of [0, 4, Option.STARTTLS, 12, 0x62667a31, 0xffff_ffff])
    test(`option ${unknown}: payload read, ERR_UNSUP, the next one understood`, () => {
      const conversation = Conversation.begun(directory(entry('disk')));
      const replies = conversation.ask(unknown, Buffer.from('whatever'));
      assertRefused(replies, OptionReply.ERR_UNSUP);
      assert.equal(replies[0]!.option, unknown);
      assert.deepEqual(typesOf(conversation.ask(Option.LIST)), [SERVER, ACK]);
    });

  test('a wrong option magic is a hard disconnect', () => {
    const conversation = Conversation.begun(directory());
    assertEnd(
      conversation.push(u64(OPTION_MAGIC + 1n), u32(Option.LIST), u32(0), Buffer.alloc(0)),
      'option-magic',
    );
    assert.equal(conversation.sent().length, 0);
  });

  test('options that arrive before the answer to the last one are answered in order', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    conversation.push(option(Option.STRUCTURED_REPLY), option(99), option(Option.LIST), option(Option.ABORT));
    const replies = readReplies(conversation.sent());
    assert.deepEqual(
      replies.map((reply) => [reply.option, reply.type]),
      [
        [Option.STRUCTURED_REPLY, ACK],
        [99, OptionReply.ERR_UNSUP],
        [Option.LIST, SERVER],
        [Option.LIST, ACK],
        [Option.ABORT, ACK],
      ],
    );
  });

  test('shutting down: ERR_SHUTDOWN for everything but ABORT', () => {
    const exports = directory(entry('disk'));
    const conversation = Conversation.begun(exports);
    exports.shuttingDown = true;
    for (const number of [
      Option.LIST,
      Option.INFO,
      Option.GO,
      Option.STRUCTURED_REPLY,
      Option.LIST_META_CONTEXT,
      Option.SET_META_CONTEXT,
      Option.STARTTLS,
      77,
    ])
      assertRefused(conversation.ask(number), OptionReply.ERR_SHUTDOWN);
    assert.deepEqual(typesOf(conversation.ask(Option.ABORT)), [ACK]);
  });

  test('shutting down: EXPORT_NAME ends the session', () => {
    const exports = directory(entry('disk'));
    const conversation = Conversation.begun(exports);
    exports.shuttingDown = true;
    assertEnd(conversation.push(option(Option.EXPORT_NAME, Buffer.from('disk'))), 'shutting-down');
    assert.equal(conversation.sent().length, 0);
  });

  test('after the result nothing is read or sent', () => {
    const conversation = Conversation.begun(directory());
    const result = conversation.push(option(Option.ABORT));
    conversation.sent();
    assert.equal(conversation.push(option(Option.LIST)), result);
    assert.equal(conversation.handshake.result, result);
    assert.equal(conversation.sent().length, 0);
  });
});

describe('EXPORT_NAME', () => {
  test('size, flags and 124 zero bytes', () => {
    const conversation = Conversation.begun(directory(entry('disk', { size: 0x1_2345_6000 })), 1);
    const result = transmissionOf(conversation.push(option(Option.EXPORT_NAME, Buffer.from('disk'))));
    const answer = conversation.sent();
    assert.equal(answer.length, 134);
    assert.equal(answer.readBigUInt64BE(0), 0x1_2345_6000n);
    assert.ok(answer.readUInt16BE(8) & TransmissionFlag.HAS_FLAGS);
    assert.ok(answer.subarray(10).every((byte) => byte === 0));
    assert.equal(result.noZeroes, false);
    assert.equal(result.structured, false);
  });

  test('no zero bytes when NO_ZEROES was agreed on', () => {
    const conversation = Conversation.begun(directory(entry('disk')), 3);
    assert.equal(
      transmissionOf(conversation.push(option(Option.EXPORT_NAME, Buffer.from('disk')))).noZeroes,
      true,
    );
    assert.equal(conversation.sent().length, 10);
  });

  test('the empty name is the default export', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assert.equal(transmissionOf(conversation.push(option(Option.EXPORT_NAME))).entry.name, 'disk');
  });

  const unmet: [string, Buffer][] = [
    ['an unknown name', Buffer.from('other')],
    ['the empty name where there are several exports', Buffer.alloc(0)],
    ['a name that is not UTF-8', Buffer.from([0xff])],
    ['a name with NUL', Buffer.from('di\0sk')],
    ['a name of more than 4096 bytes', Buffer.alloc(STRING_BYTES_MAX + 1, 'x')],
    ['a name of more bytes than any option', Buffer.alloc(OPTION_BYTES_MAX + 1, 'x')],
  ];
  for (const [what, name] of unmet)
    test(`${what} ends the session without an answer`, () => {
      const conversation = Conversation.begun(directory(entry('disk'), entry('disk2')));
      assertEnd(conversation.push(option(Option.EXPORT_NAME, name)), 'export-name');
      assert.equal(conversation.sent().length, 0);
    });

  test('an export that cannot be opened ends the session, and its failure is reported here', () => {
    const failure = new Error('image is gone');
    const broken = entry('disk', {
      open() {
        throw failure;
      },
    });
    const conversation = Conversation.begun(directory(broken));
    assertEnd(conversation.push(option(Option.EXPORT_NAME, Buffer.from('disk'))), 'export-name');
    assert.deepEqual(conversation.failures, [failure]);
  });
});

describe('ABORT', () => {
  test('is acknowledged and ends the handshake', () => {
    const conversation = Conversation.begun(directory());
    assertEnd(conversation.push(option(Option.ABORT)), 'abort');
    assert.deepEqual(typesOf(readReplies(conversation.sent())), [ACK]);
  });

  for (const length of [3, OPTION_BYTES_MAX + 1])
    test(`a payload of ${length} bytes is ignored`, () => {
      const conversation = Conversation.begun(directory());
      assertEnd(conversation.push(option(Option.ABORT, Buffer.alloc(length))), 'abort');
      assert.deepEqual(typesOf(readReplies(conversation.sent())), [ACK]);
    });
});

describe('LIST', () => {
  test('one SERVER an export with its description, then ACK', () => {
    const conversation = Conversation.begun(
      directory(entry('disk', { description: 'the root disk' }), entry('däta')),
    );
    const replies = conversation.ask(Option.LIST);
    assert.deepEqual(typesOf(replies), [SERVER, SERVER, ACK]);
    assert.deepEqual(replies[0]!.data, Buffer.concat([counted('disk'), Buffer.from('the root disk')]));
    assert.deepEqual(replies[1]!.data, counted('däta'));
    assert.equal(replies[2]!.data.length, 0);
  });

  test('no export: ACK alone', () => {
    assert.deepEqual(typesOf(Conversation.begun(directory()).ask(Option.LIST)), [ACK]);
  });

  test('a payload is ERR_INVALID', () => {
    assertRefused(
      Conversation.begun(directory()).ask(Option.LIST, Buffer.from('x')),
      OptionReply.ERR_INVALID,
    );
  });

  test('no device is opened', () => {
    const disk = entry('disk');
    Conversation.begun(directory(disk)).ask(Option.LIST);
    assert.equal(disk.opened.length, 0);
  });
});

describe('INFO and GO', () => {
  for (const number of [Option.INFO, Option.GO])
    test(`option ${number}: INFO_EXPORT of exactly 12 bytes before ACK, also when nothing was asked`, () => {
      const conversation = Conversation.begun(directory(entry('disk', { size: 7 * 512 })));
      const replies = conversation.ask(number, infoData('disk'));
      assert.deepEqual(typesOf(replies), [INFO, ACK]);
      assert.equal(replies[0]!.data.length, 12);
      assert.equal(replies[0]!.data.readBigUInt64BE(2), 7n * 512n);
    });

  test('NAME, DESCRIPTION and BLOCK_SIZE on request', () => {
    const disk = entry('disk', { description: 'the root disk', preferredBlock: 65_536 });
    const asked = [Info.BLOCK_SIZE, Info.DESCRIPTION, Info.NAME, Info.EXPORT];
    const replies = Conversation.begun(directory(disk)).ask(Option.INFO, infoData('', asked));
    assert.equal(replies.length, 5);
    assert.equal(infoOf(replies, Info.NAME)!.subarray(2).toString(), 'disk');
    assert.equal(infoOf(replies, Info.DESCRIPTION)!.subarray(2).toString(), 'the root disk');
    const blockSize = infoOf(replies, Info.BLOCK_SIZE)!;
    assert.equal(blockSize.length, 14);
    assert.deepEqual(
      [2, 6, 10].map((at) => blockSize.readUInt32BE(at)),
      [1, 65_536, PAYLOAD_BYTES_MAX],
    );
  });

  test('unknown information types are ignored, repeated ones answered once', () => {
    const asked = [4, 0xffff, Info.NAME, Info.NAME, 77];
    const replies = Conversation.begun(directory(entry('disk'))).ask(Option.INFO, infoData('disk', asked));
    assert.deepEqual(typesOf(replies), [INFO, INFO, ACK]);
  });

  test('GO after INFO with the same parameters gives the same answers', () => {
    const conversation = Conversation.begun(directory(entry('disk', { description: 'd' })));
    const asked = infoData('disk', [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE]);
    const told = conversation.ask(Option.INFO, asked).map(({ type, data }) => ({ type, data }));
    const chosen = conversation.ask(Option.GO, asked).map(({ type, data }) => ({ type, data }));
    assert.deepEqual(chosen, told);
  });

  test("GO: no zero bytes after the ACK, whatever the client's flags", () => {
    for (const flags of [1, 3]) {
      const conversation = Conversation.begun(directory(entry('disk')), flags);
      transmissionOf(conversation.push(option(Option.GO, infoData('disk'))));
      assert.deepEqual(typesOf(readReplies(conversation.sent())), [INFO, ACK]);
    }
  });

  test('GO: bytes that arrive early are handed on', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    const early = Buffer.from('a request that could not wait');
    assert.deepEqual(
      transmissionOf(conversation.push(option(Option.GO, infoData('disk')), early)).rest,
      early,
    );
  });

  test('an unknown export is ERR_UNKNOWN without any information', () => {
    const conversation = Conversation.begun(directory(entry('disk'), entry('other')));
    for (const number of [Option.INFO, Option.GO])
      for (const name of ['nope', ''])
        assertRefused(conversation.ask(number, infoData(name, [Info.BLOCK_SIZE])), OptionReply.ERR_UNKNOWN);
    assert.deepEqual(typesOf(conversation.ask(Option.GO, infoData('disk'))), [INFO, ACK]);
  });

  const malformed: [string, Buffer][] = [
    ['no data', Buffer.alloc(0)],
    ['less than the fixed fields', Buffer.alloc(5)],
    ['a name length beyond the option', Buffer.concat([u32(5), Buffer.from('disk'), u16(0)])],
    ['a name length of 2^32 - 1', Buffer.concat([u32(0xffff_ffff), Buffer.from('disk'), u16(0)])],
    ['more types promised than sent', Buffer.concat([counted('disk'), u16(2), u16(0)])],
    ['fewer types promised than sent', Buffer.concat([counted('disk'), u16(0), u16(0)])],
    ['half a type', Buffer.concat([counted('disk'), u16(1), Buffer.alloc(1)])],
    ['a name that is not UTF-8', Buffer.concat([u32(1), Buffer.from([0xc3]), u16(0)])],
    ['a name with NUL', infoData('di\0sk')],
    ['a name of more than 4096 bytes', infoData('x'.repeat(STRING_BYTES_MAX + 1))],
  ];
  for (const [what, data] of malformed)
    test(`${what} is ERR_INVALID, and the client may go on`, () => {
      const disk = entry('disk');
      const conversation = Conversation.begun(directory(disk));
      assertRefused(conversation.ask(Option.INFO, data), OptionReply.ERR_INVALID);
      assertRefused(conversation.ask(Option.GO, data), OptionReply.ERR_INVALID);
      assert.equal(disk.opened.length, 0);
      assert.deepEqual(typesOf(conversation.ask(Option.GO, infoData('disk'))), [INFO, ACK]);
    });

  test('the device is opened by GO and by nothing before it', () => {
    const disk = entry('disk');
    const conversation = Conversation.begun(directory(disk));
    conversation.ask(Option.STRUCTURED_REPLY);
    conversation.ask(Option.INFO, infoData('disk', [Info.BLOCK_SIZE]));
    conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation']));
    assert.equal(disk.opened.length, 0);
    const { device } = transmissionOf(conversation.push(option(Option.GO, infoData('disk'))));
    assert.deepEqual(disk.opened, [device]);
    assert.equal(disk.opened[0]!.released, 0);
  });

  test('an export that cannot be opened is ERR_UNKNOWN without the reason, and the client may go on', () => {
    const failure = new Error('/secret/path is locked');
    let fail = true;
    const disk = entry('disk');
    const broken = entry('disk', {
      open() {
        if (fail) throw failure;
        return disk.open();
      },
    });
    const conversation = Conversation.begun(directory(broken));
    const replies = conversation.ask(Option.GO, infoData('disk'));
    assertRefused(replies, OptionReply.ERR_UNKNOWN);
    assert.ok(!replies[0]!.data.toString().includes('secret'));
    assert.deepEqual(conversation.failures, [failure]);
    fail = false;
    transmissionOf(conversation.push(option(Option.GO, infoData('disk'))));
  });

  test('a device that is not what INFO promised is let go', () => {
    const real = entry('disk', { size: 4096 });
    const conversation = Conversation.begun(directory(entry('disk', { size: 8192, open: real.open })));
    assertRefused(conversation.ask(Option.GO, infoData('disk')), OptionReply.ERR_UNKNOWN);
    assert.equal(real.opened[0]!.released, 1);
    assert.equal(conversation.failures.length, 1);
  });
});

describe('transmission flags', () => {
  const writable =
    TransmissionFlag.HAS_FLAGS |
    TransmissionFlag.SEND_FLUSH |
    TransmissionFlag.SEND_FUA |
    TransmissionFlag.SEND_TRIM |
    TransmissionFlag.SEND_WRITE_ZEROES |
    TransmissionFlag.SEND_CACHE;

  test('a writable export', () => {
    const conversation = Conversation.begun(directory(entry('disk', { multiConn: false })));
    assert.equal(flagsOf(conversation.ask(Option.GO, infoData('disk'))), writable);
  });

  test('DF only with structured replies', () => {
    const conversation = Conversation.begun(directory(entry('disk', { multiConn: false })));
    assert.equal(flagsOf(conversation.ask(Option.INFO, infoData('disk'))) & TransmissionFlag.SEND_DF, 0);
    conversation.ask(Option.STRUCTURED_REPLY);
    assert.equal(flagsOf(conversation.ask(Option.GO, infoData('disk'))), writable | TransmissionFlag.SEND_DF);
  });

  test('MULTI_CONN as the device says', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assert.equal(
      flagsOf(conversation.ask(Option.GO, infoData('disk'))),
      writable | TransmissionFlag.CAN_MULTI_CONN,
    );
  });

  test('a read-only export says so and offers no command that writes', () => {
    const conversation = Conversation.begun(directory(entry('disk', { readOnly: true })));
    const flags = flagsOf(conversation.ask(Option.GO, infoData('disk')));
    assert.ok(flags & TransmissionFlag.READ_ONLY);
    assert.equal(flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES), 0);
  });
});

describe('STRUCTURED_REPLY', () => {
  test('is acknowledged and reported', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assert.deepEqual(typesOf(conversation.ask(Option.STRUCTURED_REPLY)), [ACK]);
    assert.equal(transmissionOf(conversation.push(option(Option.GO, infoData('disk')))).structured, true);
  });

  test('a payload is ERR_INVALID and agrees on nothing', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assertRefused(conversation.ask(Option.STRUCTURED_REPLY, Buffer.from('x')), OptionReply.ERR_INVALID);
    assert.equal(transmissionOf(conversation.push(option(Option.GO, infoData('disk')))).structured, false);
  });

  test('a second time is ERR_INVALID and takes nothing back', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    conversation.ask(Option.STRUCTURED_REPLY);
    assertRefused(conversation.ask(Option.STRUCTURED_REPLY), OptionReply.ERR_INVALID);
    assert.equal(transmissionOf(conversation.push(option(Option.GO, infoData('disk')))).structured, true);
  });
});

describe('LIST_META_CONTEXT', () => {
  const all = ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:blockferry'];
  const cases: [string[], string[]][] = [
    [[], all],
    [['base:'], all.slice(0, 1)],
    [['qemu:'], all.slice(1)],
    [['qemu:dirty-bitmap:'], all.slice(2)],
    [['base:', 'qemu:allocation-depth', 'qemu:allocation-depth', 'base:allocation'], all.slice(0, 2)],
    [['base:nothing'], []],
    [['x-unknown:', 'x-unknown:leaf'], []],
    [['x-unknown:leaf', 'base:allocation'], all.slice(0, 1)],
    [['base:alloc'], []],
  ];
  for (const [queries, expected] of cases)
    test(`${JSON.stringify(queries)} lists ${expected.length} contexts, ids 0`, () => {
      const replies = Conversation.begun(directory(entry('disk'))).ask(
        Option.LIST_META_CONTEXT,
        metaData('disk', queries),
      );
      assert.deepEqual(
        contextsOf(replies),
        expected.map((name) => ({ id: 0, name })),
      );
      assert.equal(replies.at(-1)!.type, ACK);
    });

  test('an unknown export is ERR_UNKNOWN', () => {
    assertRefused(
      Conversation.begun(directory(entry('disk'))).ask(Option.LIST_META_CONTEXT, metaData('nope', [])),
      OptionReply.ERR_UNKNOWN,
    );
  });

  test('selects nothing', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    conversation.ask(Option.STRUCTURED_REPLY);
    conversation.ask(Option.LIST_META_CONTEXT, metaData('disk', ['base:']));
    assert.deepEqual(transmissionOf(conversation.push(option(Option.GO, infoData('disk')))).contexts, []);
  });
});

describe('SET_META_CONTEXT', () => {
  function begun(...entries: Parameters<typeof directory>): Conversation {
    const conversation = Conversation.begun(directory(...entries));
    conversation.ask(Option.STRUCTURED_REPLY);
    return conversation;
  }

  function selectedBy(conversation: Conversation, name = 'disk'): string[] {
    const result = transmissionOf(conversation.push(option(Option.GO, infoData(name))));
    return result.contexts.map((context) => context.name);
  }

  test('exact names are selected, with unique ids that the result repeats', () => {
    const conversation = begun(entry('disk'));
    const replies = conversation.ask(
      Option.SET_META_CONTEXT,
      metaData('disk', ['qemu:allocation-depth', 'base:allocation']),
    );
    assert.equal(replies.at(-1)!.type, ACK);
    const told = contextsOf(replies);
    assert.deepEqual(told.map(({ name }) => name).sort(), ['base:allocation', 'qemu:allocation-depth']);
    assert.equal(new Set(told.map(({ id }) => id)).size, 2);
    assert.deepEqual(transmissionOf(conversation.push(option(Option.GO, infoData('disk')))).contexts, told);
  });

  test('the same context twice is selected once', () => {
    const conversation = begun(entry('disk'));
    conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation', 'base:allocation']));
    assert.deepEqual(selectedBy(conversation), ['base:allocation']);
  });

  for (const queries of [[], ['base:'], ['qemu:'], ['qemu:dirty-bitmap:'], ['base:nope'], ['x-other:leaf']])
    test(`${JSON.stringify(queries)} selects none: ACK alone`, () => {
      const conversation = begun(entry('disk'));
      assert.deepEqual(typesOf(conversation.ask(Option.SET_META_CONTEXT, metaData('disk', queries))), [ACK]);
      assert.deepEqual(selectedBy(conversation), []);
    });

  test('an unknown namespace does not spoil the known one', () => {
    const conversation = begun(entry('disk'));
    conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['x-other:leaf', 'base:allocation']));
    assert.deepEqual(selectedBy(conversation), ['base:allocation']);
  });

  test('without structured replies it is ERR_INVALID', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assertRefused(
      conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation'])),
      OptionReply.ERR_INVALID,
    );
    assert.deepEqual(selectedBy(conversation), []);
  });

  const failing: [string, Buffer, number][] = [
    ['an unknown export', metaData('nope', ['base:allocation']), OptionReply.ERR_UNKNOWN],
    ['a query without a colon', metaData('disk', ['base']), OptionReply.ERR_INVALID],
    ['an empty query', metaData('disk', ['']), OptionReply.ERR_INVALID],
    ['no data', Buffer.alloc(0), OptionReply.ERR_INVALID],
    ['a name beyond the option', Buffer.concat([u32(99), u32(0)]), OptionReply.ERR_INVALID],
    ['a missing query', Buffer.concat([counted('disk'), u32(1)]), OptionReply.ERR_INVALID],
    [
      '2^32 - 1 queries promised',
      Buffer.concat([counted('disk'), u32(0xffff_ffff)]),
      OptionReply.ERR_INVALID,
    ],
    [
      'a truncated query',
      Buffer.concat([counted('disk'), u32(1), u32(20), Buffer.from('base:allocation')]),
      OptionReply.ERR_INVALID,
    ],
    [
      'bytes behind the last query',
      Buffer.concat([metaData('disk', ['base:allocation']), Buffer.alloc(1)]),
      OptionReply.ERR_INVALID,
    ],
    [
      'a query that is not UTF-8',
      Buffer.concat([counted('disk'), u32(1), u32(2), Buffer.from([0x3a, 0xff])]),
      OptionReply.ERR_INVALID,
    ],
    [
      'a query of more than 4096 bytes',
      metaData('disk', [`base:${'x'.repeat(STRING_BYTES_MAX)}`]),
      OptionReply.ERR_INVALID,
    ],
    ['more data than we hold', Buffer.alloc(OPTION_BYTES_MAX + 1), OptionReply.ERR_TOO_BIG],
  ];
  for (const [what, data, type] of failing)
    test(`${what} is refused, and the set selected before is gone`, () => {
      const conversation = begun(entry('disk'));
      conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation']));
      assertRefused(conversation.ask(Option.SET_META_CONTEXT, data), type);
      assert.deepEqual(selectedBy(conversation), []);
    });

  test('the last set replaces the one before', () => {
    const conversation = begun(entry('disk'));
    conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation']));
    conversation.ask(Option.SET_META_CONTEXT, metaData('disk', ['qemu:allocation-depth']));
    assert.deepEqual(selectedBy(conversation), ['qemu:allocation-depth']);
  });

  test('counts only when GO names the same export', () => {
    const conversation = begun(entry('disk'), entry('other'));
    conversation.ask(Option.SET_META_CONTEXT, metaData('other', ['base:allocation']));
    assert.deepEqual(selectedBy(conversation, 'disk'), []);
  });

  test('counts when GO names the same export by its other name, and for EXPORT_NAME', () => {
    const named = begun(entry('disk'));
    named.ask(Option.SET_META_CONTEXT, metaData('', ['base:allocation']));
    assert.deepEqual(selectedBy(named, 'disk'), ['base:allocation']);
    const old = begun(entry('disk'));
    old.ask(Option.SET_META_CONTEXT, metaData('disk', ['base:allocation']));
    const result = transmissionOf(old.push(option(Option.EXPORT_NAME, Buffer.from('disk'))));
    assert.deepEqual(
      result.contexts.map(({ name }) => name),
      ['base:allocation'],
    );
  });
});

describe('abuse limits', () => {
  test(`more than ${OPTIONS_MAX} options end the session`, () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    for (let count = 0; count < OPTIONS_MAX; count++)
      assert.deepEqual(typesOf(conversation.ask(Option.INFO, infoData('disk'))), [INFO, ACK]);
    assertEnd(conversation.push(option(Option.INFO, infoData('disk'))), 'too-many-options');
  });

  test('each listed name earns more options, but not again when listed again', () => {
    const conversation = Conversation.begun(directory(entry('a'), entry('b')));
    conversation.ask(Option.LIST);
    conversation.ask(Option.LIST);
    for (let count = 2; count < OPTIONS_MAX + 2 * OPTIONS_PER_LISTED_NAME; count++)
      assert.equal(conversation.push(option(Option.INFO, infoData('a'))), undefined);
    assertEnd(conversation.push(option(Option.INFO, infoData('a'))), 'too-many-options');
  });

  test('data longer than we hold is read past and refused as ERR_TOO_BIG', () => {
    const conversation = Conversation.begun(directory(entry('disk')));
    assertRefused(conversation.ask(Option.INFO, Buffer.alloc(OPTION_BYTES_MAX + 1)), OptionReply.ERR_TOO_BIG);
    assertRefused(conversation.ask(99, Buffer.alloc(OPTION_BYTES_MAX + 1)), OptionReply.ERR_UNSUP);
    assert.deepEqual(typesOf(conversation.ask(Option.GO, infoData('disk'))), [INFO, ACK]);
  });

  test('an announcement beyond all reason ends the session at once', () => {
    const conversation = Conversation.begun(directory());
    const header = Buffer.concat([u64(OPTION_MAGIC), u32(Option.INFO), u32(OPTION_SKIP_BYTES_MAX + 1)]);
    assertEnd(conversation.push(header), 'option-too-long');
  });

  test('listing a long directory again and again is refused; the first list is whole', () => {
    const entries = Array.from({ length: 300 }, (_, index) =>
      entry(`disk${index}`, { description: 'x'.repeat(4000) }),
    );
    const conversation = Conversation.begun(directory(...entries));
    const first = conversation.ask(Option.LIST);
    assert.equal(first.length, 301);
    assert.ok(first.reduce((sum, reply) => sum + 20 + reply.data.length, 0) > LISTED_BYTES_MAX);
    assertRefused(conversation.ask(Option.LIST), OptionReply.ERR_TOO_BIG);
    assert.deepEqual(typesOf(conversation.ask(Option.GO, infoData('disk7'))), [INFO, ACK]);
  });
});
