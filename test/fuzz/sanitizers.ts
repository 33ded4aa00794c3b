/**
 * The native addon under AddressSanitizer and UndefinedBehaviorSanitizer: built beside the usual one, in native/build-sanitized, and
 * what the environment of a process must be that loads it.
 */
import { execFile, execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, readdirSync, statSync } from 'node:fs';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const run = promisify(execFile);

export const ROOT = resolve(fileURLToPath(import.meta.url), '../../../..');
const FOLDER = join(ROOT, 'native/build-sanitized');
export const SANITIZED_ADDON = join(FOLDER, 'build/Release/blockferry.node');
const BUILD_TIMEOUT_MS = 300_000;

/** What is in native/ but for what is built there. */
function parts(): string[] {
  return readdirSync(join(ROOT, 'native')).filter((part) => !part.startsWith('build'));
}

function isUpToDate(): boolean {
  if (!existsSync(SANITIZED_ADDON)) return false;
  const { mtimeMs } = statSync(SANITIZED_ADDON);
  const sources = parts().flatMap((part) => {
    const path = join(ROOT, 'native', part);
    return statSync(path).isDirectory() ? readdirSync(path).map((file) => join(path, file)) : [path];
  });
  return sources.every((file) => statSync(file).mtimeMs <= mtimeMs);
}

/** Builds it unless that is done. */
export async function buildSanitized(): Promise<void> {
  if (isUpToDate()) return;
  mkdirSync(FOLDER, { recursive: true });
  for (const part of parts()) cpSync(join(ROOT, 'native', part), join(FOLDER, part), { recursive: true });
  // Headers that came with Node need not be downloaded.
  const prefix = dirname(dirname(process.execPath));
  const headers = existsSync(join(prefix, 'include/node/node_api.h')) ? { npm_config_nodedir: prefix } : {};
  const env = { ...process.env, ...headers, BLOCKFERRY_SANITIZE: '1' };
  await run('npm', ['run', '--silent', 'build:sanitized'], { cwd: ROOT, env, timeout: BUILD_TIMEOUT_MS });
}

/** For a process that is to run with it. What the sanitizers find ends the process, with a report on stderr. */
export function sanitizedEnv(): NodeJS.ProcessEnv {
  const { NODE_TEST_CONTEXT: _, ...env } = process.env;
  return {
    ...env,
    BLOCKFERRY_ADDON: SANITIZED_ADDON,
    LD_PRELOAD: execFileSync('g++', ['-print-file-name=libasan.so'], { encoding: 'utf8' }).trim(),
    // Node itself lets go of its memory by exiting.
    ASAN_OPTIONS: 'detect_leaks=0:allocator_may_return_null=1:exitcode=99',
    UBSAN_OPTIONS: 'print_stacktrace=1:halt_on_error=1',
  };
}
