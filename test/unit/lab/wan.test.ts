/** What the WAN lab promises, in terms that hold however busy the machine is: never earlier, never faster, and every packet counted. */

import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { type TestContext, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import type { Count, DirectionStats, LinkStats } from '../../lab/wan/link.js';
import { inNamespace, ip, isRunning, labNamespaces, runTool } from '../../lab/wan/namespace.js';
import { Peer } from '../../lab/wan/peer.js';
import { type WanHost, WanLab, type WanOptions, wanMissing } from '../../lab/wan.js';

const skip = (await wanMissing()) ?? false;
const POLL_MS = 5;
const MBIT = 1e6;
/** Ends waiting that would never end; nothing is measured by it. */
const timeout = 60_000;

async function open(t: TestContext, options: WanOptions): Promise<WanLab> {
  const lab = await WanLab.create(options);
  t.after(() => lab.close());
  return lab;
}

function peer(t: TestContext, host: WanHost, ...words: (string | number)[]): Peer {
  const started = Peer.start(host, ...words);
  t.after(() => started.stop());
  return started;
}

/** A server on B and, if `send`, a connection on which A sends without end. */
async function traffic(t: TestContext, lab: WanLab, send = true): Promise<{ server: Peer; port: number }> {
  const server = peer(t, lab.b, 'serve', lab.b.address);
  const port = await server.port();
  if (send) peer(t, lab.a, 'send', lab.b.address, port);
  return { server, port };
}

/** Looks at the counters until they are so. */
async function until(lab: WanLab, so: (stats: LinkStats) => boolean): Promise<LinkStats> {
  for (;;) {
    const stats = await lab.stats();
    if (so(stats)) return stats;
    await delay(POLL_MS);
  }
}

function assertAddsUp({ aToB, bToA }: LinkStats): void {
  for (const way of [aToB, bToA]) {
    const parts: (keyof DirectionStats)[] = [
      'delivered',
      'dropped',
      'lost',
      'cut',
      'overflow',
      'refused',
      'onLine',
    ];
    for (const unit of ['packets', 'bytes'] as const) {
      const sum = parts.reduce((total, part) => total + (way[part] as Count)[unit], 0);
      assert.equal(sum, way.read[unit], `${unit} in ${JSON.stringify(way)}`);
    }
    assert.equal(way.overflow.packets + way.refused.packets, 0, JSON.stringify(way));
  }
}

test('a round trip is never below the one that is set, also after a change', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 20, rateBitsPerSecond: 100 * MBIT });
  const { port } = await traffic(t, lab, false);
  for (const rttMs of [20, 35, 0]) {
    await lab.set({ rttMs });
    const line = await peer(t, lab.a, 'ping', lab.b.address, port, 20).line((text) => text.startsWith('['));
    const times = JSON.parse(line) as number[];
    assert.equal(times.length, 20);
    assert.ok(Math.min(...times) >= rttMs, `${Math.min(...times)} ms at ${rttMs} ms`);
  }
  assertAddsUp(await lab.stats());
});

for (const [offload, rate] of [
  [false, 20 * MBIT],
  [true, 400 * MBIT],
] as const) {
  test(`goodput is never above the rate (${rate / MBIT} Mbit/s, offload ${offload})`, {
    skip,
    timeout,
  }, async (t) => {
    const lab = await open(t, { rttMs: 4, rateBitsPerSecond: rate, queueMs: 20, offload });
    const server = peer(t, lab.b, 'serve', lab.b.address);
    const port = await server.port();
    const start = performance.now();
    for (let i = 0; i < 4; i++) peer(t, lab.a, 'send', lab.b.address, port);
    await server.received(rate / 8);
    const bits = server.bytes * 8;
    const seconds = (performance.now() - start) / 1000;
    assert.ok(bits / seconds <= rate, `${bits / seconds} bit/s`);
    const stats = await lab.stats();
    assertAddsUp(stats);
    assert.ok(stats.aToB.delivered.bytes > server.bytes, 'packets have headers');
    assert.ok(stats.aToB.queueMaxNs <= 20e6, `${stats.aToB.queueMaxNs} ns in the queue`);
    t.diagnostic(`${(bits / seconds / MBIT).toFixed(1)} Mbit/s with the programs' start`);
  });
}

test('a queue that is overfull drops; nothing waits longer than it is long', { skip, timeout }, async (t) => {
  // 200 packets of a second each: no machine is so slow that the queue of four keeps up.
  const lab = await open(t, { rttMs: 0, rateBitsPerSecond: 8000, queueMs: 4000 });
  await peer(t, lab.a, 'datagrams', lab.b.address, 200, 1000 - 28).ended;
  const { aToB } = await until(lab, ({ aToB: way }) => way.read.packets === 200);
  assert.equal(aToB.read.bytes, 200_000);
  assert.ok(aToB.dropped.packets > 100, JSON.stringify(aToB));
  assert.ok(aToB.queueMaxNs > 0 && aToB.queueMaxNs <= 4e9, JSON.stringify(aToB));
  assertAddsUp(await lab.stats());
});

test('what the devices sent is what the link read', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 2, rateBitsPerSecond: 200 * MBIT, lossPercent: 2 });
  const { port } = await traffic(t, lab, false);
  await peer(t, lab.a, 'ping', lab.b.address, port, 20).ended;
  const count = 500;
  await peer(t, lab.b, 'datagrams', lab.a.address, count, 500).ended;
  const { aToB, bToA } = await until(lab, (stats) => stats.bToA.read.packets >= count + 20);
  for (const [host, way] of [
    [lab.a, aToB],
    [lab.b, bToA],
  ] as const) {
    const view = JSON.parse(await ip(['-n', host.namespace, '-j', '-s', 'link', 'show', 'dev', 'wan0']));
    const { packets, bytes, dropped } = view[0].stats64.tx;
    assert.ok(packets >= way.read.packets && bytes >= way.read.bytes, JSON.stringify([view, way]));
    assert.equal(dropped, 0);
  }
});

