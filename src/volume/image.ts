/** The raw image of a volume: a file or a block device, locked while it is open, so that two programs never write one disk. */
import {
  type BigIntStats,
  closeSync,
  constants,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readFileSync,
  realpathSync,
  renameSync,
  rmSync,
  statfsSync,
  statSync,
} from 'node:fs';
import { dirname, resolve } from 'node:path';
import { BlockferryError, messageOf } from '../errors.js';
import * as native from '../native/index.js';
import { Errno } from '../nbd/constants.js';
import { type ColdReader, coldReads } from './cold-reads.js';
import { syncFolder } from './files.js';

const { EAGAIN, EOPNOTSUPP, ENXIO, ENOSPC, EDQUOT, EFBIG, EPERM, EROFS } = native.ERRNO;

/** tmpfs and ramfs (linux/magic.h): a read is a copy in memory, though they do not know RWF_NOWAIT. */
const MEMORY_FILESYSTEMS = new Set([0x01021994, 0x858458f6]);

/** NBD error value for a system call's negative result. */
export function errnoOfSystem(result: number): number {
  const errno = -result;
  if (errno === ENOSPC || errno === EDQUOT || errno === EFBIG) return Errno.ENOSPC;
  if (errno === EPERM || errno === EROFS) return Errno.EPERM;
  return Errno.EIO;
}

const RESOLVING: ColdReader<(result: number) => void> = {
  coldReadEnded: (resolve, result) => resolve(result),
};

/** Answer of `readNow`: not without waiting for the disk. */
export const WOULD_WAIT = -EAGAIN;

export class Image {
  /** How `readNow` asks: 'nowait' as long as the filesystem can tell what is cached, 'plain' in memory, else never. */
  #inline: 'nowait' | 'plain' | 'never' = 'nowait';
  #punches = true;
  /** Zeroes a range as a hole, or without one, without writing it: not known to be impossible. */
  #zeroesFast = { hole: true, space: true };

  private constructor(
    readonly path: string,
    readonly fd: number,
    /** Bytes. */
    readonly size: number,
    readonly blockDevice: boolean,
    readonly readOnly: boolean,
  ) {
    if (!blockDevice && MEMORY_FILESYSTEMS.has(statfsSync(path).type)) this.#inline = 'plain';
    if (blockDevice && !deviceZeroes(fd)) this.#zeroesFast = { hole: false, space: false };
  }

  /** Opens and locks an image. Throws 'image-missing', 'image-in-use', 'image-io'. */
  static open(path: string, options: { readOnly?: boolean } = {}): Image {
    const readOnly = options.readOnly ?? false;
    let fd: number;
    try {
      // O_NONBLOCK means nothing to files and block devices; opening a named pipe would wait for its other end.
      fd = openSync(path, constants.O_NONBLOCK | (readOnly ? constants.O_RDONLY : constants.O_RDWR));
    } catch (cause) {
      const missing = (cause as NodeJS.ErrnoException).code === 'ENOENT';
      throw new BlockferryError(
        missing ? 'image-missing' : 'image-io',
        missing
          ? `there is no image ${path}: create it, or give the right path`
          : `cannot open image ${path}: ${messageOf(cause)}`,
        { cause },
      );
    }
    try {
      return Image.#adopt(realpathSync(path), fd, readOnly);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
  }

  static #adopt(path: string, fd: number, readOnly: boolean): Image {
    const stat = fstatSync(fd);
    if (!stat.isFile() && !stat.isBlockDevice()) {
      throw new BlockferryError('image-io', `${path} is neither a file nor a block device`);
    }
    // A shared lock needs no right to write; any writer's lock excludes it.
    if (!native.lockFile(fd, !readOnly)) {
      throw new BlockferryError(
        'image-in-use',
        `image ${path} is in use by another program: stop that one first`,
      );
    }
    const size = native.seekEnd(fd);
    if (size <= 0)
      throw new BlockferryError(
        'image-io',
        `image ${path} is empty: give it a size first (truncate -s SIZE)`,
      );
    return new Image(path, fd, size, stat.isBlockDevice(), readOnly);
  }

  /**
   * Creates a sparse image of `size` bytes, durably; it gets its name last, so that no crash leaves half of one. Throws 'exists' where
   * there is something already.
   */
  static async create(path: string, size: number): Promise<Image> {
    const next = `${path}.next`;
    let fd: number;
    try {
      fd = openSync(next, constants.O_RDWR | constants.O_CREAT, 0o600);
    } catch (cause) {
      throw new BlockferryError('image-io', `cannot create image ${path}: ${messageOf(cause)}`, { cause });
    }
    let made: string | null = null;
    try {
      if (!native.lockFile(fd, true))
        throw new BlockferryError('image-in-use', `image ${path} is being made by another program`);
      made = next;
      if (existsSync(path))
        throw new BlockferryError('exists', `cannot create image ${path}: it is there already`);
      ftruncateSync(fd, 0); // what a crash left
      ftruncateSync(fd, size);
      const synced = await native.fdatasync(fd);
      if (synced < 0) throw new Error(`fdatasync failed: errno ${-synced}`);
      renameSync(next, path);
      made = path;
      await syncFolder(dirname(resolve(path)));
      return Image.#adopt(realpathSync(path), fd, false);
    } catch (cause) {
      closeSync(fd);
      if (made !== null) rmSync(made, { force: true });
      if (cause instanceof BlockferryError) throw cause;
      throw new BlockferryError(
        'image-io',
        `cannot create image ${path} of ${size} bytes: ${messageOf(cause)}`,
        { cause },
      );
    }
  }

  /** Whether `readNow` may answer: from the page cache, or from memory. */
  get inline(): 'nowait' | 'plain' | 'never' {
    return this.#inline;
  }

