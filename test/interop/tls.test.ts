// TLS with other people's programs: their clients with our server, our client and our proxy with their servers, certificates and keys.
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { promisify } from 'node:util';
import { BlockferryError } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { DaemonProcess, LabHost, runBlockferry } from '../lab/hosts.js';
import { makePki, type Pki } from '../support/pki.js';
import { lacking, startPeer } from './servers.js';

const run = promisify(execFile);
const PYTHON = '/usr/bin/python3';
const IMAGE_BYTES = 8 << 20;

let folder: string;
let pki: Pki;
let content: Buffer;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-tls-'));
  pki = makePki();
  content = Buffer.alloc(IMAGE_BYTES);
  randomBytes(IMAGE_BYTES / 2).copy(content, IMAGE_BYTES / 4);
});
after(() => {
  rmSync(folder, { recursive: true, force: true });
  pki.remove();
});

interface Result {
  failed: boolean;
  stdout: string;
  stderr: string;
}

async function tool(command: string, ...words: string[]): Promise<Result> {
  try {
    return { failed: false, ...(await run(command, words, { timeout: 60_000, maxBuffer: 64 << 20 })) };
  } catch (error) {
    const { stdout = '', stderr = '' } = error as Partial<Result>;
    return { failed: true, stdout, stderr };
  }
}

async function works(command: string, ...words: string[]): Promise<string> {
  const { failed, stdout, stderr } = await tool(command, ...words);
  assert.ok(!failed, `${command} ${words.join(' ')}: ${stderr}`);
  return stdout;
}

function image(name: string, bytes: Buffer): string {
  const path = join(folder, name);
  writeFileSync(path, bytes);
  return path;
}

interface Kind {
  name: 'x509' | 'psk';
  /** Options of `blockferry serve` and `proxy`. */
  options(): string[];
  /** Of a URI: who before the host, and parameters. */
  user: string;
  parameters(): string;
  /** QEMU's object, with the id `t`. */
  qemu(endpoint: 'client' | 'server'): string;
  nbdkit(): string[];
}

const KINDS: Kind[] = [
  {
    name: 'x509',
    options: () => ['--tls-certificates', pki.good, '--tls-verify-peer'],
    user: '',
    parameters: () => `tls-certificates=${pki.good}`,
    qemu: (endpoint) => `tls-creds-x509,id=t,endpoint=${endpoint},dir=${pki.good},verify-peer=on`,
    nbdkit: () => [`--tls-certificates=${pki.good}`, '--tls-verify-peer'],
  },
  {
    name: 'psk',
    options: () => ['--tls-psk', pki.keys],
    user: 'alice@',
    parameters: () => `tls-psk-file=${pki.keys}`,
    qemu: (endpoint) =>
      `tls-creds-psk,id=t,endpoint=${endpoint},dir=${pki.keysFolder}${endpoint === 'client' ? ',username=alice' : ''}`,
    nbdkit: () => [`--tls-psk=${pki.keys}`],
  },
];

let serial = 0;

/** `blockferry serve` of an image, on a unix socket and on TCP. */
async function serve(
  path: string,
  mode: string,
  kind: Kind,
): Promise<{ daemon: DaemonProcess; socket: string }> {
  const socket = join(folder, `${++serial}.sock`);
  const where = [
    '--listen',
    `unix:${socket}`,
    '--listen',
    '127.0.0.1:0',
    '--state-dir',
    join(folder, `${serial}.state`),
  ];
  const daemon = await DaemonProcess.start([
    'serve',
    path,
    '--name',
    'disk',
    ...where,
    '--tls',
    mode,
    ...kind.options(),
  ]);
  return { daemon, socket };
}

