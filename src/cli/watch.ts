import type { Command } from 'commander';
import { controlCommand, type FindOptions, findVolume, volumeArgument } from './common.js';
import { LiveLine, progressLine } from './progress.js';

const POLL_MS = 500;

export function watchCommand(): Command {
  return controlCommand('watch', 'show the progress of a relocation; ends with its hand-off')
    .addArgument(volumeArgument())
    .action(async (name: string | undefined, options: FindOptions) => {
      const { client, volume } = await findVolume(name, options);
      const line = new LiveLine(process.stdout);
      try {
        for (;;) {
          const { done, volume: now } = await client.waitHandoff(volume.name, POLL_MS);
          if (done) {
            line.print(progressLine(now));
            return;
          }
          line.show(progressLine(now));
        }
      } finally {
        line.end();
      }
    });
}
