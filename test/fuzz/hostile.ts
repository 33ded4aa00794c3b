/** Servers that go wrong: what a real one sends, unit by unit, damaged on its way; or a recording of one, damaged likewise. */
import type net from 'node:net';
import fc from 'fast-check';
import { Conversation } from './conversation.js';
import { damaged, type Mutation, serverMutation } from './mutations.js';
import { type Rearrangement, rearranged, rearrangement } from './pieces.js';
import type { Passing } from './relay.js';
import type { Piece } from './seeds.js';
import type { Unit } from './wire.js';

/** What happens to the unit with that number, counted from the greeting or, `deep`, from the first reply to a request. */
export type Harm = { unit: number; deep: boolean } & (
  | { what: 'damage'; mutation: Mutation }
  /** It and what follows never come; the connection stays, or ends behind some bytes of it. */
  | { what: 'stall' }
  | { what: 'cut'; at: number }
  | { what: 'drop' | 'repeat' | 'late' }
  /** A READ's data comes in other pieces, or not all of it. */
  | { what: 'rearrange'; plan: Rearrangement }
  /** A unit that somebody else's server sent once comes first. */
  | { what: 'foreign'; other: number }
);

const place = { unit: fc.nat(9), deep: fc.integer({ min: 0, max: 3 }).map((n) => n > 0) };

const mostHarms = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.record({ ...place, what: fc.constant('damage' as const), mutation: serverMutation }),
  },
  {
    weight: 6,
    arbitrary: fc.record({ ...place, what: fc.constant('rearrange' as const), plan: rearrangement }),
  },
  { weight: 2, arbitrary: fc.record({ ...place, what: fc.constant('cut' as const), at: fc.nat(5000) }) },
  { weight: 3, arbitrary: fc.record({ ...place, what: fc.constantFrom('drop', 'repeat', 'late') }) },
  {
    weight: 2,
    arbitrary: fc.record({ ...place, what: fc.constant('foreign' as const), other: fc.nat(1000) }),
  },
) as fc.Arbitrary<Harm>;

/** Few stalls: each takes its time. */
export const harm: fc.Arbitrary<Harm> = fc.oneof(
  { weight: 30, arbitrary: mostHarms },
  { weight: 1, arbitrary: fc.record({ ...place, what: fc.constant('stall' as const) }) },
);

/** To answers, above all to the data of READs. */
export const replyHarm: fc.Arbitrary<Harm> = fc.oneof(
  {
    weight: 3,
    arbitrary: fc.record({
      unit: fc.nat(7),
      deep: fc.constant(true),
      what: fc.constant('rearrange' as const),
      plan: rearrangement,
    }),
  },
  { weight: 2, arbitrary: harm },
);

/** Does harm to a stream of units. */
class Harmer {
  #count = 0;
  #replies = 0;
  #held: Buffer | null = null;
  #stalled = false;
  #cut = false;

  constructor(
    private readonly harms: readonly Harm[],
    private readonly foreign: readonly Unit[],
  ) {}

  /** The connection ends behind what was given out. */
  get cut(): boolean {
    return this.#cut;
  }

