/** Real programs beside a test: started so that they die with it, and found missing rather than failed. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { isAlive } from '../../src/host/control/socket.js';

const START_TIMEOUT_MS = 10_000;
const POLL_MS = 5;

/** A reason to skip a test that needs these programs, or false. */
export function lacking(...programs: string[]): string | false {
  const missing = programs.filter((program) => spawnSync('which', [program]).status !== 0);
  return missing.length === 0 ? false : `needs ${missing.join(', ')}`;
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
