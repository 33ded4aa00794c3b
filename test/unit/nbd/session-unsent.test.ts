import assert from 'node:assert/strict';
import { once } from 'node:events';
import { describe, it } from 'node:test';
import pino from 'pino';
import { Command, IN_FLIGHT_BYTES_MAX, UNSENT_BYTES_MAX } from '../../../src/nbd/constants.js';
import { startSession } from '../../../src/nbd/server/session.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import { RawClient, tcpPair, until } from '../../fakes/raw-client.js';

const { READ, WRITE } = Command;
const READS = 32;
const LENGTH = 1 << 20;

describe('answers that the client does not take', () => {
  it('nothing more is read for it than one long answer ahead of the socket, for a while', async () => {
    const device = new MemoryDevice(LENGTH);
    const [server, socket] = await tcpPair();
    const parameters = {
      structured: false,
      contexts: [],
      rest: Buffer.alloc(0),
      log: pino({ level: 'silent' }),
    };
    const session = startSession(server, { device, ...parameters });
    const client = new RawClient(socket, false);
    socket.pause();
    const payload = Buffer.alloc(LENGTH, 7);
    let sent = false;
    client.socket.write(
      Buffer.concat([
        ...Array.from({ length: READS }, (_, cookie) =>
          client.encode({ command: READ, cookie, length: LENGTH }),
        ),
        // More than the sockets hold: it is sent only if we read on.
        ...Array.from({ length: READS }, (_, i) =>
          client.encode({ command: WRITE, cookie: READS + i, payload }),
        ),
      ]),
      () => {
        sent = true;
      },
    );
    await until(() => session.inFlightBytes > 0);
    assert.ok(session.inFlightBytes <= UNSENT_BYTES_MAX + 2 * LENGTH, `${session.inFlightBytes} bytes`);
    // It writes all of it before it reads: it must not wait for us for ever.
    await until(() => sent);
    assert.ok(session.inFlightBytes <= IN_FLIGHT_BYTES_MAX);
    socket.resume();
    assert.equal((await client.got(2 * READS)).length, 2 * READS);
    assert.ok(device.data.equals(payload));
    socket.destroy();
    await Promise.all([session.closed, socket.closed ? undefined : once(socket, 'close')]);
  });
});
