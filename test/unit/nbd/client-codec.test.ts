import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import {
  decodeExportBasics,
  decodeGreeting,
  decodeInfo,
  decodeListedExport,
  decodeMetaContext,
  decodeOptionReplyHeader,
  displayable,
  encodeClientFlags,
  encodeExportName,
  encodeGo,
  encodeMetaContext,
  encodeOption,
  encodeRequest,
} from '../../../src/nbd/codec/client.js';
import { Command, CommandFlag, Info, Option, OptionReply } from '../../../src/nbd/constants.js';
import { greeting, infoBlockSize, infoExport, optionReply, u16, u32, u64 } from '../../fakes/fake-server.js';

const protocol = (why: RegExp) => (error: unknown) =>
  error instanceof BlockferryError && error.code === 'protocol' && why.test(error.message);

describe('client codec: what is sent', () => {
  it('client flags', () => {
    assert.equal(encodeClientFlags(3).toString('hex'), '00000003');
  });

  it('an option without data', () => {
    assert.equal(encodeOption(Option.LIST).toString('hex'), '49484156454f50540000000300000000');
  });

  it('EXPORT_NAME', () => {
    assert.equal(encodeExportName('ab').toString('hex'), '49484156454f505400000001000000026162');
  });

  it('GO with three wanted items', () => {
    const bytes = encodeGo(Option.GO, 'é', [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE]);
    assert.equal(
      bytes.toString('hex'),
      `49484156454f5054${'00000007'}${'0000000e'}${'00000002'}c3a9${'0003'}${'000100020003'}`,
    );
  });

  it('SET_META_CONTEXT with two queries', () => {
    const bytes = encodeMetaContext(Option.SET_META_CONTEXT, 'x', ['a:b', 'c:']);
    assert.equal(
      bytes.toString('hex'),
      `49484156454f5054${'0000000a'}${'00000016'}${'00000001'}78${'00000002'}${'00000003'}613a62${'00000002'}633a`,
    );
  });

  it('a request, in place, with 64-bit offsets', () => {
    const bytes = Buffer.alloc(32, 0xee);
    encodeRequest(
      bytes,
      2,
      CommandFlag.FUA,
      Command.WRITE,
      0xfffffffe,
      7,
      Number.MAX_SAFE_INTEGER,
      0xffffffff,
    );
    assert.equal(
      bytes.toString('hex'),
      `eeee${'25609513'}${'0001'}${'0001'}${'fffffffe00000007'}${'001fffffffffffff'}${'ffffffff'}eeee`,
    );
  });
});

