import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { BlockferryError, type ErrorCode } from '../../../src/errors.js';
import { ClientHandshake, type HandshakeGoal } from '../../../src/nbd/client/handshake.js';
import { encodeOption } from '../../../src/nbd/codec/client.js';
import { Info, Option, OptionReply } from '../../../src/nbd/constants.js';
import { greeting, infoBlockSize, infoExport, optionReply, u16, u32, u64 } from '../../fakes/fake-server.js';

const { ACK, SERVER, INFO, META_CONTEXT, ERR_UNSUP, ERR_UNKNOWN, ERR_POLICY, ERR_TLS_REQD, ERR_SHUTDOWN } =
  OptionReply;
const { STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS, SET_META_CONTEXT, GO, LIST, EXPORT_NAME, ABORT } =
  Option;

function goal(wish: Partial<Extract<HandshakeGoal, { kind: 'connect' }>> = {}): HandshakeGoal {
  return { kind: 'connect', exportName: 'disk', contexts: [], requireStructured: false, ...wish };
}

/** The option a client's message asks, the flags before it left out. */
function optionIn(sent: Buffer | null): number | null {
  if (sent === null) return null;
  const at = sent.length >= 4 && sent.readUInt32BE(0) <= 3 ? 4 : 0;
  return sent.readUInt32BE(at + 8);
}

/** Feeds one server message after the other; gives back the options that were asked. */
function converse(handshake: ClientHandshake, messages: Buffer[]): (number | null)[] {
  return messages.map((message) => optionIn(handshake.receive(message)));
}

const context = (id: number, name: string) =>
  optionReply(SET_META_CONTEXT, META_CONTEXT, Buffer.concat([u32(id), Buffer.from(name)]));
const info = (payload: Buffer) => optionReply(GO, INFO, payload);
const basics = info(infoExport(4096n, 3));

function fails(code: ErrorCode, why: RegExp) {
  return (error: unknown) =>
    error instanceof BlockferryError && error.code === code && why.test(error.message);
}

