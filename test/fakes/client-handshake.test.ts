/** The client against servers that misbehave while it connects: a clear error, in time. */

import assert from 'node:assert/strict';
import { describe, it } from 'node:test';
import type { ErrorCode } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { Option, OptionReply } from '../../src/nbd/constants.js';
import { against, failure } from './against.js';
import { BAD_HANDSHAKES, BAD_LISTS } from './bad-handshakes.js';
import { greeting, optionReply } from './fake-server.js';

/** Who is waited for in vain need not be waited for long. */
function patienceMs(code: ErrorCode): number {
  return code === 'timeout' ? 100 : 5000;
}

describe('a server that misbehaves in the handshake', () => {
  for (const { name, script, code, why } of BAD_HANDSHAKES) {
    it(name, () =>
      against(script, async (uri) => {
        const options = { handshakeTimeoutMs: patienceMs(code), contexts: ['base:allocation'] };
        await assert.rejects(NbdClient.connect(uri, options), failure(code, why));
      }),
    );
  }

  for (const { name, script, code, why } of BAD_LISTS) {
    it(name, () =>
      against(script, async (uri) => {
        await assert.rejects(
          NbdClient.list(uri, { handshakeTimeoutMs: patienceMs(code) }),
          failure(code, why),
        );
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
