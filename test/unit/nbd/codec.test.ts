import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  clipUtf8,
  DATA_CHUNK_HEADER_BYTES,
  ERROR_CHUNK_BYTES_MAX,
  ERROR_OFFSET_CHUNK_BYTES_MAX,
  EXTENT_BYTES,
  encodeChunkHeader,
  encodeDataChunkHeader,
  encodeErrorChunk,
  encodeErrorOffsetChunk,
  encodeExtent,
  encodeHoleChunk,
  encodeNoneChunk,
  encodeOptionError,
  encodeServer,
  encodeSimpleReply,
  encodeStatusChunkHeader,
  HOLE_CHUNK_BYTES,
  NONE_CHUNK_BYTES,
  OPTION_REPLY_HEADER_BYTES,
  STATUS_CHUNK_HEADER_BYTES,
} from '../../../src/nbd/codec/server.js';
import {
  ChunkFlag,
  ChunkType,
  Errno,
  OptionReply,
  SIMPLE_REPLY_HEADER_BYTES,
  STRING_BYTES_MAX,
  STRING_BYTES_PREFERRED,
} from '../../../src/nbd/constants.js';

const HI = 0xfedcba98;
const LO = 0x76543210;
const COOKIE = 'fedcba9876543210';
const AT = 5;

/** What an encoder writes at offset 5 of a buffer of 0xee, as hexadecimal; nothing around it may change. */
function written(encode: (buffer: Buffer, at: number) => number): string {
  const buffer = Buffer.alloc(2048, 0xee);
  const next = encode(buffer, AT);
  assert.ok(
    buffer.subarray(0, AT).every((byte) => byte === 0xee),
    'nothing before is touched',
  );
  assert.ok(
    buffer.subarray(next).every((byte) => byte === 0xee),
    'nothing behind is touched',
  );
  return buffer.subarray(AT, next).toString('hex');
}

