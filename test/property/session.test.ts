import assert from 'node:assert/strict';
import { Duplex } from 'node:stream';
import { describe, it } from 'node:test';
import fc from 'fast-check';
import pino from 'pino';
import {
  Command,
  CommandFlag,
  Errno,
  EXTENDED_REQUEST_MAGIC,
  PAYLOAD_BYTES_MAX,
  REQUEST_MAGIC,
  type ReplyForm,
} from '../../src/nbd/constants.js';
import { type Session, startSession } from '../../src/nbd/server/session.js';
import { type Manner, MemoryDevice } from '../fakes/memory-device.js';
import {
  encodeExtendedRequest,
  encodeRequest,
  type RawRequest,
  type Reply,
  ReplyParser,
} from '../fakes/raw-client.js';

const SIZE = 64 << 10;
const { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;

/** A connection whose chunks the test cuts itself, and which takes answers at once or some turns later. */
class Wire extends Duplex {
  readonly replies: Reply[] = [];
  failure: unknown = null;

  constructor(
    readonly parser: ReplyParser,
    private readonly slow: boolean,
  ) {
    super({ allowHalfOpen: true });
  }

  override _read(): void {}

  override _write(bytes: Buffer, _encoding: string, done: (error?: Error | null) => void): void {
    if (!this.slow) {
      this.#take(bytes);
      done();
      return;
    }
    // The memory must stay as it is until `done`.
    setImmediate(() => {
      this.#take(bytes);
      done();
    });
  }

  #take(bytes: Buffer): void {
    try {
      this.replies.push(...this.parser.push(bytes));
    } catch (error) {
      this.failure ??= error;
    }
  }
}

interface Rig {
  wire: Wire;
  device: MemoryDevice;
  session: Session;
}

function rig(form: ReplyForm, slow: boolean, manners: readonly Manner[]): Rig {
  const device = new MemoryDevice(SIZE);
  let turn = 0;
  device.manner = () => manners[turn++ % manners.length]!;
  const structured = form !== 'simple';
  const wire = new Wire(new ReplyParser(form), slow);
  const session = startSession(wire, {
    device,
    structured,
    extended: form === 'extended',
    contexts: structured ? [{ id: 1, name: 'base:allocation' }] : [],
    rest: Buffer.alloc(0),
    log: pino({ level: 'silent' }),
  });
  return { wire, device, session };
}

/** Sends `bytes` cut at `cuts`, some chunks in the same turn, some each in its own. */
async function sendCut(wire: Wire, bytes: Buffer, cuts: readonly number[]): Promise<void> {
  const sorted = [...new Set(cuts.map((cut) => cut % (bytes.length + 1)))].sort((a, b) => a - b);
  let from = 0;
  for (const to of [...sorted, bytes.length]) {
    if (to > from) wire.push(Buffer.from(bytes.subarray(from, to)));
    from = to;
    if (to % 3 === 0) await new Promise((resolve) => setImmediate(resolve));
  }
}

