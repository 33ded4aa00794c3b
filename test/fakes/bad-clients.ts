/**
 * Every way in which a client goes wrong, by name: the list that test/fakes/clients.test.ts goes through.
 *
 * A bad client may do as it likes with BAD of the disk. LOST is missing, and the source is gone: what asks for it waits. Nobody may
 * change KEPT, so that is where requests go that must not be carried out.
 */

import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import tls from 'node:tls';
import { Command, CommandFlag, Info, Option } from '../../src/nbd/constants.js';
import { clientFlags, infoData, metaData, option } from '../support/handshake.js';
import { type RawClient, within } from '../support/raw-client.js';
import { ACK_BYTES, type Place } from './place.js';
import { encodeRequest, type RawRequest } from './raw-client.js';

const MIB = 1 << 20;
export const SIZE = 32 * MIB;
/** The well-behaved guest's own. */
export const GOOD = { offset: 0, length: MIB };
export const KEPT = { offset: MIB, length: 3 * MIB };
export const BAD = { offset: 4 * MIB, length: 4 * MIB };
export const LOST = { offset: 8 * MIB, length: 24 * MIB };

const PAYLOAD = Buffer.alloc(4096, 0x66);

export interface BadClient {
  readonly name: string;
  /** Resolves when it has done what it does; what it left open is closed then. */
  readonly play: (place: Place) => Promise<void>;
}

/** The server closes, at the latest when the time for a handshake is up. */
async function cutOff(client: RawClient, { handshakeTimeoutMs }: Place): Promise<void> {
  const began = performance.now();
  await client.receiveAll();
  const took = performance.now() - began;
  if (took > handshakeTimeoutMs + 3000) throw new Error(`cut off only after ${took} ms`);
}

const requests = (count: number, request: (cookie: number) => Omit<RawRequest, 'cookie'>): Buffer =>
  Buffer.concat(Array.from({ length: count }, (_, cookie) => encodeRequest({ cookie, ...request(cookie) })));

const read = (offset: number, length: number) => ({ command: Command.READ, offset, length });
const write = (offset: number, payload = PAYLOAD) => ({ command: Command.WRITE, offset, payload });
/** READs of single blocks that are missing, all different. */
const missing = (count: number, from = 0): Buffer =>
  requests(count, (cookie) => read(LOST.offset + (((from + cookie) * 4096) % LOST.length), 512));

const bad = (name: string, play: BadClient['play']): BadClient => ({ name, play });

/** Sends `bytes` of a handshake, and is gone; or says no more. */
const STAGES: readonly (readonly [name: string, bytes: Buffer])[] = [
  ['its connection', Buffer.alloc(0)],
  ['half of its flags', clientFlags().subarray(0, 2)],
  ['its flags', clientFlags()],
  ['half an option', Buffer.concat([clientFlags(), option(Option.LIST).subarray(0, 11)])],
  ['the head of an option', Buffer.concat([clientFlags(), option(Option.GO, infoData('')).subarray(0, 16)])],
  ['asking for the list', Buffer.concat([clientFlags(), option(Option.LIST)])],
  ['structured replies', Buffer.concat([clientFlags(), option(Option.STRUCTURED_REPLY)])],
  [
    'a context',
    Buffer.concat([
      clientFlags(),
      option(Option.STRUCTURED_REPLY),
      option(Option.SET_META_CONTEXT, metaData('', ['base:allocation'])),
    ]),
  ],
  ['INFO', Buffer.concat([clientFlags(), option(Option.INFO, infoData('', [Info.NAME, Info.BLOCK_SIZE]))])],
];

