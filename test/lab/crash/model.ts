/**
 * A disk as its guest may see it, byte by byte.
 *
 * A change is begun when it is sent and acknowledged when it is answered. Changes that are not acknowledged never overlap each
 * other; reads overlap whatever they like. What may be found:
 * - where no unacknowledged change is: exactly the acknowledged content;
 * - under one that is in flight, or was when the daemon died: each byte is either the content before it or the content it brings.
 *   A write is one pwrite into the page cache, which the kernel may cut when the process is killed: after a kill -9 a prefix of it
 *   is there (nothing and all included), without the blocks of it that were missing before. A zero or trim may have been done in
 *   any part;
 * - once seen, it stays: what the first look after a crash finds is the acknowledged content from then on.
 *
 * After a crash of the machine (`machineCrashed`) more is allowed: each byte is what the last answered flush, or a FUA, made
 * durable, or what any later change of it brought, whether it was answered or not.
 */
import { BLOCK_BYTES, blockAt, blocksOf } from '../../../src/volume/blocks.js';
import { contentOf, nameContent, SOURCE_TAG } from './content.js';

export type ChangeKind = 'write' | 'zero' | 'trim';

export interface Change {
  readonly tag: number;
  readonly kind: ChangeKind;
  readonly offset: number;
  readonly length: number;
  /** What it brings; null: zeros. */
  readonly content: Buffer | null;
  state: 'in flight' | 'acknowledged' | 'lost';
}

export interface Look {
  readonly offset: number;
  readonly length: number;
  /** The acknowledged content when it began. */
  readonly before: Buffer;
  /** Changes in flight then, or begun since. */
  readonly seen: readonly Change[];
}

export interface Flush {
  readonly covered: readonly Change[];
  readonly local: Uint8Array;
}

/** What was found is not what the guest may see. */
export class Difference extends Error {}

const HISTORY = 8192;

export class DiskModel {
  /** The acknowledged content. */
  readonly #certain: Buffer;
  /** What is on stable storage for certain; the same as `#certain` where the machine never crashes. */
  readonly #durable: Buffer;
  /** Per byte the tag of the change that `#durable` holds. */
  readonly #durableTag: Uint32Array | null;
  /** Begun and not acknowledged. */
  readonly #open = new Set<Change>();
  /** Begun, and not known to be durable. */
  #volatile = new Set<Change>();
  readonly #looks = new Set<Look & { seen: Change[] }>();
  readonly #history: Change[] = [];
  #tags = SOURCE_TAG;
  #afterMachineCrash = false;
  /** 1 for a block that must be local: a change of it, or a read of it that was to be kept, was answered. */
  readonly local: Uint8Array;
  readonly #durableLocal: Uint8Array;
  /** Reads are kept: the volume is known to be relocating. */
  keeps = true;

  constructor(
    readonly source: Buffer,
    options: { machineCrashes?: boolean } = {},
  ) {
    this.#certain = Buffer.from(source);
    this.#durable = options.machineCrashes ? Buffer.from(source) : this.#certain;
    this.#durableTag = options.machineCrashes ? new Uint32Array(source.length) : null;
    this.local = new Uint8Array(blocksOf(source.length));
    this.#durableLocal = new Uint8Array(this.local.length);
  }

  get size(): number {
    return this.#certain.length;
  }

