/**
 * Every way in which a proxy's source goes wrong, by name: the list that test/fakes/source.test.ts goes through.
 *
 * Those who hang still hang when the source is good again: it is the proxy that must give them up.
 */

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { link, writeFile } from 'node:fs/promises';
import net from 'node:net';
import { setTimeout as delay } from 'node:timers/promises';
import { Command, Errno, TransmissionFlag } from '../../src/nbd/constants.js';
import { describeVolume } from '../../src/relocation/source-identity.js';
import { BAD_HANDSHAKES } from './bad-handshakes.js';
import { BAD_READ_REPLIES, BAD_STATUS_REPLIES } from './bad-replies.js';
import {
  ALL_FLAGS,
  chunk,
  dataChunk,
  doneChunk,
  errorChunk,
  type FakeExport,
  type FakePeer,
  type FakeRequest,
  optionReply,
  simpleReply,
  statusChunk,
  u32,
} from './fake-server.js';
import { type BadSource, DESCRIPTION, type FakeSource, type Script } from './fake-source.js';

const LIE = 0xbd;
/** Between the pieces of what comes slowly. */
const SLOW_MS = 20;

/** A good handshake, then `script` for READs; the rest is answered well. */
function reading(script: Script, changes: FakeExport = {}): NonNullable<BadSource['serve']> {
  return async (peer, source) => {
    const met = await source.meet(peer, changes);
    await source.serve(met, (to, request) =>
      (request.command === Command.READ ? script : source.honest)(to, request, source),
    );
  };
}

const lost = (
  name: string,
  tells: RegExp,
  serve: BadSource['serve'],
  more: Partial<BadSource> = {},
): BadSource => ({ name, outcome: 'lost', tells, ...(serve === undefined ? {} : { serve }), ...more });

const served = (name: string, serve: BadSource['serve'], more: Partial<BadSource> = {}): BadSource => ({
  name,
  outcome: 'served',
  ...(serve === undefined ? {} : { serve }),
  ...more,
});

const failing = (name: string, script: Script): BadSource => ({
  name,
  outcome: 'failing',
  serve: reading(script),
});

const HANDSHAKES: readonly BadSource[] = BAD_HANDSHAKES.map(({ name, script, why }) =>
  lost(name, why, script),
);

const REPLIES: readonly BadSource[] = BAD_READ_REPLIES.map(([what, answer, why, wish]) =>
  lost(
    `answers READ with ${what}`,
    why,
    reading((peer, request) => peer.send(...answer(request, peer)), wish),
  ),
);

/** The copy goes on without knowing what is allocated. */
const STATUSES: readonly BadSource[] = BAD_STATUS_REPLIES.map(([what, answer, , wish]) =>
  served(
    `answers BLOCK_STATUS with ${what}`,
    async (peer, source) => {
      const contexts = wish?.contexts?.slice(0, 1) ?? [[5, 'base:allocation'] as const];
      const met = await source.meet(peer, { contexts });
      await source.serve(met, (to, request) =>
        request.command === Command.BLOCK_STATUS
          ? to.send(...answer(request, to))
          : source.honest(to, request, source),
      );
    },
    { background: true },
  ),
);

/** Answers BLOCK_STATUS with `extents`, READ with the truth. */
function claiming(
  name: string,
  extents: (request: FakeRequest, source: FakeSource) => (readonly [number, number])[],
): BadSource {
  const script: Script = (peer, request, source) =>
    request.command === Command.BLOCK_STATUS
      ? peer.send(statusChunk(request.cookie, 5, extents(request, source), true))
      : source.honest(peer, request, source);
  const serve: BadSource['serve'] = async (peer, source) => source.serve(await source.meet(peer), script);
  return served(name, serve, { background: true });
}

const CLAIMS: readonly BadSource[] = [
  claiming('says of all that it is a hole, not that it is zero', ({ length }) => [[length, 1]]),
  claiming('has flags of its own in its block status', ({ length }) => [[length, 0xfffffffc]]),
  claiming('says that what lies behind its end is zero', ({ length }) => [
    [length - 1, 0],
    [0xffffffff, 3],
  ]),
  claiming('tells its status a byte at a time', () => [[1, 0]]),
  served(
    'never answers BLOCK_STATUS',
    async (peer, source) => {
      await source.serve(await source.meet(peer), (to, request) => {
        if (request.command !== Command.BLOCK_STATUS) void source.honest(to, request, source);
      });
    },
    { background: true },
  ),
  served(
    'answers BLOCK_STATUS with an error',
    async (peer, source) => {
      await source.serve(await source.meet(peer), (to, request) =>
        request.command === Command.BLOCK_STATUS
          ? to.send(errorChunk(request.cookie, Errno.EINVAL))
          : source.honest(to, request, source),
      );
    },
    { background: true },
  ),
];

