/** «Size constraints»: bounds, alignment, length 0, large requests. */
import { strict as assert } from 'node:assert';
import { Command, Errno, PAYLOAD_BYTES_DEFAULT } from '../../../../src/nbd/constants.js';
import { assertBytes, BASE_ALLOCATION, type Lab, must, pattern, reading, should } from '../case.js';
import type { Asked, Transmission } from '../transmission.js';
import { LONG_DEADLINE_MS } from '../wire.js';

const { EINVAL, ENOSPC } = Errno;

type Name = 'READ' | 'WRITE' | 'TRIM' | 'WRITE_ZEROES' | 'CACHE' | 'BLOCK_STATUS';
const NAMES: readonly Name[] = ['READ', 'WRITE', 'TRIM', 'WRITE_ZEROES', 'CACHE', 'BLOCK_STATUS'];
const OFFERED = { TRIM: 'SEND_TRIM', CACHE: 'SEND_CACHE', WRITE_ZEROES: 'SEND_WRITE_ZEROES' } as const;

async function ready(lab: Lab, name: Name): Promise<Transmission> {
  if (name in OFFERED) lab.needsFlag(OFFERED[name as keyof typeof OFFERED]);
  if (name === 'WRITE') lab.needsWritable();
  if (name !== 'BLOCK_STATUS') return lab.go();
  lab.needsContexts();
  return lab.go({ contexts: [BASE_ALLOCATION] });
}

function asking(name: Name, offset: bigint | number, length: number): Asked {
  const command = Command[name];
  return name === 'WRITE' ? { command, offset, payload: Buffer.alloc(length) } : { command, offset, length };
}

/** Where a range lies that does not fit; size -> [offset, length]. */
const OUTSIDE: [where: string, range: (size: bigint) => [bigint, number]][] = [
  ['that begins inside and ends beyond the export', (size) => [size - 512n, 1024]],
  ['that begins at the end', (size) => [size, 512]],
  ['at 2^63', () => [1n << 63n, 512]],
  ['whose end wraps around 2^64', () => [(1n << 64n) - 512n, 1024]],
];

const boundCases = NAMES.flatMap((name) => {
  const errno = name === 'WRITE' || name === 'WRITE_ZEROES' ? ENOSPC : EINVAL;
  const error = errno === ENOSPC ? 'ENOSPC' : 'EINVAL';
  return OUTSIDE.map(([where, range]) =>
    should('C3', `a ${name} ${where}: ${error}`, async (lab) => {
      const transmission = await ready(lab, name);
      const [offset, length] = range(transmission.facts.size);
      await transmission.fails(asking(name, offset, length), errno);
      await transmission.goesOn();
    }),
  );
});

const edgeCases = [
  must('C3', 'the last 512 bytes are read and written', async (lab) => {
    lab.needsWritable();
    const transmission = await lab.go();
    const data = pattern(512, 41);
    await transmission.write(transmission.facts.size - 512n, data);
    assertBytes(await transmission.read(transmission.facts.size - 512n, 512), data, 'the end');
  }),
  must('C3', 'a WRITE beyond the end writes nothing, and its payload is consumed', async (lab) => {
    lab.needsWritable();
    const transmission = await lab.go();
    const { size } = transmission.facts;
    const before = pattern(512, 42);
    await transmission.write(size - 512n, before);
    const refused = await transmission.ask({
      command: Command.WRITE,
      offset: size - 512n,
      payload: pattern(1024, 43),
    });
    assert.notEqual(refused.errno, Errno.OK);
    assertBytes(await transmission.read(size - 512n, 512), before, 'the end');
  }),
  must('C3', 'single bytes at odd offsets are read and written, if the minimum block is 1', async (lab) => {
    lab.needsWritable();
    lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
    const transmission = await lab.go();
    const around = pattern(1024, 44);
    await transmission.write(4096, around);
    await transmission.write(4096 + 511, Buffer.from([0xa5]));
    around[511] = 0xa5;
    assertBytes(await transmission.read(4096, 1024), around, 'the byte and its neighbours');
    assertBytes(await transmission.read(4096 + 509, 5), around.subarray(509, 514), 'an odd range');
  }),
  should('C3', 'READ and WRITE that are not aligned to a minimum block above 1: EINVAL', async (lab) => {
    const minimum = lab.target.facts.blocks?.minimum ?? 1;
    lab.needs(minimum > 1, 'a minimum block above 1');
    const transmission = await lab.go();
    await transmission.fails(reading(1, minimum), EINVAL);
    await transmission.fails(reading(0, minimum - 1), EINVAL);
    await transmission.fails(asking('WRITE', 1, minimum), EINVAL);
    await transmission.goesOn();
  }),
];

