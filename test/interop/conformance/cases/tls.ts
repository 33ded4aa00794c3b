/** «TLS support»: what a server without TLS says, and what one with TLS must do. */
import { strict as assert } from 'node:assert';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { connect as startTls, type TLSSocket } from 'node:tls';
import { Info, Option, OptionReply, TransmissionFlag } from '../../../../src/nbd/constants.js';
import { infoData, metaData, option, u32 } from '../../../support/handshake.js';
import { BASE_ALLOCATION, type Lab, must, should } from '../case.js';
import { assertType, factsOf, Haggle, nameOf } from '../haggle.js';
import { UNKNOWN_NAME } from '../target.js';
import { Transmission } from '../transmission.js';
import { DEADLINE_MS, Wire, within } from '../wire.js';

const { ACK, ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD } = OptionReply;
const KEPT_FLAGS = 3;

// RFC 4346: record types, and the greeting of a client that speaks nothing newer than TLS 1.1.
const TLS_HANDSHAKE = 22;
const CIPHERS = [0xc0, 0x13, 0xc0, 0x14, 0x00, 0x2f, 0x00, 0x35, 0x00, 0xff];
const HELLO_BODY = Buffer.from([3, 2, ...Array(32).fill(7), 0, 0, CIPHERS.length, ...CIPHERS, 1, 0]);
const CLIENT_HELLO_1_1 = Buffer.concat([
  Buffer.from([TLS_HANDSHAKE, 3, 1, 0, HELLO_BODY.length + 4, 1, 0, 0, HELLO_BODY.length]),
  HELLO_BODY,
]);

/** A connection in clear text to the server that takes STARTTLS. */
async function clear(lab: Lab): Promise<Haggle> {
  const { tls } = lab.target;
  lab.needs(tls !== null, 'TLS');
  return Haggle.begin(lab.keep(await Wire.connect(tls!.address)));
}

/** Goes on in TLS. Resolves with null when the server refuses it. */
async function encrypt(lab: Lab, haggle: Haggle) {
  const socket = haggle.wire.detach();
  const folder = lab.target.tls!.certificates;
  const identity =
    folder === null
      ? {}
      : {
          cert: readFileSync(join(folder, 'client-cert.pem')),
          key: readFileSync(join(folder, 'client-key.pem')),
        };
  const secure: TLSSocket = startTls({ socket, rejectUnauthorized: false, ...identity });
  const settled = new Promise<boolean>((resolve) => {
    secure.once('secureConnect', () => resolve(true));
    for (const event of ['error', 'close', 'end']) secure.once(event, () => resolve(false));
  });
  let connected = false;
  try {
    connected = await within(settled, DEADLINE_MS, 'the TLS handshake');
  } finally {
    if (!connected) secure.destroy();
  }
  return connected ? { wire: lab.keep(Wire.over(secure)), protocol: secure.getProtocol() } : null;
}

/** The handshake goes on inside TLS; `before` is said in clear text. */
async function secured(lab: Lab, before?: (haggle: Haggle) => Promise<unknown>) {
  const haggle = await clear(lab);
  await before?.(haggle);
  await haggle.agreed(Option.STARTTLS);
  const inside = await encrypt(lab, haggle);
  assert.ok(inside !== null, 'the TLS handshake succeeds');
  return { haggle: Haggle.resumed(inside.wire), protocol: inside.protocol };
}

const nameOfTls = (lab: Lab) => lab.target.tls!.exportName;