const HANDSHAKES: readonly BadClient[] = [
  ...STAGES.flatMap(([stage, bytes]): BadClient[] => [
    bad(`hangs up behind ${stage}`, async (place) => {
      const client = await place.connect();
      client.send(bytes);
      client.close();
    }),
    bad(`says no more behind ${stage}`, async (place) => {
      const client = await place.connect();
      client.send(bytes);
      await cutOff(client, place);
    }),
  ]),
  bad('hangs up behind GO', async (place) => (await place.entered()).close()),
  bad('closes its side at once, and waits', async (place) => {
    const client = await place.connect();
    client.socket.end();
    await cutOff(client, place);
  }),
  bad('resets its connection, a hundred times', async (place) => {
    for (let i = 0; i < 100; i++) {
      const client = await place.connect('tcp');
      client.send(clientFlags().subarray(0, i % 5));
      client.socket.resetAndDestroy();
    }
  }),
  bad('is two hundred clients that say nothing', async (place) => {
    const clients = await Promise.all(Array.from({ length: 200 }, () => place.connect()));
    for (const client of clients) client.close();
  }),
  bad('says its handshake byte by byte', async (place) => {
    const client = await place.connect();
    for (const byte of Buffer.concat([clientFlags(), option(Option.GO, infoData(''.padEnd(4000, 'x')))])) {
      client.send(Buffer.of(byte));
      await delay(10);
      if (client.socket.readableEnded || client.socket.destroyed) return;
    }
    throw new Error('it was let go on');
  }),
  ...(
    [
      ['is a browser', Buffer.from('GET / HTTP/1.1\r\nHost: disk\r\nAccept: */*\r\n\r\n')],
      ['sets flags nobody knows', clientFlags(0xffffffff)],
      ['sends an option with a wrong magic', Buffer.concat([clientFlags(), Buffer.alloc(16, 0x13)])],
      [
        'announces an option of 4 GiB',
        Buffer.concat([clientFlags(), option(Option.GO).subarray(0, 12), Buffer.alloc(4, 0xff)]),
      ],
      [
        'wants an export there is not, by EXPORT_NAME',
        Buffer.concat([clientFlags(), option(1, Buffer.from('no'))]),
      ],
      ['floods options', Buffer.concat([clientFlags(), ...Array<Buffer>(2000).fill(option(Option.LIST))])],
      [
        'floods options nobody knows',
        Buffer.concat([clientFlags(), ...Array<Buffer>(2000).fill(option(0x7777, Buffer.alloc(100)))]),
      ],
      ['begins with TLS', Buffer.from('16030102000100', 'hex')],
    ] as const
  ).map(([name, bytes]) =>
    bad(name, async (place) => {
      const client = await place.connect();
      client.send(bytes);
      await cutOff(client, place);
    }),
  ),
  bad('floods options and reads no answer', async (place) => {
    const client = await place.connect();
    client.socket.pause();
    client.send(clientFlags(), ...Array<Buffer>(100_000).fill(option(Option.LIST)));
    await delay(50);
  }),
  bad('announces an option of 30 MiB and sends it', async (place) => {
    const client = await place.greeted();
    client.send(option(Option.GO, Buffer.alloc(30 * MIB)));
    await client.receive(ACK_BYTES);
  }),
  bad('asks for thousands of contexts', async (place) => {
    const client = await place.greeted();
    client.send(option(Option.STRUCTURED_REPLY));
    client.send(option(Option.SET_META_CONTEXT, metaData('', Array<string>(5000).fill('x:y'))));
    await client.receive(2 * ACK_BYTES);
  }),
  bad('haggles anew each time it has what it wants', async (place) => {
    const client = await place.greeted();
    for (let i = 0; i < 5; i++) {
      client.send(option(Option.STRUCTURED_REPLY));
      client.send(option(Option.SET_META_CONTEXT, metaData('', ['base:allocation'])));
      client.send(option(Option.SET_META_CONTEXT, metaData('no such export', ['base:allocation'])));
    }
    client.send(option(Option.GO, infoData('')));
    // The context was lost with the last attempt: a status is refused, not answered.
    client.send(encodeRequest({ command: Command.BLOCK_STATUS, cookie: 1, length: 4096 }));
    await client.receive(15 * ACK_BYTES);
  }),
  bad('gives up with ABORT, and goes on', async (place) => {
    const client = await place.greeted();
    client.send(
      option(Option.ABORT),
      option(Option.GO, infoData('')),
      requests(9, () => write(KEPT.offset)),
    );
    await client.receiveAll();
  }),
];

/** Sends `bytes` in transmission; it must be cut off. */
const confused = (name: string, ...bytes: Buffer[]): BadClient =>
  bad(name, async (place) => {
    const client = await place.entered();
    client.send(...bytes);
    await client.receiveAll();
  });

