/** Transmission with extended headers. Source: doc/proto.md, branch extension-ext-header. */
import { strict as assert } from 'node:assert';
import { ChunkType, Command, CommandFlag, Errno, TransmissionFlag } from '../../../../src/nbd/constants.js';
import { u32, u64 } from '../../../support/handshake.js';
import { assertBytes, BASE_ALLOCATION, type Lab, must, pattern, reading, should } from '../case.js';
import { type Asked, errnoName, PAYLOAD_LEN, type Transmission } from '../transmission.js';
import { LONG_DEADLINE_MS } from '../wire.js';

const { EINVAL, ENOSPC, OK } = Errno;
const { READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const AT = 2 << 20;
const LENGTHS = [(1n << 32n) + 4096n, 1n << 53n, (1n << 53n) + 1n, 1n << 63n, (1n << 64n) - 1n];
const WITHOUT_PAYLOAD = { TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } as const;

async function extended(lab: Lab, contexts: string[] = []): Promise<Transmission> {
  lab.needsExtended();
  lab.needsSize(8 << 20);
  return lab.go({ extended: true, contexts });
}

async function writable(lab: Lab): Promise<Transmission> {
  lab.needsWritable();
  return extended(lab);
}

function offers(lab: Lab, command: number): void {
  if (command === TRIM) lab.needsFlag('SEND_TRIM');
  if (command === CACHE) lab.needsFlag('SEND_CACHE');
  if (command === WRITE_ZEROES) lab.needsFlag('SEND_WRITE_ZEROES');
  if (command === BLOCK_STATUS) lab.needsContexts();
}

const writing = (offset: number | bigint, payload: Buffer, flags = 0): Asked => ({
  command: WRITE,
  flags: flags | PAYLOAD_LEN,
  offset,
  payload,
});

/** A payload with a command that takes none. */
const withPayload = Object.entries({ READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 'command 99': 99 }).flatMap(
  ([name, command]) =>
    [16, 100_000].map((bytes) =>
      must(
        'C5',
        `where offered: ${bytes} bytes of payload with ${name}: consumed, then EINVAL`,
        async (lab) => {
          const transmission = await extended(lab);
          const asked = { command, flags: PAYLOAD_LEN, offset: 0, payload: pattern(bytes, command) };
          await transmission.fails(asked, EINVAL);
          await transmission.goesOn();
        },
      ),
    ),
);

const lengthCases = Object.entries(WITHOUT_PAYLOAD).flatMap(([name, command]) =>
  LENGTHS.map((length) =>
    should('C5', `where offered: ${name} of ${length} bytes is an error, not a disconnect`, async (lab) => {
      offers(lab, command);
      const transmission = await extended(lab, command === BLOCK_STATUS ? [BASE_ALLOCATION] : []);
      for (const offset of [0n, 4096n, (1n << 64n) - 4096n]) {
        const { errno } = await transmission.ask({ command, offset, length });
        assert.ok(errno === EINVAL || errno === ENOSPC, `at ${offset}: ${errnoName(errno)}`);
      }
      await transmission.goesOn();
    }),
  ),
);

const requestCases = [
  must('C5', 'where offered: every reply repeats the offset of its request, errors too', async (lab) => {
    const transmission = await extended(lab);
    for (const offset of [0n, 511n, transmission.facts.size, (1n << 53n) + 1n, (1n << 64n) - 1n])
      for (const command of [READ, FLUSH, CACHE, 99]) {
        const { echoed } = await transmission.ask({ command, offset, length: 1 });
        assert.deepEqual([...new Set(echoed)], [offset], `command ${command} at ${offset}`);
      }
  }),
  must('C5', 'where offered: a READ of length 0 has an extended reply', async (lab) => {
    const answer = await (await extended(lab)).ask(reading(0, 0));
    assert.ok(!answer.simple && answer.echoed.length > 0);
    return errnoName(answer.errno);
  }),
  must('C5', 'where offered: a header and payload in single bytes are understood', async (lab) => {
    const transmission = await writable(lab);
    const data = pattern(64, 601);
    const [bytes, cookie] = transmission.encode(writing(AT, data));
    await transmission.wire.sendSlowly(bytes);
    assert.equal((await transmission.answer(cookie)).errno, OK);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
  must('C5', 'where offered: 200 requests in one segment are all answered', async (lab) => {
    const transmission = await writable(lab);
    const asked = Array.from({ length: 200 }, (_, index) =>
      index % 2 === 0 ? writing(AT + index * 512, pattern(512, index)) : reading(index * 4096, 4096),
    );
    for (const cookie of transmission.send(...asked))
      assert.equal((await transmission.answer(cookie)).errno, OK);
    assertBytes(await transmission.read(AT + 100 * 512, 512), pattern(512, 100), 'one of them');
  }),
  must('C5', 'where offered: a WRITE of the advertised maximum, or of 16 MiB, is read back', async (lab) => {
    const transmission = await writable(lab);
    const most = transmission.facts.blocks?.payloadMax ?? 16 << 20;
    const length = Math.min(most, 64 << 20, Number(transmission.facts.size));
    transmission.wire.deadlineMs = LONG_DEADLINE_MS;
    const data = pattern(length, 602);
    await transmission.write(0, data);
    assertBytes(await transmission.read(0, length), data, 'what is read back');
    return `${length}`;
  }),
  should('C5', 'where offered: a payload beyond the maximum ends the connection', async (lab) => {
    const transmission = await extended(lab);
    const most = transmission.facts.blocks?.payloadMax ?? 32 << 20;
    transmission.send({ command: READ, flags: PAYLOAD_LEN, offset: 0, length: BigInt(most) + 512n });
    await transmission.wire.ended();
    await lab.alive();
  }),
  must('C5', 'where offered: a WRITE beyond the end: its payload is consumed', async (lab) => {
    const transmission = await writable(lab);
    await transmission.fails(writing(transmission.facts.size, pattern(4096, 603)), ENOSPC, EINVAL);
    await transmission.goesOn();
  }),
  should('C5', 'where offered: a WRITE beyond the end: ENOSPC', async (lab) => {
    const transmission = await writable(lab);
    await transmission.fails(writing(transmission.facts.size, pattern(4096, 603)), ENOSPC);
  }),
  should('C5', 'where offered: a WRITE without PAYLOAD_LEN harms nobody else', async (lab) => {
    const transmission = await writable(lab);
    const asked = { command: WRITE, offset: AT, payload: pattern(512, 604) };
    const chosen = await transmission.choice(asked, true);
    await lab.alive();
    return chosen;
  }),
  must(
    'C5',
    'where offered: READ of a zeroed range: the chunks cover it once, with DF as data',
    async (lab) => {
      lab.needsFlag('SEND_WRITE_ZEROES');
      const transmission = await writable(lab);
      const data = pattern(1 << 20, 605);
      await transmission.write(AT, data);
      await transmission.done({ command: WRITE_ZEROES, offset: AT + (256 << 10), length: 512 << 10 });
      data.fill(0, 256 << 10, 768 << 10);
      assertBytes(await transmission.read(AT, data.length), data, 'what is read');
      assertBytes(
        await transmission.read(AT + (256 << 10), 600 << 10),
        data.subarray(256 << 10, 856 << 10),
        'a part',
      );
      lab.needsFlag('SEND_DF');
      const whole = await transmission.done(reading(AT + (256 << 10), 600 << 10, CommandFlag.DF));
      assert.deepEqual(
        whole.chunks.filter(({ length }) => length > 0).map(({ type }) => type),
        [ChunkType.OFFSET_DATA],
      );
    },
  ),
  must('C5', 'where offered: DISC behind a WRITE: the data is there', async (lab) => {
    const transmission = await writable(lab);
    const data = pattern(4096, 606);
    const [write] = transmission.encode(writing(AT, data));
    const [leave] = transmission.encode({ command: Command.DISC });
    transmission.wire.send(write, leave);
    await transmission.wire.ended();
    assertBytes(await (await extended(lab)).read(AT, 4096), data, 'what is read back');
  }),
  must('C5', 'a compact request has no PAYLOAD_LEN: BLOCK_STATUS_PAYLOAD is not offered', async (lab) => {
    for (const structured of [false, lab.target.structured])
      assert.equal((await lab.go({ structured })).facts.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD, 0);
  }),
  should(
    'C5',
    'where offered: BLOCK_STATUS_PAYLOAD is not offered without a selected context',
    async (lab) => {
      const { flags } = (await extended(lab)).facts;
      assert.equal(flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD, 0);
    },
  ),
];

async function filtering(lab: Lab): Promise<Transmission> {
  lab.needsContexts();
  const transmission = await extended(lab, [...lab.target.contexts]);
  lab.needs((transmission.facts.flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD) !== 0, 'BLOCK_STATUS_PAYLOAD');
  return transmission;
}

const filter = (length: bigint, ...ids: number[]): Asked => ({
  command: BLOCK_STATUS,
  flags: PAYLOAD_LEN,
  offset: AT,
  payload: Buffer.concat([u64(length), ...ids.map(u32)]),
});

const UNKNOWN_ID = 0xdeadbeef;

const filterCases = [
  must('C5', 'where offered: BLOCK_STATUS with a payload answers in the contexts it names', async (lab) => {
    const transmission = await filtering(lab);
    const all = transmission.agreed.contexts.map(({ id }) => id);
    for (const ids of [...all.map((id) => [id]), all]) {
      const { extents } = await transmission.done(filter(65_536n, ...ids));
      assert.deepEqual([...extents.keys()].sort(), ids.sort());
    }
  }),
  must('C5', 'where offered: the length of a filtered BLOCK_STATUS is in its payload', async (lab) => {
    const transmission = await filtering(lab);
    const id = transmission.contextId(BASE_ALLOCATION);
    const asked = filter(4096n, id);
    const { extents } = await transmission.done({ ...asked, flags: PAYLOAD_LEN | CommandFlag.REQ_ONE });
    const list = extents.get(id)!;
    assert.ok(list.length === 1 && list[0]![0] > 12 && list[0]![0] <= 4096, JSON.stringify(list));
  }),
  ...(
    [
      ['an unknown id', (id: number) => filter(4096n, id, UNKNOWN_ID)],
      ['an id twice', (id: number) => filter(4096n, id, id)],
      [
        'half an id',
        (id: number) => ({
          ...filter(4096n, id),
          payload: Buffer.concat([u64(4096n), u32(id), u32(0).subarray(2)]),
        }),
      ],
      ['half a length', (id: number) => ({ ...filter(4096n, id), payload: u32(4096) })],
      ['a payload of 64 KiB', (id: number) => ({ ...filter(4096n, id), payload: Buffer.alloc(65_536) })],
    ] as const
  ).map(([what, asked]) =>
    must('C5', `where offered: BLOCK_STATUS with a payload, ${what}: consumed, then EINVAL`, async (lab) => {
      const transmission = await filtering(lab);
      await transmission.fails(asked(transmission.contextId(BASE_ALLOCATION)), EINVAL);
      await transmission.goesOn();
    }),
  ),
  should('C5', 'where offered: a filtered BLOCK_STATUS beyond the end: EINVAL', async (lab) => {
    const transmission = await filtering(lab);
    const id = transmission.contextId(BASE_ALLOCATION);
    for (const length of [transmission.facts.size, 1n << 63n, (1n << 64n) - 1n])
      await transmission.fails(filter(length, id), EINVAL);
    await transmission.goesOn();
  }),
  must(
    'C5',
    'where offered: BLOCK_STATUS with a payload and no selected context: consumed, then EINVAL',
    async (lab) => {
      const transmission = await extended(lab);
      await transmission.fails(filter(4096n, 1), EINVAL);
      await transmission.goesOn();
    },
  ),
  must(
    'C5',
    'where offered: base:allocation has no bits above 32, and no descriptor reaches beyond the export',
    async (lab) => {
      lab.needsContexts();
      const transmission = await extended(lab, [BASE_ALLOCATION]);
      const { size } = transmission.facts;
      const id = transmission.contextId(BASE_ALLOCATION);
      for (let at = 0; at < Number(size); ) {
        const { extents } = await transmission.done({
          command: BLOCK_STATUS,
          offset: at,
          length: size - BigInt(at),
        });
        for (const [length, status] of extents.get(id)!) {
          assert.ok(status < 2 ** 32, `status ${status}`);
          at += length;
        }
      }
    },
  ),
];

export const extendedRequestCases = [...requestCases, ...withPayload, ...lengthCases, ...filterCases];
