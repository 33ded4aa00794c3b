/** Sessions with direct access to their device's bytes: how they end, clients that are slow or many, and images that are. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { afterEach, describe, it } from 'node:test';
import * as native from '../../../src/native/index.js';
import { Command, Errno } from '../../../src/nbd/constants.js';
import type { BlockDevice, IoRequest } from '../../../src/nbd/device.js';
import { type RawClient, type RawRequest, until } from '../../fakes/raw-client.js';
import { changed, type Flood, Rig, read, watched, write } from '../../support/direct-session.js';
import { patterned, turns } from '../../support/volume.js';

const MIB = 1 << 20;
const SIZE = 8 * MIB;
const B = 4096;
const BLOCKS = SIZE / B;
const { READ, DISC, FLUSH } = Command;
const CONTENT = patterned(SIZE);

const rig = new Rig();
afterEach(rig.end);

/** The device, whose FLUSHes wait until the test completes them. */
function heldFlushes(device: BlockDevice): { device: BlockDevice; held: IoRequest[] } {
  const held: IoRequest[] = [];
  return { device: changed(device, { flush: (request) => void held.push(request) }), held };
}

/** Small READs, one after the other: by then the session waits for the next one before it gives up. */
async function warmUp(client: RawClient, count = 50): Promise<void> {
  for (let i = 0; i < count; i++) {
    const { data } = await client.ask(read(1_000_000 + i, i * B, B));
    assert.ok(data!.equals(CONTENT.subarray(i * B, (i + 1) * B)));
  }
  client.replies.length = 0;
}

const block = (i: number): Buffer => CONTENT.subarray((i % BLOCKS) * B, ((i % BLOCKS) + 1) * B);

describe('session with direct access: drain', () => {
  it('later requests get ESHUTDOWN and do nothing, those in flight finish, then it closes', async () => {
    const disk = rig.disk(CONTENT);
    const { device, held } = heldFlushes(disk.device);
    const { client, session } = rig.serve(device, 'structured');
    await warmUp(client);
    client.send({ command: FLUSH, cookie: 1 }, read(2, 0, B));
    await client.reply(2);
    const drained = session.drain();
    client.send(read(3, 0, B), write(4, 0, Buffer.alloc(B)), write(5, 0, Buffer.alloc(MIB)), {
      command: FLUSH,
      cookie: 6,
    });
    for (const cookie of [3, 4, 5, 6]) assert.equal((await client.reply(cookie)).errno, Errno.ESHUTDOWN);
    assert.equal(held.length, 1);
    held[0]!.complete(0);
    await drained;
    await client.ended;
    assert.equal((await client.reply(1)).errno, 0);
    disk.holds();
  });

  it('a long WRITE whose payload is still coming gets ESHUTDOWN and does nothing', async () => {
    const disk = rig.disk(CONTENT);
    const { device, held } = heldFlushes(disk.device);
    const { client, session } = rig.serve(device, 'simple');
    client.send({ command: FLUSH, cookie: 1 });
    await until(() => held.length === 1);
    const bytes = client.encode(write(2, 0, Buffer.alloc(2 * MIB)));
    client.socket.write(bytes.subarray(0, MIB));
    await until(() => session.inFlightBytes > MIB);
    const drained = session.drain();
    client.socket.write(bytes.subarray(MIB));
    assert.equal((await client.reply(2)).errno, Errno.ESHUTDOWN);
    held[0]!.complete(0);
    await drained;
    disk.holds();
  });

  it('while requests stream in: each answer is right or ESHUTDOWN, and it closes', async () => {
    const { device } = rig.disk(CONTENT);
    const { client, session } = rig.serve(device, 'extended');
    client.send(...Array.from({ length: 5000 }, (_, i) => read(i, (i % BLOCKS) * B, B)));
    await client.got(1);
    await session.drain();
    await client.ended;
    const { replies } = client;
    const refused = replies.findIndex(({ errno }) => errno !== 0);
    for (const [i, { cookie, errno, data }] of replies.entries()) {
      assert.equal(cookie, i);
      assert.equal(errno, refused === -1 || i < refused ? 0 : Errno.ESHUTDOWN);
      if (errno === 0) assert.ok(data!.equals(block(i)));
    }
    assert.equal(client.partial, 0);
  });
});

