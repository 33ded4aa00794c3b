/** Runs a client against a scripted server. */

import assert from 'node:assert/strict';
import { BlockferryError, type ErrorCode } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import type { NbdClientOptions } from '../../src/nbd/client/options.js';
import { type FakeExport, type FakePeer, type FakeRequest, startFakeServer } from './fake-server.js';

export const OFFSET = 4096;
export const LENGTH = 8192;

export async function against(
  script: (peer: FakePeer) => Promise<void>,
  scenario: (uri: string) => Promise<void>,
): Promise<void> {
  const server = await startFakeServer(script);
  try {
    await scenario(server.uri);
  } finally {
    await server.stop();
  }
}

export function failure(code: ErrorCode, why: RegExp = /./) {
  return (error: unknown) => {
    assert.ok(error instanceof BlockferryError, String(error));
    assert.equal(error.code, code, error.message);
    assert.match(error.message, why);
    assert.ok(!error.message.includes('\n'));
    return true;
  };
}

/** Connects to a server that shakes hands properly and then runs `script`. */
export function connected(
  wish: FakeExport & Pick<NbdClientOptions, 'requestTimeoutMs' | 'extendedHeaders'>,
  script: (peer: FakePeer) => Promise<void>,
  scenario: (client: NbdClient) => Promise<void>,
): Promise<void> {
  return against(
    async (peer) => {
      await peer.handshake(wish);
      await script(peer);
    },
    async (uri) => {
      const client = await NbdClient.connect(uri, {
        ...(wish.contexts ? { contexts: wish.contexts.map(([, name]) => name) } : {}),
        extendedHeaders: wish.extendedHeaders ?? true,
        ...(wish.requestTimeoutMs === undefined ? {} : { requestTimeoutMs: wish.requestTimeoutMs }),
      });
      try {
        await scenario(client);
      } finally {
        client.destroy();
      }
    },
  );
}

export type Answer = (request: FakeRequest, peer: FakePeer) => Buffer[];

/** Answers the first request with `answer`, and hangs up if that says so. */
export const answering = (answer: Answer) => async (peer: FakePeer) => {
  const request = await peer.request();
  peer.send(...answer(request, peer));
};

export const STATUS: FakeExport = { contexts: [[5, 'base:allocation']] as const };
export const TWO_CONTEXTS: FakeExport = {
  contexts: [
    [5, 'base:allocation'],
    [6, 'x:y'],
  ],
};
