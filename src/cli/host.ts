import { join } from 'node:path';
import { Command } from 'commander';
import { guestPolicyOf, linkPolicyOf, readConfig } from '../host/config.js';
import { daemonLog, runDaemon } from '../host/run.js';
import { logLevelOption } from './common.js';
import { announce } from './daemon.js';
import { daemonParts } from './parts.js';

export function hostCommand(): Command {
  return new Command('host')
    .description('the daemon of one host: volumes, machines, and the control socket that `migrate` uses')
    .requiredOption('--config <file>', 'YAML configuration')
    .addOption(logLevelOption())
    .action(async (options: { config: string; logLevel: string }) => {
      const config = readConfig(options.config);
      const diskSocket = (volume: string): string => join(config.run, 'nbd', `${volume}.sock`);
      const machinesDir = join(config.run, 'vms');
      const { name, stateDir, control, link, images, migrationAddress, stopTimeoutMs, vms } = config;
      const { linkTls, sourceTls, limits } = config;
      await runDaemon(
        {
          kind: 'host',
          name,
          stateDir,
          control,
          link,
          ...(linkTls === null ? {} : { linkTls }),
          ...(sourceTls === null ? {} : { sourceTls }),
          guestPolicy: (volume) => guestPolicyOf(config, volume),
          linkPolicy: (volume) => linkPolicyOf(config, volume),
          compression: config.compression,
          ...(config.orderFrom === null ? {} : { orderFrom: config.orderFrom }),
          seeds: config.seeds,
          linkListsExports: config.listExports,
          limits,
          images,
          folders: [join(config.run, 'nbd'), machinesDir],
          machinesDir,
          guestAddresses: (volume) => [`unix:${diskSocket(volume)}`],
          diskSocket,
          migrationAddress,
          stopTimeoutMs,
          volumes: config.volumes.map(({ name, image }) => ({
            name,
            image,
            mode: { kind: 'serve', readOnly: false },
          })),
          transactionLogs: new Map(
            config.volumes.flatMap((volume) =>
              volume.transactionLog === undefined ? [] : [[volume.name, volume.transactionLog] as const],
            ),
          ),
          vms,
          toleratesBadVolumes: true,
          parts: daemonParts(machinesDir, config.dataThreads),
          log: daemonLog(name, options.logLevel),
        },
        (uris) => announce(uris, process.stdout),
      );
    });
}