describe('session with direct access: ends', () => {
  it('a client that closes its side behind its requests gets all answers', async () => {
    const disk = rig.disk(CONTENT);
    const { client, session } = rig.serve(disk.device, 'structured');
    await warmUp(client);
    const requests: RawRequest[] = Array.from({ length: 500 }, (_, i) => read(i, i * B, B));
    // No WRITE behind the long one: should that one be held up, a thread makes the next, and nobody waits for it behind the client's end.
    requests.push(write(500, 0, Buffer.alloc(2 * MIB, 1)), read(501, 7 * MIB, 60_000));
    disk.content.fill(1, 0, 2 * MIB);
    client.socket.end(Buffer.concat(requests.map((request) => client.encode(request))));
    const replies = await client.got(requests.length);
    for (const [i, { cookie, errno, data }] of replies.entries()) {
      assert.deepEqual([cookie, errno], [i, 0]);
      if (i < 500) assert.ok(data!.equals(block(i)));
    }
    await session.closed;
    disk.holds();
  });

  it('what comes behind DISC, or is no request, is not carried out; what came before is answered', async () => {
    const disk = rig.disk(CONTENT);
    for (const [request, complaints] of [
      [{ command: DISC, cookie: 2 }, []],
      [{ command: READ, cookie: 2, magic: 0x12345678 }, ['request-magic']],
    ] as const) {
      const heard: string[] = [];
      const complain = (kind: string): void => void heard.push(kind);
      const { client, session } = rig.serve(disk.device, 'simple', 'descriptor', { complain });
      client.send(read(1, 0, B), request, write(3, 0, Buffer.alloc(B)));
      await session.closed;
      await client.ended;
      assert.deepEqual(
        client.replies.map(({ cookie }) => cookie),
        [1],
      );
      assert.deepEqual(heard, complaints);
    }
    disk.holds();
  });

  it('destroy in the middle of a long WRITE, of a stream of READs, and by the device', async () => {
    const disk = rig.disk(CONTENT);
    let released = 0;
    const device = changed(disk.device, { release: () => void released++ });
    const halved = rig.serve(device, 'simple');
    halved.client.socket.write(halved.client.encode(write(1, 0, Buffer.alloc(2 * MIB))).subarray(0, MIB));
    await until(() => halved.session.inFlightBytes > MIB);
    const reading = rig.serve(device, 'simple');
    reading.client.send(...Array.from({ length: 5000 }, (_, i) => read(i, (i % BLOCKS) * B, B)));
    await reading.client.got(1);
    const flush = (request: IoRequest): void => {
      flushing.session.destroy();
      setImmediate(() => request.complete(0));
    };
    const flushing = rig.serve(changed(device, { flush }), 'simple');
    flushing.client.send(
      read(1, 0, B),
      { command: FLUSH, cookie: 2 },
      ...Array.from({ length: 20 }, () => read(3, 0, B)),
    );
    for (const { session } of [halved, reading]) session.destroy();
    for (const { client } of [halved, reading, flushing]) await client.ended;
    assert.ok(reading.client.replies.every(({ data }, i) => data!.equals(block(i))));
    await Promise.all([halved.session.closed, reading.session.closed]);
    await until(() => released === 3);
    disk.holds();
  });

  it('a client that goes while it is answered', async () => {
    const { device } = rig.disk(CONTENT);
    for (const count of [1, 10, 5000]) {
      const { client, session } = rig.serve(device, 'simple');
      await warmUp(client, 3);
      client.send(...Array.from({ length: count }, (_, i) => read(i, (i % BLOCKS) * B, B)));
      client.socket.destroy();
      await session.closed;
    }
  });

  it('a device that closes: ESHUTDOWN', async () => {
    const { device } = rig.disk(CONTENT);
    const { client } = rig.serve(device, 'simple');
    await warmUp(client);
    await device.close();
    assert.equal((await client.ask(read(1, 0, B))).errno, Errno.ESHUTDOWN);
    assert.equal((await client.ask(write(2, 0, Buffer.alloc(B)))).errno, Errno.ESHUTDOWN);
  });
});

