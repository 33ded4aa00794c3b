/** A machine whose daemons can be killed, and that can lose power itself. */
import { randomUUID } from 'node:crypto';
import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Daemon } from './daemon.js';
import { buildPreload, type Loss, PowerLoss } from './power.js';
import type { Random } from './random.js';

/** Syncs take up to so long, so that crashes meet them half way. */
const SYNC_US_MAX = 3000;

export class Machine {
  /** What is below is on the machine's disk. */
  readonly root: string;
  readonly #folder: string;
  readonly #library: string;
  readonly #bootFile: string;
  #logs = 0;
  #power: PowerLoss;

  constructor(folder: string) {
    this.#folder = folder;
    this.root = join(folder, 'disk');
    mkdirSync(this.root, { recursive: true });
    this.#library = buildPreload(folder);
    this.#bootFile = join(folder, 'boot-id');
    this.#power = this.boot();
  }

  /** For a daemon of this machine. */
  env(): NodeJS.ProcessEnv {
    return {
      ...this.envUnwatched(),
      CRASH_ROOT: this.root,
      CRASH_LOG: join(this.#folder, `log-${++this.#logs}`),
      CRASH_SYNC_US: String(SYNC_US_MAX),
    };
  }

  /** For a daemon of this machine that dies only in order. */
  envUnwatched(): NodeJS.ProcessEnv {
    return { LD_PRELOAD: this.#library, CRASH_BOOT_ID: this.#bootFile };
  }

  /** The machine starts; what is on its disk now is durable. */
  boot(id: string = randomUUID()): PowerLoss {
    writeFileSync(this.#bootFile, `${id}\n`);
    this.#power = new PowerLoss(this.root);
    return this.#power;
  }

  /** To be called for each daemon that is dead, in order. Returns how many steps it made since it was last armed. */
  daemonDied(child: Daemon): number {
    const log = child.env.CRASH_LOG;
    if (log === undefined || !existsSync(log)) return 0;
    this.#power.replay(log);
    rmSync(log);
    return this.#power.stepsSinceArmed;
  }

  /** What happened since the boot: of it any number of losses can be drawn. */
  get power(): PowerLoss {
    return this.#power;
  }

  /** Power is lost, and comes back. No daemon may run. `power`: of which boot, if not of this. */
  losePower(random: Random, loss: Loss, power = this.#power): void {
    power.strike(random, loss);
    this.boot();
  }
}
