/** «Fixed newstyle negotiation», «Option types»: options in general, EXPORT_NAME, ABORT, LIST, STRUCTURED_REPLY. */
import { strict as assert } from 'node:assert';
import {
  HandshakeFlag,
  NBD_MAGIC,
  OPTION_MAGIC,
  Option,
  OptionReply,
  TransmissionFlag,
} from '../../../../src/nbd/constants.js';
import { infoData, option, u32, u64 } from '../../../support/handshake.js';
import { type Lab, must, should } from '../case.js';
import { type Haggle, listedOf, nameOf, text, UNKNOWN_OPTION } from '../haggle.js';
import { Transmission } from '../transmission.js';

const { ERR_UNSUP, ERR_INVALID, ACK } = OptionReply;
const { FIXED_NEWSTYLE, NO_ZEROES } = HandshakeFlag;
const ANSWER_BYTES = 10;
const ZEROES_BYTES = 124;

async function exportName(haggle: Haggle, name: string, structured: boolean): Promise<Transmission> {
  haggle.wire.send(option(Option.EXPORT_NAME, Buffer.from(name)));
  const answer = await haggle.wire.receive(ANSWER_BYTES, 'an answer to EXPORT_NAME');
  const facts = { size: answer.readBigUInt64BE(0), flags: answer.readUInt16BE(8), blocks: null };
  return new Transmission(haggle.wire, facts, { structured, extended: false, contexts: [] });
}

/** The session ends, and nothing was said before. */
async function ends(haggle: Haggle): Promise<void> {
  assert.equal((await haggle.wire.ended()).length, 0, 'nothing is answered');
}

async function zeroesFollow(lab: Lab, flags: number, zeroes: number): Promise<void> {
  const haggle = await lab.haggle(null);
  lab.needs((haggle.offered & flags) === flags, 'NO_ZEROES');
  haggle.wire.send(u32(flags));
  const transmission = await exportName(haggle, lab.name, false);
  const rest = await haggle.wire.receive(zeroes, '124 zero bytes');
  assert.ok(rest.equals(Buffer.alloc(zeroes)), 'they are zero');
  await transmission.goesOn();
}

const generalCases = [
  ...[0, 4, 12, 0x1234_5678, 0xffff_ffff].map((number) =>
    must('C1', `option ${number}: ERR_UNSUP, and the next one is understood`, async (lab) => {
      const haggle = await lab.haggle();
      await haggle.refused(number, undefined, ERR_UNSUP);
      await haggle.goesOn();
    }),
  ),
  ...[1, 4096, 65_536].map((length) =>
    must('C1', `the ${length} bytes of an unknown option are read past`, async (lab) => {
      const haggle = await lab.haggle();
      await haggle.refused(UNKNOWN_OPTION, Buffer.alloc(length, 0x49), ERR_UNSUP);
      await haggle.goesOn();
    }),
  ),
  should('C1', 'an unknown option of 1 MiB is read past too', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(UNKNOWN_OPTION, Buffer.alloc(1 << 20), ERR_UNSUP);
    await haggle.goesOn();
  }),
  must('C1', 'an option inside the data of another one is data', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(UNKNOWN_OPTION, option(Option.ABORT), ERR_UNSUP);
    await haggle.goesOn();
  }),
  must('C1', 'twenty unknown options are refused one by one', async (lab) => {
    const haggle = await lab.haggle();
    for (let count = 0; count < 20; count++) await haggle.goesOn();
  }),
  ...[OPTION_MAGIC + 1n, NBD_MAGIC, 0n].map((magic) =>
    must('C1', `option magic 0x${magic.toString(16)}: the connection is dropped`, async (lab) => {
      const haggle = await lab.haggle();
      haggle.wire.send(u64(magic), u32(Option.LIST), u32(0));
      await ends(haggle);
    }),
  ),
  should('C1', 'options that come before the last one was answered are answered in order', async (lab) => {
    const haggle = await lab.haggle();
    haggle.wire.send(option(UNKNOWN_OPTION), option(UNKNOWN_OPTION + 1), option(Option.ABORT));
    for (const number of [UNKNOWN_OPTION, UNKNOWN_OPTION + 1, Option.ABORT]) await haggle.answers(number);
  }),
  must('C1', 'an option in single bytes is understood', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.wire.sendSlowly(option(Option.INFO, infoData(lab.name)));
    assert.equal((await haggle.answers(Option.INFO)).final, ACK);
  }),
  must('C1', 'the text of a refusal is UTF-8 of at most 4096 bytes', async (lab) => {
    const haggle = await lab.haggle();
    for (const [number, data] of [
      [UNKNOWN_OPTION, Buffer.alloc(0)],
      [Option.INFO, infoData(lab.unknownName())],
      [Option.INFO, Buffer.alloc(2)],
    ] as const)
      text((await haggle.refused(number, data)).data);
  }),
  should('C1', 'the text of a refusal has at most 256 bytes', async (lab) => {
    const haggle = await lab.haggle();
    const { data } = await haggle.refused(Option.INFO, infoData(lab.unknownName(200)));
    assert.ok(data.length <= 256, `it has ${data.length}`);
  }),
  should(
    'C6',
    'an option that announces 4 GiB is not waited for with memory, and harms nobody',
    async (lab) => {
      const { wire } = await lab.haggle();
      wire.send(u64(OPTION_MAGIC), u32(UNKNOWN_OPTION), u32(0xffff_ffff), Buffer.alloc(65_536));
      await lab.alive();
    },
  ),
  should('C6', 'a client that goes in the middle of an option harms nobody', async (lab) => {
    const { wire } = await lab.haggle();
    wire.send(option(Option.INFO, infoData(lab.name)).subarray(0, 19));
    wire.end();
    await lab.alive();
  }),
  should('C6', 'a client that haggles without end does not hold back others', async (lab) => {
    const { wire } = await lab.haggle();
    for (let count = 0; count < 2_000; count++) wire.send(option(UNKNOWN_OPTION));
    await lab.alive();
  }),
];

