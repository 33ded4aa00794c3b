// Garbage on the NBD port, while another client works and must not notice.
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { Random } from '../../lab/crash/random.js';
import { DaemonProcess } from '../../lab/hosts.js';
import { pattern } from '../clients/disks.js';
import { needs, tool } from '../tools.js';
import { inFolder } from './refusals.js';

const MIB = 1 << 20;
const SHORT_CONNECTIONS = 3000;
const AT_ONCE = 100;
const RESIDENT_MIB_MAX = 400;

type Place = { path: string } | { host: string; port: number };

/** Sends `bytes`, then ends; resolves when the connection is closed, from whatever side. */
async function send(place: Place, bytes: Buffer, how: 'end' | 'reset' = 'end'): Promise<void> {
  const socket = net.connect(place);
  socket.on('error', () => undefined);
  socket.resume();
  const closed = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  socket.once('connect', () => {
    if (how === 'end') socket.end(bytes);
    else
      socket.write(bytes, () => {
        if ('port' in place) socket.resetAndDestroy();
        else socket.destroy();
      });
  });
  await closed;
}

const u16 = (value: number): Buffer => {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
};
const u32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
const text = (value: string): Buffer => Buffer.from(value, 'latin1');
const option = (number: number, data: Buffer, length = data.length): Buffer =>
  Buffer.concat([text('IHAVEOPT'), u32(number), u32(length), data]);
const FLAGS = u32(3);
/** EXPORT_NAME of the default export: transmission begins. */
const ENTERED = Buffer.concat([FLAGS, option(1, Buffer.alloc(0))]);

function request(command: number, offset: bigint, length: number, magic = 0x25609513, flags = 0): Buffer {
  const bytes = Buffer.alloc(28);
  bytes.writeUInt32BE(magic, 0);
  bytes.writeUInt16BE(flags, 4);
  bytes.writeUInt16BE(command, 6);
  bytes.writeBigUInt64BE(offset, 16);
  bytes.writeUInt32BE(length, 24);
  return bytes;
}

const TLS_HELLO = Buffer.from(
  '1603010200010001fc0303a1b2c3d4e5f60718293a4b5c6d7e8f901112131415161718191a1b1c1d1e1f20202122232425262728292a2b2c2d2e2f30',
  'hex',
);

const GARBAGE: Record<string, Buffer> = {
  nothing: Buffer.alloc(0),
  'an HTTP request': text('GET / HTTP/1.1\r\nHost: disk\r\nUser-Agent: curl/8\r\nAccept: */*\r\n\r\n'),
  'a TLS hello': Buffer.concat([TLS_HELLO, Buffer.alloc(460, 7)]),
  'an SSH banner': text('SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n'),
  zeros: Buffer.alloc(100_000),
  'half of the flags': FLAGS.subarray(0, 2),
  'unknown flags': u32(0xffffffff),
  'half an option': Buffer.concat([FLAGS, option(6, Buffer.alloc(0)).subarray(0, 11)]),
  'an option of 4 GiB': Buffer.concat([FLAGS, option(7, Buffer.alloc(100), 0xffffffff)]),
  'an option that is longer than what comes': Buffer.concat([FLAGS, option(7, Buffer.alloc(3), 5000)]),
  'a name longer than its option': Buffer.concat([
    FLAGS,
    option(7, Buffer.concat([u32(0x7fffffff), u16(0)])),
  ]),
  'a thousand options': Buffer.concat([FLAGS, ...Array<Buffer>(1000).fill(option(3, Buffer.alloc(0)))]),
  'a wrong option magic': Buffer.concat([FLAGS, text('IHAVENOT'), u32(6), u32(0)]),
  STARTTLS: Buffer.concat([FLAGS, option(5, Buffer.alloc(0)), TLS_HELLO]),
  'a wrong request magic': Buffer.concat([ENTERED, request(0, 0n, 4096, 0x25609514)]),
  'half a request': Buffer.concat([ENTERED, request(0, 0n, 4096).subarray(0, 13)]),
  'a write whose data breaks off': Buffer.concat([ENTERED, request(1, 4096n, MIB), Buffer.alloc(1000, 9)]),
  'a write of 4 GiB': Buffer.concat([ENTERED, request(1, 0n, 0xffffffff), Buffer.alloc(100_000, 9)]),
  'a read of 4 GiB far away': Buffer.concat([ENTERED, request(0, 2n ** 63n, 0xffffffff)]),
  'unknown commands': Buffer.concat([ENTERED, ...[8, 99, 0xffff].map((command) => request(command, 0n, 1))]),
  'reads nobody waits for': Buffer.concat([ENTERED, ...Array<Buffer>(200).fill(request(0, 0n, MIB))]),
};

