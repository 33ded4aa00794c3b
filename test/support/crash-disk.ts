/**
 * A disk that loses power. The native addon's pwrite and fdatasync are watched: what was written to a tracked file and not synced
 * since is pending, sector by sector, and a crash keeps any version of each pending sector that it ever had.
 *
 * src/native hands out the addon's own functions, so they are replaced in the module cache before src/native is loaded: a test imports
 * what it tests from the modules that `load` gives, and nothing of src/native or src/volume statically.
 */
import { readFileSync, readlinkSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { fileURLToPath } from 'node:url';

const SECTOR = 512;

interface Addon {
  pwrite(fd: number, buffer: Uint8Array, at: number, length: number, offset: number): number;
  fdatasync(fd: number): Promise<number>;
}
const require = createRequire(import.meta.url);
const file = fileURLToPath(new URL('../../../native/build/Release/blockferry.node', import.meta.url));
const real = require(file) as Addon;

let watching: CrashDisk | null = null;
// Whoever requires the addon from here on gets this.
require.cache[file]!.exports = {
  ...real,
  pwrite: (fd: number, buffer: Uint8Array, at: number, length: number, offset: number) =>
    watching?.tracks(fd)
      ? watching.write(fd, buffer, at, length, offset)
      : real.pwrite(fd, buffer, at, length, offset),
  fdatasync: (fd: number) => (watching?.tracks(fd) ? watching.sync() : real.fdatasync(fd)),
};

const never = new Promise<never>(() => {});

/** Small and repeatable: the same seed, the same crash. */
export function randomFrom(seed: number): (below: number) => number {
  let state = seed >>> 0 || 1;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

export type CrashKind = 'killed' | 'all lost' | 'all arrived' | 'any';

export class CrashDisk {
  /** What is on stable storage. */
  #durable: Buffer;
  readonly #pending = new Map<number, Buffer[]>();
  #events = 0;
  #crashAt = Number.POSITIVE_INFINITY;
  /** Number of the process: a sync of one that was killed does nothing to the next. */
  #life = 0;
  #crash: () => void = () => {};
  #random: (below: number) => number = randomFrom(1);

  constructor(readonly path: string) {
    this.#durable = Buffer.alloc(0);
    watching = this;
  }

  /** The file as it is now is on stable storage. */
  settle(): void {
    this.#durable = readFileSync(this.path);
    this.#pending.clear();
  }

  tracks(fd: number): boolean {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`) === this.path;
    } catch {
      return false;
    }
  }

  get crashed(): boolean {
    return this.#events >= this.#crashAt;
  }

  /** One more step of the machine's life; the one after `crashAt` steps never comes. */
  event(): void {
    if (this.crashed) return;
    this.#events++;
    if (this.crashed) this.#crash();
  }

  /** A sync of some length, in turns of the microtask queue; `done` runs unless the machine died. */
  async syncing(done: () => void): Promise<void> {
    const life = this.#life;
    this.event();
    for (let turns = this.#random(2) * this.#random(40); turns > 0; turns--) await Promise.resolve();
    // A process that was killed in here is dead, also when the next one runs by now.
    if (this.crashed || life !== this.#life) return never;
    done();
    this.event();
    if (this.crashed) return never;
  }

  write(fd: number, buffer: Uint8Array, at: number, length: number, offset: number): number {
    if (this.crashed) throw new Error('written after the crash');
    for (let from = 0; from < length; from += SECTOR) {
      const sector = (offset + from) / SECTOR;
      const versions = this.#pending.get(sector) ?? [];
      versions.push(Buffer.from(buffer.subarray(at + from, at + from + SECTOR)));
      this.#pending.set(sector, versions);
    }
    const done = real.pwrite(fd, buffer, at, length, offset);
    this.event();
    if (this.crashed) throw new Error('crashed');
    return done;
  }

  async sync(): Promise<number> {
    const covered = [...this.#pending].map(([sector, versions]) => ({ sector, count: versions.length }));
    await this.syncing(() => {
      for (const { sector, count } of covered) {
        const versions = this.#pending.get(sector)!;
        versions[count - 1]!.copy(this.#durable, sector * SECTOR);
        versions.splice(0, count);
        if (versions.length === 0) this.#pending.delete(sector);
      }
    });
    return 0;
  }

  /**
   * Runs `life` until it ends or the machine has done `crashAt` steps; then dies: 'killed' loses the process only, the others
   * leave of each pending sector what they say. Whatever `life` throws before the crash is thrown.
   */
  async run(crashAt: number, kind: CrashKind, seed: number, life: () => Promise<void>): Promise<void> {
    this.#life++;
    this.#events = 0;
    this.#crashAt = crashAt;
    this.#random = randomFrom(seed);
    const crash = new Promise<void>((resolve) => {
      this.#crash = resolve;
    });
    const lived = life().catch((error) => {
      if (!this.crashed) throw error;
    });
    await Promise.race([lived, crash]);
    this.#crashAt = 0;
    if (kind === 'killed') return;
    for (const [sector, versions] of this.#pending) {
      const choices = {
        'all lost': 0,
        'all arrived': versions.length,
        any: this.#random(versions.length + 1),
      };
      const kept = choices[kind];
      if (kept > 0) versions[kept - 1]!.copy(this.#durable, sector * SECTOR);
    }
    this.#pending.clear();
    writeFileSync(this.path, this.#durable);
  }

  static async load() {
    return {
      ...(await import('../../src/volume/durable-map.js')),
      ...(await import('../../src/volume/presence.js')),
    };
  }
}