describe('replies of transmission', () => {
  test('a simple reply: magic, error, cookie', () => {
    const hex = written((buffer, at) => encodeSimpleReply(buffer, at, Errno.ENOSPC, HI, LO));
    assert.equal(hex, `674466980000001c${COOKIE}`);
    assert.equal(hex.length / 2, SIMPLE_REPLY_HEADER_BYTES);
  });

  test('a chunk header: magic, flags, type, cookie, length', () => {
    assert.equal(
      written((buffer, at) => encodeChunkHeader(buffer, at, 1, 0x8001, HI, LO, 0xfffffffe)),
      `668e33ef00018001${COOKIE}fffffffe`,
    );
  });

  test('OFFSET_DATA: the length counts the offset, the offset has 64 bits', () => {
    const hex = written((buffer, at) =>
      encodeDataChunkHeader(buffer, at, 0, HI, LO, 0x12_3456_789a_bcde, 512),
    );
    assert.equal(hex, `668e33ef00000001${COOKIE}00000208${'00123456789abcde'}`);
    assert.equal(hex.length / 2, DATA_CHUNK_HEADER_BYTES);
  });

  test('offsets around 2^32 and the largest safe one', () => {
    for (const offset of [0, 0xffff_ffff, 0x1_0000_0000, 0x1_ffff_ffff, Number.MAX_SAFE_INTEGER]) {
      const buffer = Buffer.alloc(DATA_CHUNK_HEADER_BYTES);
      encodeDataChunkHeader(buffer, 0, 0, HI, LO, offset, 1);
      assert.equal(buffer.readBigUInt64BE(20), BigInt(offset));
    }
  });

  test('OFFSET_HOLE: payload of exactly 12 bytes', () => {
    const hex = written((buffer, at) => encodeHoleChunk(buffer, at, ChunkFlag.DONE, HI, LO, 4096, 65_536));
    assert.equal(hex, `668e33ef00010002${COOKIE}0000000c${'0000000000001000'}00010000`);
    assert.equal(hex.length / 2, HOLE_CHUNK_BYTES);
  });

  test('NONE: no payload', () => {
    const hex = written((buffer, at) => encodeNoneChunk(buffer, at, ChunkFlag.DONE, HI, LO));
    assert.equal(hex, `668e33ef00010000${COOKIE}00000000`);
    assert.equal(hex.length / 2, NONE_CHUNK_BYTES);
  });

  test('BLOCK_STATUS: 4 + 8 bytes an extent', () => {
    const hex = written((buffer, at) => {
      let next = encodeStatusChunkHeader(buffer, at, ChunkFlag.DONE, HI, LO, 7, 2);
      assert.equal(next - at, STATUS_CHUNK_HEADER_BYTES);
      next = encodeExtent(buffer, next, 0xffff_f000, 3);
      return encodeExtent(buffer, next, 4096, 0);
    });
    assert.equal(hex, `668e33ef00010005${COOKIE}00000014${'00000007'}fffff00000000003${'0000100000000000'}`);
    assert.equal(hex.length / 2, STATUS_CHUNK_HEADER_BYTES + 2 * EXTENT_BYTES);
  });

  test('ERROR: error, length of the message, message', () => {
    const text = Buffer.from('béyond');
    const hex = written((buffer, at) => encodeErrorChunk(buffer, at, 1, HI, LO, Errno.EINVAL, 'béyond'));
    assert.equal(hex, `668e33ef00018001${COOKIE}0000000d${'00000016'}0007${text.toString('hex')}`);
    assert.equal(
      written((buffer, at) => encodeErrorChunk(buffer, at, 1, HI, LO, Errno.EIO, '')),
      `668e33ef00018001${COOKIE}00000006${'00000005'}0000`,
    );
  });

  test('ERROR_OFFSET: the offset comes behind the message', () => {
    assert.equal(
      written((buffer, at) => encodeErrorOffsetChunk(buffer, at, 1, HI, LO, Errno.EIO, 'ab', 512)),
      `668e33ef00018002${COOKIE}00000010${'00000005'}00026162${'0000000000000200'}`,
    );
  });

  test('a long message is cut between characters and fits the room promised', () => {
    const buffer = Buffer.alloc(ERROR_OFFSET_CHUNK_BYTES_MAX + 100);
    const message = `x${'é'.repeat(STRING_BYTES_MAX)}`;
    const length = encodeErrorChunk(buffer, 0, 1, HI, LO, Errno.EIO, message);
    assert.ok(length <= ERROR_CHUNK_BYTES_MAX);
    assert.equal(buffer.readUInt16BE(24), STRING_BYTES_PREFERRED - 1);
    assert.ok(message.startsWith(buffer.subarray(26, length).toString()));
    assert.ok(
      encodeErrorOffsetChunk(buffer, 0, 1, HI, LO, Errno.EIO, message, 0) <= ERROR_OFFSET_CHUNK_BYTES_MAX,
    );
  });

  test('chunk types are those of the protocol', () => {
    assert.deepEqual(ChunkType, {
      NONE: 0,
      OFFSET_DATA: 1,
      OFFSET_HOLE: 2,
      BLOCK_STATUS: 5,
      ERROR: 32_769,
      ERROR_OFFSET: 32_770,
    });
  });
});

describe('strings of option replies', () => {
  test('text is cut between characters', () => {
    for (const [text, bytesMax, expected] of [
      ['abc', 3, 'abc'],
      ['abc', 2, 'ab'],
      ['aé', 2, 'a'],
      ['a€b', 3, 'a'],
      ['a€b', 4, 'a€'],
      ['😀', 3, ''],
      ['', 0, ''],
    ] as const)
      assert.equal(clipUtf8(text, bytesMax).toString(), expected);
  });

  test('an error message has 256 bytes at most', () => {
    const reply = encodeOptionError(6, OptionReply.ERR_UNKNOWN, 'é'.repeat(1000));
    assert.equal(reply.length, OPTION_REPLY_HEADER_BYTES + STRING_BYTES_PREFERRED);
    assert.equal(reply.readUInt32BE(16), STRING_BYTES_PREFERRED);
  });

  test('a description has 4096 bytes at most', () => {
    const reply = encodeServer('disk', 'x'.repeat(STRING_BYTES_MAX + 1));
    assert.equal(reply.readUInt32BE(16), 4 + 4 + STRING_BYTES_MAX);
    assert.equal(reply.length, OPTION_REPLY_HEADER_BYTES + 4 + 4 + STRING_BYTES_MAX);
  });
});
