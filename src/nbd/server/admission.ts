/**
 * How many connections a listener has, and which of them give way.
 *
 * Two limits, so that neither kind of connection takes the other's places:
 * - Clients in the handshake: `handshakesMax`. They cost a client nothing, so nobody may keep others out by holding many of them.
 *   When all places are taken, a new client gets that of another: the one that has been at it for longest, of the address that has
 *   most of them. Whoever has only few is never pushed out by somebody with many.
 * - Clients in transmission: `connectionsMax` in all, and what each export allows. They are not disturbed; beyond the limit the choice
 *   of an export is refused, and the client told why.
 *
 * Invariant: nothing is counted up and down. What is held is the connections themselves, each until it is closed, and the numbers
 * are those that are there: no way a connection may end can lose a place.
 */
import type { Origin } from './access.js';
import type { ExportEntry } from './exports.js';

export interface Counted {
  /** 'ending': it is given up or said its last, and takes no place any more. */
  readonly stage: 'handshake' | 'transmission' | 'ending';
  /** The export it is served, in transmission. */
  readonly exportName: string | undefined;
  readonly origin: Origin;
  /** Ends a handshake at once. */
  giveWay(): void;
}

export interface AdmissionLimits {
  /** >= 1. */
  handshakesMax: number;
  /** >= 1. */
  connectionsMax: number;
}

export class Admission<Connection extends Counted> {
  readonly #limits: AdmissionLimits;
  /** In the order in which they came. */
  readonly #connections = new Set<Connection>();

  constructor(limits: AdmissionLimits) {
    this.#limits = limits;
  }

  /** Makes room for one more in the handshake. Returns the connection that had to give way, if one had to. */
  makeRoom(): Connection | undefined {
    const waiting = this.all().filter(({ stage }) => stage === 'handshake');
    if (waiting.length < this.#limits.handshakesMax) return undefined;
    const byOrigin = new Map<string, Connection[]>();
    for (const connection of waiting) {
      const key = keyOf(connection.origin);
      const others = byOrigin.get(key);
      if (others === undefined) byOrigin.set(key, [connection]);
      else others.push(connection);
    }
    const [oldest] = [...byOrigin.values()].reduce((most, group) =>
      group.length > most.length ? group : most,
    );
    oldest!.giveWay();
    return oldest;
  }

  add(connection: Connection): void {
    this.#connections.add(connection);
  }

  /** It is closed. */
  remove(connection: Connection): void {
    this.#connections.delete(connection);
  }

  all(): Connection[] {
    return [...this.#connections];
  }

  /** Clients in transmission, of one export or in all. */
  inTransmission(exportName?: string): number {
    let count = 0;
    for (const connection of this.#connections)
      if (
        connection.stage === 'transmission' &&
        (exportName === undefined || connection.exportName === exportName)
      )
        count++;
    return count;
  }

  /** Why no more clients can be served that export now, in words for the client; undefined: they can. */
  refusal({ name, connectionsMax }: ExportEntry): string | undefined {
    const max = this.#limits.connectionsMax;
    if (this.inTransmission() >= max)
      return `the server has all ${max} connections it may have: try again later`;
    if (connectionsMax !== undefined && this.inTransmission(name) >= connectionsMax)
      return `export ${JSON.stringify(name)} has all ${connectionsMax} connections it may have: try again later`;
    return undefined;
  }
}

/** Whom a connection counts for: an IPv4 address, an IPv6 network of 64 bits (one host has all of those), or this machine. */
function keyOf(origin: Origin): string {
  if (origin.kind === 'unix') return 'unix';
  const { bits, value } = origin.address;
  return bits === 32 ? `4:${value}` : `6:${value >> 64n}`;
}
