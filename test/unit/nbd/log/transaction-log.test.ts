import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { appendFileSync, mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, describe, test } from 'node:test';
import pino from 'pino';
import type { BlockferryError } from '../../../../src/errors.js';
import { Command } from '../../../../src/nbd/constants.js';
import { BUFFERED_BYTES_MAX, TransactionLog } from '../../../../src/nbd/log/transaction-log.js';
import { until } from '../../../fakes/raw-client.js';
import {
  fakeWritev,
  realWritev,
  recordsOf,
  restoreWritev,
  shownLog,
} from '../../../support/transaction-log.js';

const folder = mkdtempSync(join(tmpdir(), 'blockferry-log-'));
after(() => rmSync(folder, { recursive: true }));

const lines: { level: number; msg: string }[] = [];
const logger = pino({ level: 'info' }, { write: (line: string) => void lines.push(JSON.parse(line)) });
let count = 0;
const open: TransactionLog[] = [];

function newPath(): string {
  return join(folder, `log-${count++}`);
}

function opened(path = newPath(), data = true): TransactionLog {
  const log = TransactionLog.open({ path, data }, logger);
  open.push(log);
  return log;
}

afterEach(async () => {
  restoreWritev();
  for (const log of open.splice(0)) await log.close();
  lines.length = 0;
});

function write(log: TransactionLog, number: number, payload: Buffer): void {
  log.request(0, Command.WRITE, 1, number, number * 512, payload.length);
  log.payload(payload, 0, payload.length);
}

/** Resolves when the log has gone on. */
function wentOn(log: TransactionLog): Promise<void> {
  return new Promise((logWentOn) => log.wait({ logWentOn }));
}

function isRefusal(text: RegExp): (error: BlockferryError) => boolean {
  return (error) => {
    assert.equal(error.code, 'transaction-log', error.message);
    assert.match(error.message, text);
    assert.doesNotMatch(error.message, /\n/);
    return true;
  };
}

describe('the file', () => {
  test('is made for its owner only, begins with the switch, and goes on where it was', async () => {
    const path = newPath();
    const log = opened(path);
    assert.equal(statSync(path).mode & 0o777, 0o600);
    log.reply(1, 1, 0);
    await log.close();
    assert.deepEqual(shownLog(path), ['data on', '< 1.1 0']);
    const again = opened(path, false);
    again.reply(1, 1, 5);
    await again.close();
    assert.deepEqual(shownLog(path), ['data on', '< 1.1 0', 'data off', '< 1.1 5']);
  });

  test('what a killed daemon left of a record is cut off, and said', async () => {
    const path = newPath();
    await opened(path).close();
    appendFileSync(path, Buffer.from('2560951300', 'hex'));
    await opened(path).close();
    assert.deepEqual(shownLog(path), ['data on', 'data on']);
    assert.match(lines[0]!.msg, /ended within a record/);
  });

  test('what it must not be: another log in use, another file, no file at all', () => {
    const path = newPath();
    opened(path);
    assert.throws(() => opened(path), isRefusal(/is in use/));
    const other = newPath();
    writeFileSync(other, 'a letter to somebody');
    assert.throws(() => opened(other), isRefusal(/holds something else/));
    assert.equal(readFileSync(other, 'utf8'), 'a letter to somebody');
    const pipe = newPath();
    execFileSync('mkfifo', [pipe]);
    for (const no of [pipe, '/dev/full']) assert.throws(() => opened(no), isRefusal(/no regular file/));
    assert.throws(() => opened(folder), isRefusal(/cannot open .*EISDIR/));
    assert.throws(() => opened(join(folder, 'none', 'log')), isRefusal(/cannot open .*ENOENT/));
  });
});

