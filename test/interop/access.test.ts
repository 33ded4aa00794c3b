// Who sees and writes what, with the real commands and other people's clients; and how many of them there may be.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, afterEach, before, describe, test } from 'node:test';
import { NbdClient } from '../../src/nbd/client/client.js';
import { DaemonProcess, LabHost, runBlockferry } from '../lab/hosts.js';
import { makePki, type Pki } from '../support/pki.js';
import { RawClient } from '../support/raw-client.js';
import { attempt, needs, needsLibnbd, PYTHON, tool } from './tools.js';

const IMAGE_BYTES = 4 << 20;

let folder: string;
let pki: Pki;
let cleanups: (() => unknown)[] = [];
let serial = 0;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-access-'));
  pki = makePki();
});
afterEach(async () => {
  for (const cleanup of cleanups.reverse()) await cleanup();
  cleanups = [];
});
after(() => {
  rmSync(folder, { recursive: true, force: true });
  pki.remove();
});

function image(): string {
  const path = join(folder, `${++serial}.img`);
  writeFileSync(path, randomBytes(IMAGE_BYTES));
  return path;
}

interface Served {
  daemon: DaemonProcess;
  path: string;
  /** Of a unix socket, and of TCP. */
  unix: string;
  tcp: string;
}

async function serve(...options: string[]): Promise<Served> {
  const path = image();
  const socket = join(folder, `${serial}.sock`);
  const where = ['--listen', `unix:${socket}`, '--listen', '127.0.0.1:0'];
  const state = ['--state-dir', join(folder, `${serial}.state`)];
  const daemon = await DaemonProcess.start(['serve', path, '--name', 'disk', ...where, ...state, ...options]);
  cleanups.push(() => daemon.stop());
  const uri = (part: string) => daemon.uris.find((known) => known.includes(part))!;
  return { daemon, path, unix: uri('+unix'), tcp: uri('://127') };
}

const rules = (...all: string[]) => all.flatMap((rule) => ['--access', rule]);

async function exportsAt(uri: string): Promise<string[]> {
  const { exports } = JSON.parse(await tool('nbdinfo', '--json', '--list', uri));
  return exports.map((one: { 'export-name': string }) => one['export-name']);
}

async function readOnlyAt(uri: string): Promise<boolean> {
  return JSON.parse(await tool('nbdinfo', '--json', uri)).exports[0].is_read_only;
}

describe('by address', needs('setpriv', 'nbdinfo', 'qemu-io'), () => {
  test('nbdinfo and qemu-io: who may write, who may read', async () => {
    const { unix, tcp, path } = await serve(...rules('write:unix', 'read:address=127.0.0.0/8'));
    assert.deepEqual([await exportsAt(unix), await exportsAt(tcp)], [['disk'], ['disk']]);
    assert.deepEqual([await readOnlyAt(unix), await readOnlyAt(tcp)], [false, true]);

    await tool('qemu-io', '-f', 'raw', '-c', 'write -P 7 0 64k', '-c', 'flush', unix);
    assert.match(await tool('qemu-io', '-r', '-f', 'raw', '-c', 'read -P 7 0 64k', tcp), /read 65536/);
    const before_ = readFileSync(path);
    const { code, stdout, stderr } = await attempt(['qemu-io', '-f', 'raw', '-c', 'write -P 9 0 64k', tcp]);
    assert.match(stdout + stderr, /read-only|not permitted|permission denied/i);
    assert.notEqual(code, 0);
    assert.ok(readFileSync(path).equals(before_));
  });

  test('nbdinfo and qemu-io: who sees nothing', async () => {
    const { daemon, unix, tcp } = await serve(...rules('none:address=127.0.0.1', 'write'));
    assert.deepEqual(await exportsAt(tcp), []);
    for (const name of ['disk', '']) {
      const { code, stderr } = await attempt(['nbdinfo', tcp.replace(/\/disk$/, `/${name}`)]);
      assert.notEqual(code, 0);
      assert.match(stderr, /No such file or directory|no export named/);
    }
    assert.match(
      (await attempt(['qemu-io', '-f', 'raw', '-c', 'read 0 4k', tcp])).stderr,
      /no export|not available/i,
    );
    assert.equal(await readOnlyAt(unix), false);
    assert.match(daemon.stderr, /its access rules keep from it/);
  });

  test("libnbd's Python: a write that is sent all the same is EPERM", needsLibnbd(), async () => {
    const { tcp } = await serve(...rules('read'));
    const script = `
import nbd, sys, errno
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
assert h.is_read_only()
for write in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):
    try:
        write()
        raise SystemExit('it was not refused')
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
h.pread(512, 0)
print('fine')`;
    assert.equal(await tool(PYTHON, '-c', script, tcp), 'fine\n');
  });

  test('a proxy has rules of its own, and what it reads from as well', async () => {
    const source = await serve(...rules('read:address=127.0.0.1'));
    const socket = join(folder, `${++serial}.sock`);
    const words = (uri: string, copy: string) => [
      ...['proxy', uri, join(folder, copy), '--state-dir', join(folder, `${copy}.state`)],
      ...['--listen', `unix:${socket}`, '--listen', '127.0.0.1:0', ...rules('write:unix')],
    ];
    const refused = await runBlockferry(words(source.unix, 'refused'));
    assert.equal(refused.code, 1);
    assert.match(refused.stderr, /the server has no export 'disk'/);
    const proxy = await DaemonProcess.start(words(source.tcp, 'copy'));
    cleanups.push(() => proxy.stop());
    const [unix, tcp] = proxy.uris;
    assert.equal(await readOnlyAt(unix!), false);
    assert.deepEqual(await exportsAt(tcp!), []);
    const client = await NbdClient.connect(unix!);
    const into = Buffer.alloc(1 << 20);
    await client.read(0, into.length, into);
    await client.close();
    assert.ok(into.equals(readFileSync(source.path).subarray(0, into.length)));
  });
});

