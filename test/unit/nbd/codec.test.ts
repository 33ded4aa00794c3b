import assert from 'node:assert/strict';
import { describe, test } from 'node:test';
import {
  clipUtf8,
  DATA_PAYLOAD_HEAD_BYTES,
  ERROR_PAYLOAD_BYTES_MAX,
  EXTENDED_EXTENT_BYTES,
  EXTENDED_STATUS_PAYLOAD_HEAD_BYTES,
  EXTENT_BYTES,
  encodeChunkHeader,
  encodeDataPayloadHead,
  encodeErrorPayload,
  encodeExtendedChunkHeader,
  encodeExtendedExtent,
  encodeExtendedStatusPayloadHead,
  encodeExtent,
  encodeHolePayload,
  encodeOptionError,
  encodeServer,
  encodeSimpleReply,
  encodeStatusPayloadHead,
  HOLE_PAYLOAD_BYTES,
  OPTION_REPLY_HEADER_BYTES,
  STATUS_PAYLOAD_HEAD_BYTES,
} from '../../../src/nbd/codec/server.js';
import {
  ChunkType,
  Errno,
  EXTENDED_REPLY_HEADER_BYTES,
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

  test('an extended chunk header: magic, flags, type, cookie, offset as it came, length of 64 bits', () => {
    const hex = written((buffer, at) =>
      encodeExtendedChunkHeader(buffer, at, 1, 0x8001, HI, LO, 0xffffffff, 0x80000001, 0xfffffffe),
    );
    assert.equal(hex, `6e8a278c00018001${COOKIE}${'ffffffff80000001'}${'00000000fffffffe'}`);
    assert.equal(hex.length / 2, EXTENDED_REPLY_HEADER_BYTES);
  });

  test('OFFSET_DATA: the offset has 64 bits', () => {
    const hex = written((buffer, at) => encodeDataPayloadHead(buffer, at, 0x12_3456_789a_bcde));
    assert.equal(hex, '00123456789abcde');
    assert.equal(hex.length / 2, DATA_PAYLOAD_HEAD_BYTES);
  });

  test('offsets around 2^32 and the largest safe one', () => {
    for (const offset of [0, 0xffff_ffff, 0x1_0000_0000, 0x1_ffff_ffff, Number.MAX_SAFE_INTEGER]) {
      const buffer = Buffer.alloc(DATA_PAYLOAD_HEAD_BYTES);
      encodeDataPayloadHead(buffer, 0, offset);
      assert.equal(buffer.readBigUInt64BE(0), BigInt(offset));
    }
  });

  test('OFFSET_HOLE: offset and length', () => {
    const hex = written((buffer, at) => encodeHolePayload(buffer, at, 4096, 65_536));
    assert.equal(hex, `${'0000000000001000'}00010000`);
    assert.equal(hex.length / 2, HOLE_PAYLOAD_BYTES);
  });

  test('BLOCK_STATUS: 4 + 8 bytes an extent', () => {
    const hex = written((buffer, at) => {
      const next = encodeStatusPayloadHead(buffer, at, 7);
      return encodeExtent(buffer, encodeExtent(buffer, next, 0xffff_f000, 3), 4096, 0);
    });
    assert.equal(hex, `${'00000007'}fffff00000000003${'0000100000000000'}`);
    assert.equal(hex.length / 2, STATUS_PAYLOAD_HEAD_BYTES + 2 * EXTENT_BYTES);
  });

  test('BLOCK_STATUS_EXT: context and count, 16 bytes an extent', () => {
    const hex = written((buffer, at) => {
      const next = encodeExtendedStatusPayloadHead(buffer, at, 7, 2);
      return encodeExtendedExtent(
        buffer,
        encodeExtendedExtent(buffer, next, 2 ** 43 + 1, 3),
        4096,
        0x80000000,
      );
    });
    const first = `${'0000080000000001'}${'0000000000000003'}`;
    assert.equal(hex, `${'0000000700000002'}${first}${'0000000000001000'}${'0000000080000000'}`);
    assert.equal(hex.length / 2, EXTENDED_STATUS_PAYLOAD_HEAD_BYTES + 2 * EXTENDED_EXTENT_BYTES);
  });

  test('ERROR: error, length of the message, message', () => {
    const text = Buffer.from('béyond');
    const hex = written((buffer, at) => encodeErrorPayload(buffer, at, Errno.EINVAL, 'béyond'));
    assert.equal(hex, `${'00000016'}0007${text.toString('hex')}`);
    assert.equal(
      written((buffer, at) => encodeErrorPayload(buffer, at, Errno.EIO, '')),
      `${'00000005'}0000`,
    );
  });

  test('a long message is cut between characters and fits the room promised', () => {
    const buffer = Buffer.alloc(ERROR_PAYLOAD_BYTES_MAX + 100);
    const message = `x${'é'.repeat(STRING_BYTES_MAX)}`;
    const length = encodeErrorPayload(buffer, 0, Errno.EIO, message);
    assert.ok(length <= ERROR_PAYLOAD_BYTES_MAX);
    assert.equal(buffer.readUInt16BE(4), STRING_BYTES_PREFERRED - 1);
    assert.ok(message.startsWith(buffer.subarray(6, length).toString()));
  });

  test('chunk types are those of the protocol', () => {
    assert.deepEqual(ChunkType, {
      NONE: 0,
      OFFSET_DATA: 1,
      OFFSET_HOLE: 2,
      BLOCK_STATUS: 5,
      BLOCK_STATUS_EXT: 6,
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
