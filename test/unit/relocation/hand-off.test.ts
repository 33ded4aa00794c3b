/** The hand-off, when it does not succeed at once. */
import assert from 'node:assert/strict';
import { mkdirSync, rmdirSync } from 'node:fs';
import { join } from 'node:path';
import { test } from 'node:test';
import { Lab, MIB, until } from '../../lab/ferry.js';

test('a hand-off that finds no room for its state is tried again until it does', async (t) => {
  const lab = new Lab(t);
  const source = await lab.source(MIB);
  source.hold();
  const proxy = await lab.proxy(source, { background: true });
  const draft = join(lab.dir, 'state', proxy.name, 'volume.json.next');
  mkdirSync(draft); // volume.json cannot be replaced
  source.release();
  await until(() => proxy.status.presentBytes === MIB && proxy.status.error !== null, 'the hand-off fails');
  assert.equal(proxy.status.phase, 'relocating');
  rmdirSync(draft);
  await proxy.service.handedOff();
  assert.equal(proxy.status.phase, 'plain');
  assert.equal(proxy.status.error, null);
});
