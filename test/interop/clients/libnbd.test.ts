// libnbd's Python module, with its own checks off: whatever a client may send, against the real commands.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { needsLibnbd, PYTHON, tool } from '../tools.js';
import { assertSame, SIZE, TRANSPORTS, withDisk } from './disks.js';

const MIB = 1 << 20;

const PRELUDE = `
import json, nbd, os, sys

def connected(uri, *contexts, structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    for context in contexts: h.add_meta_context(context)
    h.connect_uri(uri)
    return h

def errno_of(call, *args, **kw):
    try: call(*args, **kw)
    except nbd.Error as e: return e.errno
    return 'OK'

def tell(value): print(json.dumps(value))
uri = sys.argv[1]
`;

/** What a script that begins with PRELUDE tells. */
async function python<Told>(script: string, ...args: string[]): Promise<Told> {
  return JSON.parse(await tool(PYTHON, '-c', PRELUDE + script, ...args)) as Told;
}

// reference: NetworkBlockDevice/nbd, doc/proto.md, «Error values», «Size constraints»
const ERRORS = `
h = connected(uri, 'base:allocation')
size = h.get_size()
def status(length, offset): h.block_status(length, offset, lambda *a: 0)
told = {
  'read past the end': errno_of(h.pread, 512, size),
  'read over the end': errno_of(h.pread, 1024, size - 512),
  'read far past the end': errno_of(h.pread, 512, 2**63 - 1024),
  'trim past the end': errno_of(h.trim, 512, size),
  'cache past the end': errno_of(h.cache, 512, size),
  'status past the end': errno_of(status, 512, size),
  'write past the end': errno_of(h.pwrite, bytearray(512), size),
  'write over the end': errno_of(h.pwrite, bytearray(1024), size - 512),
  'zero past the end': errno_of(h.zero, 512, size),
  'empty read': errno_of(h.pread, 0, 0),
  'empty write': errno_of(h.pwrite, bytearray(0), 0),
  'empty trim': errno_of(h.trim, 0, 0),
  'empty zero': errno_of(h.zero, 0, 0),
  'empty cache': errno_of(h.cache, 0, 0),
  'empty status': errno_of(status, 0, 0),
  'read with NO_HOLE': errno_of(h.pread, 512, 0, flags=nbd.CMD_FLAG_NO_HOLE),
  'read with an unknown flag': errno_of(h.pread, 512, 0, flags=0x8000),
  'write with DF': errno_of(h.pwrite, bytearray(512), 0, flags=nbd.CMD_FLAG_DF),
  'flush with an unknown flag': errno_of(h.flush, flags=0x8000),
  'cache with an unknown flag': errno_of(h.cache, 512, 0, flags=0x4000),
  'status with NO_HOLE': errno_of(h.block_status, 512, 0, lambda *a: 0, flags=nbd.CMD_FLAG_NO_HOLE),
  'read with FUA': errno_of(h.pread, 512, 0, flags=nbd.CMD_FLAG_FUA),
  'flush with FUA': errno_of(h.flush, flags=nbd.CMD_FLAG_FUA),
  'trim with FUA': errno_of(h.trim, 512, 0, flags=nbd.CMD_FLAG_FUA),
  'zero with FAST_ZERO': errno_of(h.zero, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO),
  'read with DF': errno_of(h.pread, 65536, 0, flags=nbd.CMD_FLAG_DF),
  'write of 33 MiB': errno_of(h.pwrite, bytearray(33 << 20), 0),
  'read of 32 MiB': errno_of(h.pread, 32 << 20, 0),
  'and still there': errno_of(h.pread, 512, 0),
}
h.shutdown()
tell(told)
`;

// 32 MiB reach past the end of this disk: bounds, not size, decide there.
const ANSWERS = {
  'read past the end': 'EINVAL',
  'read over the end': 'EINVAL',
  'read far past the end': 'EINVAL',
  'trim past the end': 'EINVAL',
  'cache past the end': 'EINVAL',
  'status past the end': 'EINVAL',
  'write past the end': 'ENOSPC',
  'write over the end': 'ENOSPC',
  'zero past the end': 'ENOSPC',
  'empty read': 'OK',
  'empty write': 'OK',
  'empty trim': 'OK',
  'empty zero': 'OK',
  'empty cache': 'OK',
  'empty status': 'EINVAL',
  'read with NO_HOLE': 'EINVAL',
  'read with an unknown flag': 'EINVAL',
  'write with DF': 'EINVAL',
  'flush with an unknown flag': 'EINVAL',
  'cache with an unknown flag': 'EINVAL',
  'status with NO_HOLE': 'EINVAL',
  'read with FUA': 'OK',
  'flush with FUA': 'OK',
  'trim with FUA': 'OK',
  'zero with FAST_ZERO': 'OK',
  'read with DF': 'OK',
  'write of 33 MiB': 'ENOSPC',
  'read of 32 MiB': 'EINVAL',
  'and still there': 'OK',
};

