/** «Transmission»: requests and replies in general, DISC, magics, several requests and several connections at once. */
import { strict as assert } from 'node:assert';
import {
  ChunkFlag,
  ChunkType,
  Command,
  CommandFlag,
  Errno,
  EXTENDED_REPLY_MAGIC,
  EXTENDED_REQUEST_MAGIC,
  SIMPLE_REPLY_MAGIC,
  STRING_BYTES_MAX,
  STRUCTURED_REPLY_MAGIC,
} from '../../../../src/nbd/constants.js';
import { assertBytes, BASE_ALLOCATION, type Lab, must, pattern, reading, should } from '../case.js';
import { LONG_DEADLINE_MS } from '../wire.js';

const AT = 2 << 20;
const SIZE_NEEDED = 8 << 20;

async function magicEnds(lab: Lab, magic: number): Promise<void> {
  const { wire, ...transmission } = await inTransmission(lab);
  wire.send(transmission.encode({ ...reading(0, 512), magic })[0]);
  await wire.ended();
}

async function inTransmission(lab: Lab) {
  const transmission = await lab.go();
  await transmission.goesOn();
  return { wire: transmission.wire, encode: transmission.encode.bind(transmission) };
}

const cookieCases = [
  ...[0n, 1n, 0xffff_ffff_ffff_ffffn, 0x8000_0000_0000_0000n].map((cookie) =>
    must('C2', `the cookie 0x${cookie.toString(16)} comes back as it is`, async (lab) => {
      await (await lab.go()).done({ ...reading(0, 512), cookie });
    }),
  ),
  must('C2', 'a cookie may be used again when its request is answered', async (lab) => {
    const transmission = await lab.go();
    for (let count = 0; count < 3; count++) await transmission.done({ ...reading(0, 512), cookie: 77n });
  }),
  must('C2', '64 READs in one segment are all answered, each with its own data', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    const data = pattern(64 * 512, 64);
    await transmission.write(AT, data);
    const asked = Array.from({ length: 64 }, (_, index) => reading(AT + index * 512, 512));
    const cookies = transmission.send(...asked);
    for (const [index, cookie] of cookies.entries())
      assertBytes(
        (await transmission.answer(cookie)).data,
        data.subarray(index * 512, (index + 1) * 512),
        `answer ${index}`,
      );
  }),
  must('C2', 'commands of every kind in one segment are all answered', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    const cookies = transmission.send(
      { command: Command.WRITE, offset: AT, payload: pattern(4096, 1) },
      reading(AT + 8192, 4096),
      { command: Command.FLUSH },
      { command: Command.WRITE_ZEROES, offset: AT + 16_384, length: 4096 },
      { command: Command.TRIM, offset: AT + 32_768, length: 4096 },
      { command: 99 },
      reading(AT + 65_536, 4096),
    );
    for (const cookie of cookies) await transmission.answer(cookie);
    await transmission.goesOn();
  }),
  must('C2', 'a request in single bytes is understood', async (lab) => {
    const transmission = await lab.go();
    const [bytes, cookie] = transmission.encode(reading(0, 512));
    await transmission.wire.sendSlowly(bytes);
    assert.equal((await transmission.answer(cookie)).errno, Errno.OK);
  }),
  must('C2', 'a WRITE whose payload comes in pieces is written whole', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    const data = pattern(10_000, 5);
    const [bytes, cookie] = transmission.encode({ command: Command.WRITE, offset: AT, payload: data });
    for (const [from, to] of [
      [0, 27],
      [27, 29],
      [29, 4100],
      [4100, bytes.length],
    ] as const) {
      transmission.wire.send(bytes.subarray(from, to));
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.equal((await transmission.answer(cookie)).errno, Errno.OK);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
];

const replyCases = [
  must('C2', 'without structured replies: READ, WRITE and errors have simple replies', async (lab) => {
    const transmission = await lab.go({ structured: false });
    assert.ok((await transmission.done(reading(0, 512))).simple);
    assert.ok((await transmission.ask(reading(transmission.facts.size, 512))).simple);
    assert.ok((await transmission.done({ command: Command.FLUSH })).simple);
  }),
  must('C2', 'without structured replies: no data follows the error of a READ', async (lab) => {
    const transmission = await lab.go({ structured: false });
    assert.notEqual((await transmission.ask(reading(transmission.facts.size, 512))).errno, Errno.OK);
    await transmission.goesOn();
  }),
  must('C2', 'with structured replies: a READ has one', async (lab) => {
    lab.needsStructured();
    assert.ok(!(await (await lab.go()).done(reading(0, 4096))).simple);
  }),
  must('C2', 'with structured replies: the early error of a READ is one too', async (lab) => {
    lab.needsStructured();
    const transmission = await lab.go();
    const answer = await transmission.ask(reading(transmission.facts.size, 512));
    assert.ok(!answer.simple && answer.errno === Errno.EINVAL, `errno ${answer.errno}`);
  }),
  should('C2', 'with structured replies: errors of other commands are error chunks', async (lab) => {
    lab.needsStructured();
    assert.ok(!(await (await lab.go()).ask({ command: 99 })).simple, 'answered with a simple reply');
  }),
  must('C2', 'with structured replies: an error message is UTF-8 of at most 4096 bytes', async (lab) => {
    lab.needsStructured();
    const transmission = await lab.go();
    const { message } = await transmission.ask(reading(transmission.facts.size, 512));
    assert.ok(Buffer.byteLength(message) <= STRING_BYTES_MAX);
  }),
  must('C2', 'with structured replies: DONE is on the last chunk, other flags are clear', async (lab) => {
    lab.needsStructured();
    lab.needsSize(SIZE_NEEDED);
    const { chunks } = await (await lab.go()).done(reading(0, 1 << 20));
    assert.ok(
      chunks.every(({ flags }, index) => flags === (index === chunks.length - 1 ? ChunkFlag.DONE : 0)),
    );
  }),
  should('C2', 'with structured replies: an ERROR chunk is the only one of its kind', async (lab) => {
    lab.needsStructured();
    const transmission = await lab.go();
    const { chunks } = await transmission.ask(reading(transmission.facts.size, 512));
    assert.ok(chunks.filter(({ type }) => type === ChunkType.ERROR).length <= 1);
  }),
];

const FUA_COMMANDS = [
  ['READ', reading(AT, 4096)],
  ['WRITE', { command: Command.WRITE, offset: AT, payload: pattern(4096, 9) }],
  ['FLUSH', { command: Command.FLUSH }],
  ['TRIM', { command: Command.TRIM, offset: AT, length: 4096 }],
  ['CACHE', { command: Command.CACHE, offset: AT, length: 4096 }],
  ['WRITE_ZEROES', { command: Command.WRITE_ZEROES, offset: AT, length: 4096 }],
  ['BLOCK_STATUS', { command: Command.BLOCK_STATUS, offset: AT, length: 4096 }],
] as const;
const NEEDED_FLAG = {
  FLUSH: 'SEND_FLUSH',
  TRIM: 'SEND_TRIM',
  CACHE: 'SEND_CACHE',
  WRITE_ZEROES: 'SEND_WRITE_ZEROES',
} as const;

const durabilityCases = [
  ...FUA_COMMANDS.map(([what, asked]) =>
    must('C2', `FUA is accepted on ${what}`, async (lab) => {
      lab.needsFlag('SEND_FUA');
      lab.needsSize(SIZE_NEEDED);
      if (what in NEEDED_FLAG) lab.needsFlag(NEEDED_FLAG[what as keyof typeof NEEDED_FLAG]);
      if (what === 'BLOCK_STATUS') lab.needsContexts();
      const transmission = await lab.go(what === 'BLOCK_STATUS' ? { contexts: [BASE_ALLOCATION] } : {});
      await transmission.done({ ...asked, flags: CommandFlag.FUA });
    }),
  ),
  must('C2', 'FLUSH succeeds', async (lab) => {
    lab.needsFlag('SEND_FLUSH');
    await (await lab.go()).done({ command: Command.FLUSH });
  }),
  should('C2', 'FLUSH with offset and length does not disconnect', async (lab) => {
    lab.needsFlag('SEND_FLUSH');
    return (await lab.go()).choice({ command: Command.FLUSH, offset: 4096, length: 512 });
  }),
  must('C2', 'what one connection wrote and had answered, another one reads', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const [writer, reader] = [await lab.go(), await lab.go()];
    const data = pattern(65_536, 11);
    await writer.write(AT, data);
    await writer.done({ command: Command.FLUSH });
    assertBytes(await reader.read(AT, data.length), data, 'what the other reads');
  }),
  must('C2', 'CAN_MULTI_CONN: FLUSH on one connection follows the WRITE of another', async (lab) => {
    lab.needsFlag('CAN_MULTI_CONN');
    lab.needsWritable();
    const [writer, flusher, reader] = [await lab.go(), await lab.go(), await lab.go()];
    const data = pattern(4096, 12);
    await writer.write(AT, data);
    await flusher.done({ command: Command.FLUSH });
    assertBytes(await reader.read(AT, data.length), data, 'what a third reads');
  }),
];

