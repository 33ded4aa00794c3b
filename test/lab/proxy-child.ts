/**
 * One volume as a daemon serves it, under a test's control: commands are lines of JSON on standard input, `{id, do, ...}`, answered
 * by `{id, value}` or `{id, error: {code, message}}` on standard output. It is started before it is needed (a crash test restarts
 * it hundreds of times) and opens nothing before `open` tells it what.
 */
import { openSync } from 'node:fs';
import { createInterface } from 'node:readline';
import { pino } from 'pino';
import { BlockferryError, messageOf } from '../../src/errors.js';
import { type OpenVolumeOptions, openVolumeService } from '../../src/host/open.js';
import type { RetreatProof, VolumeService } from '../../src/host/service.js';
import { parseListenAddress } from '../../src/nbd/address.js';
import { Listener, type ListenerParameters } from '../../src/nbd/server/listener.js';
import { type Session, startSession } from '../../src/nbd/server/session.js';
import { LiveMap, type LiveTag } from '../../src/volume/live-map.js';

export interface OpenCommand {
  do: 'open';
  volume: Omit<OpenVolumeOptions, 'log'>;
  /** Unix socket of the guest's export. */
  socket: string;
  /** It is served over TCP as well, at a port of 127.0.0.1. */
  tcp?: boolean;
  /** Where this is not as a daemon has it. */
  listener?: Pick<
    ListenerParameters,
    'connectionsMax' | 'handshakeTimeoutMs' | 'sessionDrainTimeoutMs' | 'tls'
  >;
}

/** What its clients cost it. */
export interface Load {
  /** In the transmission phase. */
  connections: number;
  /** Requests the volume has, and memory bound in them and in answers that were not taken, bytes. */
  requests: number;
  bytes: number;
}

export type ChildCommand =
  | OpenCommand
  | { do: 'status' | 'uris' | 'load' | 'settle' | 'retreat' | 'cancel' | 'close' | 'handedOff' }
  | { do: 'takeover' | 'seal'; generation: number }
  | { do: 'unseal'; proof: RetreatProof }
  | { do: 'retire'; deleteImage: boolean }
  /** The `step`th step from now on is the last (preload.c); 0: none is. */
  | { do: 'arm'; step: number };

function arm(at: number): void {
  try {
    openSync(`/dev/blockferry-crash/${at}`, 'r');
  } catch {
    // it is never there
  }
}

/** Makes the stores into presence.live steps at which preload.c can kill this process, as it does at system calls. */
function step(): void {
  try {
    openSync('/dev/blockferry-crash/step', 'r');
  } catch {
    // it is never there
  }
}

if (process.env.CRASH_ROOT !== undefined) {
  for (const name of ['validate', 'invalidate'] as const) {
    const real = LiveMap.prototype[name] as (tag?: LiveTag) => void;
    LiveMap.prototype[name] = function (this: LiveMap, tag?: LiveTag): void {
      step();
      real.call(this, tag);
      step();
    };
  }
}

const log = pino({ level: process.env.BLOCKFERRY_LOG ?? 'silent' }, pino.destination(2));
let service: VolumeService | undefined;
let listener: Listener | undefined;
const sessions = new Set<Session>();

function load(): Load {
  const all = [...sessions];
  const sum = (of: (session: Session) => number): number =>
    all.reduce((total, session) => total + of(session), 0);
  return {
    connections: all.length,
    requests: sum(({ inFlight }) => inFlight),
    bytes: sum(({ inFlightBytes }) => inFlightBytes),
  };
}

async function open({ volume, socket, tcp = false, listener: settings = {} }: OpenCommand): Promise<string> {
  const opened = await openVolumeService({ ...volume, log });
  service = opened;
  const { guest } = opened;
  const entry = {
    name: opened.name,
    description: opened.linkDescription,
    size: opened.size,
    readOnly: guest.readOnly,
    contexts: guest.contexts,
    preferredBlock: guest.preferredBlock,
    multiConn: guest.multiConn,
    open: () => guest,
  };
  listener = await Listener.open({
    addresses: [`unix:${socket}`, ...(tcp ? ['127.0.0.1:0'] : [])].map(parseListenAddress),
    exports: {
      list: () => [entry],
      find: (name) => (name === '' || name === entry.name ? entry : undefined),
      shuttingDown: false,
    },
    startSession: (socket, parameters) => {
      const session = startSession(socket, parameters);
      sessions.add(session);
      void session.closed.then(() => sessions.delete(session));
      return session;
    },
    log,
    ...settings,
  });
  return listener.addresses(opened.name)[0]!;
}

/** Another volume may be opened afterwards. */
async function close(): Promise<void> {
  await listener?.close();
  await service?.close();
  listener = undefined;
  service = undefined;
}

async function obey(command: ChildCommand): Promise<unknown> {
  if (command.do === 'open') return open(command);
  if (command.do === 'close') return close();
  if (command.do === 'arm') return arm(command.step);
  if (service === undefined) throw new BlockferryError('usage', 'no volume is open');
  switch (command.do) {
    case 'uris':
      return listener?.addresses(service.name);
    case 'load':
      return load();
    case 'status':
      return service.status();
    case 'settle':
      return service.settle();
    case 'retreat':
      return service.retreat();
    case 'cancel':
      return service.cancel();
    case 'handedOff':
      return service.handedOff();
    case 'takeover':
      return service.takeover(command.generation);
    case 'seal':
      return service.seal(command.generation);
    case 'unseal':
      return service.unseal(command.proof);
    case 'retire':
      return service.retire({ deleteImage: command.deleteImage });
  }
}

function answer(id: number, result: object): void {
  process.stdout.write(`${JSON.stringify({ id, ...result })}\n`);
}

const input = createInterface({ input: process.stdin });
input.on('line', (line) => {
  const { id, ...command } = JSON.parse(line) as ChildCommand & { id: number };
  obey(command as ChildCommand).then(
    (value) => answer(id, { value: value ?? null }),
    (error) => {
      const code = error instanceof BlockferryError ? error.code : 'unexpected';
      answer(id, { error: { code, message: messageOf(error) } });
    },
  );
});
input.on('close', () => void close().then(() => process.exit(0)));