describe('records', () => {
  test('lie in the file in their order, whatever their sizes', async () => {
    const log = opened();
    const sizes = [0, 1, 512, 100_000, 262_144, 262_116, 262_115, 1 << 20, 3, 5 << 20];
    const payloads = sizes.map((size, index) => Buffer.alloc(size, index + 1));
    for (const [index, payload] of payloads.entries()) {
      write(log, index, payload);
      if (index === 4) await wentOn(log);
      log.reply(1, index, 0);
    }
    await log.close();
    const [, ...records] = recordsOf(readFileSync(log.path));
    assert.equal(records.length, 2 * sizes.length);
    for (const [index, payload] of payloads.entries()) {
      assert.ok(records[2 * index]!.payload!.equals(payload), `payload ${index}`);
      assert.equal(records[2 * index + 1]!.record.kind, 'reply');
    }
  });

  test('that are taken back never were', async () => {
    const log = opened();
    log.reply(1, 1, 0);
    for (const size of [10, 300_000, 2 << 20]) {
      const { end } = log;
      write(log, 2, Buffer.alloc(size, 2));
      log.takeBack(end);
      assert.equal(log.end, end);
    }
    log.reply(1, 3, 0);
    await log.close();
    assert.deepEqual(shownLog(log.path), ['data on', '< 1.1 0', '< 1.3 0']);
  });

  test('come to the file without anybody waiting for it', async () => {
    const log = opened();
    log.reply(1, 1, 0);
    await until(() => log.isWritten(log.end));
    assert.deepEqual(shownLog(log.path), ['data on', '< 1.1 0']);
  });

  test('are not written before they are, and those that come meanwhile follow', async () => {
    const held: (() => void)[] = [];
    fakeWritev((...args) => held.push(() => realWritev(...args)));
    const log = opened();
    log.reply(1, 1, 0);
    const first = log.end;
    const progress = wentOn(log);
    log.reply(1, 2, 0);
    assert.equal(held.length, 1);
    assert.equal(log.isWritten(first), false);
    held.shift()!();
    await progress;
    assert.deepEqual([log.isWritten(first), log.isWritten(log.end)], [true, false]);
    assert.equal(held.length, 1, 'the next write is on its way');
    held.shift()!();
    await log.close();
    assert.deepEqual(shownLog(log.path), ['data on', '< 1.1 0', '< 1.2 0']);
  });

  test('that the kernel takes in parts are completed', async () => {
    fakeWritev((fd, buffers, done) => {
      const some = Buffer.concat(buffers).subarray(0, 7);
      realWritev(fd, [some], done);
    });
    const log = opened();
    write(log, 1, Buffer.from('twenty bytes of data'));
    log.reply(1, 1, 0);
    await log.close();
    assert.equal(log.failure, null);
    const [, written, reply] = recordsOf(readFileSync(log.path));
    assert.equal(written!.payload!.toString(), 'twenty bytes of data');
    assert.equal(reply!.record.kind, 'reply');
  });

  test('that wait for the disk make the log full', async () => {
    const held: (() => void)[] = [];
    fakeWritev((...args) => held.push(() => realWritev(...args)));
    const log = opened();
    const payload = Buffer.alloc(BUFFERED_BYTES_MAX / 2, 1);
    write(log, 1, payload);
    assert.equal(log.full, false);
    write(log, 2, payload);
    assert.equal(log.full, true);
    const progress = wentOn(log);
    held.shift()!();
    await progress;
    assert.equal(log.full, false);
    await log.close();
    assert.equal(statSync(log.path).size, 28 + 2 * (28 + payload.length));
  });
});

describe('a log that cannot be written', () => {
  test('ends at its last whole record, says so once, and holds nobody up', async () => {
    const log = opened();
    log.reply(1, 1, 0);
    await wentOn(log);
    // A part goes through, as on a disk that becomes full.
    fakeWritev((fd, buffers, done) => {
      const some = Buffer.concat(buffers).subarray(0, 20);
      realWritev(fd, [some], () => {
        const full = Object.assign(new Error('ENOSPC: no space left on device, writev'), { code: 'ENOSPC' });
        done(full, 0);
      });
    });
    write(log, 2, Buffer.alloc(BUFFERED_BYTES_MAX + 1));
    assert.equal(log.full, true);
    await wentOn(log);
    assert.equal(log.failure?.code, 'transaction-log');
    assert.match(log.failure!.message, /has ended, .* without it: ENOSPC.*start the daemon anew/);
    assert.deepEqual([log.full, log.isWritten(log.end)], [false, true]);
    const { end } = log;
    write(log, 3, Buffer.alloc(100));
    assert.equal(log.end, end);
    await log.close();
    assert.deepEqual(shownLog(log.path), ['data on', '< 1.1 0']);
    assert.deepEqual(
      lines.map(({ level, msg }) => [level, msg]),
      [[50, log.failure!.message]],
    );
  });

  test('closed, it records nothing and holds nobody up', async () => {
    const log = opened();
    await log.close();
    await log.close();
    log.reply(1, 1, 0);
    assert.ok(log.isWritten(log.end + 1));
    assert.equal(log.failure, null);
    assert.deepEqual(shownLog(log.path), ['data on']);
  });
});
