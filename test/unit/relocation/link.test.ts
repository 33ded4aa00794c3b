/** The link: connections, their loss, and what is sent again. */
import assert from 'node:assert/strict';
import net from 'node:net';
import { join } from 'node:path';
import { test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { DROPPED, type Link } from '../../../src/relocation/link.js';
import { describeVolume, probeSource } from '../../../src/relocation/source-identity.js';
import { dataChunk, startFakeServer } from '../../fakes/fake-server.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import { assertBlocks, BLOCK, isSettled, KIB, Lab, MIB, pattern, quiet, until } from '../../lab/ferry.js';

const DATA = pattern(MIB);

function read(link: Link, lane: 'demand' | 'bulk', offset: number, length: number): Promise<Buffer> {
  const buffer = Buffer.alloc(length + 7);
  return link.read(lane, offset, length, buffer, 7).then(() => buffer.subarray(7));
}

function code(wanted: string) {
  return (error: unknown): boolean => error instanceof BlockferryError && error.code === wanted;
}

test('demand and bulk have connections of their own where the source allows several', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const devices = Array.from({ length: 4 }, () => new MemoryDevice(MIB));
  source.deviceOf = (connection) => devices[connection]!;
  const link = lab.link(source);
  await until(() => source.connections === 3, 'three connections');
  await until(() => link.lanesApart, 'lanes apart');
  await quiet();
  for (let i = 0; i < 8; i++) {
    await read(link, 'demand', i * BLOCK, BLOCK);
    await read(link, 'bulk', (10 + i) * BLOCK, BLOCK);
  }
  const offsets = devices.map(({ calls }) => calls.map(({ offset }) => offset / BLOCK));
  assert.deepEqual(offsets[0], [0, 1, 2, 3, 4, 5, 6, 7]);
  assert.deepEqual([...offsets[1]!, ...offsets[2]!].sort(), [10, 11, 12, 13, 14, 15, 16, 17]);
  assert.ok(offsets[1]!.length > 0 && offsets[2]!.length > 0, 'bulk uses both of its connections');
});

test('one connection serves both lanes where the source allows no more', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB, { multiConn: false });
  const link = lab.link(source);
  assertBlocks(await read(link, 'bulk', 0, MIB), DATA);
  assertBlocks(await read(link, 'demand', BLOCK, BLOCK), DATA.subarray(BLOCK, 2 * BLOCK));
  assert.equal(source.accepted, 1);
  assert.equal(link.lanesApart, false);
});

test('what was pending is sent again over a new connection, and answered once', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source);
  await until(() => link.lanesApart, 'lanes apart');
  source.hold();
  const reads = [read(link, 'demand', 0, BLOCK), read(link, 'bulk', 64 * KIB, 256 * KIB)];
  await until(() => source.held === 2, 'both are at the source');
  for (let round = 0; round < 3; round++) {
    const { accepted } = source;
    source.cut();
    source.device.completeHeld();
    await until(() => source.accepted > accepted && source.held === 2, 'both are sent again');
  }
  assert.equal(await isSettled(Promise.any(reads)), false);
  source.release();
  const [first, second] = await Promise.all(reads);
  assertBlocks(first!, DATA.subarray(0, BLOCK));
  assertBlocks(second!, DATA.subarray(64 * KIB, 320 * KIB));
});

test('a source that shuts down in order is waited for like one that died', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source);
  await until(() => link.lanesApart, 'lanes apart');
  source.hold();
  const held = read(link, 'demand', 0, BLOCK);
  await until(() => source.held === 1, 'one request is at the source');
  const closing = source.close();
  // Answered with ESHUTDOWN, as the session still waits for the first request.
  const refused = read(link, 'demand', BLOCK, BLOCK);
  await closing;
  source.release();
  await until(() => link.state === 'lost', 'the loss is noticed');
  assert.equal(await isSettled(refused), false);
  await source.start();
  assertBlocks(await refused, DATA.subarray(BLOCK, 2 * BLOCK));
  assertBlocks(await held, DATA.subarray(0, BLOCK));
});

