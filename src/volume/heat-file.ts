/**
 * STATE/<volume>/heat: a volume's heat, kept over restarts. Written each minute if something was counted, and when the volume is closed.
 *
 * Invariants
 * - It is replaced as a whole, and never synced: a guest's flush must not wait for it. What a crash of the machine leaves of it, and anything
 *   else that is damaged or another volume's, has the wrong checksum or head, and counts as cold. No failure here is an error.
 * - It is written in pieces between which the thread goes on, so it is no picture of one moment.
 * - Only a volume that is stored has a folder; of one that is merely served nothing is kept.
 * - Time in which nobody serves the volume does not cool it: its guest does not run either.
 *
 * Head: 0 magic, 8 bytes of the volume (u64), 16 volume id (36), 52 zeros up to 64. Then of each GiB that is not cold its number (u32) and a byte
 * a region. Last the crc32 of all before (u32). Big endian.
 */
import { rmSync } from 'node:fs';
import { open, readFile, rename, rm, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { nextOne } from '../native/index.js';
import { eachSecond } from './each-second.js';
import { HEAT_HEAD_BYTES, type Heat } from './heat.js';

const FILE = 'heat';
const MAGIC = 'BFHEAT01';
const FILE_HEAD_BYTES = 64;
const CHUNK_REGIONS = 4096;
const CHUNK_BYTES = 4 + CHUNK_REGIONS;
const CRC_BYTES = 4;
/** Of chunks that are copied and written in one step. */
const PIECE_CHUNKS = 64;

const SAVE_SWEEPS = 60;

/** What must be the same for the counts to be this volume's. */
export interface HeatOwner {
  readonly id: string;
  readonly size: number;
}

export class HeatFile {
  readonly #path: string;
  #savedCount: number;
  #last: Promise<void> = Promise.resolve();
  #removed = false;
  #sweeps = 0;
  #end: (() => void) | undefined;

  constructor(
    folder: string,
    private readonly owner: HeatOwner,
    private readonly heat: Heat,
    /** Whether the volume has a folder by now. */
    private readonly isStored: () => boolean,
  ) {
    this.#path = join(folder, FILE);
    this.#savedCount = heat.counted;
  }

  /** Decays the heat and saves it now and then, until `stop`. */
  start(): void {
    this.#end ??= eachSecond(() => this.#sweep());
  }

  #sweep(): void {
    this.heat.sweep();
    if (++this.#sweeps % SAVE_SWEEPS === 0) void this.save();
  }

  stop(): void {
    this.#end?.();
    this.#end = undefined;
  }

  /** Takes over what an earlier process kept, if it is whole and of this volume. */
  async load(): Promise<void> {
    try {
      const chunks = Math.ceil(this.heat.regions / CHUNK_REGIONS);
      const { size } = await stat(this.#path);
      if (size > FILE_HEAD_BYTES + chunks * CHUNK_BYTES + CRC_BYTES) return;
      this.#take(await readFile(this.#path));
    } catch {
      // cold
    }
  }

  #take(file: Buffer): void {
    const end = file.length - CRC_BYTES;
    if (end < FILE_HEAD_BYTES || (end - FILE_HEAD_BYTES) % CHUNK_BYTES !== 0) return;
    if (file.readUInt32BE(end) !== crc32(file.subarray(0, end))) return;
    if (!file.subarray(0, FILE_HEAD_BYTES).equals(headFor(this.owner))) return;
    const { bytes, regions } = this.heat;
    for (let at = FILE_HEAD_BYTES; at < end; at += CHUNK_BYTES) {
      const first = file.readUInt32BE(at) * CHUNK_REGIONS;
      if (first >= regions) return;
      const from = at + 4;
      bytes.set(
        file.subarray(from, from + Math.min(CHUNK_REGIONS, regions - first)),
        HEAT_HEAD_BYTES + first,
      );
    }
  }

  /** Keeps the counts as they are now, if anything was counted since the last time. One at a time. */
  save(): Promise<void> {
    this.#last = this.#last.then(() => this.#save());
    return this.#last;
  }

  async #save(): Promise<void> {
    const { counted } = this.heat;
    if (this.#removed || counted === this.#savedCount || !this.isStored()) return;
    const next = `${this.#path}.next`;
    try {
      await this.#write(next);
      await rename(next, this.#path);
      this.#savedCount = counted;
    } catch {
      await rm(next, { force: true }).catch(() => undefined); // the next minute tries again
    }
  }

  async #write(path: string): Promise<void> {
    const file = await open(path, 'w', 0o600);
    try {
      const head = headFor(this.owner);
      let crc = crc32(head);
      await file.writeFile(head);
      const chunks = Math.ceil(this.heat.regions / CHUNK_REGIONS);
      for (let chunk = this.#nextWarm(0); chunk < chunks; ) {
        const pieces: Buffer[] = [];
        for (; chunk < chunks && pieces.length < PIECE_CHUNKS; chunk = this.#nextWarm(chunk + 1))
          pieces.push(this.#copy(chunk));
        const piece = Buffer.concat(pieces);
        crc = crc32(piece, crc);
        await file.writeFile(piece);
      }
      const end = Buffer.alloc(CRC_BYTES);
      end.writeUInt32BE(crc);
      await file.writeFile(end);
    } finally {
      await file.close();
    }
  }

  /** The first chunk from `chunk` on that is not cold. */
  #nextWarm(chunk: number): number {
    const { bytes, regions } = this.heat;
    const from = chunk * CHUNK_REGIONS;
    if (from >= regions) return Math.ceil(regions / CHUNK_REGIONS);
    const end = HEAT_HEAD_BYTES + regions;
    const at = Math.floor(nextOne(bytes, (HEAT_HEAD_BYTES + from) * 8, end * 8) / 8);
    return at === end
      ? Math.ceil(regions / CHUNK_REGIONS)
      : Math.floor((at - HEAT_HEAD_BYTES) / CHUNK_REGIONS);
  }

  #copy(chunk: number): Buffer {
    const { bytes, regions } = this.heat;
    const first = chunk * CHUNK_REGIONS;
    const copy = Buffer.alloc(CHUNK_BYTES);
    copy.writeUInt32BE(chunk);
    copy.set(
      bytes.subarray(HEAT_HEAD_BYTES + first, HEAT_HEAD_BYTES + Math.min(first + CHUNK_REGIONS, regions)),
      4,
    );
    return copy;
  }

  /** The volume is about to go: nothing is kept of it. */
  async remove(): Promise<void> {
    this.stop();
    this.#removed = true;
    await this.#last;
    await rm(this.#path, { force: true }).catch(() => undefined);
  }

  static removeFiles(folder: string): void {
    for (const name of [FILE, `${FILE}.next`]) rmSync(join(folder, name), { force: true });
  }
}

function headFor({ id, size }: HeatOwner): Buffer {
  const head = Buffer.alloc(FILE_HEAD_BYTES);
  head.write(MAGIC, 0, 'latin1');
  head.writeBigUInt64BE(BigInt(size), 8);
  head.write(id, 16, 36, 'latin1');
  return head;
}
