/** Servers that go wrong while a client connects, by name, and what is said of them. The client asks for `base:allocation`. */

import type { ErrorCode } from '../../src/errors.js';
import { Option, OptionReply } from '../../src/nbd/constants.js';
import { ALL_FLAGS, type FakePeer, greeting, infoExport, optionReply, u16, u32, u64 } from './fake-server.js';

export interface BadHandshake {
  readonly name: string;
  /** Resolves when it is done with the client, whom it may leave waiting. */
  readonly script: (peer: FakePeer) => Promise<void>;
  readonly code: ErrorCode;
  readonly why: RegExp;
}

const SIZE = 1n << 20n;
const CONTEXT = Buffer.concat([u32(5), Buffer.from('base:allocation')]);
const INFO = infoExport(SIZE, ALL_FLAGS);

/** Past greeting and flags. */
async function greeted(peer: FakePeer): Promise<void> {
  peer.send(greeting());
  await peer.read(4);
}

/** Takes the next option and answers it. */
async function answer(peer: FakePeer, type: number = OptionReply.ACK, payload?: Buffer): Promise<void> {
  const { option } = await peer.readOption();
  peer.send(optionReply(option, type, payload));
}

/** As a server that has no extended headers. */
async function compact(peer: FakePeer): Promise<void> {
  await greeted(peer);
  await answer(peer, OptionReply.ERR_UNSUP);
}

async function structured(peer: FakePeer): Promise<void> {
  await compact(peer);
  await answer(peer);
}

async function contexts(peer: FakePeer): Promise<void> {
  await structured(peer);
  await answer(peer, OptionReply.META_CONTEXT, CONTEXT);
  peer.send(optionReply(Option.SET_META_CONTEXT, OptionReply.ACK));
}

/** Places in a handshake done well so far, and what the client waits for there. */
const STAGES: readonly (readonly [name: string, upTo: (peer: FakePeer) => Promise<void>, waits: RegExp])[] = [
  ['before its greeting', async () => {}, /its greeting/],
  ['within its greeting', async (peer) => peer.send(greeting().subarray(0, 9)), /its greeting/],
  ['behind its greeting', async (peer) => peer.send(greeting()), /its answer to EXTENDED_HEADERS/],
  [
    'when asked for extended headers',
    async (peer) => {
      await greeted(peer);
      await peer.readOption();
    },
    /its answer to EXTENDED_HEADERS/,
  ],
  [
    'when asked for structured replies',
    async (peer) => {
      await compact(peer);
      await peer.readOption();
    },
    /its answer to STRUCTURED_REPLY/,
  ],
  ['behind its ACK to structured replies', structured, /its answer to SET_META_CONTEXT/],
  [
    'between a context and its ACK',
    async (peer) => {
      await structured(peer);
      await answer(peer, OptionReply.META_CONTEXT, CONTEXT);
    },
    /its answer to SET_META_CONTEXT/,
  ],
  ['behind its ACK to the contexts', contexts, /its answer to GO/],
  [
    'within the export’s size',
    async (peer) => {
      await contexts(peer);
      await peer.readOption();
      peer.send(optionReply(Option.GO, OptionReply.INFO, INFO).subarray(0, 25));
    },
    /its answer to GO/,
  ],
  [
    'between the export’s size and the ACK',
    async (peer) => {
      await contexts(peer);
      await answer(peer, OptionReply.INFO, INFO);
    },
    /its answer to GO/,
  ],
];

/** What breaks off comes to an end at once, or never. */
const BREAKS: readonly BadHandshake[] = STAGES.flatMap(([stage, upTo, waits]): BadHandshake[] => [
  {
    name: `hangs up ${stage}`,
    script: async (peer) => {
      await upTo(peer);
      peer.hangUp();
    },
    code: 'closed',
    why: waits,
  },
  { name: `hangs ${stage}`, script: upTo, code: 'timeout', why: waits },
]);

/** Sends one thing behind a good greeting, in place of its first answer. */
function says(name: string, bytes: Buffer, why: RegExp, code: ErrorCode = 'protocol'): BadHandshake {
  const script = async (peer: FakePeer): Promise<void> => {
    await compact(peer);
    await peer.readOption();
    peer.send(bytes);
    peer.hangUp();
  };
  return { name, script, code, why };
}

