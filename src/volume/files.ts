import { constants } from 'node:fs';
import { type FileHandle, mkdir, open, rename, rm } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';

/** Makes a folder's entries (creations, renames, removals) durable. */
export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await folder.sync();
  } finally {
    await folder.close();
  }
}

/**
 * Makes a folder, and those above it that are missing, durably. The folder above is synced in any case: who made it may not have
 * done that. `mode` is of those that are made.
 */
export async function makeFolder(path: string, mode = 0o700): Promise<void> {
  const above = dirname(resolve(path));
  const made = await mkdir(path, { recursive: true, mode });
  await syncFolder(above);
  for (let at = above; at !== '/'; at = dirname(at)) {
    const ours = made !== undefined && resolve(made).length <= at.length;
    if (!ours && at !== above) return;
    try {
      await syncFolder(dirname(at));
    } catch (error) {
      // A folder that we may enter and not read, above one that was there before us.
      if (ours || (error as NodeJS.ErrnoException).code !== 'EACCES') throw error;
    }
  }
}

/** Replaces a file as a whole: a reader, or a crash at any moment, sees the old content or the new one. Durable when it resolves. */
export async function replaceFile(path: string, content: string): Promise<void> {
  const next = `${path}.next`;
  let file: FileHandle | undefined;
  try {
    file = await open(next, 'w', 0o600);
    await file.writeFile(content);
    await file.sync();
  } finally {
    await file?.close();
  }
  await rename(next, path);
  await syncFolder(dirname(path));
}

/** Removes a file durably; one that is not there is fine. */
export async function removeFile(path: string): Promise<void> {
  await rm(path, { force: true });
  await syncFolder(dirname(path));
}
