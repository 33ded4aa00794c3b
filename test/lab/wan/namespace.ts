/**
 * Network namespaces for the WAN lab. A name tells the process it belongs to, so that what a killed process left is known for what it
 * is, and removed by the next lab.
 */

import { type ExecFileException, execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { delimiter } from 'node:path';

/** Where iproute2 keeps them. */
export const NAMESPACES = '/run/netns';
const NAME = /^bfwan-(\d+)-[0-9a-f]+-[ab]$/;
const TIMEOUT_MS = 10_000;
/** `ip` lives where only root's PATH leads. */
const environment = { ...process.env, PATH: `${process.env.PATH}${delimiter}/usr/sbin${delimiter}/sbin` };
const IP = ['/usr/sbin/ip', '/sbin/ip', '/usr/bin/ip', '/bin/ip'].find((path) => existsSync(path)) ?? 'ip';

/** Runs a program to its end; fails with what it wrote to stderr. */
export function runTool(program: string, words: readonly string[], input = ''): Promise<string> {
  return new Promise((resolve, reject) => {
    const options = { env: environment, timeout: TIMEOUT_MS };
    const done = (error: ExecFileException | null, stdout: string, stderr: string): void => {
      if (error === null) resolve(stdout);
      else
        reject(
          new Error(`${program} ${words.join(' ')}: ${stderr.trim().replaceAll('\n', ' ') || error.message}`),
        );
    };
    const child = execFile(program, words, options, done);
    child.stdin!.on('error', () => {}); // it ended without reading: its code tells why
    child.stdin!.end(input);
  });
}

export function ip(words: readonly string[], input?: string): Promise<string> {
  return runTool(IP, words, input);
}

/** The command that runs `words` inside a namespace, as the same process. */
export function inNamespace(namespace: string, words: readonly string[]): string[] {
  return [IP, 'netns', 'exec', namespace, ...words];
}

/** Names for a pair that nobody else uses. */
export function namespaceNames(): [string, string] {
  const stem = `bfwan-${process.pid}-${randomBytes(4).toString('hex')}`;
  return [`${stem}-a`, `${stem}-b`];
}

/** Of `pid`'s labs; all labs' without it. */
export function labNamespaces(pid?: number): string[] {
  if (!existsSync(NAMESPACES)) return [];
  return readdirSync(NAMESPACES).filter((name) => {
    const match = NAME.exec(name);
    return match !== null && (pid === undefined || Number(match[1]) === pid);
  });
}

/** False also for a process that ended and that nobody has waited for. */
export function isRunning(pid: number): boolean {
  try {
    return !/\) [ZX] /.test(readFileSync(`/proc/${pid}/stat`, 'latin1'));
  } catch {
    return false;
  }
}

/** Removes what labs of dead processes left. Several processes may do so at once. */
export async function removeStaleNamespaces(): Promise<void> {
  for (const name of labNamespaces()) {
    if (!isRunning(Number(NAME.exec(name)![1]))) await removeNamespace(name);
  }
}

/** Removes a namespace, if it is there, and ends what still runs inside: nobody else can have started that. */
export async function removeNamespace(name: string): Promise<void> {
  if (!existsSync(`${NAMESPACES}/${name}`)) return;
  try {
    for (const pid of (await ip(['netns', 'pids', name])).split('\n').filter((word) => word !== '')) {
      if (Number(pid) !== process.pid) kill(Number(pid));
    }
    await ip(['netns', 'del', name]);
  } catch (error) {
    if (existsSync(`${NAMESPACES}/${name}`)) throw error; // otherwise somebody else removed it
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
