import assert from 'node:assert/strict';
import { once } from 'node:events';
import type net from 'node:net';
import { describe, it } from 'node:test';
import pino from 'pino';
import { Command, Errno, IN_FLIGHT_BYTES_MAX, UNSENT_BYTES_MAX } from '../../../src/nbd/constants.js';
import { type Session, startSession } from '../../../src/nbd/server/session.js';
import { MemoryDevice } from '../../fakes/memory-device.js';
import { RawClient, tcpPair, until } from '../../fakes/raw-client.js';

const { READ, WRITE } = Command;
const READS = 32;
const LENGTH = 1 << 20;

interface Rig {
  device: MemoryDevice;
  session: Session;
  socket: net.Socket;
  client: RawClient;
}

async function rig(): Promise<Rig> {
  const device = new MemoryDevice(LENGTH);
  const [server, socket] = await tcpPair();
  const parameters = {
    structured: false,
    contexts: [],
    rest: Buffer.alloc(0),
    log: pino({ level: 'silent' }),
  };
  const session = startSession(server, { device, ...parameters });
  socket.pause();
  return { device, session, socket, client: new RawClient(socket, false) };
}

function reads(client: RawClient): Buffer {
  return Buffer.concat(
    Array.from({ length: READS }, (_, cookie) => client.encode({ command: READ, cookie, length: LENGTH })),
  );
}

function writes(client: RawClient, count: number, payload: Buffer): Buffer {
  return Buffer.concat(
    Array.from({ length: count }, (_, i) => client.encode({ command: WRITE, cookie: READS + i, payload })),
  );
}

async function close({ session, socket }: Rig): Promise<void> {
  socket.destroy();
  await Promise.all([session.closed, socket.closed ? undefined : once(socket, 'close')]);
}

describe('answers that the client does not take', () => {
  it('little is read ahead, but one who writes all before it reads is not waited for', async () => {
    const made = await rig();
    const { device, session, client, socket } = made;
    const payload = Buffer.alloc(LENGTH, 7);
    let sent = false;
    // More than the sockets hold: it is sent only if we read on.
    socket.write(Buffer.concat([reads(client), writes(client, READS, payload)]), () => {
      sent = true;
    });
    await until(() => session.inFlightBytes > 0);
    assert.ok(session.inFlightBytes <= UNSENT_BYTES_MAX + 2 * LENGTH, `${session.inFlightBytes} bytes`);
    await until(() => sent);
    assert.ok(session.inFlightBytes <= IN_FLIGHT_BYTES_MAX);
    socket.resume();
    assert.equal((await client.got(2 * READS)).length, 2 * READS);
    assert.ok(device.data.equals(payload));
    await close(made);
  });

  it('one who ends its side and reads then gets them all, and what it wanted changed stays as it is', async () => {
    const made = await rig();
    const { device, session, client, socket } = made;
    socket.write(Buffer.concat([reads(client), writes(client, 1, Buffer.alloc(4096, 7))]));
    await until(() => session.inFlightBytes > UNSENT_BYTES_MAX);
    assert.ok(device.calls.length < READS);
    socket.end();
    socket.resume();
    const replies = await client.got(READS + 1);
    assert.deepEqual(
      replies.map(({ errno }) => errno),
      [...Array<number>(READS).fill(Errno.OK), Errno.ESHUTDOWN],
    );
    assert.equal(device.data[0], 0);
    await close(made);
  });
});
