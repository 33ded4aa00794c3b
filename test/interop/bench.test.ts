// The load generator counts truthfully, sees a server that lies, and says in one line what a server did wrong.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { runLoad } from '../../src/bench/load.js';
import { report } from '../../src/bench/report.js';
import { Command, TransmissionFlag } from '../../src/nbd/constants.js';
import { against, failure } from '../fakes/against.js';
import { type FakePeer, type FakeRequest, simpleReply } from '../fakes/fake-server.js';
import { runBlockferry } from '../lab/hosts.js';
import { serverOn } from '../lab/programs.js';
import { startPeer } from './servers.js';
import { needs } from './tools.js';

const BLOCK = 4096;
const BLOCKS = 256;

/** "read: 12 ops, 0.1 s, 48.00 KiB, ..." of nbdkit's stats filter. */
function countedBy(file: string, kind: string): number {
  return Number(new RegExp(`^${kind}: (\\d+) ops`, 'm').exec(readFileSync(file, 'utf8'))?.[1] ?? 0);
}

describe('what the load counts', needs('nbdkit'), () => {
  for (const [name, options] of [
    ['by time, with a warm-up', { warmupMs: 50, durationMs: 150, readPercent: 70, flushEvery: 8 }],
    ['by count', { durationMs: 0, count: 5000, readPercent: 50, flushEvery: 32 }],
    ['by lap', { durationMs: 0, lap: true, order: 'shuffled', connections: 3 }],
    [
      'verified, with structured replies',
      { durationMs: 100, readPercent: 50, verify: true, structured: true, depth: 4 },
    ],
  ] as const) {
    test(`is what the server counts: ${name}`, async () => {
      const folder = mkdtempSync(join(tmpdir(), 'blockferry-bench-'));
      const [socket, stats] = [join(folder, 'nbd.sock'), join(folder, 'stats')];
      const memory = ['memory', '16M', `statsfile=${stats}`];
      const server = await serverOn(socket, 'nbdkit', '-f', '-U', socket, '--filter=stats', ...memory);
      try {
        const uri = `nbd+unix:///?socket=${socket}`;
        const result = await runLoad(uri, { depth: 16, connections: 2, ...options });
        // It writes its counts when it ends.
        const ended = once(server.process, 'exit');
        server.process.kill('SIGTERM');
        await ended;
        const readBack = result.verifiedReads > 0 ? result.verifiedReads : result.totalReads;
        assert.equal(countedBy(stats, 'read'), readBack);
        assert.equal(countedBy(stats, 'write'), result.totalWrites);
        assert.equal(countedBy(stats, 'flush'), result.totalFlushes);
        assert.equal(result.bytes, (result.reads + result.writes) * BLOCK);
        assert.equal(result.latencyNs.count, result.reads + result.writes);
        assert.ok(result.reads <= result.totalReads && result.writes <= result.totalWrites);
        if ('count' in options) assert.equal(result.reads + result.writes, options.count);
        if ('lap' in options) assert.equal(result.reads, (16 << 20) / BLOCK);
      } finally {
        await server.stop();
        rmSync(folder, { recursive: true });
      }
    });
  }
});

/** A server of a small disk in memory, whose answer to a READ is what `lie` makes of it. */
function serving(
  lie: (content: Buffer, request: FakeRequest, disk: Buffer) => Buffer,
  keep: (request: FakeRequest, writes: number) => boolean = () => true,
): (peer: FakePeer) => Promise<void> {
  return async (peer) => {
    await peer.handshake({ size: BigInt(BLOCK * BLOCKS) });
    const disk = Buffer.alloc(BLOCK * BLOCKS);
    const writes = new Map<number, number>();
    for (;;) {
      const request = await peer.request();
      const { command, cookie, offset, length } = request;
      if (command === Command.DISC) return peer.hangUp();
      if (command === Command.WRITE) {
        const payload = await peer.read(length);
        const times = (writes.get(offset) ?? 0) + 1;
        writes.set(offset, times);
        if (keep(request, times)) payload.copy(disk, offset);
        peer.send(simpleReply(cookie));
      } else {
        const content = Buffer.from(disk.subarray(offset, offset + length));
        peer.send(simpleReply(cookie, 0, lie(content, request, disk)));
      }
    }
  };
}

