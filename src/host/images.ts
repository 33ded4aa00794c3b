/** Where images are, and what they take. */

import { existsSync, mkdirSync, statfsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { BlockferryError } from '../errors.js';

/** Makes the folder for images that arrive, if need be; bytes free there. */
export function freeBytes(folder: string): number {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const space = statfsSync(folder);
  return space.bavail * space.bsize;
}

/** What the image occupies; a block device occupies its size. */
export function allocatedBytes(image: string, sizeBytes: number): number {
  try {
    const stat = statSync(image);
    return stat.isFile() ? Math.min(stat.blocks * 512, sizeBytes) : sizeBytes;
  } catch {
    return 0;
  }
}

/** An image left here by an earlier stay of the same volume is never written over. */
export function freeImagePath(images: string, name: string, generation: number): string {
  const plain = join(images, `${name}.img`);
  if (!existsSync(plain)) return plain;
  for (let count = generation; count < generation + 1000; count += 1) {
    const numbered = join(images, `${name}.g${count}.img`);
    if (!existsSync(numbered)) return numbered;
  }
  throw new BlockferryError(
    'exists',
    `${plain} is there already: remove the images of earlier moves from ${images}`,
  );
}
