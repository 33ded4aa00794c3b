/** A proxy's source that is honest until `turn`; from then on each connection is served by a bad one, until `reform`. */

import { readFileSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import { join } from 'node:path';
import { Command, Errno } from '../../src/nbd/constants.js';
import type { ClientTlsSettings } from '../../src/nbd/tls.js';
import { describeVolume } from '../../src/relocation/source-identity.js';
import type { Pki } from '../support/pki.js';
import {
  dataChunk,
  errorChunk,
  type FakeExport,
  type FakePeer,
  type FakeRequest,
  type FakeServer,
  greeting,
  startFakeServer,
  statusChunk,
} from './fake-server.js';

/**
 * What becomes of reads while the source is as it is:
 * - lost: they wait, or fail with EIO after the source timeout;
 * - failing: they fail with EIO at once, which the source said;
 * - served: all is well, perhaps slowly.
 */
export type Outcome = 'lost' | 'failing' | 'served';

export interface BadSource {
  readonly name: string;
  readonly outcome: Outcome;
  /** What `status` says of the source while it is lost. */
  readonly tells?: RegExp;
  readonly state?: 'mismatch';
  /** One connection. */
  readonly serve?: (peer: FakePeer, source: FakeSource) => Promise<void>;
  /** In place of the server: something else at its address. Resolves with how to clear it away. */
  readonly instead?: (source: FakeSource) => Promise<() => Promise<void>>;
  /** Only the background copy meets it. */
  readonly background?: true;
  readonly over?: 'tcp' | 'tls';
}

export const DESCRIPTION = describeVolume('6f1c2f6a-0000-4000-8000-00000000fa4e', 7);
export type Script = (peer: FakePeer, request: FakeRequest, source: FakeSource) => Promise<void> | void;

export class FakeSource {
  /** Connections since it turned, and READs in them. */
  connections = 0;
  reads = 0;
  #server!: FakeServer;
  #bad: BadSource | null = null;
  #clear: (() => Promise<void>) | null = null;

  private constructor(
    readonly data: Buffer,
    private readonly pki: Pki,
    private readonly over: 'unix' | 'tcp' | 'tls',
  ) {}

  static async start(data: Buffer, pki: Pki, over: 'unix' | 'tcp' | 'tls' = 'unix'): Promise<FakeSource> {
    const source = new FakeSource(data, pki, over);
    const secure: ClientTlsSettings = { certificates: pki.good, hostname: 'localhost' };
    source.#server = await startFakeServer((peer) => source.#serve(peer), {
      over: over === 'tcp' ? 'tcp' : 'unix',
      ...(over === 'tls' ? { secure } : {}),
    });
    return source;
  }

  get uri(): string {
    return this.#server.uri;
  }

  get path(): string {
    return this.#server.path;
  }

  /** From now on it is `bad`; who is connected to it loses it. */
  async turn(bad: BadSource): Promise<void> {
    this.#bad = bad;
    this.connections = 0;
    this.reads = 0;
    if (bad.instead !== undefined) await this.#server.deaf();
    this.#server.cut();
    if (bad.instead === undefined) return;
    await rm(this.path, { force: true });
    this.#clear = await bad.instead(this);
  }

  /** From now on new connections are served well; `cut`: there are no others. */
  async reform({ cut = false } = {}): Promise<void> {
    this.#bad = null;
    if (cut) this.#server.cut();
    if (this.#clear === null) return;
    await this.#clear();
    this.#clear = null;
    await rm(this.path, { force: true, recursive: true });
    await this.#server.listen();
  }

  async stop(): Promise<void> {
    await this.#clear?.();
    await this.#server.stop();
  }

  async #serve(peer: FakePeer): Promise<void> {
    this.connections++;
    const bad = this.#bad;
    if (bad?.serve !== undefined) await bad.serve(peer, this);
    else await this.serve(await this.meet(peer), this.honest);
  }

  /** The handshake, with TLS if that is how it is met. Resolves with the peer to go on with. */
  async meet(peer: FakePeer, changes: FakeExport = {}): Promise<FakePeer> {
    const wish = {
      size: BigInt(this.data.length),
      description: DESCRIPTION,
      contexts: [[5, 'base:allocation']] as const,
      ...changes,
    };
    if (this.over !== 'tls') {
      await peer.handshake(wish);
      return peer;
    }
    await this.greet(peer);
    const secured = peer.secured(credentials(this.pki.good));
    await secured.options(wish);
    return secured;
  }

  /** Up to STARTTLS. */
  async greet(peer: FakePeer): Promise<void> {
    peer.send(greeting());
    await peer.read(4);
    await peer.readOption();
  }

  credentials(of: 'stranger' | 'expired' | 'elsewhere'): { cert: Buffer; key: Buffer } {
    return credentials(this.pki[of]);
  }

  /** Answers every request with `script`. */
  async serve(peer: FakePeer, script: Script): Promise<void> {
    for (;;) {
      const request = await peer.request();
      if (request.command === Command.DISC) {
        peer.hangUp();
        return;
      }
      if (request.command === Command.READ) this.reads++;
      await script(peer, request, this);
    }
  }

  readonly honest: Script = (peer, { command, cookie, offset, length }) => {
    if (command === Command.READ)
      peer.send(dataChunk(cookie, offset, this.data.subarray(offset, offset + length), true));
    else if (command === Command.BLOCK_STATUS) peer.send(statusChunk(cookie, 5, [[length, 0]], true));
    else peer.send(errorChunk(cookie, Errno.EINVAL));
  };
}

function credentials(folder: string): { cert: Buffer; key: Buffer } {
  const file = (name: string): Buffer => readFileSync(join(folder, name));
  return { cert: file('server-cert.pem'), key: file('server-key.pem') };
}
