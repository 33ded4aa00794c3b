/** One client that does what fast-check says: a recorded session, damaged, cut into pieces, ended in some manner; and what must hold. */
import assert from 'node:assert/strict';
import fc from 'fast-check';
import { Conversation } from './conversation.js';
import type { Line, Reader } from './line.js';
import { clientMutation, type Mutation, mutated } from './mutations.js';
import type { Seed } from './seeds.js';
import type { Unit } from './wire.js';

export interface Attack {
  seed: number;
  mutations: Mutation[];
  /** Lengths of the pieces the stream arrives in, over and over; none: a unit each, which waits for its answer. */
  pieces: number[];
  /** Waits for its answers; or sends its end at once; or is gone. */
  ending: 'patient' | 'hasty' | 'abort';
  /** Where the stream ends, in thousandths of it. */
  cut: number;
  reader: Reader;
}

const pieceLengths: fc.Arbitrary<number[]> = fc.oneof(
  { weight: 3, arbitrary: fc.constant<number[]>([]) },
  { weight: 2, arbitrary: fc.constant<number[]>([Number.MAX_SAFE_INTEGER]) },
  { weight: 1, arbitrary: fc.constant<number[]>([1]) },
  {
    weight: 3,
    arbitrary: fc.array(fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 9000 })), {
      minLength: 1,
      maxLength: 10,
    }),
  },
);

export const attack: fc.Arbitrary<Attack> = fc.record({
  seed: fc.nat(1000),
  mutations: fc.array(clientMutation, { maxLength: 8 }),
  pieces: pieceLengths,
  ending: fc.oneof(
    { weight: 6, arbitrary: fc.constant('patient' as const) },
    { weight: 1, arbitrary: fc.constantFrom('hasty' as const, 'abort' as const) },
  ),
  cut: fc.oneof({ weight: 4, arbitrary: fc.constant(1000) }, { weight: 1, arbitrary: fc.nat(1000) }),
  reader: fc.constantFrom('eager', 'eager', 'slow', 'late'),
});

/** Longest time from any byte to what it leads to: no hang. */
const DEADLINE_MS = 10_000;
/** Bytes a run sends at most, so that runs stay short. */
const STREAM_BYTES_MAX = 2 << 20;

export async function inTime<T>(what: string, promise: Promise<T>, ms = DEADLINE_MS): Promise<T> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`hangs: ${what}`)), ms);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Carries it out on a line, and checks everything about it but the disk. */
export async function carryOut(plan: Attack, seeds: readonly Seed[], line: Line): Promise<Conversation> {
  const seed = seeds[plan.seed % seeds.length]!;
  const units = mutated(
    seed.client,
    plan.mutations,
    seeds.map(({ client }) => client),
  );
  const conversation = new Conversation();
  let hungUpEarly = false;
  line.listen((bytes) => conversation.received(bytes));
  await inTime('sending', sendAll(line, cutUp(units, plan), plan, conversation));
  line.read();
  if (plan.ending === 'patient') {
    await inTime(
      'the answers',
      until(line, () => conversation.settled || line.ended),
    );
    hungUpEarly = line.ended && !conversation.mayHangUp;
  }
  // In the middle of TLS the server does not look for a client's end: it has until the handshake's time is up.
  if (plan.ending === 'abort' || conversation.opaque) line.abort();
  else line.end();
  await inTime(
    'the end',
    until(line, () => line.closed || (line.ended && plan.ending !== 'abort')),
  );
  check(plan, conversation, hungUpEarly);
  return conversation;
}

async function until(line: Line, holds: () => boolean): Promise<void> {
  while (!holds()) await line.news();
}

async function sendAll(
  line: Line,
  pieces: Iterable<Buffer>,
  plan: Attack,
  conversation: Conversation,
): Promise<void> {
  for (const piece of pieces) {
    if (line.ended) return;
    conversation.sent(piece);
    await line.send(piece);
    if (plan.pieces.length > 0) continue;
    line.read();
    await until(line, () => conversation.settled || line.ended);
  }
}

/** The stream in the pieces it arrives in. */
function* cutUp(units: readonly Unit[], { pieces, cut }: Attack): Generator<Buffer> {
  const whole = Buffer.concat(units.map(({ bytes }) => bytes)).subarray(0, STREAM_BYTES_MAX);
  const end = Math.floor((whole.length * cut) / 1000);
  const lengths = pieces.length > 0 ? pieces : units.map(({ bytes }) => bytes.length);
  // Byte by byte through all of a long stream takes too long, and tells no more than its beginning.
  const small = Math.min(...lengths) < 16 ? 4096 : Number.MAX_SAFE_INTEGER;
  for (let at = 0, turn = 0; at < end; turn++) {
    const length =
      at < small ? lengths[turn % lengths.length]! : Math.max(4096, lengths[turn % lengths.length]!);
    if (length > 0) yield whole.subarray(at, Math.min(at + length, end));
    at += length;
  }
}

function check(plan: Attack, conversation: Conversation, hungUpEarly: boolean): void {
  assert.equal(
    conversation.serverBreach,
    null,
    `the server broke the protocol: ${conversation.serverBreach}`,
  );
  assert.ok(!hungUpEarly, 'the server hung up for no reason');
  if (plan.ending === 'abort' || conversation.lost) return;
  assert.equal(conversation.partial, 0, `${conversation.partial} bytes of an answer that is not whole`);
  const waiting = conversation.transmission?.waiting ?? 0;
  const owed = conversation.farewell || (plan.ending === 'patient' && conversation.clientBreach === null);
  if (owed) assert.equal(waiting, 0, `${waiting} requests were not answered`);
}