  /** What comes in place of `unit`. */
  pass(unit: Unit): Buffer[] {
    const number = this.#count++;
    const isReply = unit.kind === 'reply' || unit.kind === 'chunk';
    const deep = isReply ? this.#replies++ : -1;
    let pieces = [unit.bytes];
    for (const harm of this.harms)
      if (harm.unit === (harm.deep ? deep : number)) pieces = this.#harm(harm, unit, pieces);
    if (this.#stalled) return [];
    if (this.#held !== null && pieces.length > 0) {
      pieces.push(this.#held);
      this.#held = null;
    }
    return pieces;
  }

  #harm(harm: Harm, unit: Unit, pieces: Buffer[]): Buffer[] {
    if (pieces.length === 0) return pieces;
    switch (harm.what) {
      case 'damage':
        return [...pieces.slice(0, -1), damaged({ ...unit, bytes: pieces.at(-1)! }, harm.mutation)];
      case 'stall':
        this.#stalled = true;
        return [];
      case 'cut': {
        this.#cut = true;
        const whole = Buffer.concat(pieces);
        return [whole.subarray(0, harm.at % (whole.length + 1))];
      }
      case 'drop':
        return [];
      case 'rearrange':
        return pieces.map((piece) => rearranged(piece, harm.plan));
      case 'repeat':
        return [...pieces, ...pieces];
      case 'late':
        this.#held = Buffer.concat(pieces);
        return [];
      case 'foreign':
        return [this.foreign[harm.other % this.foreign.length]!.bytes, ...pieces];
    }
  }
}

/** What passed on one connection: the bytes that the client sent and was sent. */
export interface Record {
  client: Buffer[];
  server: Buffer[];
}

/** Sits in a relay before a server that behaves. */
export function harmful(harms: readonly Harm[], foreign: readonly Unit[], record: Record): Passing {
  const harmer = new Harmer(harms, foreign);
  let units: Unit[] = [];
  const honest = new Conversation({ onUnit: (side, unit) => side === 'server' && units.push(unit) });
  const take = (): Buffer[] | null => {
    const pieces = units.flatMap((unit) => (harmer.cut ? [] : harmer.pass(unit)));
    units = [];
    record.server.push(...pieces);
    // Pieces in turns of their own, and then the end.
    return harmer.cut && pieces.length === 0 ? null : pieces;
  };
  return {
    fromClient(bytes) {
      honest.sent(bytes);
      record.client.push(Buffer.from(bytes));
      return harmer.cut ? null : [bytes];
    },
    fromServer(bytes) {
      honest.received(bytes);
      const pieces = take();
      if (honest.serverBreach === null) return pieces;
      // The client was led astray, and so was the server: what it says now is passed on as it is.
      const raw = Buffer.from(bytes);
      record.server.push(raw);
      return [...(pieces ?? []), raw];
    },
  };
}

/** How long nothing may happen before a recording goes on all the same. */
const QUIET_TURNS = 30;

/**
 * Plays the server's part of a recording to whoever connects, each piece when as many bytes of the client have come as at the time of
 * the recording, or when nothing happens any more.
 */
export function playRecording(
  socket: net.Socket,
  pieces: readonly Piece[],
  units: readonly Unit[],
  harms: readonly Harm[],
  foreign: readonly Unit[],
  record: Record,
): void {
  const harmer = new Harmer(harms, foreign);
  const gates = gatesOf(pieces, units);
  let came = 0;
  let quiet = 0;
  let next = 0;
  let over = false;
  socket.on('data', (bytes: Buffer) => {
    came += bytes.length;
    quiet = 0;
    record.client.push(Buffer.from(bytes));
  });
  socket.on('error', () => {});
  socket.on('end', () => socket.end());
  socket.on('close', () => {
    over = true;
  });
  const turn = (): void => {
    if (over) return;
    if (next < units.length && (came >= gates[next]! || quiet > QUIET_TURNS)) {
      quiet = 0;
      for (const piece of harmer.pass(units[next]!)) {
        record.server.push(piece);
        socket.write(piece);
      }
      next++;
      if (harmer.cut) socket.destroySoon();
    } else quiet++;
    setImmediate(turn);
  };
  turn();
}

/** How many bytes the client had sent when each unit of the server was complete. */
function gatesOf(pieces: readonly Piece[], units: readonly Unit[]): number[] {
  const gates: number[] = [];
  let client = 0;
  let server = 0;
  let end = 0;
  for (const { side, bytes } of pieces) {
    if (side === 'client') {
      client += bytes.length;
      continue;
    }
    server += bytes.length;
    while (gates.length < units.length && end + units[gates.length]!.bytes.length <= server) {
      end += units[gates.length]!.bytes.length;
      gates.push(client);
    }
  }
  return gates;
}
