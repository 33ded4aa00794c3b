/** Starts and ends the programs of peer-main.ts on a host of a WAN lab. */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { type WanHost, words } from '../wan.js';

const PROGRAM = fileURLToPath(new URL('./peer-main.js', import.meta.url));

export class Peer {
  readonly ended: Promise<unknown>;
  readonly #lines: string[] = [];
  readonly #changed = new Set<() => void>();

  private constructor(readonly child: ChildProcess) {
    this.ended = once(child, 'close');
    createInterface({ input: child.stdout! }).on('line', (line) => {
      this.#lines.push(line);
      for (const look of this.#changed) look();
    });
  }

  static start(host: WanHost, ...program: (string | number)[]): Peer {
    const command = words(host, [process.execPath, PROGRAM, ...program.map(String)]);
    return new Peer(
      spawn('setpriv', ['--pdeathsig', 'KILL', '--', ...command], { stdio: ['pipe', 'pipe', 'inherit'] }),
    );
  }

  /** The first line, from now on or before, of which `fits` says so. */
  async line(fits: (line: string) => boolean): Promise<string> {
    for (;;) {
      const found = this.#lines.find(fits);
      if (found !== undefined) return found;
      let look: () => void = () => {};
      const more = new Promise<void>((resolve) => {
        look = resolve;
        this.#changed.add(look);
      });
      const over = this.ended.then(() => 'over' as const);
      if ((await Promise.race([more, over])) === 'over' && !this.#lines.some(fits))
        throw new Error(`the peer ended with code ${this.child.exitCode}`);
      this.#changed.delete(look);
    }
  }

  /** `serve`: where it listens. */
  async port(): Promise<number> {
    return Number((await this.line((line) => line.startsWith('port '))).slice('port '.length));
  }

  /** `serve`: what has come so far. */
  get bytes(): number {
    return this.#lines.reduce((most, line) => Math.max(most, bytesOf(line)), 0);
  }

  /** `serve`: resolves when `bytes` have come. */
  async received(bytes: number): Promise<void> {
    await this.line((line) => bytesOf(line) >= bytes);
  }

  async stop(): Promise<void> {
    this.child.kill('SIGKILL');
    await this.ended;
  }
}

function bytesOf(line: string): number {
  return line.startsWith('bytes ') ? Number(line.slice('bytes '.length)) : 0;
}
