import { Command, Option } from 'commander';
import { QUICK } from '../bench/cells.js';
import { LOAD_DEFAULTS, type LoadOptions, runLoad } from '../bench/load.js';
import { type ComparisonOptions, runComparison } from '../bench/run.js';
import { comparisonText, loadText } from '../bench/text.js';
import { BlockferryError } from '../errors.js';
import { argument, printJson } from './common.js';
import { LiveLine } from './progress.js';
import { parseRange, parseSeconds, parseSize, wholeNumber } from './units.js';

interface LoadWords {
  write: boolean;
  reads?: number;
  block: number;
  sequential: boolean;
  depth: number;
  connections: number;
  count?: number;
  flushEvery: number;
  range: { offset: number; length: number };
  seed: number;
  verify: boolean;
  structured: boolean;
}

/** Values of `comparisonFlags`. */
export interface ComparisonWords {
  seconds?: number;
  warmUp: number;
  only: string[];
  server: string[];
  rounds: number;
  image: number;
  folder?: string;
  tool: 'load' | 'fio';
}

interface BenchWords extends LoadWords, ComparisonWords {
  compare: boolean;
  json: boolean;
}

const LOAD_SECONDS = 5;
const COMPARE_SECONDS = 1;
const WARM_UP_MS = 300;

/** One more of an option that may be repeated. */
function oneMore(word: string, before: string[]): string[] {
  return [...before, word];
}

function rangeOf(text: string): { offset: number; length: number } {
  return text === 'all' ? { offset: 0, length: 0 } : parseRange(text, Number.MAX_SAFE_INTEGER);
}

/** Options of a comparison, for whoever offers one. */
export function comparisonFlags(byDefault: 'a few cells' | 'all'): Option[] {
  return [
    new Option(
      '--only <words>',
      'compare the cells that have these words, as in "read 4k d16 unix"; "hits": hits beside misses, "volumes": two busy volumes; "all"; may be repeated',
    )
      .argParser(oneMore)
      .default([], byDefault),
    new Option('--server <name>', 'compare the servers whose name has this in it; may be repeated')
      .argParser(oneMore)
      .default([], 'all'),
    new Option('--rounds <n>', 'how often each cell of a comparison is measured')
      .argParser(argument(wholeNumber(1, 1000)))
      .default(3),
    new Option('--image <size>', 'size of the images of a comparison')
      .argParser(argument(parseSize))
      .default(256 << 20, '256M'),
    new Option(
      '--folder <folder>',
      'where images on a disk are kept (default: the folder for temporary files)',
    ),
    new Option('--tool <tool>', 'what makes the load of a comparison')
      .choices(['load', 'fio'])
      .default('load'),
    secondsOption(),
    warmUpOption(),
  ];
}

function secondsOption(): Option {
  return new Option(
    '--seconds <s>',
    `how long to measure (default: ${LOAD_SECONDS}, or ${COMPARE_SECONDS} for each cell of a comparison)`,
  ).argParser(argument(parseSeconds));
}

function warmUpOption(): Option {
  return new Option('--warm-up <s>', 'how long to load before that')
    .argParser(argument(parseSeconds))
    .default(WARM_UP_MS, '0.3');
}

export function comparisonOptions(words: ComparisonWords, byDefault: readonly string[]): ComparisonOptions {
  const only = words.only.length > 0 ? words.only : byDefault;
  return {
    only,
    servers: words.server,
    rounds: words.rounds,
    durationMs: words.seconds ?? COMPARE_SECONDS * 1000,
    warmupMs: words.warmUp,
    imageBytes: words.image,
    ...(words.folder === undefined ? {} : { folder: words.folder }),
    tool: words.tool,
  };
}

/** Throws 'usage' for a load that would write without being told so. */
function loadOptions(words: BenchWords): LoadOptions {
  if (!words.write) {
    const writing = [
      words.reads !== undefined && words.reads < 100 ? '--reads' : null,
      words.verify ? '--verify' : null,
      words.flushEvery > 0 ? '--flush-every' : null,
    ].find((word) => word !== null);
    if (writing !== undefined)
      throw new BlockferryError(
        'usage',
        `${writing} is for a load that writes, and destroys what the export holds: say --write too`,
      );
  }
  const count = words.count ?? 0;
  return {
    ...LOAD_DEFAULTS,
    connections: words.connections,
    depth: words.depth,
    blockBytes: words.block,
    order: words.sequential ? 'sequential' : 'random',
    readPercent: words.reads ?? (words.write ? (words.verify ? 50 : 0) : 100),
    flushEvery: words.flushEvery,
    warmupMs: count > 0 ? 0 : words.warmUp,
    durationMs: count > 0 ? 0 : (words.seconds ?? LOAD_SECONDS * 1000),
    count,
    seed: words.seed,
    ...words.range,
    verify: words.verify,
    structured: words.structured,
  };
}

export function benchCommand(): Command {
  const command = new Command('bench')
    .description('load an NBD server and say how it did, or compare the NBD servers that are installed')
    .argument('[uri]', 'NBD URI of the export to load')
    .option('--write', 'write: DESTROYS what the export holds', false)
    .option(
      '--reads <percent>',
      'share of reads with --write (default: 0, or 50 with --verify)',
      argument(wholeNumber(0, 100)),
    )
    .option(
      '--verify',
      'with --write: check what is read, and at the end read all back that was written',
      false,
    )
    .addOption(
      new Option('--block <size>', 'of each request').argParser(argument(parseSize)).default(4096, '4K'),
    )
    .option('--sequential', 'in order, each connection a part of its own (default: random)', false)
    .option('--depth <n>', 'requests under way on each connection', argument(wholeNumber(1, 1024)), 16)
    .option('--connections <n>', 'connections to the server', argument(wholeNumber(1, 256)), 1)
    .option(
      '--count <n>',
      'stop after so many operations instead of a time',
      argument(wholeNumber(1, 2 ** 53 - 1)),
    )
    .option(
      '--flush-every <n>',
      'with --write: FLUSH after so many writes',
      argument(wholeNumber(0, 2 ** 32 - 1)),
      0,
    )
    .addOption(
      new Option('--range <range>', 'part of the export, OFFSET:LENGTH or OFFSET-END')
        .argParser(argument(rangeOf))
        .default({ offset: 0, length: 0 }, 'all'),
    )
    .option('--seed <n>', 'what the offsets follow from', argument(wholeNumber(0, 2 ** 53 - 1)), 1)
    .option('--structured', 'ask for structured replies', false)
    .option('--compare', 'compare the servers that are installed, on images of its own', false)
    .option('--json', 'print JSON', false);
  for (const option of comparisonFlags('a few cells')) command.addOption(option);
  return command.action(async (uri: string | undefined, words: BenchWords) => {
    if (words.compare === (uri !== undefined))
      throw new BlockferryError('usage', 'say what to load, an NBD URI, or --compare');
    if (words.compare) return compare(words);
    const options = loadOptions(words);
    const result = await runLoad(uri!, options);
    if (words.json) printJson(result);
    else process.stdout.write(`${loadText(options, result)}\n`);
  });
}

async function compare(words: BenchWords): Promise<void> {
  const line = new LiveLine(process.stderr);
  try {
    const report = await runComparison(comparisonOptions(words, QUICK), (text) => line.show(text));
    line.end();
    if (words.json) printJson(report);
    else process.stdout.write(`${comparisonText(report)}\n`);
  } finally {
    line.end();
  }
}