async function until(condition: () => boolean): Promise<void> {
  const deadline = Date.now() + 5000;
  while (!condition()) {
    if (Date.now() > deadline) throw new Error(`not in time: ${condition}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

async function end({ wire, session, device }: Rig): Promise<void> {
  if (!wire.readableEnded) wire.push(null);
  await session.closed;
  assert.equal(wire.failure, null);
  assert.equal(device.released, 1);
}

const forms = fc.constantFrom<ReplyForm>('simple', 'structured', 'extended');
const encode = (form: ReplyForm) => (form === 'extended' ? encodeExtendedRequest : encodeRequest);

const manners = fc.array(fc.constantFrom<Manner>('now', 'sync', 'turn'), { minLength: 1, maxLength: 7 });
const cuts = fc.array(fc.nat(100_000), { maxLength: 12 });

const operation = fc.record({
  command: fc.constantFrom(READ, READ, WRITE, WRITE, WRITE_ZEROES, FLUSH, TRIM, CACHE, BLOCK_STATUS, 12),
  flags: fc.constantFrom(0, 0, 0, CommandFlag.FUA, CommandFlag.REQ_ONE, 0x40),
  offset: fc.oneof(fc.nat(SIZE), fc.nat(64), fc.constantFrom(SIZE, SIZE + 1, 2 ** 40)),
  length: fc.oneof(fc.nat(64), fc.nat(9000), fc.constantFrom(0, 4096, SIZE)),
  seed: fc.nat(255),
});
type Operation = typeof operation extends fc.Arbitrary<infer T> ? T : never;

function fillOf({ length, seed }: Operation): Buffer {
  return Buffer.from(Array.from({ length }, (_, i) => (i * 31 + seed) & 0xff));
}

/** What the model says of an operation; applies it. */
function expected(model: Buffer, op: Operation, structured: boolean): { errno: number; data: Buffer | null } {
  const { command, flags, offset, length } = op;
  const changes = command === WRITE || command === WRITE_ZEROES;
  const allowed = command === BLOCK_STATUS ? CommandFlag.FUA | CommandFlag.REQ_ONE : CommandFlag.FUA;
  if (command === 12 || (flags & ~allowed) !== 0) return { errno: Errno.EINVAL, data: null };
  if (command === FLUSH) return { errno: 0, data: null };
  if (command === BLOCK_STATUS && (!structured || length === 0)) return { errno: Errno.EINVAL, data: null };
  if (offset + length > SIZE) return { errno: changes ? Errno.ENOSPC : Errno.EINVAL, data: null };
  if (command === WRITE) fillOf(op).copy(model, offset);
  if (command === WRITE_ZEROES) model.fill(0, offset, offset + length);
  const data = command === READ ? Buffer.from(model.subarray(offset, offset + length)) : null;
  return { errno: 0, data };
}

/** Of requests in flight together, no two may touch the same bytes if one changes them: their order is free. */
function compatible(operations: readonly Operation[]): Operation[] {
  const kept: Operation[] = [];
  for (const op of operations) {
    const clash = kept.some(
      (other) =>
        op.offset < other.offset + other.length &&
        other.offset < op.offset + op.length &&
        (op.command !== READ || other.command !== READ),
    );
    if (!clash) kept.push(op);
  }
  return kept;
}

describe('session: properties', () => {
  it('behaves as an array of bytes, however requests are cut, delayed and reordered', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(fc.tuple(fc.array(operation, { maxLength: 30 }), cuts), { maxLength: 6 }),
        forms,
        fc.boolean(),
        manners,
        async (batches, form, slow, delays) => {
          const made = rig(form, slow, delays);
          const { wire, device } = made;
          const model = Buffer.alloc(SIZE);
          let cookie = 0;
          for (const [operations, at] of batches) {
            const batch = compatible(operations);
            wire.replies.length = 0;
            const answers = new Map<number, ReturnType<typeof expected>>();
            const requests = batch.map((op): Buffer => {
              const request: RawRequest = { ...op, cookie: ++cookie };
              if (op.command === READ) wire.parser.expectRead(cookie, op.offset, op.length);
              if (op.command === WRITE) request.payload = fillOf(op);
              answers.set(cookie, expected(model, op, form !== 'simple'));
              return encode(form)(request);
            });
            await sendCut(wire, Buffer.concat(requests), at);
            await until(() => wire.replies.length >= batch.length || wire.failure !== null);
            assert.equal(wire.failure, null);
            assert.equal(wire.replies.length, batch.length);
            for (const reply of wire.replies) {
              const answer = answers.get(reply.cookie);
              assert.ok(answer, 'one reply a request');
              answers.delete(reply.cookie);
              assert.equal(reply.errno, answer.errno);
              if (answer.data !== null && answer.data.length > 0) assert.deepEqual(reply.data, answer.data);
            }
          }
          assert.ok(device.data.equals(model));
          await end(made);
        },
      ),
      { numRuns: 150 },
    );
  });

  it('never throws, never answers twice and keeps to the grammar, whatever bytes come', async () => {
    await fc.assert(
      fc.asyncProperty(
        fc.array(operation, { maxLength: 20 }),
        fc.array(fc.tuple(fc.nat(100_000), fc.nat(255)), { maxLength: 4 }),
        fc.uint8Array({ maxLength: 200 }),
        fc.tuple(cuts, forms, fc.boolean()),
        manners,
        async (operations, mutations, tail, [at, form, slow], delays) => {
          const requests = operations.map((op, i) => {
            const request: RawRequest = { ...op, cookie: i + 1 };
            if (op.command === WRITE) request.payload = fillOf(op);
            return encode(form)(request);
          });
          const bytes = Buffer.concat([...requests, tail]);
          for (const [position, value] of mutations)
            if (bytes.length > 0) bytes[position % bytes.length] = value;
          const made = rig(form, slow, delays);
          const { wire } = made;
          const seen = walk(bytes, wire.parser, form === 'extended');
          fc.pre(seen.unique);
          await sendCut(wire, bytes, at);
          if (!seen.broken) {
            await until(() => wire.replies.length >= seen.complete || wire.failure !== null);
          }
          await end(made);
          assert.ok(seen.broken || wire.replies.length === seen.complete);
          assert.ok(wire.replies.length <= seen.complete);
          assert.equal(new Set(wire.replies.map((reply) => reply.cookie)).size, wire.replies.length);
        },
      ),
      { numRuns: 400 },
    );
  });
});

/** Reads the stream as a server should: how many requests are whole, and whether something that is none ends it. */
function walk(
  bytes: Buffer,
  parser: ReplyParser,
  extended: boolean,
): { complete: number; broken: boolean; unique: boolean } {
  const cookies = new Set<number>();
  let complete = 0;
  const ended = (broken: boolean) => ({ complete, broken, unique: cookies.size === complete });
  const headerBytes = extended ? 32 : 28;
  for (let at = 0; ; ) {
    if (bytes.length - at < headerBytes) return ended(false);
    if (bytes.readUInt32BE(at) !== (extended ? EXTENDED_REQUEST_MAGIC : REQUEST_MAGIC)) return ended(true);
    const flags = bytes.readUInt16BE(at + 4);
    const command = bytes.readUInt16BE(at + 6);
    const cookie = Number(bytes.readBigUInt64BE(at + 8));
    const offset = Number(bytes.readBigUInt64BE(at + 16));
    const length = extended ? Number(bytes.readBigUInt64BE(at + 24)) : bytes.readUInt32BE(at + 24);
    if (command === DISC) return ended(false);
    const carries = command === WRITE || (extended && (flags & CommandFlag.PAYLOAD_LEN) !== 0);
    if (extended && carries && length > PAYLOAD_BYTES_MAX) return ended(true);
    at += headerBytes + (carries ? length : 0);
    if (at > bytes.length) return ended(false);
    if (command === READ) parser.expectRead(cookie, offset, length);
    cookies.add(cookie);
    complete++;
  }
}
