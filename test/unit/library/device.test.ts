import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { BlockferryError } from '../../../src/errors.js';
import { createDevice, type DeviceFunctions } from '../../../src/library/device.js';
import { NbdServer } from '../../../src/library/server.js';
import { NbdClient, NbdReplyError } from '../../../src/nbd/client/client.js';
import { Allocation, BASE_ALLOCATION, Errno, TransmissionFlag } from '../../../src/nbd/constants.js';

const MIB = 1 << 20;
const SIZE = 4 * MIB + 7;

let folder: string;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-device-'));
});
after(() => rmSync(folder, { recursive: true }));

let serial = 0;

/** Calls `scenario` with a client of a device of these functions. */
async function served(
  functions: DeviceFunctions,
  scenario: (client: NbdClient) => Promise<void>,
): Promise<void> {
  const socket = join(folder, `${serial++}.sock`);
  const server = await NbdServer.listen({
    listen: [`unix:${socket}`],
    exports: [{ name: 'disk', device: createDevice(functions) }],
  });
  try {
    const client = await NbdClient.connect(server.uris()[0]!, { contexts: [BASE_ALLOCATION] });
    try {
      await scenario(client);
      await client.close();
    } finally {
      client.destroy();
    }
  } finally {
    await server.close();
  }
}

/** A device in memory that notes what it is asked. */
class Memory implements DeviceFunctions {
  readonly size = SIZE;
  readonly data = Buffer.alloc(SIZE);
  readonly calls: string[] = [];

  async read(offset: number, buffer: Buffer): Promise<void> {
    this.calls.push(`read ${offset} ${buffer.length}`);
    await Promise.resolve();
    this.data.copy(buffer, 0, offset);
  }

  async write(offset: number, buffer: Buffer): Promise<void> {
    this.calls.push(`write ${offset} ${buffer.length}`);
    await Promise.resolve();
    buffer.copy(this.data, offset);
  }

  flush(): void {
    this.calls.push('flush');
  }
}

async function errnoOfFailure(request: Promise<unknown>): Promise<number> {
  try {
    await request;
  } catch (error) {
    assert.ok(error instanceof BlockferryError && error.code === 'source-io', String(error));
    assert.ok(error.cause instanceof NbdReplyError);
    return error.cause.errno;
  }
  return 0;
}

