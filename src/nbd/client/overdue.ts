/**
 * When a server that keeps its connection open counts as gone: the rule behind `requestTimeoutMs`.
 *
 * Many long requests on a slow connection are no fault: a request is overdue when it waited for the timeout while nothing came at all (or
 * next to nothing), or when others overtook it for OVERTAKEN_MAX times as long. Silence is counted in looks at the clock, not in time: in
 * a process that was stopped, the answers may be there and just not read yet.
 */

import type { PendingRequest, RequestTable } from './requests.js';

/** A request that waits so many timeouts was forgotten by the server, though it answers others. */
const OVERTAKEN_MAX = 10;
/** Looks for overdue requests in one timeout. */
const LOOKS = 8;
/** A server that lets fewer bytes drip than this, and completes no answer, counts as silent. */
const HEARD_BYTES_MIN = 1024;

export class OverdueWatch {
  readonly #timer: NodeJS.Timeout;
  /** Looks since something came. */
  #silentLooks = 0;
  /** Bytes since then, and what `table.settled` was then. */
  #heardBytes = 0;
  #settledThen = 0;

  constructor(
    readonly table: RequestTable,
    readonly timeoutMs: number,
    /** May be called with every look until `stop`. The request has waited for `waitedMs` at least. */
    readonly onOverdue: (request: PendingRequest, waitedMs: number) => void,
  ) {
    this.#timer = setInterval(() => this.#look(), Math.max(1, timeoutMs / LOOKS));
    this.#timer.unref();
  }

  /** So many bytes came, and the table knows what they answered. */
  heard(bytes: number): void {
    this.#heardBytes += bytes;
    if (this.#heardBytes < HEARD_BYTES_MIN && this.table.settled === this.#settledThen) return;
    this.#silentLooks = 0;
    this.#heardBytes = 0;
    this.#settledThen = this.table.settled;
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  #look(): void {
    this.#silentLooks++;
    const nowMs = performance.now();
    const late = this.table.overdue(nowMs - this.timeoutMs);
    if (late === null) return;
    const waitedMs = this.#silentLooks > LOOKS ? this.timeoutMs : this.timeoutMs * OVERTAKEN_MAX;
    if (nowMs - late.startedAtMs >= waitedMs) this.onOverdue(late, waitedMs);
  }
}
