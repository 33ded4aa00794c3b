/** «Request types»: WRITE_ZEROES with FAST_ZERO. */
import { strict as assert } from 'node:assert';
import { Command, CommandFlag, Errno } from '../../../../src/nbd/constants.js';
import { assertBytes, type Lab, must, pattern, should } from '../case.js';
import { errnoName, type Transmission } from '../transmission.js';

const AT = 3 << 20;
const LENGTH = 256 << 10;
/** Far less than any disk needs to write the export that the cases are given. */
const QUICK_MS = 1_000;
const { OK, ENOTSUP, ENOSPC, EINVAL, EPERM } = Errno;
const { FAST_ZERO, NO_HOLE, FUA } = CommandFlag;

async function ready(lab: Lab): Promise<Transmission> {
  lab.needsFlag('SEND_FAST_ZERO');
  lab.needsSize(8 << 20);
  return lab.go();
}

const zeroing = (flags: number, offset: number | bigint = AT, length: number | bigint = LENGTH) => ({
  command: Command.WRITE_ZEROES,
  flags: FAST_ZERO | flags,
  offset,
  length,
});

export const fastZeroCases = [
  ...[
    ['', 0],
    [' with NO_HOLE', NO_HOLE],
    [' with FUA', FUA],
  ].map(([what, flags]) =>
    should('C3', `where offered: FAST_ZERO${what}: zeros, or ENOTSUP and nothing changed`, async (lab) => {
      const transmission = await ready(lab);
      const data = pattern(2 * LENGTH, 81);
      await transmission.write(AT, data);
      const { errno } = await transmission.fails(zeroing(flags as number), OK, ENOTSUP);
      if (errno === OK) data.fill(0, 0, LENGTH);
      assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
      return errnoName(errno);
    }),
  ),
  should(
    'C3',
    'where offered: FAST_ZERO of an odd range: zeros, or ENOTSUP and nothing changed',
    async (lab) => {
      lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
      const transmission = await ready(lab);
      const data = pattern(64 << 10, 82);
      await transmission.write(AT, data);
      const { errno } = await transmission.fails(zeroing(0, AT + 1001, 20_007), OK, ENOTSUP);
      if (errno === OK) data.fill(0, 1001, 1001 + 20_007);
      assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
      return errnoName(errno);
    },
  ),
  must('C3', 'where offered: FAST_ZERO of the whole export succeeds or fails quickly', async (lab) => {
    const transmission = await ready(lab);
    const beganMs = performance.now();
    const { errno } = await transmission.fails(zeroing(0, 0, transmission.facts.size), OK, ENOTSUP);
    const tookMs = performance.now() - beganMs;
    assert.ok(tookMs < QUICK_MS, `${Math.round(tookMs)} ms`);
    return errnoName(errno);
  }),
  should('C3', 'where offered: FAST_ZERO beyond the end: ENOSPC', async (lab) => {
    const transmission = await ready(lab);
    await transmission.fails(zeroing(0, transmission.facts.size), ENOSPC);
  }),
  should('C3', 'FAST_ZERO on a read-only export: EPERM, or EINVAL where it is not offered', async (lab) => {
    const transmission = await lab.go({ readOnly: true });
    return errnoName((await transmission.fails(zeroing(0, 0, 4096), EPERM, EINVAL)).errno);
  }),
  must('C3', 'where offered: what FAST_ZERO zeroed can be written again', async (lab) => {
    const transmission = await ready(lab);
    await transmission.ask(zeroing(0));
    const data = pattern(LENGTH, 83);
    await transmission.write(AT, data);
    assertBytes(await transmission.read(AT, LENGTH), data, 'what is read back');
  }),
];
