/**
 * What a host costs that has nothing to do: `node dist/bench/idle-exports.js [--exports N] [--seconds S] [--threads N] [--json]`. Every
 * volume gets a client that reads one block and is silent then. Memory is what is the daemon's alone (USS) and what it takes of the machine
 * (PSS); processor time is counted over the silent seconds.
 */

import { mkdirSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { stringify } from 'yaml';
import { NbdClient } from '../src/nbd/client/client.js';
import { DaemonProcess } from '../test/lab/hosts.js';

const IMAGE_BYTES = 1 << 30;
/** Of utime and stime: Linux shows programs 100 ticks a second (USER_HZ). */
const TICKS_PER_SECOND = 100;
/** V8 collects what start-up and handshakes left when nothing has happened for some seconds. */
const SETTLE_MS = 20_000;

interface Cost {
  ussKib: number;
  pssKib: number;
  cpuSeconds: number;
}

function costOf(pid: number): Cost {
  const sum = (pattern: RegExp): number =>
    [...readFileSync(`/proc/${pid}/smaps_rollup`, 'utf8').matchAll(pattern)].reduce(
      (total, [, kib]) => total + Number(kib),
      0,
    );
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]!.split(' ');
  return {
    ussKib: sum(/^Private_(?:Clean|Dirty): +(\d+) kB$/gm),
    pssKib: sum(/^Pss: +(\d+) kB$/gm),
    // utime and stime: fields 14 and 15 of proc(5), the third being the first here.
    cpuSeconds: (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND,
  };
}

const { values } = parseArgs({
  options: {
    exports: { type: 'string', default: '200' },
    seconds: { type: 'string', default: '10' },
    threads: { type: 'string', default: '' },
    json: { type: 'boolean', default: false },
  },
});
const count = Number(values.exports);
const seconds = Number(values.seconds);
const pause = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

const folder = mkdtempSync(join(tmpdir(), 'bfi-'));
let daemon: DaemonProcess | null = null;
try {
  mkdirSync(join(folder, 'images'));
  const volumes = Array.from({ length: count }, (_, index) => {
    const image = join(folder, 'images', `${index}.img`);
    writeFileSync(image, '');
    truncateSync(image, IMAGE_BYTES);
    return { name: `v${index}`, image };
  });
  const config = join(folder, 'host.yaml');
  const threads = values.threads === '' ? {} : { dataThreads: Number(values.threads) };
  const settings = { name: 'idle', stateDir: join(folder, 's'), run: join(folder, 'r'), ...threads };
  writeFileSync(config, stringify({ ...settings, volumes }));
  const startedAt = performance.now();
  daemon = await DaemonProcess.start(['host', '--config', config]);
  const startSeconds = (performance.now() - startedAt) / 1000;
  const pid = daemon.child.pid!;
  await pause(SETTLE_MS);
  const alone = costOf(pid);
  const clients = await Promise.all(
    volumes.map(({ name }) =>
      NbdClient.connect(`nbd+unix:///${name}?socket=${join(folder, 'r', 'nbd', `${name}.sock`)}`),
    ),
  );
  const block = Buffer.alloc(4096);
  await Promise.all(clients.map((client) => client.read(0, block.length, block)));
  await pause(SETTLE_MS);
  const before = costOf(pid);
  await pause(seconds * 1000);
  const after = costOf(pid);
  const result = {
    exports: count,
    startSeconds: Number(startSeconds.toFixed(2)),
    withoutClients: { ussKib: alone.ussKib, pssKib: alone.pssKib },
    withClients: { ussKib: after.ussKib, pssKib: after.pssKib },
    kibPerClient: Math.round((after.ussKib - alone.ussKib) / count),
    cpuPercentIdle: Number((((after.cpuSeconds - before.cpuSeconds) / seconds) * 100).toFixed(2)),
  };
  console.log(values.json ? JSON.stringify(result) : result);
  for (const client of clients) client.destroy();
} finally {
  await daemon?.stop();
  rmSync(folder, { recursive: true, force: true });
}
