// `blockferry proxy` in front of other people's servers: what a client reads meanwhile, and the whole disk after the hand-off.
import assert from 'node:assert/strict';
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, test } from 'node:test';
import { ControlClient } from '../../../src/host/control/client.js';
import { DaemonProcess, runBlockferry } from '../../lab/hosts.js';
import { type PeerServer, startNbdServer, startPeer } from '../servers.js';
import { needs, tool } from '../tools.js';
import { assertSame, HOLE, makeImage, SIZE } from './disks.js';

const MIB = 1 << 20;

interface Kind {
  name: string;
  programs: string[];
  start: (image: string) => Promise<PeerServer>;
  /** The server tells zeros, so that they cost no data. */
  tellsZeroes: boolean;
}

const KINDS: Kind[] = [
  {
    name: 'qemu-nbd',
    programs: ['qemu-nbd'],
    start: (image) =>
      startPeer((_, socket) => ['qemu-nbd', '-t', '-r', '-e', '8', '-f', 'raw', '-k', socket, image]),
    tellsZeroes: true,
  },
  {
    name: 'nbdkit',
    programs: ['nbdkit'],
    start: (image) => startPeer((_, socket) => ['nbdkit', '-f', '-r', '-U', socket, 'file', image]),
    tellsZeroes: true,
  },
  {
    name: 'nbdkit without structured replies, for requests of 64 KiB at most',
    programs: ['nbdkit'],
    start: (image) =>
      startPeer((_, socket) => [
        ...['nbdkit', '-f', '-r', '--no-sr', '--filter=blocksize-policy', '-U', socket, 'file', image],
        ...['blocksize-preferred=4096', 'blocksize-maximum=64K', 'blocksize-error-policy=error'],
      ]),
    tellsZeroes: false,
  },
  {
    name: 'nbd-server',
    programs: ['nbd-server'],
    start: (image) =>
      startNbdServer(
        async (directory) => {
          const own = join(directory, 'disk.img');
          copyFileSync(image, own);
          return own;
        },
        ['disk'],
      ),
    tellsZeroes: false,
  },
];

for (const kind of KINDS) {
  describe(`a proxy in front of ${kind.name}`, needs('setpriv', 'qemu-io', ...kind.programs), () => {
    test('reads, writes, hand-off, and the source may go', async () => {
      const folder = mkdtempSync(join(tmpdir(), 'blockferry-source-'));
      const source = join(folder, 'source.img');
      const wanted = Buffer.from(makeImage(source));
      const peer = await kind.start(source);
      let daemon: DaemonProcess | undefined;
      try {
        const image = join(folder, 'disk.img');
        const state = join(folder, 'state');
        const uri = kind.name === 'nbd-server' ? peer.uriOf('disk') : peer.uri;
        const listen = ['--listen', `unix:${join(folder, 's')}`, '--state-dir', state, '--log-level', 'warn'];
        // A level is asked for of everybody; these do not know what that is, and are read from as ever.
        const asking = ['--bandwidth', '1M/s', '--compression', '3'];
        daemon = await DaemonProcess.start(['proxy', uri, image, ...asking, ...listen]);
        const control = new ControlClient(join(state, 'control', 'disk.img.sock'));
        const commands = [
          `write -P 5 ${10 * MIB + 1000} 9000`,
          'write -z 2M 1M',
          `read ${4 * MIB + 17} 300000`,
          'flush',
        ];
        await tool('qemu-io', '-f', 'raw', ...commands.flatMap((command) => ['-c', command]), daemon.uris[0]);
        wanted.fill(5, 10 * MIB + 1000, 10 * MIB + 10_000);
        wanted.fill(0, 2 * MIB, 3 * MIB);
        await control.setRate('disk.img', null);
        const watched = await runBlockferry(['watch', 'disk.img', '--state-dir', state]);
        assert.equal(watched.code, 0, watched.stderr);
        assert.match(watched.stdout.trimEnd().split('\n').at(-1)!, /^disk\.img: plain 100\.0 %/);
        const view = await control.volume('disk.img');
        control.close();
        await peer.stop();
        assertSame(readFileSync(image), wanted);
        const back = await tool('nbdinfo', '--size', daemon.uris[0]);
        assert.equal(back.trim(), String(SIZE));
        assert.ok(view.phase === 'plain' && view.source === null);
        if (kind.tellsZeroes)
          assert.ok(view.traffic.zeroBytes >= HOLE.to - HOLE.from - MIB, String(view.traffic.zeroBytes));
        assert.equal(await daemon.stop(), 0, daemon.stderr);
      } finally {
        daemon?.kill();
        await peer.stop();
        rmSync(folder, { recursive: true });
      }
    });
  });
}
