/** Running other people's programs: found or not, started with a deadline, and what they said when they fail. */

import { type ExecFileException, execFile, spawnSync } from 'node:child_process';
import { lacking, unavailable } from '../lab/programs.js';

/** The system's Python, which has libnbd's module. */
export const PYTHON = '/usr/bin/python3';

const TOOL_TIMEOUT_MS = 60_000;
const OUTPUT_BYTES_MAX = 32 << 20;

export interface Ran {
  code: number | null;
  stdout: string;
  stderr: string;
}

/** `skip` with a reason where one of `programs` is absent. */
export function needs(...programs: string[]): { skip: string | false } {
  return { skip: lacking(...programs) };
}

/** `skip` with a reason where libnbd's Python module is absent. */
export function needsLibnbd(): { skip: string | false } {
  const found = spawnSync(PYTHON, ['-c', 'import nbd'], { stdio: 'ignore' });
  return { skip: found.status !== 0 && unavailable("libnbd's Python module") };
}

/** Runs a program to its end, whatever its exit code. It dies with the test. */
export function attempt(
  words: readonly string[],
  options: { env?: NodeJS.ProcessEnv; cwd?: string } = {},
): Promise<Ran> {
  return new Promise((resolve) => {
    const done = (error: ExecFileException | null, stdout: string, stderr: string): void => {
      const code = error === null ? 0 : typeof error.code === 'number' ? error.code : null;
      const why = error !== null && code === null ? `${stderr}${error.message}` : stderr;
      resolve({ code, stdout, stderr: why });
    };
    execFile(
      'setpriv',
      ['--pdeathsig', 'KILL', '--', ...words],
      { timeout: TOOL_TIMEOUT_MS, maxBuffer: OUTPUT_BYTES_MAX, ...options },
      done,
    );
  });
}

/** What a program that must succeed wrote to stdout. */
export async function tool(...words: string[]): Promise<string> {
  const { code, stdout, stderr } = await attempt(words);
  if (code !== 0) throw new Error(`${words.join(' ')} ended with ${code}: ${stderr}${stdout}`);
  return stdout;
}