/** Sends `bytes` in transmission, and is gone. */
const gone = (name: string, bytes: () => Buffer, how: 'close' | 'reset' | 'end' = 'close'): BadClient =>
  bad(name, async (place) => {
    const client = await place.entered(how === 'reset' ? 'tcp' : 'unix');
    client.socket.pause();
    const sent = new Promise((resolve) => client.socket.write(bytes(), resolve));
    await Promise.race([sent, delay(50)]);
    if (how === 'reset') client.socket.resetAndDestroy();
    else if (how === 'close') client.close();
    else {
      client.socket.end();
      client.socket.resume();
      await client.receiveAll();
    }
  });

/** Sends `count` requests and expects an error for each: 16 bytes. */
const refused = (name: string, count: number, bytes: Buffer): BadClient =>
  bad(name, async (place) => {
    const client = await place.entered();
    client.send(bytes);
    const replies = await client.receive(16 * count);
    for (let at = 0; at < replies.length; at += 16)
      if (replies.readUInt32BE(at + 4) === 0) throw new Error('it was carried out');
  });

const CONFUSED: readonly BadClient[] = [
  confused('sends a wrong magic', encodeRequest({ ...write(KEPT.offset), cookie: 1, magic: 0x25609514 })),
  confused(
    'sends a wrong magic between good requests',
    requests(100, () => read(0, 4096)),
    Buffer.alloc(28, 7),
    requests(100, () => write(KEPT.offset)),
  ),
  confused(
    'sends replies in place of requests',
    Buffer.from('67446698000000000000000000000001'.repeat(2), 'hex'),
  ),
  confused(
    'haggles on behind GO',
    option(Option.LIST),
    requests(3, () => write(KEPT.offset)),
  ),
  confused(
    'says DISC and goes on',
    encodeRequest({ command: Command.DISC, cookie: 1 }),
    requests(100, () => write(KEPT.offset)),
  ),
  refused(
    'reads what is not there',
    4,
    Buffer.concat([
      requests(1, () => read(SIZE, 512)),
      requests(1, () => read(SIZE - 1, 2)),
      encodeRequest({ command: Command.READ, cookie: 3, offset: 2n ** 64n - 1n, length: 0xffffffff }),
      encodeRequest({ command: Command.READ, cookie: 4, offset: 2n ** 63n, length: 1 }),
    ]),
  ),
  refused(
    'reads 4 GiB at once, a thousand times',
    1000,
    requests(1000, () => read(0, 0xffffffff)),
  ),
  refused(
    'sends commands and flags nobody knows',
    3,
    Buffer.concat([
      encodeRequest({ command: 99, cookie: 1, offset: KEPT.offset, length: 4096 }),
      encodeRequest({ command: 0xffff, cookie: 2 }),
      encodeRequest({ ...write(KEPT.offset), flags: 0xff00, cookie: 3 }),
    ]),
  ),
  refused(
    'asks for block status without a context',
    50,
    requests(50, () => ({ command: Command.BLOCK_STATUS, length: 4096 })),
  ),
  refused(
    'writes behind the end',
    1,
    encodeRequest({ ...write(SIZE - 100, Buffer.alloc(8 * MIB, 0x66)), cookie: 1 }),
  ),
  refused(
    'uses one cookie for requests that fail',
    100,
    requests(100, () => ({ ...read(SIZE, 1), cookie: 7 })),
  ),
  bad('uses one cookie for all its requests', async (place) => {
    const client = await place.entered();
    client.send(requests(200, () => ({ ...write(BAD.offset), cookie: 5 })));
    const replies = await client.receive(200 * 16);
    for (let at = 0; at < replies.length; at += 16)
      if (replies.readBigUInt64BE(at + 8) !== 5n) throw new Error('a cookie nobody sent');
  }),
  bad('writes 4 GiB in one request, and sends some of it', async (place) => {
    const client = await place.entered();
    const head = encodeRequest({
      command: Command.WRITE,
      cookie: 1,
      offset: KEPT.offset,
      length: 0xffffffff,
    });
    client.send(head, Buffer.alloc(40 * MIB, 0x66));
    await new Promise((resolve) => client.socket.once('drain', resolve));
  }),
];

