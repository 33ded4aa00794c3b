/** The client against servers that misbehave while it connects: a clear error, in time. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { ErrorCode } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { Option, OptionReply } from '../../src/nbd/constants.js';
import { against, failure } from './against.js';
import { type FakePeer, greeting, optionReply } from './fake-server.js';

describe('a server that misbehaves in the handshake', () => {
  const cases: [string, (peer: FakePeer) => Promise<void>, ErrorCode, RegExp][] = [
    ['hangs up at once', async (peer) => peer.hangUp(), 'closed', /hung up before its greeting/],
    [
      'hangs up within its greeting',
      async (peer) => {
        peer.send(greeting().subarray(0, 9));
        peer.hangUp();
      },
      'closed',
      /before its greeting/,
    ],
    [
      'hangs up instead of answering an option',
      async (peer) => {
        peer.send(greeting());
        await peer.read(4);
        await peer.readOption();
        peer.hangUp();
      },
      'closed',
      /before its answer to EXTENDED_HEADERS/,
    ],
    [
      'hangs up on EXPORT_NAME, for it has no such export',
      async (peer) => {
        peer.send(greeting(0));
        await peer.read(4);
        await peer.readOption();
        peer.hangUp();
      },
      'closed',
      /no such export/,
    ],
    [
      'is no NBD server',
      async (peer) => peer.send(Buffer.from('220 mail.example.com ESMTP\r\n')),
      'protocol',
      /not an NBD/,
    ],
    ['never greets', async () => {}, 'timeout', /greeting did not come within 100 ms/],
    [
      'never answers',
      async (peer) => {
        peer.send(greeting());
      },
      'timeout',
      /answer to EXTENDED_HEADERS did not come/,
    ],
    [
      'sends its greeting drop by drop, for ever',
      async (peer) => {
        peer.send(greeting());
        await peer.read(4);
        await peer.readOption();
        for (;;) {
          peer.send(Buffer.from([0]));
          await peer.read(1);
        }
      },
      'timeout',
      /did not come/,
    ],
  ];
  for (const [what, script, code, why] of cases) {
    it(what, () =>
      against(script, async (uri) => {
        await assert.rejects(NbdClient.connect(uri, { handshakeTimeoutMs: 100 }), failure(code, why));
      }),
    );
  }

  it('is not there', async () => {
    await assert.rejects(
      NbdClient.connect('nbd+unix:///?socket=/nonexistent/sock'),
      failure('source-unreachable', /ENOENT/),
    );
    let uri = '';
    await against(
      async () => {},
      async (address) => {
        uri = address;
      },
    );
    await assert.rejects(NbdClient.connect(uri), failure('source-unreachable'));
    await assert.rejects(NbdClient.list(uri), failure('source-unreachable'));
  });

  it('connecting can be called off, before and meanwhile', () =>
    against(
      async () => {},
      async (uri) => {
        await assert.rejects(
          NbdClient.connect(uri, { signal: AbortSignal.abort() }),
          failure('closed', /called off/),
        );
        const controller = new AbortController();
        const attempt = NbdClient.connect(uri, { signal: controller.signal });
        controller.abort();
        await assert.rejects(attempt, failure('closed', /called off/));
      },
    ));

  it('is told ABORT when its answer is of no use', async () => {
    let said: number | null = null;
    await against(
      async (peer) => {
        await peer.handshake({ structured: false }).catch(() => {});
      },
      async (uri) => {
        await assert.rejects(
          NbdClient.connect(uri, { requireStructured: true }),
          failure('source-io', /structured/),
        );
      },
    );
    await against(
      async (peer) => {
        peer.send(greeting());
        await peer.read(4);
        for (const option of [Option.EXTENDED_HEADERS, Option.STRUCTURED_REPLY]) {
          await peer.readOption();
          peer.send(optionReply(option, OptionReply.ERR_UNSUP));
        }
        said = (await peer.readOption()).option;
      },
      async (uri) => {
        await assert.rejects(NbdClient.connect(uri, { requireStructured: true }), failure('source-io'));
        const deadline = performance.now() + 5000;
        while (said === null && performance.now() < deadline)
          await new Promise((resolve) => setImmediate(resolve));
      },
    );
    assert.equal(said, 2);
  });
});
