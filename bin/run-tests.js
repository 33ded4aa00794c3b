#!/usr/bin/env node
// Runs the compiled tests: `node bin/run-tests.js [SUITE|FILE]...`, SUITE being a folder of test/ (default: all of them).
// One process a test file, one file at a time: suites start servers and machines, and share two cores.
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = resolve(fileURLToPath(import.meta.url), '../..');
const suites = ['unit', 'property', 'fakes', 'fuzz', 'interop', 'crash', 'e2e'];

function testsIn(path) {
  if (statSync(path).isFile()) return path.endsWith('.test.js') ? [path] : [];
  return readdirSync(path)
    .sort()
    .flatMap((entry) => testsIn(join(path, entry)));
}

const words = process.argv.slice(2);

function testsOf(word) {
  const compiled = resolve(root, 'dist/test', word.replace(/^(dist\/)?test\//, '').replace(/\.ts$/, '.js'));
  if (existsSync(compiled)) return testsIn(compiled);
  if (words.length === 0) return [];
  console.error(`no such suite or test: ${word}`);
  return process.exit(2);
}

const files = (words.length > 0 ? words : suites).flatMap(testsOf);
if (files.length === 0) {
  console.error('no test found: run `npm run build` first');
  process.exit(1);
}
const { status } = spawnSync(
  process.execPath,
  [
    '--enable-source-maps',
    '--test',
    '--test-concurrency=1',
    '--test-reporter=spec',
    ...files.map((file) => relative(root, file)),
  ],
  // nbd-client and mount live where only root's PATH leads.
  { cwd: root, stdio: 'inherit', env: { ...process.env, PATH: `${process.env.PATH}:/usr/sbin:/sbin` } },
);
process.exit(status ?? 1);
