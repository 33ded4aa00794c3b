// Clients that start us: by socket activation, and over stdio.
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { BLOCKFERRY } from '../../lab/hosts.js';
import { attempt, needs, needsLibnbd, PYTHON, tool } from '../tools.js';
import { assertSame, makeImage, SIZE } from './disks.js';

let folder: string;
let image: string;
let content: Buffer;

before(() => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-started-'));
  image = join(folder, 'disk.img');
  content = makeImage(image);
});
after(() => rmSync(folder, { recursive: true }));

function ours(...words: string[]): string[] {
  return [BLOCKFERRY, ...words, '--state-dir', join(folder, 'state')];
}

describe('socket activation', () => {
  test('nbdinfo -- [ blockferry serve disk.img ]', needs('nbdinfo'), async () => {
    const told = JSON.parse(await tool('nbdinfo', '--json', '--', '[', ...ours('serve', image), ']'));
    assert.equal(told.exports[0]['export-size'], SIZE);
    assert.equal(told.exports[0]['export-name'], 'disk.img');
  });

  test('nbdcopy -- [ blockferry serve a ] [ blockferry serve b ]', needs('nbdcopy', 'truncate'), async () => {
    const to = join(folder, 'to.img');
    await tool('truncate', '-s', String(SIZE), to);
    await tool('nbdcopy', '--flush', '--', '[', ...ours('serve', image), ']', '[', ...ours('serve', to), ']');
    assertSame(readFileSync(to), content);
  });

  test('what cannot be served is told, and the client fails', needs('nbdinfo'), async () => {
    const { code, stderr } = await attempt([
      'nbdinfo',
      '--',
      '[',
      ...ours('serve', join(folder, 'missing.img')),
      ']',
    ]);
    assert.notEqual(code, 0);
    assert.match(stderr, /^blockferry: there is no image .*missing\.img: /m);
  });
});

describe('stdio', needsLibnbd(), () => {
  const script = `
import nbd, sys
h = nbd.NBD()
h.connect_command(sys.argv[1:])
assert h.get_size() == ${SIZE}
first = bytes(h.pread(65536, 1000))
h.pwrite(first[:512], 4096)
h.flush()
h.shutdown()
sys.stdout.buffer.write(first)
`;

  test('serve --listen stdio: the daemon ends with its client', async () => {
    const stdout = await tool(
      PYTHON,
      '-c',
      script.replace('sys.stdout.buffer.write(first)', 'print(first.hex())'),
      ...ours('serve', image, '--listen', 'stdio'),
    );
    assert.equal(stdout.trim(), content.subarray(1000, 1000 + 65_536).toString('hex'));
    content.copy(content, 4096, 1000, 1512);
    assertSame(readFileSync(image), content);
  });

  test(
    'a proxy of a source that is started by socket activation too',
    needs('nbdinfo', 'nbdkit'),
    async () => {
      const socket = join(folder, 'pattern.sock');
      // nbdkit 1.32 dies when a client leaves that has reads under way, as the copy would have.
      const proxied = ours(
        'proxy',
        `nbd+unix:///?socket=${socket}`,
        join(folder, 'pattern.img'),
        '--no-background',
      );
      const inner = ['nbdinfo', '--size', '--', '[', ...proxied, ']'].map((word) => `'${word}'`).join(' ');
      const size = await tool('nbdkit', '-U', socket, 'pattern', '3M', '--run', inner);
      assert.equal(size.trim(), String(3 << 20));
    },
  );
});