for (const kind of KINDS) {
  describe(`their clients, our server, ${kind.name}`, { skip: lacking('setpriv', 'openssl') }, () => {
    let daemon: DaemonProcess;
    let path: string;
    let socket: string;
    let uris: string[];
    before(async () => {
      path = image(`serve-${kind.name}`, content);
      ({ daemon, socket } = await serve(path, 'required', kind));
      const port = daemon.uris.find((uri) => uri.startsWith('nbds://'))!.match(/:(\d+)\//)![1];
      uris = [
        `nbds+unix://${kind.user}/disk?socket=${socket}&${kind.parameters()}`,
        `nbds://${kind.user}localhost:${port}/disk?${kind.parameters()}`,
      ];
    });
    after(() => daemon?.stop());

    const qemuOptions = () => [
      '--object',
      kind.qemu('client'),
      '--image-opts',
      `driver=nbd,export=disk,server.type=unix,server.path=${socket},tls-creds=t${kind.name === 'x509' ? ',tls-hostname=localhost' : ''}`,
    ];

    for (const index of [0, 1]) {
      const over = ['a unix socket', 'TCP'][index];
      test(`nbdinfo over ${over}`, { skip: lacking('nbdinfo') }, async () => {
        const { protocol, TLS, exports } = JSON.parse(
          await works('nbdinfo', '--json', '--list', uris[index]!),
        );
        assert.deepEqual([protocol, TLS], ['newstyle-fixed', true]);
        assert.equal(exports[0]['export-name'], 'disk');
        assert.match(await works('nbdinfo', '--map', uris[index]!), /data/);
      });
      test(`nbdcopy there and back over ${over}`, { skip: lacking('nbdcopy') }, async () => {
        const [from, to] = [join(folder, 'from'), join(folder, 'to')];
        const other = randomBytes(IMAGE_BYTES);
        writeFileSync(from, other);
        await works('nbdcopy', '--connections=4', '--requests=16', from, uris[index]!);
        await works('nbdcopy', '--connections=4', '--requests=16', uris[index]!, to);
        assert.ok(readFileSync(to).equals(other));
        writeFileSync(from, content);
        await works('nbdcopy', from, uris[index]!);
        assert.ok(readFileSync(path).equals(content));
      });
    }

    test("libnbd's Python: TLS required, read, write, flush", { skip: lacking(PYTHON) }, async () => {
      const script = `
import nbd, sys
h = nbd.NBD()
h.set_uri_allow_local_file(True)
h.connect_uri(sys.argv[1])
assert h.get_tls_negotiated()
assert h.get_structured_replies_negotiated()
old = h.pread(1000, 77)
h.pwrite(b'z' * 1000, 77, nbd.CMD_FLAG_FUA)
assert h.pread(1000, 77) == b'z' * 1000
h.pwrite(old, 77)
h.flush()
h.shutdown()
print('fine')`;
      assert.equal(await works(PYTHON, '-c', script, uris[0]!), 'fine\n');
    });

    test('qemu-img compares, qemu-io writes and reads', {
      skip: lacking('qemu-img', 'qemu-io'),
    }, async () => {
      const plain = image(`plain-${kind.name}`, content);
      const opts = qemuOptions();
      const other = `driver=raw,file.driver=file,file.filename=${plain}`;
      assert.match(await works('qemu-img', 'compare', ...opts, other), /identical/);
      const commands = [
        'w -P 7 0 1M',
        'w -z 1M 64k',
        'discard 2M 1M',
        'flush',
        'r -P 7 0 1M',
        'r -P 0 1M 64k',
      ];
      const out = await works(
        'qemu-io',
        ...opts.slice(0, 3),
        ...commands.flatMap((c) => ['-c', c]),
        opts[3]!,
      );
      assert.doesNotMatch(out, /fail|error/i);
    });

    test('without TLS nobody gets in', { skip: lacking('nbdinfo') }, async () => {
      const { failed, stderr } = await tool('nbdinfo', `nbd+unix:///disk?socket=${socket}`);
      assert.ok(failed);
      assert.match(stderr, /not supported|TLS/); // what libnbd makes of ERR_TLS_REQD
      await works('nbdinfo', uris[0]!);
    });

    test('wrong credentials are refused, the others served on', { skip: lacking('nbdinfo') }, async () => {
      const wrong =
        kind.name === 'x509'
          ? [pki.stranger, pki.anonymous, pki.expired].map(
              (dir) => `?socket=${socket}&tls-certificates=${dir}`,
            )
          : [`?socket=${socket}&tls-psk-file=${pki.wrongKeys}`];
      for (const query of wrong) {
        const { failed } = await tool('nbdinfo', `nbds+unix://${kind.user}/disk${query}`);
        assert.ok(failed, query);
        await works('nbdinfo', uris[0]!);
      }
      const said = kind.name === 'x509' ? /it has no certificate/ : /the keys \(PSK\) differ/;
      assert.match(daemon.stderr, said);
      if (kind.name === 'x509') assert.match(daemon.stderr, /its certificate has expired/);
    });
  });

  describe(`our client and proxy, their servers, ${kind.name}`, {
    skip: lacking('setpriv', 'openssl'),
  }, () => {
    const servers: [name: string, program: string, command: (file: string, socket: string) => string[]][] = [
      [
        'nbdkit --tls=on',
        'nbdkit',
        (file, socket) => ['nbdkit', '-f', '-U', socket, '--tls=on', ...kind.nbdkit(), 'file', file],
      ],
      [
        'nbdkit --tls=require',
        'nbdkit',
        (file, socket) => ['nbdkit', '-f', '-U', socket, '--tls=require', ...kind.nbdkit(), 'file', file],
      ],
      [
        'qemu-nbd --tls-creds',
        'qemu-nbd',
        (file, socket) => [
          'qemu-nbd',
          '-f',
          'raw',
          '-k',
          socket,
          '-t',
          '-e',
          '8',
          '--object',
          kind.qemu('server'),
          '--tls-creds',
          't',
          file,
        ],
      ],
    ];
    for (const [name, program, command] of servers) {
      test(`${name}: client and proxy`, { skip: lacking(program) }, async () => {
        const file = image(`source-${serial++}`, content);
        const server = await startPeer((_, socket) => command(file, socket));
        try {
          const socket = new URL(server.uri).searchParams.get('socket')!;
          const uri = `nbds+unix://${kind.user}/?socket=${socket}&${kind.parameters()}`;
          const client = await NbdClient.connect(uri);
          const into = Buffer.alloc(IMAGE_BYTES);
          await Promise.all(
            Array.from({ length: 8 }, (_, i) => client.read(i << 20, 1 << 20, into, i << 20)),
          );
          assert.ok(into.equals(content));
          await client.write(4096, Buffer.alloc(4096, 9), 0, 4096);
          await client.flush();
          await client.write(4096, content, 4096, 4096);
          await client.flush();
          await client.close();
          await proxied(uri, kind);
        } finally {
          await server.stop();
        }
      });
    }
  });
}

/** A proxy with that source ends with the source's content, by the URI's credentials as well as by the options'. */
async function proxied(uri: string, kind: Kind): Promise<void> {
  const bare = uri.replace(/&tls-.*/, '');
  const options = kind.name === 'x509' ? ['--tls-certificates', pki.good] : ['--tls-psk', pki.keys];
  for (const [source, more] of [
    [uri, []],
    [bare, options],
  ] as const) {
    const disk = join(folder, `proxy-${++serial}`);
    const socket = join(folder, `${serial}.sock`);
    const state = join(folder, `${serial}.state`);
    const control = join(folder, `${serial}.c`);
    const words = [
      'proxy',
      source,
      disk,
      '--listen',
      `unix:${socket}`,
      '--state-dir',
      state,
      '--control',
      control,
    ];
    const daemon = await DaemonProcess.start([...words, ...more]);
    try {
      const client = await NbdClient.connect(daemon.uris[0]!);
      const into = Buffer.alloc(1 << 20);
      await client.read(2 << 20, into.length, into);
      assert.ok(into.equals(content.subarray(2 << 20, 3 << 20)));
      await client.close();
      const watched = await runBlockferry(['watch', '--control', control]);
      assert.equal(watched.code, 0, watched.stderr);
      assert.ok(readFileSync(disk).equals(content));
    } finally {
      await daemon.stop();
    }
  }
}

describe('servers that are not to be trusted', { skip: lacking('setpriv', 'openssl', 'nbdkit') }, () => {
  async function refused(folderOf: () => string, parameters: () => string, why: RegExp): Promise<void> {
    const server = await startPeer((_, socket) => [
      ...['nbdkit', '-f', '-U', socket, '--tls=on', `--tls-certificates=${folderOf()}`, 'memory', '1M'],
    ]);
    try {
      const uri = `${server.uri.replace('nbd+unix', 'nbds+unix')}&${parameters()}`;
      await assert.rejects(
        NbdClient.connect(uri),
        (error) => error instanceof BlockferryError && error.code === 'tls' && why.test(error.message),
      );
      const disk = join(folder, `refused-${++serial}`);
      const where = [
        '--state-dir',
        join(folder, `${serial}.state`),
        '--listen',
        `unix:${join(folder, `${serial}.sock`)}`,
      ];
      const { code, stderr } = await runBlockferry(['proxy', uri, disk, ...where]);
      assert.equal(code, 1);
      assert.match(stderr, why);
      assert.equal(stderr.trim().split('\n').length, 1, stderr);
    } finally {
      await server.stop();
    }
  }
  const good = () => `tls-certificates=${pki.good}`;
  test('another authority', () => refused(() => pki.stranger, good, /signed by no authority we trust/));
  test('expired', () => refused(() => pki.expired, good, /certificate has expired/));
  test('another name', () =>
    refused(
      () => pki.elsewhere,
      () => `${good()}&tls-hostname=localhost`,
      /altnames: DNS:elsewhere\.example/,
    ));
  test('one without TLS is not spoken to in clear text', async () => {
    const server = await startPeer((_, socket) => ['nbdkit', '-f', '-U', socket, 'memory', '1M']);
    try {
      const uri = `${server.uri.replace('nbd+unix', 'nbds+unix')}&${good()}`;
      await assert.rejects(NbdClient.connect(uri), { code: 'tls', message: /offers no TLS/ });
    } finally {
      await server.stop();
    }
  });
});

describe('TLS allowed', { skip: lacking('setpriv', 'openssl', 'nbdinfo') }, () => {
  test('both kinds of clients are served', async () => {
    const { daemon, socket } = await serve(image('allowed', content), 'allowed', KINDS[1]!);
    try {
      const with_ = JSON.parse(
        await works('nbdinfo', '--json', `nbds+unix://bob@/?socket=${socket}&tls-psk-file=${pki.keys}`),
      );
      const without = JSON.parse(await works('nbdinfo', '--json', `nbd+unix:///?socket=${socket}`));
      assert.deepEqual([with_.TLS, without.TLS], [true, false]);
      assert.deepEqual(
        daemon.uris.map((uri) => uri.split(':')[0]),
        ['nbds+unix', 'nbds', 'nbd+unix', 'nbd'],
      );
    } finally {
      await daemon.stop();
    }
  });
});

describe('the link between two hosts', { skip: lacking('setpriv', 'openssl') }, () => {
  for (const kind of ['certificates', 'psk'] as const)
    test(`with ${kind}: a volume arrives over TLS, and nobody reads it without`, async () => {
      const path = image(`host-${kind}`, content);
      const settings = kind === 'psk' ? { psk: pki.keys, username: 'bob' } : { certificates: pki.good };
      const volumes = [{ name: 'disk', image: path }];
      const a = await LabHost.start({ folder, name: `a-${kind}`, volumes, tls: settings });
      const b = await LabHost.start({ folder, name: `b-${kind}`, tls: settings });
      try {
        const view = await a.client.volume('disk');
        assert.ok(view.phase === 'plain' && view.linkUri !== null);
        assert.match(view.linkUri, /^nbds:\/\/127\.0\.0\.1:/);
        const { id: volumeId, generation, size, linkUri: sourceUri } = view;
        await assert.rejects(NbdClient.connect(sourceUri.replace('nbds:', 'nbd:')), /demands TLS/);
        const request = { name: 'disk', volumeId, generation, size, sourceUri, rateBytesPerSecond: null };
        const arrived = await b.client.createVolume(request);
        assert.ok(arrived.phase === 'standby');
        const client = await NbdClient.connect(arrived.uri[0]!);
        const into = Buffer.alloc(1 << 20);
        await client.read(2 << 20, into.length, into);
        assert.ok(into.equals(content.subarray(2 << 20, 3 << 20)));
        await client.close();
      } finally {
        await b.stop();
        await a.stop();
      }
    });
});

describe('wrong words', () => {
  const disk = () => {
    const path = join(folder, 'words');
    writeFileSync(path, '');
    truncateSync(path, 1 << 20);
    return path;
  };
  for (const [what, words, why] of [
    [
      'a mode without credentials',
      ['--tls', 'required'],
      /needs --tls-certificates FOLDER or --tls-psk FILE/,
    ],
    ['credentials without a mode', ['--tls-psk', '/nowhere'], /add --tls required/],
    ['an unknown mode', ['--tls', 'maybe'], /off, allowed, required/],
    ['both kinds', ['--tls', 'required', '--tls-psk', 'a', '--tls-certificates', 'b'], /cannot be used with/],
    [
      'peers of keys',
      ['--tls', 'required', '--tls-psk', 'a', '--tls-verify-peer'],
      /needs --tls and --tls-certificates/,
    ],
  ] as const)
    test(what, async () => {
      const state = ['--state-dir', join(folder, 'words.state')];
      const { code, stderr } = await runBlockferry(['serve', disk(), ...state, ...words]);
      assert.equal(code, 2, stderr);
      assert.match(stderr, why);
    });
  test('files that are not there fail the start in one line', async () => {
    const state = ['--state-dir', join(folder, 'words.state')];
    const { code, stderr } = await runBlockferry([
      'serve',
      disk(),
      ...state,
      '--tls',
      'required',
      '--tls-psk',
      '/nowhere',
    ]);
    assert.equal(code, 1);
    assert.equal(
      stderr,
      "blockferry: cannot read /nowhere: ENOENT: no such file or directory, stat '/nowhere'\n",
    );
  });
});
