import type { Command } from 'commander';
import { argument, controlCommand, type FindOptions, findVolume, volumeArgument } from './common.js';
import { parseRate } from './units.js';

export function rateCommand(): Command {
  return controlCommand('rate', 'limit the background copy of a volume')
    .argument('<rate>', 'as in 50M/s; "none" for no limit', argument(parseRate))
    .addArgument(volumeArgument())
    .action(async (bytesPerSecond: number | null, name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      await client.setRate(volume.name, bytesPerSecond);
    });
}
