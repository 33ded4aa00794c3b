// Clients over TLS that tls.test.ts does not have: nbdkit's nbd plugin with both kinds of credentials; nbd-client, fio and
// @vates/nbd-client with certificates, which is all they know.
import assert from 'node:assert/strict';
import { chmodSync, cpSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import NbdClient from '@vates/nbd-client';
import { makePki, type Pki } from '../../support/pki.js';
import { startPeer } from '../servers.js';
import { serveTls, type TlsServer, tlsKinds } from '../tls-kinds.js';
import { attempt, needs, tool } from '../tools.js';
import { assertSame, makeImage, SIZE } from './disks.js';

const MIB = 1 << 20;
const NOBODY = '65534';

let folder: string;
let image: string;
let content: Buffer;
let pki: Pki;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-tls-clients-'));
  image = join(folder, 'disk.img');
  content = makeImage(image);
  pki = makePki();
});
after(() => {
  rmSync(folder, { recursive: true });
  pki.remove();
});

const KINDS = tlsKinds(() => pki);

/** Calls `scenario` while the disk is served to clients with TLS alone; then the image must hold `content`. */
async function withTls(
  kind: (typeof KINDS)[number],
  scenario: (server: TlsServer) => Promise<void>,
  options?: string[],
): Promise<void> {
  const server = await serveTls(folder, image, 'required', kind, options);
  try {
    await scenario(server);
    assert.equal(await server.daemon.stop(), 0, server.daemon.stderr);
    assertSame(readFileSync(image), content);
  } finally {
    server.daemon.kill();
  }
}

for (const kind of KINDS)
  test(`nbdkit's nbd plugin, ${kind.name}`, needs('setpriv', 'openssl', 'nbdkit', 'nbdcopy', 'qemu-io'), () =>
    withTls(kind, async ({ socket, port }) => {
      for (const [index, where] of [[`socket=${socket}`], ['hostname=localhost', `port=${port}`]].entries()) {
        const words = ['nbd', ...where, 'export=disk', 'shared=true', ...kind.nbdkitClient()];
        const nbdkit = await startPeer((_, path) => ['nbdkit', '-f', '-U', path, ...words]);
        try {
          const copy = join(folder, 'copy');
          await tool('nbdcopy', nbdkit.uri, copy);
          assertSame(readFileSync(copy), content);
          const commands = [`w -P ${index + 1} 2000 5M`, 'w -z 3M 1M', 'flush', `r -P ${index + 1} 2000 1M`];
          const words = ['-f', 'raw', ...commands.flatMap((one) => ['-c', one]), nbdkit.uri];
          assert.doesNotMatch(await tool('qemu-io', ...words), /fail|error/i);
          content.fill(index + 1, 2000, 2000 + 5 * MIB);
          content.fill(0, 3 * MIB, 4 * MIB);
        } finally {
          await nbdkit.stop();
        }
      }
      const wrong = kind.name === 'x509' ? `tls-certificates=${pki.stranger}` : `tls-psk=${pki.wrongKeys}`;
      const words = ['nbd', `socket=${socket}`, 'export=disk', ...kind.nbdkitClient(), wrong];
      const nbdkit = await attempt(['nbdkit', '-f', '-U', '-', ...words, '--run', 'nbdinfo "$uri"']);
      assert.notEqual(nbdkit.code, 0, nbdkit.stdout);
    }),
  );

describe('with certificates', needs('setpriv', 'openssl'), () => {
  const [x509] = KINDS;

  test('nbd-client -l', needs('nbd-client'), () =>
    withTls(x509, async ({ port }) => {
      const list = (cert: string, ca: string): ReturnType<typeof attempt> => {
        const client = ['-certfile', join(cert, 'client-cert.pem'), '-keyfile', join(cert, 'client-key.pem')];
        const files = ['-cacertfile', join(ca, 'ca-cert.pem'), ...client];
        return attempt(['nbd-client', '-l', 'localhost', port, '-tlshostname', 'localhost', ...files]);
      };
      const listed = await list(pki.good, pki.good);
      assert.equal(listed.code, 0, listed.stderr);
      assert.match(listed.stdout, /^disk: blockferry volume /m);
      assert.notEqual((await list(pki.stranger, pki.good)).code, 0, 'our server refuses its certificate');
      assert.notEqual(
        (await list(pki.good, pki.stranger)).code,
        0,
        'it refuses the certificate of our server',
      );
      const plain = await attempt(['nbd-client', '-l', 'localhost', port]);
      assert.notEqual(plain.code, 0);
      assert.match(plain.stderr, /TLS/);
    }),
  );

  test('fio, with verification', needs('fio'), () =>
    withTls(x509, async ({ port }) => {
      // fio lets no URI name files: libnbd takes the user's own folder, root's is the system's.
      const home = join(folder, 'home');
      const certificates = join(home, '.pki/libnbd');
      mkdirSync(certificates, { recursive: true });
      cpSync(pki.good, certificates, { recursive: true });
      chmodSync(folder, 0o755);
      for (const name of readdirSync(certificates)) chmodSync(join(certificates, name), 0o644);
      const shape = ['--rw=randrw', '--bsrange=512-64k', '--iodepth=16', '--size=8m', '--io_size=8m'];
      const check = ['--verify=crc32c', '--verify_fatal=1', '--verify_state_save=0', '--output-format=terse'];
      const fio = [
        'fio',
        '--name=v',
        '--ioengine=nbd',
        `--uri=nbds://localhost:${port}/disk`,
        ...shape,
        ...check,
      ];
      const who =
        process.getuid?.() === 0 ? ['--reuid', NOBODY, '--regid', NOBODY, '--clear-groups', '--'] : ['--'];
      const ran = await attempt(['setpriv', ...who, ...fio], {
        cwd: '/',
        env: { ...process.env, HOME: home },
      });
      assert.equal(ran.code, 0, `${ran.stderr}${ran.stdout}`);
      content = readFileSync(image);
    }),
  );

  test('@vates/nbd-client', () =>
    withTls(
      x509,
      async ({ port }) => {
        const cert = readFileSync(join(pki.good, 'ca-cert.pem'), 'utf8');
        const where = { address: 'localhost', port: Number(port), exportname: 'disk' };
        const client = new NbdClient({ ...where, cert });
        await client.connect();
        const half = Math.ceil(SIZE / 2);
        const halves = await Promise.all([client.readBlock(0, half), client.readBlock(1, half)]);
        assertSame(Buffer.concat(halves), content);
        await client.disconnect();
        const plain = new NbdClient(where, { messageTimeout: 10_000 });
        await assert.rejects(plain.connect());
      },
      // It has no certificate of its own to show.
      ['--tls-certificates', pki.good],
    ));
});
