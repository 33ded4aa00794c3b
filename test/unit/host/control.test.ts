import assert from 'node:assert/strict';
import { existsSync, mkdtempSync, renameSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { request as httpRequest } from 'node:http';
import { connect, createServer, type Server, type Socket } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import pino from 'pino';
import { z } from 'zod';
import { BlockferryError } from '../../../src/errors.js';
import { REQUEST_BODY_BYTES_MAX } from '../../../src/host/control/api.js';
import { ControlClient } from '../../../src/host/control/client.js';
import { ControlServer, route } from '../../../src/host/control/server.js';
import { liveControlSockets } from '../../../src/host/control/socket.js';

const log = pino({ level: 'silent' });
let folder: string;
let path: string;
let server: ControlServer;
let aborted: Promise<void>;

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-control-'));
  path = join(folder, 'control', 'a.sock');
  let announce: () => void = () => undefined;
  aborted = new Promise((resolve) => {
    announce = resolve;
  });
  const routes = [
    route('GET', '/v1/status', z.undefined(), async () => ({ fine: true })),
    route('GET', '/v1/volumes/:name', z.undefined(), async ({ params }) => {
      if (params.name === 'broken') throw new TypeError('a mistake of ours');
      throw new BlockferryError('not-found', `no volume ${params.name}`);
    }),
    route(
      'POST',
      '/v1/volumes/:name/seal',
      z.strictObject({ generation: z.number() }),
      async ({ params, body }) => ({
        name: params.name,
        generation: body.generation,
      }),
    ),
    route('POST', '/v1/volumes/:name/retreat', z.unknown(), async () => {
      throw new BlockferryError('phase', 'it has written');
    }),
    route('POST', '/v1/volumes/:name/handoff-wait', z.unknown(), ({ signal }) => {
      return new Promise((resolve) => {
        signal.addEventListener('abort', () => {
          announce();
          resolve({});
        });
      });
    }),
  ];
  server = await ControlServer.listen(path, routes, log);
});
after(async () => {
  await server.close();
  assert.equal(existsSync(path), false, 'the socket is gone with its server');
  rmSync(folder, { recursive: true, force: true });
});

interface Reply {
  status: number;
  headers: NodeJS.Dict<string | string[]>;
  body: { error?: { code: string; message: string } };
}

function send(method: string, url: string, body?: string | Buffer): Promise<Reply> {
  return new Promise((resolve, reject) => {
    const request = httpRequest({ socketPath: path, method, path: url, agent: false }, (response) => {
      const chunks: Buffer[] = [];
      response.on('data', (chunk: Buffer) => chunks.push(chunk));
      response.on('end', () => {
        const text = Buffer.concat(chunks).toString();
        const { statusCode: status = 0, headers } = response;
        resolve({ status, headers, body: JSON.parse(text) as Reply['body'] });
      });
    });
    request.on('error', reject);
    request.end(body);
  });
}

/** What the server answers to raw bytes before it hangs up. */
function raw(bytes: Buffer | string): Promise<string> {
  return new Promise((resolve) => {
    const socket = connect({ path });
    let text = '';
    socket.on('data', (chunk) => {
      text += chunk.toString('latin1');
    });
    socket.on('error', () => undefined);
    socket.on('close', () => resolve(text));
    socket.end(bytes);
  });
}

describe('control server', () => {
  test('is for its owner only', () => {
    assert.equal(statSync(path).mode & 0o777, 0o600);
    assert.equal(statSync(join(folder, 'control')).mode & 0o777, 0o700);
  });

  test('answers what it knows', async () => {
    const status = await send('GET', '/v1/status');
    assert.equal(status.status, 200);
    assert.deepEqual(status.body, { fine: true });
    const sealed = await send('POST', '/v1/volumes/my%20disk/seal', '{"generation": 3}');
    assert.deepEqual(sealed.body, { name: 'my disk', generation: 3 });
  });

  test('says what is wrong with a request', async () => {
    const cases: [string, string, string | undefined, number, RegExp][] = [
      ['GET', '/', undefined, 404, /no such path/],
      ['GET', '/v1/nothing', undefined, 404, /no such path/],
      ['GET', '/v1/volumes/%ff/x', undefined, 404, /no such path/],
      ['DELETE', '/v1/status', undefined, 405, /use GET/],
      ['POST', '/v1/volumes/d/seal', undefined, 400, /the body: expected object/],
      ['POST', '/v1/volumes/d/seal', '{', 400, /no JSON/],
      ['POST', '/v1/volumes/d/seal', '{"generation": "3"}', 400, /generation: expected number/],
      ['POST', '/v1/volumes/d/seal', '{"generation": 3, "x": 1}', 400, /x/],
      ['POST', '/v1/volumes/d/seal', '\u0000\u0001', 400, /no JSON/],
      ['GET', '/v1/volumes/d', undefined, 404, /no volume d/],
      ['POST', '/v1/volumes/d/retreat', '{}', 409, /it has written/],
      ['GET', '/v1/volumes/broken', undefined, 500, /unexpected failure/],
    ];
    for (const [method, url, body, status, message] of cases) {
      const reply = await send(method, url, body);
      assert.equal(reply.status, status, `${method} ${url}`);
      assert.match(reply.body.error?.message ?? '', message);
      assert.equal(typeof reply.body.error?.code, 'string');
    }
    assert.equal((await send('DELETE', '/v1/status')).headers.allow, 'GET');
  });

  test('reads no more of a body than it may', async () => {
    const reply = await send('POST', '/v1/volumes/d/seal', Buffer.alloc(REQUEST_BODY_BYTES_MAX + 1, 0x20));
    assert.equal(reply.status, 413);
    const answer = await raw(
      `POST /v1/volumes/d/seal HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n${' '.repeat(REQUEST_BODY_BYTES_MAX + 1)}`,
    );
    assert.match(answer, /^HTTP\/1.1 413 /);
  });

  test('lives through garbage', async () => {
    const garbage = [
      '\0\0\0\0\0\0\0\0\0\0',
      'NBDMAGICIHAVEOPT',
      'GET /v1/status HTTP/9.9\r\n\r\n',
      'GET\r\n\r\n',
      `GET /${'x'.repeat(100_000)} HTTP/1.1\r\nhost: x\r\n\r\n`,
      'POST /v1/volumes/d/seal HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZZ\r\n',
      'POST /v1/volumes/d/seal HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{',
      Buffer.from(Array.from({ length: 4096 }, (_, index) => (index * 7919) % 256)),
    ];
    for (const bytes of garbage) {
      const answer = await raw(bytes);
      assert.ok(answer === '' || /^HTTP\/1.1 4\d\d /.test(answer), JSON.stringify(answer.slice(0, 80)));
    }
    assert.equal((await send('GET', '/v1/status')).status, 200);
  });

  test('ends a long poll whose caller is gone', async () => {
    const request = httpRequest({
      socketPath: path,
      method: 'POST',
      path: '/v1/volumes/d/handoff-wait',
      agent: false,
    });
    request.on('error', () => undefined);
    request.end('{"timeoutMs": 60000}');
    await new Promise((resolve) => request.once('finish', resolve));
    // The server must have the request before its caller goes.
    await send('GET', '/v1/status');
    request.destroy();
    await aborted;
  });
});

