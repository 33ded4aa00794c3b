// The server's transmission phase with extended headers. Source of each clause: doc/proto.md, branch extension-ext-header.
import assert from 'node:assert/strict';
import { afterEach, describe, it } from 'node:test';
import pino from 'pino';
import {
  ChunkType,
  Command,
  CommandFlag,
  Errno,
  PAYLOAD_BYTES_MAX,
  REQUEST_MAGIC,
} from '../../../src/nbd/constants.js';
import type { IoRequest, StatusRequest } from '../../../src/nbd/device.js';
import { type Session, startSession } from '../../../src/nbd/server/session.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import {
  connectedPair,
  encodeExtendedRequest,
  RawClient,
  type RawRequest,
  until,
} from '../../fakes/raw-client.js';
import { u32, u64 } from '../../support/handshake.js';

const SIZE = 1 << 20;
const { READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS } = Command;
const { FUA, REQ_ONE, FAST_ZERO, PAYLOAD_LEN } = CommandFlag;
const CONTEXTS = [
  { id: 1, name: 'base:allocation' },
  { id: 2, name: 'test:other' },
];

interface Rig {
  device: MemoryDevice;
  session: Session;
  client: RawClient;
  complaints: string[];
}

const rigs: Rig[] = [];

function rig(device = new MemoryDevice(SIZE), contexts = CONTEXTS): Rig {
  const [server, socket] = connectedPair('descriptor');
  const complaints: string[] = [];
  const session = startSession(server, {
    device,
    structured: true,
    extended: true,
    contexts,
    rest: Buffer.alloc(0),
    log: pino({ level: 'silent' }),
    complain: (kind) => complaints.push(kind),
  });
  const made = { device, session, client: new RawClient(socket, 'extended'), complaints };
  rigs.push(made);
  return made;
}

afterEach(async () => {
  for (const { session, client, device } of rigs.splice(0)) {
    client.socket.destroy();
    session.destroy();
    device.manner = () => 'now';
    device.completeHeld();
    await session.closed;
    assert.equal(device.released, 1);
  }
});

/** 8 TiB of nothing: what is asked of it is kept. */
class HugeDevice extends MemoryDevice {
  override get size(): number {
    return 2 ** 43;
  }

  override readNow(offset: number, length: number, buffer: Buffer, at: number): number {
    this.calls.push({ kind: 'read', offset, length, flags: 0 });
    buffer.fill(7, at, at + length);
    return Errno.OK;
  }

  override trim = (request: IoRequest) => this.#keep('trim', request);
  override zero = (request: IoRequest) => this.#keep('zero', request);
  override cache = (request: IoRequest) => this.#keep('cache', request);

  override status(request: StatusRequest): void {
    request.extent(2 ** 40, 0);
    request.extent(2 ** 44, 3);
    this.#keep('status', request);
  }

  #keep(kind: 'trim' | 'zero' | 'cache' | 'status', request: IoRequest): void {
    this.calls.push({ kind, offset: request.offset, length: request.length, flags: request.flags });
    request.complete(Errno.OK);
  }
}

async function alive({ client }: Rig): Promise<void> {
  assert.equal((await client.ask({ command: READ, cookie: 99_999, length: 16 })).errno, 0);
}