const VERIFY = { verify: true, readPercent: 50, depth: 4, durationMs: 0, count: 2000 };

describe('verification', () => {
  test('an honest server passes', () =>
    against(
      serving((content) => content),
      async (uri) => {
        const result = await runLoad(uri, VERIFY);
        assert.equal(result.reads + result.writes, VERIFY.count);
        // Those of the load, and every block at the end.
        assert.ok(result.verifiedReads > result.reads);
      },
    ));

  for (const [name, server, why] of [
    [
      'forgets a write',
      serving(
        (content) => content,
        ({ offset }) => offset !== 3 * BLOCK,
      ),
      /gave zeros at offset 12288,/,
    ],
    [
      'keeps the first write of a block only',
      serving(
        (content) => content,
        (_, times) => times === 1,
      ),
      /gave older data at offset \d+,.* was written \d+ times/,
    ],
    [
      'gives the block beside it',
      serving((content, { offset, length }, disk) => {
        const other = (offset + BLOCK) % disk.length;
        return content.length === 0 ? content : Buffer.from(disk.subarray(other, other + length));
      }),
      /gave (other data|zeros) at offset/,
    ],
    [
      'changes one bit',
      serving((content) => {
        content[4095] ^= 1;
        return content;
      }),
      /gave other data at offset \d+,/,
    ],
  ] as const) {
    test(`a server that ${name} is found out`, () =>
      against(server, (uri) => assert.rejects(runLoad(uri, VERIFY), failure('bench', why))));
  }

  test('several connections need the promise that they see the same', () =>
    against(
      serving((content) => content),
      (uri) =>
        assert.rejects(runLoad(uri, { ...VERIFY, connections: 2 }), failure('bench', /CAN_MULTI_CONN/)),
    ));
});

describe('a server that fails', () => {
  const answering = (answer: (peer: FakePeer, request: FakeRequest) => void) => async (peer: FakePeer) => {
    await peer.handshake({ size: BigInt(BLOCK * BLOCKS) });
    for (;;) answer(peer, await peer.request());
  };
  for (const [name, script, why] of [
    [
      'answers with an error',
      answering((peer, { cookie }) => peer.send(simpleReply(cookie, 5))),
      /^READ of 4096 bytes at offset \d+ failed: Input\/output error/,
    ],
    [
      'hangs up',
      async (peer: FakePeer) => {
        await peer.handshake({ size: BigInt(BLOCK * BLOCKS) });
        await peer.request();
        peer.hangUp();
      },
      /^the server closed the connection with 16 requests under way|broke/,
    ],
    [
      'says nothing',
      answering(() => undefined),
      /^the server does not answer: 16 requests under way for 200 ms/,
    ],
    [
      'answers what was not asked',
      answering((peer) => peer.send(simpleReply(0x777n))),
      /^the server broke the NBD protocol: a reply to a request that is not under way/,
    ],
    [
      'sends no replies',
      answering((peer) => peer.send(Buffer.alloc(64, 7))),
      /^the server broke the NBD protocol: what it sent is no reply/,
    ],
    [
      'is none',
      async (peer: FakePeer) => peer.send(Buffer.from('220 mail.example ESMTP')),
      /^what listens there is no NBD server/,
    ],
  ] as const) {
    test(name, () =>
      against(script, (uri) => assert.rejects(runLoad(uri, { timeoutMs: 200 }), failure('bench', why))),
    );
  }

  test('a load that would write to a read-only export', () =>
    against(
      (peer) => peer.handshake({ flags: TransmissionFlag.HAS_FLAGS | TransmissionFlag.READ_ONLY }),
      (uri) => assert.rejects(runLoad(uri, { readPercent: 0 }), failure('bench', /read-only/)),
    ));
});

