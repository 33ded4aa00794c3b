/**
 * What reads of a disk may return while anything goes on at the same time. Every change is an event with a start and an end; a
 * byte may hold what an event put there unless another one began behind that event's end and was over before the read began.
 * Bytes are checked at the places where ranges begin and end, and between them.
 */
import assert from 'node:assert/strict';

const SECTOR = 512;
const CHECKED = [0, 1, 200, SECTOR - 2, SECTOR - 1];

interface Change {
  start: number;
  end: number;
  from: number;
  to: number;
  /** From `from` on; null for zeros. */
  data: Uint8Array | null;
  /** It may have happened or not: it failed, or is a hint. */
  optional: boolean;
}

export class DiskModel {
  readonly #changes: Change[] = [];
  #clock = 0;

  constructor(readonly size: number) {}

  now(): number {
    return ++this.#clock;
  }

  begin(from: number, length: number, data: Uint8Array | null, optional = false): Change {
    const change = {
      start: this.now(),
      end: Number.POSITIVE_INFINITY,
      from,
      to: from + length,
      data,
      optional,
    };
    this.#changes.push(change);
    return change;
  }

  done(change: Change): void {
    change.end = this.now();
  }

  /** It failed, and may have left something. */
  failed(change: Change): void {
    change.optional = true;
    change.end = this.now();
  }

  /** It was refused: nothing of it may ever be seen. */
  refused(change: Change): void {
    this.#changes.splice(this.#changes.indexOf(change), 1);
  }

  /** Checks what a read that began at `start` and ends now returned of [from, ...). */
  check(start: number, from: number, content: Uint8Array, what: string): void {
    const to = from + content.length;
    const end = this.now();
    for (let sector = from - (from % SECTOR); sector < to; sector += SECTOR) {
      for (const place of CHECKED) {
        const at = sector + place;
        if (at < from || at >= to) continue;
        const value = content[at - from]!;
        if (!this.#allowed(at, start, end, value))
          assert.fail(`${what}: byte ${at} is ${value}\n${this.#tell(at)}`);
      }
    }
  }

  #allowed(at: number, start: number, end: number, value: number): boolean {
    const here = this.#changes.filter((change) => change.from <= at && at < change.to && change.start <= end);
    return here.some(
      (change) =>
        (change.data === null ? 0 : change.data[at - change.from]) === value &&
        !here.some((later) => !later.optional && later.end < start && later.start > change.end),
    );
  }

  #tell(at: number): string {
    return this.#changes
      .filter((change) => change.from <= at && at < change.to)
      .map(
        ({ start, end, data, from, optional }) =>
          `  ${start} to ${end}: ${data?.[at - from] ?? 0}${optional ? ', perhaps' : ''}`,
      )
      .join('\n');
  }
}
