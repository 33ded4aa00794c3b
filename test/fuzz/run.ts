/**
 * `bin/fuzz [--seconds N] [FILE...]`: the properties of this folder for that long (default: ten minutes), with the native addon under
 * sanitizers. Ends with 1 when something was found; BLOCKFERRY_SEED repeats it.
 */
import { spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { buildSanitized, ROOT, sanitizedEnv } from './sanitizers.js';

const FILES = ['server', 'volume', 'client', 'relocation'];

const { values, positionals } = parseArgs({
  options: { seconds: { type: 'string', default: '600' } },
  allowPositionals: true,
});
const seconds = Number(values.seconds);
if (!(seconds > 0)) {
  console.error('usage: bin/fuzz [--seconds N] [server|volume|client|relocation]...');
  process.exit(2);
}
await buildSanitized();
const files = positionals.length > 0 ? positionals : FILES;
const paths = files.map((file) => join(ROOT, `dist/test/fuzz/${file}.test.js`));
const { status } = spawnSync(
  process.execPath,
  ['--enable-source-maps', '--test', '--test-concurrency=1', '--test-reporter=spec', ...paths],
  { stdio: 'inherit', env: { ...sanitizedEnv(), BLOCKFERRY_FUZZ_SECONDS: String(seconds) } },
);
process.exit(status ?? 1);
