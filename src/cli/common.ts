/** What several commands need: finding daemons and volumes, options in common, the way out. */

import { Argument, Command, InvalidArgumentError, Option } from 'commander';
import { BlockferryError } from '../errors.js';
import type { MachineView, StatusView, VolumeView } from '../host/control/api.js';
import { ControlClient } from '../host/control/client.js';
import { liveControlSockets } from '../host/control/socket.js';
import { defaultStateDir } from '../host/state-dir.js';

export interface FindOptions {
  stateDir?: string;
  control?: string;
}

export interface FoundDaemon {
  client: ControlClient;
  status: StatusView;
}

/** Turns a parser that throws BlockferryError 'usage' into one that commander reports as wrong usage. */
export function argument<Value>(parse: (text: string) => Value): (text: string) => Value {
  return (text) => {
    try {
      return parse(text);
    } catch (error) {
      if (error instanceof BlockferryError) throw new InvalidArgumentError(error.message);
      throw error;
    }
  };
}

export function stateDirOption(): Option {
  return new Option(
    '--state-dir <folder>',
    'where state is kept (default: $BLOCKFERRY_STATE_DIR, /var/lib/blockferry as root, else the XDG state folder)',
  );
}

/** What `findVolume` makes of no name. */
export function volumeArgument(): Argument {
  return new Argument('[volume]', 'volume (default: the only one, or the only one that is on its way)');
}

export function logLevelOption(): Option {
  return new Option('--log-level <level>', 'what is logged on stderr')
    .choices(['fatal', 'error', 'warn', 'info', 'debug', 'silent'])
    .default('info');
}

/** Options of the transaction log, for a daemon of one volume. */
export function transactionLogOptions(): [Option, Option] {
  return [
    new Option('--transaction-log <file>', 'record the requests of clients, for nbd-trdump; appends'),
    new Option(
      '--transaction-log-data',
      'record what is written as well, for nbd-trplay; the log grows by all of it',
    ).default(false),
  ];
}

/** A command that talks to running daemons. */
export function controlCommand(name: string, description: string): Command {
  return new Command(name)
    .description(description)
    .addOption(stateDirOption())
    .option('--control <path>', 'control socket of the daemon (default: all daemons of the state folder)');
}

/** Daemons that answer. With `--control` it is that one, and it must answer. */
export async function findDaemons(options: FindOptions): Promise<FoundDaemon[]> {
  if (options.control !== undefined) {
    const client = new ControlClient(options.control);
    return [{ client, status: await client.status() }];
  }
  const sockets = await liveControlSockets(options.stateDir ?? defaultStateDir());
  const found = await Promise.all(
    sockets.map(async (path) => {
      const client = new ControlClient(path);
      try {
        return { client, status: await client.status() };
      } catch (error) {
        // It went away since it was listed.
        if (error instanceof BlockferryError && error.code === 'control') return null;
        throw error;
      }
    }),
  );
  return found.filter((daemon) => daemon !== null);
}

function nobody(options: FindOptions): BlockferryError {
  const where = options.stateDir ?? defaultStateDir();
  return new BlockferryError(
    'control',
    `no daemon runs on ${where}: start one, or name its socket with --control`,
  );
}

/** The daemon that has the volume; without a name it is the only volume there is, or the only one that is on its way. */
export async function findVolume(
  name: string | undefined,
  options: FindOptions,
): Promise<{ client: ControlClient; volume: VolumeView }> {
  const daemons = await findDaemons(options);
  if (daemons.length === 0) throw nobody(options);
  const all = daemons.flatMap(({ client, status }) => status.volumes.map((volume) => ({ client, volume })));
  const moving = all.filter(({ volume }) => volume.phase === 'standby' || volume.phase === 'relocating');
  const unnamed = all.length > 1 && moving.length === 1 ? moving : all;
  const fitting = name === undefined ? unnamed : all.filter(({ volume }) => volume.name === name);
  if (fitting.length === 1) return fitting[0];
  const known = all.map(({ volume }) => volume.name).join(', ');
  if (fitting.length === 0) {
    const what = name === undefined ? 'no volume is served' : `no daemon has a volume "${name}"`;
    throw new BlockferryError('not-found', `${what}${known === '' ? '' : `; there is ${known}`}`);
  }
  const what = name === undefined ? 'several volumes are served' : `several daemons have a volume "${name}"`;
  const how = name === undefined ? `name one of ${known}` : 'name the daemon with --control';
  throw new BlockferryError('usage', `${what}: ${how}`);
}

/** The daemon that knows the machine and from which it has not moved away. `flag` names a daemon in commands about it. */
export async function findMachine(
  name: string,
  options: FindOptions,
  flag: string,
): Promise<{ client: ControlClient; machine: MachineView }> {
  const daemons = await findDaemonsOrFail(options);
  const having = daemons.flatMap(({ client, status }) =>
    status.vms
      .filter((vm) => vm.name === name && vm.state !== 'departed')
      .map((machine) => ({ client, machine })),
  );
  if (having.length === 1) return having[0];
  const why = having.length === 0 ? 'no daemon here has' : 'several daemons here have';
  throw new BlockferryError('not-found', `${why} a machine "${name}": name its host with ${flag}`);
}

export async function findDaemonsOrFail(options: FindOptions): Promise<FoundDaemon[]> {
  const daemons = await findDaemons(options);
  if (daemons.length === 0) throw nobody(options);
  return daemons;
}

export function printJson(value: unknown): void {
  process.stdout.write(`${JSON.stringify(value, null, 2)}\n`);
}
