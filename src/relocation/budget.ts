/** Who asks for something that may take long. */
export interface Asker {
  /** Nobody waits for it any more. */
  readonly abandoned: boolean;
}

interface Waiting {
  readonly bytes: number;
  readonly asker: Asker | undefined;
  readonly admit: (admitted: boolean) => void;
}

/** Admits requests up to a number of them, and of their bytes, at a time; the others wait in order of arrival. */
export class Budget {
  #requests = 0;
  #bytes = 0;
  #waiting: Waiting[] = [];

  constructor(
    readonly requestsMax: number,
    readonly bytesMax: number,
  ) {}

  /**
   * Null: admitted; else whether it was, in its turn. One that is larger than `bytesMax` is admitted alone. Whoever was admitted
   * owes a `give` of the same bytes.
   */
  take(bytes: number, asker?: Asker): Promise<boolean> | null {
    if (this.#waiting.length === 0 && this.#fits(bytes)) {
      this.#count(bytes);
      return null;
    }
    return new Promise((admit) => this.#waiting.push({ bytes, asker, admit }));
  }

  /** Sends away those who wait for nobody. */
  dropAbandoned(): void {
    const waiting = this.#waiting;
    if (waiting.length === 0) return;
    this.#waiting = waiting.filter(({ asker }) => asker === undefined || !asker.abandoned);
    for (const { asker, admit } of waiting) if (asker?.abandoned) admit(false);
  }

  give(bytes: number): void {
    this.#requests--;
    this.#bytes -= bytes;
    for (let next = this.#waiting[0]; next !== undefined && this.#fits(next.bytes); next = this.#waiting[0]) {
      this.#waiting.shift();
      this.#count(next.bytes);
      next.admit(true);
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
