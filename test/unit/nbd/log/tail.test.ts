import assert from 'node:assert/strict';
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, test } from 'node:test';
import {
  decodeRecord,
  encodeDataSwitch,
  encodeReplyRecord,
  encodeRequestRecord,
  recordBytes,
} from '../../../../src/nbd/codec/transaction-log.js';
import { Command, STRUCTURED_REPLY_MAGIC } from '../../../../src/nbd/constants.js';
import { wholeRecordsEnd } from '../../../../src/nbd/log/tail.js';

const folder = mkdtempSync(join(tmpdir(), 'blockferry-log-'));
after(() => rmSync(folder, { recursive: true }));

function endOf(bytes: Buffer): number | null {
  const path = join(folder, 'log');
  writeFileSync(path, bytes);
  const fd = openSync(path, 'r');
  try {
    return wholeRecordsEnd(fd, bytes.length);
  } finally {
    closeSync(fd);
  }
}

function request(command: number, offset: number, length: number, payload = 0): Buffer {
  const bytes = Buffer.alloc(28 + payload, 0x5a);
  encodeRequestRecord(bytes, 0, 1, command, 7, 8, offset, length);
  return bytes;
}

const reply = Buffer.alloc(16);
encodeReplyRecord(reply, 0, 7, 8, 5);
const on = encodeDataSwitch(true);
const off = encodeDataSwitch(false);

test('the records, byte by byte as nbd-server has them', () => {
  assert.equal(on.toString('hex'), '256095140000000100000000000000004a93ba39a54f31b600000001');
  const whole = request(Command.TRIM, 2 ** 40 + 3, 0xffff_ffff);
  assert.equal(whole.toString('hex'), '2560951300010004000000070000000800000100000000' + '03ffffffff');
  assert.equal(reply.toString('hex'), '67446698000000050000000700000008');
});

test('decoded they are what was encoded', () => {
  const written = decodeRecord(request(Command.WRITE, 2 ** 52 + 512, 4096), 0);
  assert.deepEqual(written, {
    ...{ kind: 'request', flags: 1, command: Command.WRITE, hi: 7, lo: 8 },
    ...{ offset: 2 ** 52 + 512, length: 4096 },
  });
  assert.deepEqual(decodeRecord(reply, 0), { kind: 'reply', hi: 7, lo: 8, errno: 5 });
  assert.deepEqual(decodeRecord(off, 0), { kind: 'switch', withData: false });
  assert.ok(typeof written === 'object');
  assert.deepEqual([recordBytes(written, true), recordBytes(written, false)], [28 + 4096, 28]);
  for (let length = 0; length < 28; length++) assert.equal(decodeRecord(on.subarray(0, length), 0), 'cut');
});

test('a log that ends with a whole record ends there', () => {
  const chunk = Buffer.alloc(20);
  chunk.writeUInt32BE(STRUCTURED_REPLY_MAGIC);
  for (const log of [
    [],
    [on],
    [request(Command.WRITE, 0, 512)], // headers only, as there is no switch
    [on, request(Command.WRITE, 0, 512, 512), reply, request(Command.READ, 0, 512), reply],
    [on, request(Command.WRITE, 0, 3, 3), off, request(Command.WRITE, 0, 3), chunk],
  ]) {
    const bytes = Buffer.concat(log);
    assert.equal(endOf(bytes), bytes.length);
  }
});

test('what is left of a last record does not count, wherever it was cut', () => {
  const before = Buffer.concat([on, request(Command.READ, 0, 512)]);
  for (const last of [request(Command.WRITE, 0, 100, 100), reply]) {
    for (let left = 0; left < last.length; left++) {
      const bytes = Buffer.concat([before, last.subarray(0, left)]);
      assert.equal(endOf(bytes), before.length, `${left} of ${last.length} bytes`);
    }
  }
});

test('payloads and records of any length, across the window that is read', () => {
  const MIB = 1 << 20;
  for (const size of [MIB - 60, MIB - 57, MIB - 56, MIB - 55, MIB - 30, MIB, MIB + 1, 3 * MIB]) {
    const bytes = Buffer.concat([on, request(Command.WRITE, 0, size, size), reply, reply]);
    assert.equal(endOf(bytes), bytes.length);
    assert.equal(endOf(bytes.subarray(0, -1)), bytes.length - 16);
    assert.equal(endOf(bytes.subarray(0, -33)), 28, `the payload of ${size} bytes lacks one`);
  }
});

test('zeros behind whole records, as a crash of the machine may leave them, do not count', () => {
  const before = Buffer.concat([on, reply]);
  for (const zeros of [1, 4, 27, 28, 4096, 3 << 20])
    assert.equal(endOf(Buffer.concat([before, Buffer.alloc(zeros)])), before.length, `${zeros} bytes`);
  assert.equal(endOf(Buffer.concat([before, Buffer.alloc(4096), reply])), null);
});

test('a file that is no log, or goes on as none, is seen', () => {
  for (const bytes of [
    Buffer.from('#!/bin/sh\n'),
    Buffer.alloc(4096),
    Buffer.concat([on, reply, Buffer.from('more')]),
    Buffer.concat([request(Command.WRITE, 0, 512), Buffer.alloc(512, 1)]),
    encodeDataSwitch(true).fill(9, 16, 24),
  ])
    assert.equal(endOf(bytes), null);
});