describe("libnbd's Python", needsLibnbd(), () => {
  for (const state of ['serve', 'on demand'] as const) {
    test(`error values, a disk: ${state}`, () =>
      withDisk(state, async (disk) => {
        for (const transport of TRANSPORTS)
          assert.deepEqual(await python(ERRORS, disk.uri(transport)), ANSWERS);
        await disk.handedOff();
        const wanted = Buffer.from(disk.content);
        const now = readFileSync(disk.image);
        now.copy(wanted, 0, 0, 512); // the trim
        assertSame(now, wanted);
      }));
  }

  test('a read-only disk: EPERM, and no harm done', () =>
    withDisk(
      'serve',
      async (disk) => {
        const script = `
h = connected(uri)
tell([h.is_read_only(), errno_of(h.pwrite, bytearray(512), 0), errno_of(h.zero, 512, 0), errno_of(h.trim, 512, 0),
      errno_of(h.flush), errno_of(h.cache, 512, 0), errno_of(h.pread, 512, 0)])`;
        const wanted = [true, 'EPERM', 'EPERM', 'EPERM', 'OK', 'OK', 'OK'];
        assert.deepEqual(await python(script, disk.unix), wanted);
        assertSame(readFileSync(disk.image), disk.content);
      },
      ['--read-only'],
    ));

  test('connections share one disk: what one writes the others read, any flush covers all', () =>
    withDisk('relocating', async (disk) => {
      const script = `
hs = [connected(u) for u in (sys.argv[1:3] * 4)]
assert all(h.can_multi_conn() for h in hs)
for i, h in enumerate(hs): h.pwrite(bytes([i + 1]) * 70000, i * 2000000 + 777)
hs[0].flush()
for i in range(8):
    for h in hs: assert h.pread(70000, i * 2000000 + 777) == bytes([i + 1]) * 70000
hs[3].pwrite(b'fua!', 12, flags=nbd.CMD_FLAG_FUA)
tell([bytes(h.pread(4, 12)).decode() for h in hs])
for h in hs: h.shutdown()`;
      assert.deepEqual(await python(script, disk.unix, disk.uri('TCP')), Array(8).fill('fua!'));
      await disk.handedOff();
      const wanted = Buffer.from(disk.content);
      for (let index = 0; index < 8; index += 1)
        wanted.fill(index + 1, index * 2_000_000 + 777, index * 2_000_000 + 777 + 70_000);
      wanted.write('fua!', 12);
      assertSame(readFileSync(disk.image), wanted);
    }));

  test('both contexts at once, listed, chosen and forgotten', () =>
    withDisk('on demand', async (disk) => {
      await disk.control.prefetch('disk', 0, MIB);
      const script = `
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_uri(uri)
listed = []
h.opt_list_meta_context(listed.append)
h.add_meta_context('qemu:')
by_namespace = []
h.opt_list_meta_context(by_namespace.append)
h.clear_meta_contexts()
for c in ('base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:none', 'x-unknown:thing'): h.add_meta_context(c)
h.opt_go()
can = [h.can_meta_context(c) for c in ('base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:none')]
seen = {}
def note(context, offset, entries, error):
    seen.setdefault(context, []).append([offset, entries])
    return 0
h.block_status(4 << 20, 0, note)
one = {}
h.block_status(4 << 20, 0, lambda c, o, e, err: one.setdefault(c, e) and 0, flags=nbd.CMD_FLAG_REQ_ONE)
h.shutdown()
plain = connected(uri)
tell([listed, by_namespace, can, seen, one, errno_of(plain.block_status, 4096, 0, lambda *a: 0)])`;
      const [listed, byNamespace, can, seen, one, unasked] = await python<unknown[]>(script, disk.unix);
      assert.deepEqual(listed, [
        'base:allocation',
        'qemu:allocation-depth',
        'blockferry:heat',
        'blockferry:first-access',
        'qemu:dirty-bitmap:blockferry',
        'blockferry:dirty',
        'blockferry:changed',
      ]);
      assert.deepEqual(byNamespace, ['qemu:allocation-depth', 'qemu:dirty-bitmap:blockferry']);
      assert.deepEqual(can, [true, true, false]);
      const depth = [[0, [MIB, 1, 3 * MIB, 2]]];
      assert.deepEqual(seen, { 'base:allocation': [[0, [4 * MIB, 0]]], 'qemu:allocation-depth': depth });
      assert.deepEqual(one, { 'base:allocation': [MIB, 0], 'qemu:allocation-depth': [MIB, 1] });
      assert.equal(unasked, 'EINVAL');
    }));

  test('structured reads tell holes, DF gives one piece, simple replies do as well', () =>
    withDisk('serve', async (disk) => {
      const script = `
h = connected(uri)
def pieces(flags=0):
    got = []
    h.pread_structured(2 << 20, 5 << 20, lambda data, offset, status, error: got.append([offset, len(data), status]) and 0, flags=flags)
    return got
s = connected(uri, structured=False)
tell([sum(p[1] for p in pieces()), len(pieces(nbd.CMD_FLAG_DF)), sorted({p[2] for p in pieces()}),
      bytes(s.pread(4096, 1 << 20)).hex(), s.get_structured_replies_negotiated(), errno_of(s.pread, 512, s.get_size())])`;
      const [total, whole, kinds, bytes, structured, past] = await python<unknown[]>(script, disk.unix);
      assert.equal(total, 2 * MIB);
      assert.equal(whole, 1);
      assert.ok(JSON.stringify(kinds) === '[1]' || JSON.stringify(kinds) === '[1,2]', String(kinds));
      assert.equal(bytes, disk.content.subarray(MIB, MIB + 4096).toString('hex'));
      assert.equal(structured, false);
      assert.equal(past, 'EINVAL');
    }));

  test('two hundred requests in flight, answered out of order, on a proxy', () =>
    withDisk('on demand', async (disk) => {
      const script = `
import hashlib
h = connected(uri)
size = h.get_size()
step = size // 200
reads = [(nbd.Buffer(step - (i % 7) * 100), i * step) for i in range(200)]
cookies = [h.aio_pread(b, at) for b, at in reads]
while cookies:
    h.poll(-1)
    cookies = [c for c in cookies if not h.aio_command_completed(c)]
tell([hashlib.sha256(b.to_bytearray()).hexdigest() for b, _ in reads])
h.shutdown()`;
      const { createHash } = await import('node:crypto');
      const step = Math.floor(SIZE / 200);
      const wanted = Array.from({ length: 200 }, (_, index) => {
        const at = index * step;
        const piece = disk.content.subarray(at, at + step - (index % 7) * 100);
        return createHash('sha256').update(piece).digest('hex');
      });
      assert.deepEqual(await python(script, disk.uri('TCP')), wanted);
    }));

  test('a client that goes away without a word, in the middle of everything', () =>
    withDisk('on demand', async (disk) => {
      const script = `
h = connected(uri)
keep = [nbd.Buffer.from_bytearray(bytearray(b'x' * 300000)) for _ in range(20)]
for i, b in enumerate(keep): h.aio_pwrite(b, i * 1000000)
for i in range(20): h.aio_pread(nbd.Buffer(200000), i * 1000000 + 350000)
for _ in range(5): h.poll(0)
tell('gone')
sys.stdout.flush()
os._exit(0)`;
      assert.equal(await python(script, disk.unix), 'gone');
      assert.equal(await python('tell(errno_of(connected(uri).pread, 4096, 0))', disk.unix), 'OK');
      await disk.handedOff();
      const now = readFileSync(disk.image);
      // Each write happened or not; nothing else may differ.
      const wanted = Buffer.from(disk.content);
      for (let index = 0; index < 20; index += 1) {
        const at = index * 1_000_000;
        now.copy(wanted, at, at, at + 300_000);
      }
      assertSame(now, wanted);
    }));

  test('CACHE of a missing range fetches it', () =>
    withDisk('on demand', async (disk) => {
      await python(
        `h = connected(uri); h.cache(${2 * MIB}, ${MIB}); h.pread(4096, ${MIB}); tell(1); h.shutdown()`,
        disk.unix,
      );
      const deadline = performance.now() + 10_000;
      for (;;) {
        if ((await disk.status()).presentBytes === 2 * MIB) break;
        assert.ok(performance.now() < deadline, JSON.stringify(await disk.status()));
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
    }));

  test('the last, short block of a disk', () =>
    withDisk('on demand', async (disk) => {
      const script = `
h = connected(uri)
size = h.get_size()
end = size - size % 4096
first = bytes(h.pread(size - end, end)).hex()
h.pwrite(b'!' * 10, size - 10)
tell([first, bytes(h.pread(size - end, end)).hex()])
h.shutdown()`;
      const end = SIZE - (SIZE % 4096);
      const tail = Buffer.from(disk.content.subarray(end));
      const before = tail.toString('hex');
      tail.fill('!', tail.length - 10);
      assert.deepEqual(await python(script, disk.unix), [before, tail.toString('hex')]);
      await disk.handedOff();
      assertSame(readFileSync(disk.image).subarray(end), tail);
    }));
});
