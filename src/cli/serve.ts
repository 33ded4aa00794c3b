import { Command, Option } from 'commander';
import { parseListenAddress } from '../nbd/address.js';
import { clientOptions } from './clients.js';
import { argument, logLevelOption, stateDirOption, transactionLogOptions } from './common.js';
import { type OneVolumeOptions, runOneVolume } from './daemon.js';
import { tlsCertificatesOption, tlsModeOption, tlsPskOption, tlsVerifyPeerOption } from './tls.js';

const checkAddress = argument(parseListenAddress);

export function listenOption(): Option {
  return new Option(
    '--listen <addr>',
    'unix:PATH, HOST:PORT, [V6]:PORT, fd:N or stdio; may be repeated (default: 127.0.0.1:10809, or the sockets of socket activation)',
  ).argParser((address: string, before: string[] | undefined) => {
    checkAddress(address);
    return [...(before ?? []), address];
  });
}

export function serveCommand(): Command {
  const [transactionLog, transactionLogData] = transactionLogOptions();
  const command = new Command('serve')
    .description('serve a raw image file or block device over NBD')
    .argument('<disk>', 'image file or block device; it must exist')
    .option('--name <name>', 'name of the volume and its export (default: from the file name)')
    .addOption(listenOption())
    .option('--read-only', 'refuse writes', false)
    .addOption(tlsModeOption())
    .addOption(tlsCertificatesOption())
    .addOption(tlsPskOption())
    .addOption(tlsVerifyPeerOption())
    .addOption(stateDirOption())
    .addOption(transactionLog)
    .addOption(transactionLogData)
    .option('--control <path>', 'path of the control socket (default: STATE/control/NAME.sock)')
    .addOption(logLevelOption())
    .action(async (disk: string, options: OneVolumeOptions & { readOnly: boolean }) => {
      await runOneVolume('serve', disk, options, { kind: 'serve', readOnly: options.readOnly });
    });
  for (const option of clientOptions()) command.addOption(option);
  return command;
}
