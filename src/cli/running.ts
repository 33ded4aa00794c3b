import type { Command } from 'commander';
import { controlCommand, type FindOptions, findVolume, volumeArgument } from './common.js';

export function pauseCommand(): Command {
  return controlCommand('pause', 'pause the background copy; reads of missing blocks go on')
    .addArgument(volumeArgument())
    .action(async (name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      await client.pause(volume.name);
    });
}

export function resumeCommand(): Command {
  return controlCommand('resume', 'go on with a paused background copy')
    .addArgument(volumeArgument())
    .action(async (name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      await client.resume(volume.name);
    });
}
