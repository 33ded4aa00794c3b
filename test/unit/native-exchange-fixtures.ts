/**
 * What the tests of the addon's `exchange` and `receivePayload` share: the job by names, requests, the replies that the server's own codec
 * makes of them, and sockets.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { closeSync, readSync, writeSync } from 'node:fs';
import net from 'node:net';
import { after, type TestContext } from 'node:test';
import { Worker } from 'node:worker_threads';
import * as native from '../../src/native/index.js';
import {
  encodeChunkHeader,
  encodeDataPayloadHead,
  encodeExtendedChunkHeader,
  encodeSimpleReply,
} from '../../src/nbd/codec/replies.js';
import { ChunkFlag, ChunkType, type ReplyForm } from '../../src/nbd/constants.js';
import { encodeExtendedRequest, encodeRequest, type RawRequest } from '../fakes/raw-client.js';

/** Places of the job, in the order of native/src/exchange.h. */
export const FIELDS = [
  'socket',
  'image',
  'imageBytes',
  'access',
  'form',
  'readBytesMax',
  'writeBytesMax',
  'repliesMax',
  'receiveBytesMax',
  'pollUs',
  'sleeps',
  'turnUs',
  'splitBytesMin',
  'at',
  'end',
  'outFrom',
  'outTo',
  'receivedBytes',
  'others',
] as const;
export type Field = (typeof FIELDS)[number];

export const FORMS: readonly ReplyForm[] = ['simple', 'structured', 'extended'];
export const ACCESS = { READS: 1, WRITES: 2, NOWAIT: 4 } as const;

export interface Given extends Partial<Record<Field, number>> {
  image: number;
  imageBytes: number;
  input: Buffer;
  output?: Buffer;
  present?: Uint8Array | null;
  dirty?: Uint8Array | null;
}

export interface Outcome extends Record<Field, number> {
  ending: number;
  /** What was answered and not sent. */
  answers: Buffer;
}

export function jobOf(given: Given): Float64Array<ArrayBuffer> {
  const fields: Record<Field, number> = {
    socket: -1,
    access: ACCESS.READS | ACCESS.WRITES,
    form: 0,
    readBytesMax: 1 << 20,
    writeBytesMax: 1 << 20,
    repliesMax: 1000,
    receiveBytesMax: Math.max(given.input.length, 1),
    pollUs: -1,
    sleeps: 0,
    turnUs: 10_000_000,
    splitBytesMin: 0,
    at: 0,
    end: given.socket === undefined ? given.input.length : 0,
    outFrom: 0,
    outTo: 0,
    receivedBytes: 0,
    others: 0,
    ...given,
  };
  return Float64Array.from(FIELDS, (field) => fields[field]);
}

/** One call; without a socket all of `input` is given, with one nothing, unless it says otherwise. */
export function exchanged(given: Given): Outcome {
  const output = given.output ?? Buffer.alloc(1 << 20, 0xee);
  const job = jobOf(given);
  const ending = native.exchange(job, given.input, output, given.present ?? null, null, given.dirty ?? null);
  const fields = Object.fromEntries(FIELDS.map((field, i) => [field, job[i]!])) as Record<Field, number>;
  return { ...fields, ending, answers: output.subarray(fields.outFrom, fields.outTo) };
}

export function requestIn(form: ReplyForm, request: RawRequest, exactFlags = false): Buffer {
  return form === 'extended' ? encodeExtendedRequest(request, exactFlags) : encodeRequest(request);
}

