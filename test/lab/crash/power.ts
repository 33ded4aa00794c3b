/**
 * What a machine that loses power finds on its disk, worked out from what its daemon did (preload.c writes it down).
 *
 * The rules are those that POSIX gives and no better ones, though journals usually do better:
 * - A step is certain when it was over before a sync of its file (or, for names, of its folder) began that was over before the crash.
 * - Of a file's other steps each sector keeps those up to a moment of its own, drawn at random: the kernel may write any page back at any
 *   time, and never in a state that the page did not have.
 * - A step that the daemon died in is what the next daemon of the same boot finds of it: a kill may cut a write, and what was cut off
 *   was never there to be written back.
 * - Of a folder's other names (created, renamed, removed) those up to a moment drawn for that folder are kept.
 * What is mapped into memory (presence.live) is not written down: of it, any page may have reached the disk at any time.
 */
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  existsSync,
  ftruncateSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import type { Random } from './random.js';

const SECTOR = 512;
const PAGE = 4096;
const HEAD_BYTES = 56;
const MAGIC = 0x31435242;
const MAPPED = /presence\.live$/;

enum Kind {
  OPENED = 1,
  CLOSED,
  ENDED,
  WRITE,
  PWRITE,
  TRUNCATE,
  FALLOCATE,
  SYNC,
  RENAME,
  UNLINK,
  MKDIR,
  RMDIR,
  CREATE,
  ARMED,
  /** A step that changes no file. */
  MARK,
}

const FALLOC_KEEP_SIZE = 1;
const FALLOC_ZEROES = 2 | 16; // PUNCH_HOLE, ZERO_RANGE

interface LogRecord {
  kind: Kind;
  id: number;
  fd: number;
  result: number;
  flags: number;
  offset: number;
  length: number;
  path: string;
  path2: string;
  data: Buffer;
}

/** Builds the library; returns its path. */
export function buildPreload(folder: string): string {
  const library = join(folder, 'preload.so');
  const code = fileURLToPath(new URL('../../../../test/lab/crash/preload.c', import.meta.url));
  execFileSync('cc', ['-shared', '-fPIC', '-O2', '-o', library, code, '-ldl', '-lpthread']);
  return library;
}

/** How much of what was not certain arrived: chance that a sector (a folder's names) stops being written back at each step. */
export type Loss = number;

/** A change of a file's content. `data` null: zeros. */
interface FileStep {
  readonly id: number;
  size: 'keep' | 'grow' | 'set';
  readonly offset: number;
  length: number;
  data: Buffer | null;
  certain: boolean;
  over: boolean;
}

class FileNode {
  readonly steps: FileStep[] = [];
  constructor(readonly before: Buffer) {}
}

interface NameStep {
  readonly id: number;
  readonly kind: Kind.CREATE | Kind.RENAME | Kind.UNLINK | Kind.MKDIR | Kind.RMDIR;
  readonly path: string;
  readonly path2: string;
  readonly node: FileNode | null;
  certain: boolean;
  over: boolean;
}

type Entry = FileNode | 'folder';

interface UnderWay {
  ended(done: boolean): void;
  /** Default: a step without effect. */
  died?(): void;
}

/** A machine's disk from one boot to the loss of power. */
export class PowerLoss {
  readonly #root: string;
  /** As it was on stable storage when the life began. */
  readonly #before = new Map<string, Entry>();
  /** As the daemon saw it. */
  readonly #now = new Map<string, Entry>();
  readonly #names: NameStep[] = [];
  readonly #files = new Set<FileNode>();
  readonly #open = new Map<number, { path: string; entry: Entry; at: number }>();
  /** What to do when a step is over, with success or without, or when the daemon died in it. */
  readonly #underWay = new Map<number, UnderWay>();
  /** Numbers of the steps since it was last armed. */
  stepsSinceArmed = 0;

  /** To be made before anything is done. All that is there then is durable. */
  constructor(root: string) {
    this.#root = root;
    this.#before.set(root, 'folder');
    const visit = (folder: string): void => {
      for (const entry of readdirSync(folder, { withFileTypes: true })) {
        const path = join(folder, entry.name);
        if (entry.isDirectory()) {
          this.#before.set(path, 'folder');
          visit(path);
        } else if (entry.isFile()) {
          this.#before.set(path, this.#adopt(readFileSync(path)));
        }
      }
    };
    visit(root);
    for (const [path, entry] of this.#before) this.#now.set(path, entry);
  }

  #adopt(before: Buffer): FileNode {
    const node = new FileNode(before);
    this.#files.add(node);
    return node;
  }

