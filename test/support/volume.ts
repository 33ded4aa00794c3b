/** What the tests of a volume share: folders that go away, requests as a session makes them, a source under the test's control. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import { BlockferryError, type ErrorCode } from '../../src/errors.js';
import type { IoRequest, StatusRequest } from '../../src/nbd/device.js';
import { BLOCK_BYTES, bytesOfBlocks } from '../../src/volume/blocks.js';
import type { Identity } from '../../src/volume/identity.js';
import type { BlockStore, Supplier } from '../../src/volume/store.js';

const folders: string[] = [];
after(() => {
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

export function tempFolder(parent = tmpdir()): string {
  const folder = mkdtempSync(join(parent, 'blockferry-volume-'));
  folders.push(folder);
  return folder;
}

/** `bytes` bytes, none of them 0, each block of them different and different for each `seed`. */
export function patterned(bytes: number, seed = 1): Buffer {
  const content = Buffer.alloc(bytes);
  let state = (seed * 2654435761) >>> 0 || 1;
  for (let i = 0; i < bytes; i++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    content[i] = (state >>> 24) % 255 || 255;
  }
  return content;
}

/** A sparse file of `bytes` bytes. */
export function sparseFile(bytes: number, folder = tempFolder()): string {
  const path = join(folder, `image-${randomUUID().slice(0, 8)}.img`);
  writeFileSync(path, '');
  truncateSync(path, bytes);
  return path;
}

/** For assert.throws and assert.rejects: a BlockferryError of this code whose message is one line. */
export function failsWith(code: ErrorCode, text?: RegExp): (error: unknown) => boolean {
  return (error) => {
    assert.ok(error instanceof BlockferryError, `not one of ours: ${error}`);
    assert.equal(error.code, code, error.message);
    assert.doesNotMatch(error.message, /\n/);
    if (text !== undefined) assert.match(error.message, text);
    return true;
  };
}

const ROOM = 24;

/** A request as a session makes one; its payload lies in the middle of a larger buffer. */
export class Io implements StatusRequest {
  readonly buffer: Buffer;
  readonly at = ROOM;
  readonly extents: [length: number, status: number][] = [];
  readonly done: Promise<number>;
  abandoned = false;
  /** The answer, once there is one. */
  errno: number | undefined;
  /** The request's place in the order of answers. */
  answered = 0;
  static #answers = 0;
  /** What changed, and its place in the order of all changes. */
  readonly changes: [offset: number, length: number, order: number][] = [];
  static #changes = 0;
  #resolve!: (errno: number) => void;

  constructor(
    readonly offset: number,
    readonly length: number,
    readonly flags = 0,
    payload?: Uint8Array,
    readonly context = 'base:allocation',
    readonly extentsMax = 1000,
  ) {
    this.buffer = Buffer.alloc(ROOM + length + ROOM, 0xee);
    if (payload !== undefined) this.buffer.set(payload, ROOM);
    this.done = new Promise((resolve) => {
      this.#resolve = resolve;
    });
  }

  static write(offset: number, payload: Uint8Array, flags = 0): Io {
    return new Io(offset, payload.length, flags, payload);
  }

  static status(context: string, offset: number, length: number, extentsMax?: number): Io {
    return new Io(offset, length, 0, undefined, context, extentsMax);
  }

  get payload(): Buffer {
    return this.buffer.subarray(ROOM, ROOM + this.length);
  }

  extent(length: number, status: number): void {
    assert.ok(length >= 1, `an extent of ${length} bytes`);
    this.extents.push([length, status]);
  }

