/**
 * Makes the seeds anew: `node dist/test/fuzz/record.js`. Needs the clients and servers that `bin/check --setup` installs; whose are missing
 * keep the recordings they have.
 */
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import type { AddressInfo } from 'node:net';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import VatesClient from '@vates/nbd-client';
import { NbdClient } from '../../src/nbd/client/client.js';
import { MemoryDevice } from '../fakes/memory-device.js';
import { type PeerServer, startNbdServer, startPeer } from '../interop/servers.js';
import { attempt, PYTHON } from '../interop/tools.js';
import { Conversation } from './conversation.js';
import { startRelay } from './relay.js';
import { runScript } from './script.js';
import { asksExtended, formatPieces, type Piece, SEEDS_DIR, seedOf } from './seeds.js';
import { Faults, serveSocket } from './target.js';
import { CMD, DISK_BYTES, encodeOption, encodeRequest, FLAG, OPT, u16, u32, u64 } from './wire.js';

const CONTEXTS = ['base:allocation'];
const folder = mkdtempSync(join(tmpdir(), 'blockferry-record-'));

/** Each block is one byte over and over, so that recordings stay short; two blocks are zero. */
function disk(): Buffer {
  const data = Buffer.alloc(DISK_BYTES);
  for (let block = 0; block < DISK_BYTES / 4096; block++)
    data.fill(block + 1, block * 4096, (block + 1) * 4096);
  return data.fill(0, 8 * 4096, 10 * 4096);
}

/** Sessions that passed a relay. Several connections become several recordings. */
class Tape {
  readonly sessions: Piece[][] = [];

  readonly pass = () => {
    const pieces: Piece[] = [];
    this.sessions.push(pieces);
    const add = (side: Piece['side'], bytes: Buffer): Buffer[] => {
      const last = pieces.at(-1);
      if (last?.side === side) last.bytes = Buffer.concat([last.bytes, bytes]);
      else pieces.push({ side, bytes: Buffer.from(bytes) });
      return [bytes];
    };
    return {
      fromClient: (bytes: Buffer) => add('client', bytes),
      fromServer: (bytes: Buffer) => add('server', bytes),
    };
  };

  save(kind: 'server' | 'client', name: string, about: string): void {
    mkdirSync(join(SEEDS_DIR, kind), { recursive: true });
    this.sessions.forEach((pieces, index) => {
      const title = this.sessions.length > 1 ? `${name}-${index + 1}` : name;
      const { client, server } = seedOf(title, pieces);
      const text = [`# ${about}`, ...formatPieces(pieces), ''].join('\n');
      writeFileSync(join(SEEDS_DIR, kind, `${title}.txt`), text);
      console.log(`${kind}/${title}: ${client.length} units of the client, ${server.length} of the server`);
    });
  }
}

/** Records what `use` does with a server of ours. */
async function recordClient(
  name: string,
  about: string,
  use: (uri: string, port: number, path: string) => Promise<unknown>,
): Promise<void> {
  const device = new MemoryDevice(DISK_BYTES);
  disk().copy(device.data);
  device.contexts = ['base:allocation', 'qemu:allocation-depth'];
  const { path, listener } = await serveSocket(folder, 'server', device, new Faults());
  const tape = new Tape();
  const through = join(folder, 'relay.sock');
  const relay = await startRelay(through, path, tape.pass);
  const tcp = await startRelay({ port: 0 }, path, tape.pass);
  try {
    await use(`nbd+unix:///?socket=${through}`, (tcp.address as AddressInfo).port, through);
    await listener.close();
    tape.save('server', name, about);
  } catch (error) {
    console.log(`${name}: kept as it was (${(error as Error).message.split('\n')[0]})`);
  } finally {
    await relay.stop();
    await tcp.stop();
    await listener.close();
  }
}

async function program(...words: string[]): Promise<void> {
  const { code, stderr } = await attempt(words);
  if (code !== 0) throw new Error(`${words.join(' ')}: ${stderr}`);
}

async function ourClient(uri: string): Promise<void> {
  const client = await NbdClient.connect(uri, { contexts: CONTEXTS });
  await runScript(client);
  await client.close();
}

/** Sends units by hand, each when the answer to the one before has come. */
async function byHand(path: string, units: (asked: Conversation) => Generator<Buffer>): Promise<void> {
  const conversation = new Conversation();
  const socket = net.connect({ path });
  const ended = new Promise<void>((resolve) => socket.once('close', () => resolve()));
  const remaining = units(conversation);
  const next = (): void => {
    if (!conversation.settled) return;
    const { value, done } = remaining.next();
    if (done === true) {
      socket.end();
      return;
    }
    conversation.sent(value);
    socket.write(value, () => next());
  };
  socket.on('data', (bytes) => {
    conversation.received(bytes);
    next();
  });
  await ended;
}

