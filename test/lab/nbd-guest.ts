/**
 * A machine's disk in use without a machine: workers that write, zero, trim and read back over NBD, as QEMU does with a disk that it reconnects to for
 * ever. What was answered is in `content`; what comes back as something else, or is refused, is a complaint.
 */
import assert from 'node:assert/strict';
import { setTimeout as delay } from 'node:timers/promises';
import { BlockferryError } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { NbdReplyError } from '../../src/nbd/client/requests.js';
import { Errno } from '../../src/nbd/constants.js';
import type { Random } from './crash/random.js';

const BLOCK = 4096;
const WORKERS = 3;
/** Blocks of one change, at most. */
const BLOCKS_MAX = 16;
const RECONNECT_MS = 5;
const PIECE_BYTES = 1 << 20;

export class NbdGuest {
  /** What the disk must hold, as far as it is not being changed. */
  readonly content: Buffer;
  readonly complaints: string[] = [];
  /** Changes that were answered. */
  changes = 0;
  /** Between two turns of a worker. */
  paceMs = 1;
  #uri = '';
  #client: Promise<NbdClient> | null = null;
  #workers: Promise<void>[] = [];
  #runs = false;

  constructor(
    content: Buffer,
    readonly random: Random,
  ) {
    this.content = Buffer.from(content);
  }

  get runs(): boolean {
    return this.#runs;
  }

  /** The machine works on the disk at this address. */
  resume(uri: string): void {
    assert.ok(!this.#runs, 'the guest runs already: twice would be two writers');
    if (uri !== this.#uri) this.#hangUp();
    this.#uri = uri;
    this.#runs = true;
    this.#workers = Array.from({ length: WORKERS }, (_, index) => this.#work(index));
  }

  /** Stands still: nothing is under way, and what was answered is flushed. */
  async pause(): Promise<void> {
    if (!this.#runs) return;
    this.#runs = false;
    await Promise.all(this.#workers);
    await this.#insist((client) => client.flush());
  }

  async close(): Promise<void> {
    this.#runs = false;
    this.#uri = '';
    this.#hangUp();
    await Promise.all(this.#workers);
  }

  /** Resolves when so many changes more were answered. */
  async progress(changes: number, timeoutMs = 30_000): Promise<void> {
    const deadline = performance.now() + timeoutMs;
    for (const goal = this.changes + changes; this.changes < goal; await delay(2))
      assert.ok(performance.now() < deadline, `no ${changes} changes within ${timeoutMs} ms at ${this.#uri}`);
  }

  /** Reads all of the disk. The guest must stand still. */
  async verify(): Promise<void> {
    assert.ok(!this.#runs);
    const buffer = Buffer.alloc(PIECE_BYTES);
    for (let offset = 0; offset < this.content.length; offset += PIECE_BYTES) {
      const length = Math.min(PIECE_BYTES, this.content.length - offset);
      await this.#insist((client) => client.read(offset, length, buffer));
      this.#compare(offset, buffer.subarray(0, length));
    }
    assert.deepEqual(this.complaints, []);
  }

  #compare(offset: number, got: Buffer): void {
    if (got.equals(this.content.subarray(offset, offset + got.length))) return;
    for (let at = 0; at < got.length; at += BLOCK) {
      const want = this.content.subarray(offset + at, Math.min(offset + at + BLOCK, offset + got.length));
      if (!got.subarray(at, at + want.length).equals(want))
        this.#complain(`block ${Math.floor((offset + at) / BLOCK)} is not what was written last`);
    }
  }

  #complain(what: string): void {
    if (this.complaints.length < 20) this.complaints.push(`${what} (at ${this.#uri})`);
  }

  /** Each worker has a part of the disk for itself: what it is about to change nobody else reads. */
  async #work(index: number): Promise<void> {
    const random = this.random.fork();
    const blocks = this.content.length / BLOCK;
    const part = Math.floor(blocks / WORKERS);
    while (this.#runs) {
      const count = random.between(1, BLOCKS_MAX);
      const first = index * part + random.below(part - count);
      await this.#turn(random, first * BLOCK, count * BLOCK);
      await delay(this.paceMs);
    }
  }

  async #turn(random: Random, offset: number, length: number): Promise<void> {
    const kind = random.below(10);
    if (kind < 3) {
      const got = Buffer.alloc(length);
      if (await this.#insist((client) => client.read(offset, length, got))) this.#compare(offset, got);
      return;
    }
    const there = this.content.subarray(offset, offset + length);
    if (kind === 3) {
      if (await this.#insist((client) => client.zero(offset, length))) there.fill(0);
    } else if (kind === 4) {
      if (await this.#insist((client) => client.trim(offset, length))) there.fill(0);
    } else {
      // Not at the blocks' borders.
      const [from, to] = [random.below(BLOCK / 2), length - random.below(BLOCK / 2)];
      const bytes = Buffer.alloc(to - from, random.between(1, 255));
      bytes.writeUInt32LE(random.below(2 ** 32), 0);
      const fua = kind === 5;
      if (await this.#insist((client) => client.write(offset + from, bytes, { fua })))
        bytes.copy(there, from);
    }
    this.changes++;
  }

  /** Sends it until it is answered. False: the guest was closed. */
  async #insist(request: (client: NbdClient) => Promise<unknown>): Promise<boolean> {
    while (this.#uri !== '') {
      this.#client ??= NbdClient.connect(this.#uri);
      const mine = this.#client;
      try {
        await request(await mine);
        return true;
      } catch (error) {
        const cause = error instanceof BlockferryError ? error.cause : error;
        if (cause instanceof NbdReplyError && cause.errno !== Errno.ESHUTDOWN)
          this.#complain(`refused: ${cause.message}`);
        if (this.#client === mine) this.#hangUp();
        await delay(RECONNECT_MS);
      }
    }
    return false;
  }

  #hangUp(): void {
    const client = this.#client;
    this.#client = null;
    client?.then(
      (each) => each.destroy(),
      () => undefined,
    );
  }
}
