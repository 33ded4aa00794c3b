import { resolve } from 'node:path';
import { Command, Option } from 'commander';
import { BlockferryError } from '../errors.js';
import { ControlClient } from '../host/control/client.js';
import { defaultStateDir, migrationsDir } from '../host/state-dir.js';
import { runMove } from '../migration/coordinator.js';
import { Journal } from '../migration/journal.js';
import type { MoveProgress } from '../migration/perform.js';
import { makePlan, type Switch } from '../migration/plan.js';
import type { MoveResult } from '../migration/result.js';
import type { Compression } from '../nbd/codec/frames.js';
import { argument, findMachine, printJson, stateDirOption } from './common.js';
import { LiveLine, progressLine } from './progress.js';
import { formatDuration, formatSize, parseCompression, parseRate, parseSeconds } from './units.js';

interface MigrateOptions {
  from?: string;
  to?: string;
  switch: Switch;
  preCopyLimit?: number;
  compression?: Compression;
  bandwidth?: number | null;
  deleteSource: boolean;
  resume: boolean;
  abort: boolean;
  json: boolean;
  stateDir?: string;
}

export function migrateCommand(): Command {
  return new Command('migrate')
    .description('move a running machine with its disks to another host')
    .argument('<vm>', 'machine')
    .option(
      '--from <control>',
      'control socket of the host it runs on (default: the daemon of the state folder that has it)',
    )
    .option('--to <control>', 'control socket of the host it moves to')
    .addOption(
      new Option('--switch <when>', 'how much crosses before the machine moves')
        .choices(['now', 'hot', 'all'])
        .default('hot'),
    )
    .option(
      '--pre-copy-limit <seconds>',
      'move the machine after this long, however much has crossed (default: 3600)',
      argument(parseSeconds),
    )
    .option(
      '--compression <level>',
      'of the link: off, auto, or a level of zstd from -7 to 19 (default: as the destination is set)',
      argument(parseCompression),
    )
    .option(
      '--bandwidth <rate>',
      'limit for memory and for the background copy, each, as in 100M/s',
      argument(parseRate),
    )
    .option('--delete-source', 'delete the images at the source when the move is complete', false)
    .addOption(
      new Option('--resume', 'continue the unfinished move of this machine')
        .default(false)
        .conflicts('abort'),
    )
    .option('--abort', 'undo the unfinished move of this machine', false)
    .option('--json', 'print the result as JSON', false)
    .addOption(stateDirOption())
    .action(migrate);
}

async function migrate(vm: string, options: MigrateOptions): Promise<void> {
  const folder = migrationsDir(options.stateDir ?? defaultStateDir());
  const journal =
    options.resume || options.abort ? openUnfinished(folder, vm) : await begin(folder, vm, options);
  const interrupted = new AbortController();
  const interrupt = (): void => interrupted.abort();
  process.once('SIGINT', interrupt);
  process.once('SIGTERM', interrupt);
  const line = new LiveLine(process.stderr);
  const from = new ControlClient(options.from ?? journal.plan.from);
  const to = new ControlClient(options.to ?? journal.plan.to);
  let result: MoveResult;
  try {
    result = await runMove({
      from,
      to,
      journal,
      direction: options.abort ? 'back' : 'forward',
      signal: interrupted.signal,
      progress: (event) => show(line, event),
    });
  } finally {
    line.end();
    journal.close();
  }
  if (options.json) printJson(result);
  else process.stdout.write(summary(result));
  if (result.outcome === 'aborted' && !options.abort) {
    throw new BlockferryError(
      'migration',
      `"${vm}" was not moved: ${result.why ?? 'aborted'}; nothing is left at the destination`,
    );
  }
}

async function begin(folder: string, vm: string, options: MigrateOptions): Promise<Journal> {
  const { to } = options;
  if (to === undefined) throw new BlockferryError('usage', 'a new move needs --to CONTROL');
  const from =
    options.from ??
    (await findMachine(vm, options.stateDir === undefined ? {} : { stateDir: options.stateDir }, '--from'))
      .client.address;
  const earlier = Journal.list(folder).find((journal) => journal.vm === vm && !journal.finished);
  if (earlier) {
    throw new BlockferryError(
      'migration',
      `move ${earlier.id} of "${vm}" is unfinished: continue it with --resume or undo it with --abort`,
    );
  }
  const request = {
    vm,
    switch: options.switch,
    compression: options.compression ?? null,
    ...(options.preCopyLimit === undefined ? {} : { preCopyMsMax: options.preCopyLimit }),
    bandwidthBytesPerSecond: options.bandwidth ?? null,
    deleteSourceImages: options.deleteSource,
  };
  return Journal.create(
    folder,
    await makePlan(new ControlClient(controlPath(from)), new ControlClient(controlPath(to)), request),
  );
}

/** As it is kept in the journal: good in any folder. */
function controlPath(address: string): string {
  return resolve(address.replace(/^unix:/, ''));
}

function openUnfinished(folder: string, vm: string): Journal {
  const unfinished = Journal.list(folder).filter((journal) => journal.vm === vm && !journal.finished);
  const last = unfinished.at(-1);
  if (!last) throw new BlockferryError('not-found', `there is no unfinished move of "${vm}" in ${folder}`);
  return Journal.open(last.path);
}

function show(line: LiveLine, event: MoveProgress): void {
  if (event.kind === 'step') line.print(event.step);
  else if (event.kind === 'turn')
    line.print(event.direction === 'back' ? `turning back: ${event.why}` : `going on: ${event.why}`);
  else line.show(changing(event));
}

function changing(event: Exclude<MoveProgress, { kind: 'step' | 'turn' }>): string {
  switch (event.kind) {
    case 'ram': {
      const { ramTransferredBytes = 0, ramRemainingBytes = 0 } = event.info;
      return `memory: ${formatSize(ramTransferredBytes)} sent, ${formatSize(ramRemainingBytes)} left`;
    }
    case 'pre-copy':
    case 'relocation':
      return event.volumes.map(progressLine).join('; ');
    case 'waiting':
      return `waiting: ${event.why}`;
  }
}

export function summary(result: MoveResult): string {
  if (result.outcome === 'aborted') return `${result.vm}: not moved (${result.why ?? 'aborted'})\n`;
  const time = (ms: number | null): string => (ms === null ? 'unknown' : formatDuration(ms));
  const rows: [string, string][] = [
    ['moved', `${result.vm} (move ${result.id})`],
    ['downtime', `${time(result.downtimeMs)} as QEMU reports it`],
    [
      'switched',
      `after ${time(result.switchedMs)}, ${result.ramBytes === null ? 'unknown' : formatSize(result.ramBytes)} of memory sent`,
    ],
    ['handed off', `after another ${time(result.handoffMs)}`],
    ['total', time(result.totalMs)],
    ['machine', result.state ?? 'unknown'],
    [
      'disk',
      `${formatSize(result.demandBytes)} on demand, ${formatSize(result.backgroundBytes)} in the background, ${formatSize(result.zeroBytes)} were zero`,
    ],
  ];
  return rows.map(([key, value]) => `${key.padEnd(10)}  ${value}\n`).join('');
}