const endCases = [
  must('C2', 'DISC: no reply, and the server closes', async (lab) => {
    const transmission = await lab.go();
    await transmission.goesOn();
    await transmission.leave();
  }),
  must('C2', 'DISC as the first request: the server closes', async (lab) => {
    await (await lab.go()).leave();
  }),
  must('C2', 'DISC behind a WRITE in one segment: the data is there', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    const data = pattern(8192, 13);
    const [written] = transmission.send(
      { command: Command.WRITE, offset: AT, payload: data },
      { command: Command.DISC },
    );
    const answered = await transmission.answer(written!).then(
      ({ errno }) => errno === Errno.OK,
      () => false,
    );
    await transmission.wire.ended();
    assertBytes(await (await lab.go()).read(AT, data.length), data, 'what is read later');
    return answered ? 'answered' : 'not answered';
  }),
  must('C2', 'DISC behind sixteen READs in one segment: all are answered first', async (lab) => {
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    const reads = Array.from({ length: 16 }, (_, index) => reading(index * 65_536, 65_536));
    const cookies = transmission.send(...reads, { command: Command.DISC });
    let served = 0;
    for (const cookie of cookies.slice(0, 16))
      if ((await transmission.answer(cookie)).errno === Errno.OK) served++;
    assert.equal((await transmission.wire.ended()).length, 0);
    return served === 16 ? 'all served' : 'some with an error';
  }),
  must('C2', 'a wrong request magic ends the connection', (lab) => magicEnds(lab, 0x2560_9512)),
  ...[
    ['the simple reply magic', SIMPLE_REPLY_MAGIC],
    ['the structured reply magic', STRUCTURED_REPLY_MAGIC],
    ['the extended request magic that was not agreed on', EXTENDED_REQUEST_MAGIC],
    ['the extended reply magic', EXTENDED_REPLY_MAGIC],
    ['the magic of the transaction log', 0x2560_9514],
    ['the reserved magic 0x12560953', 0x1256_0953],
    ['the reserved magic 0x96744668', 0x9674_4668],
  ].map(([what, magic]) =>
    must('C2', `${what} as a request ends the connection`, (lab) => magicEnds(lab, magic as number)),
  ),
  should('C2', 'a client that ends its side behind a READ still gets the answer, or the end', async (lab) => {
    const transmission = await lab.go();
    await transmission.goesOn();
    transmission.send(reading(0, 512));
    transmission.wire.end();
    const answered = (await transmission.wire.ended()).length;
    await lab.alive();
    return answered > 0 ? 'the answer' : 'the end';
  }),
];

