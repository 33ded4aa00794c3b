/** A guest that works on its disk at random over several connections, and checks every answer against the model. */
import { NbdClient } from '../../../src/nbd/client/client.js';
import { ALLOCATION_DEPTH } from '../../../src/nbd/constants.js';
import { BLOCK_BYTES, blockAt, blocksOf } from '../../../src/volume/blocks.js';
import type { Change, ChangeKind, DiskModel } from './model.js';
import type { Random } from './random.js';

const CONNECTIONS = 3;
const WORKERS_PER_CONNECTION = 3;
const SETTLE_BYTES_MAX = 1 << 20;
/** Reads of what must be known, from a source that fails now and then. */
const TRIES_MAX = 50;

/** How often each operation is drawn, in parts of their sum. */
export interface Mix {
  read: number;
  write: number;
  zero: number;
  trim: number;
  flush: number;
}

export const MIXED: Mix = { read: 40, write: 45, zero: 6, trim: 5, flush: 4 };

export class Guest {
  readonly #clients: NbdClient[] = [];
  /** Operations that were answered. */
  completed = 0;
  /** Operations that the daemon answered with an error. */
  refused = 0;
  /** Called after each answer. */
  onAnswer: () => void = () => undefined;
  #stopping = false;
  #failure: unknown;

  private constructor(
    private readonly model: DiskModel,
    private readonly random: Random,
  ) {}

  static async attach(
    uri: string,
    model: DiskModel,
    random: Random,
    connections = CONNECTIONS,
  ): Promise<Guest> {
    const guest = new Guest(model, random);
    for (let i = 0; i < connections; i++)
      guest.#clients.push(await NbdClient.connect(uri, { contexts: [ALLOCATION_DEPTH] }));
    return guest;
  }

  get client(): NbdClient {
    return this.#clients[0]!;
  }

  /** Reads what is doubtful after a crash, before anything is sent again. */
  async settle(): Promise<void> {
    for (const { offset, length } of this.model.doubtful()) {
      const found = Buffer.alloc(length);
      for (let at = 0; at < length; at += SETTLE_BYTES_MAX)
        await this.#fetch(offset + at, Math.min(SETTLE_BYTES_MAX, length - at), found, at);
      this.model.settle(offset, found);
      if (this.model.keeps) this.model.local.fill(1, blockAt(offset), blocksOf(offset + length));
    }
  }

  /** Works until `stop`, or until the daemon dies. Throws what is wrong with an answer. */
  async work(mix: Mix = MIXED): Promise<void> {
    const workers = this.#clients.flatMap((client) =>
      Array.from({ length: WORKERS_PER_CONNECTION }, () => this.#worker(client, mix)),
    );
    await Promise.all(workers);
    if (this.#failure !== undefined) throw this.#failure;
  }

  stop(): void {
    this.#stopping = true;
  }

  async #worker(client: NbdClient, mix: Mix): Promise<void> {
    let alive = true;
    void client.closed.then(() => {
      alive = false;
    });
    while (alive && !this.#stopping && this.#failure === undefined) {
      try {
        await this.#operation(client, mix);
      } catch (error) {
        this.#failure ??= error;
      }
    }
  }

