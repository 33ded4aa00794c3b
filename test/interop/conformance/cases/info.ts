/** «Option types»: INFO and GO; «Transmission flags»; «Size constraints» as told by INFO_BLOCK_SIZE. */
import { strict as assert } from 'node:assert';
import {
  HandshakeFlag,
  Info,
  Option,
  OptionReply,
  STRING_BYTES_MAX,
  TransmissionFlag,
} from '../../../../src/nbd/constants.js';
import { counted, infoData, u16, u32 } from '../../../support/handshake.js';
import { type Lab, must, should } from '../case.js';
import { assertType, factsOf, infosOf, infoText, nameOf, type OptionAnswer } from '../haggle.js';
import { Transmission } from '../transmission.js';

const { ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG, ERR_POLICY, ACK } = OptionReply;
const BOTH = [
  ['INFO', Option.INFO],
  ['GO', Option.GO],
] as const;
const PLAIN = { structured: false, extended: false, contexts: [] };
const ALL_INFOS = [Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE];

/** The order of information is free. */
const sorted = (replies: readonly OptionAnswer[]) => replies.map(({ data }) => data.toString('hex')).sort();

/** Malformed data of INFO and GO, by what is wrong with it. */
const MALFORMED: [what: string, data: (name: string) => Buffer][] = [
  ['no data', () => Buffer.alloc(0)],
  ['5 bytes of data', () => Buffer.alloc(5)],
  ['a name length one too large', (name) => Buffer.concat([u32(name.length + 1), Buffer.from(name), u16(0)])],
  ['a name length of 2^32 - 1', (name) => Buffer.concat([u32(0xffff_ffff), Buffer.from(name), u16(0)])],
  ['fewer requests than counted', (name) => Buffer.concat([counted(name), u16(2), u16(3)])],
  ['bytes behind the last request', (name) => Buffer.concat([counted(name), u16(1), u16(3), u16(3)])],
  ['half a request', (name) => Buffer.concat([counted(name), u16(1), Buffer.alloc(1)])],
];

const malformedCases = BOTH.flatMap(([what, number]) =>
  MALFORMED.map(([fault, data]) =>
    must('C1', `${what} with ${fault}: ERR_INVALID, and the handshake goes on`, async (lab) => {
      const haggle = await lab.haggle();
      await haggle.refused(number, data(lab.name), ERR_INVALID);
      await haggle.goesOn();
    }),
  ),
);

const bothCases = BOTH.flatMap(([what, number]) => [
  must('C1', `${what} answers INFO_EXPORT before ACK`, async (lab) => {
    const facts = await (await lab.haggle()).describe(number, lab.name);
    assert.ok(facts.size > 0n, 'the size is 0');
  }),
  must('C1', `${what}: unknown information requests are ignored`, async (lab) => {
    await (await lab.haggle()).describe(number, lab.name, [0x8000, 0x1234, 4, 0xffff]);
  }),
  must('C1', `${what}: a request for INFO_EXPORT itself is allowed`, async (lab) => {
    await (await lab.haggle()).describe(number, lab.name, [Info.EXPORT]);
  }),
  should('C1', `${what} with a hundred requests is answered`, async (lab) => {
    const unknown = Array.from({ length: 99 }, (_, index) => 1000 + index);
    await (await lab.haggle()).describe(number, lab.name, [Info.BLOCK_SIZE, ...unknown]);
  }),
  must('C1', `${what} of an unknown export: ERR_UNKNOWN, and the handshake goes on`, async (lab) => {
    const haggle = await lab.haggle();
    const { final } = await haggle.ask(number, infoData(lab.unknownName()));
    assertType(final, [ERR_UNKNOWN]);
    await haggle.goesOn();
  }),
  should('C1', `${what} of an unknown export sends no information before the error`, async (lab) => {
    const haggle = await lab.haggle();
    const { all } = await haggle.ask(number, infoData(lab.unknownName(), ALL_INFOS));
    assert.equal(all.length, 1);
  }),
  must('C1', `${what} with a name of 4096 bytes is refused in words`, async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(number, infoData(lab.unknownName(STRING_BYTES_MAX)));
    await haggle.goesOn();
  }),
  should('C1', `${what} with a name of 4097 bytes: ERR_INVALID, ERR_UNKNOWN or ERR_TOO_BIG`, async (lab) => {
    const haggle = await lab.haggle();
    const name = 'n'.repeat(STRING_BYTES_MAX + 1);
    await haggle.refused(number, infoData(name), ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG, ERR_POLICY);
    await haggle.goesOn();
  }),
  should('C1', `${what} with a name that is not UTF-8 or holds NUL is refused in words`, async (lab) => {
    lab.unknownName();
    const haggle = await lab.haggle();
    for (const name of [Buffer.from([0xff, 0xfe, 0x80]), Buffer.from('a\0b')]) {
      await haggle.refused(number, Buffer.concat([u32(name.length), name, u16(0)]));
      await haggle.goesOn();
    }
  }),
]);

