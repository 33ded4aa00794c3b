// SIGTERM while clients are busy: the daemon ends with code 0, and nothing it acknowledged is lost.
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { DaemonProcess } from '../../lab/hosts.js';
import { assertSame, pattern } from '../clients/disks.js';
import { eventually, inFolder } from './refusals.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;
const BLOCK = 4096;
const CLIENTS = 4;
const DEPTH = 16;
const WRITES_BEFORE_STOP = 3000;

/** Writes block after block of its own share, again and again with another number, until the connection ends. */
class Writer {
  /** By block: the number acknowledged last, and the one under way. */
  readonly acknowledged = new Map<number, number>();
  readonly underWay = new Map<number, number>();
  writes = 0;
  failures: string[] = [];

  constructor(
    private readonly client: NbdClient,
    private readonly share: number,
  ) {}

  async run(): Promise<void> {
    await Promise.all(Array.from({ length: DEPTH }, (_, lane) => this.lane(lane)));
  }

  private async lane(lane: number): Promise<void> {
    const buffer = Buffer.alloc(BLOCK);
    const blocks = SIZE / BLOCK / CLIENTS / DEPTH;
    for (let count = 1; ; count += 1) {
      const block = this.share + CLIENTS * (lane + DEPTH * (count % blocks));
      buffer.fill(stamp(block, count));
      this.underWay.set(block, count);
      try {
        await this.client.write(block * BLOCK, buffer, 0, BLOCK, { fua: count % 5 === 0 });
      } catch (error) {
        this.failures.push((error as Error).message);
        return;
      }
      this.underWay.delete(block);
      this.acknowledged.set(block, count);
      this.writes += 1;
    }
  }
}

function stamp(block: number, count: number): Buffer {
  const bytes = Buffer.alloc(16);
  bytes.writeUInt32LE(block, 0);
  bytes.writeUInt32LE(count, 8);
  return bytes;
}

/** Blocks hold what was acknowledged last, or what was under way then; the others what they held before. */
function assertNothingLost(image: Buffer, before: Buffer, writers: Writer[]): void {
  const wanted = Buffer.from(before);
  for (const { acknowledged, underWay } of writers) {
    for (const block of new Set([...acknowledged.keys(), ...underWay.keys()])) {
      const is = image.subarray(block * BLOCK, (block + 1) * BLOCK);
      const last = acknowledged.get(block);
      const old =
        last === undefined
          ? before.subarray(block * BLOCK, (block + 1) * BLOCK)
          : Buffer.alloc(BLOCK, stamp(block, last));
      const late = underWay.get(block);
      const good =
        is.equals(old) || (late !== undefined && is.equals(Buffer.alloc(BLOCK, stamp(block, late))));
      assert.ok(
        good,
        `block ${block}: acknowledged ${last}, under way ${late}, has ${is.readUInt32LE(0)} ${is.readUInt32LE(8)}`,
      );
      is.copy(wanted, block * BLOCK);
    }
  }
  assertSame(image, wanted);
}

async function busy(daemon: DaemonProcess, signal: NodeJS.Signals): Promise<Writer[]> {
  const clients = await Promise.all(
    Array.from({ length: CLIENTS }, (_, index) => NbdClient.connect(daemon.uris[index % daemon.uris.length])),
  );
  const writers = clients.map((client, share) => new Writer(client, share));
  const done = Promise.all(writers.map((writer) => writer.run()));
  const written = (): boolean => writers.reduce((sum, { writes }) => sum + writes, 0) >= WRITES_BEFORE_STOP;
  await eventually(written, 'the clients to be busy');
  daemon.child.kill(signal);
  assert.equal(await daemon.exited, 0, daemon.stderr);
  await done;
  for (const writer of writers) assert.ok(writer.acknowledged.size > 0, writer.failures.join());
  return writers;
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  describe(`${signal} while clients write`, () => {
    test('serve', () =>
      inFolder(async (folder) => {
        const image = join(folder, 'disk.img');
        const content = pattern(SIZE, 6);
        writeFileSync(image, content);
        const daemon = await DaemonProcess.start([
          ...['serve', image, '--state-dir', join(folder, 'state'), '--log-level', 'error'],
          ...['--listen', `unix:${join(folder, 's')}`, '--listen', '127.0.0.1:0'],
        ]);
        assertNothingLost(readFileSync(image), content, []);
        const writers = await busy(daemon, signal);
        assertNothingLost(readFileSync(image), content, writers);
      }));

    test('proxy, and it goes on after a restart', () =>
      inFolder(async (folder) => {
        const content = pattern(SIZE, 6);
        writeFileSync(join(folder, 'source.img'), content);
        const log = ['--log-level', 'error'];
        const source = await DaemonProcess.start([
          ...['serve', join(folder, 'source.img'), '--read-only', '--state-dir', join(folder, 's')],
          ...['--listen', `unix:${join(folder, 'src')}`, ...log],
        ]);
        const image = join(folder, 'disk.img');
        const words = [
          ...['proxy', source.uris[0], image, '--name', 'disk', '--state-dir', join(folder, 'state')],
          ...['--listen', `unix:${join(folder, 'dst')}`, '--listen', '127.0.0.1:0', ...log],
        ];
        try {
          const writers = await busy(await DaemonProcess.start([...words, '--bandwidth', '2M/s']), signal);
          const again = await DaemonProcess.start(words);
          const client = await NbdClient.connect(again.uris[0]);
          const now = Buffer.alloc(SIZE);
          await client.read(0, SIZE, now);
          await client.close();
          assertNothingLost(now, content, writers);
          assert.equal(await again.stop(), 0, again.stderr);
        } finally {
          assert.equal(await source.stop(), 0, source.stderr);
        }
      }));
  });
}
