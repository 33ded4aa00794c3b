// The conformance suite against a real `blockferry serve`: nothing may fail, and only what is named here may be not offered.
import assert from 'node:assert/strict';
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, before, type TestContext, test } from 'node:test';
import { DaemonProcess } from '../../lab/hosts.js';
import { ALL_INSTALLED } from '../../lab/programs.js';
import { makePki, type Pki } from '../../support/pki.js';
import type { Case } from './case.js';
import { tlsCases } from './cases/tls.js';
import { CASES, runCase } from './suite.js';
import { probe, type Target } from './target.js';

const SIZE = 80 << 20;
/** What blockferry does not offer, or not to this client; the cases' reasons. */
const NOT_OFFERED: readonly string[] = [
  'a server that demands TLS',
  'a server without NO_ZEROES',
  'a server without CACHE',
  'a server without TRIM',
  'a minimum block above 1',
  ...(ALL_INSTALLED ? [] : ["libnbd's Python module", '/usr/bin/python3']),
];

let folder: string;
const daemons: DaemonProcess[] = [];
let pki: Pki;
let target: Target;
/** The same, but TLS is allowed where the other demands it. */
let allowing: Target;

async function serve(name: string, ...options: string[]): Promise<string> {
  const image = join(folder, `${name}.img`);
  writeFileSync(image, '');
  truncateSync(image, SIZE);
  const listen = `unix:${join(folder, `${name}.sock`)}`;
  const words = ['serve', image, '--name', name, '--listen', listen, '--state-dir', join(folder, name)];
  const daemon = await DaemonProcess.start([...words, ...options]);
  daemons.push(daemon);
  return daemon.uris[0]!;
}

before(async () => {
  folder = mkdtempSync(join(tmpdir(), 'blockferry-conformance-'));
  pki = makePki();
  const tls = (mode: string) => serve(mode, '--tls', mode, '--tls-certificates', pki.good);
  const uris = { uri: await serve('disk'), readOnlyUri: await serve('still', '--read-only') };
  target = await probe({ ...uris, tlsUri: await tls('required') });
  allowing = { ...target, tls: (await probe({ ...uris, tlsUri: await tls('allowed') })).tls };
});

after(async () => {
  const codes = await Promise.all(daemons.map((daemon) => daemon.stop()));
  rmSync(folder, { recursive: true });
  pki.remove();
  assert.deepEqual(
    codes,
    daemons.map(() => 0),
    'the daemons end in order',
  );
});

test('there are at least 150 cases, each with a name of its own', () => {
  assert.ok(CASES.length >= 150);
  assert.equal(new Set(CASES.map(({ name }) => name)).size, CASES.length);
});

async function check(t: TestContext, one: Case, to: Target): Promise<void> {
  const { outcome, detail } = await runCase(one, to);
  assert.notEqual(outcome, 'fail', detail);
  if (outcome === 'not offered') {
    assert.ok(NOT_OFFERED.includes(detail), `not offered: ${detail}`);
    t.skip(`not offered: ${detail}`);
  }
}

for (const one of CASES) test(`${one.clause} ${one.level} ${one.name}`, (t) => check(t, one, target));

for (const one of tlsCases)
  test(`${one.clause} ${one.level} ${one.name} (TLS allowed)`, (t) => check(t, one, allowing));
