// Garbage on the control socket: each piece gets an answer or is cut off, and the daemon goes on.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { pattern } from '../clients/disks.js';

const MIB = 1 << 20;
const ANSWER_TIMEOUT_MS = 15_000;

let folder: string;
let daemon: DaemonProcess;
let source: DaemonProcess;
let control: string;

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-control-'));
  writeFileSync(join(folder, 'disk.img'), pattern(4 * MIB, 1));
  const listen = (name: string): string[] => [
    '--listen',
    `unix:${join(folder, name)}`,
    '--log-level',
    'warn',
  ];
  source = await DaemonProcess.start([
    'serve',
    join(folder, 'disk.img'),
    '--state-dir',
    join(folder, 's'),
    ...listen('src'),
  ]);
  const copy = join(folder, 'copy.img');
  const words = [
    'proxy',
    source.uris[0],
    copy,
    '--name',
    'disk',
    '--state-dir',
    join(folder, 'state'),
    '--standby',
  ];
  daemon = await DaemonProcess.start([...words, ...listen('dst')]);
  control = join(folder, 'state', 'control', 'disk.sock');
});
after(async () => {
  try {
    assert.equal(await daemon.stop(), 0, daemon.stderr);
    assert.doesNotMatch(daemon.stderr, /TypeError|unexpected|"level":50/);
    assert.equal(await source.stop(), 0);
  } finally {
    daemon.kill();
    source.kill();
    rmSync(folder, { recursive: true });
  }
});

/** What comes back for those bytes until the daemon closes, or until `ours` ends our side. */
async function exchange(bytes: Buffer | string, ours: 'end' | 'wait' = 'end'): Promise<string> {
  const socket = net.connect(control);
  let answer = '';
  socket.setEncoding('latin1').on('data', (text: string) => {
    answer += text;
  });
  socket.on('error', () => undefined);
  const closed = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  if (ours === 'end') socket.end(bytes);
  else socket.write(bytes);
  const timer = setTimeout(() => socket.destroy(), ANSWER_TIMEOUT_MS);
  await closed;
  clearTimeout(timer);
  return answer;
}

function http(method: string, path: string, body = '', headers = ''): string {
  const length = `Content-Length: ${Buffer.byteLength(body)}\r\n`;
  return `${method} ${path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n${headers}${length}\r\n${body}`;
}

/** The status of the answer, whose body must be an error of one line. */
function refusal(answer: string): number {
  const [head, body] = answer.split('\r\n\r\n');
  const { error } = JSON.parse(body) as { error: { code: string; message: string } };
  assert.match(error.code, /^[a-z-]+$/);
  assert.match(error.message, /^[^\n]{5,600}$/);
  return Number(/^HTTP\/1\.1 (\d+)/.exec(head)![1]);
}

async function assertUnharmed(): Promise<void> {
  const { code, stdout, stderr } = await runBlockferry([
    'status',
    '--json',
    '--state-dir',
    join(folder, 'state'),
  ]);
  assert.equal(code, 0, stderr);
  const [{ volumes }] = JSON.parse(stdout);
  assert.equal(volumes[0].phase, 'standby');
  assert.equal(volumes[0].presentBytes, 0);
}

