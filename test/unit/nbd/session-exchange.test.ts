/** Sessions whose device lets them reach its bytes directly: what goes around it and what does not, in every form of replies. */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { afterEach, describe, it } from 'node:test';
import { Command, CommandFlag, Errno } from '../../../src/nbd/constants.js';
import type { IoRequest } from '../../../src/nbd/device.js';
import type { RawRequest } from '../../fakes/raw-client.js';
import { changed, Rig, read, watched, write } from '../../support/direct-session.js';
import { patterned, turns } from '../../support/volume.js';

const KIB = 1024;
const MIB = 1 << 20;
const SIZE = 8 * MIB;
const B = 4096;
const { FLUSH } = Command;
const CONTENT = patterned(SIZE);

const rig = new Rig();
afterEach(rig.end);

for (const form of ['simple', 'structured', 'extended'] as const) {
  describe(`session with direct access (${form})`, () => {
    it('does not ask the device for bytes that are here, but for what needs more', async () => {
      const disk = rig.disk(CONTENT);
      const { device, asked } = watched(disk.device);
      const { client } = rig.serve(device, form);
      const payload = patterned(5000, 2);
      assert.equal((await client.ask(write(1, 100, payload))).errno, 0);
      payload.copy(disk.content, 100);
      const { data } = await client.ask(read(2, 50, 60_000));
      assert.ok(data!.equals(disk.content.subarray(50, 60_050)));
      assert.deepEqual(asked, []);
      assert.equal((await client.ask(write(3, 0, payload, CommandFlag.FUA))).errno, 0);
      payload.copy(disk.content);
      assert.ok((await client.ask(read(4, 0, 2 * MIB))).data!.equals(disk.content.subarray(0, 2 * MIB)));
      assert.equal((await client.ask({ command: FLUSH, cookie: 5 })).errno, 0);
      assert.deepEqual(asked, ['write', 'readNow', 'flush']);
      disk.holds();
    });

    it('FLUSH between others: begun behind those before it, answered in its place', async (t) => {
      t.mock.method(performance, 'now', () => 0); // no write takes so long that a thread makes the next
      const disk = rig.disk(CONTENT);
      const seen: number[][] = [];
      const flush = (request: IoRequest): void => {
        const bytes = readFileSync(disk.path);
        seen.push([bytes[0]!, bytes[B]!, bytes[2 * B]!]);
        request.complete(0);
      };
      const { client } = rig.serve(changed(disk.device, { flush, directWriteHeldUp: () => {} }), form);
      const requests = [0, 1, 2].flatMap((i): RawRequest[] => [
        write(3 * i, i * B, Buffer.alloc(B)),
        { command: FLUSH, cookie: 3 * i + 1 },
        read(3 * i + 2, i * B, 9),
      ]);
      client.send(...requests);
      const replies = await client.got(9);
      assert.deepEqual(
        replies.map(({ cookie, errno }) => [cookie, errno]),
        requests.map(({ cookie }) => [cookie, 0]),
      );
      for (const cookie of [2, 5, 8]) assert.deepEqual(replies[cookie]!.data, Buffer.alloc(9));
      assert.deepEqual(seen, [
        [0, CONTENT[B], CONTENT[2 * B]],
        [0, 0, CONTENT[2 * B]],
        [0, 0, 0],
      ]);
    });

    it('FLUSHes that take their time, between hundreds of others', async () => {
      const disk = rig.disk(CONTENT);
      const { client } = rig.serve(disk.device, form);
      const requests = Array.from({ length: 900 }, (_, i): RawRequest => {
        if (i % 3 === 0) return write(i, i * B, patterned(B, i));
        return i % 3 === 1 ? { command: FLUSH, cookie: i } : read(i, i * B, B);
      });
      client.send(...requests);
      for (const { cookie, errno, data } of await client.got(requests.length)) {
        assert.equal(errno, 0);
        if (cookie % 3 === 0) patterned(B, cookie).copy(disk.content, cookie * B);
        if (cookie % 3 === 2) assert.ok(data!.equals(CONTENT.subarray(cookie * B, (cookie + 1) * B)));
      }
      disk.holds();
    });

    it('an answer of which the client took a part leaves before a longer one that follows', async () => {
      const disk = rig.disk(CONTENT);
      // Somewhere among these the socket is full in the midst of the last short answer.
      for (let count = 4; count < 120; count += 3) {
        const { client } = rig.serve(disk.device, form);
        client.socket.pause();
        const lengths = [...Array.from({ length: count }, () => 60_000), 2 * MIB];
        client.send(...lengths.map((length, i) => read(i, i * 1000, length)));
        await turns();
        client.socket.resume();
        for (const { cookie, errno, data } of await client.got(lengths.length)) {
          assert.equal(errno, 0);
          assert.ok(
            data!.equals(CONTENT.subarray(cookie * 1000, cookie * 1000 + lengths[cookie]!)),
            `${cookie}`,
          );
        }
        client.socket.destroy();
      }
    });

    it('long WRITEs that come in pieces, with others around them', async () => {
      const disk = rig.disk(CONTENT);
      const { client } = rig.serve(disk.device, form);
      let cookie = 0;
      for (const bytes of [MIB, 5 * MIB, 200 * KIB]) {
        const payload = patterned(bytes, bytes + 1);
        payload.copy(disk.content, 1000);
        const requests = [
          read(++cookie, SIZE - 10, 10),
          write(++cookie, 1000, payload),
          read(++cookie, SIZE - 20, 10),
        ];
        const sent = Buffer.concat(requests.map((request) => client.encode(request)));
        // In the headers and between them, in the payload, and in the last header.
        const cuts = [27, 28, 30, 56, 60, 64, 5000, 150 * KIB, sent.length - 40, sent.length - 28];
        for (const [i, to] of [...cuts, sent.length].entries()) {
          client.socket.write(sent.subarray(cuts[i - 1] ?? 0, to));
          await turns();
        }
        for (const reply of await client.got(cookie)) assert.equal(reply.errno, 0);
        const last = await client.reply(cookie);
        assert.ok(last.data!.equals(CONTENT.subarray(SIZE - 20, SIZE - 10)));
        disk.holds();
      }
    });

    it('long WRITEs one behind the other, as fast as they can be sent', async () => {
      const disk = rig.disk(CONTENT);
      const { client } = rig.serve(disk.device, form);
      const lengths = [MIB, 131_072, 131_073, 40_000, MIB - 1];
      for (let i = 0; i < 30; i++) {
        if (i % 6 === 0) await client.got(i); // those in flight do not overlap
        const request = write(i, (i % 6) * (MIB + 100), patterned(lengths[i % 5]!, i));
        client.send(request);
        request.payload!.copy(disk.content, Number(request.offset));
      }
      for (const { errno } of await client.got(30)) assert.equal(errno, 0);
      disk.holds();
    });

    it('a read-only session refuses WRITEs, whether the device could write or not', async () => {
      for (const readOnly of [true, false]) {
        const disk = rig.disk(CONTENT, readOnly);
        const { client } = rig.serve(disk.device, form, 'descriptor', { readOnly: !readOnly });
        client.send(
          write(1, 0, Buffer.alloc(B)),
          write(2, B, Buffer.alloc(MIB)),
          write(3, 0, Buffer.alloc(9), CommandFlag.FUA),
          read(4, 0, B),
        );
        const replies = await client.got(4);
        assert.deepEqual(
          replies.map(({ cookie, errno }) => [cookie, errno]),
          [1, 2, 3, 4].map((cookie) => [cookie, cookie === 4 ? 0 : Errno.EPERM]),
        );
        assert.ok(replies[3]!.data!.equals(CONTENT.subarray(0, B)));
        disk.holds();
      }
    });
  });
}
