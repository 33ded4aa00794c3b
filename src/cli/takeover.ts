import type { Command } from 'commander';
import { controlCommand, type FindOptions, findVolume, volumeArgument } from './common.js';

export function takeoverCommand(): Command {
  return controlCommand(
    'takeover',
    'make a standby volume the only writer; its source must not be written to any more',
  )
    .addArgument(volumeArgument())
    .action(async (name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      const { generation } = await client.takeover(volume.name);
      process.stdout.write(`${volume.name}: taken over as generation ${generation}\n`);
    });
}
