/** A queue of bytes: what one side of a connection has sent and nobody has taken apart yet. */
export class ByteQueue {
  #buffer = Buffer.alloc(4096);
  #from = 0;
  #to = 0;

  get length(): number {
    return this.#to - this.#from;
  }

  push(bytes: Uint8Array): void {
    if (this.#to + bytes.length > this.#buffer.length) {
      const held = this.length;
      const larger = Buffer.alloc(Math.max(this.#buffer.length, 2 * (held + bytes.length)));
      this.#buffer.copy(larger, 0, this.#from, this.#to);
      this.#buffer = larger;
      this.#from = 0;
      this.#to = held;
    }
    this.#buffer.set(bytes, this.#to);
    this.#to += bytes.length;
  }

  /** The next `length` bytes, which stay where they are, until the next `push`; null while they have not all come. */
  peek(length: number): Buffer | null {
    return this.length < length ? null : this.#buffer.subarray(this.#from, this.#from + length);
  }

  /** The next `length` bytes, to keep. */
  take(length: number): Buffer {
    const bytes = Buffer.from(this.#buffer.subarray(this.#from, this.#from + length));
    this.#from += bytes.length;
    return bytes;
  }

  clear(): void {
    this.#from = this.#to;
  }
}
