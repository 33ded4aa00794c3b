/** The server that bad clients go to, and what was opened to it. */

import { once } from 'node:events';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import tls from 'node:tls';
import { Option } from '../../src/nbd/constants.js';
import { clientFlags, GREETING_BYTES, infoData, option } from '../support/handshake.js';
import type { Pki } from '../support/pki.js';
import { RawClient, within } from '../support/raw-client.js';

export const ACK_BYTES = 20;
/** INFO_EXPORT and ACK. */
const GO_ANSWER_BYTES = 20 + 12 + 20;

export class Place {
  readonly #clients: RawClient[] = [];

  constructor(
    readonly path: string,
    readonly port: number,
    readonly pki: Pki,
    readonly handshakeTimeoutMs: number,
  ) {}

  async connect(over: 'unix' | 'tcp' = 'unix'): Promise<RawClient> {
    const client = await RawClient.connect(
      over === 'unix' ? { path: this.path } : { host: '127.0.0.1', port: this.port },
    );
    this.#clients.push(client);
    return client;
  }

  /** Past greeting and flags. */
  async greeted(over?: 'unix' | 'tcp'): Promise<RawClient> {
    const client = await this.connect(over);
    await client.receive(GREETING_BYTES);
    client.send(clientFlags());
    return client;
  }

  /** In transmission, with simple replies. */
  async entered(over?: 'unix' | 'tcp'): Promise<RawClient> {
    const client = await this.greeted(over);
    client.send(option(Option.GO, infoData('')));
    await client.receive(GO_ANSWER_BYTES);
    return client;
  }

  /** Past STARTTLS: TLS is expected. */
  async startTls(): Promise<RawClient> {
    const client = await this.greeted();
    client.send(option(Option.STARTTLS));
    await client.receive(ACK_BYTES);
    return client;
  }

  /** In transmission over TLS. It reads nothing but when told. */
  async secured(options: tls.ConnectionOptions = {}): Promise<tls.TLSSocket> {
    const client = await this.startTls();
    client.socket.removeAllListeners('data');
    const socket = tls.connect({ socket: client.socket, ...this.credentials('good'), ...options });
    socket.on('error', () => {});
    await within(once(socket, 'secureConnect'), 'TLS');
    socket.write(option(Option.GO, infoData('')));
    while (socket.read(GO_ANSWER_BYTES) === null) await within(once(socket, 'readable'), 'the answer to GO');
    return socket;
  }

  credentials(of: 'good' | 'stranger'): tls.ConnectionOptions {
    const file = (name: string): Buffer => readFileSync(join(this.pki[of], name));
    return {
      ca: readFileSync(join(this.pki.good, 'ca-cert.pem')),
      cert: file('client-cert.pem'),
      key: file('client-key.pem'),
      servername: 'localhost',
    };
  }

  close(): void {
    for (const client of this.#clients.splice(0)) client.close();
  }
}
