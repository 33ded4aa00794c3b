/**
 * Servers that send anything, in front of our client: every call is settled in time, and what it gives as good was sent so.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync } from 'node:fs';
import net from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, test } from 'node:test';
import fc from 'fast-check';
import { BlockferryError } from '../../src/errors.js';
import { NbdClient } from '../../src/nbd/client/client.js';
import { type Manner, MemoryDevice } from '../fakes/memory-device.js';
import { inTime } from './attack.js';
import { campaign } from './campaign.js';
import { checkInfo, checkScript, readAgain } from './client-model.js';
import { type Harm, harm, harmful, playRecording, type Record } from './hostile.js';
import { type Relay, startRelay } from './relay.js';
import { type Done, runScript } from './script.js';
import { asksExtended, loadSeeds } from './seeds.js';
import { Faults, serveSocket } from './target.js';
import { DISK_BYTES } from './wire.js';

const seeds = loadSeeds('client');
const foreign = seeds.flatMap(({ server }) => server);
const folder = mkdtempSync(join(tmpdir(), 'blockferry-fuzz-'));
const harms = fc.array(harm, { maxLength: 4 });
const faults = new Faults();
/** Of a client whose server may fall silent. */
const IMPATIENT = { handshakeTimeoutMs: 40, requestTimeoutMs: 40 };

const device = new MemoryDevice(DISK_BYTES);
device.contexts = ['base:allocation'];
let passing: () => ReturnType<typeof harmful>;
let play: (socket: net.Socket) => void;
let relay: Relay;
let player: net.Server;
let stop: () => Promise<void>;

before(async () => {
  const { path, listener } = await serveSocket(folder, 'honest', device, faults);
  relay = await startRelay(join(folder, 'relay.sock'), path, () => passing());
  player = net.createServer({ allowHalfOpen: true }, (socket) => play(socket));
  await new Promise<void>((resolve) => player.listen(join(folder, 'player.sock'), resolve));
  stop = async () => {
    await relay.stop();
    await listener.close();
    await new Promise((resolve) => player.close(resolve));
  };
});
after(async () => {
  await stop();
  rmSync(folder, { recursive: true, force: true });
});

/** What our client makes of the server at that socket; null: it did not connect. */
async function converse(
  socket: string,
  record: Record,
  harmless: boolean,
  extendedHeaders: boolean,
): Promise<Done[] | null> {
  const uri = `nbd+unix:///disk?socket=${join(folder, socket)}`;
  const options = { contexts: ['base:allocation'], extendedHeaders, ...(harmless ? {} : IMPATIENT) };
  let client: NbdClient;
  try {
    client = await inTime('connecting', NbdClient.connect(uri, options));
  } catch (error) {
    assert.ok(error instanceof BlockferryError, String(error));
    assert.ok(!harmless, error.message);
    return null;
  }
  try {
    const done = await inTime('the script', runScript(client));
    await inTime('the end', client.close());
    const reason = await inTime('closed', client.closed);
    assert.ok(reason === null || reason instanceof BlockferryError);
    const conversation = readAgain(record);
    checkInfo(conversation, client.info);
    checkScript(conversation, done);
    return done;
  } finally {
    client.destroy();
  }
}

/** Nothing failed but what the server does not offer. */
function assertAllWell(done: readonly Done[]): void {
  for (const { step, asked, error } of done) assert.ok(error === null || !asked, `${step.what}: ${error}`);
}

const manners = fc.constantFrom<Manner[]>(['now'], ['turn'], ['now', 'turn', 'sync']);

async function live(plan: readonly Harm[], delays: readonly Manner[], extended: boolean): Promise<void> {
  const record: Record = { client: [], server: [] };
  let turn = 0;
  device.manner = () => delays[turn++ % delays.length]!;
  passing = () => harmful(plan, foreign, record);
  const done = await converse('relay.sock', record, plan.length === 0, extended);
  if (plan.length === 0) assertAllWell(done!);
  assert.deepEqual(faults.told, []);
}

campaign(
  'a real server, damaged',
  { runs: 250, share: 0.15 },
  fc.tuple(harms, manners, fc.boolean()),
  ([plan, delays, extended]) => live(plan, delays, extended),
);

async function recorded(seed: number, plan: readonly Harm[]): Promise<void> {
  const recording = seeds[seed % seeds.length]!;
  const { pieces, server } = recording;
  const record: Record = { client: [], server: [] };
  const harmless = plan.length === 0;
  play = (socket) => playRecording(socket, pieces, server, plan, foreign, record);
  const done = await converse('player.sock', record, harmless, asksExtended(recording));
  if (harmless) assertAllWell(done!);
}

campaign(
  'recorded servers, damaged',
  { runs: 400, share: 0.15 },
  fc.tuple(fc.nat(1000), harms),
  ([seed, plan]) => recorded(seed, plan),
);

test('the recordings as they are', async () => {
  for (let seed = 0; seed < seeds.length; seed++) await recorded(seed, []);
});
