/** What a server costs, read from /proc: the process that was started and all that descend from it. Source: proc(5). */

import { readdirSync, readFileSync, writeFileSync } from 'node:fs';

/** Milliseconds of a clock tick: USER_HZ is 100 wherever Linux runs (proc(5), sysconf(_SC_CLK_TCK)). */
const TICK_MS = 10;

export interface Stat {
  pid: number;
  parent: number;
  /** User and system time of all its threads, the ended ones too, and of the children it waited for. */
  cpuMs: number;
}

/** Reads a line of /proc/PID/stat. The second field is a name in parentheses that may hold anything. */
export function parseStat(text: string): Stat {
  const rest = text.slice(text.lastIndexOf(')') + 2).split(' ');
  // Fields 3 (state) and on.
  const [utime, stime, cutime, cstime] = rest.slice(11, 15).map(Number);
  return {
    pid: Number.parseInt(text, 10),
    parent: Number(rest[1]),
    cpuMs: (utime + stime + cutime + cstime) * TICK_MS,
  };
}

function statOf(pid: string): Stat | null {
  try {
    return parseStat(readFileSync(`/proc/${pid}/stat`, 'latin1'));
  } catch {
    return null; // it has ended since it was listed
  }
}

/** `root` and its descendants. */
function tree(root: number): Stat[] {
  const all = readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(statOf)
    .filter((stat) => stat !== null);
  const found = all.filter(({ pid }) => pid === root);
  for (const { pid } of found) found.push(...all.filter(({ parent }) => parent === pid));
  return found;
}

/** CPU time of a server so far, in steps of 10 ms. */
export function cpuMsOf(root: number): number {
  return tree(root).reduce((sum, { cpuMs }) => sum + cpuMs, 0);
}

/** Starts the peak anew. Where the kernel does not allow it the peak is that of the server's whole life. */
export function resetPeak(root: number): void {
  for (const { pid } of tree(root)) {
    try {
      writeFileSync(`/proc/${pid}/clear_refs`, '5');
    } catch {
      // Not allowed, or it has ended.
    }
  }
}

/** Greatest resident memory (VmHWM) of all its processes. What they share is counted for each. */
export function peakBytesOf(root: number): number {
  return tree(root).reduce((sum, { pid }) => {
    try {
      const found = /^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'latin1'));
      return sum + (found === null ? 0 : Number(found[1]) * 1024);
    } catch {
      return sum;
    }
  }, 0);
}