describe('a device of functions', () => {
  test('reads and writes, to the last byte, many at once', async () => {
    const memory = new Memory();
    await served(memory, async (client) => {
      assert.equal(client.info.size, SIZE);
      assert.equal(client.info.readOnly, false);
      const parts = Array.from({ length: 50 }, (_, i) => Buffer.alloc(1000 + i, i + 1));
      await Promise.all(parts.map((part, i) => client.write(i * 5000, part)));
      const back = await Promise.all(parts.map((part, i) => client.read(i * 5000, part.length)));
      for (const [i, part] of parts.entries()) assert.ok(back[i]!.equals(part));
      await client.write(SIZE - 3, Buffer.from('end'));
      assert.equal((await client.read(SIZE - 3, 3)).toString(), 'end');
      assert.ok((await client.read(0, SIZE)).equals(memory.data));
    });
  });

  test('FUA is a flush after the change, before the answer; flush, trim and cache go through', async () => {
    const memory = new Memory();
    const more = {
      trim: (offset: number, length: number) => void memory.calls.push(`trim ${offset} ${length}`),
      cache: (offset: number, length: number) => void memory.calls.push(`cache ${offset} ${length}`),
      zero: (offset: number, length: number, { noHole }: { noHole: boolean }) =>
        void memory.calls.push(`zero ${offset} ${length} ${noHole}`),
    };
    await served(Object.assign(memory, more), async (client) => {
      await client.write(1, Buffer.alloc(2), { fua: true });
      await client.flush();
      await client.trim(5, 6, { fua: true });
      await client.trim(5, 6);
      await client.zero(7, 8, { noHole: true });
      await client.zero(7, 8, { fua: true });
      await client.cache(9, 10);
    });
    assert.deepEqual(memory.calls, [
      ...['write 1 2', 'flush', 'flush', 'trim 5 6', 'flush', 'trim 5 6'],
      ...['zero 7 8 true', 'zero 7 8 false', 'flush', 'cache 9 10'],
    ]);
  });

  test('without functions of their own, trim and cache do nothing, and zero writes zeroes piece by piece', async () => {
    const memory = new Memory();
    memory.data.fill(9);
    await served(memory, async (client) => {
      await client.trim(0, MIB);
      await client.cache(0, MIB);
      await client.zero(100, 3 * MIB, { fua: true });
    });
    assert.deepEqual(memory.calls, [
      ...[`write 100 ${MIB}`, `write ${100 + MIB} ${MIB}`, `write ${100 + 2 * MIB} ${MIB}`, 'flush'],
    ]);
    assert.equal(memory.data.indexOf(0), 100);
    assert.equal(memory.data.indexOf(9, 100), 100 + 3 * MIB);
  });

  test('without write it is read-only', () =>
    served({ size: 10, read: (_, buffer) => void buffer.fill(1) }, async (client) => {
      assert.equal(client.info.readOnly, true);
      assert.deepEqual([...(await client.read(8, 2))], [1, 1]);
      await client.flush();
      await assert.rejects(client.write(0, Buffer.alloc(1)), { code: 'read-only' });
    }));

  test('what a function throws or rejects with is told as an errno, and to onError', async () => {
    const failures: [unknown, number][] = [
      [new Error('whatever'), Errno.EIO],
      ['not even an error', Errno.EIO],
      [undefined, Errno.EIO],
      [new NbdReplyError(Errno.ENOSPC), Errno.ENOSPC],
      [new NbdReplyError(0), Errno.EIO],
      [new NbdReplyError(4711), Errno.EIO],
      [new BlockferryError('no-space', 'full'), Errno.ENOSPC],
      [new BlockferryError('source-io', 'x', { cause: new NbdReplyError(Errno.EPERM) }), Errno.EPERM],
      [new BlockferryError('closed', 'gone', { cause: new Error('hung up') }), Errno.ESHUTDOWN],
      [Object.assign(new Error('disk full'), { code: 'ENOSPC' }), Errno.ENOSPC],
      [Object.assign(new Error('no'), { code: 'EACCES' }), Errno.EPERM],
    ];
    for (const sync of [true, false]) {
      let index = 0;
      const told: [unknown, string][] = [];
      const fail = (): Promise<void> => {
        const [error] = failures[index]!;
        if (sync) throw error;
        return Promise.reject(error);
      };
      const functions: DeviceFunctions = {
        size: 10,
        read: fail,
        write: fail,
        onError(error, verb) {
          told.push([error, verb]);
          throw new Error('onError must not throw');
        },
      };
      await served(functions, async (client) => {
        for (; index < failures.length; index++) {
          const [, errno] = failures[index]!;
          // ESHUTDOWN ends a client: it is asked last.
          if (errno === Errno.ESHUTDOWN) continue;
          assert.equal(await errnoOfFailure(client.read(0, 1)), errno, String(failures[index]![0]));
          assert.equal(await errnoOfFailure(client.write(0, Buffer.alloc(1))), errno);
          assert.deepEqual(
            told.splice(0).map(([, verb]) => verb),
            ['read', 'write'],
          );
        }
        index = failures.findIndex(([, errno]) => errno === Errno.ESHUTDOWN);
        assert.equal(await errnoOfFailure(client.read(0, 1)), Errno.ESHUTDOWN);
      });
    }
  });

  test('a change that fails is not flushed, and one whose flush fails has failed', async () => {
    const calls: string[] = [];
    let fails = 'write';
    const step = (verb: string) => () => {
      calls.push(verb);
      if (verb === fails) throw new NbdReplyError(Errno.ENOSPC);
    };
    await served(
      { size: 10, read: step('read'), write: step('write'), flush: step('flush') },
      async (client) => {
        assert.equal(await errnoOfFailure(client.write(0, Buffer.alloc(1), { fua: true })), Errno.ENOSPC);
        assert.deepEqual(calls.splice(0), ['write']);
        fails = 'flush';
        assert.equal(await errnoOfFailure(client.write(0, Buffer.alloc(1), { fua: true })), Errno.ENOSPC);
        assert.deepEqual(calls, ['write', 'flush']);
      },
    );
  });

  test('status: extents as given, cut at the end of the range; nonsense is EIO', async () => {
    let answer: { length: number; flags: number }[] = [];
    const functions: DeviceFunctions = {
      size: 100,
      read: (_, buffer) => void buffer.fill(0),
      status: (offset, length, context) => {
        assert.equal(context, BASE_ALLOCATION);
        assert.deepEqual([offset, length], [10, 50]);
        return answer;
      },
    };
    const hole = Allocation.HOLE | Allocation.ZERO;
    await served(functions, async (client) => {
      const ask = () => client.blockStatus(BASE_ALLOCATION, 10, 50);
      answer = [
        { length: 20, flags: 0 },
        { length: 400, flags: hole },
      ];
      assert.deepEqual(await ask(), [
        { length: 20, flags: 0 },
        { length: 30, flags: hole },
      ]);
      for (const [length, flags] of [
        [0, 0],
        [-1, 0],
        [1.5, 0],
        [Number.NaN, 0],
        [1, -1],
        [1, 2 ** 32],
      ]) {
        answer = [
          { length: 1, flags: 0 },
          { length: length!, flags: flags! },
        ];
        assert.equal(await errnoOfFailure(ask()), Errno.EIO, `${length} ${flags}`);
      }
      answer = [];
      assert.equal(await errnoOfFailure(ask()), Errno.EIO);
    });
  });

  test('no status, no contexts; multiConn and readOnly as asked', async () => {
    const memory = new Memory();
    await served(memory, async ({ info }) => {
      assert.equal(info.contexts.size, 0);
      assert.ok((info.flags & TransmissionFlag.CAN_MULTI_CONN) !== 0);
      assert.equal(info.blockSize?.preferred, 4096);
    });
    const single = Object.assign(memory, { multiConn: false, readOnly: true, preferredBlock: 65_536 });
    await served(single, async ({ info }) => {
      assert.ok((info.flags & TransmissionFlag.CAN_MULTI_CONN) === 0);
      assert.equal(info.readOnly, true);
      assert.equal(info.blockSize?.preferred, 65_536);
    });
  });

  test('a client that goes away in the middle: the function is let finish, zeroes stop', async () => {
    let release: () => void = () => {};
    let begun: () => void = () => {};
    const beginning = new Promise<void>((resolve) => {
      begun = resolve;
    });
    let writes = 0;
    const functions: DeviceFunctions = {
      size: 64 * MIB,
      read: () => {},
      write: () => {
        writes++;
        begun();
        return new Promise((resolve) => {
          release = resolve;
        });
      },
    };
    const server = await NbdServer.listen({
      listen: [`unix:${join(folder, 'gone.sock')}`],
      exports: [{ name: 'disk', device: createDevice(functions) }],
    });
    try {
      const client = await NbdClient.connect(server.uris()[0]!);
      const zeroed = assert.rejects(client.zero(0, 64 * MIB), { code: 'closed' });
      await beginning;
      assert.equal(server.connections('disk'), 1);
      client.destroy();
      await zeroed;
      // The server learns of it in a turn of its own.
      const deadline = performance.now() + 10_000;
      while (server.connections('disk') > 0 && performance.now() < deadline) {
        release();
        await new Promise((resolve) => setImmediate(resolve));
      }
      assert.equal(server.connections('disk'), 0);
      assert.ok(writes < 64, String(writes));
    } finally {
      await server.close();
    }
  });

  test('what makes no sense is refused at once', () => {
    const read = () => {};
    const write = () => {};
    const status = () => [];
    const wrong: [object, RegExp][] = [
      [{ size: -1, read }, /its size is -1/],
      [{ size: 1.5, read }, /its size is 1.5/],
      [{ size: 2 ** 60, read }, /its size is/],
      [{ size: 1 }, /no read function/],
      [{ size: 1, read, readOnly: false }, /has no write function/],
      [{ size: 1, read, write, preferredBlock: 256 }, /preferredBlock is 256/],
      [{ size: 1, read, write, preferredBlock: 5000 }, /preferredBlock is 5000/],
      [{ size: 1, read, contexts: ['base:allocation'] }, /no status function/],
      [{ size: 1, read, status, contexts: ['nothing'] }, /is not a context's name/],
    ];
    for (const [functions, message] of wrong)
      assert.throws(() => createDevice(functions as DeviceFunctions), { code: 'usage', message });
    assert.equal(createDevice({ size: 0, read }).size, 0);
  });
});
