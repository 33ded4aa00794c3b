// nbdkit's nbd plugin: a client of ours that other clients talk to.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { describe, test } from 'node:test';
import { NbdClient } from '../../../src/nbd/client/client.js';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, TransmissionFlag } from '../../../src/nbd/constants.js';
import { type PeerServer, startPeer } from '../servers.js';
import { needs, tool } from '../tools.js';
import { assertSame, HOLE, pattern, SIZE, STATES, TRANSPORTS, withDisk } from './disks.js';

const MIB = 1 << 20;

/** Calls `scenario` with nbdkit in front of a server; `words` tell its plugin. */
async function through(
  words: readonly string[],
  scenario: (nbdkit: PeerServer) => Promise<void>,
): Promise<void> {
  const nbdkit = await startPeer((_, socket) => ['nbdkit', '-f', '-U', socket, 'nbd', ...words]);
  try {
    await scenario(nbdkit);
  } finally {
    await nbdkit.stop();
  }
}

for (const state of STATES) {
  describe(
    `nbdkit's nbd plugin and a disk: ${state}`,
    needs('setpriv', 'nbdkit', 'nbdcopy', 'qemu-io'),
    () => {
      for (const transport of TRANSPORTS)
        test(`reads, writes, zeroes, discards, flushes, over ${transport}`, () =>
          withDisk(state, (disk) =>
            through([disk.uri(transport), 'shared=true'], async ({ uri }) => {
              const wanted = Buffer.from(disk.content);
              const commands = [
                ...[
                  'w -P 5 1000 9000',
                  'w -f -P 6 3M 64k',
                  'w -z 4M 1M',
                  'w -z -u 5M 100k',
                  'discard 8M 1M',
                  'flush',
                ],
                ...['r -P 5 1000 9000', 'r -P 6 3M 64k', 'r -P 0 4M 1M', 'r -P 0 5M 100k'],
              ];
              const said = await tool('qemu-io', '-f', 'raw', ...commands.flatMap((one) => ['-c', one]), uri);
              assert.doesNotMatch(said, /fail|error/i);
              wanted.fill(5, 1000, 10_000);
              wanted.fill(6, 3 * MIB, 3 * MIB + 65_536);
              wanted.fill(0, 4 * MIB, 5 * MIB + 102_400);
              const part = pattern(2 * MIB, 11);
              const client = await NbdClient.connect(uri, { contexts: [BASE_ALLOCATION] });
              await client.write(14 * MIB + 3, part, { fua: true });
              part.copy(wanted, 14 * MIB + 3);
              await client.cache(0, MIB);
              const [first] = await client.blockStatus(BASE_ALLOCATION, HOLE.from, MIB);
              if (state !== 'relocating') assert.equal(first!.flags, 3);
              await client.close();
              const copy = disk.path('copy');
              await tool('nbdcopy', '--connections=4', uri, copy);
              assertSame(readFileSync(copy), wanted);
              if (state !== 'serve') await disk.handedOff();
              assertSame(readFileSync(disk.image), wanted);
            }),
          ));
    },
  );
}

describe('what nbdkit makes of our server', needs('setpriv', 'nbdkit'), () => {
  test('it passes on all that we offer', () =>
    withDisk('serve', (disk) =>
      through([disk.unix], async ({ uri }) => {
        const [theirs, ours] = await Promise.all(
          [uri, disk.unix].map(async (at) => {
            // Without extended headers, which nbdkit does not have.
            const client = await NbdClient.connect(at, {
              contexts: [BASE_ALLOCATION, ALLOCATION_DEPTH],
              extendedHeaders: false,
            });
            await client.close();
            return client.info;
          }),
        );
        assert.equal(theirs!.size, SIZE);
        // That nbdkit can emulate FAST_ZERO is its own affair.
        const known = ~TransmissionFlag.SEND_FAST_ZERO;
        assert.equal(theirs!.flags & known, ours!.flags & known);
        assert.equal(theirs!.description, ours!.description);
        assert.deepEqual(theirs!.blockSize, ours!.blockSize);
        assert.ok(theirs!.contexts.has(BASE_ALLOCATION));
      }),
    ));

  test('a disk that is read-only, and one that is not there', () =>
    withDisk(
      'serve',
      async (disk) => {
        await through([disk.unix], async ({ uri }) => {
          const client = await NbdClient.connect(uri);
          assert.equal(client.info.readOnly, true);
          assertSame(await client.read(0, MIB), disk.content.subarray(0, MIB));
          await client.close();
        });
        await through([disk.unix.replace('/disk?', '/other?')], async ({ uri }) => {
          await assert.rejects(NbdClient.connect(uri));
        });
      },
      ['--read-only'],
    ));
});