const goData = Buffer.concat([u32(4), Buffer.from('disk'), u16(4), u16(0), u16(1), u16(2), u16(3)]);
const metaData = (...queries: string[]): Buffer => {
  const named = queries.map((query) => Buffer.concat([u32(query.length), Buffer.from(query)]));
  return Buffer.concat([u32(4), Buffer.from('disk'), u32(queries.length), ...named]);
};

/** Every option, then every command with every flag: extended headers where the server has them. */
function* everything(asked: Conversation): Generator<Buffer> {
  yield u32(3);
  for (const option of [OPT.EXTENDED, OPT.STRUCTURED, OPT.LIST, OPT.STARTTLS]) yield encodeOption(option);
  yield encodeOption(OPT.LIST_META, metaData());
  yield encodeOption(OPT.LIST_META, metaData('base:', 'qemu:'));
  yield encodeOption(OPT.SET_META, metaData('base:allocation', 'qemu:allocation-depth'));
  yield encodeOption(OPT.INFO, goData);
  yield encodeOption(OPT.GO, goData);
  const extended = asked.terms?.extended === true;
  let cookie = 1n;
  const request = (command: number, flags: number, offset: number, length: number): Buffer => {
    const payload = command === CMD.WRITE ? Buffer.alloc(length, 0x77) : Buffer.alloc(0);
    const marked = extended && command === CMD.WRITE ? flags | FLAG.PAYLOAD : flags;
    return encodeRequest({
      ...{ extended, flags: marked, command, cookie: cookie++, payload },
      ...{ offset: BigInt(offset), length: BigInt(length) },
    });
  };
  yield request(CMD.READ, 0, 0, 8192);
  yield request(CMD.READ, FLAG.DF, 4096, 4096);
  yield request(CMD.WRITE, FLAG.FUA, 4096, 4096);
  yield request(CMD.WRITE, 0, 65_024, 512);
  yield request(CMD.TRIM, FLAG.FUA, 8192, 8192);
  yield request(CMD.ZERO, 0, 16_384, 4096);
  yield request(CMD.ZERO, FLAG.NO_HOLE | FLAG.FUA, 20_480, 4096);
  yield request(CMD.ZERO, FLAG.FAST_ZERO, 24_576, 4096);
  yield request(CMD.CACHE, 0, 0, 65_536);
  yield request(CMD.STATUS, 0, 0, 65_536);
  yield request(CMD.STATUS, FLAG.REQ_ONE, 32_768, 16_384);
  if (extended) {
    const payload = Buffer.concat([u64(16_384), u32(1)]);
    const common = { extended, flags: FLAG.PAYLOAD, cookie: cookie++, offset: 0n };
    yield encodeRequest({ ...common, command: CMD.STATUS, length: BigInt(payload.length), payload });
  }
  yield request(CMD.READ, 0, 65_000, 4096);
  yield request(CMD.WRITE, 0, 65_000, 4096);
  yield request(CMD.FLUSH, 0, 0, 0);
  yield request(99, 0, 0, 0);
  yield request(CMD.DISC, 0, 0, 0);
}

/** As clients of twenty years ago: EXPORT_NAME, the 124 zeroes, simple replies. */
function* oldWays(): Generator<Buffer> {
  yield u32(1);
  yield encodeOption(OPT.EXPORT_NAME, Buffer.from('disk'));
  const common = { extended: false, flags: 0, offset: 4096n };
  yield encodeRequest({ ...common, command: CMD.READ, cookie: 7n, length: 4096n });
  yield encodeRequest({
    ...common,
    command: CMD.WRITE,
    cookie: 8n,
    length: 512n,
    payload: Buffer.alloc(512, 9),
  });
  yield encodeRequest({ ...common, command: CMD.READ, cookie: 9n, length: 1024n });
  yield encodeRequest({ ...common, command: CMD.DISC, cookie: 10n, length: 0n });
}

async function vates(_uri: string, port: number): Promise<void> {
  const client = new VatesClient({ address: '127.0.0.1', port, exportname: 'disk' });
  await client.connect();
  await Promise.all([client.readBlock(0, 4096), client.readBlock(3, 4096), client.readBlock(0, 16_384)]);
  await client.disconnect();
}

const libnbd = (body: string) => (uri: string) =>
  program(PYTHON, '-c', `import nbd\nh = nbd.NBD()\n${body.replaceAll('URI', JSON.stringify(uri))}\n`);