  /** Whether a change of that range would overlap none that is not acknowledged. */
  free(offset: number, length: number): boolean {
    for (const change of this.#open) if (overlaps(change, offset, length)) return false;
    return true;
  }

  /** A change is about to be sent. A trim takes effect on whole blocks only: its length here is theirs, maybe 0. */
  begin(kind: ChangeKind, offset: number, length: number): Change {
    const tag = ++this.#tags;
    const content = kind === 'write' ? contentOf(tag, offset, length) : null;
    const range = effective(kind, offset, length, this.size);
    const change: Change = { tag, kind, content, state: 'in flight', ...range };
    // A trim of no whole block changes nothing that could be in doubt.
    if (change.length > 0) {
      this.#open.add(change);
      this.#volatile.add(change);
    }
    this.#history.push(change);
    if (this.#history.length > HISTORY) this.#history.shift();
    for (const look of this.#looks) if (overlaps(change, look.offset, look.length)) look.seen.push(change);
    return change;
  }

  acknowledge(change: Change, options: { durable?: boolean } = {}): void {
    change.state = 'acknowledged';
    this.#open.delete(change);
    apply(change, this.#certain);
    this.#mark(change.offset, change.length);
    if (options.durable) this.#fold(change);
  }

  /** The change failed, or its answer never came. */
  lose(change: Change): void {
    change.state = 'lost';
  }

  #mark(offset: number, length: number): void {
    if (length > 0) this.local.fill(1, blockAt(offset), blocksOf(offset + length));
  }

  // Durability

  beginFlush(): Flush {
    const covered = [...this.#volatile].filter((change) => change.state === 'acknowledged');
    return { covered, local: Uint8Array.from(this.local) };
  }

  endFlush({ covered, local }: Flush): void {
    for (const change of covered) this.#fold(change);
    for (let block = 0; block < local.length; block++) this.#durableLocal[block]! |= local[block]!;
  }

  #fold(change: Change): void {
    const tags = this.#durableTag;
    if (!this.#volatile.delete(change) || tags === null) return;
    for (let at = 0; at < change.length; at++) {
      const byte = change.offset + at;
      if (tags[byte]! > change.tag) continue;
      tags[byte] = change.tag;
      this.#durable[byte] = change.content === null ? 0 : change.content[at]!;
    }
  }

  /** The machine died: what was not flushed may be there or not. */
  machineCrashed(): void {
    // What is seen next is durable as long as it was on the disk at the crash: only until all that was in doubt was looked at.
    this.#afterMachineCrash = this.#volatile.size > 0;
    this.#durable.copy(this.#certain);
    this.#open.clear();
    for (const change of this.#volatile) {
      change.state = 'lost';
      this.#open.add(change);
    }
    this.local.set(this.#durableLocal);
  }

  // Reads

  beginRead(offset: number, length: number): Look {
    const before = Buffer.from(this.#certain.subarray(offset, offset + length));
    const look = { offset, length, before, seen: this.#touching(offset, length) };
    this.#looks.add(look);
    return look;
  }

  #touching(offset: number, length: number): Change[] {
    return [...this.#open].filter((change) => overlaps(change, offset, length));
  }

  /** Throws a Difference unless `found` is what the read may have seen; null: it was not answered. */
  endRead(look: Look, found: Buffer | null, kept = this.keeps): void {
    if (found !== null) this.#compare(found, look, 'a read');
    this.#looks.delete(look as Look & { seen: Change[] });
    if (found === null) return;
    if (kept) this.#mark(look.offset, look.length);
  }

  /** Whole blocks that hold every change whose effect is not known, in ascending order, none touching another. */
  doubtful(): { offset: number; length: number }[] {
    const ranges = [...this.#open]
      .map(({ offset, length }) => ({ first: blockAt(offset), end: blocksOf(offset + length) }))
      .sort((a, b) => a.first - b.first);
    const merged: { first: number; end: number }[] = [];
    for (const range of ranges) {
      const last = merged.at(-1);
      if (last === undefined || range.first > last.end) merged.push(range);
      else last.end = Math.max(last.end, range.end);
    }
    return merged.map(({ first, end }) => ({
      offset: first * BLOCK_BYTES,
      length: Math.min(end * BLOCK_BYTES, this.size) - first * BLOCK_BYTES,
    }));
  }

  /** What the first look after a crash found in one of the doubtful ranges: it stays. */
  settle(offset: number, found: Buffer): void {
    const within = this.#touching(offset, found.length);
    const before = this.#certain.subarray(offset, offset + found.length);
    this.#compare(
      found,
      { offset, length: found.length, before, seen: within },
      'the first read after the crash',
    );
    for (const change of within) {
      if (!this.#afterMachineCrash) this.#checkPrefix(change, offset, found);
      this.#open.delete(change);
      this.#volatile.delete(change);
    }
    this.#keepSeen(offset, found);
    if (this.#open.size === 0) this.#afterMachineCrash = false;
  }

  /** A crash of the machine loses what was seen only if it was not yet durable: a change that stands for all of it. */
  #keepSeen(offset: number, found: Buffer): void {
    found.copy(this.#certain, offset);
    if (this.#afterMachineCrash) {
      // It was read off the disk, or is fetched again just so.
      found.copy(this.#durable, offset);
      this.#durableTag?.fill(this.#tags, offset, offset + found.length);
      return;
    }
    const tag = ++this.#tags;
    const change: Change = {
      tag,
      kind: 'write',
      offset,
      length: found.length,
      content: Buffer.from(found),
      state: 'acknowledged',
    };
    this.#volatile.add(change);
  }

  #checkPrefix(change: Change, offset: number, found: Buffer): void {
    const { content } = change;
    if (content === null) return;
    const mine = found.subarray(change.offset - offset, change.offset - offset + change.length);
    const before = this.#certain.subarray(change.offset, change.offset + change.length);
    let end = change.length;
    while (end > 0 && mine[end - 1] === before[end - 1]) end--;
    for (let at = 0; at < end; at++) {
      const byte = change.offset + at;
      if (mine[at] === content[at] || this.local[blockAt(byte)] === 0) continue;
      throw new Difference(
        `${describe(change)}: byte ${end - 1} of it is there, byte ${at} is not: not one pwrite cut short`,
      );
    }
  }

  /** A block that is not local has the source's content: nothing that was answered may have been written to it. */
  checkMissing(offset: number, length: number): void {
    const before = this.#certain.subarray(offset, offset + length);
    const found = this.source.subarray(offset, offset + length);
    this.#compare(found, { offset, length, before, seen: this.#touching(offset, length) }, 'a missing block');
  }

  /** All of the disk, found at rest. */
  checkAll(found: Buffer, what: string): void {
    if (found.length !== this.size) throw new Difference(`${what}: ${found.length} bytes, not ${this.size}`);
    this.#compare(
      found,
      { offset: 0, length: this.size, before: this.#certain, seen: [...this.#open] },
      what,
    );
  }

  #compare(found: Buffer, look: Look, what: string): void {
    if (found.equals(look.before)) return;
    for (let at = 0; at < found.length; at++) {
      if (found[at] !== look.before[at] && !this.#wasBrought(look.offset + at, found[at]!, look))
        throw this.#difference(found, look, at, what);
    }
  }

  #wasBrought(byte: number, value: number, look: Look): boolean {
    // After a crash what was overwritten durably cannot come back; while the guest works a slow read may have seen it.
    const floor = this.#looks.has(look as Look & { seen: Change[] }) ? -1 : (this.#durableTag?.[byte] ?? -1);
    return look.seen.some(
      ({ offset, length, content, tag }) =>
        byte >= offset &&
        byte < offset + length &&
        (content === null ? 0 : content[byte - offset]) === value &&
        tag > floor,
    );
  }

  #difference(found: Buffer, look: Look, at: number, what: string): Difference {
    const byte = look.offset + at;
    let end = at;
    while (end < found.length && found[end] !== look.before[end]) end++;
    const history = this.#history
      .filter((change) => change.offset <= byte && byte < change.offset + change.length)
      .slice(-6)
      .map(describe);
    return new Difference(
      `${what}: ${end - at} bytes from ${byte} on (block ${blockAt(byte)}, byte ${byte % BLOCK_BYTES} of it) are ` +
        `${nameContent(found.subarray(at), byte, this.#tags)}, not ${nameContent(look.before.subarray(at), byte, this.#tags)}; ` +
        `changes there: ${history.join(' | ') || 'none'}`,
    );
  }
}

function overlaps(change: Change, offset: number, length: number): boolean {
  return change.offset < offset + length && offset < change.offset + change.length;
}

function effective(kind: ChangeKind, offset: number, length: number, size: number) {
  if (kind !== 'trim') return { offset, length };
  const first = blocksOf(offset);
  const end = offset + length === size ? blocksOf(size) : blockAt(offset + length);
  if (first >= end) return { offset, length: 0 };
  const at = first * BLOCK_BYTES;
  return { offset: at, length: Math.min(end * BLOCK_BYTES, size) - at };
}

function apply(change: Change, disk: Buffer): void {
  if (change.content === null) disk.fill(0, change.offset, change.offset + change.length);
  else change.content.copy(disk, change.offset);
}

function describe(change: Change): string {
  return `${change.kind} ${change.tag} of ${change.length} bytes at ${change.offset}, ${change.state}`;
}