const exportNameCases = [
  must('C1', 'EXPORT_NAME by name enters transmission with size and flags', async (lab) => {
    const transmission = await exportName(await lab.haggle(), lab.name, false);
    assert.equal(transmission.facts.size, lab.target.facts.size);
    assert.ok((transmission.facts.flags & TransmissionFlag.HAS_FLAGS) !== 0);
  }),
  must('C1', 'EXPORT_NAME without NO_ZEROES: 124 zero bytes follow', (lab) =>
    zeroesFollow(lab, FIXED_NEWSTYLE, ZEROES_BYTES),
  ),
  must('C1', 'EXPORT_NAME with NO_ZEROES: they do not', (lab) =>
    zeroesFollow(lab, FIXED_NEWSTYLE | NO_ZEROES, 0),
  ),
  must('C1', 'EXPORT_NAME with an empty name: the default export, or the end', async (lab) => {
    const haggle = await lab.haggle();
    haggle.wire.send(option(Option.EXPORT_NAME));
    let answer: Buffer;
    try {
      answer = await haggle.wire.receive(ANSWER_BYTES);
    } catch (error) {
      if (haggle.wire.over) return 'no default export';
      throw error;
    }
    assert.ok((answer.readUInt16BE(8) & TransmissionFlag.HAS_FLAGS) !== 0);
    return 'default export';
  }),
  must('C1', 'EXPORT_NAME with an unknown name: the session ends without an answer', async (lab) => {
    const haggle = await lab.haggle();
    haggle.wire.send(option(Option.EXPORT_NAME, Buffer.from(lab.unknownName())));
    await ends(haggle);
  }),
  must('C1', 'EXPORT_NAME with a name of 4097 bytes: the session ends', async (lab) => {
    const haggle = await lab.haggle();
    haggle.wire.send(option(Option.EXPORT_NAME, Buffer.alloc(4097, 0x61)));
    await ends(haggle);
  }),
  must('C1', 'EXPORT_NAME behind a refused GO is served', async (lab) => {
    const haggle = await lab.haggle(FIXED_NEWSTYLE);
    await haggle.refused(Option.GO, infoData(lab.unknownName()));
    const transmission = await exportName(haggle, lab.name, false);
    await haggle.wire.receive(ZEROES_BYTES);
    await transmission.goesOn();
  }),
  must('C1', 'EXPORT_NAME behind STRUCTURED_REPLY: a READ has a structured reply', async (lab) => {
    lab.needsStructured();
    const haggle = await lab.haggle(null);
    lab.needs((haggle.offered & NO_ZEROES) !== 0, 'NO_ZEROES');
    haggle.wire.send(u32(FIXED_NEWSTYLE | NO_ZEROES));
    await haggle.structured();
    await (await exportName(haggle, lab.name, true)).goesOn();
  }),
  must('C1', 'EXPORT_NAME without structured replies: the flag DF is clear', async (lab) => {
    const { facts } = await exportName(await lab.haggle(), lab.name, false);
    assert.equal(facts.flags & TransmissionFlag.SEND_DF, 0);
  }),
];

