/**
 * A volume that moved away leaves its state folder behind, marked retired, so that its stale image is never served as if it were
 * current. When the same volume comes back, that folder makes room; when its coming is cancelled, it is put back.
 *
 * Invariant: while no current state of the volume is in STATE/NAME, the retired one is there again before anything is opened.
 */

import { existsSync, mkdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { BlockferryError, messageOf } from '../errors.js';
import { IdentityFile, readIdentity } from '../volume/identity.js';
import { stampOfFile } from '../volume/image.js';

function asideOf(stateDir: string, name: string): string {
  return join(stateDir, 'daemons', 'retired', name);
}

/** The id of a volume whose state folder says that it moved away; null for every other. */
export async function retiredId(stateDir: string, name: string): Promise<string | null> {
  const identity = await readIdentity(join(stateDir, name)).catch(() => undefined);
  return identity?.phase === 'retired' ? identity.id : null;
}

/** What a volume that moved away left here: its image, as it was in that generation. */
export interface Home {
  readonly id: string;
  readonly generation: number;
  readonly image: string;
  /** Of the image: see Image.stamp. */
  readonly stamp: string;
}

/** Null unless the image is known to be untouched since the volume was retired. */
export async function homeOf(stateDir: string, name: string): Promise<Home | null> {
  const identity = await readIdentity(join(stateDir, name)).catch(() => undefined);
  if (identity?.phase !== 'retired' || identity.imageStamp === null) return null;
  const { id, generation, image, imageStamp } = identity;
  return stampOfFile(image) === imageStamp ? { id, generation, image, stamp: imageStamp } : null;
}

/** The image is about to be written to: from now on, durably, it is no generation's. */
export async function giveUpHome(stateDir: string, name: string): Promise<void> {
  const folder = join(stateDir, name);
  const identity = await readIdentity(folder);
  if (identity === undefined || identity.imageStamp === null) return;
  await new IdentityFile(folder, identity, { stored: true }).update({ imageStamp: null });
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
