/** The first bytes: «Newstyle negotiation», «Handshake flags». */
import { strict as assert } from 'node:assert';
import { HandshakeFlag, Option } from '../../../../src/nbd/constants.js';
import { clientFlags, option } from '../../../support/handshake.js';
import { type Lab, must, should } from '../case.js';
import { Haggle } from '../haggle.js';
import { Wire } from '../wire.js';

const { FIXED_NEWSTYLE, NO_ZEROES } = HandshakeFlag;

async function dropped(lab: Lab, flags: number): Promise<void> {
  const { wire } = await lab.haggle(flags);
  wire.send(option(Option.LIST));
  assert.equal((await wire.ended()).length, 0, 'nothing is answered');
}

export const greetingCases = [
  must('C1', 'the server speaks first: NBDMAGIC, IHAVEOPT, 16 bits of flags', async (lab) => {
    await lab.haggle(null);
  }),
  must('C1', 'the greeting offers FIXED_NEWSTYLE', async (lab) => {
    assert.ok(((await lab.haggle(null)).offered & FIXED_NEWSTYLE) !== 0);
  }),
  must('C1', 'the greeting has no flag but FIXED_NEWSTYLE and NO_ZEROES', async (lab) => {
    assert.equal((await lab.haggle(null)).offered & ~(FIXED_NEWSTYLE | NO_ZEROES), 0);
  }),
  must('C1', 'nothing follows the greeting before the client has spoken', async (lab) => {
    const { wire } = await lab.haggle(null);
    await lab.alive();
    assert.equal(wire.available, 0);
    assert.ok(!wire.over, 'the connection stays open');
  }),
  must('C1', 'client flags FIXED_NEWSTYLE: options are answered', async (lab) => {
    await (await lab.haggle(FIXED_NEWSTYLE)).goesOn();
  }),
  must('C1', 'client flags FIXED_NEWSTYLE and NO_ZEROES: options are answered', async (lab) => {
    const haggle = await lab.haggle(null);
    lab.needs((haggle.offered & NO_ZEROES) !== 0, 'NO_ZEROES');
    haggle.wire.send(clientFlags(FIXED_NEWSTYLE | NO_ZEROES));
    await haggle.goesOn();
  }),
  must('C1', 'client flags 0: EXPORT_NAME is answered with 134 bytes', async (lab) => {
    const { wire } = await lab.haggle(0);
    wire.send(option(Option.EXPORT_NAME, Buffer.from(lab.name)));
    const answer = await wire.receive(134, 'an answer to EXPORT_NAME');
    assert.equal(answer.readBigUInt64BE(0), lab.target.facts.size);
  }),
  ...[0x4, 0x100, 0x8000_0001, 0xffff_fff0].map((flags) =>
    must('C1', `client flags 0x${flags.toString(16)}: the connection is dropped`, (lab) =>
      dropped(lab, flags),
    ),
  ),
  must('C1', 'NO_ZEROES that was not offered: the connection is dropped', async (lab) => {
    const { offered } = await lab.haggle(null);
    lab.needs((offered & NO_ZEROES) === 0, 'a server without NO_ZEROES');
    await dropped(lab, FIXED_NEWSTYLE | NO_ZEROES);
  }),
  must('C1', 'client flags and option in single bytes are understood', async (lab) => {
    const haggle = await lab.haggle(null);
    await haggle.wire.sendSlowly(Buffer.concat([clientFlags(haggle.offered & 3), option(Option.ABORT)]));
    await haggle.answers(Option.ABORT);
  }),
  should('C6', 'a client that goes before the greeting harms nobody', async (lab) => {
    (await lab.connect()).close();
    await lab.alive();
  }),
  should('C6', 'a client that goes in the middle of its flags harms nobody', async (lab) => {
    const { wire } = await lab.haggle(null);
    wire.send(clientFlags().subarray(0, 2));
    wire.end();
    await lab.alive();
  }),
  should('C6', 'sixteen silent clients do not keep another out', async (lab) => {
    for (let count = 0; count < 16; count++) await lab.connect();
    await lab.alive();
  }),
  should('C6', 'a client that speaks HTTP is dropped', async (lab) => {
    const { wire } = await Haggle.begin(await lab.connect(), null);
    wire.send(Buffer.from('GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n'));
    await wire.ended();
    await lab.alive();
  }),
  should('C6', 'two hundred connections one after the other are served', async (lab) => {
    for (let count = 0; count < 200; count++) {
      const wire = await Wire.connect(lab.target.address);
      try {
        await Haggle.begin(wire, null);
      } finally {
        wire.close();
      }
    }
    await lab.alive();
  }),
];