  /**
   * Reads what the daemon did until it died; another daemon's life may follow, as long as the machine does not die. To be called while
   * the files are as that daemon left them.
   */
  replay(log: string): void {
    this.#open.clear();
    for (const record of records(readFileSync(log))) this.#apply(record);
    for (const step of this.#underWay.values()) step.died?.();
    this.#underWay.clear();
  }

  #apply(record: LogRecord): void {
    const { kind, id, fd } = record;
    if (kind === Kind.ARMED) this.stepsSinceArmed = 0;
    else if (id > 0 && kind !== Kind.ENDED) this.stepsSinceArmed++;
    switch (kind) {
      case Kind.OPENED:
        this.#open.set(fd, { path: record.path, entry: this.#now.get(record.path)!, at: 0 });
        break;
      case Kind.CLOSED:
        this.#open.delete(fd);
        break;
      case Kind.ENDED:
        this.#underWay.get(id)?.ended(record.result === 0);
        this.#underWay.delete(id);
        break;
      case Kind.SYNC:
        this.#sync(id, fd);
        break;
      case Kind.WRITE:
      case Kind.PWRITE:
      case Kind.TRUNCATE:
      case Kind.FALLOCATE:
        this.#change(record);
        break;
      case Kind.ARMED:
      case Kind.MARK:
        break;
      default:
        this.#name(record);
    }
  }

