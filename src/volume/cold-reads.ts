/**
 * Reads of what is not in the page cache: none holds up the others, those of a turn begin with one system call, and those that have
 * ended come back together. On io_uring; where the system has none for us, on libuv's pool. One of them a thread.
 *
 * A slot holds one read from its beginning to its end, and with it its memory: the kernel writes there whatever becomes of the
 * client meanwhile. Nothing is allocated for a read.
 */
import * as native from '../native/index.js';

/** Reads under way at the same time on the queue; what exceeds it goes to libuv's pool. */
const SLOTS = 512;
/** Longer ones are copied by another thread: it takes longer than to wake one. */
const COPIED_HERE_BYTES_MAX = 32 << 10;
const RESULTS_MAX = 64;

const { EAGAIN, EIO } = native.ERRNO;

/** Who waits for a read. */
export interface ColdReader<Subject> {
  /** `result`: 0 or a negative errno. */
  coldReadEnded(subject: Subject, result: number): void;
}

interface Slot {
  reader: ColdReader<unknown> | null;
  subject: unknown;
  fd: number;
  buffer: Uint8Array | null;
  at: number;
  length: number;
  offset: number;
}

export class ColdReads {
  /** Undefined: not tried yet; null: the system has none. */
  #queue: native.Reader | null | undefined;
  readonly #results = new Int32Array(2 * RESULTS_MAX);
  readonly #slots: Slot[] = [];
  readonly #free: number[] = [];
  #beginning = false;

  constructor(private readonly open: typeof native.openReader = native.openReader) {}

  /** Reads all of [at, at + length); less is there only if somebody cut the image: -EIO. */
  read<Subject>(
    reader: ColdReader<Subject>,
    subject: Subject,
    fd: number,
    buffer: Uint8Array,
    at: number,
    length: number,
    offset: number,
  ): void {
    const index = this.#queue === null ? undefined : this.#take();
    if (index === undefined) {
      void this.#readOnPool(fd, buffer, at, length, offset).then((result) =>
        reader.coldReadEnded(subject, result),
      );
      return;
    }
    const slot = this.#slots[index]!;
    slot.reader = reader as ColdReader<unknown>;
    slot.subject = subject;
    slot.fd = fd;
    slot.buffer = buffer;
    slot.at = at;
    slot.length = length;
    slot.offset = offset;
    this.#begin(index);
  }

  #take(): number | undefined {
    const free = this.#free.pop();
    if (free !== undefined || this.#queue !== undefined) return free;
    const queue = this.open(SLOTS, this.#results, this.#ended);
    this.#queue = typeof queue === 'number' ? null : queue;
    if (this.#queue === null) return undefined;
    for (let index = 0; index < SLOTS; index++) {
      this.#slots.push({ reader: null, subject: null, fd: -1, buffer: null, at: 0, length: 0, offset: 0 });
      this.#free.push(index);
    }
    return this.#free.pop();
  }

  #begin(index: number): void {
    const { fd, buffer, at, length, offset } = this.#slots[index]!;
    // There is a place for each slot.
    native.queueRead(this.#queue!, index, fd, buffer!, at, length, offset, length > COPIED_HERE_BYTES_MAX);
    if (this.#beginning) return;
    this.#beginning = true;
    queueMicrotask(this.#beginAll); // behind the last read of this turn
  }

  readonly #beginAll = (): void => {
    this.#beginning = native.beginReads(this.#queue!) > 0;
    if (this.#beginning) setImmediate(this.#beginAll);
  };

  readonly #ended = (count: number): void => {
    const results = this.#results;
    for (let i = 0; i < count; i++) this.#end(results[2 * i]!, results[2 * i + 1]!);
  };

  #end(index: number, result: number): void {
    const slot = this.#slots[index]!;
    if (result > 0 && result < slot.length) {
      slot.at += result;
      slot.offset += result;
      slot.length -= result;
      this.#begin(index);
      return;
    }
    const { reader, subject, fd, buffer, at, length, offset } = slot;
    slot.reader = null;
    slot.subject = null;
    slot.buffer = null;
    this.#free.push(index);
    if (result === -EAGAIN) {
      void this.#readOnPool(fd, buffer!, at, length, offset).then((done) =>
        reader!.coldReadEnded(subject, done),
      );
    } else reader!.coldReadEnded(subject, result === 0 ? -EIO : Math.min(result, 0));
  }

  async #readOnPool(
    fd: number,
    buffer: Uint8Array,
    at: number,
    length: number,
    offset: number,
  ): Promise<number> {
    for (let got = 0; got < length; ) {
      const done = await native.readAsync(fd, buffer, at + got, length - got, offset + got);
      if (done < 0) return done;
      if (done === 0) return -EIO;
      got += done;
    }
    return 0;
  }
}

export const coldReads = new ColdReads();
