/**
 * The link process (link.c) from here: started, told what to do, and ended. Commands are answered in their order, so the oldest
 * pending one is the one that an answer belongs to; when the process ends, all that are pending fail.
 */

import { type ChildProcess, spawn } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { compiled, repositoryRoot } from '../cache.js';
import { NAMESPACES } from './namespace.js';

const SOURCE = join(repositoryRoot, 'test/lab/wan/link.c');
const ANSWER_TIMEOUT_MS = 10_000;
const STOP_TIMEOUT_MS = 5_000;
const STDERR_KEPT = 4_096;
const NS_PER_MS = 1e6;
const MILLIONTHS_PER_PERCENT = 1e4;

export interface LinkSettings {
  rttMs: number;
  /** Of IP packets, headers included. */
  rateBitsPerSecond: number;
  /** How long a packet may wait for those before it; what would wait longer is dropped. */
  queueMs: number;
  lossPercent: number;
}

export interface Count {
  packets: number;
  /** Of IP packets, headers included. */
  bytes: number;
}

/** read = delivered + dropped + lost + cut + overflow + refused + onLine, packets as well as bytes. */
export interface DirectionStats {
  read: Count;
  delivered: Count;
  /** The queue was full. */
  dropped: Count;
  /** By the set loss. */
  lost: Count;
  cut: Count;
  /** The link's memory was full: the lab is at its limit. */
  overflow: Count;
  /** The device did not take it. */
  refused: Count;
  onLine: Count;
  /** Time spent in the queue by all that were not dropped. */
  queueSumNs: number;
  queueMaxNs: number;
  /** How much later than it should the link delivered, because it did not get a processor. */
  lateSumNs: number;
  lateMaxNs: number;
}

export interface LinkStats {
  /** CLOCK_MONOTONIC. */
  atNs: number;
  aToB: DirectionStats;
  bToA: DirectionStats;
}

export interface LinkOptions {
  /** Names of the two namespaces. */
  namespaces: readonly [string, string];
  device: string;
  /** Segments of up to 64 KiB pass as one: see link.c. */
  offload: boolean;
  seed: number;
  settings: LinkSettings;
}

interface Pending {
  resolve(answer: string): void;
  reject(error: Error): void;
}

function words({ rateBitsPerSecond, rttMs, queueMs, lossPercent }: LinkSettings): string[] {
  const numbers = [
    rateBitsPerSecond,
    rttMs * NS_PER_MS,
    queueMs * NS_PER_MS,
    lossPercent * MILLIONTHS_PER_PERCENT,
  ];
  if (numbers.some((number) => !Number.isFinite(number) || number < 0))
    throw new Error('a setting of the WAN link is no number, or below 0');
  return numbers.map((number) => String(Math.round(number)));
}

export class Link {
  readonly pid: number;
  readonly #exited: Promise<void>;
  readonly #pending: Pending[] = [];
  #ended: Error | null = null;
  #stderr = '';

  private constructor(readonly child: ChildProcess) {
    this.pid = child.pid ?? 0;
    child.stdin!.on('error', () => {}); // told by its end
    child.stderr!.setEncoding('utf8').on('data', (text: string) => {
      this.#stderr = (this.#stderr + text).slice(-STDERR_KEPT);
    });
    createInterface({ input: child.stdout! }).on('line', (line) => this.#pending.shift()?.resolve(line));
    this.#exited = new Promise((resolve) => {
      const end = (why: string) => {
        this.#ended ??= new Error(`the WAN link ${why}: ${this.#stderr.trim()}`);
        for (const pending of this.#pending.splice(0)) pending.reject(this.#ended);
        resolve();
      };
      child.once('error', (error) => end(`cannot be started (${error.message})`));
      child.once('close', (code, signal) => end(`ended (${signal ?? `code ${code}`})`));
    });
  }

  /** Resolves when both devices are there. */
  static async start({ namespaces, device, offload, seed, settings }: LinkOptions): Promise<Link> {
    const program = await compiled(SOURCE, ['-pthread']);
    const places = namespaces.map((name) => join(NAMESPACES, name));
    const options = [device, offload ? '1' : '0', String(seed), ...words(settings)];
    const link = new Link(spawn(program, [...places, ...options], { stdio: 'pipe' }));
    try {
      const first = await link.#answer();
      if (first !== 'ready') throw new Error(`the WAN link said ${first}`);
    } catch (error) {
      await link.stop();
      throw error;
    }
    return link;
  }

  async set(settings: LinkSettings): Promise<void> {
    await this.#order(`set ${words(settings).join(' ')}`);
  }

  /** From the answer on nothing is delivered; what was on its way is lost. */
  async cut(): Promise<void> {
    await this.#order('cut');
  }

  async restore(): Promise<void> {
    await this.#order('restore');
  }

  async stats(): Promise<LinkStats> {
    return JSON.parse(await this.#order('stats', false)) as LinkStats;
  }

  /** Ends the process, and resolves when it has ended. May be called again. */
  async stop(): Promise<void> {
    this.child.stdin!.end();
    const timer = setTimeout(() => this.child.kill('SIGKILL'), STOP_TIMEOUT_MS);
    await this.#exited;
    clearTimeout(timer);
  }

  async #order(command: string, expectOk = true): Promise<string> {
    if (this.#ended !== null) throw this.#ended;
    this.child.stdin!.write(`${command}\n`);
    const answer = await this.#answer();
    if (expectOk && answer !== 'ok') throw new Error(`WAN link: ${command}: ${answer}`);
    return answer;
  }

  #answer(): Promise<string> {
    if (this.#ended !== null) return Promise.reject(this.#ended);
    return new Promise((resolve, reject) => {
      // An answer that is late would be taken for the next command's: the link is of no use any more.
      const timer = setTimeout(() => this.child.kill('SIGKILL'), ANSWER_TIMEOUT_MS);
      const settle = <T>(end: (value: T) => void) => {
        return (value: T): void => {
          clearTimeout(timer);
          end(value);
        };
      };
      this.#pending.push({ resolve: settle(resolve), reject: settle(reject) });
    });
  }
}
