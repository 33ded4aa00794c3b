/**
 * Whether control work shows in a guest's latency: `node dist/bench/storm.js [--seconds S] [--rounds N] [--handshakes N] [--pages N]
 * [--volumes N] [--json]`. A load reads 4 KiB at depth 1 from one volume of a host, without and with a storm: TLS handshakes at the link
 * address and status reads of the control API, so many a second, by another process. In turn with a host that keeps its volumes
 * on the control thread (dataThreads 0), where the storm has to show.
 */

import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { stringify } from 'yaml';
import { runLoad } from '../src/bench/load.js';
import { medianOf } from '../src/bench/statistics.js';
import { ControlClient } from '../src/host/control/client.js';
import { NbdClient } from '../src/nbd/client/client.js';
import { DaemonProcess } from '../test/lab/hosts.js';
import { makePki } from '../test/support/pki.js';

const IMAGE_BYTES = 64 << 20;
const WARMUP_MS = 300;
const TICK_MS = 20;

const { values } = parseArgs({
  options: {
    seconds: { type: 'string', default: '3' },
    rounds: { type: 'string', default: '5' },
    handshakes: { type: 'string', default: '100' },
    pages: { type: 'string', default: '200' },
    volumes: { type: 'string', default: '50' },
    json: { type: 'boolean', default: false },
    /** The storm itself: URI of the link address, path of the control socket. */
    uri: { type: 'string' },
    control: { type: 'string' },
  },
});
const handshakesPerSecond = Number(values.handshakes);
const pagesPerSecond = Number(values.pages);

/** Keeps the pace, and tells each second what was done. Ends with its parent's pipe. */
async function storm(uri: string, control: string): Promise<void> {
  const client = new ControlClient(control);
  const done = { handshakes: 0, pages: 0 };
  const owed = { handshakes: 0, pages: 0 };
  const begun = performance.now();
  const handshake = async (): Promise<void> => {
    const connection = await NbdClient.connect(uri);
    done.handshakes++;
    connection.destroy();
  };
  const page = async (): Promise<void> => {
    await client.status();
    done.pages++;
  };
  const failed = (error: unknown): void => {
    console.error(error);
    process.exit(1);
  };
  const timer = setInterval(() => {
    const seconds = (performance.now() - begun) / 1000;
    // No more at once than a few: who cannot keep up with the storm is not flooded by what is left of it.
    for (
      ;
      owed.handshakes < seconds * handshakesPerSecond && owed.handshakes - done.handshakes < 16;
      owed.handshakes++
    )
      handshake().catch(failed);
    for (; owed.pages < seconds * pagesPerSecond && owed.pages - done.pages < 16; owed.pages++)
      page().catch(failed);
  }, TICK_MS);
  process.stdin.resume();
  await once(process.stdin, 'end');
  clearInterval(timer);
  const seconds = (performance.now() - begun) / 1000;
  console.log(JSON.stringify({ handshakes: done.handshakes / seconds, pages: done.pages / seconds }));
  process.exit(0);
}

interface Host {
  threads: number;
  daemon: DaemonProcess;
  guestUri: string;
  linkUri: string;
  control: string;
}

async function startHost(folder: string, threads: number, pki: { good: string }): Promise<Host> {
  mkdirSync(folder);
  const control = join(folder, 'c.sock');
  const volumes = Array.from({ length: Number(values.volumes) }, (_, index) => {
    const image = join(folder, `${index}.img`);
    writeFileSync(image, index === 0 ? Buffer.alloc(IMAGE_BYTES, 1) : Buffer.alloc(4096));
    return { name: `v${index}`, image };
  });
  const config = join(folder, 'host.yaml');
  const tls = { mode: 'required', certificates: pki.good };
  const places = { stateDir: join(folder, 's'), run: join(folder, 'r'), control };
  writeFileSync(config, stringify({ name: 'storm', ...places, tls, dataThreads: threads, volumes }));
  const daemon = await DaemonProcess.start(['host', '--config', config]);
  const client = new ControlClient(control);
  const {
    daemon: { linkUri },
  } = await client.status();
  client.close();
  return {
    threads,
    daemon,
    control,
    guestUri: `nbd+unix:///v0?socket=${join(folder, 'r', 'nbd', 'v0.sock')}`,
    linkUri: `${linkUri}v1?tls-certificates=${pki.good}`,
  };
}

interface Sample {
  p50Us: number;
  p99Us: number;
  p999Us: number;
  maxUs: number;
  handshakes: number;
  pages: number;
}

async function measure(host: Host, stormy: boolean): Promise<Sample> {
  let child: ChildProcess | null = null;
  let closed: Promise<unknown> = Promise.resolve();
  let said = '';
  if (stormy) {
    const own = ['--handshakes', values.handshakes, '--pages', values.pages];
    const words = [fileURLToPath(import.meta.url), '--uri', host.linkUri, '--control', host.control, ...own];
    child = spawn(process.execPath, words, { stdio: ['pipe', 'pipe', 'inherit'] });
    closed = once(child, 'close');
    child.stdout!.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
  }
  const durationMs = Number(values.seconds) * 1000;
  const { latencyNs } = await runLoad(host.guestUri, { depth: 1, warmupMs: WARMUP_MS, durationMs });
  child?.stdin?.end();
  await closed;
  const rates =
    said === '' ? { handshakes: 0, pages: 0 } : (JSON.parse(said) as Pick<Sample, 'handshakes' | 'pages'>);
  return {
    p50Us: latencyNs.p50 / 1000,
    p99Us: latencyNs.p99 / 1000,
    p999Us: latencyNs.p999 / 1000,
    maxUs: latencyNs.max / 1000,
    ...rates,
  };
}

async function main(): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'bfs-'));
  const pki = makePki();
  const hosts: Host[] = [];
  try {
    for (const threads of [1, 0]) hosts.push(await startHost(join(folder, String(threads)), threads, pki));
    const samples = new Map<string, Sample[]>();
    for (let round = 0; round < Number(values.rounds); round++) {
      for (const host of hosts) {
        for (const stormy of [false, true]) {
          const name = `dataThreads ${host.threads}, ${stormy ? 'storm' : 'quiet'}`;
          samples.set(name, [...(samples.get(name) ?? []), await measure(host, stormy)]);
        }
      }
    }
    const result = Object.fromEntries(
      [...samples].map(([name, all]) => {
        const of = (key: keyof Sample) => Math.round(medianOf(all.map((sample) => sample[key])));
        const rates = { handshakesPerSecond: of('handshakes'), pagesPerSecond: of('pages') };
        return [
          name,
          { p50Us: of('p50Us'), p99Us: of('p99Us'), p999Us: of('p999Us'), maxUs: of('maxUs'), ...rates },
        ];
      }),
    );
    if (values.json) console.log(JSON.stringify(result));
    else console.table(result);
  } finally {
    for (const { daemon } of hosts) await daemon.stop();
    pki.remove();
    rmSync(folder, { recursive: true, force: true });
  }
}

if (values.uri !== undefined && values.control !== undefined) await storm(values.uri, values.control);
else await main();