/** The reply to a READ, with its data, or to a WRITE. */
export function replyIn(form: ReplyForm, { cookie, offset = 0 }: RawRequest, data?: Uint8Array): Buffer {
  const [hi, lo] = halves(cookie);
  const bytes = Buffer.alloc(64 + (data?.length ?? 0));
  let end: number;
  if (form === 'simple' || (form === 'structured' && data === undefined))
    end = encodeSimpleReply(bytes, 0, 0, hi, lo);
  else {
    const type = data === undefined ? ChunkType.NONE : ChunkType.OFFSET_DATA;
    const length = data === undefined ? 0 : 8 + data.length;
    if (form === 'structured') end = encodeChunkHeader(bytes, 0, ChunkFlag.DONE, type, hi, lo, length);
    else {
      const [offsetHi, offsetLo] = halves(Number(offset));
      end = encodeExtendedChunkHeader(bytes, 0, ChunkFlag.DONE, type, hi, lo, offsetHi, offsetLo, length);
    }
    if (data !== undefined) end = encodeDataPayloadHead(bytes, end, Number(offset));
  }
  if (data !== undefined) bytes.set(data, end);
  return bytes.subarray(0, end + (data?.length ?? 0));
}

function halves(value: number): [hi: number, lo: number] {
  return [Math.floor(value / 2 ** 32), value % 2 ** 32];
}

const ends = new Set<number>();
after(() => {
  for (const fd of ends) closeSync(fd);
});

/** A socket pair, blocking; what is not closed by then is closed after the tests. */
export class Pair {
  readonly server: number;
  readonly client: number;

  constructor() {
    [this.server, this.client] = native.socketPair();
    ends.add(this.server).add(this.client);
  }

  /** From the client. */
  send(...bytes: Buffer[]): void {
    writeSync(this.client, Buffer.concat(bytes));
  }

  /** All that was sent to the client; never waits, for it sends a mark behind it. */
  received(): Buffer {
    const mark = Buffer.from('that is all of it');
    writeSync(this.server, mark);
    let all = Buffer.alloc(0);
    const piece = Buffer.alloc(1 << 16);
    while (!all.subarray(-mark.length).equals(mark))
      all = Buffer.concat([all, piece.subarray(0, readSync(this.client, piece))]);
    return all.subarray(0, -mark.length);
  }

  closeServer(): void {
    ends.delete(this.server);
    closeSync(this.server);
  }

  /** The client's descriptor, which is the caller's to close from now on. */
  takeClient(): number {
    ends.delete(this.client);
    return this.client;
  }
}

/** The client's end as a socket of this thread, and what it has received. */
export function asSocket(t: TestContext, pair: Pair): { socket: net.Socket; received: () => Buffer } {
  const socket = new net.Socket({ fd: pair.takeClient(), allowHalfOpen: true });
  const pieces: Buffer[] = [];
  socket.on('data', (bytes: Buffer) => pieces.push(bytes));
  socket.on('error', () => {});
  t.after(() => socket.destroy());
  return { socket, received: () => Buffer.concat(pieces) };
}

/** Something that the event loop has to do, and finds only when it polls. */
export async function otherWork(t: TestContext): Promise<void> {
  await new Promise((resolve) => setImmediate(resolve)); // what earlier tests have closed is closed by then
  const other = new Pair();
  const socket = new net.Socket({ fd: other.takeClient() });
  t.after(() => socket.destroy());
  socket.resume();
  native.send(other.server, Buffer.of(1), 0, 1, false);
  await once(socket, 'data'); // it is polled for by now
  native.send(other.server, Buffer.of(2), 0, 1, false);
}

/** Sends `bytes` from a thread that waits while the socket is full. */
export function sentByThread(t: TestContext, fd: number, bytes: Uint8Array): Worker {
  const code = `
    const { workerData: { fd, bytes } } = require('node:worker_threads');
    for (let at = 0; at < bytes.length; ) at += require('node:fs').writeSync(fd, bytes, at);`;
  const worker = new Worker(code, { eval: true, workerData: { fd, bytes } });
  t.after(() => void worker.terminate()); // not waited for: it ends when the pair is closed, at the latest
  return worker;
}

/** As `until`, but the event loop has no turn in between. */
export function repeated(condition: () => boolean): void {
  const deadline = Date.now() + 10_000;
  while (!condition()) assert.ok(Date.now() < deadline, `not in time: ${condition}`);
}
