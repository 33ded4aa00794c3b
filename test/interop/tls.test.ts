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
import { lacking } from '../lab/programs.js';
import { makePki, type Pki } from '../support/pki.js';
import { overTcp, type PeerServer, startNbdServer, startPeer } from './servers.js';
import { serveTls, tlsKinds } from './tls-kinds.js';
import { needsLibnbd, PYTHON } from './tools.js';

const run = promisify(execFile);
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

const KINDS = tlsKinds(() => pki);

let serial = 0;

for (const kind of KINDS) {
  describe(`their clients, our server, ${kind.name}`, { skip: lacking('setpriv', 'openssl') }, () => {
    let daemon: DaemonProcess;
    let path: string;
    let socket: string;
    let port: string;
    let uris: readonly [string, string];
    before(async () => {
      path = image(`serve-${kind.name}`, content);
      ({ daemon, socket, port, uris } = await serveTls(folder, path, 'required', kind));
    });
    after(() => daemon?.stop());

    const qemuOptions = (over: number) => {
      const where = [
        `server.type=unix,server.path=${socket}`,
        `server.type=inet,server.host=localhost,server.port=${port}`,
      ];
      const name = kind.name === 'x509' ? ',tls-hostname=localhost' : '';
      const opts = `driver=nbd,export=disk,${where[over]},tls-creds=t${name}`;
      return ['--object', kind.qemu('client'), '--image-opts', opts];
    };

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

    test("libnbd's Python: TLS required, read, write, flush", needsLibnbd(), async () => {
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

    for (const index of [0, 1])
      test(`qemu-img compares, qemu-io writes and reads, over ${['a unix socket', 'TCP'][index]}`, {
        skip: lacking('qemu-img', 'qemu-io'),
      }, async () => {
        const plain = image(`plain-${kind.name}`, readFileSync(path));
        const opts = qemuOptions(index);
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
        const all = commands.flatMap((command) => ['-c', command]);
        const out = await works('qemu-io', ...opts.slice(0, 3), ...all, opts[3]!);
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
    const nbdkit = (mode: string) => (file: string) =>
      startPeer((_, socket) => [
        'nbdkit',
        '-f',
        '-U',
        socket,
        `--tls=${mode}`,
        ...kind.nbdkit(),
        'file',
        file,
      ]);
    const servers: [name: string, program: string, start: (file: string) => Promise<PeerServer>][] = [
      ['nbdkit --tls=on', 'nbdkit', nbdkit('on')],
      ['nbdkit --tls=require', 'nbdkit', nbdkit('require')],
      [
        'qemu-nbd --tls-creds',
        'qemu-nbd',
        (file) =>
          startPeer((_, socket) => [
            ...['qemu-nbd', '-f', 'raw', '-k', socket, '-t', '-e', '8'],
            ...['--object', kind.qemu('server'), '--tls-creds', 't', file],
          ]),
      ],
    ];
    // nbd-server knows no keys.
    if (kind.name === 'x509')
      servers.push([
        'nbd-server, FORCEDTLS',
        'nbd-server',
        (file) => {
          const files = { cacertfile: 'ca-cert', certfile: 'server-cert', keyfile: 'server-key' };
          const lines = Object.entries(files).map(([key, name]) => `${key} = ${pki.good}/${name}.pem\n`);
          return startNbdServer(async () => file, ['disk'], `force_tls = true\n${lines.join('')}`);
        },
      ]);
    for (const [name, program, start] of servers) {
      test(`${name}: client and proxy, over unix and TCP`, { skip: lacking(program) }, async () => {
        const server = await start(image(`source-${serial++}`, content));
        const tcp = await overTcp(server.socket);
        try {
          const exportName = program === 'nbd-server' ? 'disk' : '';
          const unix = `nbds+unix://${kind.user}/${exportName}?socket=${server.socket}`;
          const inet = `nbds://${kind.user}localhost:${tcp.port}/${exportName}`;
          await readsAndWrites(`${unix}&${kind.parameters()}`);
          await readsAndWrites(`${inet}?${kind.parameters()}`);
          await proxied(`${unix}&${kind.parameters()}`);
          await proxied(inet, kind.options().slice(0, 2));
          if (name !== 'nbdkit --tls=on')
            await assert.rejects(NbdClient.connect(server.uriOf(exportName)), { message: /demands TLS/ });
        } finally {
          await tcp.close();
          await server.stop();
        }
      });
    }
  });
}

async function readsAndWrites(uri: string): Promise<void> {
  const client = await NbdClient.connect(uri);
  const into = Buffer.alloc(IMAGE_BYTES);
  await Promise.all(Array.from({ length: 8 }, (_, i) => client.read(i << 20, 1 << 20, into, i << 20)));
  assert.ok(into.equals(content));
  await client.write(4096, Buffer.alloc(4096, 9));
  await client.flush();
  assert.ok((await client.read(4096, 4096)).equals(Buffer.alloc(4096, 9)));
  await client.write(4096, content, 4096, 4096);
  await client.flush();
  await client.close();
}

/** A proxy with that source ends with the source's content. Credentials are in the URI or among the options. */
async function proxied(source: string, options: readonly string[] = []): Promise<void> {
  const disk = join(folder, `proxy-${++serial}`);
  const socket = join(folder, `${serial}.sock`);
  const control = join(folder, `${serial}.c`);
  const state = ['--state-dir', join(folder, `${serial}.state`), '--control', control];
  const daemon = await DaemonProcess.start([
    ...['proxy', source, disk, '--listen', `unix:${socket}`, ...state, ...options],
  ]);
  try {
    const client = await NbdClient.connect(daemon.uris[0]!);
    assert.ok((await client.read(2 << 20, 1 << 20)).equals(content.subarray(2 << 20, 3 << 20)));
    await client.close();
    const watched = await runBlockferry(['watch', '--control', control]);
    assert.equal(watched.code, 0, watched.stderr);
    assert.ok(readFileSync(disk).equals(content));
  } finally {
    await daemon.stop();
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
    const { daemon, socket } = await serveTls(folder, image('allowed', content), 'allowed', KINDS[1]);
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
