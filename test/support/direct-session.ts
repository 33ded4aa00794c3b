/** Sessions on devices whose bytes may be reached directly, and the same devices without that. */
import assert from 'node:assert/strict';
import { readFileSync, writeFileSync } from 'node:fs';
import net from 'node:net';
import pino from 'pino';
import { ImageDevice } from '../../src/library/image-device.js';
import { sendBuffer, socketPair } from '../../src/native/index.js';
import { Command, type ReplyForm } from '../../src/nbd/constants.js';
import type { BlockDevice } from '../../src/nbd/device.js';
import { type Session, type SessionParameters, startSession } from '../../src/nbd/server/session.js';
import { connectedPair, encodeRequest, RawClient, type RawRequest } from '../fakes/raw-client.js';
import { FloodingClient } from './flooding-client.js';
import { sparseFile } from './volume.js';

type Methods = { [Name in keyof BlockDevice]?: BlockDevice[Name] | undefined };

/** The device but for some of its methods. */
export function changed(device: BlockDevice, methods: Methods): BlockDevice {
  return new Proxy(device, {
    get(target, name) {
      if (Object.hasOwn(methods, name)) return Reflect.get(methods, name);
      const value: unknown = Reflect.get(target, name);
      return typeof value === 'function' ? value.bind(target) : value;
    },
  });
}

export function withoutDirect(device: BlockDevice): BlockDevice {
  return changed(device, { direct: undefined });
}

/** `asked`: which calls for data have reached the device, in order. */
export function watched(device: BlockDevice): { device: BlockDevice; asked: string[] } {
  const asked: string[] = [];
  const methods = (['readNow', 'writeNow', 'read', 'write', 'flush'] as const).map((name) => {
    const real = device[name].bind(device) as (...args: unknown[]) => unknown;
    const tell = (...args: unknown[]): unknown => {
      asked.push(name);
      return real(...args);
    };
    return [name, tell] as const;
  });
  return { device: changed(device, Object.fromEntries(methods)), asked };
}

export type Transport = 'descriptor' | 'events';

export interface Served {
  session: Session;
  client: RawClient;
}

/** A session and its client, who end when the caller says so. */
export function served(
  device: BlockDevice,
  form: ReplyForm,
  transport: Transport = 'descriptor',
  options: Partial<SessionParameters> = {},
): Served {
  const [server, socket] = connectedPair(transport);
  const session = startSession(server, { ...parametersOf(device, form), ...options });
  return { session, client: new RawClient(socket, form) };
}

export function parametersOf(device: BlockDevice, form: ReplyForm): SessionParameters {
  return {
    device,
    structured: form !== 'simple',
    extended: form === 'extended',
    contexts: form === 'simple' ? [] : [{ id: 1, name: 'base:allocation' }],
    rest: Buffer.alloc(0),
    log: pino({ level: 'silent' }),
  };
}

/** More than the requests that a flood is ahead. */
const FLOOD_BYTES = 1 << 20;

/** Of a FloodingClient: what it sends in one round, how long the answers are, and how many rounds it is ahead of them. */
export type Flood = [requests: RawRequest[], answerBytes: number, ahead: number];

/** A disk image that is served. */
export class Disk {
  readonly path: string;
  readonly device: ImageDevice;
  /** What it should hold. */
  readonly content: Buffer;

  constructor(content: Buffer, readOnly = false) {
    this.path = sparseFile(content.length);
    this.content = Buffer.from(content);
    writeFileSync(this.path, content, { flag: 'r+' });
    this.device = new ImageDevice(this.path, readOnly);
  }

  holds(): void {
    assert.ok(readFileSync(this.path).equals(this.content), 'the image holds something else');
  }
}

export const read = (cookie: number, offset: number, length: number): RawRequest => ({
  command: Command.READ,
  cookie,
  offset,
  length,
});

export const write = (cookie: number, offset: number, payload: Buffer, flags = 0): RawRequest => ({
  command: Command.WRITE,
  cookie,
  offset,
  payload,
  flags,
});

/** What a test makes; it ends with `end`. */
export class Rig {
  readonly #disks: Disk[] = [];
  readonly #sessions: Served[] = [];
  readonly #floods: { session: Session; flooding: FloodingClient }[] = [];

  disk(content: Buffer, readOnly = false): Disk {
    const disk = new Disk(content, readOnly);
    this.#disks.push(disk);
    return disk;
  }

  serve(...args: Parameters<typeof served>): Served {
    const made = served(...args);
    this.#sessions.push(made);
    return made;
  }

  /** A session whose client, on a thread of its own, gives it no rest. */
  flood(device: BlockDevice, [requests, answerBytes, ahead]: Flood): FloodingClient {
    const [server, client] = socketPair();
    sendBuffer(client, FLOOD_BYTES); // not vital: a client that waits until it may send more is helped in a while
    const socket = new net.Socket({ fd: server, allowHalfOpen: true });
    const session = startSession(socket, parametersOf(device, 'simple'));
    const flooding = new FloodingClient(
      client,
      Buffer.concat(requests.map(encodeRequest)),
      answerBytes,
      ahead,
    );
    this.#floods.push({ session, flooding });
    return flooding;
  }

  /** For `afterEach`. */
  readonly end = async (): Promise<void> => {
    for (const { session, flooding } of this.#floods.splice(0)) {
      session.destroy();
      await Promise.all([session.closed, flooding.ended()]);
    }
    for (const { session, client } of this.#sessions.splice(0)) {
      client.socket.destroy();
      session.destroy();
      await session.closed;
      assert.equal(session.inFlight, 0);
    }
    for (const { device } of this.#disks.splice(0)) await device.close();
  };
}
