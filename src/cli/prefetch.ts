import type { Command } from 'commander';
import { BlockferryError } from '../errors.js';
import { controlCommand, type FindOptions, findVolume, volumeArgument } from './common.js';
import { parseRange } from './units.js';

export function prefetchCommand(): Command {
  return controlCommand('prefetch', 'fetch a range ahead of need; ends when it is local')
    .argument('<range>', 'OFFSET:LENGTH or OFFSET-END, as in 1G:64M; or all')
    .addArgument(volumeArgument())
    .action(async (range: string, name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      if (volume.phase === 'unavailable')
        throw new BlockferryError('closed', `volume "${volume.name}": ${volume.error}`);
      const { offset, length } = parseRange(range, volume.size);
      await client.prefetch(volume.name, offset, length);
    });
}