describe('blockferry bench', needs('nbdkit'), () => {
  async function withMemory(scenario: (uri: string) => Promise<void>): Promise<void> {
    const server = await startPeer((_, socket) => ['nbdkit', '-f', '-U', socket, 'memory', '16M']);
    try {
      await scenario(server.uri);
    } finally {
      await server.stop();
    }
  }

  test('loads a server and says how it did', () =>
    withMemory(async (uri) => {
      const told = await runBlockferry(['bench', uri, '--count', '1000', '--depth', '4']);
      assert.equal(told.code, 0, told.stderr);
      assert.match(told.stdout, /^1000 operations of 4096 bytes in .* s: random, depth 4, 1 connection$/m);
      assert.match(told.stdout, /^reads .* MiB\/s /m);
      const json = await runBlockferry([
        'bench',
        uri,
        '--count',
        '1000',
        '--write',
        '--reads',
        '30',
        '--json',
      ]);
      const { reads, writes } = JSON.parse(json.stdout) as { reads: number; writes: number };
      assert.equal(reads + writes, 1000);
      assert.ok(writes > reads && reads > 0);
      const verified = await runBlockferry(['bench', uri, '--count', '1000', '--write', '--verify']);
      assert.match(verified.stdout, /^verified: \d+ reads, and every block that was written$/m);
    }));

  test('writes only when told to', () =>
    withMemory(async (uri) => {
      for (const words of [['--verify'], ['--reads', '70'], ['--flush-every', '8']]) {
        const { code, stderr } = await runBlockferry(['bench', uri, ...words]);
        assert.equal(code, 2);
        assert.match(stderr, /^blockferry: --\S+ is for a load that writes, and destroys .*\n$/);
      }
    }));

  test('a server that is not there', async () => {
    const { code, stderr } = await runBlockferry(['bench', 'nbd+unix:///?socket=/nowhere/nbd.sock']);
    assert.equal(code, 1);
    assert.match(stderr, /^blockferry: cannot connect to \/nowhere\/nbd\.sock: No such file or directory\n$/);
  });

  test('wrong words', async () => {
    const uri = 'nbd://localhost/';
    for (const words of [
      [],
      [uri, '--compare'],
      [uri, '--depth', '0'],
      [uri, '--block', '99M'],
      ['--compare', '--only', 'x'],
    ]) {
      const { code, stderr } = await runBlockferry(['bench', ...words]);
      assert.equal(code, 2, words.join(' '));
      assert.match(stderr, /^blockferry: .*\n$/);
    }
  });

  test('compares servers, cell by cell and round by round', async () => {
    const only = ['--only', 'mixed 4k d1 c4 unix tmpfs', '--only', 'read 64k d8 tcp tmpfs'];
    const size = ['--rounds', '2', '--seconds', '0.1', '--warm-up', '0.05', '--image', '8M'];
    const { code, stdout, stderr } = await runBlockferry(['bench', '--compare', '--json', ...only, ...size]);
    assert.equal(code, 0, stderr);
    const found = report.parse(JSON.parse(stdout));
    assert.deepEqual(
      found.cells.map(({ name }) => name),
      ['mixed 4k random d1 c4 unix tmpfs', 'read 64k seq d8 c1 tcp tmpfs'],
    );
    const there = found.servers.map(({ name }) => name);
    for (const name of ['blockferry', 'blockferry proxy, handed off', 'nbdkit file'])
      assert.ok(there.includes(name));
    for (const { samples } of found.cells)
      for (const name of there) {
        assert.deepEqual(
          samples[name].map(({ round }) => round),
          [0, 1],
          name,
        );
        for (const sample of samples[name]) assert.ok(sample.opsPerSecond > 0 && sample.peakBytes > 0, name);
      }
  });
});
