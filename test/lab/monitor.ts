/**
 * Listens to a test guest on the serial ports of all machines it runs on, and stamps every line with the host's clock: guest
 * clocks stand still during a switch, so only the host can tell how long a pause was.
 */

import { connect, type Socket } from 'node:net';

const HEARTBEATS_KEPT = 200_000;
const LINES_KEPT = 1_000;
const LINE_BYTES_MAX = 4_096;

export interface Heartbeat {
  /** performance.now() of the host when the line came. */
  atMs: number;
  host: string;
  count: number;
  records: number;
  checked: number;
  /** Bad records and failed I/O, so far. */
  errors: number;
  /** RAM pages that lost their content: the hypervisor's fault, not the disk's. */
  ramErrors: number;
  /** Slowest I/O since the heartbeat before, the one under way included. */
  slowestUs: number;
}

export interface GuestLine {
  atMs: number;
  host: string;
  text: string;
}

export interface GuestVerdict {
  slots: number;
  bad: number;
  records: number;
  checked: number;
  errors: number;
  ramErrors: number;
  /** Compare with checkRawDisk's. */
  digest: string;
}

interface Waiter {
  look(): boolean;
  fail(error: Error): void;
}

const HEARTBEAT = /HB n=(\d+) rec=(\d+) chk=(\d+) err=(\d+) ram=(\d+) slow=(\d+)/;
const VERDICT = /VERIFIED slots=(\d+) bad=(\d+) rec=(\d+) chk=(\d+) err=(\d+) ram=(\d+) digest=([0-9a-f]{8})/;
const CHECKED = /CHECKED slots=(\d+) bad=(\d+) digest=([0-9a-f]{8})/;
const BROKEN = /Kernel panic|Oops|BUG:|FATAL|general protection fault|Call Trace/;

export class GuestMonitor {
  readonly heartbeats: Heartbeat[] = [];
  /** Everything that is not a heartbeat. */
  readonly lines: GuestLine[] = [];
  /** BAD and IOERR lines: what the guest found wrong with its disk. */
  readonly complaints: string[] = [];
  /** First line that shows that the guest's kernel or workload broke. */
  broken: string | null = null;
  readonly #sockets = new Map<string, Socket>();
  readonly #waiters = new Set<Waiter>();
  #linesDropped = 0;
  #nextLine = 0;

