/** Images of file systems with files of this machine, and what they come to compressed. */

import { execFileSync } from 'node:child_process';
import {
  copyFileSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { compress } from 'zstd-napi';

const MIB = 1 << 20;
const BLOCK_BYTES = 4096;
const ZEROS = Buffer.alloc(BLOCK_BYTES);
/** Files of a usual system. */
const FILES_FROM = '/usr/lib/x86_64-linux-gnu';

/** Files of one folder, in the order of their names, until they come to so many bytes. */
export interface Files {
  from: string;
  /** Folder in the image. */
  to: string;
  bytesMax: number;
  /** With the folders in it. */
  deep?: boolean;
}

/** An ext4 image of so many bytes with files of this machine, by default in half of it. */
export function fileSystem(
  path: string,
  bytes: number,
  folder: string,
  parts: readonly Files[] = [{ from: FILES_FROM, to: '.', bytesMax: bytes / 2 }],
): void {
  const files = join(folder, 'files');
  for (const { from, to, bytesMax, deep = false } of parts) {
    let left = bytesMax;
    for (const name of (readdirSync(from, { recursive: deep }) as string[]).sort()) {
      const file = join(from, name);
      const { size } = lstatSync(file);
      if (!lstatSync(file).isFile() || size > left) continue;
      mkdirSync(dirname(join(files, to, name)), { recursive: true });
      copyFileSync(file, join(files, to, name));
      left -= size;
    }
  }
  writeFileSync(path, '');
  truncateSync(path, bytes);
  execFileSync('mke2fs', ['-q', '-t', 'ext4', '-b', String(BLOCK_BYTES), '-d', files, path]);
  rmSync(files, { recursive: true });
}

/** What the blocks that are not all zeros come to, compressed in pieces of 1 MiB by zstd's level 3. */
export function compressedBytes(content: Buffer): number {
  let sum = 0;
  for (let from = 0; from < content.length; from += MIB) {
    const blocks: Buffer[] = [];
    for (let block = from; block < from + MIB; block += BLOCK_BYTES) {
      const bytes = content.subarray(block, block + BLOCK_BYTES);
      if (!bytes.equals(ZEROS.subarray(0, bytes.length))) blocks.push(bytes);
    }
    if (blocks.length > 0) sum += compress(Buffer.concat(blocks), { compressionLevel: 3 }).length;
  }
  return sum;
}

/** Folder in an image -> its files with data, each as its blocks in order, by debugfs. */
export function filesIn(image: string, folder: string, to: string): Map<string, number[]> {
  const debugfs = (commands: string[]): string => {
    const list = join(folder, 'debugfs');
    writeFileSync(list, `${commands.join('\n')}\n`);
    return execFileSync('debugfs', ['-f', list, image], {
      stdio: ['ignore', 'pipe', 'ignore'],
      maxBuffer: 64 * MIB,
    }).toString();
  };
  const names: string[] = [];
  for (let folders = [to]; folders.length > 0; ) {
    const lines = debugfs(folders.map((name) => `ls -p /${name}`)).split('\n');
    let at = -1;
    const next: string[] = [];
    for (const line of lines) {
      if (line.startsWith('debugfs:')) at++;
      const [, , mode, , , name] = line.split('/');
      if (!line.startsWith('/') || name === '.' || name === '..') continue;
      (mode!.startsWith('04') ? next : names).push(`${folders[at]}/${name}`);
    }
    folders = next;
  }
  const found = new Map<string, number[]>();
  const lines = debugfs(names.map((name) => `blocks "/${name}"`)).split('\n');
  let name = '';
  for (const line of lines) {
    const command = /^debugfs: +blocks "\/(.*)"$/.exec(line);
    if (command !== null) name = command[1]!;
    const blocks = /^[\d ]+$/.test(line) ? line.trim().split(/ +/).map(Number) : [];
    if (blocks.length > 0) found.set(name, blocks);
  }
  return found;
}
