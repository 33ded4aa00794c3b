/** Starting and stopping machines of a host by hand. */

import type { Command } from 'commander';
import { argument, controlCommand, type FindOptions, findMachine } from './common.js';
import { parseSeconds } from './units.js';

/** What a guest gets to power off. */
const POWERDOWN_MS = 30_000;

export function startCommand(): Command {
  return controlCommand('start', 'start a machine of a host')
    .argument('<vm>', 'machine')
    .action(async (name: string, options: FindOptions) => {
      const { client, machine } = await findMachine(name, options, '--control');
      const { state, pid } = await client.startMachine(machine.name);
      process.stdout.write(`${name}: ${state}, process ${pid}\n`);
    });
}

export function stopCommand(): Command {
  return controlCommand(
    'stop',
    'stop a machine of a host: its guest is asked to power off, then its process ends',
  )
    .argument('<vm>', 'machine')
    .option(
      '--wait <seconds>',
      'what the guest gets to power off, at most 60 (default: 30)',
      argument(parseSeconds),
    )
    .option('--now', 'do not ask the guest', false)
    .action(async (name: string, options: FindOptions & { wait?: number; now: boolean }) => {
      const { client, machine } = await findMachine(name, options, '--control');
      const mode = options.now ? 'quit' : 'powerdown';
      const { state } = await client.stopMachine(machine.name, {
        mode,
        timeoutMs: options.wait ?? POWERDOWN_MS,
      });
      process.stdout.write(`${name}: ${state}\n`);
    });
}