/** Refuses every option with one error. */
function refuses(name: string, error: number, why: RegExp, code: ErrorCode): BadHandshake {
  const script = async (peer: FakePeer): Promise<void> => {
    await greeted(peer);
    for (;;) await answer(peer, error);
  };
  return { name, script, code, why };
}

/** Answers GO with what it is given, after an honest start. */
function goes(name: string, replies: readonly Buffer[], why: RegExp): BadHandshake {
  const script = async (peer: FakePeer): Promise<void> => {
    await contexts(peer);
    await peer.readOption();
    peer.send(...replies);
    peer.hangUp();
  };
  return { name, script, code: 'protocol', why };
}

const info = (payload: Buffer): Buffer => optionReply(Option.GO, OptionReply.INFO, payload);
const ack = (option: number): Buffer => optionReply(option, OptionReply.ACK);

/** Sends `part` again and again, as fast as it is taken. */
async function floods(peer: FakePeer, part: Buffer): Promise<void> {
  const many = Buffer.concat(Array.from({ length: Math.ceil(65_536 / part.length) }, () => part));
  let over = false;
  void peer.gone.then(() => {
    over = true;
  });
  while (!over) {
    if (!peer.socket.write(many))
      await Promise.race([new Promise((resolve) => peer.socket.once('drain', resolve)), peer.gone]);
  }
}

/** A busy machine may need more time for so many bytes than a handshake has. */
const FLOOD = /does not end|did not come within/;