describe('control socket', () => {
  test('that is alive is refused, a stale one is replaced', async () => {
    await assert.rejects(ControlServer.listen(path, [], log), {
      code: 'address',
      message: /already answers/,
    });
    const stale = join(folder, 'control', 'stale.sock');
    await leaveStale(stale);
    assert.deepEqual(await liveControlSockets(folder), [path]);
    const second = await ControlServer.listen(stale, [], log);
    assert.deepEqual(await liveControlSockets(folder), [path, stale]);
    await second.close();
  });

  test('never takes the place of a file', async () => {
    const file = join(folder, 'control', 'file.sock');
    writeFileSync(file, 'precious');
    await assert.rejects(ControlServer.listen(file, [], log), { code: 'address', message: /no socket/ });
    assert.deepEqual(await liveControlSockets(folder), [path]);
  });

  test('with too long a path says so', async () => {
    const long = join(folder, 'x'.repeat(120));
    await assert.rejects(ControlServer.listen(long, [], log), { code: 'address', message: /too long/ });
  });

  test('of a folder that is not there: no daemon', async () => {
    assert.deepEqual(await liveControlSockets(join(folder, 'nowhere')), []);
  });
});

/** A socket file whose server is gone without having removed it. */
async function leaveStale(at: string): Promise<void> {
  const listening = await listenAt(`${at}.was`, () => undefined);
  renameSync(`${at}.was`, at);
  await new Promise((resolve) => listening.close(resolve));
}

function listenAt(at: string, onConnection: (socket: Socket) => void): Promise<Server> {
  return new Promise((resolve, reject) => {
    const listening = createServer(onConnection);
    listening.once('error', reject);
    listening.listen({ path: at }, () => resolve(listening));
  });
}

describe('control client', () => {
  test('passes on what the daemon said', async () => {
    const client = new ControlClient(path);
    await assert.rejects(client.volume('d'), { code: 'not-found', message: 'no volume d' });
    await assert.rejects(client.retreat('d'), { code: 'phase', message: 'it has written' });
    await client.seal('d', 3);
    client.close();
    const prefixed = new ControlClient(`unix:${path}`);
    assert.deepEqual(await prefixed.status(), { fine: true });
    prefixed.close();
  });

  test('says why a daemon cannot be reached', async () => {
    const nowhere = new ControlClient(join(folder, 'nowhere.sock'));
    await assert.rejects(nowhere.status(), { code: 'control', message: /nowhere\.sock.*no such socket/ });
    const stale = join(folder, 'stale.sock');
    await leaveStale(stale);
    await assert.rejects(new ControlClient(stale).status(), { code: 'control', message: /nobody listens/ });
  });

  test('survives what is no daemon', async () => {
    const answers = [
      'SSH-2.0-x\r\n',
      'HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello',
      'HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{"half":',
      'HTTP/1.1 500 Oops\r\ncontent-length: 2\r\n\r\n{}',
      'HTTP/1.1 404 Oops\r\ncontent-length: 33\r\n\r\n{"error":{"code":"x","message":1}}',
      '',
    ];
    for (const answer of answers) {
      const at = join(folder, 'other.sock');
      const other = await listenAt(at, (socket) => {
        socket.on('error', () => undefined);
        socket.once('data', () => socket.end(answer));
      });
      await assert.rejects(new ControlClient(at).status(), { code: 'control' }, JSON.stringify(answer));
      await new Promise((resolve) => other.close(resolve));
    }
  });
});