describe('extended headers: requests and replies', () => {
  it('every command is answered in chunks that repeat its offset', async () => {
    const { client } = rig();
    const rows: [Omit<RawRequest, 'cookie'>, number[]][] = [
      [{ command: READ, offset: 4096, length: 512 }, [ChunkType.OFFSET_DATA]],
      [{ command: READ, offset: 4096, length: 0 }, [ChunkType.NONE]],
      [{ command: WRITE, offset: 8192, payload: Buffer.alloc(512, 3) }, [ChunkType.NONE]],
      [{ command: WRITE, offset: 8192, payload: Buffer.alloc(0) }, [ChunkType.NONE]],
      [{ command: FLUSH }, [ChunkType.NONE]],
      [{ command: FLUSH, offset: 0xffffffffffffffffn, length: 0xfffffffffffffffen }, [ChunkType.NONE]],
      [{ command: TRIM, offset: 512, length: 512 }, [ChunkType.NONE]],
      [{ command: CACHE, offset: 512, length: 512 }, [ChunkType.NONE]],
      [{ command: WRITE_ZEROES, offset: 8704, length: 512 }, [ChunkType.NONE]],
      [{ command: BLOCK_STATUS, offset: 512, length: 512 }, [6, 6]],
      [{ command: READ, offset: SIZE, length: 1 }, [ChunkType.ERROR]],
      [{ command: READ, offset: 0x8000000000000001n, length: 1 }, [ChunkType.ERROR]],
      [{ command: 4711, offset: 0xfedcba9876543210n }, [ChunkType.ERROR]],
    ];
    for (const [cookie, [request, chunks]] of rows.entries()) {
      const reply = await client.ask({ ...request, cookie });
      assert.deepEqual(reply.chunks, chunks);
      assert.equal(reply.offset, BigInt(request.offset ?? 0));
    }
  });

  for (const manner of ['now', 'sync', 'turn'] as const)
    it(`reads and writes what the device holds, answered ${manner}`, async () => {
      const { device, client } = rig(new MemoryDevice(4 << 20));
      device.manner = () => manner;
      for (const [cookie, length] of [1, 511, 4096, 131_073, 524_289, 1 << 20].entries()) {
        const payload = Buffer.alloc(length, cookie + 1);
        await client.ask({ command: WRITE, flags: FUA, cookie: 2 * cookie, offset: 77, payload });
        const read = await client.ask({ command: READ, cookie: 2 * cookie + 1, offset: 77, length });
        assert.ok(read.data!.equals(payload));
      }
      assert.ok(
        device.calls.every(({ flags }) => (flags & PAYLOAD_LEN) === 0),
        'a flag of the wire only',
      );
    });

  it('headers cut anywhere', async () => {
    const { client } = rig();
    const bytes = Buffer.concat([
      client.encode({ command: WRITE, cookie: 1, offset: 100, payload: Buffer.alloc(40, 9) }),
      client.encode({ command: READ, cookie: 2, offset: 100, length: 40 }),
    ]);
    for (const byte of bytes) {
      client.socket.write(Buffer.from([byte]));
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.deepEqual((await client.reply(2)).data, Buffer.alloc(40, 9));
  });

  it('64 MiB in one READ and one WRITE', async () => {
    const { client, device } = rig(new MemoryDevice(PAYLOAD_BYTES_MAX));
    const payload = Buffer.alloc(PAYLOAD_BYTES_MAX, 0x5a);
    assert.equal((await client.ask({ command: WRITE, cookie: 1, payload })).errno, 0);
    assert.ok(device.data.equals(payload));
    assert.ok((await client.ask({ command: READ, cookie: 2, length: payload.length })).data!.equals(payload));
  });
});

describe('extended headers: lengths of 64 bits', () => {
  for (const [command, kind] of [
    [TRIM, 'trim'],
    [WRITE_ZEROES, 'zero'],
    [CACHE, 'cache'],
  ] as const)
    it(`command ${command} of 8 TiB reaches the device whole`, async () => {
      const { device, client } = rig(new HugeDevice(0));
      assert.equal((await client.ask({ command, cookie: 1, length: 2 ** 43 })).errno, 0);
      assert.deepEqual(device.calls, [{ kind, offset: 0, length: 2 ** 43, flags: 0 }]);
    });

  it('BLOCK_STATUS has descriptors beyond 4 GiB, cut at the end of the request', async () => {
    const { client } = rig(new HugeDevice(0));
    const reply = await client.ask({ command: BLOCK_STATUS, cookie: 1, offset: 512, length: 2 ** 43 - 512 });
    const extents = [
      [2 ** 40, 0],
      [2 ** 43 - 512 - 2 ** 40, 3],
    ];
    assert.deepEqual(
      [...reply.status],
      [
        [1, extents],
        [2, extents],
      ],
    );
    const one = await client.ask({ command: BLOCK_STATUS, flags: REQ_ONE, cookie: 2, length: 2 ** 41 });
    assert.deepEqual(one.status.get(1), [[2 ** 40, 0]]);
  });

  it('a READ at 6 TiB', async () => {
    const { client } = rig(new HugeDevice(0));
    const reply = await client.ask({ command: READ, cookie: 1, offset: 6 * 2 ** 40, length: 512 });
    assert.deepEqual(reply.data, Buffer.alloc(512, 7));
  });

  const beyond = [2n ** 43n + 1n, 2n ** 53n, 2n ** 53n + 1n, 2n ** 63n, 2n ** 64n - 1n];
  for (const length of beyond)
    it(`a length of ${length} is beyond the end, and no short one`, async () => {
      const made = rig(new HugeDevice(0));
      for (const [cookie, command] of [TRIM, CACHE, BLOCK_STATUS, WRITE_ZEROES, READ].entries()) {
        const expected = command === WRITE_ZEROES ? Errno.ENOSPC : Errno.EINVAL;
        for (const offset of [0n, 4096n, 2n ** 64n - 4096n]) {
          const reply = await made.client.ask({
            command,
            cookie: cookie + Number(offset % 1000n) * 10,
            offset,
            length,
          });
          assert.equal(reply.errno, expected, `command ${command}`);
        }
      }
      await alive(made);
      assert.equal(made.device.calls.length, 1);
    });
});

describe('extended headers: payloads', () => {
  const rows: [string, RawRequest][] = [
    ['READ', { command: READ, cookie: 1 }],
    ['TRIM', { command: TRIM, cookie: 1 }],
    ['FLUSH', { command: FLUSH, cookie: 1 }],
    ['CACHE', { command: CACHE, cookie: 1 }],
    ['WRITE_ZEROES', { command: WRITE_ZEROES, cookie: 1 }],
    ['an unknown command', { command: 77, cookie: 1 }],
    ['a WRITE with an unknown flag', { command: WRITE, cookie: 1, flags: 0x8000 }],
    ['a WRITE beyond the end', { command: WRITE, cookie: 1, offset: SIZE }],
  ];
  for (const [what, request] of rows)
    for (const bytes of [1, 33, 300_000])
      it(`${bytes} bytes with ${what}: consumed, then an error`, async () => {
        const made = rig();
        const payload = Buffer.alloc(bytes, 0x21);
        const reply = await made.client.ask({
          ...request,
          flags: (request.flags ?? 0) | PAYLOAD_LEN,
          payload,
        });
        assert.equal(reply.errno, request.offset === SIZE ? Errno.ENOSPC : Errno.EINVAL);
        assert.ok(reply.message.length > 0);
        await alive(made);
        assert.equal(made.device.calls.length, 1);
      });

  it('PAYLOAD_LEN with a length of 0, on a command that takes none', async () => {
    const made = rig();
    const reply = await made.client.ask({ command: TRIM, cookie: 1, flags: PAYLOAD_LEN, length: 0 });
    assert.equal(reply.errno, Errno.EINVAL);
    await alive(made);
  });

  it('a WRITE without the flag has its payload all the same, as QEMU sends it', async () => {
    const made = rig();
    const payload = Buffer.alloc(70_000, 8);
    made.client.socket.write(encodeExtendedRequest({ command: WRITE, cookie: 1, payload }, true));
    assert.equal((await made.client.reply(1)).errno, 0);
    assert.ok(made.device.data.subarray(0, 70_000).equals(payload));
    await alive(made);
  });

  for (const length of [BigInt(PAYLOAD_BYTES_MAX) + 1n, 2n ** 32n, 2n ** 53n + 1n, 2n ** 64n - 1n])
    for (const command of [WRITE, READ, BLOCK_STATUS])
      it(`a payload of ${length} bytes with command ${command} ends the connection`, async () => {
        const { client, session, complaints, device } = rig();
        client.send({ command, cookie: 1, flags: PAYLOAD_LEN, length });
        client.socket.resume();
        await session.closed;
        assert.deepEqual(complaints, ['payload-too-long']);
        assert.equal(device.calls.length, 0);
        assert.equal(client.replies.length, 0);
      });

  it('the compact magic ends the connection', async () => {
    const { client, session, complaints } = rig();
    client.send({ command: READ, cookie: 1, length: 1, magic: REQUEST_MAGIC });
    await session.closed;
    assert.deepEqual(complaints, ['request-magic']);
  });

  it('DISC ends the connection in order, with a payload as well', async () => {
    for (const flags of [0, PAYLOAD_LEN]) {
      const { client, session, device } = rig();
      device.manner = () => 'turn';
      client.send(
        { command: WRITE, cookie: 1, payload: Buffer.alloc(5) },
        { command: DISC, cookie: 2, flags, length: 9 },
      );
      await session.closed;
      assert.deepEqual(
        client.replies.map(({ cookie, errno }) => [cookie, errno]),
        [[1, 0]],
      );
    }
  });
});

describe('extended headers: BLOCK_STATUS with a payload', () => {
  const filter = (length: bigint, ...ids: number[]) => Buffer.concat([u64(length), ...ids.map(u32)]);
  const asking = (payload: Buffer, more: Partial<RawRequest> = {}): RawRequest => ({
    command: BLOCK_STATUS,
    cookie: 1,
    flags: PAYLOAD_LEN,
    payload,
    ...more,
  });

  it('answers in the contexts it names, and about the length it names', async () => {
    for (const ids of [[1], [2], [1, 2], [2, 1]]) {
      const { client } = rig();
      const reply = await client.ask(asking(filter(8192n, ...ids), { offset: 4096 }));
      assert.deepEqual([reply.errno, reply.offset], [0, 4096n]);
      assert.deepEqual([...reply.status.keys()], ids);
      for (const extents of reply.status.values()) assert.deepEqual(extents, [[8192, 0]]);
    }
  });

  it('up to the end of the export; the header’s length counts for nothing there', async () => {
    const { client } = rig();
    const reply = await client.ask(asking(filter(1n, 1), { offset: SIZE - 1 }));
    assert.deepEqual([...reply.status], [[1, [[1, 0]]]]);
  });

  it('with REQ_ONE', async () => {
    const { client, device } = rig();
    device.extents = () => [
      [100, 1],
      [200, 2],
    ];
    const reply = await client.ask(asking(filter(300n, 2), { flags: PAYLOAD_LEN | REQ_ONE }));
    assert.deepEqual([...reply.status], [[2, [[100, 1]]]]);
  });

  it('cut anywhere', async () => {
    const { client } = rig();
    for (const byte of client.encode(asking(filter(4096n, 2)))) {
      client.socket.write(Buffer.from([byte]));
      await new Promise((resolve) => setImmediate(resolve));
    }
    assert.deepEqual([...(await client.reply(1)).status.keys()], [2]);
  });

  const wrong: [string, Buffer, Partial<RawRequest>?][] = [
    ['an unknown context', filter(4096n, 3)],
    ['a context twice', filter(4096n, 1, 1)],
    ['no context', filter(4096n)],
    ['more contexts than there are', filter(4096n, 1, 2, 1)],
    ['half a context', Buffer.alloc(14)],
    ['no whole length', Buffer.alloc(7)],
    ['a payload of 1 MiB', Buffer.alloc(1 << 20)],
    ['a length of 0', filter(0n, 1)],
    ['a length beyond the end', filter(BigInt(SIZE) + 1n, 1)],
    ['a length of 2^64 - 1', filter(2n ** 64n - 1n, 1)],
    ['an offset at the end', filter(1n, 1), { offset: SIZE }],
    ['an unknown flag', filter(4096n, 1), { flags: PAYLOAD_LEN | 0x4000 }],
  ];
  for (const [what, payload, more] of wrong)
    it(`${what}: consumed, then EINVAL`, async () => {
      const made = rig();
      assert.equal((await made.client.ask(asking(payload, more))).errno, Errno.EINVAL);
      await alive(made);
      assert.ok(made.device.calls.every(({ kind }) => kind !== 'status'));
    });

  it('without a selected context: consumed, then EINVAL', async () => {
    const made = rig(new MemoryDevice(SIZE), []);
    assert.equal((await made.client.ask(asking(filter(4096n, 1)))).errno, Errno.EINVAL);
    await alive(made);
  });
});

describe('extended headers: the end', () => {
  it('drain: what is in flight is answered, what comes gets ESHUTDOWN in the same form', async () => {
    const { client, device, session } = rig();
    device.manner = () => 'held';
    client.send({ command: WRITE, cookie: 1, offset: 512, payload: Buffer.alloc(9) });
    await until(() => device.held.length === 1);
    void session.drain();
    client.send(
      { command: READ, cookie: 2, offset: 1024, length: 1 },
      { command: WRITE, cookie: 3, offset: 2048, payload: Buffer.alloc(70_000) },
      { command: BLOCK_STATUS, cookie: 4, flags: PAYLOAD_LEN, payload: Buffer.alloc(12) },
      { command: WRITE_ZEROES, cookie: 5, offset: 1, length: 2n ** 40n },
    );
    await client.got(4);
    device.completeHeld();
    await session.closed;
    const errnos = client.replies.map(({ cookie, errno, offset }) => [cookie, errno, offset]);
    assert.deepEqual(errnos, [
      [2, Errno.ESHUTDOWN, 1024n],
      [3, Errno.ESHUTDOWN, 2048n],
      [4, Errno.ESHUTDOWN, 0n],
      [5, Errno.ESHUTDOWN, 1n],
      [1, 0, 512n],
    ]);
  });

  it('drain in the middle of a payload of either kind', async () => {
    for (const request of [
      { command: WRITE, cookie: 1, payload: Buffer.alloc(100) },
      { command: BLOCK_STATUS, cookie: 1, flags: PAYLOAD_LEN, payload: Buffer.alloc(16) },
    ]) {
      const { client, device, session } = rig();
      device.manner = () => 'held';
      client.send({ command: FLUSH, cookie: 9 });
      await until(() => device.held.length === 1);
      const bytes = client.encode(request);
      client.socket.write(bytes.subarray(0, 40));
      await new Promise((resolve) => setTimeout(resolve, 10));
      void session.drain();
      client.socket.write(bytes.subarray(40));
      assert.equal((await client.reply(1)).errno, Errno.ESHUTDOWN);
      device.completeHeld();
      await session.closed;
    }
  });
});

describe('FAST_ZERO', () => {
  const asking = (cookie: number, flags: number): RawRequest => ({
    command: WRITE_ZEROES,
    cookie,
    flags,
    length: 4096,
  });

  function heeding(): MemoryDevice {
    const device = new MemoryDevice(SIZE);
    device.fastZero = true;
    return device;
  }

  it('reaches a device that heeds it, which may say ENOTSUP', async () => {
    const { client, device } = rig(heeding());
    assert.equal((await client.ask(asking(1, FAST_ZERO))).errno, 0);
    assert.equal(device.calls.at(-1)!.flags, FAST_ZERO);
    device.failure = () => Errno.ENOTSUP;
    const refused = await client.ask(asking(2, FAST_ZERO));
    assert.deepEqual([refused.errno, refused.message], [Errno.ENOTSUP, 'not faster than writing zeroes']);
  });

  it('is refused where the device does not heed it', async () => {
    const { client, device } = rig();
    assert.equal((await client.ask(asking(1, FAST_ZERO))).errno, Errno.EINVAL);
    assert.equal(device.calls.length, 0);
  });

  it('without the flag ENOTSUP is never an answer, nor with another command', async () => {
    const { client, device } = rig(heeding());
    device.failure = () => Errno.ENOTSUP;
    assert.equal((await client.ask(asking(1, 0))).errno, Errno.EIO);
    assert.equal((await client.ask({ command: TRIM, cookie: 2, length: 1 })).errno, Errno.EIO);
  });
});

describe('zeros at the beginning of long READs', () => {
  const RUN = 256 << 10;

  function sparse(): MemoryDevice {
    const device = new MemoryDevice(SIZE);
    device.findsZeroes = true;
    device.data.fill(5, RUN, 2 * RUN);
    return device;
  }

  it('are a hole: alone, and before data', async () => {
    const { client, device } = rig(sparse());
    const hole = await client.ask({ command: READ, cookie: 1, length: RUN });
    assert.deepEqual(hole.chunks, [ChunkType.OFFSET_HOLE]);
    assert.equal(device.calls.length, 0, 'nothing was read');
    const both = await client.ask({ command: READ, cookie: 2, offset: 4096, length: 2 * RUN });
    assert.deepEqual(both.chunks, [ChunkType.OFFSET_HOLE, ChunkType.OFFSET_DATA]);
    assert.equal(both.offset, 4096n);
    assert.ok(both.data!.equals(device.data.subarray(4096, 4096 + 2 * RUN)));
    const data = await client.ask({ command: READ, cookie: 3, offset: RUN, length: 2 * RUN });
    assert.deepEqual(data.chunks, [ChunkType.OFFSET_DATA]);
  });

  for (const manner of ['sync', 'turn'] as const)
    it(`come before data that is answered ${manner}`, async () => {
      const { client, device } = rig(sparse());
      device.manner = () => manner;
      for (const [cookie, length] of [RUN + 4096, RUN + 200_000].entries()) {
        const reply = await client.ask({ command: READ, cookie, length });
        assert.deepEqual(reply.chunks, [ChunkType.OFFSET_HOLE, ChunkType.OFFSET_DATA]);
        assert.ok(reply.data!.equals(device.data.subarray(0, length)));
      }
    });

  it('come before an error of the rest', async () => {
    const { client, device } = rig(sparse());
    device.failure = () => Errno.EIO;
    const reply = await client.ask({ command: READ, cookie: 1, length: 2 * RUN });
    assert.deepEqual([reply.errno, reply.chunks], [Errno.EIO, [ChunkType.OFFSET_HOLE, ChunkType.ERROR]]);
  });

  it('are data with DF, and in reads shorter than 64 KiB', async () => {
    const { client } = rig(sparse());
    const whole = await client.ask({ command: READ, cookie: 1, flags: CommandFlag.DF, length: 2 * RUN });
    assert.deepEqual(whole.chunks, [ChunkType.OFFSET_DATA]);
    const short = await client.ask({ command: READ, cookie: 2, length: 65_535 });
    assert.deepEqual(short.chunks, [ChunkType.OFFSET_DATA]);
  });

  it('are read if the device throws instead of answering', async () => {
    const device = sparse();
    device.zeroesNow = () => {
      throw new Error('of the test');
    };
    const { client } = rig(device);
    assert.deepEqual((await client.ask({ command: READ, cookie: 1, length: RUN })).chunks, [
      ChunkType.OFFSET_DATA,
    ]);
  });

  it('a write that came before is never a hole', async () => {
    const { client } = rig(sparse());
    for (let cookie = 0; cookie < 200; cookie += 2) {
      const at = (cookie * 977) % RUN;
      client.send(
        { command: WRITE, cookie, offset: at, payload: Buffer.from([cookie + 1]) },
        { command: READ, cookie: cookie + 1, length: RUN },
      );
      assert.equal((await client.reply(cookie + 1)).data![at], cookie + 1);
    }
  });
});

it('chunks of one BLOCK_STATUS leave in order, the last one last, however long they are', async () => {
  for (const [long, short] of [
    ['base:allocation', 'test:other'],
    ['test:other', 'base:allocation'],
  ]) {
    const { client, device } = rig();
    device.extents = (context, { length }) =>
      context === short ? [[length, 0]] : Array.from({ length: 5000 }, (_, index) => [16, index & 1]);
    const reply = await client.ask({ command: BLOCK_STATUS, cookie: 1, length: 80_000 });
    assert.deepEqual(
      [reply.status.get(long === 'base:allocation' ? 1 : 2)!.length, reply.status.size],
      [5000, 2],
    );
  }
});