describe('by name', needs('setpriv', 'nbdinfo', 'openssl'), () => {
  const secure = (uri: string, user: string, query: string) =>
    uri.replace('nbds+unix:///', `nbds+unix://${user}/`).concat(`&${query}`);

  test('of a certificate', async () => {
    const tls = ['--tls', 'required', '--tls-certificates', pki.good, '--tls-verify-peer'];
    const mine = await serve(...tls, ...rules('read:certificate=tester'));
    assert.equal(await readOnlyAt(secure(mine.unix, '', `tls-certificates=${pki.good}`)), true);
    const other = await serve(...tls, ...rules('write:certificate=host-b'));
    const uri = secure(other.unix, '', `tls-certificates=${pki.good}`);
    assert.deepEqual(await exportsAt(uri), []);
    assert.notEqual((await attempt(['nbdinfo', uri])).code, 0);
    assert.match(other.daemon.stderr, /"client":"tester"/);
  });

  test('of a key', async () => {
    const tls = ['--tls', 'allowed', '--tls-psk', pki.keys];
    const { unix } = await serve(...tls, ...rules('write:psk=alice', 'read:psk=*'));
    const as = (user: string) => secure(unix, `${user}@`, `tls-psk-file=${pki.keys}`);
    assert.equal(await readOnlyAt(as('alice')), false);
    assert.equal(await readOnlyAt(as('bob')), true);
    assert.deepEqual(await exportsAt(unix.replace('nbds', 'nbd')), []);
  });
});

