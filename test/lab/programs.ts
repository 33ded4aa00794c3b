/** Real programs beside a test: started so that they die with it, and found missing rather than failed. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { isAlive } from '../../src/host/control/socket.js';

const START_TIMEOUT_MS = 10_000;
const POLL_MS = 5;

/** Set where everything was installed before (bin/check): what is missing then is a failure, not a reason to skip. */
export const ALL_INSTALLED = process.env.BLOCKFERRY_ALL_INSTALLED === '1';

/** A reason to skip what needs these programs, or false. Throws when they should be there. */
export function lacking(...programs: string[]): string | false {
  const missing = programs.filter((program) => spawnSync('which', [program]).status !== 0);
  return missing.length > 0 && unavailable(missing.join(', '));
}

/** The reason to skip what needs `what`, which is not there. Throws when it should be. */
export function unavailable(what: string): string {
  if (ALL_INSTALLED) throw new Error(`${what}: not installed, though the set-up is over`);
  return `not installed: ${what}`;
}

/** Starts a server and waits until its socket takes connections: the file is there a moment earlier. */
export async function serverOn(
  socket: string,
  command: string,
  ...words: string[]
): Promise<{ process: ChildProcess; stop: () => Promise<void> }> {
  const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', command, ...words], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const over = once(child, 'exit');
  const deadline = performance.now() + START_TIMEOUT_MS;
  while (!(await isAlive(socket))) {
    if (child.exitCode !== null) throw new Error(`${command} ended with code ${child.exitCode}`);
    if (performance.now() > deadline)
      throw new Error(`${command} does not listen after ${START_TIMEOUT_MS} ms`);
    await delay(POLL_MS);
  }
  return {
    process: child,
    async stop() {
      child.kill('SIGKILL');
      await over;
    },
  };
}
