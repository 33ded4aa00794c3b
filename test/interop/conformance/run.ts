/**
 * Runs the conformance suite against any NBD server:
 *
 *     node dist/test/interop/conformance/run.js --uri URI [--read-only-uri URI] [--tls-uri URI] [--tls-certificates DIR] [--only TEXT] [--json]
 *
 * It writes to the export. Exit code 1: a MUST was failed; 2: wrong usage, or no such server.
 */
import { parseArgs } from 'node:util';
import { CASES, countsOf, type Result, runCase } from './suite.js';
import { probe } from './target.js';

const USAGE =
  'usage: run.js --uri URI [--read-only-uri URI] [--tls-uri URI] [--tls-certificates DIR] [--only TEXT] [--json]';

function show({ clause, level, name, outcome, detail }: Result): string {
  return `${outcome.padEnd(11)}  ${clause} ${level}  ${name}${detail === '' ? '' : `  (${detail})`}`;
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      uri: { type: 'string' },
      'read-only-uri': { type: 'string' },
      'tls-uri': { type: 'string' },
      'tls-certificates': { type: 'string' },
      only: { type: 'string' },
      json: { type: 'boolean', default: false },
    },
  });
  const { uri, only, json } = values;
  if (uri === undefined) throw new Error(USAGE);
  const target = await probe({
    uri,
    readOnlyUri: values['read-only-uri'],
    tlsUri: values['tls-uri'],
    tlsCertificates: values['tls-certificates'],
  });
  const results: Result[] = [];
  for (const one of CASES) {
    if (only !== undefined && !`${one.clause} ${one.level} ${one.name}`.includes(only)) continue;
    const result = await runCase(one, target);
    results.push(result);
    if (!json) console.log(show(result));
  }
  const counts = countsOf(results);
  if (json) console.log(JSON.stringify({ uri, counts, results }, null, 2));
  else
    console.log(
      `\n${results.length} cases: ${counts.pass} pass, ${counts.fail} fail (${counts.failedMusts} of a MUST), ${counts['not offered']} not offered`,
    );
  return counts.failedMusts > 0 ? 1 : 0;
}

try {
  process.exitCode = await main();
} catch (error) {
  console.error((error as Error).message);
  process.exitCode = 2;
}