describe('how many', needs('setpriv', 'nbdinfo'), () => {
  test('--max-connections: one more is refused and told why, until one goes', async () => {
    const { unix, tcp } = await serve('--max-connections', '1');
    const first = await NbdClient.connect(unix);
    await assert.rejects(
      NbdClient.connect(tcp),
      /refused GO \(ERR_POLICY\): 'the server has all 1 connections/,
    );
    const { code, stderr } = await attempt(['nbdinfo', '--size', tcp]);
    assert.notEqual(code, 0);
    assert.match(stderr, /policy/i);
    assert.deepEqual(await exportsAt(tcp), ['disk'], 'who only asks takes no place');
    assert.deepEqual(
      (await NbdClient.list(tcp)).map(({ name }) => name),
      ['disk'],
    );
    await first.close();
    const deadline = Date.now() + 5000;
    while ((await attempt(['nbdinfo', '--size', tcp])).code !== 0)
      assert.ok(Date.now() < deadline, 'the place is free again');
  });

  test('--max-handshakes and --handshake-timeout', async () => {
    const { tcp, unix } = await serve('--max-handshakes', '4', '--handshake-timeout', '0.5');
    const port = Number(new URL(tcp).port);
    const slow = await Promise.all(
      Array.from({ length: 12 }, () => RawClient.connect({ host: '127.0.0.1', port })),
    );
    assert.equal(await tool('nbdinfo', '--size', tcp), `${IMAGE_BYTES}\n`);
    assert.equal(await tool('nbdinfo', '--size', unix), `${IMAGE_BYTES}\n`);
    for (const client of slow) await client.receiveAll();
  });

  test('a client whose machine vanished is found out by TCP', needs('ss'), async () => {
    const { tcp } = await serve();
    const client = await NbdClient.connect(tcp);
    const port = Number(new URL(tcp).port);
    // Until the client's kernel has acknowledged what came last, another timer runs.
    const deadline = Date.now() + 5000;
    for (;;) {
      const shown = await tool('ss', '-tnoH', `sport = :${port}`);
      if (/timer:\(keepalive,1\d\dmin/.test(shown)) break;
      assert.ok(Date.now() < deadline, shown);
    }
    await client.close();
  });
});

describe('the link address of a host', needs('setpriv', 'openssl'), () => {
  test('rules of a volume, rules of the host, and its machines in any case', async () => {
    const images = [image(), image(), image()];
    const host = await LabHost.start({
      folder,
      name: `host-${serial}`,
      volumes: [
        { name: 'mine', image: images[0]!, access: ['read:psk=alice'] },
        { name: 'hidden', image: images[1]! },
        { name: 'limited', image: images[2]!, access: ['read'], connections: 1 },
      ],
      tls: { psk: pki.keys, mode: 'allowed' },
      more: { access: ['read:address=10.0.0.0/8'] },
    });
    cleanups.push(() => host.stop());
    const view = await host.client.volume('mine');
    assert.ok(view.phase === 'plain' && view.linkUri !== null);
    const at = (name: string, user: string) => ({
      uri: view.linkUri!.replace('nbds://', `nbds://${user}@`).replace(/\/mine$/, `/${name}`),
      tls: { pskFile: pki.keys },
    });
    const listed = async (user: string) => {
      const { uri, tls } = at('', user);
      return (await NbdClient.list(uri, { tls })).map(({ name }) => name).sort();
    };
    assert.deepEqual(await listed('alice'), ['limited', 'mine']);
    assert.deepEqual(await listed('bob'), ['limited']);
    const connect = (name: string, user: string) => {
      const { uri, tls } = at(name, user);
      return NbdClient.connect(uri, { tls });
    };
    const alice = await connect('mine', 'alice');
    assert.equal(alice.info.readOnly, true);
    await alice.close();
    await assert.rejects(connect('mine', 'bob'), { code: 'not-found' });
    await assert.rejects(connect('hidden', 'alice'), { code: 'not-found' });

    const first = await connect('limited', 'bob');
    await assert.rejects(connect('limited', 'bob'), /has all 1 connections/);
    await first.close();

    for (const name of ['mine', 'hidden', 'limited']) {
      const guest = await host.client.volume(name);
      assert.ok(guest.phase === 'plain');
      const client = await NbdClient.connect(guest.uri[0]!);
      assert.equal(client.info.readOnly, false);
      await client.close();
    }
  });

  test('a destination needs to read; who may not is told that there is no such volume', async () => {
    const [name] = [`src-${++serial}`];
    const volumes = [
      { name: 'open', image: image(), access: ['read:address=127.0.0.1'] },
      { name: 'shut', image: image(), access: ['read:address=10.0.0.0/8'] },
    ];
    const source = await LabHost.start({ folder, name, volumes, more: { listExports: false } });
    const destination = await LabHost.start({ folder, name: `dst-${serial}` });
    cleanups.push(
      () => source.stop(),
      () => destination.stop(),
    );
    const arrive = async (volume: string) => {
      const view = await source.client.volume(volume);
      assert.ok(view.phase === 'plain' && view.linkUri !== null);
      const { id: volumeId, generation, size, linkUri: sourceUri } = view;
      return destination.client.createVolume({
        name: volume,
        volumeId,
        generation,
        size,
        sourceUri,
        rateBytesPerSecond: null,
      });
    };
    assert.equal((await arrive('open')).phase, 'standby');
    await assert.rejects(arrive('shut'), /the server has no export 'shut'/);
    const { daemon } = await source.client.status();
    await assert.rejects(NbdClient.list(daemon.linkUri!), /ERR_POLICY/);
  });
});

describe('wrong words', () => {
  const cases: [what: string, words: string[], why: RegExp][] = [
    ['no rule', rules('everybody'), /--access <rule>.*GRADE is none, read or write/],
    ['an address inside a network', rules('read:address=10.0.0.1/8'), /write 10\.0\.0\.0\/8/],
    [
      'a certificate without TLS',
      rules('read:certificate=a'),
      /--tls, --tls-certificates and --tls-verify-peer/,
    ],
    ['a key without TLS', rules('read', 'read:psk=a'), /--access with psk= needs --tls and --tls-psk/],
    ['no clients', ['--max-connections', '0'], /"0" is no number from 1 to 65536/],
    ['half a client', ['--max-handshakes', '0.5'], /"0.5" is no number/],
    ['no time', ['--handshake-timeout', '0'], /"0" is no time/],
  ];
  for (const [what, words, why] of cases)
    test(what, async () => {
      const state = ['--state-dir', join(folder, 'words.state')];
      const { code, stderr } = await runBlockferry(['serve', image(), ...state, ...words]);
      assert.equal(code, 2, stderr);
      assert.match(stderr, why);
      assert.equal(stderr.trim().split('\n').length, 1);
    });
});
