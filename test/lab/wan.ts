/**
 * Two hosts and a WAN on one machine: two network namespaces, joined by a link (wan/link.c) with a set round trip, rate, queue and loss.
 * Programs run inside a namespace by `words`; ports are the namespace's own, unix sockets cross by the file system.
 *
 * Whatever a lab made goes with close(), also when it could not be made completely: the link process, with it the devices, then the
 * namespaces and what still runs in them. What a killed process left goes when the next lab is made.
 */

import { closeSync, openSync, readFileSync } from 'node:fs';
import { Link, type LinkSettings, type LinkStats } from './wan/link.js';
import {
  inNamespace,
  ip,
  namespaceNames,
  removeNamespace,
  removeStaleNamespaces,
  runTool,
} from './wan/namespace.js';

const TUN = '/dev/net/tun';
const DEVICE = 'wan0';
/** For benchmarks (RFC 2544). All labs have the same: they do not see each other. */
const ADDRESSES = ['198.18.0.1', '198.18.0.2'] as const;
/** Packets that wait for the link process; its own queue is the one that counts. */
const DEVICE_QUEUE_PACKETS = 5_000;
/** Above this rate single packets cost more processor time than the hosts should lose to the lab. */
const OFFLOAD_RATE_MIN = 400e6;
const QUEUE_MS_MIN = 20;
/** A window of 32 MiB: the default caps 50 ms at 1 Gbit/s. Metrics of ended connections would make runs depend on each other. */
const SYSCTLS = [
  ['net/ipv4/tcp_wmem', '4096 65536 33554432'],
  ['net/ipv4/tcp_rmem', '4096 65536 33554432'],
  ['net/ipv4/tcp_no_metrics_save', '1'],
] as const;

export interface WanHost {
  readonly namespace: string;
  readonly address: string;
}

export interface WanOptions extends Pick<LinkSettings, 'rttMs' | 'rateBitsPerSecond'> {
  /** Default: the round trip, at least 20. */
  queueMs?: number;
  lossPercent?: number;
  /** Says which packets are lost. */
  seed?: number;
  /** Of TCP between the hosts; default cubic where the kernel has it, whatever its own default. */
  congestionControl?: string;
  /** TCP segments of up to 64 KiB pass the link as one; default from 400 Mbit/s on, unless there is loss. */
  offload?: boolean;
}

/** What is missing on this machine for a WAN lab, in one line; null if nothing is. */
export async function wanMissing(): Promise<string | null> {
  if (process.getuid?.() !== 0) return 'the WAN lab needs root: network namespaces and TUN devices';
  try {
    closeSync(openSync(TUN, 'r+'));
  } catch (error) {
    return `${TUN} cannot be opened (${(error as NodeJS.ErrnoException).code})`;
  }
  for (const [what, program, ...words] of [
    ['iproute2 is not installed', 'ip', '-V'],
    ['gcc is not installed', 'gcc', '--version'],
    ['no network namespace can be made here', 'unshare', '--net', 'true'],
  ] as const) {
    const failed = await runTool(program, words).then(
      () => false,
      () => true,
    );
    if (failed) return what;
  }
  return null;
}

/** The command that runs `words` on a host of a WAN lab. It becomes that program: signals and PDEATHSIG reach it. */
export function words(host: WanHost, program: readonly string[]): string[] {
  return inNamespace(host.namespace, program);
}

export class WanLab {
  #settings: LinkSettings;

  private constructor(
    readonly a: WanHost,
    readonly b: WanHost,
    readonly congestionControl: string,
    readonly offload: boolean,
    settings: LinkSettings,
    readonly link: Link,
  ) {
    this.#settings = settings;
  }

