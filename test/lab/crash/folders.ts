import { accessSync, constants, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

/** A folder on the disk, and one on tmpfs (where reads take another path) or on the disk if there is none. */
export function crashFolders(): { folder: string; inMemory: string; remove: () => void } {
  const prefix = 'blockferry-crash-';
  const folder = mkdtempSync(join(tmpdir(), prefix));
  const inMemory = mkdtempSync(join(writable('/dev/shm') ? '/dev/shm' : tmpdir(), prefix));
  const remove = (): void => {
    for (const path of [folder, inMemory]) rmSync(path, { recursive: true, force: true });
  };
  return { folder, inMemory, remove };
}

function writable(path: string): boolean {
  try {
    accessSync(path, constants.W_OK);
    return true;
  } catch {
    return false;
  }
}