async function recordClients(): Promise<void> {
  await recordClient('blockferry', 'our client, every command', ourClient);
  await recordClient('blockferry-list', 'our client lists', (uri) => NbdClient.list(uri));
  await recordClient('by-hand-everything', 'every option, command and flag', (_uri, _port, path) =>
    byHand(path, everything),
  );
  await recordClient('by-hand-old', 'EXPORT_NAME, simple replies', (_uri, _port, path) =>
    byHand(path, oldWays),
  );
  await recordClient('nbdinfo', 'nbdinfo --map', (uri) => program('nbdinfo', '--map', uri));
  await recordClient('nbdinfo-list', 'nbdinfo --list', (uri) => program('nbdinfo', '--list', uri));
  const small = ['--connections=1', '--request-size=16384'];
  const image = join(folder, 'copy.img');
  await recordClient('nbdcopy-from', 'nbdcopy reads', (uri) => program('nbdcopy', ...small, uri, image));
  await recordClient('nbdcopy-to', 'nbdcopy writes', (uri) => program('nbdcopy', ...small, image, uri));
  const commands = [
    'read 4k 8k',
    'write -P 5 8k 4k',
    'write -z 16k 8k',
    'write -z -u 32k 4k',
    'discard 40k 8k',
    'flush',
  ];
  await recordClient('qemu-io', 'qemu-io', (uri) =>
    program('qemu-io', '-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri),
  );
  await recordClient('qemu-img-map', 'qemu-img map', (uri) => program('qemu-img', 'map', '-f', 'raw', uri));
  const job = ['--name=fio', '--ioengine=nbd', '--rw=randrw', '--bs=4k', '--size=32k', '--iodepth=4'];
  const fill = ['--buffer_pattern=0x5a', '--output-format=terse', '--norandommap'];
  await recordClient('fio', 'fio, mixed', (uri) => program('fio', ...job, ...fill, `--uri=${uri}`));
  await recordClient('nbd-client-list', 'nbd-client -l', (_uri, port) =>
    program('nbd-client', '-l', '127.0.0.1', String(port)),
  );
  await recordClient('vates', '@vates/nbd-client', vates);
  await recordClient(
    'libnbd-options',
    'libnbd, options one by one, then ABORT',
    libnbd(
      'h.set_opt_mode(True)\nh.connect_uri(URI)\nh.opt_list(lambda *a: 0)\nh.opt_info()\n' +
        'h.add_meta_context("base:allocation")\nh.opt_list_meta_context(lambda *a: 0)\nh.opt_abort()',
    ),
  );
  await recordClient(
    'libnbd-plain',
    'libnbd without structured replies and NO_ZEROES',
    libnbd(
      'h.set_handshake_flags(0)\nh.set_request_structured_replies(False)\nh.connect_uri(URI)\n' +
        'h.pread(8192, 4096)\nh.pwrite(b"x" * 4096, 0)\nh.flush()\nh.shutdown()',
    ),
  );
}

/** Records our client with somebody's server. */
async function recordServer(name: string, about: string, start: () => Promise<PeerServer>): Promise<void> {
  await recordOnce(name, about, start, false);
  await recordOnce(`${name}-extended`, `${about}, asked for extended headers`, start, true);
}

async function recordOnce(
  name: string,
  about: string,
  start: () => Promise<PeerServer>,
  extendedHeaders: boolean,
): Promise<void> {
  let peer: PeerServer;
  try {
    peer = await start();
  } catch (error) {
    console.log(`${name}: kept as it was (${(error as Error).message.split('\n')[0]})`);
    return;
  }
  const tape = new Tape();
  const through = join(folder, 'relay.sock');
  const relay = await startRelay(through, peer.socket, tape.pass);
  try {
    const options = { contexts: CONTEXTS, extendedHeaders };
    const client = await NbdClient.connect(`nbd+unix:///disk?socket=${through}`, options);
    await runScript(client);
    await client.close();
    if (extendedHeaders && !asksExtended(seedOf(name, tape.sessions[0]!))) return; // it does not know how
    tape.save('client', name, about);
  } finally {
    await relay.stop();
    await peer.stop();
  }
}

async function recordServers(): Promise<void> {
  const image = async (directory: string): Promise<string> => {
    const path = join(directory, 'disk.img');
    writeFileSync(path, disk());
    return path;
  };
  const nbdkit = (...words: string[]) =>
    startPeer(async (directory, socket) => ['nbdkit', '-f', '-U', socket, ...words, await image(directory)]);
  await recordServer('nbdkit', 'nbdkit file', () => nbdkit('file'));
  await recordServer('nbdkit-plain', 'nbdkit file without structured replies', () =>
    nbdkit('--no-sr', 'file'),
  );
  await recordServer('qemu-nbd', 'qemu-nbd', () =>
    startPeer(async (directory, socket) => {
      return ['qemu-nbd', '-t', '-x', 'disk', '-f', 'raw', '-k', socket, await image(directory)];
    }),
  );
  await recordServer('nbd-server', 'nbd-server', () => startNbdServer(image, ['disk']));
  await recordServer('blockferry', 'our server', async () => {
    const device = new MemoryDevice(DISK_BYTES);
    disk().copy(device.data);
    const directory = mkdtempSync(join(folder, 'ours-'));
    const { path, listener } = await serveSocket(directory, 'nbd', device, new Faults());
    const uri = `nbd+unix:///disk?socket=${path}`;
    return { uri, directory, socket: path, uriOf: () => uri, stop: () => listener.close() };
  });
}

try {
  await recordClients();
  await recordServers();
} finally {
  rmSync(folder, { recursive: true, force: true });
}
