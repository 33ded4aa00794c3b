/**
 * STATE/<volume>/first-access: a volume's first accesses, kept over restarts. Written each ten seconds in which something was added, and when
 * the volume is closed. It may be copied, for a move of another volume that was made of the same template (`readRecord`).
 *
 * Invariants
 * - As the heat's file (heat-file.ts) it is replaced as a whole and never synced, and what is damaged, or another volume's, counts as no record.
 *   No failure here is an error.
 * - Only a volume that is stored has a folder; of one that is merely served nothing is kept.
 *
 * Head: 0 magic, 8 bytes of the volume (u64), 16 volume id (36), 52 how many regions are of this record (u32), 8 zeros up to 64. Then regions
 * (u32 each) by rank: those of this record, then those of the move before. Last the crc32 of all before (u32). Big endian.
 */
import { rmSync } from 'node:fs';
import { readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { RANKED_REGIONS_MAX } from './access-order.js';
import { eachSecond } from './each-second.js';
import { type FirstAccess, isTrivial } from './first-access.js';
import type { HeatOwner } from './heat-file.js';

const FILE = 'first-access';
const MAGIC = 'BFFACC01';
const HEAD_BYTES = 64;
const OWN_AT = 52;
const REGION_NUMBER_BYTES = 4;
const CRC_BYTES = 4;
const FILE_BYTES_MAX = HEAD_BYTES + 2 * RANKED_REGIONS_MAX * REGION_NUMBER_BYTES + CRC_BYTES;

const SAVE_SECONDS = 10;
const NO_RECORD = 'it is no record of first accesses, or damaged';

/** What a file holds: regions by rank. */
interface Content {
  readonly own: readonly number[];
  readonly earlier: readonly number[];
}

export class FirstAccessFile {
  readonly #path: string;
  #savedChanges: number;
  #last: Promise<void> = Promise.resolve();
  #removed = false;
  #seconds = 0;
  #end: (() => void) | undefined;

  constructor(
    folder: string,
    private readonly owner: HeatOwner,
    private readonly record: FirstAccess,
    /** Whether the volume has a folder by now. */
    private readonly isStored: () => boolean,
  ) {
    this.#path = join(folder, FILE);
    this.#savedChanges = record.changes;
  }

  /** Looks at the heat, and saves now and then, until `stop`. To begin before the heat's own file does, which lets it decay. */
  start(): void {
    this.#end ??= eachSecond(() => {
      this.record.look();
      if (++this.#seconds % SAVE_SECONDS === 0) void this.save();
    });
  }

  stop(): void {
    this.#end?.();
    this.#end = undefined;
  }

  /** Takes over what an earlier process kept, if it is whole and of this volume. */
  async load(): Promise<void> {
    try {
      const file = await readWhole(this.#path);
      const { own, earlier } = parse(file);
      const head = headFor(this.owner);
      file.copy(head, OWN_AT, OWN_AT, OWN_AT + REGION_NUMBER_BYTES);
      if (!file.subarray(0, HEAD_BYTES).equals(head)) return;
      this.record.restore(own, earlier);
      this.#savedChanges = this.record.changes;
    } catch {
      // no record
    }
  }

  /** Keeps the record as it is now, if it changed since the last time. One at a time. */
  save(): Promise<void> {
    this.#last = this.#last.then(() => this.#save());
    return this.#last;
  }

  async #save(): Promise<void> {
    this.record.look();
    const { changes } = this.record;
    if (this.#removed || changes === this.#savedChanges || !this.isStored()) return;
    const next = `${this.#path}.next`;
    try {
      await writeFile(next, contentOf(this.owner, this.record), { mode: 0o600 });
      await rename(next, this.#path);
      this.#savedChanges = changes;
    } catch {
      await rm(next, { force: true }).catch(() => undefined); // the next time tries again
    }
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

/** The regions that such a file tells, by rank, of whatever volume it is. Throws where it is not one, or is damaged. */
export async function readRecord(path: string): Promise<readonly number[]> {
  const { own, earlier } = parse(await readWhole(path));
  return isTrivial(own.length, earlier.length) ? earlier : own;
}

async function readWhole(path: string): Promise<Buffer> {
  const found = await stat(path);
  if (!found.isFile() || found.size > FILE_BYTES_MAX) throw new Error(NO_RECORD);
  return readFile(path);
}

function parse(file: Buffer): Content {
  const end = file.length - CRC_BYTES;
  const whole =
    end >= HEAD_BYTES &&
    (end - HEAD_BYTES) % REGION_NUMBER_BYTES === 0 &&
    file.toString('latin1', 0, MAGIC.length) === MAGIC &&
    file.readUInt32BE(end) === crc32(file.subarray(0, end));
  if (!whole) throw new Error(NO_RECORD);
  const all: number[] = [];
  for (let at = HEAD_BYTES; at < end; at += REGION_NUMBER_BYTES) all.push(file.readUInt32BE(at));
  const owns = file.readUInt32BE(OWN_AT);
  return { own: all.slice(0, owns), earlier: all.slice(owns) };
}

function contentOf(owner: HeatOwner, { own, earlier }: FirstAccess): Buffer {
  const end = HEAD_BYTES + (own.size + earlier.size) * REGION_NUMBER_BYTES;
  const file = Buffer.alloc(end + CRC_BYTES);
  headFor(owner).copy(file);
  file.writeUInt32BE(own.size, OWN_AT);
  let at = HEAD_BYTES;
  for (const order of [own, earlier])
    for (const region of order.byRank()) at = file.writeUInt32BE(region, at);
  file.writeUInt32BE(crc32(file.subarray(0, end)), end);
  return file;
}

function headFor({ id, size }: HeatOwner): Buffer {
  const head = Buffer.alloc(HEAD_BYTES);
  head.write(MAGIC, 0, 'latin1');
  head.writeBigUInt64BE(BigInt(size), 8);
  head.write(id, 16, 36, 'latin1');
  return head;
}
