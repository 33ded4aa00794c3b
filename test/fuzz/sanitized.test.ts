/** The addon's own tests, and clients that send anything to volumes, with the addon under sanitizers: nothing is found. */
import assert from 'node:assert/strict';
import { join } from 'node:path';
import { before, test } from 'node:test';
import { attempt } from '../interop/tools.js';
import { buildSanitized, ROOT, SANITIZED_ADDON, sanitizedEnv } from './sanitizers.js';

/** Part of the runs that the same tests make without. */
const SHARE = '0.25';

before(buildSanitized);

async function passes(file: string): Promise<void> {
  const path = join(ROOT, 'dist/test', file);
  const env = { ...sanitizedEnv(), BLOCKFERRY_FUZZ_SHARE: SHARE };
  const { code, stdout, stderr } = await attempt([process.execPath, '--enable-source-maps', path], { env });
  assert.equal(code, 0, `${stderr}\n${stdout}`);
}

test('a process that is told to loads the sanitized addon', async () => {
  const script = `import(${JSON.stringify(join(ROOT, 'dist/src/native/index.js'))}).then(() =>
    process.stdout.write(require('node:fs').readFileSync('/proc/self/maps', 'utf8')))`;
  const { stdout, stderr } = await attempt([process.execPath, '-e', script], { env: sanitizedEnv() });
  assert.ok(stdout.includes(SANITIZED_ADDON) && stdout.includes('libasan'), stderr);
});

for (const file of ['unit/native.test.js', 'unit/native-mapping.test.js', 'fuzz/volume.test.js'])
  test(file, () => passes(file));