const CUT: readonly BadClient[] = [
  gone('hangs up within a request', () => requests(1, () => read(0, 1)).subarray(0, 17)),
  gone('hangs up within the data of a write', () =>
    encodeRequest({ ...write(KEPT.offset, Buffer.alloc(MIB, 0x66)), cookie: 1 }).subarray(0, 500_000),
  ),
  gone(
    'resets within the data of a write',
    () => encodeRequest({ ...write(KEPT.offset, Buffer.alloc(MIB, 0x66)), cookie: 1 }).subarray(0, 500_000),
    'reset',
  ),
  gone(
    'closes its side within the data of a write',
    () => encodeRequest({ ...write(KEPT.offset, Buffer.alloc(MIB, 0x66)), cookie: 1 }).subarray(0, 500_000),
    'end',
  ),
  gone('sends a thousand writes and hangs up', () => requests(1000, () => write(BAD.offset))),
  gone('sends a thousand writes and resets', () => requests(1000, () => write(BAD.offset)), 'reset'),
  gone(
    'sends a thousand reads and closes its side',
    () => requests(1000, () => read(BAD.offset, 4096)),
    'end',
  ),
  gone('sends slow requests and hangs up', () =>
    requests(300, () => ({ command: Command.WRITE_ZEROES, offset: BAD.offset, length: BAD.length })),
  ),
  gone('flushes ten thousand times and hangs up', () => requests(10_000, () => ({ command: Command.FLUSH }))),
  gone('says DISC with requests in flight, and hangs up', () =>
    Buffer.concat([
      requests(100, () => ({ ...write(BAD.offset), flags: CommandFlag.FUA })),
      encodeRequest({ command: Command.DISC, cookie: 1 }),
    ]),
  ),
  gone('waits for what is lost, and hangs up', () => missing(100)),
  gone('waits for what is lost, and resets', () => missing(100), 'reset'),
  gone('waits for what is lost, and closes its side', () => missing(100), 'end'),
  gone('waits to write in what is lost, and hangs up', () =>
    requests(100, (cookie) => write(LOST.offset + cookie * 4096 + 10, Buffer.alloc(10))),
  ),
  gone('waits for more than it may, and hangs up', () => missing(5000)),
  bad('is a hundred clients that wait for what is lost, one behind the other', async (place) => {
    for (let i = 0; i < 100; i++) {
      const client = await place.entered();
      client.send(missing(60, i * 60));
      client.close();
    }
  }),
];

/** Sends requests and reads no reply, until it is clear that the server reads no more either. */
async function stuff(client: RawClient, bytes: Buffer): Promise<void> {
  client.socket.pause();
  client.socket.write(bytes);
  for (let last = -1; last !== client.socket.bytesWritten - client.socket.writableLength; ) {
    last = client.socket.bytesWritten - client.socket.writableLength;
    await delay(30);
  }
}

const STUFFED: readonly BadClient[] = [
  bad('pipelines ten thousand reads and reads none', async (place) =>
    stuff(
      await place.entered(),
      requests(10_000, () => read(BAD.offset, 64 << 10)),
    ),
  ),
  bad('pipelines reads of 4 MiB and reads none', async (place) =>
    stuff(
      await place.entered(),
      requests(1000, () => read(BAD.offset, 4 * MIB)),
    ),
  ),
  bad('asks ten thousand times what is allocated, and reads nothing', async (place) => {
    const client = await place.greeted();
    client.send(option(Option.STRUCTURED_REPLY), option(Option.SET_META_CONTEXT, metaData('', ['base:'])));
    client.send(option(Option.GO, infoData('')));
    await client.receive(2 * ACK_BYTES);
    await stuff(
      client,
      requests(10_000, () => ({ command: Command.BLOCK_STATUS, length: SIZE })),
    );
  }),
  bad('makes a hundred thousand errors and reads none', async (place) =>
    stuff(
      await place.entered(),
      requests(100_000, () => read(SIZE, 1)),
    ),
  ),
  bad('is twenty clients that read no reply', async (place) => {
    const clients = await Promise.all(Array.from({ length: 20 }, () => place.entered()));
    const bytes = requests(1000, () => read(BAD.offset, MIB));
    await Promise.all(clients.map((client) => stuff(client, bytes)));
  }),
  bad('reads nothing for a while, then all, and it is right', async (place) => {
    const client = await place.entered();
    const count = 3000;
    await stuff(
      client,
      requests(count, () => read(KEPT.offset, 4096)),
    );
    client.socket.resume();
    const replies = await client.receive(count * (16 + 4096));
    const seen = new Set<bigint>();
    for (let at = 0; at < replies.length; at += 16 + 4096) {
      seen.add(replies.readBigUInt64BE(at + 8));
      if (replies.compare(replies, 16, 16 + 4096, at + 16, at + 16 + 4096) !== 0)
        throw new Error('wrong data');
    }
    if (seen.size !== count) throw new Error(`${seen.size} answers`);
  }),
  bad('sends its requests byte by byte', async (place) => {
    const client = await place.entered();
    for (const byte of Buffer.concat([
      requests(2, () => read(BAD.offset, 16)),
      requests(1, () => write(BAD.offset)),
    ]).subarray(0, 300)) {
      client.send(Buffer.of(byte));
      await delay(1);
    }
    await client.receive(2 * 32);
  }),
];

