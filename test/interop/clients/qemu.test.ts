// qemu-img and qemu-io against the real commands.
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { attempt, needs, tool } from '../tools.js';
import { assertSame, type Disk, HOLE, pattern, SIZE, STATES, TRANSPORTS, withDisk } from './disks.js';

const KIB = 1 << 10;
const MIB = 1 << 20;

function qemuIo(uri: string, commands: string[], ...flags: string[]): Promise<string> {
  return tool('qemu-io', '-f', 'raw', ...flags, ...commands.flatMap((command) => ['-c', command]), uri);
}

function qemuImg(words: string, ...paths: string[]): Promise<string> {
  return tool('qemu-img', ...words.split(' '), ...paths);
}

interface Mapped {
  start: number;
  length: number;
  depth: number;
  zero: boolean;
  data: boolean;
}

for (const state of STATES) {
  describe(`qemu-img and a disk: ${state}`, needs('qemu-img', 'qemu-io'), () => {
    test('info, map, compare and convert, out of it', () =>
      withDisk(state, async (disk) => {
        await tell(disk);
        if (state === 'serve' || state === 'handed off') await mapHole(disk);
        await convertFrom(disk);
      }));

    test('convert into it, and a difference is found', () =>
      withDisk(state === 'handed off' ? 'on demand' : state, convertInto));
  });

  describe(`qemu-io and a disk: ${state}`, needs('qemu-img', 'qemu-io'), () => {
    test('patterns, zeroes, discards, FUA, unaligned requests and many at once read back', () =>
      withDisk(state, async (disk) => {
        const wanted = await scribble(disk);
        await crowd(disk, wanted);
        assertSame(await contentOf(disk), wanted);
        if (state !== 'serve') await disk.handedOff();
        assertSame(readFileSync(disk.image), wanted);
      }));
  });
}

async function tell(disk: Disk): Promise<void> {
  for (const transport of TRANSPORTS) {
    const info = JSON.parse(await qemuImg('info --output=json', disk.uri(transport)));
    assert.equal(info['virtual-size'], SIZE);
    assert.equal(info.format, 'raw');
  }
  const mapped: Mapped[] = JSON.parse(await qemuImg('map --output=json', disk.unix));
  assert.equal(
    mapped.reduce((sum, { length }) => sum + length, 0),
    SIZE,
  );
}

async function mapHole(disk: Disk): Promise<void> {
  const mapped: Mapped[] = JSON.parse(await qemuImg('map --output=json', disk.unix));
  const hole = mapped.find(({ start }) => start === HOLE.from);
  assert.deepEqual([hole?.zero, hole?.data, hole?.length], [true, false, HOLE.to - HOLE.from]);
}

async function convertFrom(disk: Disk): Promise<void> {
  writeFileSync(disk.path('wanted.raw'), disk.content);
  await qemuImg('compare -f raw -F raw', disk.unix, disk.path('wanted.raw'));
  for (const format of ['raw', 'qcow2']) {
    const to = disk.path(`converted.${format}`);
    await qemuImg(`convert -f raw -O ${format} -m 8 -W`, disk.uri('TCP'), to);
    await qemuImg(`compare -f ${format} -F raw`, to, disk.unix);
  }
  assertSame(readFileSync(disk.path('converted.raw')), disk.content);
}

async function convertInto(disk: Disk): Promise<void> {
  const [raw, qcow2] = [disk.path('new.raw'), disk.path('new.qcow2')];
  const content = pattern(SIZE, 3);
  content.fill(0, 8 * MIB, 12 * MIB);
  writeFileSync(raw, content);
  await qemuImg('convert -f raw -O qcow2', raw, qcow2);
  await qemuImg('convert -n -f qcow2 -O raw -m 16 -W', qcow2, disk.unix);
  await qemuImg('compare -f raw -F raw', raw, disk.uri('TCP'));
  await qemuIo(disk.unix, [`write -P 170 ${7 * MIB} 512`, 'flush']);
  const { code, stdout } = await attempt(['qemu-img', 'compare', '-f', 'raw', '-F', 'raw', raw, disk.unix]);
  assert.equal(code, 1);
  assert.match(stdout, new RegExp(`mismatch at offset ${7 * MIB}`));
  content.fill(170, 7 * MIB, 7 * MIB + 512);
  await disk.handedOff();
  assertSame(readFileSync(disk.image), content);
}

