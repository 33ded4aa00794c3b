/**
 * One end of a test's traffic, for a namespace: `serve ADDRESS` (prints `port N`, then `bytes N` as they come; connections whose first
 * byte is ECHO are echoed), `ping ADDRESS PORT COUNT` (prints round trips in ms as JSON), `send ADDRESS PORT` (without end), or
 * `datagrams ADDRESS COUNT BYTES`. It ends when its work or its stdin does.
 */

import { createSocket } from 'node:dgram';
import { once } from 'node:events';
import { type AddressInfo, connect, createServer } from 'node:net';

const ECHO = 0x65;
const MESSAGE = Buffer.alloc(16, ECHO);
const CHUNK = Buffer.alloc(256 * 1024);
const REPORT_MS = 20;
const DISCARD_PORT = 9;

async function serve(address: string): Promise<void> {
  let bytes = 0;
  let reported = 0;
  const server = createServer({ noDelay: true }, (socket) => {
    let echo: boolean | null = null;
    socket.on('error', () => {});
    socket.on('data', (chunk) => {
      bytes += chunk.length;
      echo ??= chunk[0] === ECHO;
      if (echo) socket.write(chunk);
    });
  });
  server.listen(0, address);
  await once(server, 'listening');
  console.log(`port ${(server.address() as AddressInfo).port}`);
  setInterval(() => {
    if (bytes > reported) console.log(`bytes ${bytes}`);
    reported = bytes;
  }, REPORT_MS);
}

async function ping(address: string, port: number, count: number): Promise<void> {
  const socket = connect({ host: address, port, noDelay: true });
  await once(socket, 'connect');
  const times: number[] = [];
  for (let i = 0; i < count; i++) {
    const start = performance.now();
    socket.write(MESSAGE);
    for (let got = 0; got < MESSAGE.length; ) got += ((await once(socket, 'data')) as [Buffer])[0].length;
    times.push(performance.now() - start);
  }
  console.log(JSON.stringify(times));
  process.exit();
}

function send(address: string, port: number): void {
  const socket = connect({ host: address, port });
  const more = (): void => {
    while (socket.write(CHUNK));
  };
  socket.on('connect', more).on('drain', more);
}

async function datagrams(address: string, count: number, bytes: number): Promise<void> {
  const socket = createSocket('udp4');
  socket.on('error', () => {}); // nobody listens there
  for (let i = 0; i < count; i++) {
    await new Promise((resolve) => socket.send(CHUNK.subarray(0, bytes), DISCARD_PORT, address, resolve));
  }
  process.exit();
}

const [what, address = '', ...numbers] = process.argv.slice(2);
const [first = 0, second = 0] = numbers.map(Number);
process.stdin.resume().on('end', () => process.exit());
if (what === 'serve') await serve(address);
else if (what === 'ping') await ping(address, first, second);
else if (what === 'send') send(address, first);
else if (what === 'datagrams') await datagrams(address, first, second);
else throw new Error(`no such peer: ${what}`);
