/** Real programs beside a test: started so that they die with it, and found missing rather than failed. */
import { type ChildProcess, spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { existsSync } from 'node:fs';
import { until } from './ferry.js';

/** A reason to skip a test that needs these programs, or false. */
export function lacking(...programs: string[]): string | false {
  const missing = programs.filter((program) => spawnSync('which', [program]).status !== 0);
  return missing.length === 0 ? false : `needs ${missing.join(', ')}`;
}

/** Starts a server and waits until its socket is there. */
export async function serverOn(
  socket: string,
  command: string,
  ...words: string[]
): Promise<{ process: ChildProcess; stop: () => Promise<void> }> {
  const child = spawn('setpriv', ['--pdeathsig', 'KILL', '--', command, ...words], {
    stdio: ['ignore', 'ignore', 'inherit'],
  });
  const over = once(child, 'exit');
  await until(() => existsSync(socket) || child.exitCode !== null, `${command} listens`);
  return {
    process: child,
    async stop() {
      child.kill('SIGKILL');
      await over;
    },
  };
}
