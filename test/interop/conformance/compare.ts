/**
 * Runs the conformance suite against blockferry, nbdkit, qemu-nbd and nbd-server, and prints docs/protocol.md's table of results:
 *
 *     node dist/test/interop/conformance/compare.js [--all] [--write] [--json]
 *
 * The table has the counts, what somebody fails, and what is answered differently; `--all` has every case. `--write` puts the tables
 * into docs/protocol.md, between its marks. A server that is not installed is left out.
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { blockferry, nbdkit, nbdServer, type Peer, qemuNbd } from './peers.js';
import { CASES, countsOf, type Result, runCase } from './suite.js';
import { probe } from './target.js';

const DOCUMENT = fileURLToPath(new URL('../../../../docs/protocol.md', import.meta.url));
const BEGIN = '<!-- results: written by compare.js -->';
const END = '<!-- end of results -->';

const PEERS: readonly [program: string, start: (folder: string) => Promise<Peer>][] = [
  ['node', blockferry],
  ['nbdkit', nbdkit],
  ['qemu-nbd', qemuNbd],
  ['nbd-server', nbdServer],
];

interface Column {
  name: string;
  version: string;
  results: Result[];
  /** Cases after which the server had to be started again. */
  ended: string[];
}

async function columnOf(start: (folder: string) => Promise<Peer>, folder: string): Promise<Column> {
  const peer = await start(folder);
  try {
    const target = await probe(peer.uris);
    const results: Result[] = [];
    const ended: string[] = [];
    for (const one of CASES) {
      let result = await runCase(one, target);
      if (result.outcome === 'fail' && (await peer.revive())) {
        // Whose fault was it? A process that dies slowly is missed only by the case behind the one that killed it.
        result = await runCase(one, target);
        const own = await peer.revive();
        blame(own ? result : (results.at(-1) ?? result), ended);
      }
      results.push(result);
    }
    return { name: peer.name, version: peer.version, results, ended };
  } finally {
    await peer.stop();
  }
}

function blame(result: Result, ended: string[]): void {
  ended.push(result.name);
  result.outcome = 'fail';
  result.detail = 'the server process ended';
}

function cell({ outcome, detail }: Result): string {
  if (outcome === 'not offered') return '-';
  if (outcome === 'fail') return `**fail**${detail === '' ? '' : `: ${escaped(detail)}`}`;
  return detail === '' ? 'pass' : escaped(detail);
}

function escaped(text: string): string {
  const short = text.length > 100 ? `${text.slice(0, 97)}...` : text;
  return short.replaceAll('|', '\\|').replaceAll('<', '&lt;');
}

function table(head: string[], rows: string[][]): string {
  const line = (cells: string[]) => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)].join('\n');
}

function rowsWhere(columns: Column[], wanted: (results: Result[]) => boolean): string[][] {
  return CASES.flatMap(({ clause, level, name }, index) => {
    const results = columns.map((column) => column.results[index]!);
    return wanted(results) ? [[`${clause} ${level}`, escaped(name), ...results.map(cell)]] : [];
  });
}

export function document(columns: Column[], all: boolean): string {
  const names = columns.map(({ name, version }) => `${name} ${version}`);
  const counts = columns.map(({ results }) => countsOf(results));
  const parts = [
    table(
      ['', ...names],
      [
        ['pass', ...counts.map((count) => `${count.pass}`)],
        ['fail a MUST', ...counts.map((count) => `${count.failedMusts}`)],
        ['fail a SHOULD', ...counts.map((count) => `${count.fail - count.failedMusts}`)],
        ['not offered', ...counts.map((count) => `${count['not offered']}`)],
      ],
    ),
    '### What is failed',
    table(
      ['', 'case', ...names],
      rowsWhere(columns, (results) => results.some(({ outcome }) => outcome === 'fail')),
    ),
    '### What is answered differently where the protocol is free',
    table(
      ['', 'case', ...names],
      rowsWhere(
        columns,
        (results) =>
          results.every(({ outcome }) => outcome !== 'fail') &&
          new Set(results.filter(({ outcome }) => outcome === 'pass').map(({ detail }) => detail)).size > 1,
      ),
    ),
  ];
  if (all)
    parts.push(
      '### All cases',
      table(
        ['', 'case', ...names],
        rowsWhere(columns, () => true),
      ),
    );
  return parts.join('\n\n');
}

async function main(): Promise<void> {
  const { values } = parseArgs({
    options: {
      all: { type: 'boolean', default: false },
      write: { type: 'boolean', default: false },
      json: { type: 'boolean', default: false },
    },
  });
  const root = mkdtempSync(join(tmpdir(), 'blockferry-compare-'));
  const columns: Column[] = [];
  try {
    for (const [program, start] of PEERS) {
      if (spawnSync('which', [program]).status !== 0) {
        console.error(`left out, because it is not installed: ${program}`);
        continue;
      }
      const folder = join(root, program);
      mkdirSync(folder);
      columns.push(await columnOf(start, folder));
      console.error(`${program}: done`);
    }
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
  if (values.json) console.log(JSON.stringify(columns, null, 2));
  else console.log(document(columns, values.all));
  if (values.write) write(document(columns, false));
}

function write(text: string): void {
  const before = readFileSync(DOCUMENT, 'utf8');
  const [from, to] = [before.indexOf(BEGIN), before.indexOf(END)];
  if (from < 0 || to < from) throw new Error(`${DOCUMENT} has no marks for the results`);
  writeFileSync(DOCUMENT, `${before.slice(0, from)}${BEGIN}\n\n${text}\n\n${before.slice(to)}`);
}

await main();