  /** Reads now if that needs no disk: 0, WOULD_WAIT, or another negative errno. */
  readNow(buffer: Buffer, at: number, length: number, offset: number): number {
    if (this.#inline === 'never') return WOULD_WAIT;
    const nowait = this.#inline === 'nowait';
    const done = native.pread(this.fd, buffer, at, length, offset, nowait);
    if (done === length) return 0;
    if (done === -EOPNOTSUPP && nowait) {
      this.#inline = 'never';
      return WOULD_WAIT;
    }
    if (done >= 0) return nowait ? WOULD_WAIT : -native.ERRNO.EIO;
    return done;
  }

  /** Reads what may have to be waited for. A short read is -EIO: somebody cut the image. */
  readLater<Subject>(
    reader: ColdReader<Subject>,
    subject: Subject,
    buffer: Buffer,
    at: number,
    length: number,
    offset: number,
  ): void {
    coldReads.read(reader, subject, this.fd, buffer, at, length, offset);
  }

  /** As `readLater`: 0 or a negative errno. */
  read(buffer: Buffer, at: number, length: number, offset: number): Promise<number> {
    return new Promise((resolve) => this.readLater(RESOLVING, resolve, buffer, at, length, offset));
  }

  /** Writes into the page cache: 0 or a negative errno. */
  write(buffer: Buffer, at: number, length: number, offset: number): number {
    const done = native.pwrite(this.fd, buffer, at, length, offset);
    return Math.min(done, 0);
  }

  /** As `write`, on a thread. The memory is the image's until then. */
  async writeLater(buffer: Buffer, at: number, length: number, offset: number): Promise<number> {
    return Math.min(await native.writeAsync(this.fd, buffer, at, length, offset), 0);
  }

  /** Makes a range read as zeros, on a thread: 0 or a negative errno. */
  zero(offset: number, length: number, keepHole: boolean): Promise<number> {
    return native.zeroRange(this.fd, offset, length, keepHole);
  }

  /** Whether `zeroFast` is worth a try. */
  mayZeroFast(keepHole: boolean): boolean {
    return keepHole ? this.#zeroesFast.hole : this.#zeroesFast.space;
  }

  /** As `zero`, but false, and nothing has changed, where that would take as long as writing zeros. */
  async zeroFast(offset: number, length: number, keepHole: boolean): Promise<number | false> {
    const done = await native.zeroFast(this.fd, offset, length, keepHole);
    if (done !== -EOPNOTSUPP) return done;
    if (keepHole) this.#zeroesFast.hole = false;
    else this.#zeroesFast.space = false;
    return false;
  }

  /** Gives a range's space back; it then reads as zeros. False where the image cannot (nothing was done), else 0 or -errno. */
  async punch(offset: number, length: number): Promise<number | false> {
    if (!this.#punches) return false;
    const done = await native.punchHole(this.fd, offset, length);
    if (done !== -EOPNOTSUPP) return done;
    this.#punches = false;
    return false;
  }

  /** How many bytes from `offset` on, up to `end`, are a hole, and so read as zeros. */
  holeFrom(offset: number, end: number): number {
    if (this.blockDevice) return 0; // a device always says that all is data
    const data = native.seekData(this.fd, offset);
    if (data === -ENXIO) return end - offset;
    return data < 0 ? 0 : Math.min(data, end) - offset;
  }

  /** Whether [offset, end) holds no data at all, and so reads as zeros. */
  isHole(offset: number, end: number): boolean {
    return this.holeFrom(offset, end) === end - offset;
  }

  /** End of the stretch of data (or hole) that `offset` lies in, at most `end`. */
  stretch(offset: number, end: number): { hole: boolean; end: number } {
    if (this.blockDevice) return { hole: false, end };
    const data = native.seekData(this.fd, offset);
    if (data === -ENXIO) return { hole: true, end };
    if (data < 0) return { hole: false, end };
    if (data > offset) return { hole: true, end: Math.min(data, end) };
    const hole = native.seekHole(this.fd, offset);
    // A thread may have punched here between the two questions.
    return { hole: false, end: hole <= offset ? end : Math.min(hole, end) };
  }

  /** 0 or a negative errno. */
  sync(): Promise<number> {
    return native.fdatasync(this.fd);
  }

  /** What changes when somebody changes the file's content or puts another in its place: see inode(7). Null for a block device, which does not tell. */
  get stamp(): string | null {
    return this.blockDevice ? null : stampOf(fstatSync(this.fd, { bigint: true }));
  }

  close(): void {
    closeSync(this.fd);
  }
}

/** See Image.stamp; null for what is no file. */
export function stampOfFile(path: string): string | null {
  const stat = statSync(path, { bigint: true, throwIfNoEntry: false });
  return stat?.isFile() ? stampOf(stat) : null;
}

function stampOf({ ino, size, mtimeNs, ctimeNs }: BigIntStats): string {
  return [ino, size, mtimeNs, ctimeNs].join(':');
}

/** Whether a block device zeroes by itself; if not, the kernel would write zeros in its place (include/linux/blkdev.h, Documentation/ABI). */
function deviceZeroes(fd: number): boolean {
  const { rdev } = fstatSync(fd);
  const major = (rdev >>> 8) & 0xfff;
  const minor = (rdev & 0xff) | ((rdev >>> 12) & 0xfff00);
  const folder = `/sys/dev/block/${major}:${minor}`;
  // A partition has no queue of its own: its disk is the folder above.
  for (const queue of [`${folder}/queue`, `${folder}/../queue`]) {
    try {
      return Number(readFileSync(`${queue}/write_zeroes_max_bytes`, 'utf8')) > 0;
    } catch {
      // not there: the next one
    }
  }
  return false;
}