  static async create(options: WanOptions): Promise<WanLab> {
    await removeStaleNamespaces();
    const { rttMs, rateBitsPerSecond, lossPercent = 0, seed = 1 } = options;
    const queueMs = options.queueMs ?? Math.max(rttMs, QUEUE_MS_MIN);
    const settings = { rttMs, rateBitsPerSecond, queueMs, lossPercent };
    const offload = options.offload ?? (rateBitsPerSecond >= OFFLOAD_RATE_MIN && lossPercent === 0);
    const congestionControl = options.congestionControl ?? defaultCongestionControl();
    const namespaces = namespaceNames();
    let link: Link | undefined;
    try {
      for (const namespace of namespaces) {
        await ip(['netns', 'add', namespace]);
        await prepare(namespace);
      }
      link = await Link.start({ namespaces, device: DEVICE, offload, seed, settings });
      await connect(namespaces[0], ADDRESSES[0], ADDRESSES[1], congestionControl);
      await connect(namespaces[1], ADDRESSES[1], ADDRESSES[0], congestionControl);
    } catch (error) {
      await dismantle(link, namespaces).catch(() => {}); // why it was not made says more
      throw error;
    }
    const [a, b] = ADDRESSES.map((address, i) => ({ namespace: namespaces[i]!, address }));
    return new WanLab(a!, b!, congestionControl, offload, settings, link);
  }

  get settings(): Readonly<LinkSettings> {
    return this.#settings;
  }

  /** For packets that are sent from now on; those on the line arrive as they would have, and never overtake. */
  async set(change: Partial<LinkSettings>): Promise<void> {
    const settings = { ...this.#settings, ...change };
    await this.link.set(settings);
    this.#settings = settings;
  }

  /** Cuts the line: what is on it is lost, and when this resolves nothing arrives any more. */
  cut(): Promise<void> {
    return this.link.cut();
  }

  restore(): Promise<void> {
    return this.link.restore();
  }

  /** Counters of both directions since the lab was made. */
  stats(): Promise<LinkStats> {
    return this.link.stats();
  }

  /** May be called again. */
  close(): Promise<void> {
    return dismantle(this.link, [this.a.namespace, this.b.namespace]);
  }
}

async function dismantle(link: Link | undefined, namespaces: readonly string[]): Promise<void> {
  await link?.stop();
  const ends = await Promise.allSettled(namespaces.map(removeNamespace));
  for (const end of ends) if (end.status === 'rejected') throw end.reason;
}

function defaultCongestionControl(): string {
  const read = (name: string): string => readFileSync(`/proc/sys/net/ipv4/${name}`, 'utf8').trim();
  const available = read('tcp_available_congestion_control').split(' ');
  return available.includes('cubic') ? 'cubic' : read('tcp_congestion_control');
}

/** What must be set before the namespace has its device. */
async function prepare(namespace: string): Promise<void> {
  const lines = SYSCTLS.map(([path, value]) => `echo '${value}' >/proc/sys/${path}`);
  // Else the kernel sends packets of its own, which nobody counts on. It may have no IPv6 at all.
  lines.push('ipv6=/proc/sys/net/ipv6/conf/default/disable_ipv6; [ ! -e $ipv6 ] || echo 1 >$ipv6');
  const [program, ...rest] = inNamespace(namespace, ['sh', '-e', '-c', lines.join('\n')]);
  await runTool(program!, rest);
  await ip(['-n', namespace, 'link', 'set', 'lo', 'up']);
}

/**
 * The congestion control goes by the route: a namespace's sysctl takes only those that the machine's administrator allows to
 * everybody.
 */
async function connect(
  namespace: string,
  address: string,
  peer: string,
  congestionControl: string,
): Promise<void> {
  const lines = [
    `link set ${DEVICE} txqueuelen ${DEVICE_QUEUE_PACKETS} up`,
    `addr add ${address} peer ${peer} dev ${DEVICE}`,
    `route replace ${peer} dev ${DEVICE} congctl ${congestionControl}`,
  ];
  await ip(['-n', namespace, '-batch', '-'], `${lines.join('\n')}\n`);
}
