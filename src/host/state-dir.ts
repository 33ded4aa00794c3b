/** Where a daemon keeps what outlives it. */

import { existsSync } from 'node:fs';
import { homedir } from 'node:os';
import { join, resolve } from 'node:path';

/** Folders of ours beside the volumes' folders in the state folder: no volume may be named so. */
export const RESERVED_NAMES: ReadonlySet<string> = new Set([
  'control',
  'daemons',
  'migrations',
  'images',
  'run',
]);

/** BLOCKFERRY_STATE_DIR if it is set; else /var/lib/blockferry as root, the user's XDG state folder for others. */
export function defaultStateDir(): string {
  const { BLOCKFERRY_STATE_DIR: given } = process.env;
  if (given !== undefined && given !== '') return resolve(given);
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

/** For indexes of seeds. No volume can be named so. */
export function seedsDir(stateDir: string): string {
  return join(stateDir, '.seeds');
}

/** Whether there is a volume's identity, as an earlier run or another thread left it. */
export function hasState(stateDir: string, volume: string): boolean {
  return existsSync(join(stateDir, volume, 'volume.json'));
}