test('attempts to connect come further and further apart, up to a limit', async (t) => {
  const lab = new Lab(t);
  const path = join(lab.dir, 'refuses');
  const times: number[] = [];
  const server = net.createServer((socket) => {
    times.push(performance.now());
    socket.on('error', () => {}).destroy();
  });
  await new Promise<void>((resolve) => server.listen(path, resolve));
  lab.onClose(() => new Promise((resolve) => server.close(resolve)));
  const link = lab.link(`nbd+unix:///?socket=${path}`, {
    timing: { backoffMsMin: 20, backoffMsMax: 160 },
  });
  await until(() => times.length >= 7, 'seven attempts');
  for (let i = 1; i < 7; i++) {
    const least = 0.75 * Math.min(160, 20 * 2 ** (i - 1)) - 2;
    assert.ok(
      times[i]! - times[i - 1]! >= least,
      `gap ${i} is ${times[i]! - times[i - 1]!} ms, under ${least}`,
    );
  }
  assert.equal(link.state, 'connecting');
  assert.match(link.error!, /refuses/);
});

for (const { what, change, back } of [
  {
    what: 'another size',
    change: (source: { device: MemoryDevice }) => {
      source.device = new MemoryDevice(2 * MIB);
    },
    back: (source: { device: MemoryDevice }, device: MemoryDevice) => {
      source.device = device;
    },
  },
  {
    what: 'another volume',
    change: (source: { description: string }) => {
      source.description = describeVolume('other', 3);
    },
    back: (source: { description: string }) => {
      source.description = describeVolume('one', 3);
    },
  },
  {
    what: 'another generation',
    change: (source: { description: string }) => {
      source.description = describeVolume('one', 4);
    },
    back: (source: { description: string }) => {
      source.description = describeVolume('one', 3);
    },
  },
  {
    what: 'no description any more',
    change: (source: { description: string }) => {
      source.description = '';
    },
    back: (source: { description: string }) => {
      source.description = describeVolume('one', 3);
    },
  },
]) {
  test(`a source that comes back with ${what} is never read from; the right one is`, async (t) => {
    const lab = new Lab(t);
    const source = await lab.source(MIB);
    source.description = describeVolume('one', 3);
    const { device } = source;
    const link = lab.link(source);
    await read(link, 'demand', 0, BLOCK);
    await source.stop();
    change(source);
    const before = source.reads.length;
    await source.start();
    const pending = [read(link, 'demand', BLOCK, BLOCK), read(link, 'bulk', 2 * BLOCK, BLOCK)];
    await until(() => link.state === 'mismatch', 'the mismatch is noticed');
    assert.match(link.error!, /is not the source any more/);
    const { accepted } = source;
    await until(() => source.accepted > accepted + 2, 'it is tried again');
    assert.equal(await isSettled(Promise.any(pending)), false);
    assert.equal(source.reads.length, source.device === device ? before : 0);
    await source.stop();
    back(source, device);
    await source.start();
    assertBlocks(Buffer.concat(await Promise.all(pending)), DATA.subarray(BLOCK, 3 * BLOCK));
    assert.equal(link.state, 'connected');
    assert.equal(link.error, null);
  });
}

test('after the source timeout reads fail, at once from then on, and succeed when the source is back', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source, { sourceTimeoutMs: 60 });
  await read(link, 'demand', 0, BLOCK);
  await source.stop();
  await until(() => link.state === 'lost', 'the loss is noticed');
  const waits = Array.from({ length: 5 }, () => read(link, 'demand', 0, BLOCK));
  for (const wait of waits) await assert.rejects(wait, code('source-unreachable'));
  await assert.rejects(read(link, 'bulk', 0, BLOCK), code('source-unreachable'));
  await source.start();
  await until(() => link.state === 'connected', 'it is back');
  await read(link, 'demand', 0, BLOCK);
});