const TLS: readonly BadClient[] = [
  bad('sends garbage in place of TLS', async (place) => {
    const client = await place.startTls();
    client.send(Buffer.alloc(5000, 0x55));
    await cutOff(client, place);
  }),
  bad('goes on in clear text behind STARTTLS', async (place) => {
    const client = await place.startTls();
    client.send(
      option(Option.GO, infoData('')),
      requests(9, () => write(KEPT.offset)),
    );
    await cutOff(client, place);
  }),
  bad('says nothing behind STARTTLS', async (place) => cutOff(await place.startTls(), place)),
  bad('hangs up behind STARTTLS', async (place) => (await place.startTls()).close()),
  bad('sends half a hello, and says no more', async (place) => {
    const client = await place.startTls();
    client.send(Buffer.from('16030102000100', 'hex'));
    await cutOff(client, place);
  }),
  bad('shows a certificate of another authority', async (place) => {
    const client = await place.startTls();
    client.socket.removeAllListeners('data');
    const socket = tls.connect({ socket: client.socket, ...place.credentials('stranger') });
    socket.on('error', () => {});
    socket.resume();
    await within(Promise.race(['error', 'end'].map((event) => once(socket, event))), 'the refusal');
  }),
  bad('hangs up in a session over TLS, without a word', async (place) => {
    const socket = await place.secured();
    socket.write(
      encodeRequest({ ...write(KEPT.offset, Buffer.alloc(MIB, 0x66)), cookie: 1 }).subarray(0, 300_000),
    );
    await delay(20);
    socket.destroy();
  }),
  bad('pipelines ten thousand reads over TLS and reads none', async (place) => {
    const socket = await place.secured();
    socket.write(requests(10_000, () => read(BAD.offset, 64 << 10)));
    await delay(200);
    socket.destroy();
  }),
  bad('waits over TLS for what is lost, and hangs up', async (place) => {
    const socket = await place.secured();
    socket.write(missing(100));
    await delay(20);
    socket.destroy();
  }),
  bad('waits over TLS for more than it may, and hangs up', async (place) => {
    const socket = await place.secured();
    socket.write(missing(5000));
    await delay(50);
    socket.destroy();
  }),
  bad('ends TLS, not its connection', async (place) => {
    const socket = await place.secured();
    socket.write(requests(50, () => read(BAD.offset, 4096)));
    socket.end();
    socket.resume();
    await within(new Promise((resolve) => socket.once('close', resolve)), 'the end');
  }),
  bad('wants to negotiate TLS anew, again and again', async (place) => {
    const socket = await place.secured({ maxVersion: 'TLSv1.2' });
    for (let i = 0; i < 20 && !socket.destroyed; i++) socket.renegotiate({}, () => {});
    await delay(50);
    socket.destroy();
  }),
];

export const BAD_CLIENTS: readonly BadClient[] = [...HANDSHAKES, ...CONFUSED, ...CUT, ...STUFFED, ...TLS];