const whole = ({ cookie, offset, length }: FakeRequest): Buffer =>
  dataChunk(cookie, offset, Buffer.alloc(length, LIE), true);

const TRANSMISSION: readonly BadSource[] = [
  lost('hangs up behind the handshake', /hung up|reset|EPIPE/, async (peer, source) => {
    (await source.meet(peer)).hangUp();
  }),
  lost(
    'hangs up instead of answering',
    /hung up|reset/,
    reading((peer) => peer.hangUp()),
  ),
  ...(
    [
      ['within the header of a reply', () => 7],
      ['behind the header of a reply', () => 20],
      ['within the data', (length: number) => length - 100],
      ['before the last byte', (length: number) => length - 1],
    ] as const
  ).map(([where, bytes]) =>
    lost(
      `hangs up ${where}`,
      /hung up|reset/,
      reading((peer, request) => {
        const reply = whole(request);
        peer.send(reply.subarray(0, bytes(reply.length)));
        peer.hangUp();
      }),
    ),
  ),
  lost(
    'hangs up behind all data, before the end of the reply',
    /hung up|reset/,
    reading((peer, { cookie, offset, length }) => {
      peer.send(dataChunk(cookie, offset, Buffer.alloc(length, LIE)));
      peer.hangUp();
    }),
  ),
  lost(
    'resets the connection in the middle of the data',
    /ECONNRESET|hung up/,
    reading(async (peer, request) => {
      const reply = whole(request);
      peer.send(reply.subarray(0, reply.length >> 1));
      await delay(SLOW_MS);
      peer.reset();
    }),
    { over: 'tcp' },
  ),
  lost('resets the connection in the handshake', /ECONNRESET|hung up/, async (peer) => peer.reset(), {
    over: 'tcp',
  }),
  lost(
    'never answers',
    /did not answer READ/,
    reading(() => {}),
  ),
  lost('reads nothing', /did not answer READ/, async (peer, source) => {
    (await source.meet(peer)).socket.pause();
  }),
  lost(
    'stops in the middle of the data',
    /did not answer READ/,
    reading((peer, request) => peer.send(whole(request).subarray(0, 2000))),
  ),
  lost(
    'lets its data drip byte by byte',
    /did not answer READ/,
    reading(async (peer, request) => {
      for (const byte of whole(request)) {
        peer.send(Buffer.of(byte));
        await delay(SLOW_MS);
        if (peer.socket.destroyed) return;
      }
    }),
  ),
  lost(
    'answers in crumbs that never make a whole',
    /did not answer READ/,
    reading(async (peer, { cookie, offset, length }) => {
      // A byte of data in a chunk of its own, each time another one, and never the last.
      for (let at = 0; at < length - 1; at += 2) {
        peer.send(dataChunk(cookie, offset + at, Buffer.of(LIE)));
        await delay(SLOW_MS);
        if (peer.socket.destroyed) return;
      }
    }),
  ),
  lost('sends replies nobody asked for, without end', /magic|cookie/, async (peer, source) => {
    const met = await source.meet(peer);
    while (!met.socket.destroyed) {
      met.send(Buffer.concat(Array.from({ length: 1000 }, (_, at) => simpleReply(BigInt(at)))));
      await delay(1);
    }
  }),
  lost(
    'is shutting down, for ever',
    /shutting down/,
    reading((peer, { cookie }) => peer.send(errorChunk(cookie, Errno.ESHUTDOWN, 'going down'))),
  ),
  failing('fails every READ', (peer, { cookie }) => peer.send(errorChunk(cookie, Errno.EIO, 'bad disk'))),
  failing('fails every READ, with an error nobody knows', (peer, { cookie }) =>
    peer.send(errorChunk(cookie, 0xdeadbeef, 'what?\n'.repeat(100))),
  ),
  failing('fails behind most of the data', (peer, { cookie, offset, length }) =>
    peer.send(dataChunk(cookie, offset, Buffer.alloc(length - 512, LIE)), errorChunk(cookie, Errno.EIO)),
  ),
  failing('fails behind all of the data', (peer, { cookie, offset, length }) =>
    peer.send(dataChunk(cookie, offset, Buffer.alloc(length, LIE)), errorChunk(cookie, Errno.ENOMEM)),
  ),
  failing('fails in an unknown way behind the data', (peer, { cookie, offset, length }) =>
    peer.send(
      dataChunk(cookie, offset, Buffer.alloc(length, LIE)),
      chunk(cookie, 0xffff, Buffer.concat([u32(5), Buffer.from([0, 2]), Buffer.from('hm????')]), {
        done: true,
      }),
    ),
  ),
];