test('loss follows from the seed', { skip, timeout }, async (t) => {
  const count = 1000;
  const lost: number[] = [];
  for (const seed of [7, 7, 8]) {
    const lab = await open(t, {
      rttMs: 0,
      rateBitsPerSecond: 100 * MBIT,
      queueMs: 1500,
      lossPercent: 10,
      seed,
    });
    await peer(t, lab.a, 'datagrams', lab.b.address, count, 100).ended;
    const stats = await until(lab, ({ aToB: way }) => way.read.packets === count);
    assert.equal(stats.aToB.dropped.packets, 0);
    assertAddsUp(stats);
    lost.push(stats.aToB.lost.packets);
    await lab.close();
  }
  assert.equal(lost[0], lost[1], 'the same packets');
  assert.ok(
    lost.every((packets) => packets > 50 && packets < 200),
    `${lost} of ${count} lost`,
  );
});

test('TCP gets through loss', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 2, rateBitsPerSecond: 50 * MBIT, lossPercent: 2 });
  const { server } = await traffic(t, lab);
  await server.received(1_000_000);
  const { aToB } = await lab.stats();
  assert.ok(aToB.lost.packets > 0, JSON.stringify(aToB));
});

test('a cut stops everything; after a restore the same connection goes on', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 10, rateBitsPerSecond: 20 * MBIT });
  const { server } = await traffic(t, lab);
  await server.received(500_000);
  await lab.cut();
  const before = await lab.stats();
  assert.equal(before.aToB.onLine.packets + before.bToA.onLine.packets, 0);
  // It retransmits into the cut.
  const during = await until(lab, ({ aToB }) => aToB.cut.packets > before.aToB.cut.packets + 1);
  assert.deepEqual(
    [during.aToB.delivered, during.bToA.delivered],
    [before.aToB.delivered, before.bToA.delivered],
  );
  const { bytes } = server;
  await lab.restore();
  await server.received(bytes + 500_000);
  assertAddsUp(await lab.stats());
});

test('settings that cannot be are refused, and change nothing', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 10, rateBitsPerSecond: 10 * MBIT });
  const before = lab.settings;
  await assert.rejects(lab.set({ rateBitsPerSecond: 0 }), /rate/);
  await assert.rejects(lab.set({ lossPercent: 101 }), /loss/);
  await assert.rejects(lab.set({ rateBitsPerSecond: 50e9, rttMs: 1000 }), /64 MiB/);
  await assert.rejects(lab.set({ rttMs: -1 }), /below 0/);
  assert.deepEqual(lab.settings, before);
});

test('the congestion control is the one that was asked for', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 1, rateBitsPerSecond: 10 * MBIT, congestionControl: 'reno' });
  const { server } = await traffic(t, lab);
  await server.received(10_000);
  const [program, ...words] = inNamespace(lab.a.namespace, ['ss', '-tinH', 'dst', lab.b.address]);
  assert.match(await runTool(program!, words), /reno/);
});

test('close leaves no namespace and no process', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 1, rateBitsPerSecond: 10 * MBIT });
  const { server } = await traffic(t, lab);
  await server.received(10_000);
  assert.ok(labNamespaces(process.pid).includes(lab.a.namespace));
  await lab.close();
  await lab.close();
  assert.deepEqual(labNamespaces(process.pid), []);
  assert.ok(!isRunning(lab.link.pid));
  await server.ended; // it ran inside, and was not stopped by us
});

test('a lab that cannot be made leaves nothing', { skip, timeout }, async () => {
  const options = { rttMs: 1, rateBitsPerSecond: 10 * MBIT };
  await assert.rejects(WanLab.create({ ...options, congestionControl: 'none-such' }), /congestion/i);
  await assert.rejects(WanLab.create({ ...options, lossPercent: 200 }), /loss/);
  assert.deepEqual(labNamespaces(process.pid), []);
});

test('a link that dies is told to whoever asks', { skip, timeout }, async (t) => {
  const lab = await open(t, { rttMs: 1, rateBitsPerSecond: 10 * MBIT });
  lab.link.child.kill('SIGKILL');
  await assert.rejects(async () => {
    for (;;) await lab.stats();
  }, /SIGKILL/);
});

test('nothing runs on when the process of a lab is killed, and the next lab removes the rest', {
  skip,
  timeout,
}, async (t) => {
  const module = (name: string): string => new URL(`../../lab/${name}`, import.meta.url).href;
  const program = `
    import { WanLab } from '${module('wan.js')}';
    import { Peer } from '${module('wan/peer.js')}';
    const lab = await WanLab.create({ rttMs: 1, rateBitsPerSecond: 1e7 });
    const peer = Peer.start(lab.b, 'serve', lab.b.address);
    await peer.port();
    console.log(JSON.stringify([lab.link.pid, peer.child.pid]));`;
  const owner = spawn(process.execPath, ['--input-type=module', '-e', program], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  t.after(() => owner.kill('SIGKILL'));
  const [line] = await once(createInterface({ input: owner.stdout }), 'line');
  assert.equal(labNamespaces(owner.pid).length, 2);
  owner.kill('SIGKILL');
  await once(owner, 'exit');
  for (const pid of JSON.parse(line as string)) {
    while (isRunning(pid)) await delay(POLL_MS);
  }
  await open(t, { rttMs: 1, rateBitsPerSecond: 10 * MBIT });
  assert.deepEqual(labNamespaces(owner.pid), []);
});
