// Damaged state: each file of a volume that is under way, cut, emptied, flipped, removed, or another volume's.
import assert from 'node:assert/strict';
import { copyFileSync, mkdtempSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { stringify } from 'yaml';
import { ControlClient } from '../../../src/host/control/client.js';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { assertSame, pattern } from '../clients/disks.js';
import { needs, tool } from '../tools.js';
import { refused, snapshot } from './refusals.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;

type Damage = 'cut' | 'emptied' | 'flipped' | 'removed' | 'replaced';
const DAMAGES: Damage[] = ['cut', 'emptied', 'flipped', 'removed', 'replaced'];
const FILES = ['volume.json', 'presence.map', 'presence.live'] as const;

/** Bytes of a file in which a bit flips: the key of the phase, both copies of the first page of bits, the head of the live map. */
const FLIPPED: Record<(typeof FILES)[number], (bytes: Buffer) => number[]> = {
  'volume.json': (bytes) => [bytes.indexOf('"phase"') + 3],
  'presence.map': () => [16_384 + 100, 16_384 + 4096 + 100],
  'presence.live': () => [2],
};

function damage(state: string, file: (typeof FILES)[number], how: Damage): void {
  const path = join(state, 'disk', file);
  const bytes = readFileSync(path);
  if (how === 'cut') writeFileSync(path, bytes.subarray(0, bytes.length - Math.ceil(bytes.length / 3)));
  else if (how === 'emptied') writeFileSync(path, '');
  else if (how === 'removed') rmSync(path);
  else if (how === 'replaced') copyFileSync(join(state, 'other', file), path);
  else {
    for (const at of FLIPPED[file](bytes)) bytes[at] ^= 4;
    writeFileSync(path, bytes);
  }
}

let base: string;
let source: DaemonProcess | undefined;
let sourceUri: string;
const content = pattern(SIZE, 3);

before(async () => {
  base = mkdtempSync(join(tmpdir(), 'blockferry-maps-'));
  await prepare();
});
after(async () => {
  await source?.stop();
  rmSync(base, { recursive: true, force: true });
});

/**
 * Two volumes of which the guest wrote one megabyte and read another: `killed` as kill -9 left them, `stopped` as an orderly end
 * did. Made once, and copied for every test.
 */
async function prepare(): Promise<void> {
  writeFileSync(join(base, 'source.img'), content);
  const listen = ['--listen', `unix:${join(base, 'source')}`, '--state-dir', join(base, 'sources')];
  source = await DaemonProcess.start(['serve', join(base, 'source.img'), '--read-only', ...listen]);
  sourceUri = source.uris[0];
  content.fill(0xee, MIB, 2 * MIB);
  for (const end of ['killed', 'stopped']) {
    for (const name of ['disk', 'other']) {
      const daemon = await DaemonProcess.start(words(join(base, end), name));
      const commands = ['-c', 'write -P 0xee 1M 1M', '-c', 'flush', '-c', 'read 4M 1M'];
      await tool('qemu-io', '-f', 'raw', ...commands, daemon.uris[0]);
      if (end === 'stopped') assert.equal(await daemon.stop(), 0);
      daemon.kill();
      await daemon.exited;
    }
  }
}

function words(folder: string, name = 'disk'): string[] {
  return [
    ...['proxy', sourceUri, join(folder, `${name}.img`), '--name', name],
    ...['--state-dir', join(folder, 'state'), '--listen', `unix:${join(folder, `${name}.sock`)}`],
    ...['--no-background', '--log-level', 'error'],
  ];
}

/** Calls `scenario` with a copy of the two volumes, at the very path where they came to be. */
async function withCopy(
  end: 'killed' | 'stopped',
  scenario: (folder: string) => Promise<void>,
): Promise<void> {
  const folder = join(base, end);
  const kept = join(base, `${end}.kept`);
  await tool('cp', '-a', folder, kept);
  try {
    await scenario(folder);
  } finally {
    rmSync(folder, { recursive: true });
    renameSync(kept, folder);
  }
}

/** Whether what is left is enough to know which blocks are here. */
function recoverable(end: 'killed' | 'stopped', file: string): boolean {
  if (file === 'volume.json') return false;
  // presence.map is behind presence.live while the machine is up; presence.live is needed where nobody closed the volume.
  return file === 'presence.map' || end === 'stopped';
}

async function assertGoesOn(folder: string): Promise<void> {
  const daemon = await DaemonProcess.start(words(folder));
  try {
    const control = new ControlClient(join(folder, 'state', 'control', 'disk.sock'));
    await control.prefetch('disk', 0, SIZE);
    assert.equal((await control.waitHandoff('disk', 10_000)).done, true);
    control.close();
    assert.equal(await daemon.stop(), 0, daemon.stderr);
  } finally {
    daemon.kill();
  }
  assertSame(readFileSync(join(folder, 'disk.img')), content);
}

describe('a volume under way whose state is damaged', needs('qemu-io'), () => {
  for (const end of ['killed', 'stopped'] as const) {
    for (const file of FILES) {
      test(`${file}, the daemon was ${end}`, () =>
        withCopy(end, async (folder) => {
          for (const how of recoverable(end, file) ? [] : DAMAGES) {
            const kept = readFileSync(join(folder, 'state', 'disk', file));
            damage(join(folder, 'state'), file, how);
            const found = snapshot(folder);
            const why =
              file === 'volume.json' && how === 'replaced' ? /volume|image/ : /damaged|missing|holds data/;
            await refused(words(folder), 1, why);
            await refused(['serve', ...words(folder).slice(2, -3)], 1, /damaged|missing|image/);
            assert.deepEqual(snapshot(folder), found, `${how}: nothing is changed by a refusal`);
            writeFileSync(join(folder, 'state', 'disk', file), kept);
          }
          if (recoverable(end, file)) damage(join(folder, 'state'), file, 'cut');
          await assertGoesOn(folder);
        }));
    }
  }

  test('both maps: nothing is known, whatever the end', () =>
    withCopy('stopped', async (folder) => {
      for (const how of DAMAGES) {
        const kept = ['presence.map', 'presence.live'].map((file) => join(folder, 'state', 'disk', file));
        const bytes = kept.map((path) => readFileSync(path));
        damage(join(folder, 'state'), 'presence.map', how);
        damage(join(folder, 'state'), 'presence.live', how);
        const found = snapshot(folder);
        await refused(words(folder), 1, /presence\.(map|live) .*(damaged|missing|no such file|belongs)/);
        assert.deepEqual(snapshot(folder), found, how);
        for (const [index, path] of kept.entries()) writeFileSync(path, bytes[index]);
      }
      await assertGoesOn(folder);
    }));

  for (const file of FILES) {
    test(`a host goes on with its other volumes and shows the one without a good ${file}`, () =>
      withCopy('killed', async (folder) => {
        damage(join(folder, 'state'), file, 'flipped');
        writeFileSync(join(folder, 'plain.img'), pattern(MIB, 4));
        const volumes = ['disk', 'other', 'plain'].map((name) => ({ name, image: `${name}.img` }));
        const config = join(folder, 'host.yaml');
        writeFileSync(config, stringify({ name: 'host', stateDir: 'state', run: 'run', volumes }));
        const daemon = await DaemonProcess.start(['host', '--config', config, '--log-level', 'error']);
        try {
          const control = ['--control', join(folder, 'state', 'control', 'host.sock')];
          const { stdout } = await runBlockferry(['status', ...control]);
          assert.match(stdout, /^ {2}plain +plain +1 +1 MiB +100\.0 %/m);
          assert.match(stdout, /^ {2}other +(relocating|plain)/m);
          if (recoverable('killed', file)) {
            assert.match(stdout, /^ {2}disk +(relocating|plain)/m);
          } else {
            assert.match(stdout, /^ {2}disk +unavailable .*(damaged|missing)/m);
            const shown = await runBlockferry(['status', 'disk', ...control]);
            assert.equal(shown.code, 1);
            assert.match(shown.stdout, /^disk: not served: .*(damaged|missing)/);
            await refused(['pause', 'disk', ...control], 1, /volume "disk" is not served/);
          }
          const uri = daemon.uris.find((word) => word.includes('plain'))!;
          assert.equal((await tool('nbdinfo', '--size', uri)).trim(), String(MIB));
          assert.equal(await daemon.stop(), 0, daemon.stderr);
        } finally {
          daemon.kill();
        }
      }));
  }
});
