/** The extension of extended headers: 64-bit lengths, one form of reply. Source: doc/proto.md, branch extension-ext-header. */
import { strict as assert } from 'node:assert';
import {
  Command,
  CommandFlag,
  Errno,
  Option,
  OptionReply,
  REQUEST_MAGIC,
} from '../../../../src/nbd/constants.js';
import { infoData, option } from '../../../support/handshake.js';
import { assertBytes, BASE_ALLOCATION, type Lab, must, pattern, reading, should } from '../case.js';
import { assertType, nameOf } from '../haggle.js';
import { PAYLOAD_LEN, type Transmission } from '../transmission.js';

const { ACK, ERR_UNSUP, ERR_INVALID, ERR_EXT_HEADER_REQD } = OptionReply;
const AT = 1 << 20;

async function extended(lab: Lab, contexts?: string[]): Promise<Transmission> {
  lab.needsExtended();
  return lab.go({ extended: true, ...(contexts === undefined ? {} : { contexts }) });
}

export const extendedCases = [
  must('C5', 'EXTENDED_HEADERS: ACK or ERR_UNSUP', async (lab) => {
    const { final } = await (await lab.haggle()).ask(Option.EXTENDED_HEADERS);
    assertType(final, [ACK, ERR_UNSUP]);
    return nameOf(final);
  }),
  must('C5', 'EXTENDED_HEADERS with data is refused', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(Option.EXTENDED_HEADERS, Buffer.from('x'), ERR_INVALID, ERR_UNSUP);
    await haggle.goesOn();
  }),
  must('C5', 'EXTENDED_HEADERS that is refused changes nothing: compact requests go on', async (lab) => {
    const haggle = await lab.haggle();
    await haggle.refused(Option.EXTENDED_HEADERS, Buffer.from('x'));
    await haggle.describe(Option.INFO, lab.name);
    await (await lab.go()).goesOn();
  }),
  must('C5', 'where offered: STRUCTURED_REPLY afterwards: ERR_EXT_HEADER_REQD', async (lab) => {
    lab.needsExtended();
    const haggle = await lab.haggle();
    await haggle.agreed(Option.EXTENDED_HEADERS);
    await haggle.refused(Option.STRUCTURED_REPLY, undefined, ERR_EXT_HEADER_REQD);
    await haggle.goesOn();
  }),
  must('C5', 'where offered: EXPORT_NAME afterwards ends the connection', async (lab) => {
    lab.needsExtended();
    const haggle = await lab.haggle();
    await haggle.agreed(Option.EXTENDED_HEADERS);
    haggle.wire.send(option(Option.EXPORT_NAME, Buffer.from(lab.name)));
    await haggle.wire.ended();
  }),
  should('C5', 'where offered: EXTENDED_HEADERS a second time does not end the handshake', async (lab) => {
    lab.needsExtended();
    const haggle = await lab.haggle();
    await haggle.agreed(Option.EXTENDED_HEADERS);
    const { final } = await haggle.ask(Option.EXTENDED_HEADERS);
    await haggle.goesOn();
    return nameOf(final);
  }),
  must('C5', 'where offered: it may follow STRUCTURED_REPLY', async (lab) => {
    lab.needsExtended();
    const haggle = await lab.haggle();
    await haggle.structured();
    await haggle.agreed(Option.EXTENDED_HEADERS);
    assert.equal((await haggle.ask(Option.GO, infoData(lab.name))).final, ACK);
  }),
  must('C5', 'where offered: a READ has an extended reply that repeats its offset', async (lab) => {
    const answer = await (await extended(lab)).done(reading(AT, 4096));
    assert.deepEqual([...new Set(answer.echoed)], [BigInt(AT)]);
  }),
  must('C5', 'where offered: a WRITE with PAYLOAD_LEN is read back', async (lab) => {
    lab.needsWritable();
    const transmission = await extended(lab);
    const data = pattern(65_536, 501);
    const answer = await transmission.done({
      command: Command.WRITE,
      flags: PAYLOAD_LEN,
      offset: AT,
      payload: data,
    });
    assert.deepEqual(answer.echoed, [BigInt(AT)]);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
  must('C5', 'where offered: FLUSH, TRIM, WRITE_ZEROES and CACHE have extended replies', async (lab) => {
    lab.needsWritable();
    const transmission = await extended(lab);
    for (const [command, length] of [
      [Command.FLUSH, 0],
      [Command.TRIM, 4096],
      [Command.WRITE_ZEROES, 4096],
      [Command.CACHE, 4096],
    ] as const)
      assert.equal((await transmission.ask({ command, offset: 0, length })).echoed.length, 1);
  }),
  must('C5', 'where offered: PAYLOAD_LEN on a READ: the payload is consumed, then EINVAL', async (lab) => {
    const transmission = await extended(lab);
    await transmission.fails(
      { command: Command.READ, flags: PAYLOAD_LEN, offset: 0, payload: Buffer.alloc(512) },
      Errno.EINVAL,
    );
    await transmission.goesOn();
  }),
  must(
    'C5',
    'where offered: lengths above 4 GiB are no short ones: beyond the end is an error',
    async (lab) => {
      lab.needsWritable();
      const transmission = await extended(lab);
      for (const command of [Command.WRITE_ZEROES, Command.TRIM, Command.CACHE]) {
        const length = (1n << 32n) + 4096n;
        const { errno } = await transmission.ask({ command, offset: 0, length });
        assert.ok(errno === Errno.ENOSPC || errno === Errno.EINVAL, `command ${command}: ${errno}`);
      }
    },
  ),
  should('C5', 'where offered: a READ of 8 GiB is an error, not a disconnect', async (lab) => {
    const transmission = await extended(lab);
    return transmission.choice({ command: Command.READ, offset: 0, length: 8n << 30n });
  }),
  must('C5', 'where offered: BLOCK_STATUS has 64-bit descriptors', async (lab) => {
    lab.needsContexts();
    const transmission = await extended(lab, [BASE_ALLOCATION]);
    const { size } = transmission.facts;
    const answer = await transmission.done({ command: Command.BLOCK_STATUS, offset: 0, length: size });
    assert.ok(answer.chunks.some(({ type }) => type === 6));
    assert.ok(answer.extents.has(transmission.contextId(BASE_ALLOCATION)));
  }),
  must('C5', 'where offered: BLOCK_STATUS with REQ_ONE has one descriptor', async (lab) => {
    lab.needsContexts();
    const transmission = await extended(lab, [BASE_ALLOCATION]);
    const { extents } = await transmission.done({
      command: Command.BLOCK_STATUS,
      flags: CommandFlag.REQ_ONE,
      offset: 0,
      length: 65_536,
    });
    const list = extents.get(transmission.contextId(BASE_ALLOCATION))!;
    assert.ok(list.length === 1 && list[0]![0] <= 65_536, JSON.stringify(list));
  }),
  must('C5', 'where offered: an error has an error chunk', async (lab) => {
    const transmission = await extended(lab);
    const { errno, simple } = await transmission.ask(reading(transmission.facts.size, 512));
    assert.equal(errno, Errno.EINVAL);
    assert.ok(!simple);
  }),
  must('C5', 'where offered: the compact request magic ends the connection', async (lab) => {
    const transmission = await extended(lab);
    transmission.send({ ...reading(0, 512), magic: REQUEST_MAGIC });
    await transmission.wire.ended();
  }),
];
