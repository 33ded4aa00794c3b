/** Relocations over compressed links: who is asked, what crosses the wire, and connections that are lost in the middle. */
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { compressionPool } from '../../../src/nbd/compression/pool.js';
import { assertBlocks, Lab, MIB, until } from '../../lab/ferry.js';

const SIZE = 8 * MIB;
const TEXT = Buffer.alloc(SIZE, 'what a disk holds is often like what it held before; ');

async function readAll(link: ReturnType<Lab['link']>): Promise<Buffer> {
  const buffer = Buffer.alloc(SIZE);
  await Promise.all(
    Array.from({ length: SIZE / MIB }, (_, i) => link.read('bulk', i * MIB, MIB, buffer, i * MIB)),
  );
  return buffer;
}

test('a level: the content is right, and what compresses costs less of the wire', async (t) => {
  t.after(() => compressionPool().end());
  const lab = new Lab(t);
  const source = await lab.source(SIZE, { data: TEXT });
  const link = lab.link(source, { compression: 3 });
  assertBlocks(await readAll(link), TEXT);
  assert.ok(link.wireBytes < SIZE / 4, `${link.wireBytes} bytes`);
});

test('what does not compress costs about what it is', async (t) => {
  t.after(() => compressionPool().end());
  const lab = new Lab(t);
  const data = randomBytes(SIZE);
  const source = await lab.source(SIZE, { data });
  const link = lab.link(source, { compression: 1 });
  assertBlocks(await readAll(link), data);
  assert.ok(link.wireBytes > SIZE && link.wireBytes < SIZE * 1.01, `${link.wireBytes} bytes`);
});

test('auto asks nobody over a unix socket, and off asks nobody', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(SIZE, { data: TEXT });
  for (const compression of ['auto', 'off'] as const) {
    const link = lab.link(source, { compression });
    assertBlocks(await readAll(link), TEXT);
    assert.ok(link.wireBytes > SIZE, `${link.wireBytes} bytes`);
  }
});

test('what was pending when connections were lost is sent again, and the counts go on', async (t) => {
  t.after(() => compressionPool().end());
  const lab = new Lab(t);
  const source = await lab.source(SIZE, { data: TEXT });
  const link = lab.link(source, { compression: 3 });
  await until(() => link.lanesApart, 'lanes apart');
  for (let round = 0; round < 3; round++) {
    const { accepted } = source;
    const before = link.wireBytes;
    source.hold();
    const read = readAll(link);
    await until(() => source.held >= 8, 'all are at the source');
    source.cut();
    source.device.completeHeld();
    await until(() => source.accepted > accepted, 'connected again');
    source.release();
    assertBlocks(await read, TEXT);
    assert.ok(link.wireBytes > before);
  }
});

test('a whole disk moves over a compressed link', async (t) => {
  t.after(() => compressionPool().end());
  const lab = new Lab(t);
  const source = await lab.source(SIZE, { data: TEXT });
  const ferry = await lab.proxy(source, { sourceCompression: 3, background: true });
  await ferry.service.handedOff();
  const { traffic, phase } = ferry.service.status();
  assert.equal(phase, 'plain');
  assert.equal(traffic.fromSourceBytes, SIZE);
  assertBlocks(readFileSync(ferry.image), TEXT);
});
