/** A standby without a coordinator copies ahead from a source that tells its changes: QEMU's dirty bitmaps, and ours. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { type TestContext, test } from 'node:test';
import { ControlClient } from '../../src/host/control/client.js';
import { controlSocketPath } from '../../src/host/state-dir.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { BLOCK_BYTES } from '../../src/volume/blocks.js';
import { DaemonProcess } from '../lab/hosts.js';
import { patterned, tempFolder } from '../support/volume.js';
import { type PeerServer, startPeer } from './servers.js';
import { needs, tool } from './tools.js';

const BLOCKS = 512;
const SIZE = BLOCKS * BLOCK_BYTES;
const BITMAP = 'since';

/** qemu-nbd with a dirty bitmap that records. */
async function qemuSource(): Promise<PeerServer> {
  return startPeer(async (folder, socket) => {
    const image = join(folder, 'disk.qcow2');
    await tool('qemu-img', 'create', '-q', '-f', 'qcow2', image, String(SIZE));
    await tool('qemu-img', 'bitmap', '--add', image, BITMAP);
    return ['qemu-nbd', '-t', '-f', 'qcow2', '-e', '0', '-B', BITMAP, '-k', socket, image];
  });
}

interface Standby {
  readonly client: NbdClient;
  readonly control: ControlClient;
  /** Resolves when everything is copied. */
  caughtUp(): Promise<void>;
}

async function standbyOf(t: TestContext, uri: string, context: string): Promise<Standby> {
  const folder = tempFolder();
  const words = [
    'proxy',
    uri,
    join(folder, 'disk.img'),
    '--name',
    'disk',
    '--standby',
    '--pre-copy',
    context,
  ];
  const state = join(folder, 'state');
  const daemon = await DaemonProcess.start([
    ...words,
    '--listen',
    `unix:${join(folder, 'd.sock')}`,
    '--state-dir',
    state,
  ]);
  t.after(() => daemon.stop());
  const client = await NbdClient.connect(daemon.uris[0]!, {});
  t.after(() => client.close());
  const control = new ControlClient(controlSocketPath(state, 'disk'));
  t.after(() => control.close());
  return {
    client,
    control,
    async caughtUp() {
      for (;;) {
        const view = await control.volume('disk');
        assert.ok(view.phase === 'standby' && view.preCopy !== null);
        if (view.preCopy.caughtUp && view.preCopy.missingBytes === 0) return;
      }
    },
  };
}

async function contentOf(client: NbdClient): Promise<Buffer> {
  const content = Buffer.alloc(SIZE);
  await client.read(0, SIZE, content, 0);
  return content;
}

const write = (client: NbdClient, content: Buffer, block: number, blocks: number): Promise<void> =>
  client.write(block * BLOCK_BYTES, content.subarray(block * BLOCK_BYTES, (block + blocks) * BLOCK_BYTES));

test(
  'what QEMU’s bitmap tells of is fetched again, the rest is there',
  needs('qemu-nbd', 'qemu-img'),
  async (t) => {
    const source = await qemuSource();
    t.after(() => source.stop());
    const guest = await NbdClient.connect(source.uri, {});
    t.after(() => guest.close());
    const content = patterned(SIZE);
    await write(guest, content, 0, BLOCKS / 2);
    const standby = await standbyOf(t, source.uri, `qemu:dirty-bitmap:${BITMAP}`);
    await standby.caughtUp();
    const changed = patterned(SIZE, 9);
    for (const [block, blocks] of [
      [3, 1],
      [40, 17],
      [400, 2],
    ] as const) {
      await write(guest, changed, block, blocks);
      changed.copy(content, block * BLOCK_BYTES, block * BLOCK_BYTES, (block + blocks) * BLOCK_BYTES);
    }
    content.fill(0, (BLOCKS / 2) * BLOCK_BYTES, 400 * BLOCK_BYTES);
    content.fill(0, 402 * BLOCK_BYTES);
    assert.ok((await contentOf(standby.client)).equals(content), 'a standby reads what the source has now');
    await write(standby.client, patterned(SIZE, 5), 7, 1);
    patterned(SIZE, 5).copy(content, 7 * BLOCK_BYTES, 7 * BLOCK_BYTES, 8 * BLOCK_BYTES);
    assert.ok((await contentOf(standby.client)).equals(content));
    const view = await standby.control.volume('disk');
    assert.ok(view.phase === 'relocating' || view.phase === 'plain');
  },
);

test('a source that does not tell: everything is fetched again', needs('qemu-nbd', 'qemu-img'), async (t) => {
  const source = await qemuSource();
  t.after(() => source.stop());
  const guest = await NbdClient.connect(source.uri, {});
  t.after(() => guest.close());
  const standby = await standbyOf(t, source.uri, 'qemu:dirty-bitmap:another');
  await standby.caughtUp();
  const content = patterned(SIZE);
  await write(guest, content, 0, BLOCKS);
  await write(standby.client, content, 0, 1);
  assert.ok((await contentOf(standby.client)).equals(content));
});
