/**
 * What the lab builds is kept in the user's cache folder, under a hash of all that went into it. An entry appears whole, by a
 * rename, and never changes: several processes may ask for it, or build it, at once.
 */

import { execFile } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, mkdtemp, readdir, readFile, rename, rm, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { basename, dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);

/** Compiled, this file is dist/test/lab/cache.js. */
export const repositoryRoot = resolve(dirname(fileURLToPath(import.meta.url)), '../../..');

/** What is older goes when something new is built: a guest has 17 MB. */
const CACHE_AGE_MAX_MS = 30 * 24 * 3_600_000;

function cacheFolder(): string {
  const base = process.env.XDG_CACHE_HOME;
  return join(base?.startsWith('/') ? base : join(homedir(), '.cache'), 'blockferry');
}

/** The folder that `build` made of `inputs`, now or earlier. It fills `ready`, and may use `work`, which goes. */
export async function cached(
  kind: string,
  inputs: Iterable<string | Buffer>,
  build: (ready: string, work: string) => Promise<void>,
): Promise<string> {
  const hash = createHash('sha256');
  for (const input of inputs) hash.update(input).update('\0');
  const folder = join(cacheFolder(), `${kind}-${hash.digest('hex').slice(0, 16)}`);
  if (existsSync(folder)) return folder;

  await mkdir(cacheFolder(), { recursive: true });
  const work = await mkdtemp(join(cacheFolder(), 'build-'));
  try {
    const ready = join(work, 'ready');
    await mkdir(ready);
    await build(ready, work);
    await rename(ready, folder).catch((error: NodeJS.ErrnoException) => {
      if (error.code !== 'ENOTEMPTY' && error.code !== 'EEXIST') throw error; // somebody else was first
    });
  } finally {
    await rm(work, { recursive: true, force: true });
  }
  await forgetOld();
  return folder;
}

async function forgetOld(): Promise<void> {
  for (const name of await readdir(cacheFolder())) {
    const path = join(cacheFolder(), name);
    const info = await stat(path).catch(() => null);
    if (info !== null && Date.now() - info.mtimeMs > CACHE_AGE_MAX_MS)
      await rm(path, { recursive: true, force: true });
  }
}

/** Path of the program that gcc makes of one C file. */
export async function compiled(source: string, options: readonly string[]): Promise<string> {
  const name = basename(source, '.c');
  const inputs = [process.arch, options.join('\0'), await readFile(source)];
  const folder = await cached(name, inputs, async (ready) => {
    await run('gcc', ['-O2', '-Wall', '-Wextra', '-o', join(ready, name), source, ...options]);
  });
  return join(folder, name);
}