const UNUSUAL: readonly BadSource[] = [
  served('answers the last request first, in pieces that alternate', reading(shuffled)),
  served(
    'answers with one chunk for every 512 bytes, backwards',
    reading((peer, { cookie, offset, length }, { data }) => {
      for (let at = length; at > 0; ) {
        const bytes = at % 512 || 512;
        at -= bytes;
        peer.send(dataChunk(cookie, offset + at, data.subarray(offset + at, offset + at + bytes)));
      }
      peer.send(doneChunk(cookie));
    }),
  ),
  served(
    'answers slowly',
    reading(async (peer, request, source) => {
      await delay(SLOW_MS);
      await source.honest(peer, request, source);
    }),
  ),
  served(
    'answers twice, so that each connection is good for one answer',
    reading((peer, { cookie, offset, length }, { data }) => {
      const answer = dataChunk(cookie, offset, data.subarray(offset, offset + length), true);
      peer.send(answer, answer);
    }),
  ),
  served('is read-only now', reading(honestly, { flags: ALL_FLAGS | TransmissionFlag.READ_ONLY })),
  served('offers nothing but READ now', reading(honestly, { flags: TransmissionFlag.HAS_FLAGS })),
  served('sets flags nobody knows', reading(honestly, { flags: 0xffff & ~TransmissionFlag.CAN_MULTI_CONN })),
  served(
    'allows several connections now',
    reading(honestly, { flags: ALL_FLAGS | TransmissionFlag.CAN_MULTI_CONN }),
  ),
  served(
    'has simple replies only now',
    reading(
      (peer, { cookie, offset, length }, { data }) =>
        peer.send(simpleReply(cookie, 0, data.subarray(offset, offset + length))),
      { structured: false },
    ),
  ),
  served('has larger blocks now', reading(honestly, { blockSize: [4096, 65_536, 65_536] })),
];

function honestly(peer: FakePeer, request: FakeRequest, source: FakeSource): void {
  void source.honest(peer, request, source);
}

/** Holds each READ a moment; what came meanwhile is answered first. */
function shuffled(peer: FakePeer, { cookie, offset, length }: FakeRequest, { data }: FakeSource): void {
  const half = length >> 1;
  const late = (): void => {
    peer.send(dataChunk(cookie, offset + half, data.subarray(offset + half, offset + length)));
    setImmediate(() => peer.send(dataChunk(cookie, offset, data.subarray(offset, offset + half), true)));
  };
  if (length > 4096) void delay(5).then(late);
  else late();
}

