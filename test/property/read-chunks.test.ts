/** Replies cut into chunks and into receptions at random: the reader's buffer equals the model, or it says 'protocol'. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import { BlockferryError } from '../../src/errors.js';
import { Coverage } from '../../src/nbd/client/coverage.js';
import { ReplyReader } from '../../src/nbd/client/reply-reader.js';
import { type PendingRequest, RequestTable } from '../../src/nbd/client/requests.js';
import { Command } from '../../src/nbd/constants.js';
import {
  dataChunk,
  doneChunk,
  errorChunk,
  holeChunk,
  simpleReply,
  statusChunk,
  u32,
} from '../fakes/fake-server.js';

const EXPORT_BYTES = 1 << 20;
/** Buffers are larger than their reads: bytes around them must stay. */
const MARGIN = 3;

interface Read {
  readonly request: PendingRequest;
  readonly cookie: bigint;
  readonly buffer: Buffer;
  readonly answered: Promise<unknown>;
}

function startRead(table: RequestTable, offset: number, length: number): Read {
  const request = table.take();
  assert.ok(request !== null);
  const buffer = Buffer.alloc(length + 2 * MARGIN, 0xee);
  Object.assign(request, { command: Command.READ, flags: 0, offset, length, buffer, at: MARGIN });
  const cookie = (BigInt(request.generation) << 32n) | BigInt(request.index);
  const answered = table.promiseOf(request).then(
    () => null,
    (error: unknown) => error,
  );
  return { request, cookie, buffer, answered };
}

function newReader(table: RequestTable, structured = true): ReplyReader {
  return new ReplyReader(table, { structured, contextIds: new Set([5]), size: EXPORT_BYTES });
}

/** Feeds the bytes in receptions of the given sizes (cycled), through one buffer that is reused, as a socket does. */
function feed(reader: ReplyReader, bytes: Buffer, sizes: readonly number[]): void {
  const reception = Buffer.alloc(Math.max(...sizes));
  for (let at = 0, i = 0; at < bytes.length; i++) {
    const length = Math.min(sizes[i % sizes.length] as number, bytes.length - at);
    bytes.copy(reception, 0, at, at + length);
    reader.receive(reception, length);
    reception.fill(0x99);
    at += length;
  }
}

/** One read: where, and its content as runs of data or holes, in the order they are sent in. */
const readPlan = fc
  .record({
    offset: fc.nat(EXPORT_BYTES / 2),
    runs: fc.array(
      fc.record({ length: fc.integer({ min: 1, max: 700 }), hole: fc.boolean(), order: fc.nat() }),
      {
        minLength: 1,
        maxLength: 12,
      },
    ),
    seed: fc.nat(255),
    doneApart: fc.boolean(),
  })
  .map((plan) => ({ ...plan, length: plan.runs.reduce((sum, run) => sum + run.length, 0) }));
type ReadPlan = typeof readPlan extends fc.Arbitrary<infer T> ? T : never;

/** The content a plan stands for. */
function model(plan: ReadPlan): Buffer {
  const bytes = Buffer.alloc(plan.length + 2 * MARGIN, 0xee);
  let at = MARGIN;
  for (const run of plan.runs) {
    for (let i = 0; i < run.length; i++) bytes[at + i] = run.hole ? 0 : (plan.seed + at + i) % 251;
    at += run.length;
  }
  return bytes;
}

function chunksOf(plan: ReadPlan, cookie: bigint): Buffer[] {
  const content = model(plan);
  let at = 0;
  const placed = plan.runs.map((run) => {
    const from = at;
    at += run.length;
    return { ...run, from };
  });
  placed.sort((a, b) => a.order - b.order);
  const chunks = placed.map((run, i) => {
    const done = !plan.doneApart && i === placed.length - 1;
    const offset = plan.offset + run.from;
    if (run.hole) return holeChunk(cookie, offset, run.length, done);
    const from = MARGIN + run.from;
    return dataChunk(cookie, offset, content.subarray(from, from + run.length), done);
  });
  if (plan.doneApart) chunks.push(doneChunk(cookie));
  return chunks;
}

/** Merges the chunks of several replies, each keeping its own order. */
function interleave(replies: Buffer[][], picks: readonly number[]): Buffer {
  const left = replies.map((chunks) => [...chunks]);
  const out: Buffer[] = [];
  for (let i = 0; left.some((chunks) => chunks.length > 0); i++) {
    const open = left.filter((chunks) => chunks.length > 0);
    out.push((open[(picks[i % picks.length] as number) % open.length] as Buffer[]).shift() as Buffer);
  }
  return Buffer.concat(out);
}

const sizes = fc.array(fc.integer({ min: 1, max: 2000 }), { minLength: 1, maxLength: 8 });
const picks = fc.array(fc.nat(), { minLength: 1, maxLength: 20 });
const plans = fc.array(readPlan, { minLength: 1, maxLength: 5 });