  /** Connects to the serial socket of the machine on `host`, before the guest runs there. */
  async attach(host: string, path: string): Promise<void> {
    const socket = connect({ path });
    await new Promise<void>((resolve, reject) => {
      socket.once('connect', resolve);
      socket.once('error', reject);
    });
    this.#sockets.set(host, socket);
    let rest = '';
    socket.setEncoding('latin1');
    socket.on('data', (chunk: string) => {
      const atMs = performance.now();
      const parts = (rest + chunk).split('\n');
      rest = parts.pop()!.slice(-LINE_BYTES_MAX);
      for (const part of parts) this.#line({ atMs, host, text: part.trim() });
      if (parts.length > 0) this.#look();
    });
    socket.on('error', () => {});
    socket.on('close', () => this.#sockets.delete(host));
  }

  get last(): Heartbeat | undefined {
    return this.heartbeats.at(-1);
  }

  /** Next line (of any host) that fits, from behind the one found last. Rejects when the guest broke or time is up. */
  async expect(pattern: RegExp, timeoutMs: number): Promise<{ line: GuestLine; match: RegExpExecArray }> {
    let found: { line: GuestLine; match: RegExpExecArray } | undefined;
    const look = () => {
      for (; this.#nextLine - this.#linesDropped < this.lines.length; this.#nextLine++) {
        const line = this.lines[Math.max(0, this.#nextLine - this.#linesDropped)]!;
        const match = pattern.exec(line.text);
        if (match === null) continue;
        this.#nextLine++;
        found = { line, match };
        return true;
      }
      return false;
    };
    await this.#wait(look, timeoutMs, `the guest did not say ${pattern}`);
    return found!;
  }

  /** `READY`: the disk is open and the workload starts. */
  async ready(timeoutMs = 60_000): Promise<void> {
    await this.expect(/READY slots=/, timeoutMs);
  }

  /** Resolves when the guest on `host` has sent `count` more heartbeats and written at least `records` more records. */
  async progress(host: string, { count = 20, records = 0, timeoutMs = 60_000 } = {}): Promise<void> {
    const first = this.heartbeats.length;
    const recordsBefore = this.last?.records ?? 0;
    const look = () => {
      const since = this.heartbeats.slice(first).filter((beat) => beat.host === host);
      return since.length >= count && since.at(-1)!.records - recordsBefore >= records;
    };
    await this.#wait(look, timeoutMs, `no ${count} heartbeats with ${records} new records from ${host}`);
  }

  /** Longest time between two heartbeats that arrived between `fromMs` and `toMs`, whichever host they came from. */
  longestGapMs(fromMs = 0, toMs = Number.POSITIVE_INFINITY): number {
    const times = this.heartbeats.map((beat) => beat.atMs).filter((atMs) => atMs >= fromMs && atMs <= toMs);
    return times.reduce((longest, atMs, i) => (i === 0 ? 0 : Math.max(longest, atMs - times[i - 1]!)), 0);
  }

  /** Reads and compares every slot; the guest goes on. */
  async check(host: string, timeoutMs = 60_000): Promise<{ slots: number; bad: number; digest: string }> {
    this.#press(host, 'v');
    const { match } = await this.expect(CHECKED, timeoutMs);
    return { slots: Number(match[1]), bad: Number(match[2]), digest: match[3]! };
  }

  /** Reads and compares every slot, unmounts and powers off. */
  async finish(host: string, timeoutMs = 60_000): Promise<GuestVerdict> {
    this.#press(host, 'q');
    const { match } = await this.expect(VERDICT, timeoutMs);
    const [slots, bad, records, checked, errors, ramErrors] = match.slice(1, 7).map(Number) as number[];
    return {
      slots: slots!,
      bad: bad!,
      records: records!,
      checked: checked!,
      errors: errors!,
      ramErrors: ramErrors!,
      digest: match[7]!,
    };
  }

  close(): void {
    for (const socket of this.#sockets.values()) socket.destroy();
    this.#sockets.clear();
    for (const waiter of this.#waiters) waiter.fail(new Error('the guest monitor was closed'));
  }

  #press(host: string, key: string): void {
    const socket = this.#sockets.get(host);
    if (socket === undefined) throw new Error(`no serial line to the guest on ${host}`);
    socket.write(key);
  }

  #line(line: GuestLine): void {
    const beat = HEARTBEAT.exec(line.text);
    if (beat !== null) {
      const [count, records, checked, errors, ramErrors, slowestUs] = beat.slice(1).map(Number) as number[];
      this.heartbeats.push({
        atMs: line.atMs,
        host: line.host,
        count: count!,
        records: records!,
        checked: checked!,
        errors: errors!,
        ramErrors: ramErrors!,
        slowestUs: slowestUs!,
      });
      if (this.heartbeats.length > HEARTBEATS_KEPT) this.heartbeats.splice(0, HEARTBEATS_KEPT / 2);
      return;
    }
    if (line.text === '') return;
    this.lines.push(line);
    if (this.lines.length > LINES_KEPT) {
      this.lines.shift();
      this.#linesDropped++;
      this.#nextLine = Math.max(this.#nextLine, this.#linesDropped);
    }
    if (/^(BAD|IOERR) /.test(line.text) && this.complaints.length < LINES_KEPT)
      this.complaints.push(line.text);
    if (BROKEN.test(line.text)) this.broken ??= line.text;
  }

  #look(): void {
    for (const waiter of this.#waiters) {
      if (waiter.look()) continue;
      if (this.broken !== null)
        waiter.fail(new Error(`the guest broke, which is no fault of its disk: ${this.broken}`));
    }
  }

  #wait(look: () => boolean, timeoutMs: number, failure: string): Promise<void> {
    return new Promise((resolve, reject) => {
      const end = (error?: Error) => {
        clearTimeout(timer);
        this.#waiters.delete(waiter);
        if (error === undefined) resolve();
        else reject(error);
      };
      const waiter: Waiter = {
        look: () => {
          if (!look()) return false;
          end();
          return true;
        },
        fail: end,
      };
      const timer = setTimeout(() => {
        const last = this.lines.slice(-5).map((line) => `${line.host}: ${line.text}`);
        end(new Error(`${failure} within ${timeoutMs} ms; its last lines: ${last.join(' | ') || 'none'}`));
      }, timeoutMs);
      this.#waiters.add(waiter);
      this.#look();
    });
  }
}