const goCases = [
  must('C1', 'INFO does not begin transmission: options go on', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.describe(Option.INFO, lab.name);
    await haggle.goesOn();
  }),
  must('C1', 'GO begins transmission, without 124 zero bytes', async (lab) => {
    const haggle = await lab.haggle(HandshakeFlag.FIXED_NEWSTYLE);
    const facts = await haggle.describe(Option.GO, lab.name);
    await new Transmission(haggle.wire, facts, PLAIN).goesOn();
  }),
  must('C1', 'GO behind INFO with the same parameters answers the same', async (lab) => {
    const haggle = await lab.haggle();
    const before = await haggle.agreed(Option.INFO, infoData(lab.name, ALL_INFOS));
    assert.deepEqual(sorted(await haggle.agreed(Option.GO, infoData(lab.name, ALL_INFOS))), sorted(before));
  }),
  must('C1', 'GO behind INFO with structured replies answers the same', async (lab) => {
    lab.needsStructured();
    const haggle = await lab.haggle();
    await haggle.structured();
    const before = await haggle.agreed(Option.INFO, infoData(lab.name, [Info.BLOCK_SIZE]));
    const after = await haggle.agreed(Option.GO, infoData(lab.name, [Info.BLOCK_SIZE]));
    assert.deepEqual(sorted(after), sorted(before));
  }),
  must('C1', 'GO behind a refused GO is served', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(Option.GO, infoData(lab.unknownName()));
    const facts = await haggle.describe(Option.GO, lab.name);
    await new Transmission(haggle.wire, facts, PLAIN).goesOn();
  }),
  should('C1', 'GO without a request for BLOCK_SIZE is served', async (lab) => {
    await (await lab.go({ infos: [] })).goesOn();
  }),
  must('C1', 'GO with a request for BLOCK_SIZE is not told ERR_BLOCK_SIZE_REQD', async (lab) => {
    await (await lab.go({ infos: [Info.BLOCK_SIZE] })).goesOn();
  }),
  should('C1', 'GO with an empty name is the default export', async (lab) => {
    const { all, final } = await (await lab.haggle()).ask(Option.GO, infoData(''));
    lab.needs(final !== ERR_UNKNOWN, 'a default export');
    assert.equal(nameOf(final), nameOf(ACK));
    factsOf(all.slice(0, -1));
  }),
  should('C1', 'a request in the same segment as GO is answered', async (lab) => {
    const haggle = await lab.haggle(HandshakeFlag.FIXED_NEWSTYLE);
    const { facts } = lab.target;
    const transmission = new Transmission(haggle.wire, facts, PLAIN);
    const [request, cookie] = transmission.encode({ command: 0, offset: 0, length: 512 });
    const data = infoData(lab.name);
    haggle.wire.send(Buffer.from('IHAVEOPT'), u32(Option.GO), u32(data.length), data, request);
    assert.equal((await haggle.answers(Option.GO)).final, ACK);
    await transmission.answer(cookie);
  }),
];

const textCases = [
  should('C1', 'NAME on request is the name of the export', async (lab) => {
    const replies = await (await lab.haggle()).agreed(Option.INFO, infoData(lab.name, [Info.NAME]));
    const name = infoText(replies, Info.NAME);
    lab.needs(name !== null, 'INFO_NAME');
    if (lab.name !== '') assert.equal(name, lab.name);
  }),
  must('C1', 'DESCRIPTION on request is UTF-8 of at most 4096 bytes', async (lab) => {
    const replies = await (await lab.haggle()).agreed(Option.INFO, infoData(lab.name, [Info.DESCRIPTION]));
    lab.needs(infoText(replies, Info.DESCRIPTION) !== null, 'INFO_DESCRIPTION');
  }),
  should('C1', 'every information arrives once', async (lab) => {
    const replies = await (await lab.haggle()).agreed(Option.INFO, infoData(lab.name, ALL_INFOS));
    const kinds = infosOf(replies).map(({ data }) => data.readUInt16BE(0));
    assert.equal(new Set(kinds).size, kinds.length, `${kinds}`);
  }),
];

