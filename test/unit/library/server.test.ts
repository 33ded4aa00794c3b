import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { BlockferryError } from '../../../src/errors.js';
import { createDevice } from '../../../src/library/device.js';
import { openFile } from '../../../src/library/file.js';
import { type NbdExport, NbdServer } from '../../../src/library/server.js';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { Allocation, BASE_ALLOCATION } from '../../../src/nbd/constants.js';
import { makePki, type Pki } from '../../support/pki.js';

const MIB = 1 << 20;
const ENTRY = fileURLToPath(new URL('../../../src/library/nbd.js', import.meta.url));

let folder: string;
before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-server-'));
});
after(() => rmSync(folder, { recursive: true }));

let serial = 0;
const unix = () => `unix:${join(folder, `${serial++}.sock`)}`;

function blank(name: string, fill = 0): NbdExport {
  return { name, device: createDevice({ size: 1000, read: (_, buffer) => void buffer.fill(fill) }) };
}

test('the entry exports what it promises, and imports no native code', () => {
  const text = `
    process.dlopen = () => { throw new Error('native code was loaded'); };
    const all = await import(${JSON.stringify(ENTRY)});
    console.log(Object.keys(all).join(' '));
    await all.NbdServer.listen({ exports: [] }).catch((error) => console.log(error.message));`;
  const said = execFileSync(process.execPath, ['--input-type=module', '--eval', text], { encoding: 'utf8' });
  const [names, error] = said.split('\n');
  assert.equal(
    names,
    'ALLOCATION_DEPTH Allocation BASE_ALLOCATION BlockferryError CommandFlag Errno LATER NbdClient NbdReplyError NbdServer TransmissionFlag createDevice formatNbdUri openFile parseNbdUri',
  );
  assert.match(error!, /native code was loaded/);
});

