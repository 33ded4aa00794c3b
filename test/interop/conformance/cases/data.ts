/** «Request types»: what READ, WRITE, TRIM, WRITE_ZEROES and CACHE do to the data. */
import { strict as assert } from 'node:assert';
import { Allocation, ChunkType, Command, CommandFlag, Errno } from '../../../../src/nbd/constants.js';
import { assertBytes, BASE_ALLOCATION, type Lab, must, pattern, reading, should } from '../case.js';
import { errnoName } from '../transmission.js';

const AT = 4 << 20;
const SIZE_NEEDED = 16 << 20;
/** By status bits: nobody may call provisioned zeroes a hole that is not zero. */
const STATE_NAMES: readonly string[] = ['data', '', 'zeroes', 'a hole'];
const STATES: readonly number[] = [0, Allocation.ZERO, Allocation.ZERO | Allocation.HOLE];
const CONTENT: readonly number[] = [ChunkType.OFFSET_DATA, ChunkType.OFFSET_HOLE];

async function writable(lab: Lab, structured?: boolean) {
  lab.needsWritable();
  lab.needsSize(SIZE_NEEDED);
  return lab.go(structured === undefined ? {} : { structured });
}

/** 1 MiB of data with a zeroed quarter in it, a hole if the server makes one. */
async function withHole(lab: Lab) {
  lab.needsFlag('SEND_WRITE_ZEROES');
  lab.needsStructured();
  const transmission = await writable(lab);
  const data = pattern(1 << 20, 51);
  await transmission.write(AT, data);
  await transmission.done({ command: Command.WRITE_ZEROES, offset: AT + (256 << 10), length: 256 << 10 });
  data.fill(0, 256 << 10, 512 << 10);
  return { transmission, data };
}

