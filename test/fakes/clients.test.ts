/**
 * Every bad client of the list against a server whose volume has lost its source, while a good guest works. Whatever they do: the guest
 * is answered in time and rightly, nothing is written that should not be, connections and memory are given back, and the server lives.
 *
 * The servers run in processes of their own, several fakes one after the other in each.
 */
import assert from 'node:assert/strict';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { NbdClient } from '../../src/nbd/client/client.js';
import { ChildDaemon } from '../lab/crash/daemon.js';
import { assertBlocks, BLOCK, MIB, pattern, readAt, writeAt } from '../lab/ferry.js';
import { makePki, type Pki } from '../support/pki.js';
import { BAD_CLIENTS, type BadClient, GOOD, KEPT, LOST, SIZE } from './bad-clients.js';
import { type BadSource, FakeSource } from './fake-source.js';
import { Place } from './place.js';

const LANES = 4;
const DATA = pattern(SIZE);
const WRITTEN = Array.from({ length: 5 }, (_, version) => pattern(GOOD.length, 2 + version));
const HANDSHAKE_TIMEOUT_MS = 1500;
/** A server process; IN_FLIGHT_BYTES_TOTAL_MAX and Node. */
const RESIDENT_BYTES_MAX = 800 * MIB;
/** How long the guest may wait for an answer, and what a bad client bound may stay bound when it is gone. */
const PATIENCE_MS = 5_000;

const GONE: BadSource = { name: 'is gone', outcome: 'lost', instead: async () => async () => {} };

class Lane {
  readonly child = new ChildDaemon();
  readonly #folder = mkdtempSync(join(tmpdir(), 'fakes-'));
  #source!: FakeSource;
  #guest!: NbdClient;
  #place!: Place;
  #working: Promise<void> = Promise.resolve();
  #over = false;
  /** With the guest only. */
  #sockets = 0;
  rounds = 0;
  longestMs = 0;

  async open(pki: Pki): Promise<void> {
    const { child } = this;
    this.#source = await FakeSource.start(DATA, pki);
    const path = join(this.#folder, 'guest');
    const mode = {
      kind: 'proxy' as const,
      sourceUri: this.#source.uri,
      standby: false,
      background: false,
      rateBytesPerSecond: null,
      sourceTimeoutMs: null,
    };
    const image = join(this.#folder, 'disk.img');
    const timing = { backoffMsMin: 20, backoffMsMax: 100 };
    await child.open({ stateDir: join(this.#folder, 'state'), name: 'disk', image, mode, timing }, path, {
      tcp: true,
      listener: {
        handshakeTimeoutMs: HANDSHAKE_TIMEOUT_MS,
        connectionsMax: 250,
        tls: { mode: 'allowed', certificates: pki.good, verifyPeer: true },
      },
    });
    const uris = await child.command<string[]>({ do: 'uris' });
    const port = Number(/nbd:\/\/127\.0\.0\.1(?::(\d+))?/.exec(uris.join(' '))?.[1] ?? 10809);
    this.#place = new Place(path, port, pki, HANDSHAKE_TIMEOUT_MS);
    this.#guest = await NbdClient.connect(`nbd+unix:///?socket=${path}`);
    assertBlocks(await readAt(this.#guest, 0, LOST.offset), DATA.subarray(0, LOST.offset));
    await this.#source.turn(GONE);
    await this.#until('the loss', async () => (await child.status()).source?.state === 'lost');
    this.#sockets = child.sockets();
    this.#working = this.#work();
  }

  /** The good guest. */
  async #work(): Promise<void> {
    for (let round = 0; !this.#over; round++) {
      const bytes = WRITTEN[round % WRITTEN.length]!;
      const at = (round % 32) * 8 * BLOCK + 100;
      const began = performance.now();
      await writeAt(this.#guest, GOOD.offset + at, bytes.subarray(at, at + 2 * BLOCK));
      assertBlocks(
        await readAt(this.#guest, GOOD.offset + at, 2 * BLOCK),
        bytes.subarray(at, at + 2 * BLOCK),
        'the guest',
      );
      this.longestMs = Math.max(this.longestMs, performance.now() - began);
      this.rounds++;
      await delay(5);
    }
  }

  async #until(what: string, holds: () => Promise<boolean>): Promise<void> {
    const deadline = performance.now() + PATIENCE_MS;
    while (!(await holds())) {
      if (performance.now() > deadline) assert.fail(`not within ${PATIENCE_MS} ms: ${what}`);
      await delay(10);
    }
  }

  async play(client: BadClient): Promise<void> {
    const { child } = this;
    child.forgetPeak();
    this.longestMs = 0;
    try {
      await client.play(this.#place);
    } finally {
      this.#place.close();
    }
    let load = await child.load();
    await this.#until('connections, requests and memory to be given back', async () => {
      load = await child.load();
      return load.connections === 1 && load.requests <= 1 && load.bytes < MIB;
    }).catch((error: Error) => assert.fail(`${error.message}: ${JSON.stringify(load)}`));
    await this.#until('sockets to be closed', async () => child.sockets() <= this.#sockets + 1);
    const { rounds } = this;
    await this.#until('the guest to go on', async () => this.rounds > rounds + 1);
    assert.ok(this.longestMs < PATIENCE_MS, `the guest waited ${this.longestMs} ms`);
    assert.ok(child.peakBytes() < RESIDENT_BYTES_MAX, `${child.peakBytes() >> 20} MiB were resident`);
    assert.equal(child.stderr, '');
  }

  async close(): Promise<void> {
    this.#over = true;
    await this.#working;
    const { offset, length } = KEPT;
    const kept = await readAt(this.#guest, offset, length);
    assertBlocks(kept, DATA.subarray(offset, offset + length), 'what nobody may change');
    // The source is back: what nobody waits for any more is not fetched, and nothing was spoilt.
    await this.#source.reform();
    const last = await readAt(this.#guest, LOST.offset, LOST.length);
    assertBlocks(last, DATA.subarray(LOST.offset), 'what came late');
    await this.#guest.close();
    await this.child.stop();
    const image = readFileSync(join(this.#folder, 'disk.img'));
    assertBlocks(
      image.subarray(offset, offset + length),
      DATA.subarray(offset, offset + length),
      'the image',
    );
    await this.#source.stop();
  }

  async remove(): Promise<void> {
    this.#over = true;
    await this.child.kill();
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

let pki: Pki;
const lanes: Lane[] = [];
const free: Lane[] = [];
before(async () => {
  pki = makePki();
  for (let i = 0; i < LANES; i++) lanes.push(new Lane());
  await Promise.all(lanes.map((lane) => lane.open(pki)));
  free.push(...lanes);
});
after(async () => {
  try {
    await Promise.all(lanes.map((lane) => lane.close()));
  } finally {
    for (const lane of lanes) await lane.remove();
    pki.remove();
  }
});

describe('a client that', { concurrency: LANES }, () => {
  for (const client of BAD_CLIENTS) {
    test(client.name, async () => {
      const lane = free.pop()!;
      try {
        await lane.play(client);
      } finally {
        free.push(lane);
      }
    });
  }
});
