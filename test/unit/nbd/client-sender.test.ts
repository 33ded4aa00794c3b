import assert from 'node:assert/strict';
import type { Socket } from 'node:net';
import { Duplex } from 'node:stream';
import { describe, it } from 'node:test';
import { RequestSender } from '../../../src/nbd/client/sender.js';
import { encodeRequest } from '../../../src/nbd/codec/client.js';
import { Command, REQUEST_HEADER_BYTES } from '../../../src/nbd/constants.js';

/** Records what is written, when its peer takes it: at once, or only on `takeAll`. */
class RecordingSocket extends Duplex {
  readonly writes: Buffer[] = [];
  #waiting: (() => void) | null = null;
  constructor(readonly blocked: boolean) {
    super();
  }

  override _writev(chunks: { chunk: Buffer }[], callback: () => void): void {
    const record = () => {
      this.writes.push(Buffer.concat(chunks.map(({ chunk }) => chunk)));
      callback();
    };
    if (this.blocked) this.#waiting = record;
    else record();
  }

  override _write(chunk: Buffer, _encoding: string, callback: () => void): void {
    this._writev([{ chunk }], callback);
  }

  /** The peer takes all that was written, and what that lets through, and so on. */
  takeAll(): void {
    while (this.#waiting !== null) {
      const record = this.#waiting;
      this.#waiting = null;
      record();
    }
  }
}

function header(index: number, command: number, length: number): Buffer {
  const bytes = Buffer.alloc(REQUEST_HEADER_BYTES);
  encodeRequest(bytes, 0, 0, command, 1, index, index * 4096, length);
  return bytes;
}

const endOfTurn = () => new Promise((resolve) => setImmediate(resolve));

describe('request sender', () => {
  it('sends the headers of a turn in one write, and its payloads with them', async () => {
    const socket = new RecordingSocket(false);
    const sender = new RequestSender(socket as unknown as Socket);
    for (let turn = 0; turn < 3; turn++) {
      for (let i = 0; i < 100; i++) sender.request(0, Command.READ, 1, i, i * 4096, 512);
      await endOfTurn();
      assert.equal(socket.writes.length, turn + 1);
    }
    const all = Array.from({ length: 100 }, (_, i) => header(i, Command.READ, 512));
    assert.deepEqual(socket.writes[2], Buffer.concat(all));

    const payload = Buffer.alloc(512, 7);
    sender.request(0, Command.READ, 1, 0, 0, 512);
    sender.request(0, Command.WRITE, 1, 1, 4096, 512);
    sender.payload(payload);
    sender.request(0, Command.READ, 1, 2, 8192, 512);
    await endOfTurn();
    assert.equal(socket.writes.length, 4);
    const [first, second, third] = [
      header(0, Command.READ, 512),
      header(1, Command.WRITE, 512),
      header(2, Command.READ, 512),
    ];
    assert.deepEqual(socket.writes[3], Buffer.concat([first, second, payload, third]));
  });

  it('leaves headers alone that a slow peer has not taken yet', async () => {
    const socket = new RecordingSocket(true);
    const sender = new RequestSender(socket as unknown as Socket);
    const expected: Buffer[] = [];
    for (let i = 0; i < 4000; i++) {
      sender.request(0, Command.READ, 1, i, i * 4096, 512);
      expected.push(header(i, Command.READ, 512));
      if (i % 700 === 0) await endOfTurn();
    }
    await endOfTurn();
    const deadline = performance.now() + 5000;
    while (socket.writableLength > 0 && performance.now() < deadline) {
      socket.takeAll();
      await endOfTurn();
    }
    assert.deepEqual(Buffer.concat(socket.writes), Buffer.concat(expected));
  });
});