const CONFUSED: readonly BadHandshake[] = [
  {
    name: 'is no NBD server',
    script: async (peer) => peer.send(Buffer.from('220 mail.example.com ESMTP\r\n')),
    code: 'protocol',
    why: /not an NBD/,
  },
  {
    name: 'speaks oldstyle NBD',
    script: async (peer) =>
      peer.send(u64(0x4e42444d41474943n), u64(0x00420281861253n), u64(SIZE), Buffer.alloc(128)),
    code: 'protocol',
    why: /oldstyle/,
  },
  {
    name: 'greets with a wrong second magic',
    script: async (peer) => peer.send(u64(0x4e42444d41474943n), u64(1), u16(3)),
    code: 'protocol',
    why: /wrong magic/,
  },
  {
    name: 'hangs up on EXPORT_NAME, for it has no such export',
    script: async (peer) => {
      peer.send(greeting(0));
      await peer.read(4);
      await peer.readOption();
      peer.hangUp();
    },
    code: 'closed',
    why: /no such export/,
  },
  {
    name: 'sends its answer byte by byte, for ever',
    script: async (peer) => {
      await compact(peer);
      await peer.readOption();
      const whole = optionReply(Option.STRUCTURED_REPLY, OptionReply.ERR_UNSUP, Buffer.alloc(4000, 0x41));
      for (const byte of whole) {
        peer.send(Buffer.of(byte));
        await Promise.race([new Promise((resolve) => setTimeout(resolve, 5)), peer.gone]);
        if (peer.socket.destroyed) return;
      }
    },
    code: 'timeout',
    why: /did not come/,
  },
  says('sends an option reply with a wrong magic', Buffer.alloc(20, 0x11), /wrong magic/),
  says('answers another option than it was asked', ack(Option.GO), /answered GO instead/),
  says(
    'announces an option reply of 4 GiB',
    Buffer.concat([
      u64(0x0003e889045565a9n),
      u32(Option.STRUCTURED_REPLY),
      u32(OptionReply.ERR_UNSUP),
      u32(0xffffffff),
    ]),
    /too long/,
  ),
  says(
    'acknowledges with data',
    optionReply(Option.STRUCTURED_REPLY, OptionReply.ACK, u32(1)),
    /ACK with data/,
  ),
  says('answers with an unknown kind of reply', optionReply(Option.STRUCTURED_REPLY, 77), /type 77/),
  says(
    'answers before it is asked',
    Buffer.concat([ack(Option.STRUCTURED_REPLY), ack(Option.SET_META_CONTEXT)]),
    /more than it was asked/,
  ),
  refuses('refuses every option, and EXPORT_NAME too', OptionReply.ERR_UNSUP, /lack HAS_FLAGS/, 'protocol'),
  refuses('refuses every option: policy', OptionReply.ERR_POLICY, /refused GO \(ERR_POLICY\)/, 'source-io'),
  refuses('refuses every option: invalid', OptionReply.ERR_INVALID, /refused GO/, 'source-io'),
  refuses('refuses every option: TLS first', OptionReply.ERR_TLS_REQD, /demands TLS/, 'source-unreachable'),
  refuses(
    'refuses every option: unknown export',
    OptionReply.ERR_UNKNOWN,
    /(no export|refused STRUCTURED)/,
    'not-found',
  ),
  refuses(
    'refuses every option: shutting down',
    OptionReply.ERR_SHUTDOWN,
    /shutting down/,
    'source-unreachable',
  ),
  refuses(
    'refuses every option: an unknown error',
    0x80001234,
    /refused GO \(error 0x80001234\)/,
    'source-io',
  ),
  goes('acknowledges GO without the export’s size', [ack(Option.GO)], /without INFO_EXPORT/),
  goes('tells the size twice', [info(INFO), info(INFO), ack(Option.GO)], /comes twice/),
  goes('has an export of 2^64-1 bytes', [info(infoExport(2n ** 64n - 1n, ALL_FLAGS))], /is not possible/),
  goes('has an export without flags', [info(infoExport(SIZE, 0))], /flags/i),
  goes('tells half a size', [info(INFO.subarray(0, 7))], /./),
  goes('has blocks of 3 bytes', [info(INFO), info(Buffer.concat([u16(3), u32(3), u32(7), u32(1)]))], /./),
  {
    name: 'grants a context nobody asked for',
    script: async (peer) => {
      await structured(peer);
      await answer(peer, OptionReply.META_CONTEXT, Buffer.concat([u32(9), Buffer.from('x:y')]));
    },
    code: 'protocol',
    why: /'x:y' was not asked for/,
  },
  {
    name: 'grants a context twice',
    script: async (peer) => {
      await structured(peer);
      await answer(peer, OptionReply.META_CONTEXT, CONTEXT);
      peer.send(optionReply(Option.SET_META_CONTEXT, OptionReply.META_CONTEXT, CONTEXT));
    },
    code: 'protocol',
    why: /comes twice/,
  },
  {
    name: 'tells endless names of the export',
    script: async (peer) => {
      await contexts(peer);
      await peer.readOption();
      await floods(peer, info(Buffer.concat([u16(1), Buffer.alloc(4000, 0x61)])));
    },
    code: 'protocol',
    why: FLOOD,
  },
  {
    name: 'tells endless unknown facts of the export',
    script: async (peer) => {
      await contexts(peer);
      await peer.readOption();
      await floods(peer, info(Buffer.concat([u16(4711), Buffer.alloc(4000)])));
    },
    code: 'protocol',
    why: FLOOD,
  },
  {
    name: 'sends bytes behind the end of the handshake',
    script: async (peer) => {
      await contexts(peer);
      await peer.readOption();
      peer.send(info(INFO), ack(Option.GO), Buffer.alloc(16));
    },
    code: 'protocol',
    why: /more than it was asked/,
  },
];

export const BAD_HANDSHAKES: readonly BadHandshake[] = [...BREAKS, ...CONFUSED];

/** Servers that go wrong when asked for their exports. */
export const BAD_LISTS: readonly BadHandshake[] = [
  {
    name: 'lists exports without end',
    script: async (peer) => {
      await greeted(peer);
      const { option } = await peer.readOption();
      const name = Buffer.alloc(4000, 0x6e);
      await floods(peer, optionReply(option, OptionReply.SERVER, Buffer.concat([u32(4000), name])));
    },
    code: 'protocol',
    why: FLOOD,
  },
  {
    name: 'lists a name longer than its reply',
    script: async (peer) => {
      await greeted(peer);
      await answer(peer, OptionReply.SERVER, u32(100));
    },
    code: 'protocol',
    why: /./,
  },
  {
    name: 'hangs within its list',
    script: async (peer) => {
      await greeted(peer);
      await answer(peer, OptionReply.SERVER, Buffer.concat([u32(1), Buffer.from('n')]));
    },
    code: 'timeout',
    why: /its answer to LIST/,
  },
];