export const tlsCases = [
  must('C4', 'STARTTLS: ACK, or ERR_POLICY or ERR_UNSUP and never ERR_TLS_REQD', async (lab) => {
    const { final } = await (await lab.haggle()).ask(Option.STARTTLS);
    assertType(final, [ACK, ERR_POLICY, ERR_UNSUP]);
    return nameOf(final);
  }),
  must('C4', 'STARTTLS that is refused changes nothing: the handshake goes on', async (lab) => {
    const haggle = await lab.haggle();
    const { final } = await haggle.ask(Option.STARTTLS);
    lab.needs(final !== ACK, 'a server without TLS');
    await haggle.describe(Option.GO, lab.name);
  }),
  must('C4', 'STARTTLS with data is refused', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(Option.STARTTLS, Buffer.from('x'), ERR_INVALID, ERR_POLICY, ERR_UNSUP);
    await haggle.goesOn();
  }),
  must('C4', 'without TLS nothing is answered with ERR_TLS_REQD', async (lab) => {
    const haggle = await lab.haggle();
    lab.needs((await haggle.ask(Option.STARTTLS)).final !== ACK, 'a server without TLS');
    for (const [number, data] of [
      [Option.LIST, undefined],
      [Option.INFO, infoData(UNKNOWN_NAME)],
      [Option.INFO, infoData(lab.name)],
      [Option.LIST_META_CONTEXT, metaData(lab.name, [])],
    ] as const)
      assert.notEqual(nameOf((await haggle.ask(number, data)).final), 'ERR_TLS_REQD');
  }),
  must('C4', 'where TLS is offered: behind STARTTLS the handshake goes on inside TLS', async (lab) => {
    const { haggle } = await secured(lab);
    const facts = await haggle.describe(Option.GO, nameOfTls(lab));
    await new Transmission(haggle.wire, facts, {
      structured: false,
      extended: false,
      contexts: [],
    }).goesOn();
  }),
  must('C4', 'where TLS is offered: it is TLS 1.2 or newer', async (lab) => {
    const { protocol } = await secured(lab);
    assert.ok(protocol === 'TLSv1.2' || protocol === 'TLSv1.3', `${protocol}`);
    return `${protocol}`;
  }),
  should('C4', 'where TLS is offered: TLS 1.1 is refused', async (lab) => {
    const haggle = await clear(lab);
    await haggle.agreed(Option.STARTTLS);
    haggle.wire.send(CLIENT_HELLO_1_1);
    const answer = await haggle.wire.receive(1, 'an alert').catch(() => null);
    assert.notEqual(answer?.[0], TLS_HANDSHAKE, 'the server goes on with TLS 1.1');
  }),
  must('C4', 'where TLS is offered: STARTTLS inside TLS: ERR_INVALID', async (lab) => {
    const { haggle } = await secured(lab);
    await haggle.refused(Option.STARTTLS, undefined, ERR_INVALID);
    await haggle.goesOn();
  }),
  must('C4', 'where TLS is offered: STARTTLS with data: ERR_INVALID', async (lab) => {
    await (await clear(lab)).refused(Option.STARTTLS, Buffer.from('x'), ERR_INVALID);
  }),
  must(
    'C4',
    'where TLS is offered: structured replies agreed on in clear text are forgotten',
    async (lab) => {
      const { haggle } = await secured(lab, (before) => before.ask(Option.STRUCTURED_REPLY));
      const facts = await haggle.describe(Option.GO, nameOfTls(lab));
      assert.equal(facts.flags & TransmissionFlag.SEND_DF, 0);
    },
  ),
  must('C5', 'where TLS is offered: extended headers agreed on in clear text are forgotten', async (lab) => {
    lab.needsExtended();
    const { haggle } = await secured(lab, (before) => before.ask(Option.EXTENDED_HEADERS));
    const facts = await haggle.describe(Option.GO, nameOfTls(lab));
    const compact = { structured: false, extended: false, contexts: [] };
    await new Transmission(haggle.wire, facts, compact).goesOn();
  }),
  must('C4', 'where TLS is offered: contexts selected in clear text are forgotten', async (lab) => {
    const { haggle } = await secured(lab, async (before) => {
      await before.ask(Option.STRUCTURED_REPLY);
      await before.ask(Option.SET_META_CONTEXT, metaData(nameOfTls(lab), [BASE_ALLOCATION]));
    });
    lab.needs((await haggle.ask(Option.STRUCTURED_REPLY)).final === ACK, 'structured replies');
    const facts = factsOf(await haggle.agreed(Option.GO, infoData(nameOfTls(lab), [Info.BLOCK_SIZE])));
    const transmission = new Transmission(haggle.wire, facts, {
      structured: true,
      extended: false,
      contexts: [],
    });
    assert.notEqual((await transmission.ask({ command: 7, offset: 0, length: 4096 })).errno, 0);
  }),
  must(
    'C4',
    'where TLS is offered: an option in clear text behind STARTTLS is not carried out',
    async (lab) => {
      const haggle = await clear(lab);
      haggle.wire.send(option(Option.STARTTLS), option(Option.STRUCTURED_REPLY));
      assert.equal((await haggle.answers(Option.STARTTLS)).final, ACK);
      const inside = await encrypt(lab, haggle);
      if (inside === null) return 'the connection ends';
      const facts = await Haggle.resumed(inside.wire).describe(Option.GO, nameOfTls(lab));
      assert.equal(facts.flags & TransmissionFlag.SEND_DF, 0);
      return 'it is thrown away';
    },
  ),
  must('C4', 'where TLS is offered: what is no TLS behind the ACK ends the connection', async (lab) => {
    const { wire } = await clear(lab).then(async (haggle) => {
      await haggle.agreed(Option.STARTTLS);
      return haggle;
    });
    wire.send(Buffer.alloc(512, 0x41));
    await wire.ended();
  }),
  must('C4', 'where TLS is demanded: options in clear text get ERR_TLS_REQD', async (lab) => {
    const haggle = await clear(lab);
    const { final } = await haggle.ask(Option.INFO, infoData(nameOfTls(lab)));
    lab.needs(final === ERR_TLS_REQD, 'a server that demands TLS');
    for (const number of [Option.GO, Option.LIST, Option.STRUCTURED_REPLY])
      await haggle.refused(number, number === Option.GO ? infoData(nameOfTls(lab)) : undefined, ERR_TLS_REQD);
  }),
  must('C4', 'where TLS is demanded: EXPORT_NAME in clear text ends the connection', async (lab) => {
    const probed = await (await clear(lab)).ask(Option.INFO, infoData(nameOfTls(lab)));
    lab.needs(probed.final === ERR_TLS_REQD, 'a server that demands TLS');
    const { wire } = await clear(lab);
    wire.send(option(Option.EXPORT_NAME, Buffer.from(nameOfTls(lab))));
    assert.equal((await wire.ended()).length, 0);
  }),
  must('C4', 'where TLS is demanded: ABORT in clear text is acknowledged', async (lab) => {
    await (await clear(lab)).agreed(Option.ABORT);
  }),
  should(
    'C6',
    'where TLS is offered: a client that goes before its TLS handshake harms nobody',
    async (lab) => {
      const haggle = await clear(lab);
      await haggle.agreed(Option.STARTTLS);
      haggle.wire.send(u32(KEPT_FLAGS));
      haggle.wire.close();
      await secured(lab);
    },
  ),
];