const abortCases = [
  must('C1', 'ABORT is acknowledged', async (lab) => {
    await (await lab.haggle()).agreed(Option.ABORT);
  }),
  must('C1', 'behind ABORT the server closes', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.agreed(Option.ABORT);
    await ends(haggle);
  }),
  should('C1', 'the data of ABORT is ignored', async (lab) => {
    await (await lab.haggle()).agreed(Option.ABORT, Buffer.from('bye'));
  }),
  should('C1', 'a client that does not wait for the answer to ABORT harms nobody', async (lab) => {
    const { wire } = await lab.haggle();
    wire.send(option(Option.ABORT));
    wire.close();
    await lab.alive();
  }),
  must('C1', 'ABORT behind other options is acknowledged', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.goesOn();
    await haggle.ask(Option.INFO, infoData(lab.name));
    await haggle.agreed(Option.ABORT);
  }),
];

const listCases = [
  must('C1', 'LIST: SERVER replies, each name within its reply, then ACK; or ERR_POLICY', async (lab) => {
    const { all, final } = await (await lab.haggle()).ask(Option.LIST);
    if (final !== ACK) return nameOf(final);
    return `${listedOf(all.slice(0, -1)).length} listed`;
  }),
  should('C1', 'LIST names the export', async (lab) => {
    lab.needs(lab.target.lists, 'LIST');
    const names = listedOf(await (await lab.haggle()).agreed(Option.LIST));
    assert.ok(names.includes(lab.name) || names.includes(''), `${names}`);
  }),
  should('C1', 'LIST with data: ERR_INVALID', async (lab) => {
    lab.needs(lab.target.lists, 'LIST');
    const haggle = await lab.haggle();
    await haggle.refused(Option.LIST, Buffer.from('x'), ERR_INVALID);
    await haggle.goesOn();
  }),
  must('C1', 'LIST a second time answers the same, or with an error', async (lab) => {
    lab.needs(lab.target.lists, 'LIST');
    const haggle = await lab.haggle();
    const first = listedOf(await haggle.agreed(Option.LIST));
    const { all, final } = await haggle.ask(Option.LIST);
    if (final === ACK) assert.deepEqual(listedOf(all.slice(0, -1)), first);
    await haggle.goesOn();
    return nameOf(final);
  }),
  must('C1', 'LIST does not end the handshake: GO follows', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.ask(Option.LIST);
    await haggle.describe(Option.GO, lab.name);
  }),
];

const structuredCases = [
  must('C1', 'STRUCTURED_REPLY: ACK or ERR_UNSUP', async (lab) => {
    const { final } = await (await lab.haggle()).ask(Option.STRUCTURED_REPLY);
    assert.ok([ACK, ERR_UNSUP].includes(final as 1), nameOf(final));
    return nameOf(final);
  }),
  should('C1', 'STRUCTURED_REPLY with data: ERR_INVALID', async (lab) => {
    lab.needsStructured();
    const haggle = await lab.haggle();
    await haggle.refused(Option.STRUCTURED_REPLY, Buffer.from('x'), ERR_INVALID);
    await haggle.goesOn();
  }),
  must('C1', 'STRUCTURED_REPLY that was refused does not hold', async (lab) => {
    lab.needsStructured();
    const haggle = await lab.haggle();
    await haggle.refused(Option.STRUCTURED_REPLY, Buffer.from('x'));
    const facts = await haggle.describe(Option.GO, lab.name);
    assert.equal(facts.flags & TransmissionFlag.SEND_DF, 0, 'the flag DF is clear');
    const agreed = { structured: false, extended: false, contexts: [] };
    await new Transmission(haggle.wire, facts, agreed).goesOn();
  }),
  should('C1', 'STRUCTURED_REPLY a second time does not end the handshake', async (lab) => {
    lab.needsStructured();
    const haggle = await lab.haggle();
    await haggle.structured();
    const { final } = await haggle.ask(Option.STRUCTURED_REPLY);
    await haggle.goesOn();
    return nameOf(final);
  }),
];

export const optionCases = [
  ...generalCases,
  ...exportNameCases,
  ...abortCases,
  ...listCases,
  ...structuredCases,
];
