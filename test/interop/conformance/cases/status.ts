/** BLOCK_STATUS, and what `base:allocation` means. */
import { strict as assert } from 'node:assert';
import { Allocation, ChunkType, Command, CommandFlag } from '../../../../src/nbd/constants.js';
import { BASE_ALLOCATION, type Lab, must, pattern, should } from '../case.js';
import type { Transmission } from '../transmission.js';

const AT = 8 << 20;
const LENGTH = 4 << 20;
const SIZE_NEEDED = 16 << 20;
const DESCRIPTORS_MAX = 1 << 20;
/** A walk needs no more requests than this on an image that the cases made. */
const STEPS_MAX = 10_000;

type Extents = [length: number, status: number][];

/** A range of 4 MiB: data, zeroes, data, data that was trimmed. */
async function ready(lab: Lab, contexts: string[] = [BASE_ALLOCATION]): Promise<Transmission> {
  lab.needsContexts();
  lab.needsWritable();
  lab.needsSize(SIZE_NEEDED);
  const transmission = await lab.go({ contexts });
  await transmission.write(AT, pattern(LENGTH, 71));
  await transmission.ask({ command: Command.WRITE_ZEROES, offset: AT + (1 << 20), length: 1 << 20 });
  await transmission.ask({ command: Command.TRIM, offset: AT + (3 << 20), length: 1 << 20 });
  return transmission;
}

async function statusOf(
  transmission: Transmission,
  offset: number,
  length: number,
  flags = 0,
): Promise<Extents> {
  const answer = await transmission.done({ command: Command.BLOCK_STATUS, flags, offset, length });
  const extents = answer.extents.get(transmission.contextId(BASE_ALLOCATION));
  assert.ok(extents !== undefined, 'there is a chunk for base:allocation');
  return extents;
}

const sum = (extents: Extents) => extents.reduce((total, [length]) => total + length, 0);

export const statusCases = [
  must('C3', 'BLOCK_STATUS: one chunk with the id of the selected context, then the end', async (lab) => {
    const transmission = await ready(lab);
    const answer = await transmission.done({ command: Command.BLOCK_STATUS, offset: AT, length: LENGTH });
    assert.deepEqual([...answer.extents.keys()], [transmission.contextId(BASE_ALLOCATION)]);
  }),
  must('C3', 'BLOCK_STATUS: one chunk for each of all contexts that are listed', async (lab) => {
    lab.needs(lab.target.contexts.length > 1, 'more contexts than base:allocation');
    const transmission = await ready(lab, [...lab.target.contexts]);
    const answer = await transmission.done({ command: Command.BLOCK_STATUS, offset: AT, length: LENGTH });
    const ids = transmission.agreed.contexts.map(({ id }) => id);
    assert.deepEqual([...answer.extents.keys()].sort(), ids.sort());
    assert.equal(answer.chunks.filter(({ type }) => type === ChunkType.BLOCK_STATUS).length, ids.length);
  }),
  must('C3', 'BLOCK_STATUS: all descriptors but the last end inside the request', async (lab) => {
    const extents = await statusOf(await ready(lab), AT, LENGTH);
    assert.ok(sum(extents.slice(0, -1)) < LENGTH, JSON.stringify(extents));
  }),
  must('C3', 'BLOCK_STATUS: no descriptor ends beyond the export', async (lab) => {
    const transmission = await ready(lab);
    const size = Number(transmission.facts.size);
    assert.ok(size - 4096 + sum(await statusOf(transmission, size - 4096, 4096)) <= size);
  }),
  must('C3', 'BLOCK_STATUS with REQ_ONE: one descriptor, no longer than the request', async (lab) => {
    const transmission = await ready(lab);
    for (const [offset, length] of [
      [AT, LENGTH],
      [AT, 512],
      [AT + (1 << 20), 4096],
    ] as const) {
      const extents = await statusOf(transmission, offset, length, CommandFlag.REQ_ONE);
      assert.equal(extents.length, 1);
      assert.ok(extents[0]![0] <= length, `${extents[0]![0]} of ${length} bytes`);
    }
  }),
  should('C3', 'BLOCK_STATUS: neighbours differ', async (lab) => {
    const extents = await statusOf(await ready(lab), AT, LENGTH);
    for (let index = 1; index < extents.length; index++)
      assert.notEqual(extents[index]![1], extents[index - 1]![1], JSON.stringify(extents));
  }),
  should('C3', 'BLOCK_STATUS: lengths are multiples of 512 bytes', async (lab) => {
    for (const [length] of await statusOf(await ready(lab), AT, LENGTH)) assert.equal(length % 512, 0);
  }),
  should('C3', 'BLOCK_STATUS: at most 2^20 descriptors', async (lab) => {
    assert.ok((await statusOf(await ready(lab), AT, LENGTH)).length <= DESCRIPTORS_MAX);
  }),
  must('C3', 'BLOCK_STATUS of one byte at an odd place', async (lab) => {
    lab.needs((lab.target.facts.blocks?.minimum ?? 1) === 1, 'a minimum block of 1');
    await statusOf(await ready(lab), AT + 4097, 1);
  }),
  must('C3', 'base:allocation: no bits but HOLE and ZERO', async (lab) => {
    for (const [, status] of await statusOf(await ready(lab), AT, LENGTH))
      assert.equal(status & ~(Allocation.HOLE | Allocation.ZERO), 0, `status ${status}`);
  }),
  must('C3', 'base:allocation: written data is neither a HOLE nor ZERO', async (lab) => {
    const transmission = await ready(lab);
    const [first] = await statusOf(transmission, AT, 1 << 20);
    assert.equal(first![1], 0);
  }),
  should('C3', 'base:allocation: zeroes are reported as ZERO', async (lab) => {
    lab.needsFlag('SEND_WRITE_ZEROES');
    const [first] = await statusOf(await ready(lab), AT + (1 << 20), 1 << 20);
    assert.notEqual(first![1] & Allocation.ZERO, 0);
  }),
  must(
    'C3',
    'base:allocation: a walk over the export comes to its end; what is ZERO reads zero',
    async (lab) => {
      const transmission = await ready(lab);
      const size = Number(transmission.facts.size);
      let at = 0;
      let steps = 0;
      while (at < size) {
        assert.ok(++steps <= STEPS_MAX, `at ${at} after ${STEPS_MAX} requests`);
        for (const [length, status] of await statusOf(transmission, at, Math.min(size - at, 32 << 20))) {
          const end = Math.min(at + length, size);
          if ((status & Allocation.ZERO) !== 0) await readsZero(transmission, at, end);
          at = end;
        }
      }
      return `${steps} requests`;
    },
  ),
];

async function readsZero(transmission: Transmission, at: number, end: number): Promise<void> {
  const step = 1 << 20;
  for (let from = at; from < end; from += step) {
    const length = Math.min(step, end - from);
    const data = await transmission.read(from, length);
    assert.ok(data.equals(Buffer.alloc(length)), `[${from}, ${from + length}) is zero`);
  }
}
