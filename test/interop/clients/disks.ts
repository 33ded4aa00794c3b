/**
 * What the clients work on: one small disk behind the real command, in the states a client may meet it in. All daemons listen on
 * a unix socket and on TCP.
 */

import assert from 'node:assert/strict';
import { copyFileSync, ftruncateSync, mkdtempSync, openSync, readFileSync, rmSync, writeSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { ServedVolume } from '../../../src/host/control/api.js';
import { ControlClient } from '../../../src/host/control/client.js';
import { DaemonProcess } from '../../lab/hosts.js';

const MIB = 1 << 20;
const HANDOFF_TIMEOUT_MS = 30_000;

/** Not a multiple of a block: the last one is short. */
export const SIZE = 20 * MIB + 1536;
/** Where the disk is a hole. */
export const HOLE = { from: 6 * MIB, to: 13 * MIB };

export type State = 'serve' | 'on demand' | 'relocating' | 'handed off';
export const STATES: readonly State[] = ['serve', 'relocating', 'handed off'];
export const TRANSPORTS = ['unix', 'TCP'] as const;

/** How a proxy is started so that it stays in a state for as long as a test needs. */
const SPEED: Record<Exclude<State, 'serve'>, string[]> = {
  'on demand': ['--no-background'],
  relocating: ['--bandwidth', '512K/s'],
  'handed off': [],
};

/** Different in every 4 bytes, depending on `seed`. */
export function pattern(length: number, seed: number): Buffer {
  const words = new Uint32Array(Math.ceil(length / 4));
  for (let index = 0; index < words.length; index += 1) words[index] = (index + 1) * 0x9e3779b1 + seed;
  return Buffer.from(words.buffer, 0, length);
}

/** Writes the disk that the tests start with: data, a hole, data, zeros that are written, data. */
export function makeImage(path: string): Buffer {
  const content = pattern(SIZE, 7);
  content.fill(0, HOLE.from, HOLE.to);
  content.fill(0, 15 * MIB, 16 * MIB);
  const file = openSync(path, 'w');
  writeSync(file, content, 0, HOLE.from, 0);
  writeSync(file, content, HOLE.to, SIZE - HOLE.to, HOLE.to);
  ftruncateSync(file, SIZE);
  return content;
}

export class Disk {
  private constructor(
    readonly folder: string,
    readonly daemon: DaemonProcess,
    private readonly source: DaemonProcess | null,
    readonly name: string,
    readonly image: string,
    /** What the disk held when the test began. */
    readonly content: Buffer,
    readonly control: ControlClient,
  ) {}

  /** A disk in that state; `words` go to its daemon. */
  static async start(state: State, words: readonly string[] = []): Promise<Disk> {
    const folder = mkdtempSync(join(tmpdir(), 'blockferry-disk-'));
    const started: DaemonProcess[] = [];
    try {
      return await Disk.#start(folder, state, words, started);
    } catch (error) {
      for (const daemon of started) daemon.kill();
      rmSync(folder, { recursive: true, force: true });
      throw error;
    }
  }

  static async #start(
    folder: string,
    state: State,
    more: readonly string[],
    started: DaemonProcess[],
  ): Promise<Disk> {
    const original = join(folder, 'original.img');
    const content = makeImage(original);
    const control = new ControlClient(join(folder, 'state', 'control', 'disk.sock'));
    const start = async (name: string, ...words: string[]): Promise<DaemonProcess> => {
      const at = ['--name', name, '--listen', `unix:${join(folder, `${name}.sock`)}`];
      const daemon = await DaemonProcess.start([
        ...[words[0], ...at, ...words.slice(1), '--state-dir', join(folder, 'state'), '--log-level', 'warn'],
      ]);
      started.push(daemon);
      return daemon;
    };
    const tcp = ['--listen', '127.0.0.1:0'];
    if (state === 'serve') {
      const daemon = await start('disk', 'serve', original, ...more, ...tcp);
      return new Disk(folder, daemon, null, 'disk', original, content, control);
    }
    copyFileSync(original, join(folder, 'kept.img'));
    const source = await start('source', 'serve', original);
    const image = join(folder, 'disk.img');
    const daemon = await start('disk', 'proxy', source.uris[0], image, ...SPEED[state], ...more, ...tcp);
    const disk = new Disk(folder, daemon, source, 'disk', image, content, control);
    if (state === 'handed off') await disk.handedOff();
    return disk;
  }

  /** NBD URI over a unix socket or TCP. */
  uri(transport: (typeof TRANSPORTS)[number]): string {
    return this.daemon.uris[TRANSPORTS.indexOf(transport)];
  }

  get unix(): string {
    return this.uri('unix');
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  async status(): Promise<ServedVolume> {
    const view = await this.control.volume(this.name);
    assert.ok(view.phase !== 'unavailable');
    return view;
  }

  /** Lets a relocation finish. */
  async handedOff(): Promise<void> {
    const status = await this.status();
    if (status.phase === 'plain') return;
    await this.control.setRate(this.name, null);
    // Without a background copy it is the prefetch that brings the last block.
    if (status.background.state === 'off') await this.control.prefetch(this.name, 0, status.size);
    const { done } = await this.control.waitHandoff(this.name, HANDOFF_TIMEOUT_MS);
    assert.ok(done, `no hand-off after ${HANDOFF_TIMEOUT_MS} ms: ${JSON.stringify(await this.status())}`);
  }

  /** Ends the daemons in order, lets go of the folder, and proves that the source was never written to. */
  async stop(): Promise<void> {
    try {
      this.control.close();
      assert.equal(await this.daemon.stop(), 0, this.daemon.stderr);
      if (this.source !== null) {
        assert.equal(await this.source.stop(), 0, this.source.stderr);
        assert.ok(readFileSync(this.path('original.img')).equals(readFileSync(this.path('kept.img'))));
      }
    } finally {
      this.daemon.kill();
      this.source?.kill();
      rmSync(this.folder, { recursive: true, force: true });
    }
  }
}

/** Fails at the first byte that differs. */
export function assertSame(actual: Buffer, wanted: Buffer): void {
  assert.equal(actual.length, wanted.length);
  if (actual.equals(wanted)) return;
  let at = 0;
  while (actual[at] === wanted[at]) at += 1;
  assert.fail(
    `differs at ${at}: ${actual.subarray(at, at + 16).toString('hex')}, not ${wanted.subarray(at, at + 16).toString('hex')}`,
  );
}

/** Calls `scenario` with a disk in that state and stops it. */
export async function withDisk(
  state: State,
  scenario: (disk: Disk) => Promise<void>,
  words: readonly string[] = [],
): Promise<void> {
  const disk = await Disk.start(state, words);
  try {
    await scenario(disk);
  } catch (error) {
    await disk.stop().catch(() => undefined);
    throw error;
  }
  await disk.stop();
}
