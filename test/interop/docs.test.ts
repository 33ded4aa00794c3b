// What docs/ say is true: examples are executed, configurations are read, numbers are those of the source.
import assert from 'node:assert/strict';
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { linkPolicyOf, parseConfig } from '../../src/host/config.js';
import * as constants from '../../src/nbd/constants.js';
import { ACCESS_RULES_MAX, parseAccessRule } from '../../src/nbd/server/access.js';
import { FLUSH_TIMEOUT_MS, LINGER_TIMEOUT_MS } from '../../src/nbd/server/session.js';
import { TLS_FILE_BYTES_MAX } from '../../src/nbd/tls.js';
import { BLOCKFERRY } from '../lab/hosts.js';
import { attempt, needs } from './tools.js';

const DOCS = fileURLToPath(new URL('../../../docs', import.meta.url));
const PAGE = join(DOCS, 'operations.md');

const TOOLS = [
  ...['bash', 'setpriv', 'nbdinfo', 'qemu-io', 'dd', 'truncate', 'cmp'],
  ...['nbd-trdump', 'nbd-trplay'],
];

/** Contents of the fenced blocks whose fence says `language`. */
function blocks(language: string, page = PAGE): string[] {
  const fences = readFileSync(page, 'utf8').matchAll(/^```([^\n]*)\n([\s\S]*?)^```$/gm);
  return [...fences].filter((fence) => fence[1] === language).map((fence) => fence[2]);
}

/** Runs a page's examples one after the other, in one empty folder; what they wrote to stdout. */
async function runExamples(page: string): Promise<string> {
  const examples = blocks('sh run', page);
  assert.ok(examples.length >= 2, 'the page has examples');
  const folder = mkdtempSync(join(tmpdir(), 'blockferry-docs-'));
  try {
    const shown = examples.map((block, index) => `: example ${index + 1}\n${block}`).join('\n');
    // The daemons are the shell's children: they end with it, and what it says shows where it stopped.
    const script = `set -euo pipefail\ntrap 'kill $(jobs -p) $(pgrep -P $$) 2> /dev/null; wait' EXIT\nset -x\n${shown}`;
    const PATH = `${dirname(BLOCKFERRY)}:${process.env.PATH}`;
    const ran = await attempt(['bash', '-c', script], { cwd: folder, env: { ...process.env, PATH } });
    assert.equal(ran.code, 0, `${ran.stderr.slice(-3000)}\n${ran.stdout.slice(-1000)}`);
    return ran.stdout;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

describe('docs/operations.md', () => {
  test('the examples', needs(...TOOLS), async () => {
    const stdout = await runExamples(PAGE);
    assert.match(stdout, /^67108864$/m, 'nbdinfo --size');
    assert.match(stdout, /^ {2}copy +relocating /m, 'status');
    assert.match(stdout, /^ +14680064 +1048576 +1 +local$/m, 'nbdinfo --map');
    assert.match(stdout, /^copy: plain 100\.0 % of 64 MiB local$/m, 'watch');
    assert.match(stdout, /^identical: 67108864 bytes$/m, 'verify');
    assert.match(stdout, /^> H=0000000100000001 /m, 'nbd-trdump');
    assert.match(stdout, /^End of transaction log/m, 'nbd-trplay');
    assert.match(stdout, /^ {2}lost +unavailable .*there is no image/m, 'status of a host');
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

describe('docs/access.md', () => {
  const page = join(DOCS, 'access.md');

  test('the examples', needs('bash', 'setpriv', 'nbdinfo', 'qemu-io', 'truncate', 'openssl'), async () => {
    assert.match(await runExamples(page), /^read 65536\/65536 bytes/m);
  });

  test('the configuration of a host', () => {
    const [text] = blocks('yaml', page);
    const config = parseConfig(text!, '/etc/blockferry');
    assert.deepEqual([config.access?.length, config.listExports], [2, false]);
    assert.deepEqual(linkPolicyOf(config, 'private').access, []);
    assert.equal(linkPolicyOf(config, 'disk').access?.length, 1);
  });

  test('the rules it explains are rules', () => {
    const words = [...readFileSync(page, 'utf8').matchAll(/`((?:none|read|write):[^`]+)`/g)].map(
      ([, rule]) => rule!,
    );
    assert.ok(words.length >= 4);
    for (const word of words) parseAccessRule(word);
  });
});

describe('docs/protocol.md', () => {
  test('the limits are those of the source, and all of them', () => {
    const section = /\n## Limits\n([\s\S]*?)\n## /.exec(readFileSync(join(DOCS, 'protocol.md'), 'utf8'))![1]!;
    const rows = [...section.matchAll(/^\| [^|]+ \| (\d+)( s| ms| bytes)? \| `([A-Z_]+)` \|/gm)];
    const said = new Map(
      rows.map(([, number, unit, name]) => [name, Number(number) * (unit === ' s' ? 1000 : 1)]),
    );
    const limits = {
      ...constants,
      ACCESS_RULES_MAX,
      FLUSH_TIMEOUT_MS,
      LINGER_TIMEOUT_MS,
      TLS_FILE_BYTES_MAX,
    };
    for (const [name, value] of said) assert.equal(limits[name as keyof typeof limits], value, name);
    const known = Object.keys(limits).filter((name) => /_MAX$|_TIMEOUT_MS$|_IDLE_MS$|_NAME$/.test(name));
    assert.deepEqual(
      known.filter((name) => !said.has(name)),
      [],
    );
  });
});