test('a source that is not there from the start is timed out as well, and met later', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  await source.stop();
  const link = lab.link(source, { sourceTimeoutMs: 60 });
  await assert.rejects(read(link, 'demand', 0, BLOCK), code('source-unreachable'));
  assert.equal(link.state, 'connecting');
  await source.start();
  await until(() => link.state === 'connected', 'it is there');
  assertBlocks(await read(link, 'demand', 0, MIB), DATA);
});

test('a connection on which nothing is answered is given up, and its requests sent again', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB, { multiConn: false });
  const link = lab.link(source, { timing: { requestTimeoutMs: 60, backoffMsMin: 5 } });
  source.hold();
  const pending = read(link, 'demand', 0, BLOCK);
  await until(() => source.accepted === 3, 'connected for the third time');
  source.release();
  assertBlocks(await pending, DATA.subarray(0, BLOCK));
});

test('a source that lets us in and answers nothing does not outwit the source timeout', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB, { multiConn: false });
  const link = lab.link(source, {
    sourceTimeoutMs: 150,
    timing: { requestTimeoutMs: 50, backoffMsMin: 5 },
  });
  source.hold();
  await assert.rejects(read(link, 'demand', 0, BLOCK), code('source-unreachable'));
  assert.ok(source.accepted > 1, 'it was tried more than once');
  source.release();
  await read(link, 'demand', 0, BLOCK);
});

test('an error of the source is final, and no loss', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source);
  source.failBlocks([0]);
  await assert.rejects(read(link, 'demand', 0, BLOCK), code('source-io'));
  await read(link, 'demand', BLOCK, BLOCK);
  assert.equal(link.state, 'connected');
});

test('close rejects what is pending at once, also at a source that hangs, and says goodbye otherwise', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source);
  await until(() => link.lanesApart, 'lanes apart');
  source.hold();
  const pending = [read(link, 'demand', 0, BLOCK), read(link, 'bulk', BLOCK, BLOCK)];
  await until(() => source.held === 2, 'requests are at the source');
  const began = performance.now();
  const closing = link.close();
  for (const one of pending) await assert.rejects(one, code('closed'));
  await closing;
  assert.ok(performance.now() - began < 2000, 'it waits for nobody');
  await assert.rejects(read(link, 'demand', 0, BLOCK), code('closed'));
  source.release();
  await until(() => source.connections === 0, 'no connection is left');
});

test('close ends a link that never connected, and those who wait for it', async (t) => {
  const lab = new Lab(t);
  const link = lab.link(`nbd+unix:///?socket=${join(lab.dir, 'nobody')}`);
  const pending = read(link, 'demand', 0, BLOCK);
  const closing = link.close();
  await assert.rejects(pending, code('closed'));
  await closing;
});

test('close ends an attempt that hangs in the handshake', async (t) => {
  const lab = new Lab(t);
  let greeted = 0;
  const server = await startFakeServer(async (peer) => {
    greeted++;
    await peer.gone;
  });
  lab.onClose(() => server.stop());
  const link = lab.link(server.uri);
  await until(() => greeted === 1, 'the attempt is under way');
  await link.close();
});

test('more requests than one connection may have in flight wait for their turn', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB, { multiConn: false });
  const link = lab.link(source);
  source.hold();
  const buffer = Buffer.alloc(512);
  const reads = Array.from({ length: 5000 }, (_, i) => link.read('demand', (i % 2048) * 512, 512, buffer, 0));
  const bulk = read(link, 'bulk', 0, BLOCK);
  await until(() => source.held >= 1000, 'many are at the source');
  await quiet();
  assert.ok(source.held <= 1025, `${source.held} at the source`);
  source.release();
  await Promise.all(reads);
  await bulk;
});