  #sync(id: number, fd: number): void {
    const { path, entry } = this.#open.get(fd)!;
    const covered =
      entry === 'folder'
        ? this.#names.filter((step) => step.over && dirname(step.path) === path)
        : entry.steps.filter((step) => step.over);
    this.#underWay.set(id, {
      ended: (done) => {
        if (done) for (const step of covered) step.certain = true;
      },
    });
  }

  #change({ kind, id, fd, flags, offset, length, data }: LogRecord): void {
    const opened = this.#open.get(fd)!;
    if (opened.entry === 'folder') throw new Error(`${opened.path}: a folder was written to`);
    const at = kind === Kind.WRITE ? opened.at : offset;
    if (kind === Kind.WRITE) opened.at += length;
    const step: FileStep = {
      id,
      offset: kind === Kind.TRUNCATE ? length : at,
      length: kind === Kind.TRUNCATE ? 0 : length,
      data: data.length > 0 ? data : null,
      size:
        kind === Kind.TRUNCATE
          ? 'set'
          : kind === Kind.FALLOCATE && flags & FALLOC_KEEP_SIZE
            ? 'keep'
            : 'grow',
      certain: false,
      over: false,
    };
    // Allocation alone changes no content.
    const allocates = kind === Kind.FALLOCATE && (flags & FALLOC_ZEROES) === 0;
    const { entry } = opened;
    const added = allocates ? { ...step, offset: at + length, length: 0 } : step;
    entry.steps.push(added);
    this.#underWay.set(id, {
      ended: (done) => {
        added.over = done;
      },
      died: () => this.#cut(entry, added),
    });
  }

  /** The daemon died in this step: of it counts what is in the file. */
  #cut(node: FileNode, step: FileStep): void {
    const path = [...this.#now].find(([, entry]) => entry === node)?.[0];
    if (path === undefined || !existsSync(path)) return; // unlinked: nobody can read it any more
    const found = readFileSync(path);
    const { offset, length } = step;
    step.over = true;
    if (step.size === 'set') {
      if (found.length !== offset) step.size = 'keep';
    } else {
      if (step.size === 'grow' && found.length < offset + length)
        step.length = Math.max(0, found.length - offset);
      step.data = Buffer.from(found.subarray(offset, offset + step.length));
    }
  }

  #name({ kind, id, path, path2, flags }: LogRecord): void {
    let node: FileNode | null = null;
    if (kind === Kind.CREATE) {
      const known = this.#now.get(path);
      if (known instanceof FileNode) {
        // It was there: O_TRUNC cuts it.
        const cut: FileStep = {
          id,
          size: 'set',
          offset: 0,
          length: 0,
          data: null,
          certain: false,
          over: false,
        };
        if (flags !== 0) known.steps.push(cut);
        this.#underWay.set(id, {
          ended: () => {
            cut.over = true;
          },
          died: () => this.#cut(known, cut),
        });
        return;
      }
      node = this.#adopt(Buffer.alloc(0));
    }
    const step: NameStep = {
      id,
      kind: kind as NameStep['kind'],
      path,
      path2,
      node,
      certain: false,
      over: false,
    };
    // A step that fails changes nothing, and one that is under way may be seen by others only when it is over.
    if (kind === Kind.CREATE) rename(this.#now, step);
    const ended = (done: boolean): void => {
      step.over = done;
      if (!done) this.#names.splice(this.#names.indexOf(step), 1);
      if (done && kind !== Kind.CREATE) rename(this.#now, step);
      if (!done && kind === Kind.CREATE) this.#now.delete(path);
    };
    const makes = kind === Kind.CREATE || kind === Kind.MKDIR;
    this.#underWay.set(id, { ended, died: () => ended(existsSync(path) === makes) });
    this.#names.push(step);
  }

  /** Makes the folder what the machine finds when it has power again. */
  strike(random: Random, loss: Loss): void {
    const mapped = new Map<string, Buffer>();
    for (const path of this.#now.keys())
      if (MAPPED.test(path) && existsSync(path)) mapped.set(path, readFileSync(path));
    const found = this.#namesAfter(random, loss);
    for (const entry of readdirSync(this.#root))
      rmSync(join(this.#root, entry), { recursive: true, force: true });
    for (const [path, entry] of [...found].sort(([a], [b]) => a.length - b.length)) {
      if (path === this.#root || !existsSync(dirname(path))) continue; // its folder's name was lost
      if (entry === 'folder') {
        mkdirSync(path);
      } else {
        const content = mapped.get(path);
        if (content === undefined) writeSparse(path, contentAfter(entry, random, loss));
        else writeFileSync(path, pagesLost(content, random, loss));
      }
    }
  }

  #namesAfter(random: Random, loss: Loss): Map<string, Entry> {
    const found = new Map(this.#before);
    const stopped = new Set<string>();
    for (const step of this.#names) {
      const folder = dirname(step.path);
      if (!step.certain) {
        if (stopped.has(folder) || random.chance(loss)) {
          stopped.add(folder);
          continue;
        }
      }
      rename(found, step);
    }
    return found;
  }
}

function rename(names: Map<string, Entry>, { kind, path, path2, node }: NameStep): void {
  const entry = names.get(path);
  switch (kind) {
    case Kind.CREATE:
      names.set(path, node!);
      break;
    case Kind.MKDIR:
      if (entry === undefined) names.set(path, 'folder');
      break;
    case Kind.UNLINK:
    case Kind.RMDIR:
      names.delete(path);
      break;
    case Kind.RENAME:
      if (entry === undefined) return;
      names.delete(path);
      names.set(path2, entry);
  }
}

function contentAfter({ before, steps }: FileNode, random: Random, loss: Loss): Buffer {
  let size = before.length;
  let sizeStopped = false;
  let content = Buffer.from(before);
  const stopped = new Set<number>();
  const reach = (past: number): void => {
    if (past > content.length) content = Buffer.concat([content, Buffer.alloc(past - content.length)]);
  };
  for (const step of steps) {
    const { offset, length, data, certain } = step;
    if (step.size !== 'keep') {
      if (!certain && (sizeStopped || random.chance(loss))) sizeStopped = true;
      else {
        sizeStopped = false;
        const past = step.size === 'set' ? offset : Math.max(size, offset + length);
        if (past < size) content.fill(0, past);
        size = past;
      }
    }
    reach(offset + length);
    for (let at = offset; at < offset + length; ) {
      const sector = Math.floor(at / SECTOR);
      const stop = Math.min((sector + 1) * SECTOR, offset + length);
      if (certain) stopped.delete(sector);
      else if (stopped.has(sector) || random.chance(loss)) stopped.add(sector);
      if (!stopped.has(sector)) {
        if (data === null) content.fill(0, at, stop);
        else data.copy(content, at, at - offset, stop - offset);
      }
      at = stop;
    }
  }
  reach(size);
  return content.subarray(0, size);
}

function pagesLost(content: Buffer, random: Random, loss: Loss): Buffer {
  for (let at = 0; at < content.length; at += PAGE) if (random.chance(loss)) content.fill(0, at, at + PAGE);
  return content;
}

/** Pages of zeros stay holes. */
function writeSparse(path: string, content: Buffer): void {
  const zeros = Buffer.alloc(PAGE);
  const fd = openSync(path, 'w', 0o600);
  ftruncateSync(fd, content.length);
  for (let at = 0; at < content.length; at += PAGE) {
    const page = content.subarray(at, at + PAGE);
    if (!page.equals(zeros.subarray(0, page.length))) writeSync(fd, page, 0, page.length, at);
  }
  closeSync(fd);
}

function* records(log: Buffer): Generator<LogRecord> {
  for (let at = 0; at + HEAD_BYTES <= log.length; ) {
    if (log.readUInt32LE(at) !== MAGIC) throw new Error(`the log is broken at ${at}`);
    const pathBytes = log.readUInt32LE(at + 40);
    const path2Bytes = log.readUInt32LE(at + 44);
    const dataBytes = log.readUInt32LE(at + 48);
    const paths = at + HEAD_BYTES;
    const data = paths + pathBytes + path2Bytes;
    if (data + dataBytes > log.length) return; // it died while it wrote this
    yield {
      kind: log.readUInt32LE(at + 4),
      id: log.readUInt32LE(at + 8),
      fd: log.readInt32LE(at + 12),
      result: log.readInt32LE(at + 16),
      flags: log.readInt32LE(at + 20),
      offset: Number(log.readBigUInt64LE(at + 24)),
      length: Number(log.readBigUInt64LE(at + 32)),
      path: log.toString('utf8', paths, paths + pathBytes),
      path2: log.toString('utf8', paths + pathBytes, data),
      data: log.subarray(data, data + dataBytes),
    };
    at = data + dataBytes;
  }
}