describe('garbage on the control socket', () => {
  test('what is no HTTP', async () => {
    const noise = Buffer.from(pattern(5000, 9));
    for (const bytes of [
      noise,
      Buffer.alloc(100_000),
      'NBDMAGICIHAVEOPT',
      '\r\n\r\n\r\n',
      'GET',
      'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
    ]) {
      const answer = await exchange(bytes);
      if (answer !== '') assert.equal(refusal(answer), 400);
    }
    await assertUnharmed();
  });

  test('headers and bodies that are too large', async () => {
    const line = `X-Long: ${'x'.repeat(1000)}\r\n`;
    const headers = await exchange(`GET /v1/status HTTP/1.1\r\nHost: x\r\n${line.repeat(200)}\r\n`);
    assert.match(headers, /^HTTP\/1\.1 4\d\d|^$/);
    const large = 'y'.repeat(3 * MIB);
    const body = await exchange(http('POST', '/v1/volumes/disk/rate', large), 'wait');
    if (body !== '') assert.equal(refusal(body), 413);
    const chunk = `${MIB.toString(16)}\r\n${'z'.repeat(MIB)}\r\n`;
    const chunked = `POST /v1/volumes/disk/rate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n${chunk.repeat(3)}`;
    const answer = await exchange(chunked, 'wait');
    if (answer !== '') assert.equal(refusal(answer), 413);
    await assertUnharmed();
  });

  test('half requests', async () => {
    const whole = http('POST', '/v1/volumes/disk/takeover', '{"generation": 2}');
    for (let end = 1; end < whole.length; end += 7) await exchange(whole.slice(0, end));
    await assertUnharmed();
  });

  test('routes and methods that do not exist', async () => {
    const cases: [string, string, number][] = [
      ['GET', '/', 404],
      ['GET', '/v2/status', 404],
      ['GET', '/v1/status/', 404],
      ['GET', '/v1/volumes/../../../etc/passwd', 404],
      ['GET', '/v1/volumes/%2e%2e%2fetc', 404],
      ['GET', '/v1/volumes/%ff', 404],
      ['GET', '/v1/volumes/nope', 404],
      ['GET', '/v1/volumes/__proto__', 404],
      ['POST', '/v1/volumes/constructor/pause', 404],
      ['POST', '/v1/status', 405],
      ['PUT', '/v1/volumes/disk/rate', 405],
      ['DELETE', '/v1/volumes/disk', 405],
    ];
    for (const [method, path, status] of cases)
      assert.equal(refusal(await exchange(http(method, path), 'wait')), status, `${method} ${path}`);
    await assertUnharmed();
  });

  test('JSON that is none, or says the wrong thing', async () => {
    const deep = '['.repeat(50_000) + ']'.repeat(50_000);
    const cases: [string, string][] = [
      ['rate', '{"bytesPerSecond": '],
      ['rate', 'null'],
      ['rate', '[]'],
      ['rate', '"x"'],
      ['rate', deep],
      ['rate', '{}'],
      ['rate', '{"bytesPerSecond": -1}'],
      ['rate', '{"bytesPerSecond": 0}'],
      ['rate', '{"bytesPerSecond": 1e308}'],
      ['rate', '{"bytesPerSecond": 1.5}'],
      ['rate', '{"bytesPerSecond": "1M"}'],
      ['rate', '{"bytesPerSecond": 1, "extra": true}'],
      ['rate', '{"__proto__": {"bytesPerSecond": 1}}'],
      ['prefetch', '{"offset": 0}'],
      ['prefetch', '{"offset": -4096, "length": 4096}'],
      ['takeover', '{"generation": "2"}'],
      ['takeover', '{"generation": null}'],
      ['takeover', '{"generation": -1}'],
      ['seal', '{}'],
      ['unseal', '{"volumeId": 5, "generation": 2}'],
      ['retire', '{"deleteImage": "yes"}'],
      ['cancel', '{"volumeId": ""}'],
      ['handoff-wait', '{"timeoutMs": 1e9}'],
      ['handoff-wait', '{"timeoutMs": "soon"}'],
    ];
    for (const [verb, body] of cases) {
      const status = refusal(await exchange(http('POST', `/v1/volumes/disk/${verb}`, body), 'wait'));
      assert.equal(status, 400, `${verb} ${body.slice(0, 60)}`);
    }
    const create = (change: object): string =>
      JSON.stringify({
        name: 'new',
        size: MIB,
        volumeId: 'x',
        generation: 1,
        sourceUri: 'nbd://127.0.0.1:1/',
        ...change,
      });
    for (const change of [
      { name: '../new' },
      { size: 0 },
      { image: 'relative.img' },
      { sourceUri: '' },
      { more: 1 },
    ])
      assert.equal(refusal(await exchange(http('POST', '/v1/volumes', create(change)), 'wait')), 400);
    assert.equal(
      refusal(await exchange(http('POST', '/v1/volumes', create({})), 'wait')),
      400,
      'a proxy takes no volume',
    );
    await assertUnharmed();
  });

  test('verbs that do not fit the phase', async () => {
    for (const [verb, body] of [
      ['seal', { generation: 2 }],
      ['unseal', { volumeId: 'x', generation: 2 }],
      ['retire', { deleteImage: true }],
    ] as const) {
      const answer = await exchange(http('POST', `/v1/volumes/disk/${verb}`, JSON.stringify(body)), 'wait');
      assert.ok([409, 404].includes(refusal(answer)), answer);
    }
    assert.equal(readFileSync(join(folder, 'copy.img')).length, 4 * MIB);
    await assertUnharmed();
  });

  test('hundreds of connections that say nothing do not lock the user out for good', async () => {
    const silent = Array.from({ length: 300 }, () => net.connect(control));
    await Promise.all(
      silent.map((socket) =>
        once(
          socket.on('error', () => undefined),
          'connect',
        ).catch(() => undefined),
      ),
    );
    for (const socket of silent) socket.destroy();
    await assertUnharmed();
  });
});