describe('session with direct access: slow and many clients', () => {
  it('a client that does not read stops itself, and goes on with the right data when it reads', async () => {
    const disk = rig.disk(CONTENT);
    const { client, session } = rig.serve(disk.device, 'structured');
    await warmUp(client);
    client.socket.pause();
    // More than the sockets take; a WRITE now and then, to the last blocks.
    const writes = 40;
    const readable = BLOCKS - writes;
    const requests = Array.from({ length: 4000 }, (_, i) =>
      i % 100 === 99
        ? write(i, (readable + (i - 99) / 100) * B, patterned(B, i))
        : read(i, ((i * 37) % readable) * B, B),
    );
    client.socket.write(Buffer.concat(requests.map((request) => client.encode(request))));
    await until(() => session.inFlightBytes > MIB);
    await turns();
    assert.ok(session.inFlightBytes < 2 * MIB);
    assert.ok(readFileSync(disk.path).subarray(-B).equals(CONTENT.subarray(-B)), 'the last one is not begun');
    client.socket.resume();
    const replies = await client.got(requests.length);
    // WRITEs that are held up are answered later.
    for (const [i, { cookie, errno, data }] of replies.sort((a, b) => a.cookie - b.cookie).entries()) {
      assert.deepEqual([cookie, errno], [i, 0]);
      if (data !== null) assert.ok(data.equals(block((i * 37) % readable)));
      else requests[i]!.payload!.copy(disk.content, Number(requests[i]!.offset));
    }
    disk.holds();
  });

  const payload = patterned(MIB, 7);
  const floods: [name: string, flood: Flood][] = [
    ['READs', [Array.from({ length: 64 }, (_, i) => read(i, i * B, B)), 64 * (16 + B), 1]],
    [
      'small WRITEs',
      [Array.from({ length: 64 }, (_, i) => write(i, i * B, payload.subarray(0, B))), 64 * 16, 1],
    ],
    ['long READs', [[0, 1, 2, 3].map((i) => read(i, i * MIB, MIB)), 4 * (16 + MIB), 1]],
    ['long WRITEs', [[0, 1, 2, 3].map((i) => write(i, i * MIB, payload)), 4 * 16, 1]],
  ];
  for (const [name, flood] of floods) {
    it(`who floods with ${name} and who asks one by one get on`, async () => {
      const [flooded, quiet] = [rig.disk(CONTENT), rig.disk(CONTENT)];
      const flooding = rig.flood(flooded.device, flood);
      const { client } = rig.serve(quiet.device, 'simple');
      await until(() => flooding.rounds > 0);
      const before = flooding.rounds;
      for (let i = 0; i < 100 || flooding.rounds < before + 20; i++) {
        const { data } = await client.ask(read(i, (i % BLOCKS) * B, B));
        assert.ok(data!.equals(block(i)));
        client.replies.length = 0;
      }
    });
  }
});

describe('session with direct access: images that are not quick', () => {
  it('a READ of what is not cached is the device’s, and so is what it says', async (t) => {
    const disk = rig.disk(CONTENT);
    const fd = disk.device.direct()!.fd;
    assert.equal(await native.fdatasync(fd), 0);
    spawnSync('dd', [`if=${disk.path}`, 'iflag=nocache', 'count=0', 'status=none']);
    // A question may begin a read ahead: it is asked far from the READs.
    if (native.pread(fd, Buffer.alloc(B), 0, B, 7 * MIB, true) !== -native.ERRNO.EAGAIN)
      return t.skip('this file system keeps what it has cached');
    const { device, asked } = watched(disk.device);
    const { client } = rig.serve(device, 'structured');
    client.send(...Array.from({ length: 200 }, (_, i) => read(i, i * 5 * B, B)));
    for (const { cookie, data } of await client.got(200)) assert.ok(data!.equals(block(cookie * 5)));
    assert.ok(asked.length > 0 && asked.every((call) => call === 'read'), String(asked));
    asked.length = 0;
    assert.ok((await client.ask(read(0, 0, B))).data!.equals(block(0)));
    assert.deepEqual(asked, [], 'it is cached now');
  });

  it('WRITEs are the device’s, when one was held up', async () => {
    const disk = rig.disk(CONTENT);
    const { device, asked } = watched(disk.device);
    const { client } = rig.serve(device, 'structured');
    disk.device.directWriteHeldUp();
    client.send(write(1, 5, Buffer.alloc(B)), read(2, 2 * B, 9), write(3, 3 * B, Buffer.alloc(MIB)));
    for (const { errno } of await client.got(3)) assert.equal(errno, 0);
    assert.deepEqual(asked, ['writeNow', 'write', 'writeNow', 'write']);
    disk.content.fill(0, 5, 5 + B).fill(0, 3 * B, 3 * B + MIB);
    disk.holds();
  });
});