const emptyCases = NAMES.map((name) =>
  should('C3', `a ${name} of length 0 does not disconnect`, async (lab) =>
    (await ready(lab, name)).choice(asking(name, 0, 0)),
  ),
);

async function large(lab: Lab, bytes: number): Promise<Transmission> {
  lab.needsSize(bytes);
  const transmission = await lab.go();
  transmission.wire.deadlineMs = LONG_DEADLINE_MS;
  return transmission;
}

async function writtenAndRead(lab: Lab, bytes: number): Promise<void> {
  lab.needsWritable();
  const transmission = await large(lab, bytes);
  const data = pattern(bytes, bytes);
  await transmission.write(0, data);
  assertBytes(await transmission.read(0, bytes), data, 'what is read back');
}

const largeCases = [
  must('C3', 'a READ of 32 MiB is answered', async (lab) => {
    await (await large(lab, PAYLOAD_BYTES_DEFAULT)).read(0, PAYLOAD_BYTES_DEFAULT);
  }),
  must('C3', 'a READ of 32 MiB without structured replies is answered', async (lab) => {
    lab.needsSize(PAYLOAD_BYTES_DEFAULT);
    const transmission = await lab.go({ structured: false });
    transmission.wire.deadlineMs = LONG_DEADLINE_MS;
    await transmission.read(0, PAYLOAD_BYTES_DEFAULT);
  }),
  must('C3', 'a WRITE of 32 MiB is read back', (lab) => writtenAndRead(lab, PAYLOAD_BYTES_DEFAULT)),
  must('C3', 'a WRITE of the advertised maximum is read back', async (lab) => {
    const maximum = lab.target.facts.blocks?.payloadMax ?? 0;
    lab.needs(maximum > 0 && maximum <= 64 << 20, 'a maximum payload of 64 MiB or less');
    await writtenAndRead(lab, maximum);
    return `${maximum}`;
  }),
  ...(['READ', 'WRITE'] as const).map((name) =>
    should('C3', `a ${name} of 512 bytes more than 32 MiB: served, refused, or the end`, async (lab) => {
      const bytes = PAYLOAD_BYTES_DEFAULT + 512;
      return (await large(lab, bytes)).choice(asking(name, 0, bytes), true);
    }),
  ),
  should('C3', 'a READ of 2^32 - 1 bytes: refused, or the end', async (lab) => {
    const answer = await (await lab.go()).choice(reading(0, 0xffff_ffff), true);
    assert.notEqual(answer, 'OK');
    return answer;
  }),
  should('C3', 'a WRITE that announces 2^32 - 1 bytes harms nobody', async (lab) => {
    const transmission = await lab.go();
    transmission.send({ command: Command.WRITE, offset: 0, length: 0xffff_ffff });
    transmission.wire.send(Buffer.alloc(1 << 20));
    await lab.alive();
  }),
  ...(['TRIM', 'WRITE_ZEROES', 'CACHE', 'BLOCK_STATUS'] as const).map((name) =>
    should('C3', `a ${name} of 2^32 - 1 bytes does not disconnect`, async (lab) =>
      (await ready(lab, name)).choice(asking(name, 0, 0xffff_ffff)),
    ),
  ),
  should('C3', 'a WRITE of 32 MiB beyond the end is consumed, not cut off', async (lab) => {
    lab.needsWritable();
    const transmission = await lab.go();
    transmission.wire.deadlineMs = LONG_DEADLINE_MS;
    return transmission.choice(asking('WRITE', transmission.facts.size, PAYLOAD_BYTES_DEFAULT));
  }),
];

export const limitCases = [...boundCases, ...edgeCases, ...emptyCases, ...largeCases];