const robustnessCases = [
  should('C6', 'a client that goes in the middle of a request header harms nobody', async (lab) => {
    const { wire, encode } = await inTransmission(lab);
    wire.send(encode(reading(0, 512))[0].subarray(0, 13));
    wire.end();
    await lab.alive();
  }),
  should('C6', 'a client that goes in the middle of a payload harms nobody', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const { wire, encode } = await inTransmission(lab);
    const asked = { command: Command.WRITE, offset: AT, payload: pattern(65_536, 21) };
    wire.send(encode(asked)[0].subarray(0, 30_000));
    wire.end();
    await lab.alive();
  }),
  should('C6', 'a client that waits in the middle of a payload does not hold back others', async (lab) => {
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const { wire, encode } = await inTransmission(lab);
    const asked = { command: Command.WRITE, offset: AT, payload: pattern(65_536, 22) };
    wire.send(encode(asked)[0].subarray(0, 30_000));
    await lab.alive();
  }),
  should('C6', 'a client that goes without taking 64 answers harms nobody', async (lab) => {
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    transmission.wire.pause();
    transmission.send(...Array.from({ length: 64 }, () => reading(0, 1 << 20)));
    await lab.alive();
    transmission.wire.close();
    await lab.alive();
  }),
  should('C6', 'a client that does not take its answers does not hold back others', async (lab) => {
    lab.needsSize(SIZE_NEEDED);
    const slow = await lab.go();
    slow.wire.pause();
    slow.send(...Array.from({ length: 256 }, () => reading(0, 1 << 20)));
    await lab.alive();
  }),
  should('C6', 'a thousand requests before the first answer is read are all answered', async (lab) => {
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go();
    transmission.wire.deadlineMs = LONG_DEADLINE_MS;
    const cookies = transmission.send(
      ...Array.from({ length: 1000 }, (_, index) => reading((index % 256) * 4096, 4096)),
    );
    for (const cookie of cookies) assert.equal((await transmission.answer(cookie)).errno, Errno.OK);
  }),
  should('C6', 'eight connections at once are served', async (lab) => {
    const clients = await Promise.all(Array.from({ length: 8 }, () => lab.go()));
    await Promise.all(clients.map((client) => client.goesOn()));
  }),
];

export const requestCases = [
  ...cookieCases,
  ...replyCases,
  ...durabilityCases,
  ...endCases,
  ...robustnessCases,
];