  async #operation(client: NbdClient, mix: Mix): Promise<void> {
    const total = mix.read + mix.write + mix.zero + mix.trim + mix.flush;
    let drawn = this.random.below(total);
    for (const kind of ['read', 'write', 'zero', 'trim'] as const) {
      drawn -= mix[kind];
      if (drawn >= 0) continue;
      const { offset, length } = this.#range(kind);
      return kind === 'read' ? this.read(client, offset, length) : this.change(client, kind, offset, length);
    }
    return this.flush(client);
  }

  /** Blocks, parts of blocks, ranges across blocks; half of them on a few hot spots, so that they meet each other. */
  #range(kind: 'read' | ChangeKind): { offset: number; length: number } {
    const { random } = this;
    const { size } = this.model;
    const blocks = blocksOf(size);
    const block = random.chance(0.4) ? random.below(Math.ceil(blocks / 16)) * 16 : random.below(blocks);
    let offset = block * BLOCK_BYTES;
    let length: number;
    switch (random.below(kind === 'write' || kind === 'read' ? 6 : 4)) {
      case 0: // within a block, at any byte
        offset += random.below(BLOCK_BYTES);
        length = random.between(1, BLOCK_BYTES);
        break;
      case 1: // sectors
        offset += random.below(8) * 512;
        length = random.between(1, 24) * 512;
        break;
      case 2: // any bytes of some blocks
        offset += random.below(BLOCK_BYTES);
        length = random.between(BLOCK_BYTES, 10 * BLOCK_BYTES);
        break;
      case 3: // many blocks
        length = random.between(8, 64) * BLOCK_BYTES;
        break;
      default:
        length = random.between(1, 4) * BLOCK_BYTES;
    }
    offset = Math.min(offset, size - 1);
    return { offset, length: Math.min(length, size - offset) };
  }

  async read(client: NbdClient, offset: number, length: number): Promise<void> {
    const keeps = this.model.keeps;
    const look = this.model.beginRead(offset, length);
    const found = Buffer.allocUnsafe(length);
    const answered = await this.#answered(client.read(offset, length, found));
    this.model.endRead(look, answered ? found : null, keeps);
  }

  async change(client: NbdClient, kind: ChangeKind, offset: number, length: number): Promise<void> {
    if (!this.model.free(offset, length)) {
      await new Promise(setImmediate); // let those under way be answered
      return;
    }
    const fua = this.random.chance(0.08);
    const change = this.model.begin(kind, offset, length);
    const answered = await this.#answered(this.#send(client, change, offset, length, fua));
    if (answered) this.model.acknowledge(change, { durable: fua });
    else this.model.lose(change);
    // No change is answered before the takeover, but for a trim of less than a block, which changes nothing.
    if (answered && change.length > 0) this.model.keeps = true;
  }

  #send(client: NbdClient, change: Change, offset: number, length: number, fua: boolean): Promise<void> {
    if (change.content !== null) return client.write(offset, change.content, 0, length, { fua });
    if (change.kind === 'trim') return client.trim(offset, length, { fua });
    return client.zero(offset, length, { fua, noHole: this.random.chance(0.3) });
  }

  async flush(client: NbdClient): Promise<void> {
    const flush = this.model.beginFlush();
    if (await this.#answered(client.flush())) this.model.endFlush(flush);
  }

  async #answered(request: Promise<void>): Promise<boolean> {
    try {
      await request;
    } catch (error) {
      if ((error as { code?: string }).code === 'closed') return false;
      if ((error as { code?: string }).code !== 'source-io') throw error;
      this.refused++;
      return false;
    }
    this.completed++;
    this.onAnswer();
    return true;
  }

  /** Compares the whole disk without fetching: what is local is read, what is missing must be as it is at the source. */
  async compareAll(): Promise<{ localBlocks: number }> {
    const { model, client } = this;
    let localBlocks = 0;
    for (let at = 0; at < model.size; ) {
      const extents = await client.blockStatus(ALLOCATION_DEPTH, at, model.size - at);
      for (const { length, flags } of extents) {
        const past = Math.min(at + length, model.size);
        if (flags === 2) model.checkMissing(at, past - at);
        else {
          localBlocks += blocksOf(past) - blockAt(at);
          for (; at < past; at += SETTLE_BYTES_MAX)
            await this.#compare(at, Math.min(SETTLE_BYTES_MAX, past - at));
        }
        at = past;
      }
    }
    return { localBlocks };
  }

  /** Reads all of it, or the first `size` bytes. */
  async readAll(size = this.model.size): Promise<void> {
    for (let at = 0; at < size; at += SETTLE_BYTES_MAX)
      await this.#compare(at, Math.min(SETTLE_BYTES_MAX, size - at));
  }

  async #compare(offset: number, length: number): Promise<void> {
    const look = this.model.beginRead(offset, length);
    const found = Buffer.allocUnsafe(length);
    await this.#fetch(offset, length, found, 0);
    this.model.endRead(look, found, false);
  }

  /** Reads again where a failing source fails. */
  async #fetch(offset: number, length: number, into: Buffer, at: number): Promise<void> {
    for (let tries = 1; ; tries++) {
      try {
        return await this.client.read(offset, length, into, at);
      } catch (error) {
        if ((error as { code?: string }).code !== 'source-io' || tries === TRIES_MAX) throw error;
      }
    }
  }

  /** Cuts the connections. */
  detach(): void {
    for (const client of this.#clients) client.destroy();
  }
}
