// Real clients work on a device in memory through the listener: what they write is what it holds, and what they read.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import pino from 'pino';
import { defaultOrNamed, type ExportEntry } from '../../src/nbd/server/exports.js';
import { Listener } from '../../src/nbd/server/listener.js';
import { startSession } from '../../src/nbd/server/session.js';
import { type Manner, MemoryDevice } from '../fakes/memory-device.js';
import { needs, needsLibnbd, PYTHON } from './tools.js';

const run = promisify(execFile);
const SIZE = 48 << 20;

let folder: string;
let listener: Listener;
let uris: string[];
let device: MemoryDevice;

/** Every third request is answered later. */
function mixed(): () => Manner {
  let turn = 0;
  return () => (['now', 'now', 'turn'] as const)[turn++ % 3]!;
}

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-session-'));
  device = new MemoryDevice(SIZE);
  device.manner = mixed();
  device.contexts = ['base:allocation'];
  device.extents = (_context, request) => [
    [request.length >> 1, 0],
    [request.length - (request.length >> 1), 3],
  ];
  const entry: ExportEntry = {
    name: 'disk',
    description: '',
    size: SIZE,
    readOnly: false,
    contexts: device.contexts,
    preferredBlock: 4096,
    multiConn: true,
    open: () => device,
  };
  listener = await Listener.open({
    addresses: [
      { kind: 'unix', path: join(folder, 's') },
      { kind: 'tcp', host: '127.0.0.1', port: 0 },
    ],
    exports: { list: () => [entry], find: (name) => defaultOrNamed([entry], name), shuttingDown: false },
    startSession,
    log: pino({ level: 'silent' }),
  });
  uris = listener.addresses('disk');
});

after(async () => {
  await listener.close();
  rmSync(folder, { recursive: true });
});

function tool(command: string, ...args: string[]): Promise<{ stdout: string; stderr: string }> {
  return run(command, args, { timeout: 60_000, maxBuffer: 16 << 20 });
}

for (const index of [0, 1]) {
  describe(`real clients over ${['a unix socket', 'TCP'][index]}`, () => {
    test('nbdcopy there and back', needs('nbdcopy'), async () => {
      const [from, to] = [join(folder, 'from'), join(folder, 'to')];
      const image = Buffer.alloc(SIZE);
      for (let at = 0; at < SIZE; at += 4) image.writeUInt32LE((at * 2_654_435_761 + index) >>> 0, at);
      writeFileSync(from, image);
      await tool('nbdcopy', '--flush', from, uris[index]!);
      assert.ok(device.data.equals(image));
      const { extents } = device;
      device.extents = (_context, request) => [[request.length, 0]]; // all data: nbdcopy believes what it is told
      for (const way of ['--connections=4', '--synchronous']) {
        await tool('nbdcopy', way, uris[index]!, to);
        assert.ok(readFileSync(to).equals(image));
      }
      device.extents = extents;
    });

    test('qemu-io writes patterns, zeroes, discards and reads back', needs('qemu-io'), async () => {
      const { stdout } = await tool(
        'qemu-io',
        ...['-f', 'raw', '-c', 'write -P 9 4k 1M', '-c', 'read -P 9 4k 1M', '-c', 'write -z 8k 64k'],
        ...['-c', 'read -P 0 8k 64k', '-c', 'discard 32M 1M', '-c', 'flush', '-c', 'write -f -P 5 513 1024'],
        ...['-c', 'read -P 5 513 1024', '-c', 'read 0 48M', uris[index]!],
      );
      assert.doesNotMatch(stdout, /verification failed|error/i);
      assert.ok(device.data.subarray(513, 1537).every((byte) => byte === 5));
    });

    test('fio verifies what it wrote', needs('fio'), async () => {
      await tool(
        'fio',
        ...['--name=verify', '--ioengine=nbd', `--uri=${uris[index]}`, '--rw=randrw', '--bsrange=512-300k'],
        ...['--iodepth=32', '--size=32m', '--verify=crc32c', '--verify_fatal=1', '--verify_state_save=0'],
      );
    });

    test("libnbd's errors", needsLibnbd(), async () => {
      const script = `
import nbd, sys, errno
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
size = h.get_size()
def errno_of(call, *args, **kw):
    try: call(*args, **kw)
    except nbd.Error as e: return e.errno
    return 'OK'
def all_zero(n): return bytearray(n)
print(errno_of(h.pread, 512, size), errno_of(h.trim, 512, size), errno_of(h.cache, 512, size),
      errno_of(h.pwrite, all_zero(512), size), errno_of(h.zero, 512, size), errno_of(h.pread, 0, 0),
      errno_of(h.pwrite, all_zero(0), 0), errno_of(h.trim, 0, 0), errno_of(h.zero, 0, 0), errno_of(h.pread, 512, 0, flags=2),
      errno_of(h.flush, flags=0x8000), errno_of(h.zero, 512, 0, flags=16), errno_of(h.pwrite, all_zero(33 << 20), 0))
h.shutdown()
`;
      const { stdout } = await tool(PYTHON, '-c', script, uris[index]!);
      const wanted = 'EINVAL EINVAL EINVAL ENOSPC ENOSPC OK OK OK OK EINVAL EINVAL EINVAL OK';
      assert.equal(stdout.trim(), wanted);
    });

    test('nbdinfo --map', needs('nbdinfo'), async () => {
      const { stdout } = await tool('nbdinfo', '--map', '--json', uris[index]!);
      const extents: { length: number; type: number }[] = JSON.parse(stdout);
      assert.equal(
        extents.reduce((sum, extent) => sum + extent.length, 0),
        SIZE,
      );
      assert.deepEqual([...new Set(extents.map((extent) => extent.type))].sort(), [0, 3]);
    });
  });
}
