/** Admits requests up to a number of them, and of their bytes, at a time; the others wait in order of arrival. */
export class Budget {
  #requests = 0;
  #bytes = 0;
  readonly #waiting: { bytes: number; admit: () => void }[] = [];

  constructor(
    readonly requestsMax: number,
    readonly bytesMax: number,
  ) {}

  /** Null: admitted. One that is larger than `bytesMax` is admitted alone. Each is followed by `give` of the same bytes. */
  take(bytes: number): Promise<void> | null {
    if (this.#waiting.length === 0 && this.#fits(bytes)) {
      this.#count(bytes);
      return null;
    }
    return new Promise((admit) => this.#waiting.push({ bytes, admit }));
  }

  give(bytes: number): void {
    this.#requests--;
    this.#bytes -= bytes;
    for (let next = this.#waiting[0]; next !== undefined && this.#fits(next.bytes); next = this.#waiting[0]) {
      this.#waiting.shift();
      this.#count(next.bytes);
      next.admit();
    }
  }

  #fits(bytes: number): boolean {
    if (this.#requests === 0) return true;
    return this.#requests < this.requestsMax && this.#bytes + bytes <= this.bytesMax;
  }

  #count(bytes: number): void {
    this.#requests++;
    this.#bytes += bytes;
  }
}