function blocksOf(lab: Lab) {
  const { blocks } = lab.target.facts;
  lab.needs(blocks !== null, 'INFO_BLOCK_SIZE');
  return blocks!;
}
const powerOfTwo = (value: number) => value > 0 && Number.isInteger(Math.log2(value));

const blockCases = [
  must('C3', 'BLOCK_SIZE: the minimum is a power of two, at most 65536', async (lab) => {
    const { minimum } = blocksOf(lab);
    assert.ok(powerOfTwo(minimum) && minimum <= 65_536, `${minimum}`);
    return `${minimum}`;
  }),
  must('C3', 'BLOCK_SIZE: the preferred is a power of two, at least 512 and the minimum', async (lab) => {
    const { minimum, preferred } = blocksOf(lab);
    assert.ok(powerOfTwo(preferred) && preferred >= Math.max(512, minimum), `${preferred}`);
    return `${preferred}`;
  }),
  must('C3', 'BLOCK_SIZE: the maximum payload is at least the preferred block', async (lab) => {
    const { preferred, payloadMax } = blocksOf(lab);
    assert.ok(payloadMax >= preferred, `${payloadMax}`);
    return `${payloadMax}`;
  }),
  should('C3', 'BLOCK_SIZE: the maximum payload is at least 1 MiB', async (lab) => {
    assert.ok(blocksOf(lab).payloadMax >= 1 << 20);
  }),
  should('C3', 'BLOCK_SIZE: the size is a multiple of the minimum', async (lab) => {
    assert.equal(lab.target.facts.size % BigInt(blocksOf(lab).minimum), 0n);
  }),
  must('C3', 'BLOCK_SIZE is the same for INFO and GO', async (lab) => {
    const haggle = await lab.haggle();
    const info = await haggle.describe(Option.INFO, lab.name, [Info.BLOCK_SIZE]);
    const go = await haggle.describe(Option.GO, lab.name, [Info.BLOCK_SIZE]);
    assert.deepEqual(go.blocks, info.blocks);
  }),
];

async function flagsOf(lab: Lab, structured: boolean): Promise<number> {
  return (await lab.go({ structured })).facts.flags;
}

const flagCases = [
  must('C3', 'transmission flags: HAS_FLAGS is set', async (lab) => {
    assert.ok(((await flagsOf(lab, false)) & TransmissionFlag.HAS_FLAGS) !== 0);
  }),
  must('C3', 'transmission flags: SEND_DF is clear without structured replies', async (lab) => {
    assert.equal((await flagsOf(lab, false)) & TransmissionFlag.SEND_DF, 0);
  }),
  should('C3', 'transmission flags: SEND_DF is set with structured replies', async (lab) => {
    lab.needsStructured();
    assert.notEqual((await flagsOf(lab, true)) & TransmissionFlag.SEND_DF, 0);
  }),
  must('C3', 'transmission flags: no SEND_FAST_ZERO without SEND_WRITE_ZEROES', async (lab) => {
    const flags = await flagsOf(lab, false);
    if ((flags & TransmissionFlag.SEND_FAST_ZERO) !== 0)
      assert.notEqual(flags & TransmissionFlag.SEND_WRITE_ZEROES, 0);
  }),
  should('C3', 'transmission flags: bits without a meaning are clear', async (lab) => {
    assert.equal((await flagsOf(lab, false)) & 0xf000, 0);
  }),
  must('C3', 'transmission flags: READ_ONLY is set for a read-only export', async (lab) => {
    const { facts } = await lab.go({ readOnly: true });
    assert.notEqual(facts.flags & TransmissionFlag.READ_ONLY, 0);
  }),
  must('C3', 'the size is the same by EXPORT_NAME, INFO and GO, and below 2^63', async (lab) => {
    const { size } = (await lab.go()).facts;
    assert.ok(size < 1n << 63n);
    assert.equal((await (await lab.haggle()).describe(Option.INFO, lab.name)).size, size);
    const { wire } = await lab.haggle();
    wire.send(Buffer.from('IHAVEOPT'), u32(Option.EXPORT_NAME), counted(lab.name));
    assert.equal((await wire.receive(10)).readBigUInt64BE(0), size);
  }),
];

export const infoCases = [
  ...bothCases,
  ...malformedCases,
  ...goCases,
  ...textCases,
  ...blockCases,
  ...flagCases,
];
