/** Whether zstd is there: a package that installs a binary may have been installed without it, and links are plain then. */
import { createRequire } from 'node:module';

const load = createRequire(import.meta.url);
let known: boolean | undefined;

export function zstdAvailable(): boolean {
  if (known === undefined) {
    try {
      load('zstd-napi/binding.js');
      known = true;
    } catch {
      known = false;
    }
  }
  return known;
}
