/** Where a daemon keeps what outlives it. */

import { homedir } from 'node:os';
import { join } from 'node:path';

/** Folders of ours beside the volumes' folders in the state folder: no volume may be named so. */
export const RESERVED_NAMES: ReadonlySet<string> = new Set([
  'control',
  'daemons',
  'migrations',
  'images',
  'run',
]);

/** /var/lib/blockferry as root, else the user's XDG state folder. */
export function defaultStateDir(): string {
  if (process.getuid?.() === 0) return '/var/lib/blockferry';
  const xdg = process.env.XDG_STATE_HOME;
  return join(xdg?.startsWith('/') ? xdg : join(homedir(), '.local/state'), 'blockferry');
}

export function controlSocketPath(stateDir: string, name: string): string {
  return join(stateDir, 'control', `${name}.sock`);
}

export function migrationsDir(stateDir: string): string {
  return join(stateDir, 'migrations');
}
