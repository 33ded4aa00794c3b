/**
 * A volume that moved away leaves its state folder behind, marked retired, so that its stale image is never served as if it were
 * current. When the same volume comes back, that folder makes room; when its coming is cancelled, it is put back.
 *
 * Invariant: while no current state of the volume is in STATE/NAME, the retired one is there again before anything is opened.
 */

import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { BlockferryError, messageOf } from '../errors.js';
import { readIdentity } from '../volume/identity.js';

function asideOf(stateDir: string, name: string): string {
  return join(stateDir, 'daemons', 'retired', name);
}

/** The id of a volume whose state folder says that it moved away; null for every other. */
export async function retiredId(stateDir: string, name: string): Promise<string | null> {
  const identity = await readIdentity(join(stateDir, name)).catch(() => undefined);
  return identity?.phase === 'retired' ? identity.id : null;
}

/** Makes room for the volume that comes back. */
export function setRetiredAside(stateDir: string, name: string): void {
  const aside = asideOf(stateDir, name);
  move(() => {
    mkdirSync(join(aside, '..'), { recursive: true, mode: 0o700 });
    rmSync(aside, { recursive: true, force: true });
    renameSync(join(stateDir, name), aside);
  }, name);
}

/** Puts a retired state back where no current one is. */
export function bringRetiredBack(stateDir: string, name: string): void {
  const aside = asideOf(stateDir, name);
  const place = join(stateDir, name);
  if (!existsSync(join(aside, 'volume.json')) || existsSync(join(place, 'volume.json'))) return;
  move(() => {
    rmSync(place, { recursive: true, force: true });
    renameSync(aside, place);
  }, name);
}

function move(act: () => void, name: string): void {
  try {
    act();
  } catch (error) {
    throw new BlockferryError(
      'image-io',
      `the retired state of "${name}" cannot be moved: ${messageOf(error)}`,
      {
        cause: error,
      },
    );
  }
}
