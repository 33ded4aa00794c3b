/** The command line. Exit code 0 done, 1 failed (one line on stderr), 2 wrong usage. */

import { Command, CommanderError, Help, type Option } from 'commander';
import { BlockferryError, messageOf } from '../errors.js';
import { VERSION } from '../version.js';
import { benchCommand } from './bench.js';
import { hostCommand } from './host.js';
import { startCommand, stopCommand } from './machine.js';
import { migrateCommand } from './migrate.js';
import { prefetchCommand } from './prefetch.js';
import { proxyCommand } from './proxy.js';
import { rateCommand } from './rate.js';
import { pauseCommand, resumeCommand } from './running.js';
import { serveCommand } from './serve.js';
import { statusCommand } from './status.js';
import { takeoverCommand } from './takeover.js';
import { verifyCommand } from './verify.js';
import { watchCommand } from './watch.js';

const FAILED = 1;
const WRONG_USAGE = 2;

function program(): Command {
  const root = new Command('blockferry')
    .description("Moves a running virtual machine's disk from one host to another, at block level")
    .version(VERSION)
    .showSuggestionAfterError(true);
  const commands = [
    serveCommand(),
    proxyCommand(),
    hostCommand(),
    startCommand(),
    stopCommand(),
    migrateCommand(),
    statusCommand(),
    watchCommand(),
    takeoverCommand(),
    prefetchCommand(),
    pauseCommand(),
    resumeCommand(),
    rateCommand(),
    verifyCommand(),
    benchCommand(),
  ];
  for (const command of commands) root.addCommand(command);
  for (const command of [root, ...commands])
    command.exitOverride().configureHelp({ optionDescription }).configureOutput({ outputError });
  return root;
}

/** As commander has it, without "(default: false)" at every switch. */
function optionDescription(this: Help, option: Option): string {
  return option.isBoolean() ? option.description : Help.prototype.optionDescription.call(this, option);
}

/** One line, as every failure of ours. */
function outputError(text: string, write: (text: string) => void): void {
  write(
    `${text
      .trim()
      .replace(/^error: /, 'blockferry: ')
      .replaceAll(/\s*\n\s*/g, ' ')}\n`,
  );
}

/** The exit code. */
async function main(words: string[]): Promise<number> {
  try {
    await program().parseAsync(words, { from: 'user' });
    return 0;
  } catch (error) {
    if (error instanceof CommanderError) return error.exitCode === 0 ? 0 : WRONG_USAGE;
    const line = messageOf(error).replaceAll(/\s*\n\s*/g, ' ');
    process.stderr.write(`blockferry: ${line}\n`);
    if (
      !(error instanceof BlockferryError) &&
      error instanceof Error &&
      process.env.BLOCKFERRY_DEBUG !== undefined
    ) {
      process.stderr.write(`${error.stack}\n`);
    }
    return error instanceof BlockferryError && error.code === 'usage' ? WRONG_USAGE : FAILED;
  }
}

// A reader that went away (`status | head`) is no failure of ours.
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  process.exit(error.code === 'EPIPE' ? 0 : FAILED);
});

// Open keep-alive connections and the like must not hold a finished command back.
const code = await main(process.argv.slice(2));
process.exitCode = code;
const leave = (): never => process.exit(code);
if (process.stdout.writableLength === 0) leave();
else process.stdout.once('drain', leave);
