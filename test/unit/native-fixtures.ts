/** What the tests of the addon share: files that are removed after the tests, and child processes. */
import { spawnSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after } from 'node:test';
import { fileURLToPath } from 'node:url';

export const MIB = 1 << 20;
/** The addon's loader, for other threads and processes. */
export const loader = fileURLToPath(new URL('../../src/native/index.js', import.meta.url));

const folders: string[] = [];
const descriptors: number[] = [];
after(() => {
  for (const fd of descriptors) closeSync(fd);
  for (const folder of folders) rmSync(folder, { recursive: true, force: true });
});

export function folderIn(parent = tmpdir()): string {
  const folder = mkdtempSync(join(parent, 'blockferry-native-'));
  folders.push(folder);
  return folder;
}

export function opened(path: string, flags: string): number {
  const fd = openSync(path, flags);
  descriptors.push(fd);
  return fd;
}

/** A new file of `bytes` bytes 1, 2, 3, ..., 250, 1, ... (never 0). */
export function patterned(bytes: number, parent?: string): { path: string; fd: number; content: Buffer } {
  const path = join(folderIn(parent), 'image');
  const content = Buffer.from(Uint8Array.from({ length: bytes }, (_, i) => (i % 250) + 1));
  writeFileSync(path, content);
  return { path, fd: opened(path, 'r+'), content };
}

/** Runs a module's text in a child process; the addon's loader is `native` there. */
export function child(
  script: string,
  ...flags: string[]
): { status: number | null; stdout: string; stderr: string } {
  const text = `import * as native from ${JSON.stringify(loader)};\n${script}`;
  return spawnSync(
    'setpriv',
    ['--pdeathsig', 'KILL', '--', process.execPath, ...flags, '--input-type=module', '-e', text],
    {
      encoding: 'utf8',
      timeout: 60_000,
    },
  );
}

export function sparse(bytes: number, parent?: string): number {
  const fd = opened(join(folderIn(parent), 'sparse'), 'w+');
  ftruncateSync(fd, bytes);
  return fd;
}
