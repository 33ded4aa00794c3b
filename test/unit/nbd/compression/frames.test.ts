/** Frames: every cut of their bytes gives the same, and what breaks a rule is refused before any memory is spent on it. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import fc from 'fast-check';
import { BlockferryError } from '../../../../src/errors.js';
import {
  encodeCompressionRequest,
  FRAME_BYTES_MAX,
  FRAME_HEADER_BYTES,
  type Frame,
  FrameKind,
  FrameReader,
  parseCompressionRequest,
  writeFrameHeader,
} from '../../../../src/nbd/codec/frames.js';

function frame(kind: number, payload: Buffer, contentBytes = payload.length): Buffer {
  const header = Buffer.alloc(FRAME_HEADER_BYTES);
  writeFrameHeader(header, 0, kind, payload.length, contentBytes);
  return Buffer.concat([header, payload]);
}

const isProtocol = (error: unknown): boolean => error instanceof BlockferryError && error.code === 'protocol';
const ignore = (): void => undefined;

test('however their bytes are cut, the same frames come out', () => {
  const plan = fc.array(
    fc.record({ zstd: fc.boolean(), payload: fc.uint8Array({ minLength: 1, maxLength: 90 }) }),
  );
  const cuts = fc.array(fc.integer({ min: 1, max: 50 }), { minLength: 1, maxLength: 20 });
  fc.assert(
    fc.property(plan, cuts, (frames, sizes) => {
      const bytes = Buffer.concat(
        frames.map(({ zstd, payload }) =>
          frame(zstd ? FrameKind.ZSTD : FrameKind.RAW, Buffer.from(payload), payload.length + (zstd ? 7 : 0)),
        ),
      );
      const reader = new FrameReader();
      const got: Frame[] = [];
      const reception = Buffer.alloc(60);
      for (let at = 0, i = 0; at < bytes.length; i++) {
        const length = Math.min(sizes[i % sizes.length]!, bytes.length - at);
        bytes.copy(reception, 5, at, at + length);
        reader.push(reception, 5, 5 + length, (one) => got.push(one));
        reception.fill(0x99); // as a socket that reuses its buffer
        at += length;
      }
      assert.deepEqual(
        got.map(({ kind, payload, contentBytes }) => ({
          zstd: kind === 'zstd',
          payload: [...payload],
          contentBytes,
        })),
        frames.map(({ zstd, payload }) => ({
          zstd,
          payload: [...payload],
          contentBytes: payload.length + (zstd ? 7 : 0),
        })),
      );
      assert.equal(reader.incomplete, false);
    }),
  );
});

const header = (change: (bytes: Buffer) => void): Buffer => {
  const bytes = frame(FrameKind.ZSTD, Buffer.alloc(0), 100);
  bytes.writeUInt32BE(50, 4);
  change(bytes);
  return bytes;
};

for (const [what, bytes] of [
  ['another magic', header((b) => b.writeUInt16BE(0x6267, 0))],
  ['an unknown kind', header((b) => b.writeUInt8(2, 2))],
  ['a reserved byte', header((b) => b.writeUInt8(1, 3))],
  ['no content', header((b) => b.writeUInt32BE(0, 8))],
  ['too much content', header((b) => b.writeUInt32BE(FRAME_BYTES_MAX + 1, 8))],
  ['the most content there can be said', header((b) => b.writeUInt32BE(0xffffffff, 8))],
  ['no payload', header((b) => b.writeUInt32BE(0, 4))],
  ['a payload as long as the content', header((b) => b.writeUInt32BE(100, 4))],
  ['a payload of 4 GiB', header((b) => b.writeUInt32BE(0xffffffff, 4))],
  ['a raw frame of another length', header((b) => b.writeUInt8(FrameKind.RAW, 2))],
] as const)
  test(`a frame with ${what} is refused by its header`, () => {
    assert.throws(() => new FrameReader().push(bytes, 0, bytes.length, ignore), isProtocol);
  });

test('any bytes are frames or refused', () => {
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
      try {
        new FrameReader().push(Buffer.from(bytes), 0, bytes.length, ignore);
      } catch (error) {
        assert.ok(isProtocol(error));
      }
    }),
  );
});

test('the request says the level, and nothing else', () => {
  for (const level of ['auto', -7, -1, 1, 19] as const)
    assert.deepEqual(parseCompressionRequest(encodeCompressionRequest(level)), { ok: true, value: level });
  for (const level of [-8, 20])
    assert.equal(parseCompressionRequest(encodeCompressionRequest(level)).ok, false);
  assert.equal(parseCompressionRequest(Buffer.alloc(3)).ok, false);
  assert.equal(parseCompressionRequest(Buffer.alloc(5)).ok, false);
  assert.deepEqual(parseCompressionRequest(Buffer.from([0, 2, 0, 1])), { ok: true, value: undefined });
});
