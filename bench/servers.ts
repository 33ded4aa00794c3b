/**
 * NBD servers side by side: `node dist/bench/servers.js [--rounds N] [--seconds S] [--json]`. fio's nbd engine loads each in turn (A B C
 * A B C ...), the same image in the page cache, over a unix socket; the table has medians. fio is often the limit: read the ratios, and
 * those with care. Peers that are not installed are left out.
 */

import { execFile } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { cpus, tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs, promisify } from 'node:util';
import { DaemonProcess } from '../test/lab/hosts.js';
import { lacking, serverOn } from '../test/lab/programs.js';

const run = promisify(execFile);
const IMAGE_BYTES = 256 << 20;

interface Work {
  name: string;
  words: string[];
}

const WORKS: Work[] = [
  ...[1, 16, 64].map((depth) => ({
    name: `4 KiB random read, depth ${depth}`,
    words: ['--rw=randread', '--bs=4k', `--iodepth=${depth}`],
  })),
  { name: '4 KiB random write, depth 16', words: ['--rw=randwrite', '--bs=4k', '--iodepth=16'] },
  { name: '1 MiB sequential read, depth 8', words: ['--rw=read', '--bs=1m', '--iodepth=8'] },
];

interface Server {
  name: string;
  start(image: string, socket: string): Promise<{ stop(): Promise<unknown> }>;
}

const SERVERS: Server[] = [
  {
    name: 'blockferry',
    start: (image, socket) =>
      DaemonProcess.start([
        'serve',
        image,
        '--name',
        'disk',
        '--listen',
        `unix:${socket}`,
        '--state-dir',
        `${socket}.state`,
      ]),
  },
  { name: 'nbdkit', start: (image, socket) => serverOn(socket, 'nbdkit', '-f', '-U', socket, 'file', image) },
  {
    name: 'qemu-nbd',
    start: (image, socket) => serverOn(socket, 'qemu-nbd', '-t', '-e', '8', '-f', 'raw', '-k', socket, image),
  },
];

/** Operations a second. */
async function measure(socket: string, work: Work, seconds: number): Promise<number> {
  const uri = `nbd+unix:///?socket=${socket}`;
  const words = [
    '--name=bench',
    '--ioengine=nbd',
    `--uri=${uri}`,
    ...work.words,
    '--time_based',
    `--runtime=${seconds}`,
  ];
  const { stdout } = await run('fio', [...words, '--output-format=json'], { maxBuffer: 16 << 20 });
  const job = (
    JSON.parse(stdout.slice(stdout.indexOf('{'))) as {
      jobs: { read: { iops: number }; write: { iops: number } }[];
    }
  ).jobs[0]!;
  return job.read.iops + job.write.iops;
}

function median(values: number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

async function fill(path: string): Promise<void> {
  const file = await open(path, 'w');
  const piece = Buffer.alloc(1 << 20, 0x5a);
  for (let at = 0; at < IMAGE_BYTES; at += piece.length) await file.write(piece, 0, piece.length, at);
  await file.close();
}

async function main(): Promise<void> {
  const options = {
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '2' },
    json: { type: 'boolean', default: false },
  } as const;
  const { values } = parseArgs({ options });
  const [rounds, seconds] = [Number(values.rounds), Number(values.seconds)];
  if (lacking('fio')) throw new Error('fio is not installed');
  const servers = SERVERS.filter(({ name }) => name === 'blockferry' || lacking(name) === false);
  const folder = mkdtempSync(join(tmpdir(), 'bf-bench-'));
  const found = new Map<string, number[]>();
  try {
    const image = join(folder, 'disk.img');
    await fill(image);
    for (let round = 0; round < rounds; round++) {
      for (const server of servers) {
        const socket = join(folder, `${server.name}.sock`);
        const running = await server.start(image, socket);
        try {
          for (const work of WORKS) {
            const key = `${work.name}/${server.name}`;
            found.set(key, [...(found.get(key) ?? []), await measure(socket, work, seconds)]);
          }
        } finally {
          await running.stop();
          rmSync(socket, { force: true });
        }
      }
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  if (values.json) {
    console.log(
      JSON.stringify({
        cpus: cpus().length,
        model: cpus()[0]?.model,
        rounds,
        seconds,
        operations: Object.fromEntries(found),
      }),
    );
    return;
  }
  console.log(
    `operations a second, median of ${rounds} rounds of ${seconds} s, unix socket, page cache, ${cpus().length} cores`,
  );
  console.table(
    Object.fromEntries(
      WORKS.map((work) => [
        work.name,
        Object.fromEntries(
          servers.map(({ name }) => [name, Math.round(median(found.get(`${work.name}/${name}`) ?? []))]),
        ),
      ]),
    ),
  );
}

main().catch((error) => {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
});