describe('replies to reads, in chunks', () => {
  it('fill the buffers with exactly what was sent', async () => {
    await fc.assert(
      fc.asyncProperty(plans, picks, sizes, async (plans, picks, sizes) => {
        const table = new RequestTable();
        const reads = plans.map((plan) => startRead(table, plan.offset, plan.length));
        const replies = plans.map((plan, i) => chunksOf(plan, (reads[i] as Read).cookie));
        feed(newReader(table), interleave(replies, picks), sizes);
        assert.equal(table.active, 0);
        assert.equal(table.fragments, 0);
        for (const [i, read] of reads.entries()) {
          assert.equal(await read.answered, null);
          assert.deepEqual(read.buffer, model(plans[i] as ReadPlan));
        }
      }),
      { numRuns: 300 },
    );
  });

  it('fail when any chunk is missing or comes twice, and never write outside the read', async () => {
    await fc.assert(
      fc.asyncProperty(readPlan, fc.nat(), fc.boolean(), sizes, async (plan, which, twice, sizes) => {
        const table = new RequestTable();
        const read = startRead(table, plan.offset, plan.length);
        const chunks = chunksOf({ ...plan, doneApart: true }, read.cookie);
        const victim = which % (chunks.length - 1);
        chunks.splice(victim, twice ? 0 : 1, ...(twice ? [chunks[victim] as Buffer] : []));
        assert.throws(
          () => feed(newReader(table), Buffer.concat(chunks), sizes),
          (error) => error instanceof BlockferryError && error.code === 'protocol',
        );
        assert.equal(table.active, 1);
        assert.deepEqual(read.buffer.subarray(0, MARGIN), Buffer.alloc(MARGIN, 0xee));
        assert.deepEqual(read.buffer.subarray(-MARGIN), Buffer.alloc(MARGIN, 0xee));
        const lost = new BlockferryError('closed', 'lost');
        table.failAll(lost);
        assert.equal(await read.answered, lost);
      }),
      { numRuns: 200 },
    );
  });

  it('any damage to the stream leads to an error of ours or to fewer answers, nothing else', async () => {
    const damage = fc.array(fc.record({ at: fc.nat(), value: fc.nat(255) }), { minLength: 1, maxLength: 4 });
    await fc.assert(
      fc.asyncProperty(plans, picks, sizes, damage, async (plans, picks, sizes, damage) => {
        const table = new RequestTable();
        const reads = plans.map((plan) => startRead(table, plan.offset, plan.length));
        const replies = plans.map((plan, i) => chunksOf(plan, (reads[i] as Read).cookie));
        const bytes = interleave(replies, picks);
        for (const { at, value } of damage) bytes[at % bytes.length] = value;
        try {
          feed(newReader(table), bytes, sizes);
        } catch (error) {
          assert.ok(error instanceof BlockferryError && error.code === 'protocol', String(error));
        }
        for (const [i, read] of reads.entries()) {
          const length = (plans[i] as ReadPlan).length;
          assert.deepEqual(read.buffer.subarray(0, MARGIN), Buffer.alloc(MARGIN, 0xee));
          assert.deepEqual(read.buffer.subarray(MARGIN + length), Buffer.alloc(MARGIN, 0xee));
        }
        table.failAll(new BlockferryError('closed', 'lost'));
        assert.equal(table.active, 0);
        await Promise.all(reads.map((read) => read.answered));
      }),
      { numRuns: 500 },
    );
  });

  it('random bytes never do more than fail', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), fc.boolean(), sizes, (random, structured, sizes) => {
        const table = new RequestTable();
        const { cookie } = startRead(table, 0, 100);
        const starts = [
          u32(0x668e33ef),
          u32(0x67446698),
          simpleReply(cookie, 5),
          doneChunk(cookie).subarray(0, 16),
        ];
        const start = starts[(random[0] ?? 0) % starts.length] as Buffer;
        try {
          feed(newReader(table, structured), Buffer.concat([start, random]), sizes);
        } catch (error) {
          assert.ok(error instanceof BlockferryError && error.code === 'protocol', String(error));
        }
      }),
      { numRuns: 500 },
    );
  });
});

describe('other replies, cut anywhere', () => {
  it('block status and errors', async () => {
    await fc.assert(
      fc.asyncProperty(sizes, fc.string({ maxLength: 100 }), async (sizes, message) => {
        const table = new RequestTable();
        const status = startRead(table, 0, 1000);
        Object.assign(status.request, { command: Command.BLOCK_STATUS, buffer: null, contextId: 5 });
        const failed = startRead(table, 0, 10);
        const extents: [number, number][] = [
          [10, 1],
          [20, 1],
          [970, 2],
        ];
        const bytes = [
          statusChunk(status.cookie, 5, extents),
          errorChunk(failed.cookie, 5, message),
          doneChunk(status.cookie),
        ];
        feed(newReader(table), Buffer.concat(bytes), sizes);
        assert.equal(await status.answered, null);
        const error = await failed.answered;
        assert.ok(error instanceof BlockferryError && error.code === 'source-io');
      }),
    );
  });

  it('too many pieces are refused before they eat the memory', () => {
    const table = new RequestTable();
    const { cookie } = startRead(table, 0, EXPORT_BYTES);
    const reader = newReader(table);
    assert.throws(
      () => {
        for (let at = 0; at < EXPORT_BYTES; at += 2) feed(reader, holeChunk(cookie, at, 1), [32]);
      },
      (error) => error instanceof BlockferryError && /too many pieces/.test(error.message),
    );
  });
});

describe('coverage', () => {
  it('equals a model of single bytes', () => {
    const range = fc.tuple(fc.nat(60), fc.integer({ min: 1, max: 12 }));
    fc.assert(
      fc.property(fc.array(range, { maxLength: 40 }), (ranges) => {
        const coverage = new Coverage();
        const bytes = new Set<number>();
        for (const [from, length] of ranges) {
          const wanted = Array.from({ length }, (_, i) => from + i);
          const free = wanted.every((byte) => !bytes.has(byte));
          assert.equal(coverage.add(from, from + length), free);
          if (free) for (const byte of wanted) bytes.add(byte);
          const sorted = [...bytes].sort((a, b) => a - b);
          const pieces = sorted.filter((byte) => !bytes.has(byte - 1)).length;
          assert.equal(coverage.fragments, pieces > 1 ? pieces : 0);
          const [first, last] = [sorted[0] as number, sorted.at(-1) as number];
          assert.equal(coverage.isExactly(first, last + 1), pieces === 1);
          assert.equal(coverage.isExactly(first, last + 2), false);
        }
      }),
    );
  });
});