  changed(offset: number, length: number): void {
    assert.equal(this.errno, undefined, 'changed after it was completed');
    this.changes.push([offset, length, ++Io.#changes]);
  }

  complete(errno: number): void {
    assert.equal(this.errno, undefined, 'completed twice');
    const room = Buffer.alloc(ROOM, 0xee);
    assert.ok(this.buffer.subarray(0, ROOM).equals(room), 'the room before the payload was written to');
    assert.ok(this.buffer.subarray(ROOM + this.length).equals(room), 'the room behind it was written to');
    this.errno = errno;
    this.answered = ++Io.#answers;
    this.#resolve(errno);
  }
}

/** A source whose answers come when the test says so. */
export class HeldSource implements Supplier {
  demands: [first: number, end: number][] = [];
  prefetches: [first: number, end: number][] = [];
  through: IoRequest[] = [];

  constructor(
    readonly store: BlockStore,
    readonly content: Buffer,
  ) {
    store.supplier = this;
  }

  demand(first: number, end: number): void {
    assert.ok(first < end && end <= this.store.blocks, `demand of [${first}, ${end})`);
    this.demands.push([first, end]);
  }

  prefetch(first: number, end: number): void {
    this.prefetches.push([first, end]);
  }

  dropAbandoned(): void {}

  readThrough(request: IoRequest): void {
    this.through.push(request);
  }

  /** The blocks' data arrives, fetched under `epoch`. */
  deliver(first: number, end: number, epoch = this.store.epoch): number {
    return this.store.fill(epoch, first, end, this.#data(first, end), BLOCK_BYTES);
  }

  /** Likewise, and a thread keeps it. */
  deliverLater(first: number, end: number, epoch = this.store.epoch): Promise<number> {
    return this.store.fillLater(epoch, first, end, this.#data(first, end), BLOCK_BYTES);
  }

  /** Behind a block of something else. */
  #data(first: number, end: number): Buffer {
    const bytes = bytesOfBlocks(first, end, this.store.image.size);
    const data = Buffer.alloc(BLOCK_BYTES + bytes, 0xdd);
    this.content.copy(data, BLOCK_BYTES, first * BLOCK_BYTES, first * BLOCK_BYTES + bytes);
    return data;
  }

  /** Everything that was demanded arrives, until nothing is. */
  deliverAll(): void {
    for (let next = this.demands.shift(); next !== undefined; next = this.demands.shift())
      this.deliver(...next);
  }

  answerThrough(): void {
    for (const request of this.through.splice(0)) {
      this.content.copy(request.buffer, request.at, request.offset, request.offset + request.length);
      request.complete(0);
    }
  }
}

/** Lets every step run that is due, without waiting for any thread. */
export async function turns(count = 3): Promise<void> {
  for (let i = 0; i < count; i++) await setImmediate();
}

/** Polls until `holds` does. */
export async function until(holds: () => boolean, what: string, timeoutMs = 5000): Promise<void> {
  const deadline = Date.now() + timeoutMs;
  while (!holds()) {
    assert.ok(Date.now() < deadline, `${what}: not within ${timeoutMs} ms`);
    await setImmediate();
  }
}

export const OTHER_BOOT = '00000000-1111-4222-8333-444444444444';
const LIVE_BOOT_AT = 64;

/** Makes a volume's files look as if an earlier boot of the machine had left them, with what presence.live held in memory lost. */
export function asLeftByAnotherBoot(folder: string): void {
  const path = join(folder, 'volume.json');
  const identity = JSON.parse(readFileSync(path, 'utf8')) as Identity;
  if (identity.openBootId !== null) identity.openBootId = OTHER_BOOT;
  writeFileSync(path, JSON.stringify(identity));
  loseDirty(join(folder, 'dirty.live'));
  const live = join(folder, 'presence.live');
  if (!existsSync(live)) return;
  const bytes = readFileSync(live).fill(0xff, 4096); // bits that the kernel happened to write back
  bytes.write(OTHER_BOOT, LIVE_BOOT_AT, 'latin1');
  writeFileSync(live, bytes);
}

/** What dirty.live held in memory is lost as well: none of its bits was written back. */
function loseDirty(path: string): void {
  if (!existsSync(path)) return;
  const bytes = readFileSync(path);
  if (bytes.length < 4096) return; // about to be made
  bytes.fill(0, 4096);
  bytes.write(OTHER_BOOT, LIVE_BOOT_AT, 'latin1');
  writeFileSync(path, bytes);
}

/** A copy of `folder` as a process that is killed now leaves it; the page cache is what cp reads. Holes stay holes. */
export function copyOf(folder: string): string {
  const copy = tempFolder();
  const copied = spawnSync('cp', ['-a', '--sparse=always', `${folder}/.`, copy], { encoding: 'utf8' });
  if (copied.status === 0) return copy;
  // A thread renamed a file meanwhile; it is one step, and done now.
  assert.match(copied.stderr, /No such file/);
  return copyOf(folder);
}