const OTHER_DISKS: readonly BadSource[] = (
  [
    ['is larger now', { size: 1n << 30n }, /its size is \d+ bytes, not/],
    ['is smaller now', { size: 4096n }, /its size is 4096 bytes, not/],
    ['is empty now', { size: 0n }, /its size is 0 bytes, not/],
    ['is another volume now', { description: describeVolume('other', 7) }, /and is 'blockferry volume other/],
    [
      'is of another generation now',
      { description: DESCRIPTION.replace(/7$/, '8') },
      /generation 7' and is .*generation 8'/,
    ],
    ['does not say any more which volume it is', { description: '' }, /and is ''/],
    ['has blocks its size does not fit', { blockSize: [1 << 16, 1 << 16, 1 << 20] }, /no multiple/],
  ] as const
).map(([name, changes, tells]) =>
  lost(
    name,
    tells,
    reading((peer, request) => peer.send(whole(request)), changes as FakeExport),
    { state: 'mismatch' },
  ),
);

/** What happens in place of TLS, or in it. */
const TLS: readonly BadSource[] = (
  [
    [
      'offers no TLS any more',
      /offers no TLS/,
      async (peer, source) => {
        await source.greet(peer);
        peer.send(optionReply(5, 0x80000001));
      },
    ],
    [
      'sends garbage in place of TLS',
      /TLS failed|hung up/,
      async (peer, source) => {
        await source.greet(peer);
        peer.send(optionReply(5, 1));
        peer.send(Buffer.alloc(2000, 0x55));
      },
    ],
    [
      'goes on in clear text behind STARTTLS',
      /more than it was asked|TLS failed/,
      async (peer, source) => {
        await source.greet(peer);
        peer.send(optionReply(5, 1));
        await source.serve(peer, source.honest);
      },
    ],
    [
      'hangs in the middle of TLS',
      /TLS did not come/,
      async (peer, source) => {
        await source.greet(peer);
        peer.send(optionReply(5, 1));
      },
    ],
    [
      'hangs up in the middle of TLS',
      /hung up|TLS failed|disconnected/,
      async (peer, source) => {
        await source.greet(peer);
        peer.send(optionReply(5, 1));
        await peer.read(1);
        peer.hangUp();
      },
    ],
    ['has a certificate of another authority now', /no authority we trust/, withCertificateOf('stranger')],
    ['has an expired certificate now', /expired/, withCertificateOf('expired')],
    ['has a certificate of another name now', /altnames/, withCertificateOf('elsewhere')],
    [
      'hangs up in a session over TLS',
      /hung up|reset/,
      reading((peer, request) => {
        peer.send(whole(request).subarray(0, 1000));
        peer.hangUp();
      }),
    ],
    [
      'damages what it sends over TLS',
      /what came was no TLS/,
      async (peer, source) => {
        const { socket } = peer;
        const met = await source.meet(peer);
        await met.request();
        socket.write(Buffer.alloc(500, 0x17)); // below TLS
      },
    ],
    ['hangs in a session over TLS', /did not answer READ/, reading(() => {})],
  ] as [string, RegExp, NonNullable<BadSource['serve']>][]
).map(([name, tells, serve]) => lost(name, tells, serve, { over: 'tls' }));

function withCertificateOf(of: 'stranger' | 'expired' | 'elsewhere'): NonNullable<BadSource['serve']> {
  return async (peer, source) => {
    await source.greet(peer);
    await peer.secured(source.credentials(of)).gone;
  };
}

/** Listens with a queue of `backlog` connections, and never takes one out of it. */
function neverAccepts(backlog: number): NonNullable<BadSource['instead']> {
  const script = `import socket,sys
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen(int(sys.argv[2]))
print('listening', flush=True)
sys.stdin.read()`;
  return async ({ path }) => {
    const child = spawn('setpriv', [
      ...['--pdeathsig', 'KILL', '--', '/usr/bin/python3', '-c', script, path, String(backlog)],
    ]);
    await once(child.stdout, 'data');
    return async () => {
      child.kill('SIGKILL');
      await once(child, 'exit');
    };
  };
}

const ABSENT: readonly BadSource[] = [
  lost('is gone', /no such socket/, undefined, { instead: async () => async () => {} }),
  lost('listens but never accepts', /its greeting did not come|EAGAIN/, undefined, {
    instead: neverAccepts(100),
  }),
  lost('listens with a full queue', /its greeting did not come|EAGAIN/, undefined, {
    instead: neverAccepts(0),
  }),
  lost('left its socket behind', /nobody listens there/, undefined, {
    instead: async ({ path }) => {
      // A socket file that nobody has open: bound by a server that does not remove it.
      const server = net.createServer();
      await new Promise<void>((resolve) => server.listen(`${path}.bound`, resolve));
      await link(`${path}.bound`, path);
      await new Promise((resolve) => server.close(resolve));
      return async () => {};
    },
  }),
  lost('became a file', /nobody listens there|ENOTSOCK/, undefined, {
    instead: async ({ path }) => {
      await writeFile(path, 'not a socket');
      return async () => {};
    },
  }),
];

export const BAD_SOURCES: readonly BadSource[] = [
  ...HANDSHAKES,
  ...REPLIES,
  ...TRANSMISSION,
  ...OTHER_DISKS,
  ...ABSENT,
  ...TLS,
  ...STATUSES,
  ...CLAIMS,
  ...UNUSUAL,
];
