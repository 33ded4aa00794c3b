/** A guest of several connections whose changes overlap in flight as they like: only the transaction log knows their order. */
import { NbdClient } from '../../../src/nbd/client/client.js';
import { contentOf } from './content.js';
import type { Random } from './random.js';

const CONNECTIONS = 3;
const WORKERS_PER_CONNECTION = 4;
const SECTOR_BYTES = 512;
const BLOCK_BYTES = 4096;
const CHANGE_BYTES_MAX = 48 << 10;

export type ChangeKind = 'write' | 'zero' | 'trim';

/** A change that was sent. */
export interface SentChange {
  readonly kind: ChangeKind;
  readonly offset: number;
  readonly length: number;
  /** What was written, unlike that of any other write; null: zeros. */
  readonly content: Buffer | null;
  acknowledged: boolean;
}

export class RecordedGuest {
  readonly changes: SentChange[] = [];
  /** Answers to what changes nothing. */
  reads = 0;
  flushes = 0;
  onAnswer: () => void = () => undefined;
  #stopping = false;

  private constructor(
    private readonly clients: readonly NbdClient[],
    private readonly sizeBytes: number,
    private readonly random: Random,
  ) {}

  static async attach(uri: string, sizeBytes: number, random: Random): Promise<RecordedGuest> {
    const clients: NbdClient[] = [];
    for (let i = 0; i < CONNECTIONS; i++) clients.push(await NbdClient.connect(uri));
    return new RecordedGuest(clients, sizeBytes, random);
  }

  get answers(): number {
    return this.reads + this.flushes + this.changes.filter(({ acknowledged }) => acknowledged).length;
  }

  /** Works until `stop`, or until the daemon dies. */
  async work(): Promise<void> {
    const workers = this.clients.flatMap((client) =>
      Array.from({ length: WORKERS_PER_CONNECTION }, () => this.#worker(client)),
    );
    await Promise.all(workers);
  }

  stop(): void {
    this.#stopping = true;
  }

  /** Ends the connections as a client should, so that the log has them ending. */
  async disconnect(): Promise<void> {
    await Promise.all(this.clients.map((client) => client.close()));
  }

  detach(): void {
    for (const client of this.clients) client.destroy();
  }

  async #worker(client: NbdClient): Promise<void> {
    try {
      while (!this.#stopping) {
        await this.#step(client);
        this.onAnswer();
      }
    } catch (error) {
      if ((error as { code?: string }).code !== 'closed') throw error;
    }
  }

  async #step(client: NbdClient): Promise<void> {
    const { random } = this;
    const draw = random.below(100);
    if (draw < 15) {
      const { offset, length } = this.#range(SECTOR_BYTES);
      await client.read(offset, length, Buffer.alloc(length));
      this.reads++;
    } else if (draw < 20) {
      await client.flush();
      this.flushes++;
    } else await this.#change(client, draw < 80 ? 'write' : draw < 92 ? 'zero' : 'trim');
  }

  async #change(client: NbdClient, kind: ChangeKind): Promise<void> {
    const range = this.#range(kind === 'trim' ? BLOCK_BYTES : SECTOR_BYTES);
    const { offset, length } = range;
    const content = kind === 'write' ? contentOf(this.changes.length + 1, offset, length) : null;
    const change: SentChange = { kind, ...range, content, acknowledged: false };
    this.changes.push(change);
    const fua = this.random.chance(0.1);
    if (content !== null) await client.write(offset, content, 0, length, { fua });
    else if (kind === 'trim') await client.trim(offset, length, { fua });
    else await client.zero(offset, length, { fua, noHole: this.random.chance(0.3) });
    change.acknowledged = true;
  }

  #range(unit: number): { offset: number; length: number } {
    const { random, sizeBytes } = this;
    const units = sizeBytes / unit;
    const count = random.between(1, random.chance(0.7) ? 3 : CHANGE_BYTES_MAX / unit);
    const first = random.below(units - count + 1);
    return { offset: first * unit, length: count * unit };
  }
}
