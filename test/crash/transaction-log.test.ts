/**
 * The real commands with --transaction-log, killed with -9 while changes that overlap are in flight: nbd-trplay makes of the disk as it
 * was what the killed daemon left (test/lab/crash/transactions.ts), and the log lacks nothing that was acknowledged.
 *
 * BLOCKFERRY_CRASH_KILLS and BLOCKFERRY_SEED as in kill.test.ts.
 */
import assert from 'node:assert/strict';
import { copyFileSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { ControlClient } from '../../src/host/control/client.js';
import { Command } from '../../src/nbd/constants.js';
import { needs } from '../interop/tools.js';
import { contentOf, SOURCE_TAG } from '../lab/crash/content.js';
import { CommandDaemon } from '../lab/crash/daemon.js';
import { crashFolders } from '../lab/crash/folders.js';
import { Random, SEED } from '../lab/crash/random.js';
import { RecordedGuest } from '../lab/crash/recorded.js';
import { checkAgainstLog, type Evidence } from '../lab/crash/transactions.js';
import { handleOf, recordsOf } from '../support/transaction-log.js';

const KILLS = Math.ceil(Number(process.env.BLOCKFERRY_CRASH_KILLS ?? 220) / 15);
const SIZE = 1 << 20;
const HANDOFF_TIMEOUT_MS = 30_000;

const random = new Random(SEED);
const { folder, inMemory, remove } = crashFolders();
after(remove);

interface Life {
  place: string;
  /** Words before the options every life has. */
  words: string[];
  log: string;
}

/** Starts the command and a guest on it. */
async function begin({ place, words, log }: Life): Promise<{ daemon: CommandDaemon; guest: RecordedGuest }> {
  const daemon = new CommandDaemon([
    ...words,
    ...[
      '--name',
      'disk',
      '--state-dir',
      join(place, 'state'),
      '--listen',
      `unix:${join(place, 'disk.sock')}`,
    ],
    ...['--transaction-log', log, '--transaction-log-data', '--log-level', 'warn'],
  ]);
  try {
    const guest = await RecordedGuest.attach(await daemon.ready(), SIZE, random.fork());
    return { daemon, guest };
  } catch (error) {
    await daemon.kill();
    throw error;
  }
}

/** Kills the daemon after so many answers, and a moment more. */
async function killAtWork(daemon: CommandDaemon, guest: RecordedGuest, answers: number): Promise<void> {
  const enough = new Promise<void>((resolve) => {
    guest.onAnswer = () => {
      if (guest.answers >= answers) resolve();
    };
  });
  const work = guest.work();
  await Promise.race([enough, work]);
  if (random.chance(0.5)) await delay(random.below(4));
  await daemon.kill();
  await work;
  guest.detach();
}

async function checked(evidence: Evidence, kills: number): Promise<number> {
  try {
    return await checkAgainstLog(evidence);
  } catch (error) {
    throw new Error(`after kill ${kills}, BLOCKFERRY_SEED=${SEED}: ${(error as Error).message}`, {
      cause: error,
    });
  }
}

describe('the transaction log of a killed daemon', needs('nbd-trdump', 'nbd-trplay'), () => {
  for (const place of [folder, inMemory]) {
    test(`blockferry serve, ${place === folder ? 'on disk' : 'in memory'}`, async (t) => {
      const image = join(place, 'served.img');
      const start = join(place, 'served.start');
      writeFileSync(image, contentOf(SOURCE_TAG, 0, SIZE));
      let [records, open] = [0, 0];
      for (let kills = 1; kills <= KILLS / 2; kills++) {
        copyFileSync(image, start);
        const life = { place, words: ['serve', image], log: join(place, `served-${kills}.log`) };
        const { daemon, guest } = await begin(life);
        await killAtWork(daemon, guest, random.below(400));
        records += await checked({ start, image, log: life.log, guest }, kills);
        open += guest.changes.filter(({ acknowledged }) => !acknowledged).length;
      }
      t.diagnostic(`${records} records, ${open} changes under way at a kill`);
      assert.ok(open > 0, 'the kills came while changes were under way');
    });
  }

  test('blockferry proxy, whose blocks come from a source meanwhile', async (t) => {
    const start = join(folder, 'source.img');
    writeFileSync(start, contentOf(SOURCE_TAG, 0, SIZE));
    const source = new CommandDaemon([
      ...['serve', start, '--read-only', '--state-dir', join(folder, 'state')],
      ...['--listen', `unix:${join(folder, 'source.sock')}`, '--log-level', 'warn'],
    ]);
    let records = 0;
    try {
      const uri = await source.ready();
      for (let kills = 1; kills <= KILLS / 3; kills++) {
        const place = join(kills % 2 === 0 ? folder : inMemory, `proxy-${kills}`);
        const image = join(place, '..', `proxied-${kills}.img`);
        const log = join(place, '..', `proxied-${kills}.log`);
        const { daemon, guest } = await begin({
          place,
          words: ['proxy', uri, image, '--bandwidth', '1M/s'],
          log,
        });
        await killAtWork(daemon, guest, random.between(1, 300));
        await handOff(place, uri, image);
        records += await checked({ start, image, log, guest }, kills);
      }
    } finally {
      await source.stop();
    }
    t.diagnostic(`${records} records`);
  });
});

/** Lets the rest come, with nobody at work. */
async function handOff(place: string, uri: string, image: string): Promise<void> {
  const control = join(place, 'control.sock');
  const daemon = new CommandDaemon([
    ...['proxy', uri, image, '--name', 'disk', '--state-dir', join(place, 'state'), '--control', control],
    ...['--listen', `unix:${join(place, 'disk.sock')}`, '--log-level', 'warn'],
  ]);
  try {
    await daemon.ready();
    const client = new ControlClient(control);
    assert.equal((await client.waitHandoff('disk', HANDOFF_TIMEOUT_MS)).done, true);
    client.close();
  } finally {
    await daemon.stop();
  }
}

describe('the check sees', needs('nbd-trdump', 'nbd-trplay'), () => {
  const files = ['start', 'image', 'log'] as const;
  const paths = Object.fromEntries(files.map((name) => [name, join(inMemory, `seen.${name}`)])) as Record<
    (typeof files)[number],
    string
  >;
  let guest: RecordedGuest;
  const evidence = (): Evidence => ({ ...paths, guest });

  test('nothing wrong with what a daemon left that was stopped', async () => {
    writeFileSync(paths.image, contentOf(SOURCE_TAG, 0, SIZE));
    copyFileSync(paths.image, paths.start);
    const words = ['serve', paths.image];
    const begun = await begin({ place: inMemory, words, log: paths.log });
    guest = begun.guest;
    guest.onAnswer = () => {
      if (guest.answers >= 300) guest.stop();
    };
    await guest.work();
    await guest.disconnect();
    await begun.daemon.stop();
    assert.ok(guest.changes.every(({ acknowledged }) => acknowledged));
    assert.ok((await checkAgainstLog(evidence())) > 600);
    for (const name of files) copyFileSync(paths[name], `${paths[name]}.kept`);
  });

  /** Spoils one of the files, and puts it right again. */
  async function spoilt(name: (typeof files)[number], spoil: (bytes: Buffer) => Buffer, found: RegExp) {
    const bytes = readFileSync(`${paths[name]}.kept`);
    writeFileSync(paths[name], spoil(bytes));
    try {
      await assert.rejects(checkAgainstLog(evidence()), found);
    } finally {
      copyFileSync(`${paths[name]}.kept`, paths[name]);
    }
  }

  test('a bit of the image that changed', () =>
    spoilt(
      'image',
      (bytes) => {
        bytes[SIZE / 2] ^= 1;
        return bytes;
      },
      /the sector at 524288 is neither/,
    ));

  test('a write that is in the log and not in the image', () =>
    spoilt(
      'image',
      (bytes) => {
        const { offset, length } = guest.changes.findLast(({ kind }) => kind === 'write')!;
        return readFileSync(`${paths.start}.kept`).copy(bytes, offset, offset, offset + length) > 0
          ? bytes
          : assert.fail();
      },
      /is neither what the log makes of it/,
    ));

  test('a log that lacks its end', () =>
    spoilt('log', (bytes) => bytes.subarray(0, recordsOf(bytes).at(-100)!.at), /the log lacks/));

  test('a log that lacks an answer', () =>
    spoilt(
      'log',
      (bytes) => {
        const { at: asked } = recordsOf(bytes).findLast(({ payload }) => payload !== null)!;
        const handle = bytes.toString('hex', asked + 8, asked + 16);
        const { at, end } = recordsOf(bytes).find(
          ({ record }) => record.kind === 'reply' && handleOf(record) === handle,
        )!;
        return Buffer.concat([bytes.subarray(0, at), bytes.subarray(end)]);
      },
      /was acknowledged, and the log lacks it/,
    ));

  test('two changes in the wrong order', () =>
    spoilt('log', swapOverlapping, /is neither what the log makes of it/));

  test('a log with bytes between its records', () =>
    spoilt('log', (bytes) => Buffer.concat([bytes, Buffer.alloc(28)]), /no record at/));

  test('but not a last record that was cut', async () => {
    const bytes = readFileSync(paths.log);
    const { at, end } = recordsOf(bytes).findLast(({ record }) => record.kind === 'request')!;
    truncateSync(paths.log, at + Math.min(20, end - at - 1));
    try {
      await checkAgainstLog(evidence());
    } finally {
      copyFileSync(`${paths.log}.kept`, paths.log);
    }
  });
});

/** A record with the handle of another, so that it is answered at its place. */
function withHandle(record: Buffer, other: Buffer): Buffer {
  const copy = Buffer.from(record);
  other.copy(copy, 8, 8, 16);
  return copy;
}

/** Swaps the last write with an earlier one that it wrote over, and that nothing else follows. */
function swapOverlapping(bytes: Buffer): Buffer {
  const writes = recordsOf(bytes).filter(({ payload }) => payload !== null);
  const changes = recordsOf(bytes).flatMap(({ record, at }) =>
    record.kind === 'request' && record.command !== Command.READ
      ? [{ at, from: record.offset, to: record.offset + record.length }]
      : [],
  );
  const rangeOf = (at: number) => changes.find((change) => change.at === at)!;
  for (const late of writes.toReversed()) {
    const second = rangeOf(late.at);
    for (const early of writes.filter(({ at }) => at < late.at)) {
      const first = rangeOf(early.at);
      const [from, to] = [Math.max(first.from, second.from), Math.min(first.to, second.to)];
      const covered = changes.some((change) => change.at > late.at && change.from < to && change.to > from);
      if (from >= to || covered) continue;
      return Buffer.concat([
        bytes.subarray(0, early.at),
        withHandle(bytes.subarray(late.at, late.end), bytes.subarray(early.at)),
        bytes.subarray(early.end, late.at),
        withHandle(bytes.subarray(early.at, early.end), bytes.subarray(late.at)),
        bytes.subarray(late.end),
      ]);
    }
  }
  return assert.fail('no two writes overlap');
}