describe('client handshake', () => {
  it('begins with STARTTLS, and asks nothing else before TLS stands', () => {
    const handshake = new ClientHandshake(goal(), true);
    assert.equal(optionIn(handshake.receive(greeting())), STARTTLS);
    assert.equal(handshake.startsTls, false);
    assert.equal(handshake.receive(optionReply(STARTTLS, ACK)), null);
    assert.equal(handshake.startsTls, true);
    assert.equal(handshake.farewell, null, 'nothing is said in clear text any more');
    assert.equal(handshake.secured().readUInt32BE(8), STRUCTURED_REPLY);
    assert.deepEqual(
      converse(handshake, [
        optionReply(STRUCTURED_REPLY, ACK),
        Buffer.concat([basics, optionReply(GO, ACK)]),
      ]),
      [GO, null],
    );
    assert.equal(handshake.outcome?.kind, 'connect');
  });

  it('lists behind TLS', () => {
    const handshake = new ClientHandshake({ kind: 'list' }, true);
    converse(handshake, [greeting(), optionReply(STARTTLS, ACK)]);
    assert.equal(handshake.secured().readUInt32BE(8), LIST);
    handshake.receive(optionReply(LIST, ACK));
    assert.deepEqual(handshake.outcome, { kind: 'list', exports: [] });
  });

  it('asks for structured replies, contexts and GO, and tells all it learned', () => {
    const handshake = new ClientHandshake(goal({ contexts: ['base:allocation', 'x:y'] }));
    const asked = converse(handshake, [
      greeting(),
      optionReply(STRUCTURED_REPLY, ACK),
      Buffer.concat([context(7, 'base:allocation'), optionReply(SET_META_CONTEXT, ACK)]),
      Buffer.concat([
        info(infoBlockSize(512, 4096, 65536)),
        info(u16(77)),
        basics,
        info(Buffer.concat([u16(Info.DESCRIPTION), Buffer.from('a disk')])),
        info(Buffer.concat([u16(Info.NAME), Buffer.from('real')])),
        optionReply(GO, ACK),
      ]),
    ]);
    assert.deepEqual(asked, [STRUCTURED_REPLY, SET_META_CONTEXT, GO, null]);
    assert.deepEqual(handshake.outcome, {
      kind: 'connect',
      info: {
        exportName: 'disk',
        size: 4096,
        flags: 3,
        readOnly: true,
        structured: true,
        extended: false,
        contexts: new Map([['base:allocation', 7]]),
        description: 'a disk',
        name: 'real',
        blockSize: { minimum: 512, preferred: 4096, maximum: 65536 },
      },
    });
  });

  it('asks for extended headers first, and then not for structured replies', () => {
    const handshake = new ClientHandshake(goal({ extended: true, contexts: ['base:allocation'] }));
    const asked = converse(handshake, [
      greeting(),
      optionReply(EXTENDED_HEADERS, ACK),
      Buffer.concat([context(7, 'base:allocation'), optionReply(SET_META_CONTEXT, ACK)]),
      Buffer.concat([basics, optionReply(GO, ACK)]),
    ]);
    assert.deepEqual(asked, [EXTENDED_HEADERS, SET_META_CONTEXT, GO, null]);
    const { outcome } = handshake;
    assert.ok(outcome?.kind === 'connect' && outcome.info.extended && outcome.info.structured);
  });

  for (const type of [ERR_UNSUP, ERR_POLICY, OptionReply.ERR_INVALID])
    it(`does without extended headers when they are refused with 0x${type.toString(16)}`, () => {
      const handshake = new ClientHandshake(goal({ extended: true }));
      const asked = converse(handshake, [
        greeting(),
        optionReply(EXTENDED_HEADERS, type),
        optionReply(STRUCTURED_REPLY, ACK),
        Buffer.concat([basics, optionReply(GO, ACK)]),
      ]);
      assert.deepEqual(asked, [EXTENDED_HEADERS, STRUCTURED_REPLY, GO, null]);
      const { outcome } = handshake;
      assert.ok(outcome?.kind === 'connect' && !outcome.info.extended && outcome.info.structured);
    });

  it('asks for extended headers behind TLS, not before', () => {
    const handshake = new ClientHandshake(goal({ extended: true }), true);
    assert.deepEqual(converse(handshake, [greeting(), optionReply(STARTTLS, ACK)]), [STARTTLS, null]);
    assert.equal(optionIn(handshake.secured()), EXTENDED_HEADERS);
  });

  it('does not fall back to EXPORT_NAME, which must not follow extended headers', () => {
    const handshake = new ClientHandshake(goal({ extended: true }));
    assert.throws(
      () => converse(handshake, [greeting(), optionReply(EXTENDED_HEADERS, ACK), optionReply(GO, ERR_UNSUP)]),
      /does not know GO/,
    );
  });

  it('takes the bytes one by one', () => {
    const handshake = new ClientHandshake(goal());
    const asked: number[] = [];
    const messages = [
      greeting(),
      optionReply(STRUCTURED_REPLY, ACK),
      Buffer.concat([basics, optionReply(GO, ACK)]),
    ];
    for (const byte of Buffer.concat(messages)) {
      const option = optionIn(handshake.receive(Buffer.from([byte])));
      if (option !== null) asked.push(option);
    }
    assert.deepEqual(asked, [STRUCTURED_REPLY, GO]);
    assert.equal(handshake.outcome?.kind, 'connect');
  });

  it('does not keep the buffer it was given', () => {
    const handshake = new ClientHandshake(goal());
    const reused = Buffer.from(greeting().subarray(0, 10));
    assert.equal(handshake.receive(reused), null);
    reused.fill(0);
    assert.equal(optionIn(handshake.receive(greeting().subarray(10))), STRUCTURED_REPLY);
  });

  it('does without structured replies and contexts when they are refused', () => {
    const handshake = new ClientHandshake(goal({ contexts: ['base:allocation'] }));
    const asked = converse(handshake, [
      greeting(),
      optionReply(STRUCTURED_REPLY, ERR_UNSUP),
      Buffer.concat([basics, optionReply(GO, ACK)]),
    ]);
    assert.deepEqual(asked, [STRUCTURED_REPLY, GO, null]);
    const { outcome } = handshake;
    assert.ok(outcome?.kind === 'connect' && !outcome.info.structured && outcome.info.contexts.size === 0);
  });

  it('drops the contexts of a SET_META_CONTEXT that failed', () => {
    const handshake = new ClientHandshake(goal({ contexts: ['a:b'] }));
    converse(handshake, [
      greeting(),
      optionReply(STRUCTURED_REPLY, ACK),
      Buffer.concat([context(1, 'a:b'), optionReply(SET_META_CONTEXT, ERR_POLICY)]),
      Buffer.concat([basics, optionReply(GO, ACK)]),
    ]);
    const { outcome } = handshake;
    assert.ok(outcome?.kind === 'connect' && outcome.info.contexts.size === 0);
  });

  for (const zeroes of [true, false]) {
    it(`falls back to EXPORT_NAME ${zeroes ? 'with' : 'without'} 124 zeroes`, () => {
      const handshake = new ClientHandshake(goal());
      const asked = converse(handshake, [
        greeting(zeroes ? 1 : 3),
        optionReply(STRUCTURED_REPLY, ERR_UNSUP),
        optionReply(GO, ERR_UNSUP),
        Buffer.concat([u64(8192), u16(1), Buffer.alloc(zeroes ? 124 : 0)]),
      ]);
      assert.deepEqual(asked, [STRUCTURED_REPLY, GO, EXPORT_NAME, null]);
      assert.ok(handshake.outcome?.kind === 'connect' && handshake.outcome.info.size === 8192);
    });
  }

  it('speaks EXPORT_NAME at once to a server of plain newstyle', () => {
    const handshake = new ClientHandshake(goal());
    const sent = handshake.receive(greeting(0));
    assert.equal(sent?.subarray(0, 4).toString('hex'), '00000000');
    assert.equal(optionIn(sent), EXPORT_NAME);
    assert.equal(handshake.farewell, null);
    handshake.receive(Buffer.concat([u64(8192), u16(1), Buffer.alloc(124)]));
    assert.equal(handshake.outcome?.kind, 'connect');
  });

  it('lists exports', () => {
    const handshake = new ClientHandshake({ kind: 'list' });
    const one = (name: string, description: string) =>
      optionReply(LIST, SERVER, Buffer.concat([u32(name.length), Buffer.from(name + description)]));
    const asked = converse(handshake, [
      greeting(),
      one('a', 'first'),
      Buffer.concat([one('', ''), optionReply(LIST, ACK)]),
    ]);
    assert.deepEqual(asked, [LIST, null, null]);
    const exports = [
      { name: 'a', description: 'first' },
      { name: '', description: '' },
    ];
    assert.deepEqual(handshake.outcome, { kind: 'list', exports });
  });

  it('leaves with ABORT', () => {
    const handshake = new ClientHandshake(goal());
    assert.equal(handshake.farewell, null);
    handshake.receive(greeting());
    assert.deepEqual(handshake.farewell, encodeOption(ABORT));
  });

  it('leaves without a word when a server that greets twice has not been answered', () => {
    const handshake = new ClientHandshake(goal());
    assert.throws(() => handshake.receive(Buffer.concat([greeting(), greeting()])), { code: 'protocol' });
    assert.equal(handshake.farewell, null);
  });

  it('says nothing more behind GO, after which the server may be in transmission', () => {
    const handshake = new ClientHandshake(goal());
    const asked = converse(handshake, [greeting(), optionReply(STRUCTURED_REPLY, ERR_UNSUP)]);
    assert.deepEqual(asked, [STRUCTURED_REPLY, GO]);
    assert.equal(handshake.farewell, null);
  });
});

