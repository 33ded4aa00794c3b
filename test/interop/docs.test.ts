// docs/operations.md is true: its examples are executed, its configuration is read.
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { parseConfig } from '../../src/host/config.js';
import { BLOCKFERRY } from '../lab/hosts.js';
import { attempt, needs } from './tools.js';

const PAGE = fileURLToPath(new URL('../../../docs/operations.md', import.meta.url));

const TOOLS = [
  ...['bash', 'setpriv', 'nbdinfo', 'qemu-io', 'dd', 'truncate', 'cmp'],
  ...['nbd-trdump', 'nbd-trplay'],
];

/** Contents of the fenced blocks whose fence says `language`. */
function blocks(language: string): string[] {
  const fences = readFileSync(PAGE, 'utf8').matchAll(/^```([^\n]*)\n([\s\S]*?)^```$/gm);
  return [...fences].filter((fence) => fence[1] === language).map((fence) => fence[2]);
}

describe('docs/operations.md', () => {
  test('the examples', needs(...TOOLS), async () => {
    const examples = blocks('sh run');
    assert.ok(examples.length >= 4, 'the page has examples');
    const folder = mkdtempSync(join(tmpdir(), 'blockferry-docs-'));
    try {
      const shown = examples.map((block, index) => `: example ${index + 1}\n${block}`).join('\n');
      // The daemons are the shell's children: they end with it, and what it says shows where it stopped.
      const script = `set -euo pipefail\ntrap 'kill $(jobs -p) $(pgrep -P $$) 2> /dev/null; wait' EXIT\nset -x\n${shown}`;
      const PATH = `${dirname(BLOCKFERRY)}:${process.env.PATH}`;
      const ran = await attempt(['bash', '-c', script], { cwd: folder, env: { ...process.env, PATH } });
      assert.equal(ran.code, 0, `${ran.stderr.slice(-3000)}\n${ran.stdout.slice(-1000)}`);
      assert.match(ran.stdout, /^67108864$/m, 'nbdinfo --size');
      assert.match(ran.stdout, /^ {2}copy +relocating /m, 'status');
      assert.match(ran.stdout, /^ +14680064 +1048576 +1 +local$/m, 'nbdinfo --map');
      assert.match(ran.stdout, /^copy: plain 100\.0 % of 64 MiB local$/m, 'watch');
      assert.match(ran.stdout, /^identical: 67108864 bytes$/m, 'verify');
      assert.match(ran.stdout, /^> H=0000000100000001 /m, 'nbd-trdump');
      assert.match(ran.stdout, /^End of transaction log/m, 'nbd-trplay');
      assert.match(ran.stdout, /^ {2}lost +unavailable .*there is no image/m, 'status of a host');
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test('the configuration of a host', () => {
    const [text, ...others] = blocks('yaml');
    assert.deepEqual(others, []);
    const config = parseConfig(text, '/etc/blockferry');
    assert.equal(config.name, 'host-a');
    assert.equal(config.vms[0].autostart, true);
    // Every key there is, so that the page is complete; TLS has a page of its own.
    const keys = Object.keys(config).map((key) => (key === 'stopTimeoutMs' ? 'stopTimeoutSeconds' : key));
    for (const key of keys.filter((name) => !/tls/i.test(name)))
      assert.match(text, new RegExp(`^${key}:`, 'm'), key);
  });

  test('every message it explains is one of ours', () => {
    const root = join(dirname(PAGE), '..', 'src');
    const source = readdirSync(root, { recursive: true, encoding: 'utf8' })
      .filter((name) => name.endsWith('.ts'))
      .map((name) => readFileSync(join(root, name), 'utf8'))
      .join('\n')
      .replaceAll(/['`] \+\s*['`]/g, ''); // strings that are cut for the width of a line
    const table = /## What errors mean\n([\s\S]*?)\n## /.exec(readFileSync(PAGE, 'utf8'))![1];
    const lines = [...table.matchAll(/^\| (`.*?) \|/gm)].flatMap((row) => [...row[1].matchAll(/`([^`]+)`/g)]);
    assert.ok(lines.length > 10);
    for (const [, line] of lines) {
      // The longest part of it that does not vary.
      const parts = line.split(/\.\.\.\S*|\b[A-Z]\b/).map((part) => part.trim());
      const fixed = parts.reduce((a, b) => (b.length > a.length ? b : a));
      assert.ok(source.includes(fixed), `nothing says "${fixed}"`);
    }
  });
});
