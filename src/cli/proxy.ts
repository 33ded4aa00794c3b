import { existsSync } from 'node:fs';
import { Command, InvalidArgumentError, Option } from 'commander';
import { BlockferryError } from '../errors.js';
import type { Compression } from '../nbd/codec/frames.js';
import { CHANGED, DIRTY, DIRTY_BITMAP } from '../nbd/constants.js';
import { parseNbdUri } from '../nbd/uri.js';
import type { BackgroundOrder } from '../relocation/background.js';
import { SEEDS_MAX } from '../relocation/seeds.js';
import { clientOptions } from './clients.js';
import { argument, logLevelOption, stateDirOption, transactionLogOptions } from './common.js';
import { type OneVolumeOptions, runOneVolume } from './daemon.js';
import { listenOption } from './serve.js';
import {
  tlsCertificatesOption,
  tlsModeOption,
  tlsPskOption,
  tlsUsernameOption,
  tlsVerifyPeerOption,
} from './tls.js';
import { parseCompression, parseRate, parseSeconds } from './units.js';

interface ProxyOptions extends OneVolumeOptions {
  standby: boolean;
  preCopy?: string;
  bandwidth?: number | null;
  background: boolean;
  readAhead: boolean;
  order: BackgroundOrder;
  sourceTimeout?: number;
  compression: Compression;
  seed?: string[];
}

function checkedUri(text: string): string {
  parseNbdUri(text);
  return text;
}

function seedOption(): Option {
  return new Option(
    '--seed <image>',
    'an image here, such as a template: blocks of the source that it has are copied from it; may be repeated',
  ).argParser((image: string, before: string[] | undefined) => [
    ...(before ?? []),
    checkedSeed(image, before),
  ]);
}

const checkedSeed = (image: string, before: string[] = []): string => {
  if (before.length >= SEEDS_MAX) throw new InvalidArgumentError(`at most ${SEEDS_MAX} seeds`);
  if (existsSync(image)) return image;
  throw new InvalidArgumentError(`there is no image ${image}`);
};

export function proxyCommand(): Command {
  const [transactionLog, transactionLogData] = transactionLogOptions();
  const command = new Command('proxy')
    .description('serve DISK at once while its blocks still come from an NBD source')
    .argument('<source-uri>', 'NBD URI of the source', argument(checkedUri))
    .argument('<disk>', 'image file, created sparse with the size of the source if it is not there')
    .option('--name <name>', 'name of the volume and its export (default: from the file name)')
    .addOption(listenOption())
    .option('--standby', 'keep nothing that is read until the first write or `takeover`', false)
    .option(
      '--pre-copy <context>',
      'of a standby: copy ahead, from a source that tells its changes in this metadata context, as in qemu:dirty-bitmap:NAME',
    )
    .option('--bandwidth <rate>', 'limit of the background copy, as in 100M/s', argument(parseRate))
    .addOption(
      new Option('--order <order>', 'order of the background copy')
        .choices(['hot', 'recorded', 'linear'])
        .default('hot'),
    )
    .option('--order-from <file>', 'record of an earlier move to copy by, where the source tells none')
    .option('--no-background', 'fetch only what is read, or about to be')
    .option('--no-read-ahead', 'do not fetch what streams are about to read')
    .option(
      '--source-timeout <seconds>',
      'fail reads after this long without the source (default: wait)',
      argument(parseSeconds),
    )
    .option(
      '--compression <level>',
      'of the link to a blockferry: off, auto, or a level of zstd from -7 to 19 (not 0)',
      argument(parseCompression),
      'auto',
    )
    .addOption(seedOption())
    .addOption(tlsModeOption())
    .addOption(tlsCertificatesOption())
    .addOption(tlsPskOption())
    .addOption(tlsVerifyPeerOption())
    .addOption(tlsUsernameOption())
    .addOption(stateDirOption())
    .addOption(transactionLog)
    .addOption(transactionLogData)
    .option('--control <path>', 'path of the control socket (default: STATE/control/NAME.sock)')
    .addOption(logLevelOption())
    .action(async (sourceUri: string, disk: string, options: ProxyOptions) => {
      const { standby, preCopy: context } = options;
      if (context === DIRTY || context === CHANGED || context === DIRTY_BITMAP)
        throw new BlockferryError(
          'usage',
          `${context} is for \`blockferry migrate\`: --pre-copy takes a bitmap of QEMU's`,
        );
      if (context !== undefined && !standby)
        throw new BlockferryError('usage', '--pre-copy is for a standby: give --standby as well');
      if (options.orderFrom !== undefined && options.order === 'linear')
        throw new BlockferryError(
          'usage',
          '--order-from: --order linear replays nothing, leave one of them out',
        );
      await runOneVolume('proxy', disk, options, {
        kind: 'proxy',
        sourceUri,
        standby,
        preCopy: context === undefined ? null : { context, cookie: null, fills: true },
        background: options.background,
        readAhead: options.readAhead,
        order: options.order,
        rateBytesPerSecond: options.bandwidth ?? null,
        sourceTimeoutMs: options.sourceTimeout ?? null,
      });
    });
  for (const option of clientOptions()) command.addOption(option);
  return command;
}