describe('client handshake: refusals and broken servers', () => {
  const structured = [greeting(), optionReply(STRUCTURED_REPLY, ACK)];
  const cases: [string, Buffer[], ErrorCode, RegExp, Parameters<typeof goal>[0]?, boolean?][] = [
    ['garbage', [Buffer.from('HTTP/1.1 400 Bad Request\r\n')], 'protocol', /not an NBD server/],
    [
      'an unknown export',
      [...structured, optionReply(GO, ERR_UNKNOWN, Buffer.from('no\nsuch'))],
      'not-found',
      /'disk': 'no such'/,
    ],
    [
      'a refused export',
      [...structured, optionReply(GO, ERR_POLICY)],
      'source-io',
      /refused GO \(ERR_POLICY\)/,
    ],
    ['an error of unknown kind', [...structured, optionReply(GO, 0x80001234)], 'source-io', /0x80001234/],
    [
      'a server that demands TLS',
      [greeting(), optionReply(STRUCTURED_REPLY, ERR_TLS_REQD)],
      'source-unreachable',
      /TLS/,
    ],
    [
      'an answer behind the ACK of STARTTLS, in clear text',
      [greeting(), Buffer.concat([optionReply(STARTTLS, ACK), optionReply(STRUCTURED_REPLY, ACK)])],
      'protocol',
      /more than it was asked/,
      {},
      true,
    ],
    [
      'no TLS where it is a must',
      [greeting(), optionReply(STARTTLS, ERR_UNSUP)],
      'tls',
      /offers no TLS \(ERR_UNSUP\)/,
      {},
      true,
    ],
    ['TLS refused by policy', [greeting(), optionReply(STARTTLS, ERR_POLICY)], 'tls', /ERR_POLICY/, {}, true],
    ['plain newstyle where TLS is a must', [greeting(0)], 'tls', /too old for TLS/, {}, true],
    [
      'a server shutting down',
      [...structured, optionReply(GO, ERR_SHUTDOWN)],
      'source-unreachable',
      /shutting down/,
    ],
    [
      'no structured replies where required',
      [greeting(), optionReply(STRUCTURED_REPLY, ERR_UNSUP)],
      'source-io',
      /structured/,
      { requireStructured: true },
    ],
    [
      'plain newstyle where structured replies are required',
      [greeting(0)],
      'source-io',
      /structured/,
      { requireStructured: true },
    ],
    ['a wrong reply magic', [greeting(), Buffer.alloc(20)], 'protocol', /magic/],
    [
      'the answer to another option',
      [greeting(), optionReply(GO, ACK)],
      'protocol',
      /GO instead of STRUCTURED_REPLY/,
    ],
    ['an answer before the question', [Buffer.concat(structured)], 'protocol', /more than it was asked/],
    [
      'an ACK with data',
      [greeting(), optionReply(STRUCTURED_REPLY, ACK, Buffer.alloc(1))],
      'protocol',
      /ACK with data/,
    ],
    [
      'a reply of the wrong type',
      [...structured, optionReply(GO, SERVER, u32(0))],
      'protocol',
      /type 2 to GO/,
    ],
    ['a reply of unknown type', [...structured, optionReply(GO, 99)], 'protocol', /type 99/],
    ['GO without INFO_EXPORT', [...structured, optionReply(GO, ACK)], 'protocol', /without INFO_EXPORT/],
    ['INFO_EXPORT twice', [...structured, Buffer.concat([basics, basics])], 'protocol', /twice/],
    ['a size of 2^53', [...structured, info(infoExport(1n << 53n, 1))], 'protocol', /not possible/],
    [
      'a reply of 4 GiB',
      [greeting(), Buffer.concat([optionReply(STRUCTURED_REPLY, ACK).subarray(0, 16), u32(0xffffffff)])],
      'protocol',
      /too long/,
    ],
    [
      'bytes behind the end',
      [...structured, Buffer.concat([basics, optionReply(GO, ACK), Buffer.alloc(1)])],
      'protocol',
      /more than/,
    ],
    [
      'a context nobody asked for',
      [...structured, context(1, 'x:z')],
      'protocol',
      /not asked for/,
      { contexts: ['x:y'] },
    ],
    [
      'a context twice',
      [...structured, Buffer.concat([context(1, 'x:y'), context(2, 'x:y')])],
      'protocol',
      /twice/,
      { contexts: ['x:y'] },
    ],
    [
      'two contexts with one id',
      [...structured, Buffer.concat([context(1, 'x:y'), context(1, 'x:z')])],
      'protocol',
      /id 1/,
      { contexts: ['x:y', 'x:z'] },
    ],
  ];
  for (const [what, messages, code, why, wish, secure] of cases) {
    it(what, () => {
      const handshake = new ClientHandshake(goal(wish), secure);
      assert.throws(() => converse(handshake, messages), fails(code, why));
    });
  }

  it('a list that does not end', () => {
    const handshake = new ClientHandshake({ kind: 'list' });
    handshake.receive(greeting());
    const many = Buffer.concat(
      new Array(15).fill(optionReply(LIST, SERVER, Buffer.concat([u32(4096), Buffer.alloc(8192, 65)]))),
    );
    assert.throws(
      () => {
        for (;;) handshake.receive(many);
      },
      fails('protocol', /does not end/),
    );
  });
});
