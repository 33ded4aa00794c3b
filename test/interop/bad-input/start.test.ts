// What cannot be started is refused: exit code, one line, nothing changed.
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { pattern } from '../clients/disks.js';
import { startPeer } from '../servers.js';
import { attempt, needs, tool } from '../tools.js';
import { assertRefusal, inFolder, refused, snapshot } from './refusals.js';

const MIB = 1 << 20;

function image(folder: string, name = 'disk.img', bytes = 4 * MIB): string {
  const path = join(folder, name);
  writeFileSync(path, pattern(bytes, 1));
  return path;
}

function common(folder: string, socket = 's'): string[] {
  return [
    '--state-dir',
    join(folder, 'state'),
    '--listen',
    `unix:${join(folder, socket)}`,
    '--log-level',
    'error',
  ];
}

describe('wrong usage ends with code 2', () => {
  const LINES: [string[], RegExp][] = [
    [['frobnicate'], /unknown command 'frobnicate'/],
    [['serve'], /missing required argument 'disk'/],
    [['serve', 'a', 'b'], /too many arguments/],
    [['serve', 'a', '--frob'], /unknown option '--frob'/],
    [['serve', 'a', '--listen', '99'], /write unix:PATH, HOST:PORT/],
    [['serve', 'a', '--listen', 'unix:'], /wants the path of a socket/],
    [['serve', 'a', '--listen', '127.0.0.1:99999'], /PORT is a number up to 65535/],
    [['serve', 'a', '--listen', '[::1'], /brackets/],
    [['serve', 'a', '--name', '../x'], /--name: expected a name of letters/],
    [['serve', 'a', '--name', 'control'], /--name: expected a name other than/],
    [['serve', 'a', '--log-level', 'loud'], /Allowed choices/],
    [['proxy', 'disk.img', 'b'], /an NBD URI looks like nbd:\/\/HOST/],
    [['proxy', 'nbds://h/x?tls-type=psk', 'b'], /'tls-type' is not known/],
    [['proxy', 'nbd+unix:///x', 'b'], /needs '\?socket=PATH'/],
    [['proxy', 'nbd://h', 'b', '--bandwidth', 'fast'], /"fast" is no size/],
    [['proxy', 'nbd://h', 'b', '--source-timeout', '0'], /write seconds/],
    [['proxy', 'nbd://h', 'b', '--order', 'random'], /Allowed choices/],
    [['rate', 'x'], /"x" is no size/],
    [['host'], /required option '--config/],
    [['host', '--config', '/nowhere/host.yaml'], /configuration \/nowhere\/host\.yaml cannot be read/],
    [['migrate', 'vm'], /a new move needs --to/],
    [['migrate', 'vm', '--resume', '--abort'], /cannot be used with/],
    [['migrate', 'vm', '--to', 'x', '--switch', 'later'], /Allowed choices are now, hot, all/],
    [['migrate', 'vm', '--to', 'x', '--pre-copy-limit', '0'], /write seconds/],
    [['migrate', 'vm', '--to', 'x', '--compression', '20'], /--compression/],
    [
      ['proxy', 'nbd://h', 'b', '--pre-copy', 'qemu:dirty-bitmap:b'],
      /--pre-copy is for a standby: give --standby/,
    ],
  ];
  for (const [words, line] of LINES) {
    test(`blockferry ${words.join(' ')}`, async () => {
      await refused(words, 2, line);
    });
  }

  test('without a word it shows the commands', async () => {
    const { code, stderr } = await runBlockferry([]);
    assert.equal(code, 2);
    assert.match(stderr, /^Usage: blockferry/);
  });
});

describe('images that cannot be served', () => {
  test('missing, a folder, a pipe, empty', needs('mkfifo'), () =>
    inFolder(async (folder) => {
      mkdirSync(join(folder, 'folder'));
      await tool('mkfifo', join(folder, 'pipe'));
      writeFileSync(join(folder, 'empty'), '');
      const before = snapshot(folder);
      for (const [name, why] of [
        ['missing', /there is no image .*: create it, or give the right path/],
        ['folder', /cannot open image .*folder/],
        ['pipe', /neither a file nor a block device/],
        ['empty', /is empty: give it a size first/],
      ] as const)
        await refused(['serve', join(folder, name), ...common(folder)], 1, why);
      assert.deepEqual(snapshot(folder), before);
    }),
  );

  test('in use by a second blockferry, under any state folder', () =>
    inFolder(async (folder) => {
      const disk = image(folder);
      const first = await DaemonProcess.start(['serve', disk, ...common(folder)]);
      const other = ['--state-dir', join(folder, 'other'), '--listen', `unix:${join(folder, 'o')}`];
      await refused(
        ['serve', disk, ...other],
        1,
        /image .* is in use by another program: stop that one first/,
      );
      assert.equal(await first.stop(), 0);
      const second = await DaemonProcess.start(['serve', disk, '--read-only', ...other]);
      const third = await DaemonProcess.start(['serve', disk, '--read-only', ...common(folder)]);
      assert.deepEqual([await second.stop(), await third.stop()], [0, 0], 'readers share it');
    }));

  test('in use by qemu-nbd, and the other way round', needs('setpriv', 'qemu-nbd', 'qemu-io'), () =>
    inFolder(async (folder) => {
      const disk = image(folder);
      const peer = await startPeer((_, socket) => ['qemu-nbd', '-t', '-f', 'raw', '-k', socket, disk]);
      try {
        await refused(['serve', disk, ...common(folder)], 1, /is in use by another program/);
      } finally {
        await peer.stop();
      }
      const ours = await DaemonProcess.start(['serve', disk, ...common(folder)]);
      const { code, stderr } = await attempt(['qemu-io', '-f', 'raw', '-c', 'write 0 4k', disk]);
      assert.notEqual(code, 0);
      assert.match(stderr, /lock/);
      assert.equal(await ours.stop(), 0);
      await tool('qemu-io', '-f', 'raw', '-c', 'write 0 4k', disk);
    }),
  );
});

describe('places that cannot be had', () => {
  test('sockets: a stale one is replaced, a live one, a file and a missing folder are refused', () =>
    inFolder(async (folder) => {
      const disk = image(folder);
      const other = image(folder, 'other.img');
      const words = ['serve', disk, ...common(folder)];
      const killed = await DaemonProcess.start(words);
      killed.kill();
      await killed.exited;
      const first = await DaemonProcess.start(words);
      const taken = ['serve', other, ...common(folder)];
      await refused(taken, 1, /cannot listen on unix:.*: another server is listening there: stop it/);
      await tool('nbdinfo', '--size', first.uris[0]);
      assert.equal(await first.stop(), 0);
      writeFileSync(join(folder, 'file'), 'keep me');
      await refused(['serve', disk, ...common(folder, 'file')], 1, /a file that is no socket: move it away/);
      assert.equal(readFileSync(join(folder, 'file'), 'utf8'), 'keep me');
      await refused(
        ['serve', disk, ...common(folder, 'no/s')],
        1,
        /the folder does not exist: create it first/,
      );
    }));

  test('a TCP port that is taken', () =>
    inFolder(async (folder) => {
      const server = net.createServer();
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
      const { port } = server.address() as net.AddressInfo;
      const words = [
        'serve',
        image(folder),
        '--state-dir',
        join(folder, 'state'),
        '--listen',
        `127.0.0.1:${port}`,
      ];
      await refused(words, 1, new RegExp(`cannot listen on 127.0.0.1:${port}: the port is taken`));
      await new Promise((resolve) => server.close(resolve));
    }));

  test('a state folder that is a file', () =>
    inFolder(async (folder) => {
      writeFileSync(join(folder, 'state'), '');
      await refused(['serve', image(folder), ...common(folder)], 1, /cannot .*state/);
    }));

  test('two daemons on one state folder: of one name no, of two names yes', () =>
    inFolder(async (folder) => {
      const [one, two] = [image(folder, 'one.img'), image(folder, 'two.img')];
      const first = await DaemonProcess.start(['serve', one, ...common(folder, 'a')]);
      const again = ['serve', two, '--name', 'one.img', ...common(folder, 'b')];
      await refused(again, 1, /a daemon already answers at .*one\.img\.sock: stop it/);
      const second = await DaemonProcess.start(['serve', two, ...common(folder, 'b')]);
      const told = await runBlockferry(['status', '--state-dir', join(folder, 'state')]);
      assert.match(told.stdout, /serve one\.img [\s\S]*serve two\.img /);
      const unclear = ['pause', '--state-dir', join(folder, 'state')];
      await refused(unclear, 2, /several volumes are served: name one of one\.img, two\.img/);
      await refused([...unclear, 'three'], 1, /no daemon has a volume "three"; there is one\.img, two\.img/);
      assert.deepEqual([await first.stop(), await second.stop()], [0, 0]);
      await refused(['status', '--state-dir', join(folder, 'state')], 1, /no daemon runs on .*: start one/);
    }));
});

describe('sources and state that do not fit', () => {
  test('an export that does not exist: clients are told, a proxy of it is refused', needs('nbdinfo'), () =>
    inFolder(async (folder) => {
      const source = await DaemonProcess.start(['serve', image(folder), '--name', 'disk', ...common(folder)]);
      const wrong = source.uris[0].replace('/disk?', '/elsewhere?');
      const { code, stderr } = await attempt(['nbdinfo', wrong]);
      assert.notEqual(code, 0);
      assert.match(stderr, /elsewhere|no export|unknown/i);
      const before = snapshot(folder);
      const words = ['proxy', wrong, join(folder, 'copy.img'), ...common(folder, 'p')];
      await refused(words, 1, /cannot connect to .*the server has no export 'elsewhere'/);
      assert.deepEqual(snapshot(folder), before, 'no image, no state');
      await tool('nbdinfo', '--size', source.uris[0]);
      assert.equal(await source.stop(), 0);
    }),
  );

  test('an image that holds data, or has another size than the source', () =>
    inFolder(async (folder) => {
      const source = await DaemonProcess.start(['serve', image(folder), '--name', 'disk', ...common(folder)]);
      const full = image(folder, 'full.img', MIB);
      const short = join(folder, 'short.img');
      writeFileSync(short, '');
      truncateSync(short, MIB);
      const before = snapshot(folder);
      const proxy = (path: string): string[] => ['proxy', source.uris[0], path, ...common(folder, 'p')];
      await refused(proxy(full), 1, /full\.img holds data .*remove it or choose another image/);
      await refused(proxy(short), 1, /short\.img has 1048576 bytes, the source has 4194304/);
      await refused(proxy(join(folder, 'disk.img')), 1, /is in use|holds data/);
      assert.deepEqual(snapshot(folder), before);
      assert.equal(await source.stop(), 0);
    }));

  test('state of another image, another source, an image that was cut', () =>
    inFolder(async (folder) => {
      const source = await DaemonProcess.start(['serve', image(folder), '--name', 'disk', ...common(folder)]);
      const copy = join(folder, 'copy.img');
      const words = [
        'proxy',
        source.uris[0],
        copy,
        '--no-background',
        '--name',
        'copy',
        ...common(folder, 'p'),
      ];
      const proxy = await DaemonProcess.start(words);
      assert.equal(await proxy.stop(), 0);
      const other = image(folder, 'other.img');
      const before = snapshot(folder);
      const state = ['--name', 'copy', ...common(folder, 'p')];
      await refused(['serve', other, ...state], 1, /volume copy has the image .*copy\.img, not .*other\.img/);
      const elsewhere = 'nbd+unix:///disk?socket=/nowhere/s';
      await refused(['proxy', elsewhere, copy, ...state], 1, /comes from .*, not .*nowhere/);
      await refused(
        ['serve', copy, '--name', 'x', ...common(folder, 'p')],
        1,
        /is the image of volume copy \(relocating\)/,
      );
      assert.deepEqual(snapshot(folder), before);
      truncateSync(copy, MIB);
      const cut = snapshot(folder);
      await refused(words, 1, /copy\.img has 1048576 bytes, volume copy has 4194304: restore the image/);
      assert.deepEqual(snapshot(folder), cut);
      assert.equal(await source.stop(), 0);
    }));
});

test('status, watch and the like of a daemon that is not there', () =>
  inFolder(async (folder) => {
    const nobody = /no daemon runs on .*: start one, or name its socket with --control/;
    for (const words of [
      ['status'],
      ['watch'],
      ['pause'],
      ['resume'],
      ['rate', '1M'],
      ['prefetch', 'all'],
      ['takeover'],
    ])
      await refused([...words, '--state-dir', folder], 1, nobody);
    await refused(
      ['status', '--control', join(folder, 'no.sock')],
      1,
      /no such socket: is the daemon running\?/,
    );
    const finished = await runBlockferry(['verify', join(folder, 'a'), join(folder, 'b')]);
    assertRefusal(finished, 1, /cannot open .*\/a: /, 'verify');
  }));