/** Forty requests at once, that share blocks with their neighbours nowhere. */
async function crowd(disk: Disk, wanted: Buffer): Promise<void> {
  const length = 20 * KIB + 512;
  const places = Array.from({ length: 40 }, (_, index) => index * 500 * KIB + index * 512);
  const all = (verb: string): string[] =>
    places.map((at, index) => `${verb} -P ${index + 1} ${at} ${length}`);
  const said = await qemuIo(disk.unix, [...all('aio_write'), 'aio_flush', 'flush', ...all('read')]);
  assert.doesNotMatch(said, /fail|error/i);
  assert.doesNotMatch(await qemuIo(disk.uri('TCP'), [...all('aio_read'), 'aio_flush']), /fail|error/i);
  for (const [index, at] of places.entries()) wanted.fill(index + 1, at, at + length);
}

/** Writes with qemu-io over both transports; gives what the disk must hold then. */
async function scribble(disk: Disk): Promise<Buffer> {
  const wanted = Buffer.from(disk.content);
  const steps: { verb: string; at: number; length: number; byte: number }[] = [
    { verb: 'write -P 9', at: 4 * KIB, length: MIB, byte: 9 },
    { verb: 'write -f -P 5', at: 513, length: 1024, byte: 5 },
    { verb: 'write -P 17', at: 3 * MIB - 1, length: 4098, byte: 17 },
    { verb: 'write -z', at: 2 * MIB, length: 64 * KIB, byte: 0 },
    { verb: 'write -z -u', at: 5 * MIB + 777, length: 100_001, byte: 0 },
    { verb: 'write -P 200', at: HOLE.from + 100, length: 300, byte: 200 },
    { verb: 'write -P 33', at: HOLE.to - 2000, length: 4000, byte: 33 },
    { verb: 'write -P 77', at: SIZE - 1537, length: 1537, byte: 77 },
    { verb: 'write -P 1', at: 14 * MIB + 1, length: 1, byte: 1 },
  ];
  for (const [index, transport] of TRANSPORTS.entries()) {
    const mine = steps.filter((_, step) => step % 2 === index);
    const commands = mine.flatMap(({ verb, at, length, byte }) => [
      `${verb} ${at} ${length}`,
      `read -P ${byte} ${at} ${length}`,
    ]);
    const said = await qemuIo(disk.uri(transport), [...commands, 'flush']);
    assert.doesNotMatch(said, /fail|error/i);
    for (const { at, length, byte } of mine) wanted.fill(byte, at, at + length);
  }
  // A discard may leave what it finds; it must not touch its neighbours, and reads must agree from then on.
  await qemuIo(disk.unix, [`discard ${17 * MIB} ${MIB}`, `discard ${19 * MIB + 5} 5000`, 'flush']);
  const now = await contentOf(disk);
  for (const [from, to] of [
    [17 * MIB, 18 * MIB],
    [19 * MIB + 5, 19 * MIB + 5005],
  ]) {
    for (let at = from; at < to; at += 1)
      assert.ok(now[at] === 0 || now[at] === wanted[at], `discard, at ${at}`);
    now.copy(wanted, from, from, to);
  }
  return wanted;
}

async function contentOf(disk: Disk): Promise<Buffer> {
  const to = disk.path('content');
  await tool('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', disk.uri('TCP'), to);
  return readFileSync(to);
}

test('the client of a read-only disk is told so', needs('qemu-io'), () =>
  withDisk(
    'serve',
    async (disk) => {
      const { code, stderr } = await attempt(['qemu-io', '-f', 'raw', '-c', 'write 0 4k', disk.unix]);
      assert.equal(code, 1);
      assert.match(stderr, /Permission denied/);
      assert.doesNotMatch(await qemuIo(disk.unix, ['read 0 1M'], '-r'), /fail/);
    },
    ['--read-only'],
  ),
);

test('QEMU opens a standby for writing, reads, and keeps nothing of what it read', needs('qemu-io'), () =>
  withDisk(
    'on demand',
    async (disk) => {
      const said = await qemuIo(disk.unix, ['read 0 2M']);
      assert.match(said, /read 2097152\/2097152/);
      const status = await disk.status();
      assert.equal(status.phase, 'standby');
      assert.equal(status.presentBytes, 0);
      await qemuIo(disk.unix, [`write -P 8 ${MIB + 100} 10000`]);
      assert.equal((await disk.status()).phase, 'relocating', 'the first write takes over');
      await disk.handedOff();
      const wanted = Buffer.from(disk.content);
      wanted.fill(8, MIB + 100, MIB + 10_100);
      assertSame(readFileSync(disk.image), wanted);
    },
    ['--standby'],
  ),
);