describe('NbdServer', () => {
  test('several exports at several addresses', async () => {
    const exports = [{ ...blank('one', 1), description: 'the first' }, blank('two', 2)];
    const server = await NbdServer.listen({ listen: [unix(), '127.0.0.1:0'], exports });
    try {
      assert.equal(server.uris().length, 2);
      for (const uri of server.uris('two')) {
        assert.deepEqual(await NbdClient.list(uri), [
          { name: 'one', description: 'the first' },
          { name: 'two', description: '' },
        ]);
        const client = await NbdClient.connect(uri);
        assert.equal((await client.read(5, 1))[0], 2);
        assert.deepEqual([server.connections('one'), server.connections('two')], [0, 1]);
        await client.close();
      }
      await assert.rejects(NbdClient.connect(server.uris()[0]!), { code: 'not-found' });
    } finally {
      await server.close();
      await server.close();
    }
  });

  test('exports that come and go', async () => {
    const exports = [blank('one')];
    const server = await NbdServer.listen({ listen: [unix()], exports: () => exports });
    try {
      const client = await NbdClient.connect(server.uris()[0]!);
      exports[0] = blank('other', 7);
      const next = await NbdClient.connect(server.uris('other')[0]!);
      assert.equal((await next.read(0, 1))[0], 7);
      await assert.rejects(NbdClient.connect(server.uris('one')[0]!), { code: 'not-found' });
      assert.equal((await client.read(0, 1))[0], 0, 'who has chosen keeps what he has');
      await Promise.all([client.close(), next.close()]);
    } finally {
      await server.close();
    }
  });

  test('close lets requests in flight finish, and cuts off what takes too long', async () => {
    for (const finishes of [true, false]) {
      let release: () => void = () => {};
      let begin: () => void = () => {};
      const begun = new Promise<void>((resolve) => {
        begin = resolve;
      });
      const read = (): Promise<void> => {
        begin();
        return new Promise((resolve) => {
          release = resolve;
        });
      };
      const exports = [{ name: 'disk', device: createDevice({ size: 10, read }) }];
      const drainTimeoutMs = finishes ? 10_000 : 1;
      const server = await NbdServer.listen({ listen: [unix()], exports, drainTimeoutMs });
      const client = await NbdClient.connect(server.uris()[0]!);
      const outcome = client.read(0, 1).then(
        () => 'read',
        (error: { code: string }) => error.code,
      );
      await begun;
      const closed = server.close();
      if (finishes) release();
      assert.equal(await outcome, finishes ? 'read' : 'closed');
      await closed;
      release();
      client.destroy();
    }
  });

  test('TLS, and exports for clients behind it only', async () => {
    const pki: Pki = makePki();
    const exports = [{ ...blank('secret'), tlsOnly: true }, blank('open')];
    const tls = { mode: 'allowed', certificates: pki.good, verifyPeer: true } as const;
    const server = await NbdServer.listen({ listen: [unix()], exports, tls });
    try {
      const [secure, plain] = server.uris('secret');
      assert.match(secure!, /^nbds\+unix:/);
      await assert.rejects(NbdClient.connect(plain!), { code: 'source-unreachable', message: /TLS/ });
      await assert.rejects(NbdClient.connect(secure!, { tls: { certificates: pki.stranger } }), {
        code: 'tls',
      });
      const client = await NbdClient.connect(secure!, { tls: { certificates: pki.good } });
      assert.equal((await client.read(0, 10)).length, 10);
      await client.close();
    } finally {
      await server.close();
      pki.remove();
    }
  });

  test('what makes no sense is refused, and nothing is listened on', async () => {
    const listen = [unix()];
    const refused = (options: Parameters<typeof NbdServer.listen>[0], expected: object) =>
      assert.rejects(NbdServer.listen(options), expected);
    await refused({ listen, exports: [blank('a'), blank('a')] }, { code: 'usage', message: /two exports/ });
    await refused({ listen, exports: [blank('')] }, { code: 'usage', message: /needs a name/ });
    await refused({ listen, exports: [blank('a\0b')] }, { code: 'usage', message: /NUL/ });
    await refused({ listen, exports: [blank('é'.repeat(2049))] }, { code: 'usage' });
    await refused({ listen: [], exports: [] }, { code: 'usage' });
    await refused(
      { listen, exports: [], connectionsMax: 0 },
      { code: 'usage', message: /connectionsMax is 0/ },
    );
    await refused({ listen, exports: [], drainTimeoutMs: Number.NaN }, { code: 'usage' });
    const ruled = (...access: string[]) => ({ listen, exports: [{ ...blank('a'), access }] });
    await refused(ruled('everybody'), { code: 'usage', message: /GRADE/ });
    await refused(ruled('read:psk=alice'), { code: 'usage', message: /no client can prove the psk/ });
    await refused(ruled(...Array<string>(257).fill('read')), { code: 'usage', message: /256/ });
    await refused({ listen: ['nowhere'], exports: [] }, { code: 'address' });
    await refused({ listen, exports: [], tls: { mode: 'required' } }, { code: 'usage' });
    const server = await NbdServer.listen({ listen, exports: [] });
    await refused({ listen, exports: [] }, { code: 'address', message: /another server is listening/ });
    await server.close();
  });

  test('limits on connections', async () => {
    for (const [ofServer, ofExport] of [
      [{ connectionsMax: 1 }, {}],
      [{}, { connectionsMax: 1 }],
    ]) {
      const exports = [{ ...blank('a'), ...ofExport }];
      const server = await NbdServer.listen({ listen: [unix()], exports, ...ofServer });
      const client = await NbdClient.connect(server.uris()[0]!);
      await assert.rejects(NbdClient.connect(server.uris()[0]!), BlockferryError);
      await client.close();
      await server.close();
    }
  });

  test('access rules: who sees what, and names that are not told', async () => {
    const memory = Buffer.alloc(1000);
    const device = createDevice({
      size: memory.length,
      read: (offset, buffer) => void memory.copy(buffer, 0, offset),
      write: (offset, buffer) => void buffer.copy(memory, offset),
    });
    const exports = [
      { name: 'shared', device, access: ['write:unix', 'read'] },
      { name: 'local', device, access: ['write:unix'] },
    ];
    const server = await NbdServer.listen({ listen: [unix(), '127.0.0.1:0'], exports, listExports: false });
    try {
      const connect = (name: string, index: number) => NbdClient.connect(server.uris(name)[index]!);
      const clients = await Promise.all([connect('shared', 0), connect('shared', 1), connect('local', 0)]);
      assert.deepEqual(
        clients.map(({ info }) => info.readOnly),
        [false, true, false],
      );
      await assert.rejects(connect('local', 1), { code: 'not-found' });
      await assert.rejects(NbdClient.list(server.uris()[0]!), { code: 'source-io' });
      await Promise.all(clients.map((client) => client.close()));
    } finally {
      await server.close();
    }
  });
});

