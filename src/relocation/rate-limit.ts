/** A rate that the background copy keeps to: bytes are paid for when they are asked for, from a credit that grows with time. */

/** The credit never grows beyond what comes in so long, or one request. */
const BURST_MS = 100;

export class RateLimit {
  #bytesPerSecond: number | null;
  #credit = 0;
  #atMs = 0;
  #timer: NodeJS.Timeout | undefined;

  constructor(
    bytesPerSecond: number | null,
    private readonly burstBytesMin: number,
    /** There is credit again. */
    private readonly onCredit: () => void,
  ) {
    this.#bytesPerSecond = bytesPerSecond;
  }

  /** Null: none. */
  get bytesPerSecond(): number | null {
    return this.#bytesPerSecond;
  }

  set(bytesPerSecond: number | null): void {
    this.#bytesPerSecond = bytesPerSecond;
    this.#credit = 0;
    this.start();
    this.stop();
  }

  /** Credit grows from now on. */
  start(): void {
    this.#atMs = performance.now();
  }

  /** `onCredit` is not called any more, until `allows` says no again. */
  stop(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
  }

  spend(bytes: number): void {
    if (this.#bytesPerSecond !== null) this.#credit -= bytes;
  }

  /** Whether there is credit; if not, `onCredit` is called when there is. */
  get allows(): boolean {
    const rate = this.#bytesPerSecond;
    if (rate === null) return true;
    const now = performance.now();
    const burst = Math.max((rate * BURST_MS) / 1000, this.burstBytesMin);
    this.#credit = Math.min(burst, this.#credit + ((now - this.#atMs) / 1000) * rate);
    this.#atMs = now;
    if (this.#credit > 0) return true;
    this.#timer ??= setTimeout(
      () => {
        this.#timer = undefined;
        this.onCredit();
      },
      Math.max(1, (-this.#credit / rate) * 1000 + 1),
    ).unref();
    return false;
  }
}
