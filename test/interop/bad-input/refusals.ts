/** What every refusal of ours has in common: an exit code, one line that says what to do, and nothing that changed. */

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { lstatSync, mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Finished, runBlockferry } from '../../lab/hosts.js';

const LINE_BYTES_MAX = 1000;

/** Calls `scenario` with a folder of its own. */
export async function inFolder(scenario: (folder: string) => Promise<void>): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), 'blockferry-bad-'));
  try {
    await scenario(folder);
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** `blockferry WORDS...` must fail with that code and one line on stderr like that. Gives the line. */
export async function refused(words: readonly string[], code: 1 | 2, line: RegExp): Promise<string> {
  const finished = await runBlockferry(words);
  assertRefusal(finished, code, line, words.join(' '));
  return finished.stderr;
}

export function assertRefusal(finished: Finished, code: 1 | 2, line: RegExp, what: string): void {
  const { stderr } = finished;
  assert.equal(finished.code, code, `${what}: ${stderr}`);
  assert.match(stderr, /^blockferry: [^\n]+\n$/, `${what}: one line`);
  assert.match(stderr, line, what);
  assert.doesNotMatch(stderr, /\n\s+at |node:internal|TypeError|undefined/, what);
  assert.ok(stderr.length <= LINE_BYTES_MAX, `${what}: ${stderr.length} bytes`);
  assert.equal(finished.stdout, '', what);
}

/** Everything in a folder: name, size and content, sockets apart. */
export function snapshot(folder: string): Record<string, string> {
  const files: Record<string, string> = {};
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    const path = join(entry.parentPath, entry.name);
    if (!entry.isFile()) continue;
    files[path] = `${lstatSync(path).size} ${createHash('sha256').update(readFileSync(path)).digest('hex')}`;
  }
  return files;
}

/** Waits until `condition` gives something else than undefined or false. */
export async function eventually<Value>(
  condition: () => Promise<Value | undefined | false> | Value | undefined | false,
  what: string,
  timeoutMs = 15_000,
): Promise<Value> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    const value = await condition();
    if (value !== undefined && value !== false) return value;
    assert.ok(performance.now() < deadline, `waited in vain for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}