describe('openFile', () => {
  function image(bytes: number): string {
    const path = join(folder, `${serial++}.img`);
    writeFileSync(path, Buffer.alloc(8192, 3));
    truncateSync(path, bytes);
    return path;
  }

  test('serves an image: reads, writes, holes, zeroes, FUA, the last byte', async () => {
    const path = image(4 * MIB + 100);
    const disk = await openFile(path);
    assert.deepEqual([disk.path, disk.size, disk.readOnly], [path, 4 * MIB + 100, false]);
    await assert.rejects(openFile(path), { code: 'image-in-use' });
    const server = await NbdServer.listen({ listen: [unix()], exports: [{ name: 'disk', device: disk }] });
    const client = await NbdClient.connect(server.uris()[0]!, { contexts: [BASE_ALLOCATION] });
    assert.deepEqual(await client.blockStatus(BASE_ALLOCATION, 0, 4 * MIB), [
      { length: 8192, flags: 0 },
      { length: 4 * MIB - 8192, flags: Allocation.HOLE | Allocation.ZERO },
    ]);
    await client.write(MIB - 1, Buffer.from('abc'), { fua: true });
    await client.write(4 * MIB + 99, Buffer.from('z'));
    await client.zero(0, 4096);
    await client.trim(4096, 4096);
    await client.cache(0, MIB);
    await client.flush();
    const wanted = Buffer.alloc(4 * MIB + 100);
    wanted.write('abc', MIB - 1);
    wanted.write('z', 4 * MIB + 99);
    assert.ok((await client.read(0, wanted.length)).equals(wanted));
    await client.close();
    await server.close();
    await disk.close();
    await disk.close();
    assert.ok(readFileSync(path).equals(wanted));
    await (await openFile(path)).close();
  });

  test('closed under a session: ESHUTDOWN, and the descriptor is not used again', async () => {
    const disk = await openFile(image(MIB));
    const server = await NbdServer.listen({ listen: [unix()], exports: [{ name: 'disk', device: disk }] });
    const requests: ((client: NbdClient) => Promise<unknown>)[] = [
      (client) => client.read(0, 100),
      (client) => client.write(0, Buffer.alloc(5000)),
      (client) => client.zero(0, 5000),
      (client) => client.trim(0, 8192),
      (client) => client.flush(),
      (client) => client.cache(0, 100),
      (client) => client.blockStatus(BASE_ALLOCATION, 0, 100),
    ];
    const clients = await Promise.all(
      requests.map(() => NbdClient.connect(server.uris()[0]!, { contexts: [BASE_ALLOCATION] })),
    );
    await disk.close();
    for (const [index, request] of requests.entries())
      await assert.rejects(request(clients[index]!), { code: 'source-io', message: /ESHUTDOWN/ });
    await server.close();
  });

  test('read-only: several may have it, nobody writes', async () => {
    const path = image(MIB);
    const disks = [await openFile(path, { readOnly: true }), await openFile(path, { readOnly: true })];
    await assert.rejects(openFile(path), { code: 'image-in-use' });
    const server = await NbdServer.listen({
      listen: [unix()],
      exports: [{ name: 'disk', device: disks[0]! }],
    });
    const client = await NbdClient.connect(server.uris()[0]!);
    assert.equal(client.info.readOnly, true);
    assert.equal((await client.read(0, 1))[0], 3);
    await client.flush();
    await client.close();
    await server.close();
    for (const disk of disks) await disk.close();
  });

  test('what is not there, or is no image', async () => {
    await assert.rejects(openFile(join(folder, 'missing')), { code: 'image-missing' });
    await assert.rejects(openFile(folder), { code: 'image-io' });
    await assert.rejects(openFile(image(0)), { code: 'image-io', message: /is empty/ });
  });
});
