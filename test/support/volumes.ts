/** Volumes in any phase, made the way they come to be, and what a kill or a crash of the machine leaves of them. */
import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after } from 'node:test';
import { setImmediate } from 'node:timers/promises';
import type { Identity } from '../../src/volume/identity.js';
import { createProxied, openPlain, type ProxiedOptions, reopen } from '../../src/volume/open.js';
import type { Phase } from '../../src/volume/phase.js';
import type { Volume } from '../../src/volume/volume.js';
import { asLeftByAnotherBoot, copyOf, HeldSource, patterned, sparseFile, tempFolder } from './volume.js';

export const SIZE = 8 * 4096 + 512;
export const NAME = 'vm';

const open: Volume[] = [];
after(async () => {
  for (const volume of open) await volume.close().catch(() => undefined);
});

export function keep(volume: Volume): Volume {
  open.push(volume);
  return volume;
}

/** A folder with `state/` for the maps and `disks/` for the images: copied as a whole it is a host after a kill. */
export function host(): string {
  return tempFolder();
}

export const stateOf = (root: string): string => join(root, 'state');
export const folderOf = (root: string): string => join(root, 'state', NAME);

/** Whether the guest's first write has come: relocating volumes differ in it. */
export type State = Phase | 'relocating, written' | 'standby, alone';
export const STATES: readonly State[] = [
  'plain',
  'standby',
  'standby, alone',
  'relocating',
  'relocating, written',
  'sealed',
  'retired',
];

export async function plainVolume(root = host()): Promise<Volume> {
  const image = sparseFile(SIZE, root);
  writeFileSync(image, patterned(SIZE), { flag: 'r+' });
  return keep(await openPlain({ stateDir: stateOf(root), name: NAME, image }));
}

export async function proxiedVolume(root = host(), options: Partial<ProxiedOptions> = {}): Promise<Volume> {
  return keep(
    await createProxied({
      stateDir: stateOf(root),
      name: NAME,
      image: join(root, 'disk.img'),
      size: SIZE,
      source: { uri: 'nbd://source/vm', description: null },
      standby: true,
      arrival: { volumeId: '6b3f2f0a-7f0e-4a63-8f2e-0a2f6f1d9c11', generation: 4 },
      ...options,
    }),
  );
}

/** A volume in a state, its generation and its source. */
export async function volumeIn(state: State, root = host()): Promise<Volume> {
  switch (state) {
    case 'plain':
      return plainVolume(root);
    case 'sealed':
    case 'retired': {
      const volume = await plainVolume(root);
      await volume.seal(2);
      if (state === 'retired') await volume.retire({ deleteImage: false });
      return volume;
    }
    case 'standby':
      return proxiedVolume(root);
    case 'standby, alone':
      return proxiedVolume(root, { arrival: null });
    case 'relocating':
    case 'relocating, written': {
      const volume = await proxiedVolume(root);
      await volume.takeover(5);
      if (state === 'relocating, written') await volume.settle();
      return volume;
    }
  }
}

export function sourceOf(volume: Volume): HeldSource {
  return new HeldSource(volume.store, patterned(SIZE, 77));
}

/** Copies a host, which is `root` or a copy of it, as a kill of its process leaves it: with its images' own places in the copy. */
export function afterKill(host: string, root = host): string {
  const copy = copyOf(host);
  for (const name of existsSync(stateOf(copy)) ? readdirSync(stateOf(copy)) : []) {
    const path = join(stateOf(copy), name, 'volume.json');
    let text: string;
    try {
      text = readFileSync(path, 'utf8');
    } catch {
      continue; // killed before there was one
    }
    const identity = JSON.parse(text) as Identity;
    identity.image = identity.image.replace(root, copy);
    writeFileSync(path, JSON.stringify(identity));
  }
  return copy;
}

/** The same for a crash of the machine that found everything written back but the live map. */
export function afterReboot(host: string, root = host): string {
  const copy = afterKill(host, root);
  if (existsSync(join(folderOf(copy), 'volume.json'))) asLeftByAnotherBoot(folderOf(copy));
  return copy;
}

export async function reopened(root: string): Promise<Volume> {
  return keep(await reopen({ stateDir: stateOf(root), name: NAME }));
}

/** Names and contents of all files of a host. */
function fingerprint(root: string): string {
  const hash = createHash('sha1');
  for (const entry of readdirSync(root, { recursive: true, encoding: 'utf8' }).sort()) {
    hash.update(`${entry}\n`);
    try {
      hash.update(readFileSync(join(root, entry)));
    } catch {
      hash.update('a folder, or gone by now');
    }
  }
  return hash.digest('hex');
}

/** The host in every state that is seen at a turn of the loop while `step` runs, the last one behind it. */
export async function momentsOf(root: string, step: Promise<unknown>): Promise<string[]> {
  const moments: string[] = [];
  let last = '';
  let over = false;
  const running = step.finally(() => {
    over = true;
  });
  while (!over) {
    const now = fingerprint(root);
    if (now !== last) moments.push(copyOf(root));
    last = now;
    await setImmediate();
  }
  await running;
  moments.push(copyOf(root));
  return moments;
}