/** A server that has taken all garbage must still have one worker whose data is right, and be small. */
async function besides(folder: string, abuse: (place: Place[]) => Promise<void>): Promise<void> {
  const image = join(folder, 'disk.img');
  const content = pattern(8 * MIB, 2);
  writeFileSync(image, content);
  const socket = join(folder, 's');
  const daemon = await DaemonProcess.start([
    ...['serve', image, '--state-dir', join(folder, 'state'), '--log-level', 'warn'],
    ...['--listen', `unix:${socket}`, '--listen', '127.0.0.1:0'],
  ]);
  try {
    const { hostname, port } = new URL(daemon.uris[1]);
    // The worker has the upper half to itself; nothing may change the lower one.
    const worker = tool(
      ...['fio', '--name=worker', '--ioengine=nbd', `--uri=${daemon.uris[0]}`, '--rw=randrw', '--bs=4k'],
      ...[
        '--offset=4m',
        '--size=4m',
        '--iodepth=4',
        '--verify=crc32c',
        '--verify_fatal=1',
        '--verify_state_save=0',
      ],
      ...['--time_based', '--runtime=3', '--output-format=terse'],
    );
    await Promise.all([worker, abuse([{ path: socket }, { host: hostname, port: Number(port) }])]);
    assert.equal((await tool('nbdinfo', '--size', daemon.uris[0])).trim(), String(content.length));
    // setpriv became the daemon.
    const resident = /^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${daemon.child.pid}/status`, 'utf8'));
    assert.ok(Number(resident![1]) / 1024 < RESIDENT_MIB_MAX, `${resident![1]} KiB resident`);
    assert.equal(await daemon.stop(), 0, daemon.stderr);
    assert.ok(daemon.stderr.split('\n').length < 40, `logs are bounded: ${daemon.stderr}`);
    assert.doesNotMatch(daemon.stderr, /TypeError|unexpected|"level":50/);
    const kept = readFileSync(image).subarray(0, 4 * MIB);
    assert.ok(kept.equals(content.subarray(0, 4 * MIB)), 'no garbage was carried out');
  } finally {
    daemon.kill();
    await daemon.exited;
  }
}

describe('garbage on the NBD port harms nobody else', needs('fio', 'nbdinfo'), () => {
  test('each kind, ended in order and cut off', () =>
    inFolder((folder) =>
      besides(folder, async (places) => {
        for (const how of ['end', 'reset'] as const)
          for (const place of places)
            await Promise.all(Object.values(GARBAGE).map((bytes) => send(place, bytes, how)));
      }),
    ));

  test('random bytes, raw and behind a good start', () =>
    inFolder((folder) =>
      besides(folder, async (places) => {
        const random = new Random(20_071);
        const noise = (length: number): Buffer => {
          const bytes = Buffer.alloc(length);
          for (let at = 0; at < length; at += 1) bytes[at] = random.below(256);
          return bytes;
        };
        for (let round = 0; round < 60; round += 1) {
          const starts = [Buffer.alloc(0), FLAGS, Buffer.concat([FLAGS, text('IHAVEOPT')])];
          const all = starts.map((start) => Buffer.concat([start, noise(1 + random.below(3000))]));
          await Promise.all(all.map((bytes, index) => send(places[(round + index) % 2], bytes)));
        }
      }),
    ));

  test('thousands of short connections, and hundreds that say nothing', () =>
    inFolder((folder) =>
      besides(folder, async (places) => {
        const silent = Array.from({ length: 300 }, (_, index) => net.connect(places[index % 2]));
        for (const socket of silent) socket.on('error', () => undefined);
        for (let sent = 0; sent < SHORT_CONNECTIONS; sent += AT_ONCE) {
          const batch = Array.from({ length: AT_ONCE }, (_, index) =>
            send(
              places[index % 2],
              index % 3 === 0 ? FLAGS : Buffer.alloc(0),
              index % 2 === 0 ? 'end' : 'reset',
            ),
          );
          await Promise.all(batch);
        }
        for (const socket of silent) socket.destroy();
      }),
    ));
});