const readCases = [
  ...[
    [512, 0],
    [4096, 0],
    [1, 4095],
    [10_000, 333],
    [1 << 20, 0],
    [(1 << 20) + 1, 77],
  ].map(([length, shift]) =>
    must('C3', `${length} bytes at ${shift} past a block are written and read back`, async (lab) => {
      const aligned = length! % 512 === 0 && shift! % 512 === 0;
      lab.needs(aligned || (lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
      const transmission = await writable(lab);
      const data = pattern(length!, length! + shift!);
      await transmission.write(AT + shift!, data);
      assertBytes(await transmission.read(AT + shift!, length!), data, 'what is read back');
    }),
  ),
  must('C3', 'without structured replies too: 1 MiB is written and read back', async (lab) => {
    const transmission = await writable(lab, false);
    const data = pattern(1 << 20, 52);
    await transmission.write(AT, data);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
  must('C3', 'a WRITE leaves its neighbours alone', async (lab) => {
    const transmission = await writable(lab);
    const data = pattern(3 * 4096, 53);
    await transmission.write(AT, data);
    const middle = pattern(512, 54);
    await transmission.write(AT + 4096 + 512, middle);
    middle.copy(data, 4096 + 512);
    assertBytes(await transmission.read(AT, data.length), data, 'the whole');
  }),
  must('C3', 'READ across data and a hole: the chunks cover it once', async (lab) => {
    const { transmission, data } = await withHole(lab);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read');
  }),
  must('C3', 'READ of part of a hole that begins and ends at odd places is zero', async (lab) => {
    lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
    const { transmission } = await withHole(lab);
    const length = 100_001;
    assertBytes(await transmission.read(AT + (256 << 10) + 13, length), Buffer.alloc(length), 'the hole');
  }),
  should('C3', 'READ: chunks are multiples of 512 bytes', async (lab) => {
    const { transmission, data } = await withHole(lab);
    const { chunks } = await transmission.done(reading(AT, data.length));
    for (const { offset, length } of chunks) {
      assert.equal(offset % 512n, 0n);
      assert.equal(length % 512, 0);
    }
    return `${chunks.filter(({ type }) => type === ChunkType.OFFSET_HOLE).length} hole chunks`;
  }),
  must('C3', 'READ with DF: one content chunk, holes as data', async (lab) => {
    lab.needsFlag('SEND_DF');
    const { transmission, data } = await withHole(lab);
    const answer = await transmission.done(reading(AT + (192 << 10), 128 << 10, CommandFlag.DF));
    assertBytes(answer.data, data.subarray(192 << 10, 320 << 10), 'what is read');
    assert.equal(answer.chunks.filter(({ type }) => CONTENT.includes(type)).length, 1);
    assert.ok(answer.chunks.some(({ type }) => type === ChunkType.OFFSET_DATA));
  }),
  must('C3', 'READ with DF of 65536 bytes is supported', async (lab) => {
    lab.needsFlag('SEND_DF');
    await (await writable(lab)).done(reading(AT, 65_536, CommandFlag.DF));
  }),
  should('C3', 'READ with DF of 8 MiB: one chunk or EOVERFLOW', async (lab) => {
    lab.needsFlag('SEND_DF');
    const transmission = await writable(lab);
    const answer = await transmission.fails(reading(0, 8 << 20, CommandFlag.DF), Errno.OK, Errno.EOVERFLOW);
    assert.ok(answer.chunks.filter(({ type }) => CONTENT.includes(type)).length <= 1);
    return errnoName(answer.errno);
  }),
];

const zeroCases = [
  ...[
    ['', 0],
    [' with NO_HOLE', CommandFlag.NO_HOLE],
    [' with FUA', CommandFlag.FUA],
    [' with FUA and NO_HOLE', CommandFlag.FUA | CommandFlag.NO_HOLE],
  ].map(([what, flags]) =>
    must('C3', `WRITE_ZEROES${what}: reads back zero, neighbours as before`, async (lab) => {
      lab.needsFlag('SEND_WRITE_ZEROES');
      if (((flags as number) & CommandFlag.FUA) !== 0) lab.needsFlag('SEND_FUA');
      const transmission = await writable(lab);
      const data = pattern(64 << 10, 55);
      await transmission.write(AT, data);
      const asked = {
        command: Command.WRITE_ZEROES,
        flags: flags as number,
        offset: AT + 8192,
        length: 32 << 10,
      };
      await transmission.done(asked);
      data.fill(0, 8192, 8192 + (32 << 10));
      assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
    }),
  ),
  must('C3', 'WRITE_ZEROES of an odd range: reads back zero, neighbours as before', async (lab) => {
    lab.needsFlag('SEND_WRITE_ZEROES');
    lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
    const transmission = await writable(lab);
    const data = pattern(16 << 10, 56);
    await transmission.write(AT, data);
    await transmission.done({ command: Command.WRITE_ZEROES, offset: AT + 1001, length: 10_007 });
    data.fill(0, 1001, 1001 + 10_007);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
  must('C3', 'WRITE_ZEROES with NO_HOLE: BLOCK_STATUS calls it ZERO or data', async (lab) => {
    lab.needsFlag('SEND_WRITE_ZEROES');
    lab.needsContexts();
    lab.needsWritable();
    lab.needsSize(SIZE_NEEDED);
    const transmission = await lab.go({ contexts: [BASE_ALLOCATION] });
    const range = { offset: AT, length: 1 << 20 };
    await transmission.done({ command: Command.WRITE_ZEROES, flags: CommandFlag.NO_HOLE, ...range });
    const { extents } = await transmission.done({ command: Command.BLOCK_STATUS, ...range });
    const states = extents.get(transmission.contextId(BASE_ALLOCATION))!.map(([, status]) => status);
    for (const status of states) assert.ok(STATES.includes(status), `status ${status}`);
    return states.map((status) => STATE_NAMES[status]).join(', ');
  }),
  must('C3', 'WRITE_ZEROES of the 8 MiB in the middle is done', async (lab) => {
    lab.needsFlag('SEND_WRITE_ZEROES');
    const transmission = await writable(lab);
    await transmission.done({ command: Command.WRITE_ZEROES, offset: AT, length: 8 << 20 });
    assertBytes(await transmission.read(AT + (7 << 20), 1 << 20), Buffer.alloc(1 << 20), 'its end');
  }),
];

const hintCases = [
  must('C3', 'TRIM succeeds, and leaves its neighbours alone', async (lab) => {
    lab.needsFlag('SEND_TRIM');
    const transmission = await writable(lab);
    const data = pattern(3 * 65_536, 57);
    await transmission.write(AT, data);
    await transmission.done({ command: Command.TRIM, offset: AT + 65_536, length: 65_536 });
    assertBytes(await transmission.read(AT, 65_536), data.subarray(0, 65_536), 'before it');
    assertBytes(await transmission.read(AT + 131_072, 65_536), data.subarray(131_072), 'behind it');
  }),
  must('C3', 'TRIM of an odd range leaves its neighbours alone', async (lab) => {
    lab.needsFlag('SEND_TRIM');
    lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
    const transmission = await writable(lab);
    const data = pattern(32 << 10, 58);
    await transmission.write(AT, data);
    await transmission.done({ command: Command.TRIM, offset: AT + 1000, length: 20_000 });
    assertBytes(await transmission.read(AT, 1000), data.subarray(0, 1000), 'before it');
    assertBytes(await transmission.read(AT + 21_000, 11_768), data.subarray(21_000), 'behind it');
  }),
  must('C3', 'what was trimmed can be written again', async (lab) => {
    lab.needsFlag('SEND_TRIM');
    const transmission = await writable(lab);
    await transmission.done({ command: Command.TRIM, offset: AT, length: 65_536 });
    const data = pattern(65_536, 59);
    await transmission.write(AT, data);
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
  }),
  must('C3', 'CACHE changes no data', async (lab) => {
    lab.needsFlag('SEND_CACHE');
    const transmission = await writable(lab);
    const data = pattern(65_536, 60);
    await transmission.write(AT, data);
    const { errno } = await transmission.ask({ command: Command.CACHE, offset: AT, length: 65_536 });
    assertBytes(await transmission.read(AT, data.length), data, 'what is read back');
    return errnoName(errno);
  }),
];

export const dataCases = [...readCases, ...zeroCases, ...hintCases];