describe('client codec: what is received', () => {
  it('greetings', () => {
    assert.deepEqual(decodeGreeting(greeting(3)), { fixedNewstyle: true, noZeroes: true });
    assert.deepEqual(decodeGreeting(greeting(0)), { fixedNewstyle: false, noZeroes: false });
    assert.throws(() => decodeGreeting(Buffer.alloc(18)), protocol(/not an NBD server/));
    const oldstyle = Buffer.concat([greeting().subarray(0, 8), u64(0x00420281861253n), u16(0)]);
    assert.throws(() => decodeGreeting(oldstyle), protocol(/oldstyle/));
    assert.throws(
      () => decodeGreeting(Buffer.concat([greeting().subarray(0, 8), u64(1), u16(0)])),
      protocol(/magic/),
    );
  });

  it('option reply headers, also incomplete ones', () => {
    const bytes = optionReply(Option.GO, OptionReply.ACK);
    assert.deepEqual(decodeOptionReplyHeader(bytes, 0), {
      option: Option.GO,
      type: OptionReply.ACK,
      length: 0,
    });
    assert.equal(decodeOptionReplyHeader(bytes, 1), null);
    assert.throws(() => decodeOptionReplyHeader(Buffer.alloc(20), 0), protocol(/magic/));
    bytes.writeUInt32BE(65537, 16);
    assert.throws(() => decodeOptionReplyHeader(bytes, 0), protocol(/too long/));
  });

  it('size and flags', () => {
    const largest = BigInt(Number.MAX_SAFE_INTEGER);
    assert.deepEqual(decodeExportBasics(Buffer.concat([u64(largest), u16(1)]), 0), {
      size: Number(largest),
      flags: 1,
    });
    assert.throws(
      () => decodeExportBasics(Buffer.concat([u64(largest + 1n), u16(1)]), 0),
      protocol(/not possible/),
    );
    assert.throws(() => decodeExportBasics(Buffer.concat([u64(1), u16(2)]), 0), protocol(/HAS_FLAGS/));
  });

  it('INFO items', () => {
    assert.deepEqual(decodeInfo(infoExport(5n, 3)), { kind: 'export', size: 5, flags: 3 });
    assert.deepEqual(decodeInfo(Buffer.concat([u16(Info.NAME), Buffer.from('né')])), {
      kind: 'name',
      name: 'né',
    });
    assert.deepEqual(decodeInfo(u16(Info.DESCRIPTION)), { kind: 'description', description: '' });
    assert.deepEqual(decodeInfo(infoBlockSize(1, 4096, 0xffffffff)), {
      kind: 'block-size',
      blockSize: { minimum: 1, preferred: 4096, maximum: 0xffffffff },
    });
    assert.deepEqual(decodeInfo(u16(999)), { kind: 'unknown' });
  });

  const wrongInfos: [string, Buffer, RegExp][] = [
    ['without a type', Buffer.alloc(1), /type/],
    ['INFO_EXPORT too short', infoExport(5n, 3).subarray(0, 11), /11 bytes/],
    ['INFO_EXPORT too long', Buffer.concat([infoExport(5n, 3), Buffer.alloc(1)]), /13 bytes/],
    ['a name too long', Buffer.concat([u16(Info.NAME), Buffer.alloc(4097, 65)]), /4096/],
    ['a name that is not UTF-8', Buffer.concat([u16(Info.NAME), Buffer.from([0xff])]), /UTF-8/],
    ['a name with NUL', Buffer.concat([u16(Info.NAME), Buffer.from('a\0b')]), /NUL/],
    ['block sizes too short', infoBlockSize(1, 4096, 4096).subarray(0, 13), /13 bytes/],
    ['a minimum block of 0', infoBlockSize(0, 4096, 4096), /minimum/],
    ['a minimum block of 3', infoBlockSize(3, 4096, 4096), /minimum/],
    ['a minimum block of 128 KiB', infoBlockSize(131072, 131072, 131072), /minimum/],
    ['a preferred block of 256', infoBlockSize(1, 256, 4096), /preferred/],
    ['a preferred block under the minimum', infoBlockSize(4096, 512, 4096), /preferred/],
    ['a maximum under the preferred block', infoBlockSize(1, 4096, 4095), /maximum/],
  ];
  for (const [what, payload, why] of wrongInfos) {
    it(`refuses ${what}`, () => assert.throws(() => decodeInfo(payload), protocol(why)));
  }

  it('listed exports and metadata contexts', () => {
    const named = Buffer.concat([u32(1), Buffer.from('adescription')]);
    assert.deepEqual(decodeListedExport(named), { name: 'a', description: 'description' });
    assert.throws(() => decodeListedExport(Buffer.alloc(3)), protocol(/longer/));
    assert.throws(() => decodeListedExport(Buffer.concat([u32(2), Buffer.from('a')])), protocol(/longer/));
    assert.deepEqual(decodeMetaContext(Buffer.concat([u32(9), Buffer.from('a:b')])), { id: 9, name: 'a:b' });
    assert.throws(() => decodeMetaContext(u32(9)), protocol(/without a name/));
  });

  it('text of a server fits one line', () => {
    assert.equal(displayable('a\r\nb\u001b[31m\u2028c'), 'a b [31m c');
    assert.equal(displayable('x'.repeat(1000)).length, 256);
  });
});
