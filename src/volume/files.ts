import { constants } from 'node:fs';
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';

/** Makes a folder's entries (creations, renames, removals) durable. */
export async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, constants.O_RDONLY | constants.O_DIRECTORY);
  try {
    await folder.sync();
  } finally {
    await folder.close();
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