test('a range longer than the source takes in one request is read in several', async (t) => {
  const lab = new Lab(t);
  const size = 34 * MIB;
  const source = await lab.source(size);
  const link = lab.link(source);
  assertBlocks(await read(link, 'demand', 512, size - 1024), source.device.data.subarray(512, size - 512));
  assert.ok(source.reads.every(({ length }) => length <= 32 * MIB));
});

test('a source whose size is no multiple of its smallest request is refused by name', async (t) => {
  const lab = new Lab(t);
  const server = await startFakeServer(async (peer) => {
    await peer.handshake({ size: 10_000n, blockSize: [512, 4096, 1 << 20] });
    await peer.gone;
  });
  lab.onClose(() => server.stop());
  await assert.rejects(probeSource(server.uri), (error: unknown) => {
    assert.ok(code('source-mismatch')(error));
    assert.match((error as Error).message, /10000 bytes is no multiple of its smallest request of 512 bytes/);
    return true;
  });
});

test('a source that lets us in and then fails at once is tried again further and further apart', async (t) => {
  const lab = new Lab(t);
  const times: number[] = [];
  const server = await startFakeServer(async (peer) => {
    times.push(performance.now());
    await peer.handshake();
    await peer.request();
    peer.hangUp();
  });
  lab.onClose(() => server.stop());
  const link = lab.link(server.uri, { timing: { backoffMsMin: 20, backoffMsMax: 160 } });
  read(link, 'demand', 0, BLOCK).catch(() => undefined);
  await until(() => times.length >= 6, 'six attempts');
  for (let i = 1; i < 6; i++) {
    const least = 0.75 * Math.min(160, 20 * 2 ** (i - 1)) - 2;
    assert.ok(
      times[i]! - times[i - 1]! >= least,
      `gap ${i} is ${times[i]! - times[i - 1]!} ms, under ${least}`,
    );
  }
});

test('a source that answers something is tried again at once', async (t) => {
  const lab = new Lab(t);
  const times: number[] = [];
  const server = await startFakeServer(async (peer) => {
    times.push(performance.now());
    await peer.handshake();
    const { cookie, offset, length } = await peer.request();
    peer.send(dataChunk(cookie, offset, DATA.subarray(offset, offset + length), true));
    await peer.request();
    peer.hangUp();
  });
  lab.onClose(() => server.stop());
  const link = lab.link(server.uri, { timing: { backoffMsMin: 1, backoffMsMax: 60_000 } });
  for (let i = 0; i < 14; i++) assertBlocks(await read(link, 'demand', 0, BLOCK), DATA.subarray(0, BLOCK));
});

test('a source that fails whenever it is asked what is allocated is not asked for ever', async (t) => {
  const lab = new Lab(t);
  let asked = 0;
  const server = await startFakeServer(async (peer) => {
    await peer.handshake({ contexts: [[5, 'base:allocation']] });
    await peer.request();
    asked++;
    peer.send(Buffer.alloc(16));
  });
  lab.onClose(() => server.stop());
  const link = lab.link(server.uri);
  await assert.rejects(link.allocation(0, MIB), (error: unknown) => {
    assert.match((error as Error).message, /fails at BLOCK_STATUS/);
    return code('source-io')(error);
  });
  assert.equal(asked, 5);
});

test('reads that nobody waits for any more are dropped while the source is lost; the others stay', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  const link = lab.link(source);
  await read(link, 'demand', 0, BLOCK);
  await source.stop();
  await until(() => link.state === 'lost', 'the loss is noticed');
  const askers = [{ abandoned: false }, { abandoned: false }];
  const reads = askers.map((asker) => link.read('demand', 0, BLOCK, Buffer.alloc(BLOCK), 0, asker));
  link.dropAbandoned();
  askers[0]!.abandoned = true;
  link.dropAbandoned();
  await assert.rejects(reads[0]!, (error) => error === DROPPED);
  assert.equal(await isSettled(reads[1]!), false);
  await source.start();
  await reads[1];
});
