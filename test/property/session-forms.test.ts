/** Simple, structured and extended sessions are one implementation: the same requests have the same results. */
import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { Command, CommandFlag, Errno, type ReplyForm } from '../../src/nbd/constants.js';
import { startSession } from '../../src/nbd/server/session.js';
import { type Manner, MemoryDevice } from '../fakes/memory-device.js';
import { connectedPair, RawClient, type Reply } from '../fakes/raw-client.js';
import { parametersOf } from '../support/direct-session.js';

const SIZE = 512 << 10;
const { READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const { FUA, DF, NO_HOLE, REQ_ONE, FAST_ZERO } = CommandFlag;
const FORMS: readonly ReplyForm[] = ['simple', 'structured', 'extended'];

const operation = fc.record({
  command: fc.constantFrom(READ, READ, READ, WRITE, WRITE_ZEROES, FLUSH, TRIM, CACHE, BLOCK_STATUS, 11),
  flags: fc.constantFrom(0, 0, 0, FUA, DF, NO_HOLE, REQ_ONE, FAST_ZERO, 0x1000),
  offset: fc.oneof(
    fc.nat(SIZE).map(BigInt),
    fc.constantFrom(0n, BigInt(SIZE), 2n ** 53n, 2n ** 63n + 512n, 2n ** 64n - 512n),
  ),
  length: fc.oneof(fc.nat(SIZE), fc.nat(9000), fc.constantFrom(0, 65_536, 131_073, SIZE, 0xffffffff)),
  seed: fc.nat(255),
});
type Operation = typeof operation extends fc.Arbitrary<infer T> ? T : never;

/** What a request came to: all that does not depend on the form. */
type Result = [errno: number, data: Buffer | null, status: [number, number][] | null];

function resultOf({ errno, data, status }: Reply): Result {
  return [errno, errno === 0 && data !== null && data.length > 0 ? data : null, status.get(1) ?? null];
}

async function resultsOf(
  form: ReplyForm,
  operations: readonly Operation[],
  manners: readonly Manner[],
): Promise<{ results: Result[]; data: Buffer }> {
  const device = new MemoryDevice(SIZE);
  device.data.fill(1, 0, SIZE / 4);
  device.findsZeroes = true;
  device.fastZero = true;
  device.extents = (_context, { offset, length }) => [
    [1 + (offset % 1000), 1],
    [length, 2],
  ];
  let turn = 0;
  device.manner = () => manners[turn++ % manners.length]!;
  const [server, socket] = connectedPair('descriptor');
  const session = startSession(server, parametersOf(device, form));
  const client = new RawClient(socket, form);
  const results: Result[] = [];
  for (const [cookie, { command, flags, offset, length, seed }] of operations.entries()) {
    const payload = command === WRITE ? { payload: Buffer.alloc(Math.min(length, SIZE), seed) } : { length };
    const reply = await client.ask({ command, flags, offset, cookie, ...payload });
    if (form === 'extended') assert.equal(reply.offset, offset);
    results.push(resultOf(reply));
  }
  socket.end();
  await session.closed;
  return { results, data: device.data };
}

/** What a session without structured replies cannot do. */
const needsStructured = ({ command, flags }: Operation) =>
  command === BLOCK_STATUS || (command === READ && flags === DF);

describe('session: its forms', () => {
  it('give the same results', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(operation, { maxLength: 25 }),
        fc.array(fc.constantFrom<Manner>('now', 'sync', 'turn'), { minLength: 1, maxLength: 5 }),
        async (operations, manners) => {
          const [simple, structured, extended] = await Promise.all(
            FORMS.map((form) => resultsOf(form, operations, manners)),
          );
          assert.deepEqual(extended!.results, structured!.results);
          assert.ok(extended!.data.equals(structured!.data) && simple!.data.equals(structured!.data));
          for (const [index, one] of operations.entries())
            if (needsStructured(one)) assert.equal(simple!.results[index]![0], Errno.EINVAL);
            else assert.deepEqual(simple!.results[index], structured!.results[index]);
        },
      ),
      { numRuns: 60 },
    );
  });
});
